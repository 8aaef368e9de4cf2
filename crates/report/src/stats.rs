//! Means over seeds, and differences between methods paired by seed.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Deserialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

use crate::names;
use crate::row::{Row, comparable};
use crate::text::counted;

/// The summary of rows that differ only in their seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The name of the table, as "table3".
    pub table: String,
    /// The name of the data set.
    pub dataset: String,
    /// The network.
    pub model: String,
    /// The factor that multiplies the network's widths.
    pub width: f64,
    /// The bit width of the activations.
    pub activation_bits: u32,
    /// The bit width of the weights; 32 is float.
    pub weight_bits: u32,
    /// The method's name.
    pub method: String,
    /// The number of seeds.
    pub seeds: usize,
    /// The top-1 accuracy of each seed in percent, by ascending seed.
    pub values: Vec<f64>,
    /// The mean of the values.
    pub mean: f64,
    /// The sample standard deviation of the values; `None` for one seed.
    pub std: Option<f64>,
    /// The mean number of multiply-accumulates for one image.
    pub macs: f64,
    /// The mean percentage of the weights that pruning removed.
    pub weights_pruned_percent: f64,
    /// The mean top-1 accuracy, in percent, of the float networks from which the runs started.
    pub float_top1_percent: f64,
    /// The paper's top-1 accuracy in percent.
    pub paper_top1_percent: Option<f64>,
    /// The paper's number of multiply-accumulates, in millions.
    pub paper_mac_millions: Option<f64>,
    /// The mean minus the paper's accuracy, in percentage points.
    pub top1_minus_paper: Option<f64>,
}

impl Summary {
    /// Returns whether the runs use the paper's data and the paper's network width.
    pub fn comparable(&self) -> bool {
        comparable(&self.table, &self.dataset, self.width)
    }

    /// Returns the properties that all methods of a comparison share.
    pub(crate) fn group(&self) -> (&str, &str, &str, f64, u32, u32) {
        (&self.table, &self.dataset, &self.model, self.width, self.activation_bits, self.weight_bits)
    }
}

/// Summarizes rows over seeds, in the order of the paper's tables.
///
/// Networks are sorted by name, and more bits come first. The methods have the order of the paper's
/// table, where the proposed method is the last; methods that are not in it follow in the order of
/// their rows with the same network and bits. If several rows have the same seed, the last one
/// counts.
pub fn summarize(rows: &[Row]) -> Vec<Summary> {
    fn group(row: &Row) -> (&str, &str, &str, Reverse<u64>, Reverse<u32>, Reverse<u32>) {
        let bits = (Reverse(row.activation_bits), Reverse(row.weight_bits));
        (&row.table, &row.dataset, &row.model, Reverse(row.width.to_bits()), bits.0, bits.1)
    }
    let same = |a: &Row, b: &Row| a.method == b.method && group(a) == group(b);
    let first = |of: &Row| rows.iter().position(|row| same(row, of));
    let mut groups: BTreeMap<_, BTreeMap<u64, &Row>> = BTreeMap::new();
    for row in rows {
        let key = (group(row), names::rank(&row.table, &row.method), first(row));
        groups.entry(key).or_default().insert(row.seed, row);
    }
    groups.into_values().map(|seeds| summary(&seeds.into_values().collect::<Vec<_>>())).collect()
}

/// Returns the number of seeds as text, e.g. `1 to 3 seeds`.
pub(crate) fn seeds_label(summaries: &[Summary]) -> String {
    let counts = || summaries.iter().map(|summary| summary.seeds);
    match (counts().min().unwrap_or(0), counts().max().unwrap_or(0)) {
        (least, most) if least == most => counted(most, "seed"),
        (least, most) => format!("{least} to {most} seeds"),
    }
}

fn summary(rows: &[&Row]) -> Summary {
    let all = |value: fn(&Row) -> f64| rows.iter().map(|row| value(row)).collect::<Vec<_>>();
    let values = all(|row| row.top1_percent);
    let mean = average(&values);
    let paper_top1_percent = rows.iter().find_map(|row| row.paper_top1_percent);
    let first = rows[0];
    Summary {
        table: first.table.clone(),
        dataset: first.dataset.clone(),
        model: first.model.clone(),
        width: first.width,
        activation_bits: first.activation_bits,
        weight_bits: first.weight_bits,
        method: first.method.clone(),
        seeds: values.len(),
        mean,
        std: deviation(&values),
        values,
        macs: average(&all(|row| row.macs as f64)),
        weights_pruned_percent: average(&all(|row| row.weights_pruned_percent)),
        float_top1_percent: average(&all(|row| row.float_top1_percent)),
        paper_top1_percent,
        paper_mac_millions: rows.iter().find_map(|row| row.paper_mac_millions),
        top1_minus_paper: paper_top1_percent.map(|theirs| mean - theirs),
    }
}

