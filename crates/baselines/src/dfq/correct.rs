//! Step 6: analytic bias correction (Nagel et al., section 4.2, appendices B and C).

use super::draft::Draft;
use crate::Result;
use candle_core::Tensor;

impl Draft {
    /// Removes the mean error that quantized weights `W̃` cause from every bias:
    /// `b ← b − (W̃ − W)·E[x]`.
    ///
    /// `E[x]` is the mean of the layer's input, from the statistics of the float network (see
    /// [`Draft::outputs`]): a corrected layer has its float mean again. Returns the mean |change|
    /// for each unit, including the classifier. It is 0 if the weights are not quantized.
    pub(crate) fn correct_bias(&mut self) -> Result<Vec<f64>> {
        let outputs = self.outputs();
        let device = self.network.device().clone();
        let mut changes = Vec::new();
        for i in 0..self.network.nodes.len() {
            let Some(unit) = self.network.nodes[i].unit() else { continue };
            let input: Vec<f32> = outputs[unit.input].iter().map(|x| x.mean as f32).collect();
            let quantizer = unit.weight_quantizer.as_ref();
            let quantized = quantizer.map_or(Ok(unit.weight.clone()), |q| q.apply(&unit.weight))?;
            let change = unit.kernel.response(&(&unit.weight - quantized)?, &Tensor::new(input, &device)?)?;
            self.add_to_convolution(i, &change)?;
            changes.push(mean_abs(&change)?);
        }
        Ok(changes)
    }
}

fn mean_abs(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.abs()?.mean_all()?.to_scalar::<f32>()?.into())
}

#[cfg(test)]
mod tests {
    use super::super::draft::bias_mut;
    use super::super::testing::{FROZEN, chain, channel_means, gaussian_images, mobilenet, quantization};
    use super::*;
    use kernels::Activation::{self, Identity, Relu};
    use models::{Kernel, Network, Quantization, Version, WeightGrid};
    use quant_core::Precision;

    const UNITS: [(Kernel, Activation); 2] = [(Kernel::Pointwise, Relu), (Kernel::Pointwise, Identity)];

    /// Returns settings that quantize only the weights, as bias correction assumes.
    fn weights_only(bits: u32) -> Quantization {
        Quantization { activations: Precision::Float, ..quantization(bits) }
    }

    #[test]
    fn hand_worked_layer() {
        let mut network = chain(1, &UNITS, &[&[1.0, 1.0], &[0.0, 1.1, 3.0, 0.4]])
            .norm(0, &[[0.0, 2.0, 0.0, 1.0], [0.0, -5.0, 0.0, 1.0]])
            .network;
        network.epsilon = 0.0;
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        folded.network.quantize(&weights_only(2)).unwrap();
        let changes = folded.correct_bias().unwrap();
        // The levels are 0, 1, 2, 3, and the inputs 2 and 0. Only 1.1 → 1 counts: it is too low by
        // 0.1 · 2.
        let bias = bias_mut(folded.unit_mut(2)).to_vec1::<f32>().unwrap();
        assert!(bias[0] == 0.0 && (bias[1] - 0.2).abs() < 1e-6, "{bias:?}");
        assert!((changes[1] - 0.1).abs() < 1e-6, "{changes:?}");
        // The weights 0 and 1 are levels in the classifier, too, and in the first layer (γ = 0).
        assert_eq!((changes[0], changes[2]), (0.0, 0.0));
    }

    /// With a grid for each channel, the error comes from the channel's own levels.
    #[test]
    fn hand_worked_layer_with_grids_of_channels() {
        // There are two inputs of mean 2 and 1, and two outputs. 1.1 lies on the grid 0, 1, 2, 3,
        // and 0.4 on the grid 0, 0.3, 0.6, 0.9.
        let units = chain(1, &UNITS, &[&[1.0, 1.0], &[1.1, 0.4, 3.0, 0.9]]);
        let mut network = units.norm(0, &[[0.0, 2.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]).network;
        network.epsilon = 0.0;
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        let settings = Quantization { weight_grid: WeightGrid::Channel, ..weights_only(2) };
        folded.network.quantize(&settings).unwrap();
        folded.correct_bias().unwrap();
        let bias = bias_mut(folded.unit_mut(2)).to_vec1::<f32>().unwrap();
        assert!((bias[0] - 0.2).abs() < 1e-6 && (bias[1] - 0.2).abs() < 1e-6, "{bias:?}");
    }

    #[test]
    fn expected_input_is_the_clipped_mean() {
        // A standard normal input has the mean 1/√(2π) after ReLU; 1.4 → 1.
        let mut folded = Draft::new(&chain(1, &UNITS, &[&[1.0], &[1.4, 3.0]]).network, FROZEN).unwrap();
        folded.network.quantize(&weights_only(2)).unwrap();
        folded.correct_bias().unwrap();
        let bias = bias_mut(folded.unit_mut(2)).to_vec1::<f32>().unwrap();
        assert!((f64::from(bias[0]) - 0.4 / std::f64::consts::TAU.sqrt()).abs() < 1e-4, "{bias:?}");
    }

    /// Returns the error of the channel means before the activation, in deviations, averaged over
    /// all channels.
    fn error(folded: &Draft, reference: &Network, images: &Tensor) -> f64 {
        let (want, got) = (channel_means(reference, images), channel_means(&folded.network, images));
        let mut errors = Vec::new();
        for ((want, got), channels) in want.iter().zip(&got).zip(&folded.channels) {
            for ((want, got), channel) in want.iter().zip(got).zip(channels) {
                if channel.deviation > 1e-3 {
                    errors.push(f64::from((want - got).abs()) / channel.deviation);
                }
            }
        }
        errors.iter().sum::<f64>() / errors.len() as f64
    }

    fn check(version: Version) {
        let network = mobilenet(version, Relu);
        let images = gaussian_images(16, &network);
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        folded.equalize(1e-2, 100).unwrap();
        let reference = folded.network.duplicate().unwrap();
        folded.network.quantize(&weights_only(4)).unwrap();
        let before = error(&folded, &reference, &images);
        folded.correct_bias().unwrap();
        let after = error(&folded, &reference, &images);
        assert!(after < 0.7 * before, "{version:?}: {before} → {after}");
    }

    #[test]
    fn channel_means_come_closer_in_mobilenet_v1() {
        check(Version::V1);
    }

    #[test]
    fn channel_means_come_closer_in_mobilenet_v2() {
        check(Version::V2);
    }
}
