//! The paper's statements that can fail, and what our runs say about them.
//!
//! A [`Claim`] is data: a sentence, the table that it is about, and what must be so in which cells. Its arithmetic
//! is written once ([`Claim::samples`]) and done on our rows and on the paper's, so that a statement which the
//! paper's own figures contradict is found.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::entries::{self, Entry};
use crate::file::Result;
use crate::names::{bits_label, method_label, model_label};
use crate::paper::{Paper, PaperPruned, PaperRow, distinct};
use crate::row::Row;
use crate::stage::{StageRecord, Traced, trace};
use crate::stats::{Estimate, LEVEL, Quantity, Range, Verdict, by_seed, differences, holm};

/// A statement that can fail.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// Its name: lower-case letters, digits and hyphens.
    pub id: String,
    /// The statement, in our words.
    pub says: String,
    /// The paper's table that it is about, as "table3"; none where it is about the first pruning, which all tables
    /// share.
    pub table: Option<String>,
    /// The networks that it is about; all of the table where empty.
    #[serde(default)]
    pub models: Vec<String>,
    /// The bits that it is about, as "a4w4"; all of the table where empty.
    #[serde(default)]
    pub bits: Vec<String>,
    /// What must be so.
    pub expect: Expect,
    /// Whether the mean over all of the cells is meant, instead of each of them by itself: an effect that is too small
    /// to be seen in any one cell can be seen there.
    #[serde(default)]
    pub pooled: bool,
    /// Where the design of a profile forces the verdict, which then is no evidence.
    #[serde(default)]
    pub forced: Vec<Forced>,
    /// What the paper's own figures say about it. An error where they say something else.
    #[serde(default)]
    pub paper: PaperSays,
    /// What a reader should know besides.
    pub note: Option<String>,
}

/// A profile whose design forces a verdict.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Forced {
    /// The profile's name.
    pub profile: String,
    /// What forces it.
    pub why: String,
}

/// What must be so for a claim to hold; each comparison in each cell (a network at some bits) by itself.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Expect {
    /// The quantity rises from each method to the next.
    Rising {
        /// What is compared.
        of: Quantity,
        /// Two methods or more, by their names in the CSV files.
        methods: Vec<String>,
        /// Whether it may stay the same.
        #[serde(default)]
        or_equal: bool,
        /// By how much it may even fall: with a margin the statement is that it is no worse.
        #[serde(default)]
        margin: f64,
    },
    /// What one method is above another, in accuracy, is more at some bits than at others.
    LargerGain {
        /// The method that gains.
        method: String,
        /// The method that it is compared with.
        over: String,
        /// The bits where the gain is larger, as "a3w3".
        at: String,
        /// The bits where it is smaller.
        than: String,
    },
    /// The quantity, or its difference from that of another method, lies between two values.
    Between {
        /// Which quantity.
        of: Quantity,
        /// Of which method.
        method: String,
        /// The method that it is compared with, if any.
        over: Option<String>,
        /// The lowest value.
        from: f64,
        /// The highest value.
        to: f64,
    },
    /// The quantity is the published one but for so much; only runs of the paper's networks on its data count.
    Published {
        /// Which quantity.
        of: Quantity,
        /// Of which method.
        method: String,
        /// The largest difference.
        within: f64,
    },
    /// Something about the pruning that comes right after pre-training (PfQ with bias correction), for each network
    /// and each pre-trained network of it, lies between two values.
    FirstPruning {
        /// What of it.
        of: PruningQuantity,
        /// The lowest value.
        from: f64,
        /// The highest value.
        to: f64,
    },
}

/// What of a pruning is looked at.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum PruningQuantity {
    /// Of the filters below the threshold, the percentage in depthwise layers.
    LowInDepthwise,
    /// Accuracy after pruning less that before, in points, without any training between.
    Top1Change,
}

/// What the paper's own figures say about a claim.
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum PaperSays {
    /// They agree with it in every comparison.
    #[default]
    Agrees,
    /// They do not, in at least one.
    Contradicts,
    /// It publishes no figures for it.
    Silent,
}

