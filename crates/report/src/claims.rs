//! The paper's claims, which can fail, and the verdicts of our runs on them.
//!
//! A [`Claim`] is data: a sentence, the table that it is about, and the expectation in certain
//! cells of the table. The same code ([`Claim::samples`]) evaluates a claim on our rows and on the
//! paper's, so that a claim which the paper's own figures contradict is found.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::entries::{self, Entry};
use crate::file::Result;
use crate::names::{bits_label, method_label, model_label};
use crate::paper::{Paper, PaperPruned, PaperRow, distinct};
use crate::row::Row;
use crate::stage::{StageRecord, Traced, trace};
use crate::stats::{Estimate, LEVEL, Quantity, Range, Verdict, by_seed, differences, holm};

/// A statement of the paper that can fail.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The unique name: lower-case letters, digits and hyphens.
    pub id: String,
    /// The statement in our words.
    pub says: String,
    /// The paper's table that the claim is about, as "table3"; `None` if it is about the first
    /// pruning, which all tables share.
    pub table: Option<String>,
    /// The networks that the claim is about; empty for all networks of the table.
    #[serde(default)]
    pub models: Vec<String>,
    /// The bit widths that the claim is about, as "a4w4"; empty for all bit widths of the table.
    #[serde(default)]
    pub bits: Vec<String>,
    /// The expectation.
    pub expect: Expect,
    /// Whether the claim is about the mean over all cells instead of each cell. An effect that is
    /// too small to be seen in a single cell can be visible in the mean.
    #[serde(default)]
    pub pooled: bool,
    /// The profiles whose design forces the verdict, which is then no evidence.
    #[serde(default)]
    pub forced: Vec<Reason>,
    /// The profiles in which the claim fails though nothing forces it, each with the best
    /// explanation. It is shown only where the claim fails.
    #[serde(default)]
    pub explained: Vec<Reason>,
    /// The result of the paper's own figures. It is an error if the figures say something else.
    #[serde(default)]
    pub paper: PaperSays,
    /// A remark for readers.
    pub note: Option<String>,
}

/// What explains the verdict of profiles.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    /// The names of the profiles.
    pub profiles: Vec<String>,
    /// The reason, in whole sentences.
    pub why: String,
}

/// Returns the reason of a profile.
fn why<'a>(reasons: &'a [Reason], profile: &str) -> Option<&'a str> {
    reasons.iter().find(|of| of.profiles.iter().any(|of| of == profile)).map(|of| of.why.as_str())
}

/// The expectation of a claim for each comparison in each cell, a network at certain bit widths.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Expect {
    /// The quantity increases from each method to every later one.
    Rising {
        /// The quantity that is compared.
        of: Quantity,
        /// Two or more methods, by their names in the CSV files.
        methods: Vec<String>,
        /// Whether the quantity may also stay the same.
        #[serde(default)]
        or_equal: bool,
        /// The amount by which the quantity may decrease. With a margin the claim says that the
        /// quantity is not worse.
        #[serde(default)]
        margin: f64,
    },
    /// The difference in accuracy between two methods is larger at some bit widths than at others.
    LargerGain {
        /// The method that gains.
        method: String,
        /// The method that it is compared with.
        over: String,
        /// The bit widths with the larger gain, as "a3w3".
        at: String,
        /// The bit widths with the smaller gain.
        than: String,
    },
    /// The quantity of a method, or its difference from another method, lies between two values.
    Between {
        /// The quantity.
        of: Quantity,
        /// The method.
        method: String,
        /// The method that it is compared with, if any.
        over: Option<String>,
        /// The lowest value.
        from: f64,
        /// The highest value.
        to: f64,
    },
    /// The quantity agrees with the published one. Only the paper's networks and data count.
    Published {
        /// The quantity.
        of: Quantity,
        /// The method.
        method: String,
        /// The largest allowed difference.
        within: f64,
    },
    /// A quantity of the first pruning lies between two values, for each network.
    ///
    /// The first pruning is PfQ with bias correction right after pre-training. Each pre-trained
    /// network gives one value.
    FirstPruning {
        /// The quantity.
        of: PruningQuantity,
        /// The lowest value.
        from: f64,
        /// The highest value.
        to: f64,
    },
}

/// A quantity of a pruning.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum PruningQuantity {
    /// The percentage of the filters below the threshold that are in depthwise layers.
    LowInDepthwise,
    /// The change in accuracy by pruning, in percentage points, without any training.
    Top1Change,
}

