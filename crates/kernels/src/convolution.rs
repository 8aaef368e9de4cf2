//! The convolutions of a network, of every [`Kernel`], and the layouts of their weights.
//!
//! `z[n,oh,ow,o] = Σ_{kh,kw,i} w[kh,kw,i,o] · x[n, oh·s + kh − p, ow·s + kw − p, i]`, where `x` is
//! 0 outside the image and the padding is `p = (k − 1)/2`. A depthwise convolution has only the
//! terms with `i = o`.
//!
//! The passes of a network call the functions here. This file decides which operation computes each
//! kind of convolution ([`crate::pointwise`], [`crate::depthwise`] or [`crate::im2col`]) and which
//! layout its weight has.

use crate::check::Check;
use crate::norm::{DeferredGradient, Epilogue, MapGradient, Stats};
use crate::{Activation, FeatureMap, Quantizer, Result, Weight, depthwise, im2col, pointwise};
use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

/// The kind of a convolution. The padding is `(k − 1)/2` zeros on every side.
///
/// The weight's last dimension is always the filter (the output channel). The weight is
/// `[k·k·C_in, C_out]` for a full convolution (rows in the order kh, kw, channel), `[3, 3, C]` for
/// a depthwise one and `[C_in, C_out]` for a pointwise one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// A `size × size` convolution of every input channel to every output channel. Its input
    /// gradient is not implemented.
    Full {
        /// The side of the kernel.
        size: usize,
        /// The stride.
        stride: usize,
    },
    /// One 3×3 filter for each channel.
    Depthwise {
        /// The stride.
        stride: usize,
    },
    /// A 1×1 convolution: a matrix product over the channels.
    Pointwise,
}

/// The source of a convolution's input, which decides what [`backward`] computes for the input.
#[derive(Debug, Clone, Copy)]
pub enum Below<'a> {
    /// The image, whose gradient is not computed because nothing below it is trained.
    Image,
    /// A feature map, whose gradient is computed.
    Map,
    /// A feature map made by this epilogue, which gets the map's gradient unchanged. In addition to
    /// the gradient, the sums over it that the epilogue needs are computed while it is in cache.
    /// (On a GPU, a separate kernel computes these sums.)
    Epilogue(&'a Epilogue),
}

/// Computes `z[N, Ho, Wo, C_out]` from `x[N, H, W, C_in]`.
pub fn forward<'a>(kernel: Kernel, x: impl Into<FeatureMap>, w: impl Into<Weight<'a>>) -> Result<Tensor> {
    let (x, w) = (x.into(), w.into());
    match kernel {
        Kernel::Full { size, stride } => pointwise::forward(&patches(&x, size, stride)?, w),
        Kernel::Depthwise { stride } => depthwise::forward(&x, w.value, stride),
        Kernel::Pointwise => pointwise::forward(&x, w),
    }
}

/// Computes [`forward`] and the statistics of `z`.
pub fn forward_stats<'a>(
    kernel: Kernel,
    x: impl Into<FeatureMap>,
    w: impl Into<Weight<'a>>,
) -> Result<(Tensor, Stats)> {
    let (x, w) = (x.into(), w.into());
    match kernel {
        Kernel::Full { size, stride } => pointwise::forward_stats(&patches(&x, size, stride)?, w),
        Kernel::Depthwise { stride } => depthwise::forward_stats(&x, w.value, stride),
        Kernel::Pointwise => pointwise::forward_stats(&x, w),
    }
}

/// Computes `Q(φ(scale·z + shift))`, with `scale` and `shift` of shape `[C_out]`. On the CPU, `z`
/// is never in memory as a whole.
pub fn forward_normalized<'a>(
    kernel: Kernel,
    x: impl Into<FeatureMap>,
    w: impl Into<Weight<'a>>,
    affine: (&Tensor, &Tensor),
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let (x, w) = (x.into(), w.into());
    match kernel {
        Kernel::Full { size, stride } => {
            pointwise::forward_normalized(&patches(&x, size, stride)?, w, affine, act, quant)
        }
        Kernel::Depthwise { stride } => {
            depthwise::forward_normalized(&x, w.value, stride, affine, act, quant)
        }
        Kernel::Pointwise => pointwise::forward_normalized(&x, w, affine, act, quant),
    }
}

