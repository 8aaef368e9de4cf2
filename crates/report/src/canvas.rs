//! The canvas of all pictures, with their size, colours and font, for equal SVG and PNG files.

use std::path::Path;
use std::sync::LazyLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::file::{Error, Result, replace, write_text};
use crate::names::{Look, PALETTE};
use crate::scale::ticks;

/// The size of a picture in its own units, unless it needs [more](Picture::more) height.
pub(crate) const WIDTH: f64 = 1200.0;
pub(crate) const HEIGHT: f64 = 720.0;
/// The left edge of all text.
pub(crate) const LEFT: f64 = 48.0;
/// The right edge of all text.
pub(crate) const RIGHT: f64 = WIDTH - LEFT;
/// The distance between the lines of a legend.
const LEGEND_LINE: f64 = 26.0;
/// The factor that enlarges all coordinates, because both backends only have integer coordinates.
const SCALE: f64 = 4.0;
/// The width and height in pixels of the squares whose mean becomes one pixel of the PNG.
const SHRINK: usize = 2;

pub(crate) const INK: RGBColor = RGBColor(34, 34, 34);
pub(crate) const SOFT: RGBColor = RGBColor(105, 105, 105);
pub(crate) const GRID: RGBColor = RGBColor(228, 228, 228);
pub(crate) const ALARM: RGBColor = RGBColor(196, 64, 0);

/// The font, and fallbacks for a viewer of the SVG that does not have it.
const FONT: &str = "Inter, Helvetica, Arial, sans-serif";

static FONT_REGISTERED: LazyLock<bool> = LazyLock::new(|| {
    let faces: [(FontStyle, &[u8]); 2] = [
        (FontStyle::Normal, include_bytes!("../assets/Inter-Regular.otf")),
        (FontStyle::Bold, include_bytes!("../assets/Inter-SemiBold.otf")),
    ];
    faces.into_iter().all(|(style, bytes)| register_font(FONT, style, bytes).is_ok())
});

pub(crate) type Drawn = std::result::Result<(), String>;

/// A picture that can be drawn on a [`Canvas`].
pub(crate) trait Picture: Sized {
    /// Draws the picture on a white canvas that is [`WIDTH`] wide.
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn;

    /// Returns the height that the picture needs in addition to [`HEIGHT`], because a part of it
    /// has more lines than usual.
    fn more(&self) -> f64 {
        0.0
    }

    /// Writes the picture as SVG and as PNG (2400×1440, or higher).
    fn write(&self, svg: &Path, png: &Path) -> Result<()> {
        let text = svg_of(self).map_err(|reason| Error::Draw { path: svg.into(), reason })?;
        write_text(&text, svg)?;
        replace(png, |temporary| {
            png_of(self, temporary).map_err(|reason| Error::Draw { path: png.into(), reason })
        })
    }
}

fn svg_of(picture: &impl Picture) -> std::result::Result<String, String> {
    let height = HEIGHT + picture.more();
    let (wide, high) = ((WIDTH * SCALE) as u32, (height * SCALE) as u32);
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, (wide, high)).into_drawing_area();
    // In SVG, plotters takes size / 1.24 as one em and puts the baseline 0.76 em below the top.
    Canvas { area, em: 1.24, baseline: 0.76 }.show(picture)?;
    // The view box keeps the enlarged coordinates; the width and height are those of the picture.
    let fine = format!("width=\"{wide}\" height=\"{high}\"");
    Ok(text.replacen(&fine, &format!("width=\"{WIDTH}\" height=\"{height}\""), 1))
}

