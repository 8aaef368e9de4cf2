//! Which channels are constant, and their values.

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use models::{BatchNorm, Network, Node, Quantizer, Unit};
use quant_core::{fold_scale, fold_shift};

/// Returns the name of every batch-normalized layer, in order, with the running variance V of each
/// filter's output.
pub fn variances(network: &Network) -> Result<Vec<(String, Vec<f32>)>> {
    let mut all = Vec::new();
    for unit in network.units() {
        if let Some(norm) = unit.batch_norm() {
            all.push((unit.name.clone(), norm.variance.to_vec1()?));
        }
    }
    Ok(all)
}

/// The constant channels of every node.
#[derive(Debug, Clone, PartialEq)]
pub struct Constants {
    /// `low[i][j]` is true if node i is a unit and the running variance of its filter j is below τ.
    pub low: Vec<Vec<bool>>,
    /// `output[i][j]` is the value of channel j of node i's output if it is constant, and `None` if
    /// it varies.
    pub output: Vec<Vec<Option<f32>>>,
}

impl Constants {
    /// Follows constants through `network`. A filter is constant if its running variance is below
    /// `threshold`.
    ///
    /// * A low filter gives `φ(β)`, because its output before the normalization equals its mean.
    /// * A depthwise filter on a constant channel `c` gives `φ(norm(c·Σk))`. This is exact if
    ///   `c = 0`, and otherwise exact away from the zero-padded border.
    /// * A sum is constant if both summands are.
    /// * A pooled channel is constant if it was constant before.
    /// * A cap limits the constant.
    /// * An activation quantizer maps the constant to its grid.
    pub fn find(network: &Network, threshold: f64) -> Result<Self> {
        let mut low = Vec::with_capacity(network.nodes.len());
        let mut output: Vec<Vec<Option<f32>>> = Vec::with_capacity(network.nodes.len());
        for (node, [.., channels]) in network.nodes.iter().zip(network.shapes()) {
            let mut is_low = vec![false; channels];
            let mut values = match node {
                Node::Image(_) => vec![None; channels],
                Node::Unit(unit) => {
                    let epsilon = network.epsilon as f32;
                    of_filters(unit, epsilon, threshold, &output[unit.input], &mut is_low)?
                }
                Node::Sum(sum) => {
                    let [a, b] = sum.inputs.map(|input| &output[input]);
                    a.iter().zip(b).map(|(a, b)| a.zip(*b).map(|(a, b)| a + b)).collect()
                }
                Node::Pool(pool) => output[pool.input].clone(),
            };
            for value in values.iter_mut().flatten() {
                *value = node.activation().apply(*value);
            }
            if let Some(cap) = node.unit().and_then(|unit| unit.cap.as_ref()) {
                for (value, cap) in values.iter_mut().zip(cap.to_vec1::<f32>()?) {
                    *value = value.map(|value| value.min(cap));
                }
            }
            quantize(&mut values, node.quantizer())?;
            low.push(is_low);
            output.push(values);
        }
        Ok(Self { low, output })
    }
}

/// Returns the constants of a unit's filters before the activation, and marks the filters of low
/// variance in `is_low`.
fn of_filters(
    unit: &Unit,
    epsilon: f32,
    threshold: f64,
    input: &[Option<f32>],
    is_low: &mut [bool],
) -> Result<Vec<Option<f32>>> {
    let mut values = vec![None; is_low.len()];
    let Some(BatchNorm { gamma, beta, mean, variance }) = unit.batch_norm() else { return Ok(values) };
    let [gamma, beta, mean, variance] = [gamma, beta, mean, variance].map(|t| t.to_vec1::<f32>());
    let (gamma, beta, mean, variance) = (gamma?, beta?, mean?, variance?);
    let sums = match unit.kernel.is_depthwise() {
        true => Some(unit.weight.sum((0, 1))?.to_vec1::<f32>()?),
        false => None,
    };
    for (j, value) in values.iter_mut().enumerate() {
        is_low[j] = f64::from(variance[j]) < threshold;
        *value = match &sums {
            _ if is_low[j] => Some(beta[j]),
            Some(sums) => {
                let scale = fold_scale(gamma[j], variance[j], epsilon);
                let shift = fold_shift(beta[j], mean[j], scale);
                input[j].map(|c| scale * c * sums[j] + shift)
            }
            None => None,
        };
    }
    Ok(values)
}

/// Quantizes the constants as the node's quantizer does.
fn quantize(values: &mut [Option<f32>], quantizer: Option<&Quantizer>) -> Result<()> {
    let constants: Vec<f32> = values.iter().flatten().copied().collect();
    let Some(quantizer) = quantizer.filter(|_| !constants.is_empty()) else { return Ok(()) };
    let quantized = quantizer.apply(&Tensor::new(constants, &Device::Cpu)?)?.to_vec1::<f32>()?;
    if let Some(value) = quantized.iter().find(|value| !value.is_finite()) {
        return Err(Error::Range(*value));
    }
    for (value, quantized) in values.iter_mut().flatten().zip(quantized) {
        *value = quantized;
    }
    Ok(())
}
