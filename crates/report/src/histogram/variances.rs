//! Running variances of every layer: a column per layer, horizontal bars, a logarithmic scale.

use std::collections::BTreeMap;
use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::HPos;

use super::{Caption, Variances};
use crate::canvas::{
    ALARM, Canvas, Drawn, Entry, GRID, INK_BOLD, LEFT, Picture, SOFT, SOFT_PLAIN, Sign, Style, WIDTH,
    more_of_legend,
};
use crate::file::Result;
use crate::names::{BLUE, Colour, GREEN, GREY, Look, ORANGE, SKY, looks};
use crate::paper::distinct;
use crate::text::shortest;

/// The number of bins per factor of ten.
const PER_DECADE: f64 = 4.0;
/// The lowest bin, seven factors of ten below τ. It also counts all lower values, because trained
/// networks have variances down to 1e-40.
pub(super) const LOWEST: i32 = -28;

/// Returns the bin of a variance; bin 0 begins at τ.
fn bin(variance: f32, threshold: f64) -> i32 {
    let bin = (PER_DECADE * (f64::from(variance) / threshold).log10()).floor().max(f64::from(LOWEST)) as i32;
    // The border at τ must agree with the comparison with τ, even if the logarithm is rounded.
    if f64::from(variance) < threshold { bin.min(-1) } else { bin.max(0) }
}

/// Returns the lower end of a bin.
pub(super) fn edge(bin: i32, threshold: f64) -> f64 {
    threshold * 10f64.powf(f64::from(bin) / PER_DECADE)
}

/// Returns the number of variances in every bin that is not empty, in ascending order.
pub(super) fn bins(values: &[f32], threshold: f64) -> BTreeMap<i32, usize> {
    let mut bins = BTreeMap::new();
    for &value in values {
        *bins.entry(bin(value, threshold)).or_default() += 1;
    }
    bins
}

pub(super) fn plot(layers: &[Variances], caption: &Caption, svg: &Path, png: &Path) -> Result<()> {
    Chart { layers, caption }.write(svg, png)
}

struct Chart<'a> {
    layers: &'a [Variances],
    caption: &'a Caption,
}

impl Picture for Chart<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        let tau = self.caption.threshold;
        canvas.heading(&self.caption.title, &self.caption.subtitle)?;
        let canvas = &canvas.legend(118.0, &self.legend())?;

        let (left, right, top, bottom) = (LEFT + 44.0, WIDTH - 40.0, 172.0, 606.0);
        canvas.text("running variance V", (LEFT, top - 18.0), &SOFT_PLAIN.sized(13.0))?;
        let all = self.layers.iter().map(|layer| bins(&layer.values, tau)).collect::<Vec<_>>();
        let used = || all.iter().flat_map(|bins| bins.keys().copied());
        let (first, last) = (used().min().unwrap_or(0).min(-4), used().max().unwrap_or(0).max(0) + 1);
        let height = |bin: f64| bottom - (bottom - top) * (bin - f64::from(first)) / f64::from(last - first);

        // The lines are at powers of ten, which need not be edges of bins.
        let exponent = |bin: i32| edge(bin, tau).log10();
        let (from, to) = (exponent(first).ceil() as i32, exponent(last).floor() as i32);
        let step = 1 + (to - from) / 12;
        let style = SOFT_PLAIN.sized(12.0).held(HPos::Right);
        if first == LOWEST {
            canvas.text("less", (left - 8.0, height(f64::from(first) + 0.5) + 4.0), &style)?;
        }
        for power in (from..=to).filter(|power| power % step == 0) {
            let bin = PER_DECADE * (f64::from(power) - tau.log10());
            // The lowest bin has no lower edge.
            if bin < f64::from(LOWEST) + 2.0 {
                continue;
            }
            let y = height(bin);
            canvas.line(&[(left, y), (right, y)], 1.0, GRID)?;
            canvas.text(&format!("1e{power}"), (left - 8.0, y + 4.0), &style)?;
        }
        canvas.line(&[(left, bottom), (right, bottom)], 1.0, SOFT)?;

        let wide = (right - left) / self.layers.len().max(1) as f64;
        let (kinds, red) = (self.kinds(), Style { colour: ALARM, ..INK_BOLD.sized(10.0) });
        canvas.text("below τ", (LEFT, bottom + 15.0), &Style { bold: false, ..red })?;
        let mut ends = [LEFT + red.room("below τ"), f64::MIN];
        for (i, (layer, bins)) in self.layers.iter().zip(&all).enumerate() {
            let x = left + wide * i as f64;
            let most = bins.values().copied().max().unwrap_or(1) as f64;
            let own = kinds.iter().find(|(of, _)| *of == kind(&layer.layer));
            for (&bin, &count) in bins {
                // A single filter must be visible next to hundreds.
                let long = (0.9 * wide * count as f64 / most).max(3.0);
                let look = own.filter(|_| bin >= 0).map_or(LOW, |(_, look)| *look);
                let (upper, lower) = (height(f64::from(bin + 1)), height(f64::from(bin)));
                canvas.bar((x, upper + 0.5), (x + long, lower), look)?;
            }
            let (low, centre) = (layer.low(tau), x + wide / 2.0);
            let text = low.to_string();
            if low > 0
                && let Some(line) = free_line(&mut ends, centre, red.room(&text))
            {
                let y = bottom + 15.0 + 12.0 * line as f64;
                canvas.text(&text, (centre, y), &red.held(HPos::Center))?;
            }
        }
        self.blocks(canvas, left, wide, (top, bottom))?;

        canvas.line(&[(left, height(0.0)), (right, height(0.0))], 1.5, ALARM)?;
        let style = Style { colour: ALARM, ..INK_BOLD.sized(12.0).held(HPos::Right) };
        canvas.text("τ", (right + 14.0, height(0.0) + 4.0), &style)?;
        let text = "Bars: filters of the layer, each layer to its own scale; one filter is a hair wide at least. \
                    V as kept by batch normalization (momentum 0.1, unbiased).";
        canvas.footer(text)
    }

    fn more(&self) -> f64 {
        more_of_legend(&self.legend())
    }
}