/// One comparison of a claim, judged by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The network and its bits, as "MobileNetV2 A4/W4".
    pub cell: String,
    /// What is compared, as "Ours − DFQ + fine-tune".
    pub what: String,
    /// The mean over our seeds; none where nothing has been run.
    pub estimate: Option<Estimate>,
    /// Where the claim says that it lies.
    pub range: Range,
    /// The same from the paper's figures.
    pub paper: Option<f64>,
    /// How many pre-trained networks are behind the values, where the stages tell: seeds that share one say nothing
    /// about others.
    pub networks: Option<usize>,
    /// The p-value of the test by which it is judged, corrected for the number of the claim's comparisons; none where
    /// there is none ([`Estimate::p_value`]).
    pub p_value: Option<f64>,
    /// Where it is not decided: how many values would decide it, should the mean and the spread stay as they are; none
    /// where one value has no spread or where they would be too many ([`Estimate::needed`]).
    pub needed: Option<usize>,
    /// What follows from our values.
    pub verdict: Verdict,
}

/// Values by seed of one comparison, and where the claim says that their mean lies.
struct Sample {
    cell: String,
    models: Vec<String>,
    what: String,
    range: Range,
    values: BTreeMap<u64, f64>,
}

/// A network at some bits.
#[derive(Clone, Copy, PartialEq)]
struct Condition<'a> {
    model: &'a str,
    activation_bits: u32,
    weight_bits: u32,
}

impl Condition<'_> {
    /// "a4w4".
    fn bits(&self) -> String {
        format!("a{}w{}", self.activation_bits, self.weight_bits)
    }

    fn label(&self) -> String {
        format!("{} {}", model_label(self.model, 1.0), bits_label(self.activation_bits, self.weight_bits))
    }
}

impl<'a> From<&'a PaperRow> for Condition<'a> {
    fn from(row: &'a PaperRow) -> Self {
        Self { model: &row.model, activation_bits: row.activation_bits, weight_bits: row.weight_bits }
    }
}

/// Where the arithmetic of a claim takes its values from.
trait Values {
    /// A quantity of a method in a cell, by seed; by the seed of the pre-training where that decides it, as it does how
    /// much is pruned. Only of the paper's networks and data if `absolute`.
    fn get(&self, cell: Condition, method: &str, of: Quantity, absolute: bool) -> BTreeMap<u64, f64>;

    /// Something about the first pruning of a network, by seed of its pre-training.
    fn first_pruning(&self, model: &str, of: PruningQuantity) -> BTreeMap<u64, f64>;
}

/// Our results.
struct Ours<'a> {
    rows: Vec<Row>,
    stages: Vec<Traced<'a>>,
}

impl Ours<'_> {
    /// By the seed of a stage of a network, the seed of the pre-training that it comes from.
    fn pre_trainings(&self, model: &str) -> BTreeMap<u64, u64> {
        let seeds = |of: &Traced| {
            let seeds = of.stage.seed().zip(of.origin.seed());
            seeds.filter(|_| of.origin.model() == Some(model) && of.stage.key != of.origin.key)
        };
        self.stages.iter().filter_map(seeds).collect()
    }

    /// How many pre-trained networks are behind values; the fewest of any model.
    fn networks(&self, sample: &Sample) -> Option<usize> {
        let of = |model: &String| {
            let pre_training = self.pre_trainings(model);
            let found =
                sample.values.keys().map(|seed| pre_training.get(seed)).collect::<Option<BTreeSet<_>>>();
            found.map(|found| found.len())
        };
        sample.models.iter().map(of).min().flatten()
    }
}

impl Values for Ours<'_> {
    fn get(&self, cell: Condition, method: &str, of: Quantity, absolute: bool) -> BTreeMap<u64, f64> {
        let rows = if absolute {
            self.rows.iter().filter(|row| row.comparable()).cloned().collect()
        } else {
            self.rows.clone()
        };
        let values = by_seed(&rows, cell.model, cell.activation_bits, cell.weight_bits, method, of);
        if of == Quantity::Top1 {
            return values;
        }
        let pre_training = self.pre_trainings(cell.model);
        let mut by_network: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for (seed, value) in values {
            by_network.entry(*pre_training.get(&seed).unwrap_or(&seed)).or_default().push(value);
        }
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        by_network.into_iter().map(|(seed, values)| (seed, mean(values))).collect()
    }

    fn first_pruning(&self, model: &str, of: PruningQuantity) -> BTreeMap<u64, f64> {
        let first = |traced: &Traced| {
            let Traced { stage, origin, .. } = traced;
            (origin.model() == Some(model)
                && stage.prunes_with_correction()
                && stage.parent.as_ref() == Some(&origin.key))
            .then_some(())?;
            let value = match of {
                PruningQuantity::Top1Change => stage.evaluation.top1_percent - origin.evaluation.top1_percent,
                PruningQuantity::LowInDepthwise => {
                    let layers = stage.pruning()?.layers;
                    let low = |depthwise: bool| -> usize {
                        let of = layers.iter().filter(|layer| stage.is_depthwise(layer) || !depthwise);
                        of.map(|layer| layer.low).sum()
                    };
                    // Where no filter is low there is no share.
                    (low(false) > 0).then(|| 100.0 * low(true) as f64 / low(false) as f64)?
                }
            };
            Some((origin.seed()?, value))
        };
        self.stages.iter().filter_map(first).collect()
    }
}

