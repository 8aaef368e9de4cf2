//! The bar chart: our mean beside the paper's figure, for each method of each group.

use std::path::Path;
use std::sync::LazyLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::file::{Error, Result, replace, write_text};
use crate::names::{self, FLOAT, bits_label, colour, dataset_label, method_label, model_label, table_label};
use crate::row::Row;
use crate::stats::{Summary, summarize};
use crate::text::{Context, caveats};

/// The picture's size in its own units.
const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 720.0;
/// The left edge of all text.
const LEFT: f64 = 48.0;
/// Both backends know whole coordinates only, so all is drawn larger by this.
const SCALE: f64 = 4.0;
/// The PNG is the mean of squares of so many pixels.
const SHRINK: usize = 2;

const INK: RGBColor = RGBColor(34, 34, 34);
const SOFT: RGBColor = RGBColor(105, 105, 105);
const GRID: RGBColor = RGBColor(228, 228, 228);
const ALARM: RGBColor = RGBColor(196, 64, 0);

/// The font, and what a viewer of the SVG without it may use.
const FONT: &str = "Inter, Helvetica, Arial, sans-serif";

static FONT_REGISTERED: LazyLock<bool> = LazyLock::new(|| {
    let faces: [(FontStyle, &[u8]); 2] = [
        (FontStyle::Normal, include_bytes!("../assets/Inter-Regular.otf")),
        (FontStyle::Bold, include_bytes!("../assets/Inter-SemiBold.otf")),
    ];
    faces.into_iter().all(|(style, bytes)| register_font(FONT, style, bytes).is_ok())
});

/// Draws the rows as grouped bars, as SVG and as PNG (2400×1440).
///
/// A group is a network and its bits. A filled bar is our mean, with each seed and the standard deviation
/// where there are several; a hollow one is the paper's figure.
pub fn plot(rows: &[Row], context: &Context, svg: &Path, png: &Path) -> Result<()> {
    let chart = Chart { summaries: summarize(rows), caveats: caveats(rows), context };
    write_text(&chart.svg().map_err(|reason| Error::Draw { path: svg.into(), reason })?, svg)?;
    replace(png, |temporary| chart.png(temporary).map_err(|reason| Error::Draw { path: png.into(), reason }))
}

type Drawn = std::result::Result<(), String>;

/// What the picture is made of.
struct Chart<'a> {
    summaries: Vec<Summary>,
    caveats: Vec<String>,
    context: &'a Context,
}

