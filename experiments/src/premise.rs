//! The paper's premise, measured without any training.
//!
//! For each layer, this compares before and after pruning: the dynamic range of the folded weights,
//! the signal-to-noise ratio of their quantization and of their gradients, and the ranges of
//! activations.
//!
//! The networks are the pre-trained ones that the tables start from, so they come from the same
//! store.

use crate::flags::Flags;
use crate::pretrained::{self, Drawn, IMAGES, Subject, first_images};
use crate::session::{self, Session};
use crate::tool::text::table;
use anyhow::{Context as _, Result};
use candle_core::{Device, Tensor};
use clap::{CommandFactory, FromArgMatches};
use datasets::Batch;
use kernels::loss::softmax_cross_entropy;
use kernels::quantize;
use models::{Network, Quantization, Step, Unit};
use pfq::PfQ;
use quant_core::{Bits, Precision};
use report::bench::Spread;
use report::histogram::write_rows;
use report::premise::{FilterRow, PremiseRow, plot, plot_filters};
use std::collections::HashMap;

/// Runs the binary: parses the flags, pre-trains missing networks, writes the pictures.
pub fn main() -> Result<()> {
    let about = "Measures what pruning changes in pre-trained networks, which are trained if they are not \
                 in the store: the dynamic range of folded weights, the signal-to-noise ratio of their \
                 quantization to 4 and 3 bits and of their gradients with activations of 4 bits, and the \
                 ranges of activations";
    let flags = Flags::from_arg_matches(&Flags::command().about(about).get_matches())?;
    let models = pretrained::models(&flags)?;
    session::main(&flags, false, |session| pretrained::run("premise", &models, session, &flags, draw))
}

/// Measures the layers of a pre-trained network before and after pruning by `pfq`. Outputs and
/// gradients are those on the batch.
fn measure(network: &Network, pfq: &PfQ, batch: &Batch) -> Result<Vec<PremiseRow>> {
    let kept = pfq.kept(network)?;
    let (pruned, _) = pfq.apply(network)?;
    let (outputs_before, outputs_after) =
        (extremes(network, &batch.images)?, extremes(&pruned, &batch.images)?);
    let four = Bits::new(4)?;
    let gradients = [(network, None), (network, Some(four)), (&pruned, None), (&pruned, Some(four))];
    let gradients = gradients.map(|(network, bits)| weight_gradients(network, batch, bits));
    let [float_before, quantized_before, float_after, quantized_after] = gradients;
    let (float_before, quantized_before) = (float_before?, quantized_before?);
    let (float_after, quantized_after) = (float_after?, quantized_after?);
    let (mut before, mut after) = (network.duplicate()?, pruned.duplicate()?);
    before.fold()?;
    after.fold()?;
    let mut rows = Vec::new();
    for (i, node) in before.nodes.iter().enumerate() {
        let (Some(unit), Some(other)) = (node.unit(), after.nodes[i].unit()) else { continue };
        let stays = Stays { unit, filters: indices(&kept[i])?, inputs: indices(&kept[unit.input])? };
        let snr = |bits: u32| -> Result<(f64, f64)> {
            let bits = Bits::new(bits)?;
            let with = stays.of(&quantized(&unit.weight, bits)?)?;
            Ok((decibels(&other.weight, &with)?, decibels(&other.weight, &quantized(&other.weight, bits)?)?))
        };
        let ((snr_4_bits_before, snr_4_bits_after), (snr_3_bits_before, snr_3_bits_after)) =
            (snr(4)?, snr(3)?);
        let gradient_snr_before =
            decibels(&stays.of(&float_before[&unit.name])?, &stays.of(&quantized_before[&unit.name])?)?;
        let gradient_snr_after = decibels(&float_after[&unit.name], &quantized_after[&unit.name])?;
        let unfolded = |network: &Network| network.nodes[i].unit().map(|unit| unit.weight.clone());
        let unfolded = unfolded(network).zip(unfolded(&pruned)).context("pruning changes no kind of node")?;
        let lsq_before = lsq(&unfolded.0, &stays.of(&unfolded.0)?)?;
        let lsq_after = lsq(&unfolded.1, &unfolded.1)?;
        let [largest_before, largest_after] = [unit, other].map(largest_of_filters);
        let (largest_before, largest_after) = (largest_before?, largest_after?);
        // The (upper) median is taken over the filters that stay: if most filters are dead, the
        // median of all would be zero.
        let usual = largest_after[largest_after.len() / 2].max(f64::from(f32::MIN_POSITIVE));
        let [largest_before, largest_after] = [largest_before, largest_after].map(|all| all[all.len() - 1]);
        rows.push(PremiseRow {
            model: network.name.clone(),
            layer: unit.name.clone(),
            filters_before: unit.filters(),
            filters_after: other.filters(),
            largest_weight_before: largest_before,
            largest_weight_after: largest_after,
            dynamic_range_before: largest_before / usual,
            dynamic_range_after: largest_after / usual,
            snr_4_bits_before,
            snr_4_bits_after,
            snr_3_bits_before,
            snr_3_bits_after,
            lsq_step_before: lsq_before.step,
            lsq_step_after: lsq_after.step,
            lsq_clipped_before: lsq_before.clipped,
            lsq_clipped_after: lsq_after.clipped,
            lsq_snr_before: lsq_before.snr,
            lsq_snr_after: lsq_after.snr,
            gradient_snr_before,
            gradient_snr_after,
            lowest_output_before: outputs_before[i].0,
            highest_output_before: outputs_before[i].1,
            lowest_output_after: outputs_after[i].0,
            highest_output_after: outputs_after[i].1,
        });
    }
    Ok(rows)
}