/// A quantity of a row that can be compared.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Top-1 accuracy in percent. Differences are in percentage points.
    Top1,
    /// The number of multiply-accumulates for one image, in millions.
    Macs,
    /// The percentage of the weights that pruning removed. Differences are in percentage points.
    WeightsPruned,
}

impl Quantity {
    /// Returns the quantity of a row.
    pub fn of(self, row: &Row) -> f64 {
        match self {
            Self::Top1 => row.top1_percent,
            Self::Macs => row.macs as f64 / 1e6,
            Self::WeightsPruned => row.weights_pruned_percent,
        }
    }
}

/// Returns a quantity by seed, for one method, network and bit widths.
///
/// `rows` should have the same table, width and data set. If several rows have the same seed, the
/// last one counts.
pub fn by_seed(
    rows: &[Row],
    model: &str,
    activation_bits: u32,
    weight_bits: u32,
    method: &str,
    quantity: Quantity,
) -> BTreeMap<u64, f64> {
    let wanted = (model, activation_bits, weight_bits, method);
    let key = |row: &&Row| wanted == (&row.model, row.activation_bits, row.weight_bits, &row.method);
    rows.iter().filter(key).map(|row| (row.seed, quantity.of(row))).collect()
}

/// Returns `a` minus `b` at the seeds that both have, by ascending seed.
pub fn differences(a: &BTreeMap<u64, f64>, b: &BTreeMap<u64, f64>) -> BTreeMap<u64, f64> {
    a.iter().filter_map(|(seed, a)| Some((*seed, a - b.get(seed)?))).collect()
}

/// The mean of some values, one per seed, with its uncertainty.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The number of values.
    pub count: usize,
    /// The mean of the values.
    pub mean: f64,
    /// The standard error of the mean; `None` for one value.
    pub error: Option<f64>,
    /// The 95 % confidence interval of the mean by Student's t; `None` for one value.
    pub interval: Option<(f64, f64)>,
}

impl Estimate {
    /// Estimates the mean of some values; `None` if there are no values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        if values.is_empty() {
            return None;
        }
        let (count, mean) = (values.len(), average(&values));
        let error = deviation(&values).map(|deviation| deviation / (count as f64).sqrt());
        let interval = error.map(|error| {
            let half = student_t(count - 1) * error;
            (mean - half, mean + half)
        });
        Some(Self { count, mean, error, interval })
    }

    /// Returns the estimate of the values with the opposite sign.
    pub fn negated(self) -> Self {
        Self { mean: -self.mean, interval: self.interval.map(|(from, to)| (-to, -from)), ..self }
    }

    /// Returns the two-sided p-value of Student's t test that the true mean is at the nearest end
    /// of the range.
    ///
    /// The smaller it is, the more certain is the side of this end on which the mean lies. `None`
    /// for one value, or if the estimate is not finite.
    pub fn p_value(&self, range: Range) -> Option<f64> {
        let (error, distance) = (self.error?, range.distance(self.mean));
        if error == 0.0 {
            // All values are equal, so they lie on one side of the end, or on it.
            return Some(0.0);
        }
        let t = distance / error;
        t.is_finite().then(|| 2.0 * student(self.count - 1).sf(t))
    }

    /// Returns the number of values at which the estimated mean would be decided.
    ///
    /// The mean is decided if it lies on one side of the range's nearest end with a significance of
    /// `level`. Mean and spread are assumed to stay as they are. `None` for one value, or if more
    /// than `MOST_NEEDED` values are needed.
    pub fn needed(&self, range: Range, level: f64) -> Option<usize> {
        let deviation = self.error? * (self.count as f64).sqrt();
        let distance = range.distance(self.mean);
        let decides = |count: &usize| {
            let t = student(count - 1).inverse_cdf(1.0 - level / 2.0);
            t * deviation < distance * (*count as f64).sqrt()
        };
        (2..=MOST_NEEDED).find(decides)
    }
}

/// The largest number of values that [`Estimate::needed`] considers.
pub const MOST_NEEDED: usize = 1000;

/// Corrects p-values for the number of comparisons that are judged together (Holm 1979, step-down).
///
/// The probability of any wrong decision is at most the level at which each is judged.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    let (mut adjusted, mut largest) = (vec![0.0; p_values.len()], 0.0f64);
    for (rank, index) in order.into_iter().enumerate() {
        largest = largest.max(p_values[index] * (p_values.len() - rank) as f64).min(1.0);
        adjusted[index] = largest;
    }
    adjusted
}

/// A range in which a statement says that a mean lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// The lowest value.
    pub from: f64,
    /// The highest value.
    pub to: f64,
    /// Whether `from` itself is excluded.
    pub above: bool,
}

