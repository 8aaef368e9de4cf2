//! The paper's premise, measured without training: how pruning changes the quantized weights.

use std::collections::HashSet;
use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::HPos;
use serde::{Deserialize, Serialize, Serializer};

use crate::canvas::{
    Canvas, Drawn, Entry, GRID, INK_PLAIN, LEFT, Picture, SOFT, SOFT_PLAIN, Sign, WIDTH, more_of_legend, rgb,
};
use crate::file::Result;
use crate::histogram::Caption;
use crate::names::{BLUE, Colour, Look, ORANGE};
use crate::text::{counted, shortest};

/// One layer before and after pruning: a line of `layers.csv`.
///
/// Unless a field says otherwise, the weights are folded with their batch normalization and
/// quantized per layer, on a grid between the smallest and the largest weight. The remaining
/// weights are those that pruning keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PremiseRow {
    /// The network.
    pub model: String,
    /// The layer.
    pub layer: String,
    /// The number of filters before pruning.
    pub filters_before: usize,
    /// The number of filters after pruning.
    pub filters_after: usize,
    /// The largest magnitude of a folded weight before pruning.
    pub largest_weight_before: f64,
    /// The largest magnitude of a folded weight after pruning.
    pub largest_weight_after: f64,
    /// The largest magnitude of a folded weight before pruning, divided by the upper median, over the
    /// remaining filters, of the largest magnitude of each filter.
    pub dynamic_range_before: f64,
    /// The largest magnitude of a folded weight after pruning, divided by the same median.
    pub dynamic_range_after: f64,
    /// The signal-to-noise ratio of the remaining weights in decibels, 10·log₁₀(Σw²/Σ(Q(w) − w)²),
    /// quantized to 4 bits on the grid before pruning.
    pub snr_4_bits_before: f64,
    /// The signal-to-noise ratio at 4 bits on the grid after pruning.
    pub snr_4_bits_after: f64,
    /// The signal-to-noise ratio at 3 bits on the grid before pruning.
    pub snr_3_bits_before: f64,
    /// The signal-to-noise ratio at 3 bits on the grid after pruning.
    pub snr_3_bits_after: f64,
    /// LSQ's initial step at 3 bits, 2·mean|w|/√3 over the unfolded weights, before pruning.
    pub lsq_step_before: f64,
    /// LSQ's initial step after pruning.
    pub lsq_step_after: f64,
    /// The share (0…1) of the remaining weights before folding that lie outside LSQ's levels, −4 to
    /// 3 steps, before pruning.
    pub lsq_clipped_before: f64,
    /// The share of clipped weights after pruning.
    pub lsq_clipped_after: f64,
    /// The signal-to-noise ratio in decibels of the remaining weights before folding, at 3 bits
    /// with LSQ's initial step before pruning.
    pub lsq_snr_before: f64,
    /// The signal-to-noise ratio with LSQ's initial step after pruning.
    pub lsq_snr_after: f64,
    /// The signal-to-noise ratio in decibels of the remaining weights' gradient, before pruning.
    ///
    /// It compares a training step whose activations are quantized to 4 bits with the same step
    /// without quantization. Both use the batch's statistics.
    pub gradient_snr_before: f64,
    /// The signal-to-noise ratio of the gradient after pruning.
    pub gradient_snr_after: f64,
    /// The lowest output of the layer over the images, after its activation, before pruning.
    pub lowest_output_before: f64,
    /// The highest output before pruning.
    pub highest_output_before: f64,
    /// The lowest output after pruning.
    pub lowest_output_after: f64,
    /// The highest output after pruning.
    pub highest_output_after: f64,
}

/// Draws a network's layers in four panels, before and after, as SVG and as PNG (2400×1440).
///
/// The panels show the dynamic range of folded weights on a logarithmic scale, the signal-to-noise
/// ratio of their quantization to 4 and to 3 bits, that of weights with LSQ's initial step, and
/// that of gradients.
///
/// # Errors
/// Returns an error if a file cannot be written.
pub fn plot(rows: &[PremiseRow], caption: &Caption, svg: &Path, png: &Path) -> Result<()> {
    Chart { rows, caption }.write(svg, png)
}

struct Chart<'a> {
    rows: &'a [PremiseRow],
    caption: &'a Caption,
}

/// One filter of a pre-trained network: a line of `filters_<model>.csv`, with four digits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FilterRow {
    /// The layer.
    pub layer: String,
    /// The filter's index in the layer.
    pub filter: usize,
    /// The running variance V.
    #[serde(serialize_with = "four_digits")]
    pub variance: f32,
    /// The scale γ of the batch normalization.
    #[serde(serialize_with = "four_digits")]
    pub gamma: f32,
    /// The shift β of the batch normalization.
    #[serde(serialize_with = "four_digits")]
    pub beta: f32,
    /// The factor γ/√(V + ε) of the weights when batch normalization is folded into them. It is not
    /// written, because it follows from the others.
    #[serde(skip)]
    pub factor: f32,
    /// Whether V is below τ. It is not written either.
    #[serde(skip)]
    pub below_threshold: bool,
}