/// The look of what is below τ.
const LOW: Look = Look::plain((ALARM.0, ALARM.1, ALARM.2));

impl Chart<'_> {
    /// Returns every kind of layer with its look, in the order of the layers.
    fn kinds(&self) -> Vec<(&str, Look)> {
        let kinds = distinct(self.layers.iter().map(|layer| kind(&layer.layer)));
        let looks = looks(&kinds, colour);
        kinds.into_iter().zip(looks).collect()
    }

    fn legend(&self) -> Vec<Entry> {
        let tau = self.caption.threshold;
        let low: usize = self.layers.iter().map(|layer| layer.low(tau)).sum();
        let filters: usize = self.layers.iter().map(|layer| layer.values.len()).sum();
        let below = format!("below τ = {}: {low} of {filters} filters", shortest(tau));
        let kinds = self.kinds().into_iter().map(|(kind, look)| (kind.to_string(), Sign::Filled(look)));
        kinds.chain([(below, Sign::Filled(LOW))]).collect()
    }

    /// Draws a line at every change of the block, and the block's number below.
    fn blocks<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<DB>,
        left: f64,
        wide: f64,
        (top, bottom): (f64, f64),
    ) -> Drawn {
        let (mut x, mut ends) = (left, [f64::MIN]);
        for block in self.layers.chunk_by(|a, b| block(&a.layer) == block(&b.layer)) {
            let end = x + wide * block.len() as f64;
            canvas.line(&[(x, top), (x, bottom)], 1.0, GRID)?;
            let name = self::block(&block[0].layer);
            let number = name.rsplit('.').next().unwrap_or(name);
            let style = SOFT_PLAIN.sized(11.0).held(HPos::Center);
            let centre = (x + end) / 2.0;
            if free_line(&mut ends, centre, style.room(number)).is_some() {
                canvas.text(number, (centre, bottom + 44.0), &style)?;
            }
            x = end;
        }
        canvas.line(&[(x, top), (x, bottom)], 1.0, GRID)?;
        let middle = SOFT_PLAIN.sized(13.0).held(HPos::Center);
        canvas.text("block", ((left + x) / 2.0, bottom + 66.0), &middle)
    }
}

/// Returns the part of a layer's name that is its kind.
fn kind(layer: &str) -> &str {
    layer.rsplit('.').next().unwrap_or(layer)
}

/// Returns the part of a layer's name that is its block.
fn block(layer: &str) -> &str {
    layer.rsplit_once('.').map_or(layer, |(block, _)| block)
}

/// Returns the colour of a kind of layer of the paper's networks.
fn colour(kind: &str) -> Option<Colour> {
    Some(match kind {
        "stem" => GREY,
        "expand" => SKY,
        "depthwise" => BLUE,
        "pointwise" | "project" => GREEN,
        "last" => ORANGE,
        _ => return None,
    })
}

/// Returns the first of some lines in which a label of this width around `centre` does not touch
/// the label before it, and moves the line's end. `None` if the label fits nowhere.
fn free_line(ends: &mut [f64], centre: f64, width: f64) -> Option<usize> {
    let line = ends.iter().position(|end| end + 2.0 <= centre - width / 2.0)?;
    ends[line] = centre + width / 2.0;
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_would_touch_go_to_the_next_line_or_are_left_out() {
        let mut ends = [0.0, f64::MIN];
        let found = [20.0, 35.0, 41.0, 60.0].map(|centre| free_line(&mut ends, centre, 20.0));
        assert_eq!(found, [Some(0), Some(1), None, Some(0)]);
    }
}