impl Range {
    /// The range of values above zero.
    pub const POSITIVE: Self = Self { from: 0.0, to: f64::INFINITY, above: true };
    /// Returns the range above a value, which includes the value itself if `or_equal`.
    pub fn more_than(from: f64, or_equal: bool) -> Self {
        Self { from, above: !or_equal, ..Self::POSITIVE }
    }

    /// Returns the range between two values, including both.
    pub fn between(from: f64, to: f64) -> Self {
        Self { from, to, above: false }
    }

    fn below(&self, value: f64) -> bool {
        value < self.from || (self.above && value == self.from)
    }

    /// Returns whether a value lies in the range.
    pub fn contains(&self, value: f64) -> bool {
        !self.below(value) && value <= self.to
    }

    /// Returns the distance of a value from the nearest end of the range.
    fn distance(&self, value: f64) -> f64 {
        (value - self.from).abs().min((value - self.to).abs())
    }
}

/// The significance level of every verdict.
pub const LEVEL: f64 = 0.05;

/// The result of the seeds that were run on a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The mean is significantly where the statement says.
    Holds,
    /// The mean is significantly elsewhere.
    Fails,
    /// Neither side is significant, or there is only one seed.
    NotDecided,
    /// Nothing has been run, or a part of the needed runs is missing.
    NotRun,
}

impl Verdict {
    /// Returns the verdict on the statement that the estimated mean lies in the range.
    ///
    /// `p_value` is that of [`Estimate::p_value`], or its correction by [`holm`]. Without the
    /// correction, a mean is decided if its 95 % interval is all inside or outside the range.
    pub fn of(estimate: Option<Estimate>, range: Range, p_value: Option<f64>) -> Self {
        match (estimate, p_value) {
            (None, _) => Self::NotRun,
            (Some(of), Some(p)) if p < LEVEL && range.contains(of.mean) => Self::Holds,
            (Some(_), Some(p)) if p < LEVEL => Self::Fails,
            _ => Self::NotDecided,
        }
    }

    /// Returns the verdict on a statement with several comparisons, all of which must hold.
    ///
    /// It fails if one comparison fails. Otherwise it is not run if a comparison is missing.
    pub fn all(verdicts: &[Verdict]) -> Self {
        let by_weight = [Self::Fails, Self::NotRun, Self::NotDecided];
        let found = by_weight.into_iter().find(|verdict| verdicts.contains(verdict));
        found.unwrap_or(if verdicts.is_empty() { Self::NotRun } else { Self::Holds })
    }

    /// Returns the verdict in words.
    pub fn label(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Fails => "fails",
            Self::NotDecided => "not decided",
            Self::NotRun => "not run",
        }
    }
}

/// Estimates the accuracy of `method_a` minus that of `method_b`, over the seeds that both have.
///
/// `rows` should have the same table, width and data set. `None` if the methods share no seed.
pub fn paired(
    rows: &[Row],
    model: &str,
    activation_bits: u32,
    weight_bits: u32,
    method_a: &str,
    method_b: &str,
) -> Option<Estimate> {
    let of = |method| by_seed(rows, model, activation_bits, weight_bits, method, Quantity::Top1);
    Estimate::of(differences(&of(method_a), &of(method_b)).into_values())
}