/// The paper's figures of one table, as of one seed.
struct Published<'a>(&'a str);

impl Values for Published<'_> {
    fn get(&self, cell: Condition, method: &str, of: Quantity, _: bool) -> BTreeMap<u64, f64> {
        let paper = Paper::published();
        let row = paper.lookup(self.0, cell.model, cell.activation_bits, cell.weight_bits, method);
        let value = row.and_then(|row| match of {
            Quantity::Top1 => Some(row.top1_percent),
            Quantity::Macs => Some(row.mac_millions),
            Quantity::WeightsPruned => {
                let same = |of: &&PaperPruned| of.model == row.model && of.dataset == row.dataset;
                paper.pruned_weights().iter().find(same).map(|of| of.weights_pruned_percent)
            }
        });
        value.into_iter().map(|value| (0, value)).collect()
    }

    fn first_pruning(&self, _: &str, _: PruningQuantity) -> BTreeMap<u64, f64> {
        BTreeMap::new()
    }
}

impl Claim {
    /// Reads the claims of a TOML file (`[[claim]]`), whose name only serves the errors; each of these names the
    /// entry. Besides unknown keys and names it is an error where the paper's figures do not say what an entry
    /// says that they do.
    pub fn parse(text: &str, file: &str) -> Result<Vec<Claim>> {
        entries::parse(text, file, "claim")
    }

    /// Judges it by our rows of one profile, of which it picks those of its table, and by the stages behind them.
    pub fn judge(&self, rows: &[Row], stages: &[StageRecord]) -> Vec<Comparison> {
        let table = self.table.as_deref().unwrap_or_default();
        let ours = Ours {
            rows: rows.iter().filter(|row| row.table == table).cloned().collect(),
            stages: trace(stages),
        };
        let (samples, paper) = (self.comparisons(&ours), self.comparisons(&Published(table)));
        let estimates: Vec<Option<Estimate>> =
            samples.iter().map(|of| Estimate::of(of.values.values().copied())).collect();
        let p_values: Vec<Option<f64>> = samples
            .iter()
            .zip(&estimates)
            .map(|(of, estimate)| estimate.as_ref()?.p_value(of.range))
            .collect();
        let corrected = holm(&p_values.iter().flatten().copied().collect::<Vec<_>>());
        let level = LEVEL / corrected.len().max(1) as f64;
        let mut corrected = corrected.into_iter();
        let compare = |(index, (sample, paper)): (usize, (Sample, Sample))| {
            let estimate = estimates[index];
            let p_value = p_values[index].and_then(|_| corrected.next());
            let verdict = Verdict::of(estimate, sample.range, p_value);
            let undecided = estimate.filter(|_| verdict == Verdict::NotDecided);
            Comparison {
                networks: ours.networks(&sample),
                cell: sample.cell,
                what: sample.what,
                estimate,
                range: sample.range,
                paper: paper.values.into_values().next(),
                p_value,
                needed: undecided.and_then(|of| of.needed(sample.range, level)),
                verdict,
            }
        };
        samples.into_iter().zip(paper).enumerate().map(compare).collect()
    }

    /// The profile's design forces the verdict: what about it.
    pub fn forced(&self, profile: &str) -> Option<&str> {
        self.forced.iter().find(|of| of.profile == profile).map(|of| of.why.as_str())
    }

    /// What the paper's own figures say about it.
    fn paper_says(&self) -> PaperSays {
        let inside = |of: &Comparison| of.paper.map(|value| of.range.contains(value));
        let published: Vec<bool> = self.judge(&[], &[]).iter().filter_map(inside).collect();
        match published.iter().all(|inside| *inside) {
            _ if published.is_empty() => PaperSays::Silent,
            true => PaperSays::Agrees,
            false => PaperSays::Contradicts,
        }
    }