fn png_of(picture: &impl Picture, path: &Path) -> Drawn {
    let (wide, high) = ((WIDTH * SCALE) as usize, ((HEIGHT + picture.more()) * SCALE) as usize);
    let mut pixels = vec![0; wide * high * 3];
    let area = BitMapBackend::with_buffer(&mut pixels, (wide as u32, high as u32)).into_drawing_area();
    // In bitmaps, size is the font's ascent plus descent, 1.21 em, with the baseline in the middle.
    Canvas { area, em: 1.21, baseline: 0.605 }.show(picture)?;

    let (wide, high) = (wide / SHRINK, high / SHRINK);
    let mut small = vec![0; wide * high * 3];
    for (index, value) in small.iter_mut().enumerate() {
        let (x, y, channel) = (index / 3 % wide, index / 3 / wide, index % 3);
        let square = (0..SHRINK * SHRINK).map(|part| {
            let (x, y) = (SHRINK * x + part % SHRINK, SHRINK * y + part / SHRINK);
            usize::from(pixels[(y * wide * SHRINK + x) * 3 + channel])
        });
        *value = (square.sum::<usize>() / (SHRINK * SHRINK)) as u8;
    }
    let size = (wide as u32, high as u32);
    let mut file = BitMapBackend::new(path, size);
    file.blit_bitmap((0, 0), size, &small).map_err(text_of)?;
    file.present().map_err(text_of)
}

/// The style of a text.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    pub(crate) colour: RGBColor,
    pub(crate) bold: bool,
    /// The size of one em.
    pub(crate) size: f64,
    /// The part of the text that is at the given point.
    pub(crate) side: HPos,
}

pub(crate) const INK_BOLD: Style = Style { colour: INK, bold: true, size: 14.0, side: HPos::Left };
pub(crate) const INK_PLAIN: Style = Style { bold: false, ..INK_BOLD };
pub(crate) const SOFT_PLAIN: Style = Style { colour: SOFT, ..INK_PLAIN };

impl Style {
    pub(crate) fn sized(self, size: f64) -> Self {
        Style { size, ..self }
    }

    pub(crate) fn held(self, side: HPos) -> Self {
        Style { side, ..self }
    }

    fn weight(&self) -> FontStyle {
        if self.bold { FontStyle::Bold } else { FontStyle::Normal }
    }

    /// Returns the width of `text` in the picture's units.
    pub(crate) fn width(&self, text: &str) -> f64 {
        LazyLock::force(&FONT_REGISTERED);
        let fine = FontDesc::new(FontFamily::Name(FONT), 1210.0, self.weight());
        fine.box_size(text).map_or(0.0, |(wide, _)| f64::from(wide) * self.size / 1000.0)
    }

    /// Returns the width to leave for `text`. Wider fonts stand in for ours where it is missing:
    /// DejaVu Sans is a tenth wider, and a fifth if bold.
    pub(crate) fn room(&self, text: &str) -> f64 {
        self.width(text) * if self.bold { 1.2 } else { 1.1 }
    }

    /// Returns the style at a size at which `text` fits into `room`.
    pub(crate) fn fitting(self, text: &str, room: f64) -> Self {
        self.sized(self.size * (room / self.room(text)).min(1.0))
    }
}

pub(crate) type Point = (f64, f64);

/// A drawing area in the picture's units, with equal results for SVG and PNG.
pub(crate) struct Canvas<DB: DrawingBackend> {
    area: DrawingArea<DB, Shift>,
    /// The backend's font size divided by the size of one em.
    em: f64,
    /// The distance from the top of a text to its baseline, in ems.
    baseline: f64,
}

impl<DB: DrawingBackend> Canvas<DB> {
    /// Draws the picture on a white background.
    fn show(&self, picture: &impl Picture) -> Drawn {
        if !*FONT_REGISTERED {
            return Err("the font compiled in cannot be read".into());
        }
        self.rectangle((0.0, 0.0), (WIDTH, HEIGHT + picture.more()), WHITE)?;
        picture.draw(self)
    }

    /// Returns the part of the canvas below the height `by`.
    pub(crate) fn lowered(&self, by: f64) -> Self {
        let ((_, top), (wide, high)) = (fine((0.0, by)), self.area.dim_in_pixel());
        let area = self.area.clone().shrink((0, top), (wide, high - top as u32));
        Self { area, em: self.em, baseline: self.baseline }
    }

