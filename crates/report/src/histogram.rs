//! Histograms of the outputs of single filters (the paper's Figure 3) and of the running variances
//! of every layer.

mod outputs;
mod variances;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::file::Result;
use crate::names::{dataset_label, model_label};
use crate::row::write_table;

/// A histogram with bins of equal width.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// The lower end of the first bin.
    pub low: f64,
    /// The upper end of the last bin.
    pub high: f64,
    /// The number of values in each bin, ascending.
    pub counts: Vec<u64>,
    /// The mean of all values.
    pub mean: f64,
    /// The standard deviation of all values (divided by their number).
    pub deviation: f64,
}

impl Histogram {
    /// Counts `values` in `bins` bins from `low` to `high`. A value outside counts in the outermost
    /// bin of its side.
    ///
    /// # Panics
    ///
    /// If `bins` is 0, or `low < high` does not hold.
    pub fn of(values: &[f32], (low, high): (f64, f64), bins: usize) -> Histogram {
        assert!(bins > 0 && low < high, "{bins} bins from {low} to {high}");
        let mut counts = vec![0; bins];
        for &value in values {
            let place = (f64::from(value) - low) / (high - low) * bins as f64;
            counts[(place.max(0.0) as usize).min(bins - 1)] += 1;
        }
        let count = values.len().max(1) as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let squares = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
        Histogram { low, high, counts, mean, deviation: (squares / count).sqrt() }
    }

    /// Returns the lower and the upper end of bin `i`.
    pub fn bin(&self, i: usize) -> (f64, f64) {
        let wide = (self.high - self.low) / self.counts.len() as f64;
        (self.low + wide * i as f64, self.low + wide * (i + 1) as f64)
    }

    /// Returns the share of the values in each bin, in percent.
    pub fn shares(&self) -> Vec<f64> {
        let all = self.counts.iter().sum::<u64>().max(1) as f64;
        self.counts.iter().map(|&n| 100.0 * n as f64 / all).collect()
    }
}

/// The outputs of one filter for a batch of images.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterOutputs {
    /// The layer's name.
    pub layer: String,
    /// The filter's index in the layer, from 0.
    pub filter: usize,
    /// The rule by which the filter was chosen, e.g. "lowest running variance".
    pub rule: String,
    /// The filter's running variance V.
    pub variance: f64,
    /// The output of the convolution.
    pub convolution: Histogram,
    /// The output after normalization and activation.
    pub activation: Histogram,
}

/// The running variances of one layer's filters.
#[derive(Clone, Debug, PartialEq)]
pub struct Variances {
    /// The layer's name. The part after its last dot is the kind of the layer, and the part before
    /// it the block.
    pub layer: String,
    /// The running variance of each filter.
    pub values: Vec<f32>,
}

impl Variances {
    /// Returns the number of filters whose variance is below `threshold`.
    pub fn low(&self, threshold: f64) -> usize {
        self.values.iter().filter(|&&v| f64::from(v) < threshold).count()
    }
}

/// The texts of a picture of histograms, and its threshold.
#[derive(Clone, Debug, PartialEq)]
pub struct Caption {
    /// The heading.
    pub title: String,
    /// The source of the data.
    pub subtitle: String,
    /// The threshold τ of running variances.
    pub threshold: f64,
}

impl Caption {
    /// Returns the caption of a picture of a network.
    ///
    /// `what` says what the picture shows; then follow the network's name and width, the data set's
    /// name, and further facts.
    pub fn of_network(
        what: &str,
        (model, width): (&str, f64),
        dataset: &str,
        more: &[&str],
        threshold: f64,
    ) -> Caption {
        let facts: Vec<&str> = std::iter::once(dataset_label(dataset)).chain(more.iter().copied()).collect();
        Caption {
            title: format!("{}: {what}", model_label(model, width)),
            subtitle: facts.join("  ·  "),
            threshold,
        }
    }
}

/// Draws the outputs of filters, one column per filter, as SVG and as PNG (2400×1440).
///
/// The upper histogram is the output of the convolution, the lower one the output after
/// normalization and activation. Adjacent columns of one layer have the same horizontal scale if
/// their histograms have the same range.
pub fn plot_outputs(filters: &[FilterOutputs], caption: &Caption, svg: &Path, png: &Path) -> Result<()> {
    outputs::plot(filters, caption, svg, png)
}

/// Draws the running variances of every layer as histograms, as SVG and as PNG (2400×1440, or
/// higher if the legend has more than one line).
///
/// The scale is logarithmic, and τ is marked.
pub fn plot_variances(layers: &[Variances], caption: &Caption, svg: &Path, png: &Path) -> Result<()> {
    variances::plot(layers, caption, svg, png)
}

/// A bin of a filter's outputs: one line of `outputs.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputRow {
    /// The network.
    pub model: String,
    /// The layer.
    pub layer: String,
    /// The filter's index in the layer, from 0.
    pub filter: usize,
    /// The rule by which the filter was chosen.
    pub rule: String,
    /// The filter's running variance.
    pub running_variance: f64,
    /// Whether the running variance is below τ.
    pub below_threshold: bool,
    /// `convolution`, or `activation` for the output after normalization and activation.
    pub output: String,
    /// The mean of the output.
    pub mean: f64,
    /// The standard deviation of the output.
    pub deviation: f64,
    /// The lower end of the bin.
    pub bin_from: f64,
    /// The upper end of the bin.
    pub bin_to: f64,
    /// The number of values in the bin.
    pub count: u64,
    /// The share of all values in percent.
    pub share_percent: f64,
}