impl Chart<'_> {
    fn svg(&self) -> std::result::Result<String, String> {
        let (wide, high) = ((WIDTH * SCALE) as u32, (HEIGHT * SCALE) as u32);
        let mut text = String::new();
        let area = SVGBackend::with_string(&mut text, (wide, high)).into_drawing_area();
        // plotters takes an em for size / 1.24 in SVG and puts the baseline 0.76 em below the top.
        self.draw(&Canvas { area, em: 1.24, baseline: 0.76 })?;
        // The view box keeps the fine coordinates; the picture has its own size.
        let fine = format!("width=\"{wide}\" height=\"{high}\"");
        Ok(text.replacen(&fine, &format!("width=\"{WIDTH}\" height=\"{HEIGHT}\""), 1))
    }

    fn png(&self, path: &Path) -> Drawn {
        let (wide, high) = ((WIDTH * SCALE) as usize, (HEIGHT * SCALE) as usize);
        let mut pixels = vec![0; wide * high * 3];
        let area = BitMapBackend::with_buffer(&mut pixels, (wide as u32, high as u32)).into_drawing_area();
        // In bitmaps the size is the font's ascent and descent, 1.21 em, with the baseline in the middle.
        self.draw(&Canvas { area, em: 1.21, baseline: 0.605 })?;

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

    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        if !*FONT_REGISTERED {
            return Err("the font compiled in cannot be read".into());
        }
        canvas.rectangle((0.0, 0.0), (WIDTH, HEIGHT), WHITE)?;
        let mut y = 54.0;
        let title = &self.context.title;
        let fitting = (WIDTH - 2.0 * LEFT) / INK_BOLD.sized(1.0).width(title);
        canvas.text(title, (LEFT, y), &INK_BOLD.sized(fitting.min(25.0)))?;
        y += 28.0;
        canvas.text(&self.subtitle(), (LEFT, y), &SOFT_PLAIN.sized(15.0))?;
        if !self.caveats.is_empty() {
            y += 34.0;
            self.alarm(canvas, y)?;
        }
        y += 42.0;
        self.legend(canvas, y)?;
        self.bars(canvas, y + 58.0, 602.0)?;
        let source = self.summaries.iter().find(|summary| summary.paper_top1_percent.is_some());
        source.map_or(Ok(()), |summary| {
            let float =
                if self.summaries.iter().any(|summary| summary.weight_bits == 32) { FLOAT } else { "" };
            let text = format!(
                "Paper: {} of Nishikawa and Ikegaya, arXiv:2011.06751. \
                 MACs: multiply-accumulates of one image. {float}",
                table_label(&summary.table)
            );
            canvas.text(&text, (LEFT, HEIGHT - 20.0), &SOFT_PLAIN.sized(12.0))
        })
    }

    fn subtitle(&self) -> String {
        let most = self.summaries.iter().map(|summary| summary.seeds).max().unwrap_or(0);
        let seeds = format!("{most} seed{}", if most == 1 { "" } else { "s" });
        let profile = format!("profile {}", self.context.profile);
        [dataset_label(&self.context.dataset), &profile, &seeds].join("  ·  ")
    }

    /// The caveats on a dark band, and what follows from them beside it.
    fn alarm<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, y: f64) -> Drawn {
        let white = Style { colour: WHITE, ..INK_BOLD.sized(15.0) };
        let reasons = self.caveats.join("  ·  ");
        let end = LEFT + white.width(&reasons) + 24.0;
        canvas.rectangle((LEFT, y - 19.0), (end, y + 8.0), ALARM)?;
        canvas.text(&reasons, (LEFT + 12.0, y), &white)?;
        let rest = "Only the order of the methods can be compared with the paper.";
        canvas.text(rest, (end + 12.0, y), &Style { colour: ALARM, ..INK_BOLD.sized(15.0) })
    }

    fn legend<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, y: f64) -> Drawn {
        let style = INK_PLAIN.sized(14.0);
        let mut x = LEFT;
        let mut entry = |label: &str, sign: &dyn Fn(f64) -> Drawn| {
            sign(x)?;
            canvas.text(label, (x + 22.0, y), &style)?;
            x += 22.0 + style.width(label) * 1.08 + 26.0; // some room for wider fonts
            Drawn::Ok(())
        };
        let mut methods: Vec<&str> = Vec::new();
        for summary in &self.summaries {
            if !methods.contains(&summary.method.as_str()) {
                methods.push(&summary.method);
            }
        }
        methods.sort_by_key(|method| names::rank(method));
        for method in methods {
            let colour = rgb(colour(method));
            entry(method_label(method), &|x| canvas.rectangle((x, y - 12.0), (x + 15.0, y + 2.0), colour))?;
        }
        if self.summaries.iter().any(|summary| summary.paper_top1_percent.is_some()) {
            entry("the paper's figure", &|x| canvas.outline((x, y - 12.0), (x + 15.0, y + 2.0), SOFT))?;
        }
        if self.summaries.iter().any(|summary| summary.seeds > 1) {
            entry("one seed", &|x| canvas.dot((x + 8.0, y - 5.0)))?;
            entry("mean ± standard deviation", &|x| canvas.whisker(x + 8.0, y - 12.0, y + 2.0))?;
        }
        Ok(())
    }

    fn bars<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, top: f64, bottom: f64) -> Drawn {
        let (left, right) = (LEFT + 56.0, WIDTH - 40.0);
        let highest = self.summaries.iter().map(reach).fold(1.0, f64::max) * 1.06;
        let height = |value: f64| bottom - (bottom - top) * value / highest;

        canvas.text("Top-1 accuracy, %", (LEFT, top - 18.0), &SOFT_PLAIN.sized(13.0))?;
        let step = [1.0, 2.0, 5.0, 10.0, 20.0].into_iter().find(|step| highest / step <= 6.0).unwrap_or(25.0);
        for tick in (0..).map(|index| f64::from(index) * step).take_while(|tick| *tick <= highest.min(100.0))
        {
            let y = height(tick);
            canvas.line(&[(left, y), (right, y)], 1.0, if tick == 0.0 { SOFT } else { GRID })?;
            canvas.text(
                &tick.to_string(),
                (left - 10.0, y + 4.5),
                &SOFT_PLAIN.sized(13.0).held(HPos::Right),
            )?;
        }
        canvas.text("MACs, M", (LEFT, bottom + 20.0), &SOFT_PLAIN.sized(12.0))?;

        let groups: Vec<_> = self.summaries.chunk_by(|a, b| a.group() == b.group()).collect();
        let wide = (right - left) / groups.len().max(1) as f64;
        let most = groups.iter().map(|group| group.len()).max().unwrap_or(1) as f64;
        let slot = (0.88 * wide / most).min(150.0);
        for (index, group) in groups.iter().enumerate() {
            let centre = left + wide * (index as f64 + 0.5);
            for (place, summary) in group.iter().enumerate() {
                let x = centre + slot * (place as f64 - group.len() as f64 / 2.0);
                self.bar(canvas, summary, x, slot, bottom, &height)?;
            }
            let name = model_label(&group[0].model, group[0].width);
            canvas.text(&name, (centre, bottom + 52.0), &INK_BOLD.sized(16.0).held(HPos::Center))?;
            let bits = bits_label(group[0].activation_bits, group[0].weight_bits);
            canvas.text(&bits, (centre, bottom + 73.0), &SOFT_PLAIN.sized(14.0).held(HPos::Center))?;
        }
        Ok(())
    }

    /// One method's bar in the slot that begins at `x`, and the paper's beside it.
    fn bar<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<DB>,
        summary: &Summary,
        x: f64,
        slot: f64,
        bottom: f64,
        height: &dyn Fn(f64) -> f64,
    ) -> Drawn {
        let colour = rgb(colour(&summary.method));
        let size = (slot * 0.15).min(14.0);
        let macs = SOFT_PLAIN.sized(size.min(12.0)).held(HPos::Center);

        let wide = slot * if summary.paper_top1_percent.is_some() { 0.48 } else { 0.7 };
        let x = x + slot * if summary.paper_top1_percent.is_some() { 0.05 } else { 0.15 };
        let centre = x + wide / 2.0;
        canvas.rectangle((x, height(summary.mean)), (x + wide, bottom), colour)?;
        let mut above = height(own_reach(summary));
        if let Some(std) = summary.std {
            above -= 3.0; // half a dot
            canvas.whisker(centre, height(summary.mean + std), height(summary.mean - std))?;
            let count = summary.seeds as f64;
            for (index, seed) in summary.values.iter().enumerate() {
                canvas.dot((x + wide * (index as f64 + 0.5) / count, height(*seed)))?;
            }
        }
        canvas.label(&format!("{:.2}", summary.mean), (centre, above), &INK_BOLD.sized(size))?;
        canvas.text(&format!("{:.1}", summary.macs / 1e6), (centre, bottom + 20.0), &macs)?;

        if let Some(theirs) = summary.paper_top1_percent {
            let (x, wide) = (x + wide + 0.03 * slot, 0.39 * slot);
            canvas.outline((x, height(theirs)), (x + wide, bottom), colour)?;
            canvas.label(
                &format!("{theirs:.2}"),
                (x + wide / 2.0, height(theirs)),
                &SOFT_PLAIN.sized(size),
            )?;
            if let Some(millions) = summary.paper_mac_millions {
                canvas.text(&millions.to_string(), (x + wide / 2.0, bottom + 20.0), &macs)?;
            }
        }
        Ok(())
    }
}

