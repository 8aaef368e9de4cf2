//! The bar chart of our mean next to the paper's figure, for each method of each group.

use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::WHITE;
use plotters::style::text_anchor::HPos;

use crate::canvas::{
    ALARM, Canvas, Drawn, Frame, HEIGHT, INK_BOLD, LEFT, Picture, SOFT_PLAIN, Sign, Style, WIDTH, rgb,
};
use crate::file::Result;
use crate::names::{
    self, Colour, FLOAT, GREY, bits_label, colours, dataset_label, method_label, model_label, table_label,
};
use crate::paper::distinct;
use crate::row::Row;
use crate::stats::{Summary, seeds_label, summarize};
use crate::text::{About, caveats};

/// Draws the rows as grouped bars, as SVG and as PNG (2400×1440).
///
/// A group is a network and its bit widths. A filled bar is our mean; if there are several seeds,
/// it also shows each seed and the standard deviation. A hollow bar is the paper's figure.
pub fn plot(rows: &[Row], about: &About, svg: &Path, png: &Path) -> Result<()> {
    Chart { summaries: summarize(rows), caveats: caveats(rows), about }.write(svg, png)
}

/// The data of the picture.
struct Chart<'a> {
    summaries: Vec<Summary>,
    caveats: Vec<String>,
    about: &'a About,
}

impl Picture for Chart<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
        let mut y = 54.0;
        let title = &self.about.title;
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
}

impl Chart<'_> {
    fn subtitle(&self) -> String {
        let seeds = seeds_label(&self.summaries);
        let profile = format!("profile {}", self.about.profile);
        [dataset_label(&self.about.dataset), &profile, &seeds].join("  ·  ")
    }

    /// Draws the caveats on a dark band, and their consequence next to it.
    fn alarm<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, y: f64) -> Drawn {
        let white = Style { colour: WHITE, ..INK_BOLD.sized(15.0) };
        let reasons = self.caveats.join("  ·  ");
        let end = LEFT + white.width(&reasons) + 24.0;
        canvas.rectangle((LEFT, y - 19.0), (end, y + 8.0), ALARM)?;
        canvas.text(&reasons, (LEFT + 12.0, y), &white)?;
        let published = self.summaries.iter().any(|summary| summary.paper_top1_percent.is_some());
        let rest = match published {
            true => "Only the order of the methods can be compared with the paper.",
            false => "What is compared is the order of the alternatives.",
        };
        canvas.text(rest, (end + 12.0, y), &Style { colour: ALARM, ..INK_BOLD.sized(15.0) })
    }

    /// Returns every method with its colour, in the order of the paper's table.
    fn methods(&self) -> Vec<(&str, Colour)> {
        let mut methods = self.summaries.iter().collect::<Vec<_>>();
        methods.sort_by_key(|summary| names::rank(&summary.table, &summary.method));
        let methods = distinct(methods.into_iter().map(|summary| summary.method.as_str()));
        let colours = colours(&methods);
        methods.into_iter().zip(colours).collect()
    }

    fn legend<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, y: f64) -> Drawn {
        let methods = self.methods();
        let mut entries: Vec<(&str, Sign)> =
            methods.iter().map(|(method, colour)| (method_label(method), Sign::Filled(*colour))).collect();
        if self.summaries.iter().any(|summary| summary.paper_top1_percent.is_some()) {
            entries.push(("the paper's figure", Sign::Hollow));
        }
        if self.summaries.iter().any(|summary| summary.seeds > 1) {
            entries.extend([("one seed", Sign::Dot), ("mean ± standard deviation", Sign::Whisker)]);
        }
        canvas.legend(y, &entries)
    }

    fn bars<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, top: f64, bottom: f64) -> Drawn {
        let highest = self.summaries.iter().map(reach).fold(1.0, f64::max) * 1.06;
        let frame = Frame { left: LEFT + 56.0, right: WIDTH - 40.0, top, bottom, highest };
        canvas.text("Top-1 accuracy, %", (LEFT, top - 18.0), &SOFT_PLAIN.sized(13.0))?;
        canvas.axis(&frame, highest.min(100.0), 13.0)?;
        canvas.text("MACs, M", (LEFT, bottom + 20.0), &SOFT_PLAIN.sized(12.0))?;

        let groups: Vec<_> = self.summaries.chunk_by(|a, b| a.group() == b.group()).collect();
        let wide = (frame.right - frame.left) / groups.len().max(1) as f64;
        let most = groups.iter().map(|group| group.len()).max().unwrap_or(1) as f64;
        let slot = (0.88 * wide / most).min(150.0);
        for (index, group) in groups.iter().enumerate() {
            let centre = frame.left + wide * (index as f64 + 0.5);
            for (place, summary) in group.iter().enumerate() {
                let x = centre + slot * (place as f64 - group.len() as f64 / 2.0);
                self.bar(canvas, summary, x, slot, &frame)?;
            }
            let name = model_label(&group[0].model, group[0].width);
            canvas.text(&name, (centre, bottom + 52.0), &INK_BOLD.sized(16.0).held(HPos::Center))?;
            let bits = bits_label(group[0].activation_bits, group[0].weight_bits);
            canvas.text(&bits, (centre, bottom + 73.0), &SOFT_PLAIN.sized(14.0).held(HPos::Center))?;
        }
        Ok(())
    }

    /// Draws one method's bar in the slot that begins at `x`, and the paper's bar next to it.
    fn bar<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<DB>,
        summary: &Summary,
        x: f64,
        slot: f64,
        frame: &Frame,
    ) -> Drawn {
        let (bottom, height) = (frame.bottom, |value: f64| frame.height(value));
        let methods = self.methods();
        let own = methods.iter().find(|(method, _)| *method == summary.method);
        let colour = rgb(own.map_or(GREY, |(_, colour)| *colour));
        let size = (slot * 0.15).min(14.0);
        let macs = SOFT_PLAIN.sized(size.min(12.0)).held(HPos::Center);

        let wide = slot * if summary.paper_top1_percent.is_some() { 0.48 } else { 0.7 };
        let x = x + slot * if summary.paper_top1_percent.is_some() { 0.05 } else { 0.15 };
        let centre = x + wide / 2.0;
        canvas.rectangle((x, height(summary.mean)), (x + wide, bottom), colour)?;
        let mut above = height(own_reach(summary));
        if let Some(std) = summary.std {
            above -= 3.0; // half the height of a dot
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

/// Returns the largest value that is drawn for our own runs of a summary.
fn own_reach(summary: &Summary) -> f64 {
    summary.values.iter().copied().fold(summary.mean + summary.std.unwrap_or(0.0), f64::max)
}

/// Returns the largest value that is drawn for a summary, including the paper's figure.
fn reach(summary: &Summary) -> f64 {
    own_reach(summary).max(summary.paper_top1_percent.unwrap_or(0.0))
}