    /// What its figures are, as "points".
    pub fn unit(&self) -> &'static str {
        match &self.expect {
            Expect::Rising { of: Quantity::Macs, .. }
            | Expect::Between { of: Quantity::Macs, .. }
            | Expect::Published { of: Quantity::Macs, .. } => "millions of multiply–accumulates",
            _ if self.signed() => "points",
            _ => "%",
        }
    }

    /// Whether its figures are differences, which are shown with a sign.
    pub fn signed(&self) -> bool {
        match &self.expect {
            Expect::Rising { .. } | Expect::LargerGain { .. } => true,
            Expect::Between { over, .. } => over.is_some(),
            Expect::Published { .. } => false,
            Expect::FirstPruning { of, .. } => *of == PruningQuantity::Top1Change,
        }
    }

    /// The values of every comparison; where it is pooled, their means over the cells at the seeds that all cells have.
    fn comparisons(&self, values: &dyn Values) -> Vec<Sample> {
        let mut samples = self.samples(values);
        if !self.pooled || samples.is_empty() {
            return samples;
        }
        let count = samples.len() as f64;
        let mut first = samples.remove(0);
        for sample in samples {
            first.values.retain(|seed, value| match sample.values.get(seed) {
                Some(more) => {
                    *value += more;
                    true
                }
                None => false,
            });
            first.models.extend(sample.models);
        }
        first.values.values_mut().for_each(|sum| *sum /= count);
        vec![Sample { cell: format!("mean of {count} cells"), ..first }]
    }

    /// The values of each cell, the same ones in the same order for all sources.
    fn samples(&self, values: &dyn Values) -> Vec<Sample> {
        let difference = |cell: Condition, a: &str, b: &str, of: Quantity| {
            differences(&values.get(cell, a, of, false), &values.get(cell, b, of, false))
        };
        let minus = |a: &str, b: &str| format!("{} − {}", method_label(a), method_label(b));
        let cells = self.cells();
        match &self.expect {
            Expect::Rising { of, methods, or_equal, margin } => {
                let pair = |cell: Condition, pair: &[String]| Sample {
                    cell: cell.label(),
                    models: vec![cell.model.into()],
                    what: minus(&pair[1], &pair[0]),
                    range: Range::more_than(-margin, *or_equal),
                    values: difference(cell, &pair[1], &pair[0], *of),
                };
                cells.iter().flat_map(|cell| methods.windows(2).map(|of| pair(*cell, of))).collect()
            }
            Expect::LargerGain { method, over, at, than } => {
                let find = |model: &str, bits: &str| {
                    cells.iter().copied().find(|cell| cell.model == model && cell.bits() == bits)
                };
                let gain = |cell: Condition| difference(cell, method, over, Quantity::Top1);
                let sample = |cell: &Condition| {
                    let (at, than) = find(cell.model, at).zip(find(cell.model, than))?;
                    let bits = |of: Condition| bits_label(of.activation_bits, of.weight_bits);
                    (*cell == at).then(|| Sample {
                        cell: model_label(cell.model, 1.0),
                        models: vec![cell.model.into()],
                        what: format!("({}) at {} − at {}", minus(method, over), bits(at), bits(than)),
                        range: Range::POSITIVE,
                        values: differences(&gain(at), &gain(than)),
                    })
                };
                cells.iter().filter_map(sample).collect()
            }
            Expect::Between { of, method, over, from, to } => {
                let sample = |cell: &Condition| Sample {
                    cell: cell.label(),
                    models: vec![cell.model.into()],
                    what: over
                        .as_ref()
                        .map_or_else(|| method_label(method).into(), |over| minus(method, over)),
                    range: Range::between(*from, *to),
                    values: match over {
                        Some(over) => difference(*cell, method, over, *of),
                        None => values.get(*cell, method, *of, false),
                    },
                };
                cells.iter().map(sample).collect()
            }
            Expect::Published { of, method, within } => {
                let published = Published(self.table.as_deref().unwrap_or_default());
                let sample = |cell: &Condition| {
                    let theirs = published.get(*cell, method, *of, true).into_values().next();
                    let theirs = theirs.unwrap_or(f64::NAN);
                    Sample {
                        cell: cell.label(),
                        models: vec![cell.model.into()],
                        what: method_label(method).into(),
                        range: Range::between(theirs - within, theirs + within),
                        values: values.get(*cell, method, *of, true),
                    }
                };
                cells.iter().map(sample).collect()
            }
            Expect::FirstPruning { of, from, to } => {
                let what = match of {
                    PruningQuantity::LowInDepthwise => "depthwise of all low filters",
                    PruningQuantity::Top1Change => "after pruning − before",
                };
                let sample = |model: &&str| Sample {
                    cell: model_label(model, 1.0),
                    models: vec![model.to_string()],
                    what: what.into(),
                    range: Range::between(*from, *to),
                    values: values.first_pruning(model, *of),
                };
                Paper::published().models().iter().filter(|model| self.about(model)).map(sample).collect()
            }
        }
    }

    fn about(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|of| of == model)
    }

    /// The cells of the paper's table that it is about, in the paper's order.
    fn cells(&self) -> Vec<Condition<'_>> {
        let cells = distinct(self.published().iter().map(Condition::from));
        let about = |cell: &Condition| {
            self.about(cell.model) && (self.bits.is_empty() || self.bits.contains(&cell.bits()))
        };
        cells.into_iter().filter(about).collect()
    }

    /// The rows of the paper's table that it is about.
    fn published(&self) -> &'static [PaperRow] {
        Paper::published().table(self.table.as_deref().unwrap_or_default())
    }
}