    /// Draws text with its baseline at the height of `at`.
    pub(crate) fn text(&self, text: &str, at: Point, style: &Style) -> Drawn {
        let font = FontDesc::new(FontFamily::Name(FONT), style.size * self.em * SCALE, style.weight());
        let look = font.color(&style.colour).pos(Pos::new(style.side, VPos::Top));
        let top = fine((at.0, at.1 - self.baseline * style.size));
        self.area.draw_text(text, &look, top).map_err(text_of)
    }

    pub(crate) fn line(&self, points: &[Point], thickness: f64, colour: RGBColor) -> Drawn {
        let style = colour.stroke_width((thickness * SCALE) as u32);
        let path: Vec<_> = points.iter().copied().map(fine).collect();
        self.area.draw(&PathElement::new(path, style)).map_err(text_of)
    }

    pub(crate) fn rectangle(&self, corner: Point, opposite: Point, colour: RGBColor) -> Drawn {
        self.area.draw(&Rectangle::new([fine(corner), fine(opposite)], colour.filled())).map_err(text_of)
    }

    /// Draws a bar, with diagonal white lines if it is hatched.
    pub(crate) fn bar(&self, (x0, y0): Point, (x1, y1): Point, look: Look) -> Drawn {
        self.rectangle((x0, y0), (x1, y1), rgb(look.colour))?;
        let (wide, high, step) = (x1 - x0, y1 - y0, 7.0);
        let lines = if look.hatched { ((wide + high) / step).min(1000.0) as usize } else { 0 };
        (1..=lines).map(|line| step * line as f64 - step / 2.0).try_for_each(|along| {
            let from = (x0 + (along - high).max(0.0), y0 + along.min(high));
            let to = (x0 + along.min(wide), y0 + (along - wide).max(0.0));
            self.line(&[from, to], 1.5, WHITE)
        })
    }

    /// Draws a hollow rectangle, which is nearly white inside.
    pub(crate) fn outline(&self, (x0, y0): Point, (x1, y1): Point, colour: RGBColor) -> Drawn {
        let line = 1.5;
        self.rectangle((x0, y0), (x1, y1), colour)?;
        self.rectangle((x0 + line, y0 + line), (x1 - line, y1 - line), faint(colour))
    }

    /// Draws text centered above `at`, on a white background.
    pub(crate) fn label(&self, text: &str, at: Point, style: &Style) -> Drawn {
        let (half, y) = (style.width(text) / 2.0 + 1.0, at.1 - 7.0);
        self.rectangle((at.0 - half, y - 0.85 * style.size), (at.0 + half, y + 0.15 * style.size), WHITE)?;
        self.text(text, (at.0, y), &style.held(HPos::Center))
    }

    pub(crate) fn dot(&self, at: Point) -> Drawn {
        let circle =
            |radius: f64, colour: RGBColor| Circle::new(fine(at), (radius * SCALE) as i32, colour.filled());
        self.area.draw(&circle(4.0, INK)).map_err(text_of)?;
        self.area.draw(&circle(2.75, WHITE)).map_err(text_of)
    }

    /// Draws a picture's title and subtitle, at sizes at which they fit.
    pub(crate) fn heading(&self, title: &str, subtitle: &str) -> Drawn {
        self.text(title, (LEFT, 54.0), &INK_BOLD.sized(25.0).fitting(title, RIGHT - LEFT))?;
        self.text(subtitle, (LEFT, 82.0), &SOFT_PLAIN.sized(15.0).fitting(subtitle, RIGHT - LEFT))
    }

    /// Draws a remark at the lower edge, at a size at which it fits.
    pub(crate) fn footer(&self, text: &str) -> Drawn {
        self.text(text, (LEFT, HEIGHT - 20.0), &SOFT_PLAIN.sized(12.0).fitting(text, RIGHT - LEFT))
    }

