//! The bar chart: our mean beside the paper's figure, for each method of each group.

use std::path::Path;

use plotters::prelude::DrawingBackend;
use plotters::style::WHITE;
use plotters::style::text_anchor::HPos;

use crate::canvas::{
    ALARM, Canvas, Drawn, GRID, HEIGHT, INK_BOLD, INK_PLAIN, LEFT, Picture, SOFT, SOFT_PLAIN, Style, WIDTH,
    rgb,
};
use crate::file::Result;
use crate::names::{self, FLOAT, bits_label, colour, dataset_label, method_label, model_label, table_label};
use crate::row::Row;
use crate::stats::{Summary, summarize};
use crate::text::{Context, caveats};

/// Draws the rows as grouped bars, as SVG and as PNG (2400×1440).
///
/// A group is a network and its bits. A filled bar is our mean, with each seed and the standard deviation
/// where there are several; a hollow one is the paper's figure.
pub fn plot(rows: &[Row], context: &Context, svg: &Path, png: &Path) -> Result<()> {
    Chart { summaries: summarize(rows), caveats: caveats(rows), context }.write(svg, png)
}

/// What the picture is made of.
struct Chart<'a> {
    summaries: Vec<Summary>,
    caveats: Vec<String>,
    context: &'a Context,
}

impl Picture for Chart<'_> {
    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn {
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
}

impl Chart<'_> {
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
