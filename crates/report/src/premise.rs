//! The paper's premise, measured without any training: what pruning changes of the weights that are quantized.

use std::collections::HashSet;
use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::HPos;
use serde::{Deserialize, Serialize};

use crate::canvas::{
    Canvas, Drawn, GRID, HEIGHT, INK_PLAIN, LEFT, Picture, SOFT, SOFT_PLAIN, Sign, WIDTH, rgb,
};
use crate::file::Result;
use crate::histogram::Caption;
use crate::names::{BLUE, Colour, ORANGE};

/// One layer before and after pruning: a line of `layers.csv`. Weights are those of filters folded with their batch
/// normalization, quantized on one grid of the layer between its extremes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PremiseRow {
    /// The network.
    pub model: String,
    /// The layer.
    pub layer: String,
    /// Filters before.
    pub filters_before: usize,
    /// Filters after.
    pub filters_after: usize,
    /// The largest size of a folded weight before.
    pub largest_weight_before: f64,
    /// After.
    pub largest_weight_after: f64,
    /// The largest size of a folded weight, as a multiple of the median over the filters that stay of their largest, before.
    pub dynamic_range_before: f64,
    /// After.
    pub dynamic_range_after: f64,
    /// Signal to noise, in decibels, of the weights that stay, quantized to 4 bits on the grid before: ten times the decimal
    /// logarithm of Σw²/Σ(Q(w) − w)².
    pub snr_4_bits_before: f64,
    /// On the grid after.
    pub snr_4_bits_after: f64,
    /// To 3 bits, before.
    pub snr_3_bits_before: f64,
    /// To 3 bits, after.
    pub snr_3_bits_after: f64,
    /// The step that LSQ begins with at 3 bits, 2·mean|w|/√3 over the layer's weights before folding, before pruning.
    pub lsq_step_before: f64,
    /// After.
    pub lsq_step_after: f64,
    /// The share of the weights that stay, not folded, that are beyond its levels, −4 and 3 steps (0…1), before.
    pub lsq_clipped_before: f64,
    /// After.
    pub lsq_clipped_after: f64,
    /// Signal to noise, in decibels, of the weights that stay, not folded, at 3 bits with that step, before.
    pub lsq_snr_before: f64,
    /// After.
    pub lsq_snr_after: f64,
    /// Signal to noise, in decibels, of the gradient of the weights that stay, in a training step with the batch's statistics whose
    /// activations are quantized to 4 bits, beside the same step without quantization, before.
    pub gradient_snr_before: f64,
    /// After.
    pub gradient_snr_after: f64,
    /// The lowest output of the layer over the images, after its activation, before pruning.
    pub lowest_output_before: f64,
    /// The highest, before.
    pub highest_output_before: f64,
    /// The lowest, after.
    pub lowest_output_after: f64,
    /// The highest, after.
    pub highest_output_after: f64,
}

/// Draws a network's layers in four panels, before and after: the dynamic range of folded weights on a logarithmic scale, the
/// signal-to-noise ratio of their quantization to 4 and to 3 bits, that of weights with the step that LSQ begins with, and that of
/// gradients; as SVG and as PNG (2400×1440).
///
/// # Errors
/// When a file can't be written, or there is no layer.
pub fn plot(rows: &[PremiseRow], caption: &Caption, svg: &Path, png: &Path) -> Result<()> {
    Chart { rows, caption }.write(svg, png)
}

struct Chart<'a> {
    rows: &'a [PremiseRow],
    caption: &'a Caption,
}

/// One filter of a pre-trained network: a line of `filters.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FilterRow {
    /// The network.
    pub model: String,
    /// The layer.
    pub layer: String,
    /// The filter's index in it.
    pub filter: usize,
    /// Its running variance V.
    pub variance: f32,
    /// γ.
    pub gamma: f32,
    /// β.
    pub beta: f32,
    /// The factor of its weights when normalization is folded, γ/√(V + ε).
    pub factor: f32,
    /// Whether V is below τ.
    pub below_threshold: bool,
}

/// Draws a network's filters as points, the size of the folding factor over the running variance, both on logarithmic scales,
/// those below τ apart; as SVG and as PNG (2400×1440).
///
/// # Errors
/// When a file can't be written.
pub fn plot_filters(rows: &[FilterRow], caption: &Caption, svg: &Path, png: &Path) -> Result<()> {
    Scatter { rows, caption }.write(svg, png)
}

struct Scatter<'a> {
    rows: &'a [FilterRow],
    caption: &'a Caption,
}