fn average(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Returns the sample standard deviation; `None` for one value.
fn deviation(values: &[f64]) -> Option<f64> {
    let mean = average(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// Returns Student's t distribution with `freedom` degrees of freedom, at least 1.
fn student(freedom: usize) -> StudentsT {
    StudentsT::new(0.0, 1.0, freedom as f64).expect("degrees of freedom are positive")
}

/// Returns the 97.5 % quantile of Student's t, rounded to the three decimals of printed tables.
///
/// The results that are stored with the code were computed with these rounded quantiles.
fn student_t(freedom: usize) -> f64 {
    (1000.0 * student(freedom).inverse_cdf(0.975)).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::{Estimate, LEVEL, Range, Verdict, holm, student_t};

    #[test]
    fn verdicts_follow_from_the_interval() {
        fn check(values: &[f64], range: Range, expect: Verdict) {
            let estimate = Estimate::of(values.iter().copied());
            let p_value = estimate.and_then(|of| of.p_value(range));
            assert_eq!(Verdict::of(estimate, range, p_value), expect, "{values:?} {range:?}");
        }
        // The mean is 2 and the deviation 1: 2 ± 4.303 / √3 = −0.48 … 4.48.
        check(&[1.0, 2.0, 3.0], Range::POSITIVE, Verdict::NotDecided);
        check(&[1.0, 2.0, 3.0], Range::between(-0.5, 4.5), Verdict::Holds);
        check(&[1.0, 2.0, 3.0], Range::between(-0.4, 4.5), Verdict::NotDecided);
        check(&[1.0, 2.0, 3.0], Range::between(-9.0, 4.4), Verdict::NotDecided);
        check(&[1.0, 2.0, 3.0], Range::between(4.5, 9.0), Verdict::Fails);
        check(&[1.0, 2.0, 3.0], Range::between(-9.0, -0.5), Verdict::Fails);
        // The mean is 2 and the deviation 0.1: 2 ± 0.25.
        check(&[1.9, 2.0, 2.1], Range::POSITIVE, Verdict::Holds);
        check(&[-1.9, -2.0, -2.1], Range::POSITIVE, Verdict::Fails);
        // All values are zero, so "more than zero" fails and "zero or more" holds.
        check(&[0.0, 0.0], Range::POSITIVE, Verdict::Fails);
        check(&[0.0, 0.0], Range::more_than(0.0, true), Verdict::Holds);
        // One seed decides nothing, however large the difference is.
        check(&[50.0], Range::POSITIVE, Verdict::NotDecided);
        check(&[f64::NAN, 1.0], Range::POSITIVE, Verdict::NotDecided);
        check(&[], Range::POSITIVE, Verdict::NotRun);
    }

    /// The p-values are those of SciPy's `ttest_1samp`. The numbers of values are computed by hand
    /// with the quantiles of printed tables.
    #[test]
    fn p_values_are_those_of_a_t_test() {
        let near = |found: f64, expect: f64| assert!((found - expect).abs() < 1e-6, "{found}, not {expect}");
        let of = |values: &[f64], range| Estimate::of(values.iter().copied()).unwrap().p_value(range);
        // t = 2 / (1 / √3), with 2 degrees of freedom.
        near(of(&[1.0, 2.0, 3.0], Range::POSITIVE).unwrap(), 0.0741799);
        near(of(&[-1.0, -2.0, -3.0], Range::POSITIVE).unwrap(), 0.0741799);
        // The nearest end counts: t = 1 / (1 / √3).
        near(of(&[1.0, 2.0, 3.0], Range::between(-9.0, 3.0)).unwrap(), 0.2254033);
        assert_eq!(of(&[5.0], Range::POSITIVE), None);
        assert_eq!(of(&[5.0, 5.0], Range::POSITIVE), Some(0.0));
        assert_eq!(of(&[f64::NAN, 5.0], Range::POSITIVE), None);

        let needed = |values: &[f64], level| {
            Estimate::of(values.iter().copied()).unwrap().needed(Range::POSITIVE, level)
        };
        // The deviation is 1 and the mean 2: 3.182 / √4 = 1.59 < 2 ≤ 4.303 / √3 = 2.48.
        assert_eq!(needed(&[1.0, 2.0, 3.0], LEVEL), Some(4));
        // At 1 %: 4.604 / √5 = 2.06, 4.032 / √6 = 1.65.
        assert_eq!(needed(&[1.0, 2.0, 3.0], 0.01), Some(6));
        assert_eq!(needed(&[-1.0, 1.001], LEVEL), None);
        assert_eq!(needed(&[1.0], LEVEL), None);
    }

    /// The values are computed by hand and equal those of R's `p.adjust(p, "holm")`.
    #[test]
    fn p_values_are_corrected_for_their_number() {
        assert_eq!(holm(&[0.01, 0.04, 0.03]), [0.03, 0.06, 0.06]);
        assert_eq!(holm(&[0.5, 0.9]), [1.0, 1.0]);
        assert_eq!(holm(&[0.02]), [0.02]);
        assert_eq!(holm(&[]), [0.0; 0]);
    }

    #[test]
    fn every_comparison_of_a_statement_must_hold() {
        use Verdict::{Fails, Holds, NotDecided, NotRun};
        fn check(of: &[Verdict], expect: Verdict) {
            assert_eq!(Verdict::all(of), expect, "{of:?}");
        }
        check(&[Holds, Holds], Holds);
        check(&[Holds, NotDecided], NotDecided);
        check(&[Holds, NotRun, NotDecided], NotRun);
        check(&[Holds, NotRun, NotDecided, Fails], Fails);
        check(&[], NotRun);
    }

    #[test]
    fn student_t_is_that_of_the_tables() {
        fn check(pairs: usize, expect: f64) {
            let found = student_t(pairs - 1);
            assert!((found - expect).abs() < 6e-4, "{pairs} pairs: {found}");
        }
        check(2, 12.706);
        check(3, 4.303);
        check(5, 2.776);
        check(11, 2.228);
        check(12, 2.201);
        check(31, 2.042);
        check(1001, 1.962);
    }
}