/// Returns a row for every normalized filter. `threshold` is τ.
fn filters(network: &Network, threshold: f64) -> Result<Vec<FilterRow>> {
    let mut rows = Vec::new();
    for unit in network.units() {
        let Some(norm) = unit.batch_norm() else { continue };
        let factor = norm.scale(network.epsilon)?.to_vec1::<f32>()?;
        let [variance, gamma, beta] =
            [&norm.variance, &norm.gamma, &norm.beta].map(|tensor| tensor.to_vec1::<f32>());
        let (variance, gamma, beta) = (variance?, gamma?, beta?);
        rows.extend((0..unit.filters()).map(|filter| FilterRow {
            layer: unit.name.clone(),
            filter,
            variance: variance[filter],
            gamma: gamma[filter],
            beta: beta[filter],
            factor: factor[filter],
            below_threshold: f64::from(variance[filter]) < threshold,
        }));
    }
    Ok(rows)
}

/// The part of a unit's weights that pruning keeps.
struct Stays<'a> {
    unit: &'a Unit,
    filters: Tensor,
    inputs: Tensor,
}

impl Stays<'_> {
    fn of(&self, weight: &Tensor) -> Result<Tensor> {
        let kernel = self.unit.kernel;
        let filters = kernel.select_filters(weight, &self.filters)?;
        // The input of a depthwise filter is its own channel.
        if kernel.is_depthwise() { Ok(filters) } else { Ok(kernel.select_inputs(&filters, &self.inputs)?) }
    }
}

fn indices(kept: &[bool]) -> Result<Tensor> {
    let indices: Vec<u32> = (0..kept.len() as u32).filter(|&j| kept[j as usize]).collect();
    Ok(Tensor::new(indices, &Device::Cpu)?)
}

/// Quantizes weights on one grid between their extremes.
fn quantized(weight: &Tensor, bits: Bits) -> Result<Tensor> {
    let range = &quantize::min_max(weight)?;
    Ok(quantize::forward(weight, kernels::Quantizer { range, bits })?)
}

/// The effect of LSQ on a layer before any training: weights of 3 bits with LSQ's initial step.
struct Lsq {
    /// The initial step.
    step: f64,
    /// The share of the weights that stay which lie beyond the lowest or the highest level.
    clipped: f64,
    /// The signal-to-noise ratio of the weights that stay, in decibels.
    snr: f64,
}

/// Measures LSQ's initial quantization. The step comes from all weights of the layer; the other
/// values are about the weights that stay.
fn lsq(all: &Tensor, staying: &Tensor) -> Result<Lsq> {
    let bits = Bits::new(3)?;
    let step = kernels::lsq::initial_step(all, bits, true)?;
    let params = kernels::lsq::Params { step: &step, offset: None, bits, signed: true };
    let step = f64::from(step.to_vec1::<f32>()?[0]);
    let values: Vec<f32> = staying.flatten_all()?.to_vec1()?;
    let beyond = |value: &&f32| !(-4.0..=3.0).contains(&(f64::from(**value) / step));
    let clipped = values.iter().filter(beyond).count() as f64 / values.len() as f64;
    let snr = decibels(staying, &kernels::lsq::forward(staying, params)?)?;
    Ok(Lsq { step, clipped, snr })
}