impl Picture for Scatter<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        canvas.heading(&self.caption.title, &self.caption.subtitle)?;
        let low = self.rows.iter().filter(|row| row.below_threshold).count();
        let of_low = format!("V < τ = {:.0e}: {low} of {} filters", self.caption.threshold, self.rows.len());
        canvas.legend(112.0, &[(&of_low, Sign::Filled(ORANGE)), ("other filters", Sign::Filled(BLUE))])?;
        // What is 0 or lower still stands at the lowest power.
        let power = |value: f32| f64::from(value.abs()).log10().clamp(-12.0, 6.0);
        let (left, right, top, bottom) = (LEFT + 44.0, WIDTH - 40.0, 152.0, 620.0);
        let span = |of: fn(&FilterRow) -> f32| {
            let powers = || self.rows.iter().map(|row| power(of(row)));
            let low = powers().fold(0.0, f64::min).floor();
            (low, powers().fold(low + 1.0, f64::max).ceil())
        };
        let ((x0, x1), (y0, y1)) = (span(|row| row.variance), span(|row| row.factor));
        let across = |value: f64| left + (right - left) * (value - x0) / (x1 - x0);
        let height = |value: f64| bottom - (bottom - top) * (value - y0) / (y1 - y0);
        for tick in y0 as i64..=y1 as i64 {
            let y = height(tick as f64);
            canvas.line(&[(left, y), (right, y)], 1.0, GRID)?;
            let style = SOFT_PLAIN.sized(12.0).held(HPos::Right);
            canvas.text(&format!("1e{tick}"), (left - 8.0, y + 4.0), &style)?;
        }
        for tick in x0 as i64..=x1 as i64 {
            let x = across(tick as f64);
            canvas.line(&[(x, top), (x, bottom)], 1.0, GRID)?;
            let style = SOFT_PLAIN.sized(12.0).held(HPos::Center);
            canvas.text(&format!("1e{tick}"), (x, bottom + 18.0), &style)?;
        }
        let mut drawn = HashSet::new();
        for row in self.rows {
            let (x, y) = (across(power(row.variance)), height(power(row.factor)));
            // Thousands lie on each other, which would make the file as large as the page that shows it.
            let square = |at: f64| (at / 4.0).round() as i64;
            if !drawn.insert((square(x), square(y), row.below_threshold)) {
                continue;
            }
            let colour = rgb(if row.below_threshold { ORANGE } else { BLUE });
            canvas.rectangle((x - 1.5, y - 1.5), (x + 1.5, y + 1.5), colour)?;
        }
        canvas.text(
            "size of the folding factor, γ / root of (V + ε)",
            (LEFT, top - 14.0),
            &INK_PLAIN.sized(14.0),
        )?;
        let style = INK_PLAIN.sized(14.0).held(HPos::Center);
        canvas.text("running variance V", ((left + right) / 2.0, bottom + 42.0), &style)?;
        let text = "What is below 1e-12 stands there. Where γ is decayed too, it is next to nothing for a filter of low V, and so is its factor.";
        canvas.text(text, (LEFT, HEIGHT - 20.0), &SOFT_PLAIN.sized(12.0))
    }
}

/// A line of a panel: a value of each layer, its colour, and how thick it is.
type Line<'a> = (&'a dyn Fn(&PremiseRow) -> f64, Colour, f64);

impl Picture for Chart<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        canvas.heading(&self.caption.title, &self.caption.subtitle)?;
        let signs = [("before pruning", Sign::Filled(ORANGE)), ("after pruning", Sign::Filled(BLUE))];
        canvas.legend(112.0, &signs)?;
        let log = |value: f64| value.max(1e-3).log10();
        let ranges: [Line; 2] = [
            (&|row| log(row.dynamic_range_before), ORANGE, 2.0),
            (&|row| log(row.dynamic_range_after), BLUE, 2.0),
        ];
        let title = "largest folded weight / median of the staying filters' largest";
        self.panel(canvas, (156.0, 238.0), title, &ranges, &|tick| format!("1e{tick}"))?;
        let snr: [Line; 4] = [
            (&|row| row.snr_4_bits_before, ORANGE, 2.5),
            (&|row| row.snr_4_bits_after, BLUE, 2.5),
            (&|row| row.snr_3_bits_before, ORANGE, 1.0),
            (&|row| row.snr_3_bits_after, BLUE, 1.0),
        ];
        let title = "signal to noise of the weights that stay, dB: 4 bits (thick), 3 bits (thin)";
        self.panel(canvas, (296.0, 378.0), title, &snr, &|tick| format!("{tick}"))?;
        let lsq: [Line; 2] =
            [(&|row| row.lsq_snr_before, ORANGE, 2.0), (&|row| row.lsq_snr_after, BLUE, 2.0)];
        let title = "the same before folding, dB: 3 bits at the step that LSQ begins with";
        self.panel(canvas, (436.0, 518.0), title, &lsq, &|tick| format!("{tick}"))?;
        let gradients: [Line; 2] =
            [(&|row| row.gradient_snr_before, ORANGE, 2.0), (&|row| row.gradient_snr_after, BLUE, 2.0)];
        let title = "signal to noise of the gradients of the weights that stay, dB: activations of 4 bits";
        self.panel(canvas, (576.0, 658.0), title, &gradients, &|tick| format!("{tick}"))?;
        let text = "From left to right: the layers in their order. One grid for each layer, between the extremes of its weights.";
        canvas.text(text, (LEFT, HEIGHT - 20.0), &SOFT_PLAIN.sized(12.0))
    }
}

