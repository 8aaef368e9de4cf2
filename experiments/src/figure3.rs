//! Figure 3 of the paper: the outputs of filters with low and with ordinary running variance, and
//! the running variances of every layer.
//!
//! The networks are the pre-trained ones that the tables start from, so they come from the same
//! store.

use crate::flags::Flags;
use crate::pretrained::{self, Drawn, IMAGES, Subject, first_images};
use crate::profile::ModelName;
use crate::session::{self, Done, Session};
use anyhow::{Context as _, Result, bail};
use candle_core::Tensor;
use clap::{CommandFactory, FromArgMatches};
use models::Network;
use report::histogram::{self, FilterOutputs, Histogram, OutputRow, VarianceRow, Variances};

/// The number of bins of a histogram of outputs.
const BINS: usize = 40;

/// Runs the figure's binary: parses the flags, pre-trains missing networks, writes the pictures.
pub fn main() -> Result<()> {
    let about = "Draws Figure 3 of the PfQ paper from the pre-trained networks, which are trained if they \
                 are not in the store: the outputs of filters with low and with ordinary running variance, \
                 and the running variances of every layer";
    let flags = Flags::from_arg_matches(&Flags::command().about(about).get_matches())?;
    let models = pretrained::models(&flags)?;
    session::main(&flags, false, |session| run(&models, session, &flags))
}

/// Pre-trains missing networks and draws the figure.
pub(crate) fn run(models: &[ModelName], session: &mut Session, flags: &Flags) -> Result<Done> {
    pretrained::run("figure3", models, session, flags, draw)
}

/// A filter that the figure shows, and the rule that chose it.
struct Chosen {
    /// The layer, as an index of the network's nodes.
    node: usize,
    filter: usize,
    variance: f64,
    rule: String,
}

/// The filters of a layer, sorted by their running variances.
struct Layer {
    node: usize,
    /// The running variance and the index of each filter.
    sorted: Vec<(f32, usize)>,
    /// The number of filters below the threshold.
    low: usize,
}

/// Chooses the filters to show. Among the depthwise layers, and among all other layers, these are
/// the filter with the lowest running variance, and the filter with the median running variance of
/// those in the same layer that are not below the threshold. Layers without such a filter are taken
/// only if all layers lack one.
fn choose(network: &Network, threshold: f64) -> Result<Vec<Chosen>> {
    let mut chosen = Vec::new();
    for (depthwise, which) in [(true, "depthwise layers"), (false, "other layers")] {
        let mut layers = Vec::new();
        for (node, of) in network.nodes.iter().enumerate() {
            let Some(unit) = of.unit() else { continue };
            let Some(norm) = unit.batch_norm() else { continue };
            if unit.kernel.is_depthwise() != depthwise {
                continue;
            }
            let values = norm.variance.to_vec1::<f32>()?;
            let mut sorted: Vec<(f32, usize)> = values.into_iter().zip(0..).collect();
            sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
            let low = sorted.partition_point(|(variance, _)| f64::from(*variance) < threshold);
            layers.push(Layer { node, sorted, low });
        }
        let all_low = |layer: &Layer| layer.low == layer.sorted.len();
        let lowest = layers
            .into_iter()
            .min_by(|a, b| all_low(a).cmp(&all_low(b)).then(a.sorted[0].0.total_cmp(&b.sorted[0].0)));
        let Some(Layer { node, sorted, low }) = lowest else {
            bail!("the network has no {which} with batch normalization")
        };
        let (low, of) = if low < sorted.len() { (low, "above τ in") } else { (0, "of") };
        let ordinary = (low + (sorted.len() - low) / 2, format!("median V {of} the same layer"));
        for (place, rule) in [(0, format!("lowest V of all {which}")), ordinary] {
            let (variance, filter) = sorted[place];
            chosen.push(Chosen { node, filter, variance: variance.into(), rule });
        }
    }
    Ok(chosen)
}