/// Returns the signal-to-noise ratio in decibels, `10·log₁₀(Σw²/Σ(q − w)²)`. It is infinite if
/// there is no noise.
fn decibels(weight: &Tensor, quantized: &Tensor) -> Result<f64> {
    let power = |tensor: &Tensor| -> Result<f64> {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        Ok(values.iter().map(|&value| f64::from(value).powi(2)).sum())
    };
    Ok(10.0 * (power(weight)? / power(&(quantized - weight)?)?).log10())
}

/// Returns the largest magnitude of each filter's weights, in ascending order.
fn largest_of_filters(unit: &Unit) -> Result<Vec<f64>> {
    let mut filters: Vec<f32> = unit.kernel.filter_ranges(&unit.weight)?.to_vec1()?;
    filters.sort_by(f32::total_cmp);
    Ok(filters.into_iter().map(f64::from).collect())
}

/// Returns the gradient of each unit's weights, by the unit's name, in a training step of Algorithm
/// 1's first stage. Normalization uses the batch's statistics, and weights are float. If `bits` is
/// given, activations are quantized to it between the batch's extremes.
fn weight_gradients(network: &Network, batch: &Batch, bits: Option<Bits>) -> Result<HashMap<String, Tensor>> {
    let mut network = network.duplicate()?;
    if let Some(bits) = bits {
        let [activations, end] = [bits, Bits::new(8)?].map(Precision::Quantized);
        network.quantize(&Quantization {
            activations,
            first_layer: end,
            last_layer: end,
            ..Quantization::default()
        })?;
    }
    let (logits, tape) = network.forward_train(&batch.images, Step::alone(1.0))?;
    let loss = softmax_cross_entropy(&logits, &batch.labels, 0.0)?;
    let gradients = network.backward(tape, &loss.grad)?;
    let parameters = network.parameters();
    let of = |unit: &Unit| {
        let parameter = parameters.iter().find(|p| p.tensor.id() == unit.weight.id());
        let parameter = parameter.expect("the weights of every unit are parameters");
        Ok((unit.name.clone(), gradients.of(parameter)?.clone()))
    };
    network.units().map(of).collect()
}

/// Returns the lowest and the highest output of every node.
fn extremes(network: &Network, images: &Tensor) -> Result<Vec<(f64, f64)>> {
    let mut all = Vec::new();
    network.forward_observed(images, &mut |_, _, y| {
        let ends = quantize::min_max(y)?.to_vec1::<f32>()?;
        all.push((ends[0].into(), ends[1].into()));
        Ok(())
    })?;
    Ok(all)
}