/// How high a summary's own marks reach.
fn own_reach(summary: &Summary) -> f64 {
    summary.values.iter().copied().fold(summary.mean + summary.std.unwrap_or(0.0), f64::max)
}

/// How high all of a summary's marks reach.
fn reach(summary: &Summary) -> f64 {
    own_reach(summary).max(summary.paper_top1_percent.unwrap_or(0.0))
}

/// How text looks.
#[derive(Clone, Copy)]
struct Style {
    colour: RGBColor,
    bold: bool,
    /// One em.
    size: f64,
    /// Which part of the text is at the given point.
    side: HPos,
}

const INK_BOLD: Style = Style { colour: INK, bold: true, size: 14.0, side: HPos::Left };
const INK_PLAIN: Style = Style { bold: false, ..INK_BOLD };
const SOFT_PLAIN: Style = Style { colour: SOFT, ..INK_PLAIN };

impl Style {
    fn sized(self, size: f64) -> Self {
        Style { size, ..self }
    }

    fn held(self, side: HPos) -> Self {
        Style { side, ..self }
    }

    fn weight(&self) -> FontStyle {
        if self.bold { FontStyle::Bold } else { FontStyle::Normal }
    }

    /// The width of `text` in the picture's units.
    fn width(&self, text: &str) -> f64 {
        let fine = FontDesc::new(FontFamily::Name(FONT), 1210.0, self.weight());
        fine.box_size(text).map_or(0.0, |(wide, _)| f64::from(wide) * self.size / 1000.0)
    }
}