    /// Draws a legend with its first baseline at `y`. Returns the canvas for what is below, lowered
    /// by the [height](more_of_legend) of the other lines.
    pub(crate) fn legend(&self, y: f64, entries: &[Entry]) -> std::result::Result<Self, String> {
        for ((label, sign), (x, line)) in entries.iter().zip(legend_places(entries)) {
            let y = y + LEGEND_LINE * line as f64;
            let (corner, opposite) = ((x, y - 12.0), (x + 15.0, y + 2.0));
            match *sign {
                Sign::Filled(look) => self.bar(corner, opposite, look)?,
                Sign::Hollow => self.outline(corner, opposite, SOFT)?,
                Sign::Dot => self.dot((x + 8.0, y - 5.0))?,
                Sign::Whisker => self.whisker(x + 8.0, y - 12.0, y + 2.0)?,
                Sign::Text(text) => self.text(text, (x + 3.0, y), &INK_BOLD.sized(15.0))?,
            }
            let style = INK_PLAIN.fitting(label, RIGHT - x - SIGN);
            self.text(label, (x + SIGN, y), &style)?;
        }
        Ok(self.lowered(more_of_legend(entries)))
    }

    /// Draws lines at round numbers up to `last`, with the numbers to their left.
    pub(crate) fn axis(&self, frame: &Frame, last: f64, size: f64) -> Drawn {
        for (tick, text) in ticks(last, 6.0) {
            let y = frame.height(tick);
            self.line(&[(frame.left, y), (frame.right, y)], 1.0, if tick == 0.0 { SOFT } else { GRID })?;
            let style = SOFT_PLAIN.sized(size).held(HPos::Right);
            self.text(&text, (frame.left - 0.7 * size, y + 0.35 * size), &style)?;
        }
        Ok(())
    }

    pub(crate) fn whisker(&self, x: f64, top: f64, bottom: f64) -> Drawn {
        self.line(&[(x, top), (x, bottom)], 1.5, INK)?;
        [top, bottom].into_iter().try_for_each(|y| self.line(&[(x - 5.0, y), (x + 5.0, y)], 1.5, INK))
    }
}

/// An entry of a legend: the meaning of a sign.
pub(crate) type Entry = (String, Sign);

/// The width of a sign with the space after it.
const SIGN: f64 = 22.0;

/// Returns the height of a legend's lines after the first.
pub(crate) fn more_of_legend(entries: &[Entry]) -> f64 {
    LEGEND_LINE * legend_places(entries).last().map_or(0, |(_, line)| *line) as f64
}

fn legend_places(entries: &[Entry]) -> Vec<(f64, usize)> {
    flow(entries.iter().map(|(label, _)| SIGN + INK_PLAIN.room(label)), 26.0)
}

/// Places items of these widths side by side, in as many lines as they need.
///
/// Returns the left edge of each item and the index of its line.
pub(crate) fn flow(widths: impl IntoIterator<Item = f64>, gap: f64) -> Vec<(f64, usize)> {
    let (mut x, mut line) = (LEFT, 0);
    let place = |width: f64| {
        if x > LEFT && x + width > RIGHT {
            (x, line) = (LEFT, line + 1);
        }
        let left = x;
        x += width + gap;
        (left, line)
    };
    widths.into_iter().map(place).collect()
}