impl Chart<'_> {
    fn panel<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<DB>,
        (top, bottom): (f64, f64),
        title: &str,
        lines: &[Line],
        label: &dyn Fn(i64) -> String,
    ) -> Drawn {
        let (left, right) = (LEFT + 44.0, WIDTH - 40.0);
        canvas.text(title, (LEFT, top - 14.0), &INK_PLAIN.sized(14.0))?;
        let values = || lines.iter().flat_map(|(of, ..)| self.rows.iter().map(of));
        let finite = || values().filter(|value| value.is_finite());
        let low = finite().fold(0.0, f64::min).floor();
        let high = finite().fold(low + 1.0, f64::max).ceil();
        let step = ((high - low) / 5.0).ceil();
        // Zero is one of the lines.
        let low = (low / step).floor() * step;
        let height = |value: f64| bottom - (bottom - top) * (value - low) / (high - low);
        let style = SOFT_PLAIN.sized(12.0).held(HPos::Right);
        for tick in (low as i64..=high as i64).step_by(step as usize) {
            let y = height(tick as f64);
            canvas.line(&[(left, y), (right, y)], 1.0, if tick == 0 { SOFT } else { GRID })?;
            canvas.text(&label(tick), (left - 8.0, y + 4.0), &style)?;
        }
        let wide = (right - left) / self.rows.len().max(1) as f64;
        for (of, colour, thickness) in lines {
            let place = |(i, row): (usize, &PremiseRow)| (left + wide * (i as f64 + 0.5), of(row));
            let points: Vec<(f64, f64)> = self.rows.iter().enumerate().map(place).collect();
            // A layer without a finite value, such as one without any error, parts the line.
            for part in points.split(|(_, value)| !value.is_finite()) {
                let part: Vec<(f64, f64)> = part.iter().map(|&(x, value)| (x, height(value))).collect();
                if part.len() > 1 {
                    canvas.line(&part, *thickness, rgb(*colour))?;
                }
                for (x, y) in part {
                    canvas.rectangle((x - 2.0, y - 2.0), (x + 2.0, y + 2.0), rgb(*colour))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_say_what_they_show() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let caption = Caption { title: "A title".into(), subtitle: "made-up".into(), threshold: 1e-5 };
        let row = |i: usize| PremiseRow {
            model: "m".into(),
            layer: format!("blocks.{i}.project"),
            filters_before: 8,
            filters_after: 6,
            largest_weight_before: 20.0,
            largest_weight_after: 2.0,
            dynamic_range_before: 10f64.powi(i as i32),
            dynamic_range_after: 3.0,
            snr_4_bits_before: -4.0 + i as f64,
            snr_4_bits_after: 17.0,
            snr_3_bits_before: if i == 2 { f64::INFINITY } else { -6.0 },
            snr_3_bits_after: 11.0,
            lsq_step_before: 0.01,
            lsq_step_after: 0.1,
            lsq_clipped_before: 0.6,
            lsq_clipped_after: 0.1,
            lsq_snr_before: 3.0,
            lsq_snr_after: 11.0,
            gradient_snr_before: 1.0,
            gradient_snr_after: 2.0,
            lowest_output_before: 0.0,
            highest_output_before: 6.0,
            lowest_output_after: 0.0,
            highest_output_after: 5.0,
        };
        let rows: Vec<PremiseRow> = (0..5).map(row).collect();
        plot(&rows, &caption, &path("p.svg"), &path("p.png")).unwrap();
        let text = std::fs::read_to_string(path("p.svg")).unwrap();
        for part in ["A title", "before pruning", "signal to noise", "1e4"] {
            assert!(text.contains(part), "the picture lacks {part:?}");
        }
        assert!(std::fs::read(path("p.png")).unwrap().starts_with(b"\x89PNG"));
        let filter = |i: usize| FilterRow {
            model: "m".into(),
            layer: "last".into(),
            filter: i,
            variance: if i == 0 { 0.0 } else { 10f32.powi(i as i32 - 6) },
            gamma: 1.0,
            beta: 0.0,
            factor: -2.0,
            below_threshold: i < 2,
        };
        let filters: Vec<FilterRow> = (0..7).map(filter).collect();
        plot_filters(&filters, &caption, &path("f.svg"), &path("f.png")).unwrap();
        let text = std::fs::read_to_string(path("f.svg")).unwrap();
        for part in ["2 of 7 filters", "running variance", "1e-12", "1e0"] {
            assert!(text.contains(part), "the picture of filters lacks {part:?}");
        }
    }
}
