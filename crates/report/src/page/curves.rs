//! Loss and accuracy by epoch for every stage that trained.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::table_html;
use crate::names::model_label;
use crate::scale::round_range;
use crate::stage::{Epoch, StageRecord, trace};
use crate::text::{Cell, Column, Table};

/// The seeds of one kind of stage, with their epochs.
type Seeds<'a> = Vec<(u64, &'a [Epoch])>;

/// Renders the explanation of the lines.
pub(super) fn legend() -> Markup {
    html! {
        p.legend {
            svg.sample viewBox="0 0 34 10" width="34" height="10" aria-hidden="true" {
                line.test x1="0" x2="34" y1="5" y2="5" {}
            }
            " test set  "
            svg.sample viewBox="0 0 34 10" width="34" height="10" aria-hidden="true" {
                line.train x1="0" x2="34" y1="5" y2="5" {}
            }
            " training  (one line for each seed)"
        }
    }
}

/// Renders a drawing for each kind of stage that trained for several epochs, and a table of the
/// stages that trained for one epoch.
pub(super) fn of(stages: &[StageRecord]) -> Markup {
    let mut kinds: BTreeMap<(String, usize, String), Seeds> = BTreeMap::new();
    for traced in trace(stages) {
        let (stage, origin) = (traced.stage, traced.origin);
        if !stage.metrics.is_empty() {
            let model = model_label(origin.model().unwrap_or_default(), origin.width().unwrap_or(1.0));
            let key = (model, traced.steps.len(), traced.steps.join(" → "));
            kinds.entry(key).or_default().push((stage.seed().unwrap_or(0), &stage.metrics));
        }
    }
    kinds.values_mut().for_each(|seeds| seeds.sort_by_key(|(seed, _)| *seed));
    let (short, long): (Vec<_>, Vec<_>) =
        kinds.into_iter().partition(|(_, seeds)| seeds.iter().all(|(_, epochs)| epochs.len() == 1));
    html! {
        @if !long.is_empty() {
            div.grid {
                @for ((model, _, steps), seeds) in &long {
                    figure.curve {
                        figcaption { strong { (model) } br; (steps) }
                        (drawing(&format!("{model}, {steps}"), seeds))
                    }
                }
            }
        }
        @if !short.is_empty() { (single(&short)) }
    }
}

fn single(kinds: &[((String, usize, String), Seeds)]) -> Markup {
    let head: Vec<Column> = vec![
        ("network", false),
        ("steps", false),
        ("seed", true),
        ("training loss", true),
        ("test loss", true),
        ("training top-1, %", true),
        ("test top-1, %", true),
    ];
    let rows = kinds.iter().flat_map(|((model, _, steps), seeds)| {
        let row = |(seed, epochs): &(u64, &[Epoch])| {
            let of = epochs[0];
            [
                model.clone(),
                steps.clone(),
                seed.to_string(),
                format!("{:.3}", of.train_loss),
                format!("{:.3}", of.test_loss),
                format!("{:.2}", of.train_top1_percent),
                format!("{:.2}", of.test_top1_percent),
            ]
            .map(Cell::from)
            .to_vec()
        };
        seeds.iter().map(row).collect::<Vec<_>>()
    });
    table_html("Stages that trained for one epoch", &Table { head, rows: rows.collect() })
}

const WIDE: f64 = 300.0;
const LEFT: f64 = 34.0;
const RIGHT: f64 = 292.0;
const PANEL: f64 = 88.0;

fn drawing(what: &str, seeds: &Seeds) -> Markup {
    let epochs = seeds.iter().flat_map(|(_, epochs)| epochs.iter().map(|of| of.epoch)).max().unwrap_or(1);
    let last = |(seed, epochs): &(u64, &[Epoch])| {
        let of = epochs.last()?;
        Some(format!("seed {seed}: test loss {:.3}, top-1 {:.2} %", of.test_loss, of.test_top1_percent))
    };
    let ends: Vec<String> = seeds.iter().filter_map(last).collect();
    let mut lows = seeds.iter().flat_map(|(_, epochs)| epochs.iter().map(|of| of.low_variance_percent));
    let (high, low) = if lows.any(f64::is_finite) { (362.0, true) } else { (246.0, false) };
    let label = format!("{what}: loss and top-1 by epoch. After epoch {epochs}, {}", ends.join("; "));
    html! {
        svg viewBox={ "0 0 " (WIDE) " " (high) } role="img" aria-label=(label) {
            (panel(20.0, "loss", seeds, epochs, |of| (of.train_loss, of.test_loss), None))
            (panel(136.0, "top-1, %", seeds, epochs, |of| (of.train_top1_percent, of.test_top1_percent), Some(0.0)))
            @if low { (panel(252.0, "filters with V < ε, %", seeds, epochs, |of| (f64::NAN, of.low_variance_percent), Some(0.0))) }
            text.soft x=(LEFT) y=(high - 4.0) { "epoch 1" }
            text.soft.end x=(RIGHT) y=(high - 4.0) { (epochs) }
        }
    }
}