/// A sign that a legend explains.
#[derive(Clone, Copy)]
pub(crate) enum Sign {
    /// A bar.
    Filled(Look),
    /// A hollow bar.
    Hollow,
    /// A dot.
    Dot,
    /// A vertical line with caps.
    Whisker,
    /// A text.
    Text(&'static str),
}

/// The area of a bar chart: its edges, and the value at the upper edge. The lower edge is zero.
pub(crate) struct Frame {
    pub(crate) left: f64,
    pub(crate) right: f64,
    pub(crate) top: f64,
    pub(crate) bottom: f64,
    pub(crate) highest: f64,
}

impl Frame {
    /// Returns the vertical position of a value.
    pub(crate) fn height(&self, value: f64) -> f64 {
        self.bottom - (self.bottom - self.top) * value / self.highest
    }
}

/// Converts the SVG of one of our pictures for the page, which sets the font.
///
/// Attributes with SVG's default values are removed. Colours that must change on a dark page become
/// variables of the page: `--card`, `--ink`, `--soft`, `--line` and `--alarm`. Returns `None` if a
/// text has a colour that is not defined in this module.
pub(crate) fn themed(svg: &str) -> Option<String> {
    let family = format!(" font-family=\"{FONT}\"");
    let said_anyway = [
        " opacity=\"1\"",
        " stroke=\"none\"",
        " stroke-width=\"1\"",
        " text-anchor=\"start\"",
        family.as_str(),
    ];
    let svg = said_anyway.iter().fold(svg.to_string(), |svg, attribute| svg.replace(attribute, ""));
    let hex = |RGBColor(red, green, blue)| format!("#{red:02X}{green:02X}{blue:02X}");
    let (white, alarm) = (hex(WHITE), hex(ALARM));
    let texts = [hex(INK), hex(SOFT), white.clone(), alarm.clone()];
    let fill = |element: &str| Some(element.split_once("fill=\"")?.1.split_once('"')?.0.to_uppercase());
    let element = |part: &str| -> Option<String> {
        let (inside, rest) = part.split_once('>').unwrap_or((part, ""));
        let text = inside.starts_with("text");
        if text && !texts.contains(&fill(inside)?) {
            return None;
        }
        let mut inside = inside.to_string();
        let mut paint = |from: &str, name: &str| {
            for place in ["fill", "stroke"] {
                let to = format!("style=\"{place}:var(--{name})\"");
                inside = inside.replace(&format!("{place}=\"{from}\""), &to);
            }
        };
        paint(&hex(INK), "ink");
        paint(&hex(SOFT), "soft");
        paint(&hex(GRID), "line");
        // White text is on a band in the alarm colour, so neither of them changes.
        paint(if text { &alarm } else { &white }, if text { "alarm" } else { "card" });
        let bars = PALETTE.map(rgb).into_iter();
        bars.chain([SOFT]).for_each(|colour| paint(&hex(faint(colour)), "card"));
        Some(format!("{inside}>{rest}"))
    };
    let mut parts = svg.split('<');
    let before = parts.next()?.to_string();
    let painted = parts.try_fold(before, |whole, part| Some(whole + "<" + &element(part)?))?;
    Some(with_joined_shapes(&painted))
}

/// The largest side of a square that marks a point.
const MARK: u32 = 16;

/// A shape as a part of a path: how the path is painted, and the data of its subpath.
struct Subpath {
    paint: String,
    data: String,
    /// Whether other marks of points may be painted between this one and the next of its paint.
    mark: bool,
}

impl Subpath {
    /// Returns the shape that a line of the SVG contains, if it is a rectangle or a polyline.
    fn of(line: &str) -> Option<Self> {
        let element = line.trim_end().strip_suffix("/>")?;
        Self::of_rectangle(element).or_else(|| Self::of_polyline(element))
    }

    fn of_rectangle(element: &str) -> Option<Self> {
        let (x, rest) = element.strip_prefix("<rect x=\"")?.split_once("\" y=\"")?;
        let (y, rest) = rest.split_once("\" width=\"")?;
        let (width, rest) = rest.split_once("\" height=\"")?;
        let (height, paint) = rest.split_once("\" ")?;
        let side: u32 = width.parse().ok()?;
        let colour = paint.strip_prefix("fill=\"").and_then(|colour| colour.strip_suffix('"'));
        if let Some(colour) = colour.filter(|_| width == height && side <= MARK) {
            // Square line caps draw a subpath of zero length as a square.
            let middle = |start: &str| Some(start.parse::<u32>().ok()? + side / 2);
            let paint = format!("stroke=\"{colour}\" stroke-width=\"{side}\" stroke-linecap=\"square\"");
            return Some(Self { paint, data: format!("M{} {}h0", middle(x)?, middle(y)?), mark: true });
        }
        let data = format!("M{x} {y}h{width}v{height}h-{width}z");
        Some(Self { paint: paint.to_string(), data, mark: false })
    }

