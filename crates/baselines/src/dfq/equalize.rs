//! Step 3: cross-layer equalization of weight ranges (Nagel et al., section 4.1, appendix A).

use super::draft::Draft;
use crate::Result;
use candle_core::Tensor;

impl Draft {
    /// Scales every channel between the two units of a pair so that both weight ranges are the
    /// same, and returns the number of sweeps and the remaining [imbalance](Draft::imbalance).
    ///
    /// The scale is `s_i = √(r¹_i·r²_i) / r²_i`, where `r¹_i` is the largest |weight| that makes
    /// the channel and `r²_i` the largest |weight| that reads it: `W¹ ← W¹/s`, `b¹ ← b¹/s`,
    /// `W² ← s·W²`. Both ranges are then `√(r¹_i·r²_i)`. A pair changes the ranges of its
    /// neighbours, so this sweeps over all [pairs](Draft::pairs) until no scale differs from 1 by
    /// more than `tolerance`, or `max_sweeps` are done.
    ///
    /// If the activations are positively homogeneous (ReLU, identity), the outputs do not change. A
    /// cap becomes `cap/s`.
    pub(crate) fn equalize(&mut self, tolerance: f64, max_sweeps: usize) -> Result<(usize, f64)> {
        let mut sweeps = 0;
        loop {
            let imbalance = self.imbalance()?;
            if imbalance <= tolerance || sweeps == max_sweeps {
                return Ok((sweeps, imbalance));
            }
            for pair in self.pairs() {
                let scales = self.scales(pair)?;
                self.rescale(pair, &scales)?;
            }
            sweeps += 1;
        }
    }

    /// Returns the largest `|s − 1|` over all channels of all pairs.
    pub(crate) fn imbalance(&self) -> Result<f64> {
        let mut worst: f64 = 0.0;
        for pair in self.pairs() {
            worst = self.scales(pair)?.iter().fold(worst, |worst, s| worst.max((s - 1.0).abs()));
        }
        Ok(worst)
    }

    /// Returns the scales of a pair. A channel that no weight makes or reads is left unchanged, and
    /// a constant channel is not made larger.
    fn scales(&self, pair: [usize; 2]) -> Result<Vec<f64>> {
        let (made, read) = self.channel_ranges(pair)?;
        let scale = |((made, read), constant): ((f32, f32), bool)| {
            if made == 0.0 || read == 0.0 {
                return 1.0;
            }
            // √(r¹·r²)/r², without the product, which may underflow.
            let scale = (f64::from(made) / f64::from(read)).sqrt();
            if constant { scale.max(1.0) } else { scale }
        };
        let constant = self.channels[pair[0]].iter().map(|c| c.constant);
        Ok(made.into_iter().zip(read).zip(constant).map(scale).collect())
    }

    /// Returns, for each channel between the units of a pair, the largest |weight| that makes it
    /// and the largest |weight| that reads it.
    fn channel_ranges(&self, pair: [usize; 2]) -> Result<(Vec<f32>, Vec<f32>)> {
        let [maker, reader] = pair.map(|i| self.unit(i));
        let made = maker.kernel.filter_ranges(&maker.weight)?;
        let read = reader.kernel.input_ranges(&reader.weight)?;
        Ok((made.to_vec1()?, read.to_vec1()?))
    }

