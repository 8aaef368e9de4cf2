use super::network::NetworkFile;
use super::text::{millions, table};
use super::values;
use anyhow::Result;
use clap::Args;
use models::Extras;
use pfq::{PfQ, Report};
use std::path::PathBuf;

/// Removes filters whose running variance is below τ, keeps their constants, and writes the smaller network
#[derive(Debug, Args)]
#[command(after_help = "Example: pfq prune mobilenet_v2.pth pruned.safetensors --threshold 1e-5\n\n\
                  The written file holds the structure of the network together with the tensors, so every \
                  command can read it. What was removed is stored in its metadata under `pfq`.")]
pub(super) struct Prune {
    #[command(flatten)]
    network: NetworkFile,

    /// Output file for the pruned network (.safetensors)
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Remove filters whose running variance is below this; the ε of batch normalization if not
    /// given
    #[arg(long, value_name = "τ", value_parser = values::threshold)]
    threshold: Option<f64>,

    /// Do not add the constants of the removed filters to the layers that read them ("PfQ w/o bias
    /// correction")
    #[arg(long)]
    no_bias_correction: bool,
}

impl Prune {
    pub fn run(&self) -> Result<String> {
        let out = self.out.display();
        let (network, mut text) = self.network.open_for(&[(&self.out, "safetensors")])?;
        let method =
            PfQ { threshold: self.threshold, bias_correction: !self.no_bias_correction, ..PfQ::default() };
        let (pruned, report) = method.apply(&network)?;
        let mut extras = Extras::default();
        extras.metadata.insert("pfq".into(), serde_json::to_string(&report)?);
        pruned.save_in_one_file(&self.out, &extras)?;
        text += &described(&report, network.epsilon);
        text += &format!("written to {out}\n");
        Ok(text)
    }
}

fn described(report: &Report, epsilon: f64) -> String {
    let concerned = report.layers.iter().filter(|layer| layer.low > 0 || layer.removed > 0);
    let rows: Vec<Vec<String>> = concerned
        .map(|l| vec![l.name.clone(), l.filters.to_string(), l.low.to_string(), l.removed.to_string()])
        .collect();
    let sum = |f: fn(&pfq::LayerReport) -> usize| report.layers.iter().map(f).sum::<usize>();
    let mut text = String::new();
    if !rows.is_empty() {
        text += &table(&["layer", "filters", "below τ", "removed"], &rows);
    }
    text += &format!(
        "{} of {} filters have a running variance below τ = {}; {} removed\n",
        sum(|l| l.low),
        sum(|l| l.filters),
        report::shortest(report.threshold),
        report::counted(sum(|l| l.removed), "filter")
    );
    if report.threshold > epsilon {
        text += &format!(
            "τ is above ε = {}: filters above ε are not constant, so the outputs change\n",
            report::shortest(epsilon)
        );
    }
    let kept = [
        (report.low_in_part, "low in a part of the layers that shortcuts add up"),
        (report.kept_as_last, "low, because a layer must keep one"),
    ];
    for (channels, why) in kept.into_iter().filter(|(channels, _)| *channels > 0) {
        let are = if channels == 1 { "is" } else { "are" };
        text += &format!("{} {are} kept though {why}\n", report::counted(channels, "channel"));
    }
    text + &format!(
        "weights {} → {} M, {:.2} % pruned\nMACs {} → {} M\n",
        millions(report.weights_before),
        millions(report.weights_after),
        report::pruned_percent(report.weights_before, report.weights_after),
        millions(report.macs_before),
        millions(report.macs_after)
    )
}