    fn of_polyline(element: &str) -> Option<Self> {
        let (paint, points) = element.strip_prefix("<polyline ")?.split_once(" points=\"")?;
        let points = points.trim_end_matches(['"', ' ']).replace(',', " ");
        Some(Self { paint: paint.to_string(), data: format!("M{points}"), mark: false })
    }
}

/// Joins consecutive rectangles and lines that are painted alike into one path.
///
/// Marks of points, of which a scatter plot has thousands, also join if marks of other colours are
/// between them.
fn with_joined_shapes(svg: &str) -> String {
    let mut joined = String::new();
    let mut paths: Vec<Subpath> = Vec::new();
    let finish = |joined: &mut String, paths: &mut Vec<Subpath>| {
        let path = |Subpath { paint, data, .. }| format!("<path d=\"{data}\" {paint}/>\n");
        joined.extend(paths.drain(..).map(path));
    };
    for line in svg.split_inclusive('\n') {
        let Some(shape) = Subpath::of(line) else {
            finish(&mut joined, &mut paths);
            joined.push_str(line);
            continue;
        };
        // Marks wait beside each other, and everything else alone.
        if paths.first().is_some_and(|first| !(first.mark && shape.mark) && first.paint != shape.paint) {
            finish(&mut joined, &mut paths);
        }
        match paths.iter_mut().find(|path| path.paint == shape.paint) {
            Some(path) => path.data.push_str(&shape.data),
            None => paths.push(shape),
        }
    }
    finish(&mut joined, &mut paths);
    joined
}

/// Converts a point to the coordinates of the backends.
fn fine((x, y): Point) -> (i32, i32) {
    ((x * SCALE).round() as i32, (y * SCALE).round() as i32)
}

pub(crate) fn rgb((red, green, blue): (u8, u8, u8)) -> RGBColor {
    RGBColor(red, green, blue)
}

/// Returns a nearly white tint of the colour.
fn faint(RGBColor(red, green, blue): RGBColor) -> RGBColor {
    let pale = |part: u8| 255 - (255 - part) / 10;
    RGBColor(pale(red), pale(green), pale(blue))
}

fn text_of(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_legends_stay_between_the_margins() {
        let check = |labels: &[&str], lines: usize| {
            let entries: Vec<Entry> = labels.iter().map(|label| (label.to_string(), Sign::Dot)).collect();
            let places = legend_places(&entries);
            for ((label, _), (x, _)) in entries.iter().zip(&places) {
                assert!(x + SIGN + INK_PLAIN.room(label) <= RIGHT, "{label} begins at {x}");
            }
            assert_eq!(more_of_legend(&entries), LEGEND_LINE * (lines - 1) as f64, "{labels:?}");
        };
        check(&[], 1);
        check(&["PACT", "Ours", "one seed", "mean ± standard deviation"], 1);
        check(&["live normalization alone"; 5], 1);
        check(&["live normalization alone"; 6], 2);
        check(&["live normalization alone"; 11], 3);
    }

    #[test]
    fn long_texts_get_smaller() {
        let style = INK_BOLD.sized(25.0);
        assert_eq!(style.fitting("Table 3", RIGHT - LEFT).size, 25.0);
        let long = "a long title ".repeat(12);
        let room = style.fitting(&long, RIGHT - LEFT).room(&long);
        assert!((room - (RIGHT - LEFT)).abs() < 0.1 && room > style.fitting(&long, 1104.0).width(&long));
    }

    #[test]
    fn shapes_that_are_painted_alike_become_one_path() {
        fn check(lines: &[&str], expect: &[&str]) {
            let svg = |lines: &[&str]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
            assert_eq!(with_joined_shapes(&svg(lines)), svg(expect));
        }
        const BLUE: &str = "stroke=\"#0072B2\" stroke-width=\"12\" stroke-linecap=\"square\"";
        const ORANGE: &str = "stroke=\"#E69F00\" stroke-width=\"12\" stroke-linecap=\"square\"";
        let rectangle = |x: u32, height: u32, paint: &str| {
            format!("<rect x=\"{x}\" y=\"2\" width=\"12\" height=\"{height}\" {paint}/>")
        };
        let (blue, orange, card) = ("fill=\"#0072B2\"", "fill=\"#E69F00\"", "style=\"fill:var(--card)\"");
        // Marks join across marks of other colours, but not across a bar.
        let (first, second, third) =
            (rectangle(1, 12, blue), rectangle(5, 12, orange), rectangle(7, 12, blue));
        let (bar, last) = (rectangle(9, 13, blue), rectangle(8, 12, blue));
        let of_blue = format!("<path d=\"M7 8h0M13 8h0\" {BLUE}/>");
        let of_orange = format!("<path d=\"M11 8h0\" {ORANGE}/>");
        let (of_bar, of_last) =
            (format!("<path d=\"M9 2h12v13h-12z\" {blue}/>"), format!("<path d=\"M14 8h0\" {BLUE}/>"));
        check(
            &["<svg>", &first, &second, &third, &bar, &last, "</svg>"],
            &["<svg>", &of_blue, &of_orange, &of_bar, &of_last, "</svg>"],
        );
        // Bars and lines join only if nothing is between them.
        let (left, inside, right) = (rectangle(1, 40, blue), rectangle(2, 30, card), rectangle(20, 40, blue));
        let of_inside = format!("<path d=\"M2 2h12v30h-12z\" {card}/>");
        check(
            &[&left, &inside, &right, &left],
            &[
                &format!("<path d=\"M1 2h12v40h-12z\" {blue}/>"),
                &of_inside,
                &format!("<path d=\"M20 2h12v40h-12zM1 2h12v40h-12z\" {blue}/>"),
            ],
        );
        let line = |points: &str, width: u32| {
            format!(
                "<polyline fill=\"none\" stroke=\"#222222\" stroke-width=\"{width}\" points=\"{points} \"/>"
            )
        };
        let path = |data: &str, width: u32| {
            format!("<path d=\"{data}\" fill=\"none\" stroke=\"#222222\" stroke-width=\"{width}\"/>")
        };
        check(
            &[&line("1,2 3,4", 6), &line("5,6 7,8 9,9", 6), &line("1,1 2,2", 8), "<circle/>"],
            &[&path("M1 2 3 4M5 6 7 8 9 9", 6), &path("M1 1 2 2", 8), "<circle/>"],
        );
    }

    #[test]
    fn pictures_take_the_colours_of_the_page() {
        fn check(input: &str, expect: Option<&str>) {
            assert_eq!(themed(input).as_deref(), expect);
        }
        check(
            "<svg>\n<rect opacity=\"1\" fill=\"#FFFFFF\" stroke=\"none\"/><text fill=\"#222222\">\na > b\n</text></svg>",
            Some(
                "<svg>\n<rect style=\"fill:var(--card)\"/>\
                 <text style=\"fill:var(--ink)\">\na > b\n</text></svg>",
            ),
        );
        check(
            "<line stroke=\"#E4E4E4\"/><rect fill=\"#C44000\"/><text fill=\"#FFFFFF\">a</text>",
            Some(
                "<line style=\"stroke:var(--line)\"/><rect fill=\"#C44000\"/><text fill=\"#FFFFFF\">a</text>",
            ),
        );
        // This is the inside of the hollow bar of our method.
        check("<rect fill=\"#E6F1F8\"/>", Some("<rect style=\"fill:var(--card)\"/>"));
        check("<text fill=\"#000000\">a</text>", None);
        check("<text>a</text>", None);
    }
}