    fn rescale(&mut self, [maker, reader]: [usize; 2], scales: &[f64]) -> Result<()> {
        for (channel, s) in self.channels[maker].iter_mut().zip(scales) {
            channel.mean /= s;
            channel.deviation /= s;
            channel.cap /= s;
        }
        self.set_caps(maker)?;
        let scales: Vec<f32> = scales.iter().map(|&s| s as f32).collect();
        let scales = Tensor::new(scales, self.network.device())?;
        self.divide(maker, &scales)?;
        let reader = self.unit_mut(reader);
        reader.weight = reader.kernel.scale_inputs(&reader.weight, &scales)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft::bias_mut;
    use super::super::testing::{FROZEN, chain, gaussian_images, mobilenet, relative_difference, unbalance};
    use super::*;
    use kernels::Activation::{Identity, Relu};
    use models::{Kernel, Version};

    const TOLERANCE: f64 = 1e-3;

    /// Checks that equalization converges and keeps the outputs of a ReLU network.
    fn check(version: Version) {
        let network = mobilenet(version, Relu);
        let images = gaussian_images(4, &network);
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        let before = folded.imbalance().unwrap();
        let (sweeps, remaining) = folded.equalize(TOLERANCE, 1000).unwrap();
        assert!(before > 1.0 && remaining <= TOLERANCE && sweeps > 1, "{before}, {remaining}, {sweeps}");
        for pair in folded.pairs() {
            let (made, read) = folded.channel_ranges(pair).unwrap();
            for (made, read) in made.into_iter().zip(read) {
                let alike = f64::from((made / read).max(read / made)) <= (1.0 + 1.1 * TOLERANCE).powi(2);
                assert!(made == 0.0 || read == 0.0 || alike, "{pair:?}: {made} and {read}");
            }
        }
        let (want, got) = (network.forward(&images).unwrap(), folded.network.forward(&images).unwrap());
        let difference = relative_difference(&want, &got);
        assert!(difference < 1e-4, "outputs moved by {difference}");
    }

    #[test]
    fn mobilenet_v1_keeps_its_outputs() {
        check(Version::V1);
    }

    #[test]
    fn mobilenet_v2_keeps_its_outputs() {
        check(Version::V2);
    }

    #[test]
    fn hand_worked_pair() {
        // Two channels have ranges 8 and 1 where they are made, and 2 and 4 where they are read, so
        // s = √(8/2) = 2 and √(1/4) = ½. No weight reads the third channel.
        let network = chain(
            1,
            &[(Kernel::Pointwise, Relu), (Kernel::Pointwise, Identity)],
            &[&[8.0, -1.0, 5.0], &[-2.0, 1.0, 3.0, 4.0, 0.0, 0.0]],
        )
        .norm(0, &[[1.0, 0.5, 0.0, 1.0], [1.0, -2.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
        .network;
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        assert_eq!(folded.equalize(1e-3, 10).unwrap().0, 1);
        let weight = |i: usize| folded.unit(i).weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let close = |got: Vec<f32>, want: &[f32]| {
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-4), "{got:?}, expected {want:?}");
        };
        close(weight(1), &[4.0, -2.0, 5.0]);
        close(weight(2), &[-4.0, 2.0, 1.5, 2.0, 0.0, 0.0]);
        close(bias_mut(folded.unit_mut(1)).to_vec1().unwrap(), &[0.25, -4.0, 1.0]);
        let channels = &folded.channels[1];
        close(channels.iter().map(|c| c.mean as f32).collect(), &[0.25, -4.0, 1.0]);
        close(channels.iter().map(|c| c.deviation as f32).collect(), &[0.5, 2.0, 1.0]);
    }

    #[test]
    fn a_constant_filter_is_not_made_larger() {
        // The filter's weight is 1e-12 and its reader's is 1: s would be 1e-6, and the bias a
        // million times larger.
        let network =
            chain(1, &[(Kernel::Pointwise, Relu), (Kernel::Pointwise, Identity)], &[&[1e-12], &[1.0]])
                .norm(0, &[[1.0, 0.5, 0.0, 1e-20]])
                .network;
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        assert_eq!(folded.equalize(1e-3, 10).unwrap(), (0, 0.0));
        assert_eq!(folded.channels[1][0].mean, 0.5);
    }

    #[test]
    fn planted_wide_ranges_shrink() {
        let mut network = mobilenet(Version::V1, Relu);
        // Some filters have folded weights that are a thousand times too large, and their readers
        // undo it.
        let first = 5;
        unbalance(&mut network, [first, first + 1], |channel| if channel % 8 == 3 { 1000.0 } else { 1.0 });
        let spread = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        let before = spread(&folded.unit(first).weight);
        folded.equalize(TOLERANCE, 1000).unwrap();
        let after = spread(&folded.unit(first).weight);
        assert!(after < before / 20.0, "{before} → {after}");
    }
}
