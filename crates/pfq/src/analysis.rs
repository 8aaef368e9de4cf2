//! Which channels are constant, and what they are.

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use models::{BatchNorm, Kernel, Network, Quantizer};
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
    for unit in &network.units {
        if let Some(norm) = unit.batch_norm() {
            all.push(LayerVariance { layer: unit.name.clone(), variance: norm.variance.to_vec1()? });
        }
    }
    Ok(all)
}

/// For every unit, what is constant about its channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Constants {
    /// `low[i][j]`: the running variance of filter j of unit i is below τ.
    pub low: Vec<Vec<bool>>,
    /// `output[i][j]`: the constant that channel j of unit i's output is, after activation, residual
    /// sum and quantizer; `None` if it varies.
    pub output: Vec<Vec<Option<f32>>>,
}

impl Constants {
    /// Follows constants through `network`, a filter being constant if its running variance is below
    /// `threshold`:
    ///
    /// * a low filter gives `φ(β)`, as its input to the normalization is its mean;
    /// * a depthwise filter on a constant channel `c` gives `φ(norm(c·Σk))`, exactly so if `c = 0`
    ///   and away from the zero-padded border otherwise;
    /// * a residual sum is constant where both summands are;
    /// * an activation quantizer maps the constant to its grid.
    pub fn find(network: &Network, threshold: f64) -> Result<Self> {
        let mut low = Vec::with_capacity(network.units.len());
        let mut output: Vec<Vec<Option<f32>>> = Vec::with_capacity(network.units.len());
        for (i, unit) in network.units.iter().enumerate() {
            let mut values = vec![None; unit.filters()];
            let mut is_low = vec![false; unit.filters()];
            if let Some(norm) = unit.batch_norm() {
                let Host { gamma, beta, mean, variance } = Host::of(norm)?;
                let sums = match unit.kernel {
                    Kernel::Depthwise { .. } => Some(unit.weight.sum((0, 1))?.to_vec1::<f32>()?),
                    _ => None,
                };
                for j in 0..unit.filters() {
                    is_low[j] = f64::from(variance[j]) < threshold;
                    let before_activation = if is_low[j] {
                        Some(beta[j])
                    } else if let Some(sums) = &sums {
                        let scale = fold_scale(gamma[j], variance[j], network.epsilon as f32);
                        let shift = fold_shift(beta[j], mean[j], scale);
                        // The stem is a full convolution, so a depthwise filter has one before it.
                        output[i - 1][j].map(|c| scale * c * sums[j] + shift)
                    } else {
                        None
                    };
                    values[j] = before_activation.map(|x| unit.activation.apply(x));
                }
            }
            if let Some(from) = network.residual_into(i) {
                for (value, shortcut) in values.iter_mut().zip(&output[from]) {
                    *value = value.zip(*shortcut).map(|(a, b)| a + b);
                }
            }
            quantize(&mut values, unit.output_quantizer.as_ref())?;
            low.push(is_low);
            output.push(values);
        }
        Ok(Self { low, output })
    }
}

/// Maps constants to the levels of the quantizer that they pass.
pub(crate) fn quantize(values: &mut [Option<f32>], quantizer: Option<&Quantizer>) -> Result<()> {
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

/// A normalization's tensors as plain vectors.
struct Host {
    gamma: Vec<f32>,
    beta: Vec<f32>,
    mean: Vec<f32>,
    variance: Vec<f32>,
}

impl Host {
    fn of(norm: &BatchNorm) -> Result<Self> {
        Ok(Self {
            gamma: norm.gamma.to_vec1()?,
            beta: norm.beta.to_vec1()?,
            mean: norm.mean.to_vec1()?,
            variance: norm.variance.to_vec1()?,
        })
    }
}