/// Draws one quantity over the epochs, in training and on the test set. The axis begins at
/// `lowest`, or else near the lowest value.
fn panel(
    top: f64,
    title: &str,
    seeds: &Seeds,
    epochs: usize,
    values: fn(&Epoch) -> (f64, f64),
    lowest: Option<f64>,
) -> Markup {
    let finite = || {
        let all = seeds.iter().flat_map(|(_, epochs)| epochs.iter().map(values));
        all.flat_map(|(train, test)| [train, test]).filter(|value| value.is_finite())
    };
    let low = lowest.unwrap_or_else(|| finite().fold(f64::INFINITY, f64::min));
    let high = finite().fold(f64::NEG_INFINITY, f64::max);
    let ticks = round_range(low, high, 4.0);
    let (first, last) = (ticks.first().map_or(0.0, |of| of.0), ticks.last().map_or(1.0, |of| of.0));
    let y = |value: f64| top + PANEL * (last - value) / (last - first).max(f64::MIN_POSITIVE);
    let x =
        |epoch: usize| LEFT + 4.0 + (RIGHT - LEFT - 8.0) * (epoch - 1) as f64 / (epochs.max(2) - 1) as f64;
    let lines = |pick: fn((f64, f64)) -> f64| {
        seeds
            .iter()
            .flat_map(move |(_, epochs)| runs(epochs.iter().map(move |of| (of.epoch, pick(values(of))))))
    };
    let points = |run: &[(usize, f64)]| {
        let point = |&(epoch, value): &(usize, f64)| format!("{:.1},{:.1}", x(epoch), y(value));
        run.iter().map(point).collect::<Vec<_>>().join(" ")
    };
    let curve = |class: &str, run: &[(usize, f64)]| match run {
        [(epoch, value)] => {
            html! { circle class=(class) cx=(format!("{:.1}", x(*epoch))) cy=(format!("{:.1}", y(*value))) r="2.5" {} }
        }
        run => html! { polyline class=(class) points=(points(run)) {} },
    };
    html! {
        text.soft x="2" y=(top - 8.0) { (title) }
        @for (tick, text) in &ticks {
            line.rule x1=(LEFT) x2=(RIGHT) y1=(format!("{:.1}", y(*tick))) y2=(format!("{:.1}", y(*tick))) {}
            text.soft.end x=(LEFT - 4.0) y=(format!("{:.1}", y(*tick) + 3.5)) { (text) }
        }
        @for run in lines(|of| of.0) { (curve("train", &run)) }
        @for run in lines(|of| of.1) { (curve("test", &run)) }
    }
}

/// Splits points into runs without gaps. A value that is not finite ends a run.
fn runs(points: impl Iterator<Item = (usize, f64)>) -> Vec<Vec<(usize, f64)>> {
    let mut runs = vec![Vec::new()];
    for (epoch, value) in points {
        match runs.last_mut() {
            Some(run) if value.is_finite() => run.push((epoch, value)),
            _ => runs.push(Vec::new()),
        }
    }
    runs.retain(|run| !run.is_empty());
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::tests::pruned;

    #[test]
    fn curves_have_gaps_where_there_is_no_number() {
        let points = [(1, 1.0), (2, f64::NAN), (3, 3.0), (4, 4.0)];
        assert_eq!(runs(points.into_iter()), [vec![(1, 1.0)], vec![(3, 3.0), (4, 4.0)]]);
        assert!(runs([(1, f64::NAN)].into_iter()).is_empty());
    }

    #[test]
    fn every_seed_is_a_line() {
        let stages = [pruned(0, (50.0, 49.0), &[]), pruned(1, (51.0, 50.0), &[])].concat();
        let text = of(&stages).into_string();
        // Each seed has a line for training loss, training accuracy and test accuracy; the test
        // loss is NaN.
        assert_eq!(
            (text.matches("<polyline class=\"train\"").count(), text.matches("<figure").count()),
            (4, 1)
        );
        assert_eq!(text.matches("<polyline class=\"test\"").count(), 2);
        assert!(
            text.contains("MobileNetV2 ×0.25") && text.contains("seed 1: test loss NaN, top-1 24.00 %"),
            "{text}"
        );
        // If it was measured, the share of low-variance filters is drawn below.
        assert!(text.contains("viewBox=\"0 0 300 246\"") && !text.contains("V &lt; ε"), "{text}");
        let mut low = stages.clone();
        low[0].metrics.iter_mut().zip([0.0, 12.5]).for_each(|(of, low)| of.low_variance_percent = low);
        let text = of(&low).into_string();
        assert!(text.contains("viewBox=\"0 0 300 362\"") && text.contains("V &lt; ε"), "{text}");
        assert_eq!(text.matches("<polyline class=\"test\"").count(), 3);
        let mut short = stages.clone();
        short.iter_mut().for_each(|stage| stage.metrics.truncate(1));
        let text = of(&short).into_string();
        assert_eq!((text.matches("<tr").count(), text.matches("<figure").count()), (3, 0));
    }
}
