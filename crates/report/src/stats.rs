//! Means over seeds, and differences between methods paired by seed.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::names;
use crate::row::{Row, comparable};

/// Rows that differ only in their seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The paper's table, as "table3".
    pub table: String,
    /// The data.
    pub dataset: String,
    /// The network.
    pub model: String,
    /// What the network's widths are multiplied by.
    pub width: f64,
    /// Bits of the activations.
    pub activation_bits: u32,
    /// Bits of the weights; 32 is float.
    pub weight_bits: u32,
    /// The method, by its name in [`METHODS`](crate::METHODS).
    pub method: String,
    /// How many seeds.
    pub seeds: usize,
    /// Each seed's top-1 accuracy in percent, by ascending seed.
    pub values: Vec<f64>,
    /// The mean of the values.
    pub mean: f64,
    /// The sample standard deviation of the values; none for one seed.
    pub std: Option<f64>,
    /// Mean multiply-accumulates of one image.
    pub macs: f64,
    /// Mean percent of the weights that pruning removed.
    pub weights_pruned_percent: f64,
    /// Mean top-1 accuracy, in percent, of the float networks that the runs began from.
    pub float_top1_percent: f64,
    /// The paper's accuracy.
    pub paper_top1_percent: Option<f64>,
    /// The paper's millions of multiply-accumulates.
    pub paper_mac_millions: Option<f64>,
    /// The mean less the paper's accuracy, in points.
    pub top1_minus_paper: Option<f64>,
}

impl Summary {
    /// Whether the runs are on the paper's data with the paper's network.
    pub fn comparable(&self) -> bool {
        comparable(&self.table, &self.dataset, self.width)
    }

    /// What the methods under comparison have in common.
    pub(crate) fn group(&self) -> (&str, &str, &str, f64, u32, u32) {
        (&self.table, &self.dataset, &self.model, self.width, self.activation_bits, self.weight_bits)
    }
}

/// Summarizes over seeds, in the order of the paper's tables: networks by name, more bits first, the proposed
/// method last. Of several rows with the same seed the last one counts.
pub fn summarize(rows: &[Row]) -> Vec<Summary> {
    let mut groups: BTreeMap<_, BTreeMap<u64, &Row>> = BTreeMap::new();
    for row in rows {
        let key = (
            (&row.table, &row.dataset, &row.model, Reverse(row.width.to_bits())),
            (Reverse(row.activation_bits), Reverse(row.weight_bits), names::rank(&row.method), &row.method),
        );
        groups.entry(key).or_default().insert(row.seed, row);
    }
    groups.into_values().map(|seeds| summary(&seeds.into_values().collect::<Vec<_>>())).collect()
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

/// The accuracy of one method less that of another, over the seeds that both have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paired {
    /// How many seeds both have.
    pub pairs: usize,
    /// The mean difference in points.
    pub mean: f64,
    /// The 95 % confidence interval of the mean difference by Student's t; none for one pair.
    pub interval: Option<(f64, f64)>,
}

impl Paired {
    /// Whether the interval leaves out zero, so that the sign is certain at 95 %.
    pub fn certain(&self) -> bool {
        self.interval.is_some_and(|(low, high)| low > 0.0 || high < 0.0)
    }
}

/// `method_a` less `method_b` over the seeds that both have in `rows`, which should be of one table, width
/// and data; none where they share no seed. Of several rows with the same seed the last one counts.
pub fn paired(
    rows: &[Row],
    model: &str,
    activation_bits: u32,
    weight_bits: u32,
    method_a: &str,
    method_b: &str,
) -> Option<Paired> {
    let of = |method: &str| {
        let wanted = (model, activation_bits, weight_bits, method);
        let key = |row: &&Row| wanted == (&row.model, row.activation_bits, row.weight_bits, &row.method);
        rows.iter().filter(key).map(|row| (row.seed, row.top1_percent)).collect::<BTreeMap<_, _>>()
    };
    let (a, b) = (of(method_a), of(method_b));
    let differences: Vec<f64> = a.iter().filter_map(|(seed, a)| b.get(seed).map(|b| a - b)).collect();
    if differences.is_empty() {
        return None;
    }
    let (pairs, mean) = (differences.len(), average(&differences));
    let interval = deviation(&differences).map(|deviation| {
        let half = student_t(pairs - 1) * deviation / (pairs as f64).sqrt();
        (mean - half, mean + half)
    });
    Some(Paired { pairs, mean, interval })
}

fn average(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The sample standard deviation; none for one value.
fn deviation(values: &[f64]) -> Option<f64> {
    let mean = average(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// The 97.5 % quantile of Student's t distribution with `freedom` degrees of freedom, at least 1: from the
/// usual table up to 10, beyond by the Cornish-Fisher expansion, which is right to three decimals there.
pub(crate) fn student_t(freedom: usize) -> f64 {
    const TABLE: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    let (z, n) = (1.959_964_f64, freedom as f64);
    TABLE.get(freedom - 1).copied().unwrap_or_else(|| {
        z + (z.powi(3) + z) / (4.0 * n)
            + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * n.powi(2))
            + (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / (384.0 * n.powi(3))
    })
}

#[cfg(test)]
mod tests {
    use super::student_t;

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