type Point = (f64, f64);

/// A drawing area in the picture's units, on which SVG and PNG come out alike.
struct Canvas<DB: DrawingBackend> {
    area: DrawingArea<DB, Shift>,
    /// The font size to ask for to get one em.
    em: f64,
    /// How far below the top of a text its baseline comes, in ems.
    baseline: f64,
}

impl<DB: DrawingBackend> Canvas<DB> {
    /// Text with its baseline at the height of `at`.
    fn text(&self, text: &str, at: Point, style: &Style) -> Drawn {
        let font = FontDesc::new(FontFamily::Name(FONT), style.size * self.em * SCALE, style.weight());
        let look = font.color(&style.colour).pos(Pos::new(style.side, VPos::Top));
        let top = fine((at.0, at.1 - self.baseline * style.size));
        self.area.draw_text(text, &look, top).map_err(text_of)
    }

    fn line(&self, points: &[Point], thickness: f64, colour: RGBColor) -> Drawn {
        let style = colour.stroke_width((thickness * SCALE) as u32);
        let path: Vec<_> = points.iter().copied().map(fine).collect();
        self.area.draw(&PathElement::new(path, style)).map_err(text_of)
    }

    fn rectangle(&self, corner: Point, opposite: Point, colour: RGBColor) -> Drawn {
        self.area.draw(&Rectangle::new([fine(corner), fine(opposite)], colour.filled())).map_err(text_of)
    }

    /// A hollow rectangle, its inside nearly white.
    fn outline(&self, (x0, y0): Point, (x1, y1): Point, colour: RGBColor) -> Drawn {
        let line = 1.5;
        self.rectangle((x0, y0), (x1, y1), colour)?;
        self.rectangle((x0 + line, y0 + line), (x1 - line, y1 - line), faint(colour))
    }

    /// Text in the middle above `at`, with the background's colour behind it.
    fn label(&self, text: &str, at: Point, style: &Style) -> Drawn {
        let (half, y) = (style.width(text) / 2.0 + 1.0, at.1 - 7.0);
        self.rectangle((at.0 - half, y - 0.85 * style.size), (at.0 + half, y + 0.15 * style.size), WHITE)?;
        self.text(text, (at.0, y), &style.held(HPos::Center))
    }

    fn dot(&self, at: Point) -> Drawn {
        let circle =
            |radius: f64, colour: RGBColor| Circle::new(fine(at), (radius * SCALE) as i32, colour.filled());
        self.area.draw(&circle(4.0, INK)).map_err(text_of)?;
        self.area.draw(&circle(2.75, WHITE)).map_err(text_of)
    }

    fn whisker(&self, x: f64, top: f64, bottom: f64) -> Drawn {
        self.line(&[(x, top), (x, bottom)], 1.5, INK)?;
        [top, bottom].into_iter().try_for_each(|y| self.line(&[(x - 5.0, y), (x + 5.0, y)], 1.5, INK))
    }
}

/// A point in the coordinates of the backends.
fn fine((x, y): Point) -> (i32, i32) {
    ((x * SCALE).round() as i32, (y * SCALE).round() as i32)
}

fn rgb((red, green, blue): (u8, u8, u8)) -> RGBColor {
    RGBColor(red, green, blue)
}

/// The colour, nearly white.
fn faint(RGBColor(red, green, blue): RGBColor) -> RGBColor {
    let pale = |part: u8| 255 - (255 - part) / 10;
    RGBColor(pale(red), pale(green), pale(blue))
}

fn text_of(error: impl std::fmt::Display) -> String {
    error.to_string()
}
