//! Which channels are constant, and what they are.

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use models::{BatchNorm, Network, Node, Quantizer, Unit};
use quant_core::{fold_scale, fold_shift};

/// The running variances of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerVariance {
    /// Name of the unit.
    pub layer: String,
    /// Running variance V of each filter's output.
    pub variance: Vec<f32>,
}

/// The running variances of every batch-normalized layer, in order.
pub fn variances(network: &Network) -> Result<Vec<LayerVariance>> {
    let mut all = Vec::new();
    for unit in network.units() {
        if let Some(norm) = unit.batch_norm() {
            all.push(LayerVariance { layer: unit.name.clone(), variance: norm.variance.to_vec1()? });
        }
    }
    Ok(all)
}

/// For every node, what is constant about its channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Constants {
    /// `low[i][j]`: node i is a unit, and the running variance of its filter j is below τ.
    pub low: Vec<Vec<bool>>,
    /// `output[i][j]`: the constant that channel j of node i's output is; `None` if it varies.
    pub output: Vec<Vec<Option<f32>>>,
}

impl Constants {
    /// Follows constants through `network`, a filter being constant if its running variance is below
    /// `threshold`:
    ///
    /// * a low filter gives `φ(β)`, as its input to the normalization is its mean;
    /// * a depthwise filter on a constant channel `c` gives `φ(norm(c·Σk))`, exactly so if `c = 0`
    ///   and away from the zero-padded border otherwise;
    /// * a sum is constant where both summands are;
    /// * a pooled channel is constant where it was before;
    /// * caps are the most that a constant is;
    /// * an activation quantizer maps the constant to its grid.
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

/// The constants that a unit's filters give before the activation; marks those of low variance.
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

/// Maps constants to the levels of the quantizer that they pass.
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