/// Computes the gradient of the weight, in the weight's shape, and, unless `below` is the image,
/// the gradient of the input `x[N, H, W, C_in]`.
///
/// # Errors
/// Returns an error if a shape or dtype is wrong, or if the input gradient of a full convolution is
/// requested.
pub fn backward(
    kernel: Kernel,
    x: impl Into<FeatureMap>,
    w: &Tensor,
    gz: &DeferredGradient,
    below: Below<'_>,
) -> Result<(Tensor, Option<MapGradient>)> {
    let x = x.into();
    let epilogue = match below {
        Below::Image => return Ok((grad_weight(kernel, &x, &gz.tensor()?)?, None)),
        Below::Map => None,
        Below::Epilogue(epilogue) => Some(epilogue),
    };
    let (gw, gx) = match kernel {
        Kernel::Full { .. } => {
            let message = "a full convolution has no gradient of its input; only an image can lie below it";
            return Err(Check("convolution::backward").setting(message.into()));
        }
        Kernel::Depthwise { stride } => depthwise::backward(&x, w, gz, stride, epilogue)?,
        Kernel::Pointwise => pointwise::backward(&x, w, gz, epilogue)?,
    };
    Ok((gw, Some(gx)))
}

/// Computes the gradient of the weight, in the weight's shape, from the gradient of the output,
/// `gz[N, Ho, Wo, C_out]`.
fn grad_weight(kernel: Kernel, x: &FeatureMap, gz: &Tensor) -> Result<Tensor> {
    match kernel {
        // The patches are gathered again because keeping those of the forward pass would take the
        // memory of `k·k` inputs.
        Kernel::Full { size, stride } => pointwise::grad_weight(&patches(x, size, stride)?, gz),
        Kernel::Depthwise { stride } => depthwise::grad_weight(x, gz, stride),
        Kernel::Pointwise => pointwise::grad_weight(x, gz),
    }
}

/// Gathers the patches of `x` as rows, which makes a full convolution a matrix product.
fn patches(x: &FeatureMap, size: usize, stride: usize) -> Result<Tensor> {
    im2col::forward(&x.to_float()?, size, stride)
}

impl Kernel {
    /// Returns the side of the kernel.
    pub fn side(self) -> usize {
        match self {
            Self::Full { size, .. } => size,
            Self::Depthwise { .. } => 3,
            Self::Pointwise => 1,
        }
    }

    /// Returns the number of positions (taps) of the kernel.
    pub fn taps(self) -> usize {
        self.side() * self.side()
    }

    /// Returns the stride.
    pub fn stride(self) -> usize {
        match self {
            Self::Full { stride, .. } | Self::Depthwise { stride } => stride,
            Self::Pointwise => 1,
        }
    }

    /// Returns the height or width of the output for that of the input.
    pub fn output_size(self, input: usize) -> usize {
        (input - 1) / self.stride() + 1
    }

    /// Returns whether output channel `c` reads only input channel `c`.
    pub fn is_depthwise(self) -> bool {
        matches!(self, Self::Depthwise { .. })
    }

    /// Returns the shape of the weight for the given numbers of channels.
    ///
    /// A depthwise kernel has one filter per input channel, so its shape depends only on `filters`.
    pub fn weight_dims(self, inputs: usize, filters: usize) -> Vec<usize> {
        match self {
            Self::Full { .. } => vec![self.taps() * inputs, filters],
            Self::Depthwise { .. } => vec![3, 3, filters],
            Self::Pointwise => vec![inputs, filters],
        }
    }

    /// Returns the number of filters of a weight.
    pub fn filters(self, weight: &Tensor) -> usize {
        *weight.dims().last().expect("weights have at least two dimensions")
    }

    /// Returns the number of input channels of a weight.
    pub fn input_channels(self, weight: &Tensor) -> usize {
        if self.is_depthwise() { self.filters(weight) } else { weight.dims()[0] / self.taps() }
    }