/// Returns the outputs of the chosen filters on `images` `[N, H, W, C]`: those of the convolution,
/// and those after normalization with the running statistics and activation.
fn observe(network: &Network, chosen: &[Chosen], images: &Tensor) -> Result<Vec<FilterOutputs>> {
    let mut outputs: Vec<Vec<f32>> = vec![Vec::new(); chosen.len()];
    network.forward_observed(images, &mut |node, z, _| {
        let Some(z) = z else { return Ok(()) };
        for (chosen, output) in chosen.iter().zip(&mut outputs).filter(|(chosen, _)| chosen.node == node) {
            let last = z.rank() - 1;
            *output = z.narrow(last, chosen.filter, 1)?.flatten_all()?.to_vec1()?;
        }
        Ok(())
    })?;
    let mut activations = Vec::new();
    for (chosen, output) in chosen.iter().zip(&outputs) {
        let unit = network.nodes[chosen.node].unit().context("no layer was chosen")?;
        let norm = unit.batch_norm().context("a filter without batch normalization was chosen")?;
        let (scale, shift) = norm.affine(network.epsilon)?;
        let at = |t: Tensor| -> Result<f32> { Ok(t.get(chosen.filter)?.to_scalar()?) };
        let (scale, shift) = (at(scale)?, at(shift)?);
        let activation = |&z: &f32| unit.activation.apply(scale * z + shift);
        activations.push(output.iter().map(activation).collect::<Vec<f32>>());
    }
    // The filters of a layer share one scale. Otherwise a constant would look like any other
    // filter.
    let together = |values: &[Vec<f32>], node: usize| {
        let of_layer = chosen.iter().zip(values).filter(|(chosen, _)| chosen.node == node);
        span(of_layer.flat_map(|(_, values)| values.iter().copied()))
    };
    Ok(chosen
        .iter()
        .enumerate()
        .map(|(i, c)| FilterOutputs {
            layer: network.nodes[c.node].name().into(),
            filter: c.filter,
            rule: c.rule.clone(),
            variance: c.variance,
            convolution: Histogram::of(&outputs[i], together(&outputs, c.node), BINS),
            activation: Histogram::of(&activations[i], together(&activations, c.node), BINS),
        })
        .collect())
}

/// Returns the lowest and the highest value; if they are equal, the bounds are 0.5 below and above.
fn span(values: impl Iterator<Item = f32>) -> (f64, f64) {
    let (low, high) =
        values.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    let (low, high) = (f64::from(low), f64::from(high));
    if low < high { (low, high) } else { (low - 0.5, low + 0.5) }
}

