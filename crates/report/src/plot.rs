//! The bar chart of our mean next to the paper's figure, for each method of each group.

use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::WHITE;
use plotters::style::text_anchor::HPos;

use crate::canvas::{
    ALARM, Canvas, Drawn, Entry, Frame, INK_BOLD, LEFT, Picture, RIGHT, SOFT_PLAIN, Sign, Style, WIDTH, flow,
    more_of_legend, rgb,
};
use crate::file::Result;
use crate::names::{
    self, FLOAT, GREY, Look, bits_label, dataset_label, method_label, method_looks, model_label, table_label,
};
use crate::paper::distinct;
use crate::row::Row;
use crate::stats::{Summary, seeds_label, summarize};
use crate::text::{About, caveats};

/// Draws the rows as grouped bars, as SVG and as PNG (2400×1440, or higher if the legend or
/// the caveats need more than one line).
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
        canvas.heading(&self.about.title, &self.subtitle())?;
        let y = if self.caveats.is_empty() { 124.0 } else { 158.0 };
        self.alarm(canvas, 116.0)?;
        let canvas = &canvas.lowered(self.more_of_alarm()).legend(y, &self.legend())?;
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
            canvas.footer(&text)
        })
    }

    fn more(&self) -> f64 {
        self.more_of_alarm() + more_of_legend(&self.legend())
    }
}

/// The style of the caveats and of their consequence.
const LOUD: Style = Style { colour: ALARM, size: 15.0, ..INK_BOLD };
/// The space between the edges of a caveat's band and its text in the widest font.
const PADDING: f64 = 10.0;
/// The distance between the lines of caveats.
const ALARM_LINE: f64 = 34.0;

impl Chart<'_> {
    fn subtitle(&self) -> String {
        let seeds = seeds_label(&self.summaries);
        let profile = format!("profile {}", self.about.profile);
        [dataset_label(&self.about.dataset), &profile, &seeds].join("  ·  ")
    }

    /// Draws each caveat on a dark band, and their consequence after them, with the first baseline
    /// at `y`.
    fn alarm<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, y: f64) -> Drawn {
        if self.caveats.is_empty() {
            return Ok(());
        }
        let places = self.alarm_places();
        for (reason, (x, line)) in self.caveats.iter().zip(&places) {
            let y = y + ALARM_LINE * *line as f64;
            let white = Style { colour: WHITE, ..LOUD.fitting(reason, RIGHT - x - 2.0 * PADDING) };
            let end = x + white.room(reason) + 2.0 * PADDING;
            canvas.rectangle((*x, y - 19.0), (end, y + 8.0), ALARM)?;
            canvas.text(reason, ((x + end) / 2.0, y), &white.held(HPos::Center))?;
        }
        let (x, line) = places.last().copied().unwrap_or((LEFT, 0));
        canvas.text(self.consequence(), (x, y + ALARM_LINE * line as f64), &LOUD)
    }

    /// Returns the places of the caveats and of their consequence.
    fn alarm_places(&self) -> Vec<(f64, usize)> {
        let bands = self.caveats.iter().map(|reason| LOUD.room(reason) + 2.0 * PADDING);
        flow(bands.chain([LOUD.room(self.consequence())]), 12.0)
    }

    /// Returns the height of the caveats' lines after the first.
    fn more_of_alarm(&self) -> f64 {
        ALARM_LINE * self.alarm_places().last().map_or(0, |(_, line)| *line) as f64
    }

    fn consequence(&self) -> &'static str {
        match self.summaries.iter().any(|summary| summary.paper_top1_percent.is_some()) {
            true => "Only the order of the methods can be compared with the paper.",
            false => "What is compared is the order of the alternatives.",
        }
    }

    /// Returns every method with its look, in the order of the paper's table.
    fn methods(&self) -> Vec<(&str, Look)> {
        let mut methods = self.summaries.iter().collect::<Vec<_>>();
        methods.sort_by_key(|summary| names::rank(&summary.table, &summary.method));
        let methods = distinct(methods.into_iter().map(|summary| summary.method.as_str()));
        let looks = method_looks(&methods);
        methods.into_iter().zip(looks).collect()
    }

    fn legend(&self) -> Vec<Entry> {
        let entry = |(method, look): (&str, Look)| (method_label(method).into(), Sign::Filled(look));
        let mut entries: Vec<Entry> = self.methods().into_iter().map(entry).collect();
        if self.summaries.iter().any(|summary| summary.paper_top1_percent.is_some()) {
            entries.push(("the paper's figure".into(), Sign::Hollow));
        }
        if self.summaries.iter().any(|summary| summary.seeds > 1) {
            entries.push(("one seed".into(), Sign::Dot));
            entries.push(("mean ± standard deviation".into(), Sign::Whisker));
        }
        entries
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
            let style = INK_BOLD.sized(16.0).fitting(&name, wide).held(HPos::Center);
            canvas.text(&name, (centre, bottom + 52.0), &style)?;
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
        let look = own.map_or(Look::plain(GREY), |(_, look)| *look);
        // Two numbers must fit beside each other, or one.
        let size = (slot * if summary.paper_top1_percent.is_some() { 0.15 } else { 0.28 }).min(14.0);
        let macs = SOFT_PLAIN.sized(size.min(12.0)).held(HPos::Center);

        let wide = slot * if summary.paper_top1_percent.is_some() { 0.48 } else { 0.7 };
        let x = x + slot * if summary.paper_top1_percent.is_some() { 0.05 } else { 0.15 };
        let centre = x + wide / 2.0;
        canvas.bar((x, height(summary.mean)), (x + wide, bottom), look)?;
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
            canvas.outline((x, height(theirs)), (x + wide, bottom), rgb(look.colour))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caveats_stay_between_the_margins() {
        let about = About::default();
        let check = |caveats: &[&str], lines: usize| {
            let caveats: Vec<String> = caveats.iter().map(|text| text.to_string()).collect();
            let chart = Chart { summaries: Vec::new(), caveats, about: &about };
            let bands = chart.caveats.iter().map(|reason| LOUD.room(reason) + 2.0 * PADDING);
            let widths = bands.chain([LOUD.room(chart.consequence())]);
            for ((x, _), width) in chart.alarm_places().into_iter().zip(widths) {
                assert!(x + width <= RIGHT, "{x} and {width} of {:?}", chart.caveats);
            }
            assert_eq!(chart.more(), ALARM_LINE * (lines - 1) as f64, "{:?}", chart.caveats);
        };
        let part = "a part of ImageNet, training images held out, pictures shrunk, not CIFAR-100";
        check(&[], 1);
        check(&["network width ×0.25"], 1);
        check(&["SYNTHETIC DATA", "network width ×0.25"], 1);
        check(&[part, "network width ×0.25"], 2);
        check(&[part, "SYNTHETIC DATA", part, "network width ×0.25"], 3);
    }
}