    /// Returns the shape of the weight in PyTorch, `[C_out, C_in, k, k]`, with `C_in = 1` for a
    /// depthwise kernel.
    pub fn pytorch_dims(self, inputs: usize, filters: usize) -> [usize; 4] {
        [filters, if self.is_depthwise() { 1 } else { inputs }, self.side(), self.side()]
    }

    /// Converts a weight from PyTorch's layout.
    pub fn weight_from_pytorch(self, weight: &Tensor) -> Result<Tensor> {
        let (filters, inputs, ..) = weight.dims4()?;
        Ok(weight.permute((2, 3, 1, 0))?.reshape(self.weight_dims(inputs, filters))?)
    }

    /// Reshapes a weight to `[taps, C_in, C_out]`, or to `[taps, C]` for a depthwise kernel.
    fn by_taps(self, weight: &Tensor) -> Result<Tensor> {
        let (taps, filters) = (self.taps(), self.filters(weight));
        Ok(match self {
            Self::Depthwise { .. } => weight.reshape((taps, filters))?,
            _ => weight.reshape((taps, self.input_channels(weight), filters))?,
        })
    }

    /// Computes the response `[C_out]` to a constant input, away from the border.
    ///
    /// Every position of the input holds the same values `input[C_in]`, and no tap lies in the
    /// padding.
    pub fn response(self, weight: &Tensor, input: &Tensor) -> Result<Tensor> {
        let summed = self.by_taps(weight)?.sum(0)?;
        Ok(match self {
            Self::Depthwise { .. } => (summed * input)?,
            _ => summed.broadcast_mul(&input.unsqueeze(D::Minus1)?)?.sum(0)?,
        })
    }

    /// Returns the largest |weight| of each filter, `[C_out]`.
    pub fn filter_ranges(self, weight: &Tensor) -> Result<Tensor> {
        Ok(weight.abs()?.flatten_to(D::Minus2)?.max(0)?)
    }

    /// Returns the largest |weight| applied to each input channel, `[C_in]`.
    pub fn input_ranges(self, weight: &Tensor) -> Result<Tensor> {
        let largest = self.by_taps(&weight.abs()?)?.max(0)?;
        Ok(if self.is_depthwise() { largest } else { largest.max(D::Minus1)? })
    }

    /// Returns the weight with the elements for input channel `i` multiplied by `factors[i]`.
    pub fn scale_inputs(self, weight: &Tensor, factors: &Tensor) -> Result<Tensor> {
        let factors = if self.is_depthwise() { factors.clone() } else { factors.unsqueeze(D::Minus1)? };
        Ok(self.by_taps(weight)?.broadcast_mul(&factors)?.reshape(weight.shape())?)
    }

    /// Returns the weight with only the input channels in `channels`, which are `u32` indices.
    ///
    /// For a depthwise kernel, this selects its filters.
    pub fn select_inputs(self, weight: &Tensor, channels: &Tensor) -> Result<Tensor> {
        if self.is_depthwise() {
            return self.select_filters(weight, channels);
        }
        let dims = self.weight_dims(channels.elem_count(), self.filters(weight));
        Ok(self.by_taps(weight)?.contiguous()?.index_select(channels, 1)?.reshape(dims)?)
    }