/// Writes pictures and CSV files.
fn draw(subjects: &[Subject], session: &Session, drawn: &mut Drawn) -> Result<()> {
    let (mut outputs, mut variances) = (Vec::new(), Vec::new());
    let batch = first_images(session)?;
    let images = session.data.test_images().min(IMAGES);
    let mut text = format!(
        "# Figure 3: filters of low and of ordinary running variance\n\n\
         The pre-trained networks of profile `{}` see the first {images} test images. Shown are, among the depthwise \
         layers and among all others, the filter with the lowest running variance V, and the filter with the median V \
         of those in the same layer that are not below τ. Normalization uses the running statistics, as in evaluation.\n\n",
        session.profile.name
    );
    text += "| network | layer | filter | V | chosen as | convolution: mean, std | after activation: mean, std |\n";
    text += "|---|---|--:|--:|---|---|---|\n";
    let mut short = Vec::new();
    for subject in subjects {
        let (model, network, threshold) =
            (subject.config.version.name(), &subject.network, subject.threshold);
        let filters =
            observe(network, &choose(network, threshold)?, &batch.images.to_device(network.device())?)?;
        let layers: Vec<Variances> =
            pfq::variances(network)?.into_iter().map(|(layer, values)| Variances { layer, values }).collect();
        let shown = format!("first {images} test images");
        let [svg, png] = drawn.picture("outputs", subject);
        histogram::plot_outputs(
            &filters,
            &subject.caption("what filters of low and of ordinary variance give", session, &[&shown]),
            &svg,
            &png,
        )?;
        let [svg, png] = drawn.picture("variances", subject);
        histogram::plot_variances(
            &layers,
            &subject.caption("running variances of every layer", session, &["after the last epoch"]),
            &svg,
            &png,
        )?;
        outputs.extend(OutputRow::all(model, &filters, threshold));
        variances.extend(VarianceRow::all(model, &layers, threshold));
        for f in &filters {
            let both = |h: &Histogram| format!("{:.3e}, {:.1e}", h.mean, h.deviation);
            text += &format!(
                "| {model} | {} | {} | {:.1e} | {} | {} | {} |\n",
                f.layer,
                f.filter,
                f.variance,
                f.rule,
                both(&f.convolution),
                both(&f.activation)
            );
        }
        let low: usize = layers.iter().map(|layer| layer.low(threshold)).sum();
        let filters: usize = layers.iter().map(|layer| layer.values.len()).sum();
        short.push(format!(
            "{model} ×{} (stage {}): {low} of {filters} filters have V < τ = {}.",
            subject.config.width,
            subject.outcome.key,
            report::shortest(threshold)
        ));
    }
    text.push('\n');
    text.extend(short.iter().map(|line| format!("- {line}\n")));
    histogram::write_rows(&outputs, &drawn.sheet("outputs.csv"))?;
    histogram::write_rows(&variances, &drawn.sheet("variances.csv"))?;
    (drawn.text, drawn.short) = (text, short.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use datasets::test_batches;
    use models::{Input, MobileNet, Unit, Version};
    use std::sync::Arc;

    /// The number of training steps, all on the same images and without changing the weights.
    const STEPS: i32 = 200;

    /// Returns a network with one dead depthwise filter, whose running variances have moved towards
    /// the variances of its outputs on `images`.
    fn network(images: &Tensor) -> Network {
        let config = MobileNet { width: 0.25, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
        let mut network = config.init(1, &Device::Cpu).unwrap();
        let dead = network.units_mut().find(|u| u.name == "blocks.3.depthwise").unwrap();
        let keep: Vec<f32> = (0..dead.filters()).map(|j| if j == 5 { 0.0 } else { 1.0 }).collect();
        dead.weight = dead.weight.broadcast_mul(&Tensor::new(keep, &Device::Cpu).unwrap()).unwrap();
        for _ in 0..STEPS {
            network.forward_train(images, models::Step::alone(0.1)).unwrap();
        }
        network
    }

    #[test]
    fn the_dead_filter_is_chosen_and_constant_and_the_other_is_as_normalized() {
        let data = Arc::new(datasets::synthetic(40, 40, 3).unwrap());
        let images = test_batches(&data, 20).next().unwrap().unwrap().images;
        let network = network(&images);
        let chosen = choose(&network, network.epsilon).unwrap();
        let names: Vec<(&str, &str)> =
            chosen.iter().map(|c| (network.nodes[c.node].name(), c.rule.as_str())).collect();
        assert_eq!(names[0], ("blocks.3.depthwise", "lowest V of all depthwise layers"));
        assert_eq!(names[1], ("blocks.3.depthwise", "median V above τ in the same layer"));
        assert!(!names[2].0.ends_with("depthwise") && names[2].0 == names[3].0, "{names:?}");
        assert_eq!(chosen[0].filter, 5);
        let norm = network.nodes[chosen[1].node].unit().and_then(Unit::batch_norm);
        let norm = norm.expect("a new network is normalized");
        let variances = norm.variance.to_vec1::<f32>().unwrap();
        let below = variances.iter().filter(|v| f64::from(**v) < chosen[1].variance).count();
        // All but the dead one are ordinary.
        assert_eq!(below, 1 + (variances.len() - 1) / 2);
        // Of more low filters, the ordinary one is above them too; without ordinary ones, the
        // median of all is taken.
        let higher = choose(&network, 1.001 * chosen[1].variance).unwrap();
        assert!(higher[1].variance > 1.001 * chosen[1].variance);
        assert_eq!(choose(&network, f64::INFINITY).unwrap()[1].rule, "median V of the same layer");

        let shown = observe(&network, &chosen, &images).unwrap();
        let [dead, ordinary] = [&shown[0], &shown[1]];
        assert_eq!(
            (dead.convolution.mean, dead.convolution.deviation, dead.activation.deviation),
            (0.0, 0.0, 0.0)
        );
        assert_eq!(dead.convolution.counts.iter().filter(|n| **n > 0).count(), 1);
        assert_eq!(
            (dead.convolution.low, dead.convolution.high),
            (ordinary.convolution.low, ordinary.convolution.high)
        );
        // The running variance starts at 1, is updated by a tenth in every step, and is unbiased.
        let began = 0.9f64.powi(STEPS);
        let count = |h: &Histogram| h.counts.iter().sum::<u64>();
        let n = count(&ordinary.convolution) as f64;
        let biased = (ordinary.variance - began) / (1.0 - began) * (n - 1.0) / n;
        let ratio = ordinary.convolution.deviation.powi(2) / biased;
        assert!((ratio - 1.0).abs() < 1e-3, "variance of the outputs is {ratio} of that in training");
        let (low, high) = (ordinary.activation.low, ordinary.activation.high);
        assert!(low == 0.0 && high > 0.5 && high <= 6.0, "ReLU6 gave {low} to {high}");
        // There are 20 images; the size of the map cancels out.
        assert!(count(&dead.activation) == count(&ordinary.convolution) && count(&dead.activation) % 20 == 0);
    }
}