/// Networks have tens of thousands of filters, and all digits would double the file.
fn four_digits<S: Serializer>(value: &f32, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    let rounded: f64 = format!("{value:.3e}").parse().map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(&shortest(rounded))
}

/// Draws a network's filters as points, as SVG and as PNG (2400×1440).
///
/// The points show the magnitude of the folding factor over the running variance, both on
/// logarithmic scales. Filters below τ have another colour.
///
/// # Errors
/// Returns an error if a file cannot be written.
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
        let canvas = &canvas.legend(112.0, &self.legend())?;
        // Magnitudes below 1e-12, such as zero, are drawn at 1e-12.
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
            // Thousands of points overlap. Drawing all of them would make the file as large as the
            // page that shows it.
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
        canvas.footer(text)
    }

    fn more(&self) -> f64 {
        more_of_legend(&self.legend())
    }
}

impl Scatter<'_> {
    fn legend(&self) -> [Entry; 2] {
        let low = self.rows.iter().filter(|row| row.below_threshold).count();
        let tau = shortest(self.caption.threshold);
        let of_low = format!("V < τ = {tau}: {low} of {} filters", self.rows.len());
        [
            (of_low, Sign::Filled(Look::plain(ORANGE))),
            ("other filters".into(), Sign::Filled(Look::plain(BLUE))),
        ]
    }
}

/// A line of a panel: a function that returns the value of a layer, the colour, and the thickness.
type Line<'a> = (&'a dyn Fn(&PremiseRow) -> f64, Colour, f64);

impl Picture for Chart<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        canvas.heading(&self.caption.title, &self.caption.subtitle)?;
        let signs = [("before pruning", ORANGE), ("after pruning", BLUE)]
            .map(|(label, colour)| (label.into(), Sign::Filled(Look::plain(colour))));
        let canvas = &canvas.legend(112.0, &signs)?;
        let log = |value: f64| if switched_off(value) { f64::NAN } else { value.max(1e-3).log10() };
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
        let mut text = String::from(
            "From left to right: the layers in their order. One grid for each layer, between the extremes of its weights.",
        );
        let off = self.rows.iter().filter(|row| switched_off(row.dynamic_range_before)).count();
        if off > 0 {
            text += &format!(
                " Above, {} without value: what stays of them is next to zero.",
                counted(off, "layer")
            );
        }
        canvas.footer(&text)
    }
}

/// Whether a layer's largest weight is so many times the median that the median is next to nothing:
/// training has switched off the filters that stay. Such a ratio would press all others together.
fn switched_off(dynamic_range: f64) -> bool {
    dynamic_range > 1e6
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
        // One of the grid lines is at zero.
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
            // A layer without a finite value, such as a layer without any quantization error,
            // interrupts the line.
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
        let caption = Caption { title: "A title".into(), subtitle: "made-up".into(), threshold: 0.95 };
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
        // One layer has nothing that could be compared with its largest weight.
        let mut with_off = rows;
        with_off[1].dynamic_range_before = 1e24;
        plot(&with_off, &caption, &path("o.svg"), &path("o.png")).unwrap();
        let text = std::fs::read_to_string(path("o.svg")).unwrap();
        assert!(text.contains("1 layer without value") && !text.contains("1e24"), "{text}");
        let filter = |i: usize| FilterRow {
            layer: "last".into(),
            filter: i,
            variance: if i == 0 { 0.0 } else { 10f32.powi(i as i32 - 6) },
            gamma: 1.0,
            beta: 0.0,
            factor: -2.0,
            below_threshold: i < 2,
        };
        let filters: Vec<FilterRow> = (0..7).map(filter).collect();
        let written = FilterRow { variance: 1.234_56e-12, gamma: 0.000_987_61, beta: -5.0, ..filter(3) };
        crate::histogram::write_rows(&[written], &path("f.csv")).unwrap();
        let text = std::fs::read_to_string(path("f.csv")).unwrap();
        assert_eq!(text, "layer,filter,variance,gamma,beta\nlast,3,1.235e-12,9.876e-4,-5\n");
        plot_filters(&filters, &caption, &path("f.svg"), &path("f.png")).unwrap();
        let text = std::fs::read_to_string(path("f.svg")).unwrap();
        for part in ["τ = 0.95: 2 of 7 filters", "running variance", "1e-12", "1e0"] {
            assert!(text.contains(part), "the picture of filters lacks {part:?}");
        }
    }
}