    /// Returns the weight with only the filters in `filters`, which are `u32` indices.
    pub fn select_filters(self, weight: &Tensor, filters: &Tensor) -> Result<Tensor> {
        Ok(weight.contiguous()?.index_select(filters, weight.rank() - 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::norm;
    use crate::testing::*;
    use candle_core::Device;

    const KERNELS: [Kernel; 6] = [
        Kernel::Full { size: 3, stride: 1 },
        Kernel::Full { size: 5, stride: 2 },
        Kernel::Full { size: 1, stride: 1 },
        Kernel::Depthwise { stride: 1 },
        Kernel::Depthwise { stride: 2 },
        Kernel::Pointwise,
    ];

    /// Returns each kernel with its numbers of input channels and filters.
    fn cases() -> impl Iterator<Item = (Kernel, usize, usize)> {
        KERNELS.into_iter().map(|kernel| (kernel, if kernel.is_depthwise() { 7 } else { 5 }, 7))
    }

    /// Computes Candle's convolution, which uses PyTorch's layouts, of a map and a weight in our
    /// layouts.
    fn reference(kernel: Kernel, x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        let (side, filters, inputs) = (kernel.side(), kernel.filters(weight), x.dim(3)?);
        let groups = if kernel.is_depthwise() { inputs } else { 1 };
        let weight =
            weight.reshape((side, side, inputs / groups, filters))?.permute((3, 2, 0, 1))?.contiguous()?;
        let x = x.permute((0, 3, 1, 2))?.contiguous()?;
        let z = x.conv2d(&weight, (side - 1) / 2, kernel.stride(), 1, groups)?;
        z.permute((0, 2, 3, 1))?.contiguous()
    }

    /// Checks a gradient by linearity in the operand: `⟨∂operand, d⟩ = ⟨∂z, convolution of d⟩` for
    /// any `d` in place of the operand.
    #[track_caller]
    fn check_gradient(
        gradient: &Tensor,
        gz: &Tensor,
        of: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
        context: &str,
    ) {
        for seed in 10..13 {
            let direction = random(seed, gradient.dims());
            let products = |a: &Tensor, b: &Tensor| -> Vec<f64> {
                elements(a).iter().zip(elements(b)).map(|(a, b)| a * b).collect()
            };
            let (found, expected) = (products(gradient, &direction), products(gz, &of(&direction).unwrap()));
            let size: f64 = expected.iter().map(|product| product.abs()).sum();
            let difference = found.iter().sum::<f64>() - expected.iter().sum::<f64>();
            assert!(difference.abs() <= 1e-6 * size + 1e-6, "{context}: off by {difference} of {size}");
        }
    }

    #[test]
    fn every_kind_is_candles_convolution() {
        for (kernel, inputs, filters) in cases() {
            let weight = random(1, &kernel.weight_dims(inputs, filters));
            assert_eq!((kernel.input_channels(&weight), kernel.filters(&weight)), (inputs, filters));
            let (scale, shift) = (random(2, &[filters]), random(3, &[filters]));
            for (n, h, w) in MAPS {
                let context = format!("{kernel:?}, {n}×{h}×{w}");
                let x = random(4, &[n, h, w, inputs]);
                let z = forward(kernel, &x, &weight).unwrap();
                assert_eq!(z.dims(), [n, kernel.output_size(h), kernel.output_size(w), filters], "{context}");
                assert_close(&z, &reference(kernel, &x, &weight).unwrap(), 1e-5, &context);
                let (again, stats) = forward_stats(kernel, &x, &weight).unwrap();
                assert_eq!(elements(&again), elements(&z), "{context}");
                assert_close(&stats.mean, &norm::channel_stats(&z).unwrap().mean, 1e-6, &context);
                let (affine, act) = ((&scale, &shift), Activation::Relu);
                let y = forward_normalized(kernel, &x, &weight, affine, act, None).unwrap();
                let expected = norm::forward(&z, &scale, &shift, act, None).unwrap();
                assert_eq!(
                    elements(&y.to_float().unwrap()),
                    elements(&expected.to_float().unwrap()),
                    "{context}"
                );

                // The normalization is the identity, so `gz` is `gy`.
                let gy = random(5, z.dims());
                let (ones, zeros) = (scale.ones_like().unwrap(), scale.zeros_like().unwrap());
                let of_z = Epilogue::affine(&z, &ones, &zeros, Activation::Identity, None).unwrap();
                let gz = of_z.backward(&gy.clone().into()).unwrap().z;
                let (gw, no_gx) = backward(kernel, &x, &weight, &gz, Below::Image).unwrap();
                assert!(no_gx.is_none(), "{context}");
                check_gradient(&gw, &gy, |weight| reference(kernel, &x, weight), &context);
                if let Kernel::Full { .. } = kernel {
                    let error = backward(kernel, &x, &weight, &gz, Below::Map).unwrap_err().to_string();
                    assert!(error.contains("no gradient of its input"), "{error}");
                    continue;
                }
                let (gw_again, gx) = backward(kernel, &x, &weight, &gz, Below::Map).unwrap();
                assert_close(&gw_again, &gw, 1e-5, &context);
                check_gradient(&gx.unwrap().tensor, &gy, |x| reference(kernel, x, &weight), &context);
                let below = epilogue(x.dims(), None);
                let (_, gx) = backward(kernel, &x, &weight, &gz, Below::Epilogue(&below)).unwrap();
                assert_sums(&below, &gx.unwrap(), &context);
            }
        }
    }

    #[test]
    fn weights_come_from_pytorchs() {
        for (kernel, inputs, filters) in cases() {
            let pytorch = random(1, &kernel.pytorch_dims(inputs, filters));
            let weight = kernel.weight_from_pytorch(&pytorch).unwrap();
            let x = random(2, &[2, 5, 6, inputs]);
            let groups = if kernel.is_depthwise() { inputs } else { 1 };
            let nchw = x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
            let expected =
                nchw.conv2d(&pytorch, (kernel.side() - 1) / 2, kernel.stride(), 1, groups).unwrap();
            let expected = expected.permute((0, 2, 3, 1)).unwrap();
            assert_close(&forward(kernel, &x, &weight).unwrap(), &expected, 1e-5, &format!("{kernel:?}"));
        }
    }

    /// Checks that the operations on weights give the same results in PyTorch's layout, where
    /// filters are the first dimension and input channels the second. In a depthwise weight, the
    /// channels are the first dimension.
    #[test]
    fn channels_are_where_pytorch_has_them() {
        for (kernel, inputs, filters) in cases() {
            let context = format!("{kernel:?}");
            let pytorch = random(1, &kernel.pytorch_dims(inputs, filters));
            let ours = |pytorch: &Tensor| {
                elements(&kernel.weight_from_pytorch(&pytorch.contiguous().unwrap()).unwrap())
            };
            let weight = kernel.weight_from_pytorch(&pytorch).unwrap();
            let dim = if kernel.is_depthwise() { 0 } else { 1 };
            let largest = |dim: usize| {
                let by_channel = pytorch.abs().unwrap().transpose(0, dim).unwrap().flatten_from(1).unwrap();
                elements(&by_channel.max(1).unwrap())
            };
            assert_eq!(elements(&kernel.filter_ranges(&weight).unwrap()), largest(0), "{context}");
            assert_eq!(elements(&kernel.input_ranges(&weight).unwrap()), largest(dim), "{context}");
            let factors = random(2, &[inputs]);
            let mut shape = [1; 4];
            shape[dim] = inputs;
            let scaled = pytorch.broadcast_mul(&factors.reshape(&shape).unwrap()).unwrap();
            assert_eq!(
                elements(&kernel.scale_inputs(&weight, &factors).unwrap()),
                ours(&scaled),
                "{context}"
            );
            let some = Tensor::new(&[0u32, 2, 3], &Device::Cpu).unwrap();
            for (selected, dim) in [
                (kernel.select_filters(&weight, &some).unwrap(), 0),
                (kernel.select_inputs(&weight, &some).unwrap(), dim),
            ] {
                assert_eq!(
                    elements(&selected),
                    ours(&pytorch.index_select(&some, dim).unwrap()),
                    "{context}"
                );
            }
        }
    }

    #[test]
    fn responses_are_outputs_inside_the_border() {
        for (kernel, inputs, filters) in cases() {
            let (weight, input) = (random(1, &kernel.weight_dims(inputs, filters)), random(2, &[inputs]));
            let z = forward(
                kernel,
                &input.broadcast_as((1, 9, 9, inputs)).unwrap().contiguous().unwrap(),
                &weight,
            )
            .unwrap();
            let middle = z.dims()[1] / 2;
            let expected = z.get(0).unwrap().get(middle).unwrap().get(middle).unwrap();
            assert_close(&kernel.response(&weight, &input).unwrap(), &expected, 1e-5, &format!("{kernel:?}"));
        }
    }
}