/// Measures the networks on the CPU and writes pictures and CSV files.
fn draw(subjects: &[Subject], session: &Session, drawn: &mut Drawn) -> Result<()> {
    let batch = first_images(session)?;
    let batch = Batch {
        images: batch.images.to_device(&Device::Cpu)?,
        labels: batch.labels.to_device(&Device::Cpu)?,
    };
    let pfq = PfQ { threshold: session.profile.pfq.threshold, ..PfQ::default() };
    let (sheet, mut layers) = (drawn.sheet("layers.csv"), Vec::new());
    let mut text = String::from("# The premise: what pruning changes before any training\n\n");
    text += &format!(
        "The pre-trained networks of profile `{}`, before and after PfQ. Weights are folded with their batch normalization and \
         quantized on one grid for each layer; the signal-to-noise ratio is that of the weights that stay, on the layer's \
         grid before and after. Medians over the layers that have a value, and in how many of them it changes by more than a tenth (1 dB). \
         LSQ quantizes weights that are not folded, to 3 bits at the step that it begins with, 2·mean|w|/√3. \
         Gradients are those of the weights that stay, in one step with the batch's statistics and activations of 4 bits, beside \
         the same step without quantization. Gradients and ranges of outputs are those over the first {} test images.\n\n",
        session.profile.name,
        session.data.test_images().min(IMAGES)
    );
    text += "| network | | before | after | layers that change |\n|---|---|--:|--:|--:|\n";
    let mut lines = Vec::new();
    for subject in subjects {
        let (model, width) = (subject.config.version.name(), subject.config.width);
        let network = subject.network.to_device(&Device::Cpu)?;
        let rows = measure(&network, &pfq, &batch)?;
        let filters = filters(&network, subject.threshold)?;
        let mut line =
            |what: &str, of: &dyn Fn(&PremiseRow) -> (f64, f64), changes: &dyn Fn(f64, f64) -> bool| {
                // A dead block has no gradient, so its signal-to-noise ratio is NaN.
                let both = rows.iter().map(of).filter(|(a, b)| !a.is_nan() && !b.is_nan());
                let (before, after): (Vec<f64>, Vec<f64>) = both.unzip();
                let changed = before.iter().zip(&after).filter(|(a, b)| changes(**a, **b)).count();
                let [before_median, after_median] = [&before, &after].map(|values| median(values));
                let digits = if before_median.abs() < 1.0 { 4 } else { 2 };
                let cells = [
                    format!("{model} ×{width}"),
                    what.into(),
                    format!("{before_median:.digits$}"),
                    format!("{after_median:.digits$}"),
                    format!("{changed} of {}", before.len()),
                ];
                text += &format!("| {} |\n", cells.join(" | "));
                let [network, what, numbers @ ..] = cells;
                lines.push([vec![format!("{network}: {what}")], numbers.to_vec()].concat());
            };
        let tenth = |a: f64, b: f64| (a - b).abs() > 0.1 * a.abs().max(b.abs());
        let decibel = |a: f64, b: f64| (a - b).abs() > 1.0;
        line("dynamic range of the weights", &|r| (r.dynamic_range_before, r.dynamic_range_after), &tenth);
        line("signal to noise at 4 bits, dB", &|r| (r.snr_4_bits_before, r.snr_4_bits_after), &decibel);
        line("signal to noise at 3 bits, dB", &|r| (r.snr_3_bits_before, r.snr_3_bits_after), &decibel);
        line("LSQ's first step at 3 bits", &|r| (r.lsq_step_before, r.lsq_step_after), &tenth);
        let percent = |r: &PremiseRow| (100.0 * r.lsq_clipped_before, 100.0 * r.lsq_clipped_after);
        line("weights that it clips, %", &percent, &tenth);
        line("signal to noise with it, dB", &|r| (r.lsq_snr_before, r.lsq_snr_after), &decibel);
        line(
            "signal to noise of the gradients, dB",
            &|r| (r.gradient_snr_before, r.gradient_snr_after),
            &decibel,
        );
        let output = |lo: f64, hi: f64| hi.max(0.0) - lo.min(0.0);
        let ranges = |r: &PremiseRow| {
            (
                output(r.lowest_output_before, r.highest_output_before),
                output(r.lowest_output_after, r.highest_output_after),
            )
        };
        line("range of the outputs", &ranges, &tenth);
        let caption = subject.caption("weights before and after pruning", session, &[]);
        let [svg, png] = drawn.picture("premise", subject);
        plot(&rows, &caption, &svg, &png)?;
        let what = "folding factors of all filters over their running variances";
        let caption = subject.caption(what, session, &[]);
        let [svg, png] = drawn.picture("filters", subject);
        plot_filters(&filters, &caption, &svg, &png)?;
        write_rows(&filters, &drawn.sheet(format!("filters_{model}.csv")))?;
        layers.extend(rows);
    }
    write_rows(&layers, &sheet)?;
    let short = table(&["median over the layers", "before", "after", "layers that change"], &lines);
    (drawn.text, drawn.short) = (text, short);
    Ok(())
}

/// Returns the median; NaN if there are no values.
fn median(values: &[f64]) -> f64 {
    Spread::of(values.iter().copied()).map_or(f64::NAN, |spread| spread.median)
}

#[cfg(test)]
mod tests {
    use super::*;
    use models::{Input, MobileNet, Norm, Version};
    use std::sync::Arc;

    #[test]
    fn a_median_is_between_the_middle_values() {
        assert_eq!([&[3.0, 1.0, 2.0][..], &[4.0, 1.0, 2.0, 8.0], &[5.0]].map(median), [2.0, 3.0, 5.0]);
        assert!(median(&[]).is_nan());
    }