impl OutputRow {
    /// Returns the rows of a network's filters.
    pub fn all(model: &str, filters: &[FilterOutputs], threshold: f64) -> Vec<OutputRow> {
        let mut rows = Vec::new();
        for filter in filters {
            for (output, histogram) in
                [("convolution", &filter.convolution), ("activation", &filter.activation)]
            {
                for (i, share_percent) in histogram.shares().into_iter().enumerate() {
                    let (bin_from, bin_to) = histogram.bin(i);
                    rows.push(OutputRow {
                        model: model.into(),
                        layer: filter.layer.clone(),
                        filter: filter.filter,
                        rule: filter.rule.clone(),
                        running_variance: filter.variance,
                        below_threshold: filter.variance < threshold,
                        output: output.into(),
                        mean: histogram.mean,
                        deviation: histogram.deviation,
                        bin_from,
                        bin_to,
                        count: histogram.counts[i],
                        share_percent,
                    });
                }
            }
        }
        rows
    }
}

/// A bin of a layer's running variances: one line of `variances.csv`. Empty bins are left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VarianceRow {
    /// The network.
    pub model: String,
    /// The layer.
    pub layer: String,
    /// The lower end of the bin; 0 for the lowest bin, which counts all lower values too.
    pub bin_from: f64,
    /// The upper end of the bin.
    pub bin_to: f64,
    /// Whether the bin is below τ, which is always a border between two bins.
    pub below_threshold: bool,
    /// The number of filters in the bin.
    pub filters: usize,
}

impl VarianceRow {
    /// Returns the rows of a network's layers.
    pub fn all(model: &str, layers: &[Variances], threshold: f64) -> Vec<VarianceRow> {
        let mut rows = Vec::new();
        for layer in layers {
            for (bin, filters) in variances::bins(&layer.values, threshold) {
                let edge = |bin: i32| variances::edge(bin, threshold);
                rows.push(VarianceRow {
                    model: model.into(),
                    layer: layer.layer.clone(),
                    bin_from: if bin == variances::LOWEST { 0.0 } else { edge(bin) },
                    bin_to: edge(bin + 1),
                    below_threshold: bin < 0,
                    filters,
                });
            }
        }
        rows
    }
}

/// Writes rows of [`OutputRow`] or [`VarianceRow`] as CSV atomically.
pub fn write_rows<T: Serialize>(rows: &[T], path: &Path) -> Result<()> {
    write_table(rows, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_into_their_bins() {
        let h = Histogram::of(&[-1.0, 0.0, 0.49, 0.5, 1.0, 9.0], (0.0, 1.0), 2);
        assert_eq!(h.counts, [3, 3]);
        assert_eq!(h.bin(1), (0.5, 1.0));
        assert_eq!(h.shares(), [50.0, 50.0]);
        let h = Histogram::of(&[1.0, 3.0], (0.0, 4.0), 4);
        assert_eq!((h.mean, h.deviation), (2.0, 1.0));
        assert_eq!(Histogram::of(&[], (0.0, 1.0), 2).shares(), [0.0, 0.0]);
    }

    #[test]
    fn variances_are_split_at_the_threshold() {
        let layer = Variances { layer: "a.b".into(), values: vec![0.0, 9.99e-6, 1e-5, 1.01e-5, 3.0] };
        // As f32, 1e-5 is just below the f64 threshold. Both `low` and the bins count it as below.
        assert_eq!(layer.low(1e-5), 3);
        let rows = VarianceRow::all("m", &[layer], 1e-5);
        assert_eq!(rows.iter().filter(|r| r.below_threshold).map(|r| r.filters).sum::<usize>(), 3);
        assert_eq!(rows.iter().map(|r| r.filters).sum::<usize>(), 5);
        assert_eq!(rows[0].bin_from, 0.0);
        for row in &rows {
            assert!(row.bin_from < row.bin_to && (row.bin_to <= 1e-5 * (1.0 + 1e-12)) == row.below_threshold);
        }
    }

    /// Checks that pictures of synthetic filters are written and contain the expected texts.
    #[test]
    fn pictures_say_what_they_show() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let caption = Caption { title: "A title".into(), subtitle: "made-up".into(), threshold: 1.5e-5 };
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let filter = |variance: f64, values: &[f32]| FilterOutputs {
            layer: "blocks.3.depthwise".into(),
            filter: 17,
            rule: "lowest running variance".into(),
            variance,
            convolution: Histogram::of(values, (-1.0, 1.0), 40),
            activation: Histogram::of(values, (0.0, 1.0), 40),
        };
        let filters = [filter(1e-9, &[0.25; 7]), filter(0.3, &values)];
        plot_outputs(&filters, &caption, &path("o.svg"), &path("o.png")).unwrap();
        let layers = ["stem", "blocks.0.depthwise", "blocks.0.project", "last"].map(|name| Variances {
            layer: name.into(),
            values: (0..60).map(|i| 10f32.powf(-7.0 + 0.1 * i as f32)).collect(),
        });
        plot_variances(&layers, &caption, &path("v.svg"), &path("v.png")).unwrap();
        for (name, parts) in [
            (
                "o.svg",
                &["A title", "τ = 1.5e-5", "blocks.3.depthwise", "filter 17", "lowest running variance"][..],
            ),
            ("v.svg", &["A title", "stem", "depthwise", "below τ = 1.5e-5: "][..]),
        ] {
            let text = std::fs::read_to_string(path(name)).unwrap();
            for part in parts {
                assert!(text.contains(part), "{name} lacks {part:?}");
            }
        }
        for name in ["o.png", "v.png"] {
            assert!(std::fs::read(path(name)).unwrap().starts_with(b"\x89PNG"), "{name}");
        }
    }
}