/// The result of the paper's own figures on a claim.
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum PaperSays {
    /// The figures agree with the claim in every comparison.
    #[default]
    Agrees,
    /// The figures contradict the claim in at least one comparison.
    Contradicts,
    /// The paper publishes no figures on the claim.
    Silent,
}

/// One comparison of a claim, with its own verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The network and its bit widths, as "MobileNetV2 A4/W4".
    pub cell: String,
    /// The compared quantity, as "Ours − DFQ + fine-tune".
    pub what: String,
    /// The mean over our seeds; `None` if nothing has been run.
    pub estimate: Option<Estimate>,
    /// The range in which the claim expects the mean.
    pub range: Range,
    /// The value from the paper's figures.
    pub paper: Option<f64>,
    /// The number of pre-trained networks behind the values, if the stages tell it. Seeds that
    /// share a pre-trained network say nothing about other networks.
    pub networks: Option<usize>,
    /// The p-value of the test, corrected for the number of the claim's comparisons; `None` if
    /// there is no p-value ([`Estimate::p_value`]).
    pub p_value: Option<f64>,
    /// The number of values that would decide an undecided comparison if mean and spread stay as
    /// they are; `None` if there is only one value or if too many values are needed
    /// ([`Estimate::needed`]).
    pub needed: Option<usize>,
    /// The verdict from our values.
    pub verdict: Verdict,
}

/// The values of one comparison by seed, and the range in which the claim expects their mean.
struct Sample {
    cell: String,
    models: Vec<String>,
    what: String,
    range: Range,
    values: BTreeMap<u64, f64>,
}

/// A network at certain bit widths.
#[derive(Clone, Copy, PartialEq)]
struct Condition<'a> {
    model: &'a str,
    activation_bits: u32,
    weight_bits: u32,
}

impl Condition<'_> {
    /// Returns the bit widths, as "a4w4".
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

/// A source of values for the evaluation of a claim.
trait Values {
    /// Returns a quantity of a method in a cell, by seed.
    ///
    /// A quantity that the pre-trained network determines, such as the share of pruned weights, is
    /// given by the pre-training's seed. If `absolute`, only the paper's networks and data count.
    fn get(&self, cell: Condition, method: &str, of: Quantity, absolute: bool) -> BTreeMap<u64, f64>;

    /// Returns a quantity of the first pruning of a network, by the seed of the pre-training.
    fn first_pruning(&self, model: &str, of: PruningQuantity) -> BTreeMap<u64, f64>;
}

/// Our results.
struct Ours<'a> {
    rows: Vec<Row>,
    stages: Vec<Traced<'a>>,
}

impl Ours<'_> {
    /// Maps the seed of each stage of a network to the seed of its pre-training. A seed that only a
    /// pre-training has is mapped to itself.
    fn pre_trainings(&self, model: &str) -> BTreeMap<u64, u64> {
        let of_model = || self.stages.iter().filter(|of| of.origin.model() == Some(model));
        let (origins, later): (Vec<&Traced>, Vec<&Traced>) =
            of_model().partition(|of| of.stage.key == of.origin.key);
        let seeds = |of: &&Traced| of.stage.seed().zip(of.origin.seed());
        origins.iter().chain(&later).filter_map(seeds).collect()
    }

    /// Returns the number of pre-trained networks behind the values, the smallest of all models.
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
                && stage.prunes_as_published()
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
                    // If no filter is below the threshold, there is no share.
                    (low(false) > 0).then(|| 100.0 * low(true) as f64 / low(false) as f64)?
                }
            };
            Some((origin.seed()?, value))
        };
        self.stages.iter().filter_map(first).collect()
    }
}

/// The paper's figures of one table, treated as one seed.
struct Published<'a>(&'a str);

impl Values for Published<'_> {
    fn get(&self, cell: Condition, method: &str, of: Quantity, _: bool) -> BTreeMap<u64, f64> {
        let paper = Paper::published();
        let row = paper.lookup(self.0, cell.model, cell.activation_bits, cell.weight_bits, method);
        let value = row.and_then(|row| match of {
            Quantity::Top1 => Some(row.top1_percent),
            Quantity::Macs => Some(row.mac_millions),
            // The paper has one share for each network. Methods that need all of its
            // multiply–accumulates, of which some tables cut the decimals off, prune nothing.
            Quantity::WeightsPruned => {
                let rows = paper.tables().flat_map(|table| paper.table(table));
                let of_it = rows.filter(|of| of.model == row.model && of.dataset == row.dataset);
                let whole = of_it.map(|of| of.mac_millions).fold(0.0, f64::max);
                let same = |of: &&PaperPruned| of.model == row.model && of.dataset == row.dataset;
                let pruned = paper.pruned_weights().iter().find(same)?.weights_pruned_percent;
                Some(if row.mac_millions < 0.99 * whole { pruned } else { 0.0 })
            }
        });
        value.into_iter().map(|value| (0, value)).collect()
    }

    fn first_pruning(&self, _: &str, _: PruningQuantity) -> BTreeMap<u64, f64> {
        BTreeMap::new()
    }
}