    /// A filter with almost no variance and a large folding factor sets its layer's grid. Without
    /// it, the other filters keep their levels.
    #[test]
    fn a_filter_that_spans_the_grid_is_seen() {
        let config = MobileNet { width: 0.25, ..MobileNet::new(Version::V2, Input::Cifar, 100) };
        let mut network = config.init(1, &Device::Cpu).unwrap();
        let data = Arc::new(datasets::synthetic(40, 40, 3).unwrap());
        let batch = datasets::test_batches(&data, 20).next().unwrap().unwrap();
        let unit = network.units_mut().find(|unit| unit.name == "blocks.3.expand").unwrap();
        let filters = unit.filters();
        let Norm::Batch(norm) = &mut unit.norm else { panic!("a new network is normalized") };
        // γ/√(V + ε) is 316 for this filter and 1 for all others.
        let variance = (0..filters).map(|j| if j == 5 { 0.0 } else { 1.0 }).collect::<Vec<f32>>();
        norm.variance = Tensor::new(variance, &Device::Cpu).unwrap();
        // In another layer, three of four filters are zero, so LSQ's step is a quarter of what the
        // weights that stay need.
        let unit = network.units_mut().find(|unit| unit.name == "blocks.4.expand").unwrap();
        let stays: Vec<f32> = (0..unit.filters()).map(|j| f32::from(u8::from(j % 4 == 0))).collect();
        let stays = Tensor::new(stays, &Device::Cpu).unwrap();
        unit.weight = unit.weight.broadcast_mul(&stays.reshape((1, ())).unwrap()).unwrap();
        let Norm::Batch(norm) = &mut unit.norm else { panic!("a new network is normalized") };
        norm.variance = stays;
        let rows = measure(&network, &PfQ::default(), &batch).unwrap();
        assert_eq!(rows.len(), network.units().count());
        let all = super::filters(&network, network.epsilon).unwrap();
        assert_eq!(all.len(), network.units().rev().skip(1).map(Unit::filters).sum::<usize>());
        let low: Vec<&FilterRow> = all.iter().filter(|row| row.below_threshold).collect();
        assert!(low[0].layer == "blocks.3.expand" && low[0].filter == 5, "{low:?}");
        assert!(low[1..].iter().all(|row| row.layer == "blocks.4.expand" && row.filter % 4 != 0), "{low:?}");
        assert!((low[0].factor - 316.2).abs() < 0.1 && low[0].gamma == 1.0, "{low:?}");
        for row in &rows {
            assert!(row.gradient_snr_before.is_finite() && row.gradient_snr_after.is_finite(), "{row:?}");
            match row.layer.as_str() {
                "blocks.3.expand" => {
                    assert_eq!(row.filters_before - row.filters_after, 1);
                    assert!(row.dynamic_range_before > 100.0 && row.dynamic_range_after < 3.0, "{row:?}");
                    // All other filters round to zero, so the noise equals the signal (0 dB).
                    // Without this filter, 4 bits give some 20 dB.
                    assert!(row.snr_4_bits_before.abs() < 1.0 && row.snr_4_bits_after > 12.0, "{row:?}");
                    assert!(
                        row.snr_3_bits_after > 5.0 && row.snr_3_bits_after < row.snr_4_bits_after,
                        "{row:?}"
                    );
                }
                "blocks.3.depthwise" => assert_eq!(row.filters_before - row.filters_after, 1),
                "blocks.4.expand" => {
                    assert_eq!(row.filters_before, 4 * row.filters_after);
                    let ratio = row.lsq_step_after / row.lsq_step_before;
                    assert!((ratio - 4.0).abs() < 1e-5, "{row:?}");
                    assert!(row.lsq_clipped_before > 0.4 && row.lsq_clipped_after < 0.1, "{row:?}");
                    assert!(row.lsq_snr_after - row.lsq_snr_before > 5.0, "{row:?}");
                }
                "blocks.2.expand" => {
                    assert_eq!(row.lsq_snr_before, row.lsq_snr_after);
                    assert_eq!(row.filters_before, row.filters_after);
                    assert_eq!(row.snr_4_bits_before, row.snr_4_bits_after);
                    assert_eq!(row.highest_output_before, row.highest_output_after);
                }
                _ => {}
            }
        }
    }
}