impl Entry for Claim {
    fn id(&self) -> &str {
        &self.id
    }

    fn check(&self) -> std::result::Result<(), String> {
        let rows = self.published();
        match (&self.expect, &self.table) {
            (Expect::FirstPruning { .. }, Some(table)) => {
                return Err(format!(
                    "table = {table:?}: the first pruning is none of a table's; leave it out"
                ));
            }
            (Expect::FirstPruning { .. }, None) if !self.bits.is_empty() => {
                return Err(
                    "bits are given: the first pruning is that of a float network; leave them out".into()
                );
            }
            (Expect::FirstPruning { .. }, None) => {}
            (_, table) if rows.is_empty() => {
                let tables: Vec<&str> = Paper::published().tables().collect();
                return Err(format!("table = {table:?}: expected one of the paper's, {}", tables.join(", ")));
            }
            _ => {}
        }
        let known =
            |key: &str, found: &[String], all: Vec<String>| match found.iter().find(|of| !all.contains(of)) {
                Some(unknown) => Err(format!("{key} has {unknown:?}: expected some of {}", all.join(", "))),
                None => Ok(()),
            };
        let all = |value: fn(&PaperRow) -> String| distinct(rows.iter().map(value));
        let models = if rows.is_empty() {
            Paper::published().models().into_iter().map(String::from).collect()
        } else {
            all(|row| row.model.clone())
        };
        known("models", &self.models, models)?;
        known("bits", &self.bits, all(|row| Condition::from(row).bits()))?;
        let methods = |found: &[String]| known("expect", found, all(|row| row.method.clone()));
        let ordered = |from: f64, to: f64| match from <= to {
            true => Ok(()),
            false => Err(format!("expect: from = {from}, to = {to}: expected from ≤ to")),
        };
        match &self.expect {
            Expect::Rising { methods: found, .. } if found.len() < 2 => {
                return Err(format!("expect: methods = {found:?}: expected two or more"));
            }
            Expect::Rising { methods: found, .. } if self.pooled && found.len() > 2 => {
                return Err(format!(
                    "pooled, and methods = {found:?}: expected two, whose difference is averaged"
                ));
            }
            Expect::Rising { margin, .. } if !(0.0..f64::INFINITY).contains(margin) => {
                return Err(format!("expect: margin = {margin}: expected zero or more"));
            }
            Expect::Rising { methods: found, .. } => methods(found)?,
            Expect::LargerGain { method, over, at, than } => {
                methods(&[method.clone(), over.clone()])?;
                let bits: Vec<String> = self.cells().iter().map(Condition::bits).collect();
                known("expect", &[at.clone(), than.clone()], bits)?;
            }
            Expect::Between { method, over, from, to, .. } => {
                methods(&[Some(method), over.as_ref()].into_iter().flatten().cloned().collect::<Vec<_>>())?;
                ordered(*from, *to)?;
            }
            Expect::Published { .. } if self.pooled => {
                return Err("pooled: published values are compared one by one; leave it out".into());
            }
            Expect::Published { method, within, .. } => {
                methods(std::slice::from_ref(method))?;
                ordered(0.0, *within)?;
            }
            Expect::FirstPruning { from, to, .. } => ordered(*from, *to)?,
        }
        let found = self.paper_says();
        if found != self.paper {
            return Err(format!(
                "paper = {:?}, but its figures say {found:?}: correct the claim, or set paper to what they say",
                self.paper
            ));
        }
        Ok(())
    }
}