impl Claim {
    /// Reads the claims from a TOML text (`[[claim]]`). `file` is used only in error messages.
    ///
    /// # Errors
    /// Names the entry that has unknown keys or names, or a `paper` that its figures contradict.
    pub fn parse(text: &str, file: &str) -> Result<Vec<Claim>> {
        entries::parse(text, file, "claim")
    }

    /// Judges the claim by our rows of one profile and the stages that produced them. Rows of other
    /// tables are ignored.
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

    /// Returns the reason why the profile's design forces the verdict, if it does.
    pub fn forced(&self, profile: &str) -> Option<&str> {
        why(&self.forced, profile)
    }

    /// Returns the best explanation of why the claim fails in the profile, if there is one.
    pub fn explained(&self, profile: &str) -> Option<&str> {
        why(&self.explained, profile)
    }

    /// Returns the result of the paper's own figures on the claim.
    fn paper_says(&self) -> PaperSays {
        let inside = |of: &Comparison| of.paper.map(|value| of.range.contains(value));
        let published: Vec<bool> = self.judge(&[], &[]).iter().filter_map(inside).collect();
        match published.iter().all(|inside| *inside) {
            _ if published.is_empty() => PaperSays::Silent,
            true => PaperSays::Agrees,
            false => PaperSays::Contradicts,
        }
    }

    /// Returns the unit of the claim's figures, as "points".
    pub fn unit(&self) -> &'static str {
        match &self.expect {
            Expect::Rising { of: Quantity::Macs, .. }
            | Expect::Between { of: Quantity::Macs, .. }
            | Expect::Published { of: Quantity::Macs, .. } => "millions of multiply–accumulates",
            _ if self.signed() => "points",
            _ => "%",
        }
    }

    /// Returns whether the claim's figures are differences, which are shown with a sign.
    pub fn signed(&self) -> bool {
        match &self.expect {
            Expect::Rising { .. } | Expect::LargerGain { .. } => true,
            Expect::Between { over, .. } => over.is_some(),
            Expect::Published { .. } => false,
            Expect::FirstPruning { of, .. } => *of == PruningQuantity::Top1Change,
        }
    }

    /// Returns the values of every comparison. If the claim is pooled, they are means over the
    /// cells, at the seeds that all cells have.
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

    /// Returns the values of each cell. All sources have the same cells in the same order.
    fn samples(&self, values: &dyn Values) -> Vec<Sample> {
        let difference = |cell: Condition, a: &str, b: &str, of: Quantity| {
            differences(&values.get(cell, a, of, false), &values.get(cell, b, of, false))
        };
        let minus = |a: &str, b: &str| format!("{} − {}", method_label(a), method_label(b));
        let cells = self.cells();
        match &self.expect {
            Expect::Rising { of, methods, or_equal, margin } => {
                let pair = |cell: Condition, [low, high]: [&String; 2]| Sample {
                    cell: cell.label(),
                    models: vec![cell.model.into()],
                    what: minus(high, low),
                    range: Range::more_than(-margin, *or_equal),
                    values: difference(cell, high, low, *of),
                };
                let after = |i: usize| methods[i + 1..].iter().map(move |high| [&methods[i], high]);
                let pairs: Vec<[&String; 2]> = (0..methods.len()).flat_map(after).collect();
                cells.iter().flat_map(|cell| pairs.iter().map(|of| pair(*cell, *of))).collect()
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

    /// Returns the cells of the paper's table that the claim is about, in the paper's order.
    fn cells(&self) -> Vec<Condition<'_>> {
        let cells = distinct(self.published().iter().map(Condition::from));
        let about = |cell: &Condition| {
            self.about(cell.model) && (self.bits.is_empty() || self.bits.contains(&cell.bits()))
        };
        cells.into_iter().filter(about).collect()
    }

    /// Returns the rows of the paper's table that the claim is about.
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
