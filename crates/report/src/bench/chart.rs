//! The bar chart of whole networks: one column per network, training above evaluation.

use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::HPos;

use super::{About, Case, IMPLEMENTATIONS, OURS, Speed, precision_label};
use crate::canvas::{
    Canvas, Drawn, Entry, Frame, INK_BOLD, INK_PLAIN, LEFT, Picture, SOFT_PLAIN, Sign, WIDTH, more_of_legend,
    rgb,
};
use crate::file::Result;
use crate::names::{Look, model_label};
use crate::text::counted;

/// Draws the whole networks at the first batch size in the rows, as SVG and as PNG.
pub(super) fn plot(rows: &[Speed], about: &About, svg: &Path, png: &Path) -> Result<()> {
    let batch = rows.iter().find(|row| row.of_network()).map_or(0, |row| row.batch);
    let cases = Case::all(rows).filter(|case| case.first().of_network() && case.first().batch == batch);
    Chart { cases: cases.collect(), batch, about }.write(svg, png)
}

struct Chart<'a> {
    cases: Vec<Case<'a>>,
    batch: usize,
    about: &'a About,
}

impl Picture for Chart<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        canvas.heading(self.about.place.title(), &self.subtitle())?;
        let canvas = &canvas.legend(118.0, &self.legend())?;
        let mut columns: Vec<(&str, f64)> = Vec::new();
        for case in &self.cases {
            let Speed { network, width, .. } = case.first();
            if !columns.contains(&(network, *width)) {
                columns.push((network, *width));
            }
        }
        let wide = (WIDTH - LEFT - 20.0) / columns.len().max(1) as f64;
        for (index, &(network, width)) in columns.iter().enumerate() {
            let x = LEFT + wide * index as f64;
            let label = model_label(network, width);
            canvas.text(&label, (x, 164.0), &INK_BOLD.sized(16.0).fitting(&label, wide - 8.0))?;
            for (what, title, top) in [("train", "training", 212.0), ("eval", "evaluation", 474.0)] {
                canvas.text(&format!("{title}, images/s"), (x, top - 22.0), &SOFT_PLAIN.sized(13.0))?;
                let panel: Vec<&Case> = self
                    .cases
                    .iter()
                    .filter(|case| {
                        let row = case.first();
                        (row.network.as_str(), row.width, row.what.as_str()) == (network, width, what)
                    })
                    .collect();
                let speeds = panel.iter().flat_map(|case| case.0).filter_map(|row| row.images_per_second_max);
                // This leaves room for the ratio above the highest bar.
                let highest = 1.12 * speeds.fold(1.0, f64::max);
                let (left, right) = (x + 38.0, x + wide - 28.0);
                let frame = Frame { left, right, top, bottom: top + 170.0, highest };
                self.panel(canvas, &panel, &frame)?;
            }
        }
        let text =
            "A4/W4: fake quantization, in PyTorch by its own fused modules. Each panel has its own scale.";
        canvas.footer(text)
    }

    fn more(&self) -> f64 {
        more_of_legend(&self.legend())
    }
}

