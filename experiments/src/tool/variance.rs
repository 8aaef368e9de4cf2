use super::network::NetworkFile;
use super::text::{short, table};
use super::values;
use anyhow::{Result, bail};
use clap::Args;
use report::bench::Spread;
use report::histogram::{self, Caption, Variances};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Shows the running variances of every layer, and how many filters are below τ
#[derive(Debug, Args)]
#[command(after_help = "Example: pfq variance mobilenet_v2.pth --plot variances.svg --csv variances.csv")]
pub(super) struct Variance {
    #[command(flatten)]
    network: NetworkFile,

    /// Count filters whose running variance is below this as low; the ε of batch normalization if
    /// not given
    #[arg(long, value_name = "τ", value_parser = values::threshold)]
    threshold: Option<f64>,

    /// Draw the histogram of every layer, as FILE.svg and FILE.png
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Write the running variance of every filter to this file (.csv)
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

/// A filter, which is a line of the CSV file.
#[derive(Serialize)]
struct FilterRow<'a> {
    layer: &'a str,
    filter: usize,
    running_variance: f32,
    below_threshold: bool,
}

impl Variance {
    pub fn run(&self) -> Result<String> {
        let pictures = self.plot.as_deref().map(pictures);
        let csv = self.csv.iter().map(|path| (path.as_path(), "csv"));
        let drawn = pictures.iter().flat_map(|[svg, png]| [(svg.as_path(), "svg"), (png.as_path(), "png")]);
        let (network, line) = self.network.open_for(&csv.chain(drawn).collect::<Vec<_>>())?;
        let threshold = self.threshold.unwrap_or(network.epsilon);
        let layers: Vec<Variances> = pfq::variances(&network)?
            .into_iter()
            .map(|(layer, values)| Variances { layer, values })
            .collect();
        if layers.is_empty() {
            bail!(
                "{}: expected batch normalization, but all of it has been folded",
                self.network.file.display()
            );
        }
        let rows: Vec<Vec<String>> = layers.iter().map(|layer| row(layer, threshold)).collect();
        let low: usize = layers.iter().map(|layer| layer.low(threshold)).sum();
        let filters: usize = layers.iter().map(|layer| layer.values.len()).sum();
        let mut text = line;
        text += &table(&["layer", "filters", "below τ", "lowest", "median", "highest"], &rows);
        let tau = report::shortest(threshold);
        text += &format!("{low} of {filters} filters have a running variance below τ = {tau}\n");
        if let Some(path) = &self.csv {
            let filters = |layer: &'_ Variances| -> Vec<(usize, f32)> {
                layer.values.iter().copied().enumerate().collect()
            };
            let rows: Vec<FilterRow> = layers
                .iter()
                .flat_map(|layer| filters(layer).into_iter().map(move |filter| (layer, filter)))
                .map(|(layer, (filter, running_variance))| FilterRow {
                    layer: &layer.layer,
                    filter,
                    running_variance,
                    below_threshold: f64::from(running_variance) < threshold,
                })
                .collect();
            histogram::write_rows(&rows, path)?;
            text += &format!("written to {}\n", path.display());
        }
        if let Some([svg, png]) = &pictures {
            let file = self.network.file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            let caption = Caption {
                title: format!("Running variances of {file}"),
                subtitle: format!("{}, {}", network.name, report::counted(network.classes(), "class")),
                threshold,
            };
            histogram::plot_variances(&layers, &caption, svg, png)?;
            text += &format!("drawn in {} and {}\n", svg.display(), png.display());
        }
        Ok(text)
    }
}

/// Returns FILE.svg and FILE.png, also if FILE is already one of them. Any other dot is a part of
/// the name.
fn pictures(file: &Path) -> [PathBuf; 2] {
    let given = file.extension().is_some_and(|given| given == "svg" || given == "png");
    let stem = if given { file.with_extension("") } else { file.into() };
    ["svg", "png"].map(|extension| {
        let mut name = stem.clone().into_os_string();
        name.push(".");
        name.push(extension);
        name.into()
    })
}

fn row(layer: &Variances, threshold: f64) -> Vec<String> {
    let spread = Spread::of(layer.values.iter().map(|value| f64::from(*value)));
    let shown = |of: fn(Spread) -> f64| spread.map_or(String::new(), |spread| short(of(spread) as f32));
    vec![
        layer.layer.clone(),
        layer.values.len().to_string(),
        match layer.low(threshold) {
            0 => String::new(),
            low => low.to_string(),
        },
        shown(|spread| spread.min),
        shown(|spread| spread.median),
        shown(|spread| spread.max),
    ]
}
