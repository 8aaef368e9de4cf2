//! Outputs of single filters: a column per filter, the convolution's above the activation's.

use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::RGBColor;
use plotters::style::text_anchor::HPos;

use super::{Caption, FilterOutputs, Histogram};
use crate::canvas::{
    ALARM, Canvas, Drawn, GRID, INK_BOLD, INK_PLAIN, LEFT, Picture, SOFT, SOFT_PLAIN, Style, WIDTH, rgb,
};
use crate::file::Result;
use crate::names::BLUE;
use crate::scale::tick_step;
use crate::text::shortest;

pub(super) fn plot(filters: &[FilterOutputs], caption: &Caption, svg: &Path, png: &Path) -> Result<()> {
    Chart { filters, caption }.write(svg, png)
}

struct Chart<'a> {
    filters: &'a [FilterOutputs],
    caption: &'a Caption,
}

/// The space between the texts of two columns.
const GAP: f64 = 6.0;

/// The edges of a panel's axes.
struct Panel {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Picture for Chart<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        canvas.heading(&self.caption.title, &self.caption.subtitle)?;

        let columns = self.filters.len().max(1) as f64;
        let wide = (WIDTH - LEFT - 24.0) / columns;
        let mut x = LEFT;
        for layer in self.filters.chunk_by(|a, b| a.layer == b.layer) {
            let (name, room) = (&layer[0].layer, wide * layer.len() as f64 - GAP);
            canvas.text(name, (x, 122.0), &INK_BOLD.sized(16.0).fitting(name, room))?;
            for filter in layer {
                self.column(canvas, filter, x, wide)?;
                x += wide;
            }
        }
        let text = format!(
            "Share of all values in each of {} bins. The filters of a layer have the same horizontal scale; each \
             panel has its own vertical one. V: running variance. τ = {}.",
            self.filters.first().map_or(0, |filter| filter.convolution.counts.len()),
            shortest(self.caption.threshold)
        );
        canvas.footer(&text)
    }
}

impl Chart<'_> {
    fn column<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<DB>,
        filter: &FilterOutputs,
        x: f64,
        wide: f64,
    ) -> Drawn {
        let low = filter.variance < self.caption.threshold;
        let (colour, ink) = if low { (ALARM, ALARM) } else { (rgb(BLUE), INK_BOLD.colour) };
        let style = INK_BOLD.fitting(&filter.rule, wide - GAP);
        canvas.text(&filter.rule, (x, 148.0), &Style { colour: ink, ..style })?;
        let sign = if low { "< τ" } else { "≥ τ" };
        let text = format!("filter {}, V = {} {sign}", filter.filter, number(filter.variance));
        canvas.text(&text, (x, 167.0), &INK_PLAIN.sized(13.0).fitting(&text, wide - GAP))?;
        for (what, histogram, top) in [
            ("output of the convolution, %", &filter.convolution, 214.0),
            ("after normalization and activation, %", &filter.activation, 472.0),
        ] {
            canvas.text(what, (x, top - 18.0), &SOFT_PLAIN.sized(13.0).fitting(what, wide - GAP))?;
            let panel = Panel { left: x + 30.0, right: x + wide - 22.0, top, bottom: top + 158.0 };
            draw_histogram(canvas, histogram, colour, &panel)?;
        }
        Ok(())
    }
}

fn draw_histogram<DB: DrawingBackend>(
    canvas: &Canvas<DB>,
    histogram: &Histogram,
    colour: RGBColor,
    panel: &Panel,
) -> Drawn {
    let shares = histogram.shares();
    let highest = shares.iter().copied().fold(0.1, f64::max) * 1.06;
    let height = |share: f64| panel.bottom - (panel.bottom - panel.top) * share / highest;
    let place = |value: f64| {
        panel.left + (panel.right - panel.left) * (value - histogram.low) / (histogram.high - histogram.low)
    };
    for tick in ticks(0.0, highest.min(100.0), 5.0) {
        let y = height(tick);
        canvas.line(&[(panel.left, y), (panel.right, y)], 1.0, if tick == 0.0 { SOFT } else { GRID })?;
        let style = SOFT_PLAIN.sized(11.0).held(HPos::Right);
        canvas.text(&number(tick), (panel.left - 5.0, y + 4.0), &style)?;
    }
    for (i, &share) in shares.iter().enumerate().filter(|(_, share)| **share > 0.0) {
        let (from, to) = histogram.bin(i);
        // A bin with values is at least one unit high, so that it is visible.
        let top = height(share).min(panel.bottom - 1.0);
        canvas.rectangle((place(from), top), (place(to), panel.bottom), colour)?;
    }
    for tick in ticks(histogram.low, histogram.high, 5.0) {
        let x = place(tick);
        canvas.line(&[(x, panel.bottom), (x, panel.bottom + 4.0)], 1.0, SOFT)?;
        let style = SOFT_PLAIN.sized(11.0).held(HPos::Center);
        canvas.text(&number(tick), (x, panel.bottom + 17.0), &style)?;
    }
    let text = format!("mean {}, standard deviation {}", number(histogram.mean), number(histogram.deviation));
    let style = INK_PLAIN.sized(12.0).fitting(&text, panel.right - panel.left);
    canvas.text(&text, (panel.left, panel.bottom + 36.0), &style)
}

/// Returns round numbers from `low` to `high`, about `most` of them.
fn ticks(low: f64, high: f64, most: f64) -> Vec<f64> {
    let step = tick_step(high - low, most);
    // Counting whole steps makes the tick at zero exactly zero.
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|n| n as f64 * step).collect()
}

/// Formats a number with three digits; a very small or large number gets an exponent.
fn number(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        "0".into()
    } else if !(1e-3..1e4).contains(&size) {
        format!("{value:.1e}")
    } else {
        let digits = (2 - size.log10().floor() as i32).max(0) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_numbers_short() {
        let check = |(low, high): (f64, f64), expect: &[&str]| {
            let found: Vec<String> = ticks(low, high, 5.0).into_iter().map(number).collect();
            assert_eq!(found, expect);
        };
        check((0.0, 1.0), &["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        check((-0.13, 0.31), &["-0.1", "0", "0.1", "0.2", "0.3"]);
        check((-2e-7, 3e-7), &["-2.0e-7", "-1.0e-7", "0", "1.0e-7", "2.0e-7", "3.0e-7"]);
        check((0.0, 6.0), &["0", "2", "4", "6"]);
        assert_eq!([0.012345, 123.4, 5.0, -1e-12].map(number), ["0.0123", "123", "5", "-1.0e-12"]);
    }
}