impl Chart<'_> {
    fn subtitle(&self) -> String {
        let threads = self.cases.first().map_or(0, |case| case.first().threads);
        let threads = counted(threads, "thread");
        let fact = |name: &str| {
            self.about.machine.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
        };
        // On a GPU, the number of threads and the processor matter little.
        let (threads, processor) = match fact("GPU") {
            Some(gpu) => (None, Some(gpu)),
            None => (Some(threads), fact("processor")),
        };
        let pytorch = fact("PyTorch").map(|version| format!("PyTorch {version}"));
        let all = [Some(format!("batch {}", self.batch)), threads, processor, pytorch];
        all.into_iter().flatten().collect::<Vec<_>>().join("  ·  ")
    }

    fn legend(&self) -> Vec<Entry> {
        let bars = IMPLEMENTATIONS.into_iter().map(|of| {
            let label = if of.id == OURS { "ours".into() } else { format!("PyTorch {}", of.label) };
            (label, Sign::Filled(Look::plain(of.colour)))
        });
        let others =
            [("slowest and fastest round", Sign::Whisker), ("ours ÷ PyTorch's best", Sign::Text("×"))];
        bars.chain(others.map(|(label, sign)| (label.into(), sign))).collect()
    }

    fn panel<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, cases: &[&Case], frame: &Frame) -> Drawn {
        canvas.axis(frame, frame.highest, 11.0)?;
        let wide = (frame.right - frame.left) / cases.len().max(1) as f64;
        for (index, case) in cases.iter().enumerate() {
            let centre = frame.left + wide * (index as f64 + 0.5);
            self.group(canvas, case, centre, wide, frame)?;
            let label = precision_label(case.first());
            canvas.text(&label, (centre, frame.bottom + 19.0), &INK_PLAIN.sized(13.0).held(HPos::Center))?;
        }
        Ok(())
    }

    /// Draws the bars of one case around `centre`, and the ratio above our bar.
    fn group<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<DB>,
        case: &Case,
        centre: f64,
        wide: f64,
        frame: &Frame,
    ) -> Drawn {
        let height = |speed: f64| frame.height(speed);
        let places = IMPLEMENTATIONS.len() as f64;
        let slot = (0.84 * wide / places).min(44.0);
        let middle = |place: usize| centre + slot * (place as f64 + 0.5 - places / 2.0);
        let top = |row: &Speed| height(row.images_per_second_max.unwrap_or(0.0));
        for (place, implementation) in IMPLEMENTATIONS.iter().enumerate() {
            let (x, half) = (middle(place), 0.44 * slot);
            let Some(row) = case.row(implementation.id) else { continue };
            let Some(speed) = row.images_per_second else {
                canvas.text("n/a", (x, height(0.0) - 4.0), &SOFT_PLAIN.sized(10.0).held(HPos::Center))?;
                continue;
            };
            let colour = rgb(implementation.colour);
            canvas.rectangle((x - half, height(speed)), (x + half, height(0.0)), colour)?;
            if let (Some(min), Some(max)) = (row.images_per_second_min, row.images_per_second_max) {
                canvas.whisker(x, height(max), height(min))?;
            }
        }
        let ratio = case.best().and_then(|row| row.ratio_of_ours);
        let Some((ratio, ours)) = ratio.zip(case.row(OURS)) else { return Ok(()) };
        // The text begins at our bar and is wider than it, so it must also be above the next bar.
        let next = case.row(IMPLEMENTATIONS[1].id).map_or(f64::MAX, top);
        let (text, style) = (format!("×{ratio:.2}"), INK_BOLD.sized(13.0));
        let x = middle(0) - 0.44 * slot + style.width(&text) / 2.0;
        canvas.label(&text, (x, top(ours).min(next) + 2.0), &style)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::case;
    use super::*;

    #[test]
    fn charts_show_every_network_and_the_ratio_to_the_best() {
        let folder = tempfile::tempdir().unwrap();
        let mut rows = Vec::new();
        for (network, width) in [("mobilenet_v1", 1.0), ("mobilenet_v2", 0.25)] {
            for what in ["train", "eval"] {
                for precision in ["float", "a4w4"] {
                    rows.extend(case(network, width, what, precision));
                }
            }
        }
        rows.extend(case("mobilenet_v2", 1.0, "stem 3-32@32x32", "float"));
        let (svg, png) = (folder.path().join("a.svg"), folder.path().join("a.png"));
        plot(&rows, &About::default(), &svg, &png).unwrap();
        let svg = std::fs::read_to_string(svg).unwrap();
        for text in ["MobileNetV1", "MobileNetV2 ×0.25", "training", "evaluation", "A4/W4", "×1.11", "n/a"]
        {
            assert!(svg.contains(text), "no {text}");
        }
        assert!(!svg.contains("stem"));
        plot(&[], &About::default(), &folder.path().join("b.svg"), &png).unwrap();
    }
}
