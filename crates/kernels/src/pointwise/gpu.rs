//! The pointwise products on a GPU.
//!
//! Levels and quantized weights are multiplied as whole numbers in `bf16` if [`exact`] says that
//! the sums are exact and the GPU has products of `bf16` (compute capability 8.0 or later). In all
//! other cases:
//!
//! * With `f32` maps, floats are multiplied as they are, and levels as the floats that they stand
//!   for.
//! * With `bf16` maps, levels are multiplied as whole numbers in `bf16`, and the product is then
//!   multiplied by their step. Floats and weights are rounded to `bf16`.
//!
//! Sums are always `f32`. If the weights have a grid for each column, the product stays `f32` until
//! each column is multiplied by its step.

use super::{forward_sizes, with_channels};
use crate::check::Check;
use crate::feature::gpu::{integers, scaled, steps};
use crate::gpu::Factor::{Plain, Transposed};
use crate::gpu::grids;
use crate::gpu::product::{multiplies_bf16, product};
use crate::{FeatureMap, ProductSizes, Result, Weight, profiler};
use candle_core::{DType, Tensor};
use quant_core::Bits;

/// Returns whether a product over `k` channels, of levels of `x` bits and of `w` bits, is exact in
/// `f32` sums.
///
/// A level minus its zero point is a whole number of magnitude at most `2^b − 1`, which `bf16`,
/// with 8 bits of precision, holds exactly for `b ≤ 8`. A product of two has a magnitude of at most
/// `(2^x − 1)(2^w − 1)`, and any partial sum, in any order, at most `k` times that. `f32` holds all
/// whole numbers up to 2²⁴, so no addition rounds if this bound is at most 2²⁴. At 4 bits each,
/// `225·k ≤ 2²⁴` for up to 74,565 channels; at 8 and 7 bits for up to 518.
pub(super) fn exact(k: usize, x: Bits, w: Bits) -> bool {
    let largest = u64::from(x.max_level()) * u64::from(w.max_level());
    // Weights must fit into signed bytes, as on the CPU, so that both devices take the same path.
    w.max_level() <= 127 && (k as u64).saturating_mul(largest) <= 1 << 24
}

/// Returns a contiguous map as a matrix `[rows, channels]`.
fn matrix(map: &Tensor) -> Result<Tensor> {
    let c = map.dims()[map.dims().len() - 1];
    Ok(map.reshape((map.elem_count() / c, c))?)
}

/// Returns a feature map as an operand: its matrix, and the factor that the product must be
/// multiplied by, if any.
fn factor(check: &Check, x: &FeatureMap) -> Result<(Tensor, Option<Tensor>)> {
    Ok(match x {
        FeatureMap::Levels(levels) if levels.dtype == DType::BF16 => {
            let whole = check.dtype("x", &levels.levels, DType::U8)?;
            let quant = levels.quantizer();
            (matrix(&integers(&whole, quant)?)?, Some(steps(quant, None)?))
        }
        _ => (matrix(&check.map_float("x", &x.to_float()?)?)?, None),
    })
}

/// Returns the product `[…, Cout]`, in the dtype of the feature map.
pub(super) fn forward(check: &Check, x: &FeatureMap, w: Weight<'_>) -> Result<Tensor> {
    let sizes = forward_sizes(check, x, w)?;
    let ProductSizes { rows, columns, depth } = sizes;
    let bytes = x.bytes() + (4 * depth + x.dtype().size_in_bytes() * rows) * columns;
    let _note = profiler::note(check.0, sizes.operations(), bytes);
    let value = check.float("w", w.value)?;
    let z = match (x, w.quantized) {
        (FeatureMap::Levels(levels), Some((original, quant)))
            if exact(depth, levels.bits, quant.bits) && multiplies_bf16(value.device())? =>
        {
            check.grids(original, quant)?;
            let x = integers(&check.dtype("x", &levels.levels, DType::U8)?, levels.quantizer())?;
            let w = integers(&check.float("w", original)?, quant)?;
            let (x, factors) = (matrix(&x)?, steps(levels.quantizer(), Some(quant))?);
            if grids(quant) == 1 {
                product(Plain(&x), Plain(&w), Some(&factors), levels.dtype)?
            } else {
                scaled(&product(Plain(&x), Plain(&w), None, DType::F32)?, &factors, levels.dtype)?
            }
        }
        _ => {
            let (x_matrix, alpha) = factor(check, x)?;
            let w = value.to_dtype(x_matrix.dtype())?;
            product(Plain(&x_matrix), Plain(&w), alpha.as_ref(), x.dtype())?
        }
    };
    Ok(z.reshape(with_channels(x.dims(), columns))?)
}

/// Returns `∂z · wᵀ`, `[…, Cin]`.
pub(super) fn grad_input(gz: &Tensor, w: &Tensor) -> Result<Tensor> {
    let gx = product(Plain(&matrix(gz)?), Transposed(&w.to_dtype(gz.dtype())?), None, gz.dtype())?;
    Ok(gx.reshape(with_channels(gz.dims(), w.dims()[0]))?)
}

/// Returns `xᵀ · ∂z`, `[Cin, Cout]` in `f32`.
pub(super) fn grad_weight(check: &Check, x: &FeatureMap, gz: &Tensor) -> Result<Tensor> {
    let gz = check.dtype("gz", gz, x.dtype())?;
    let (x, alpha) = factor(check, x)?;
    product(Transposed(&x), Plain(&matrix(&gz)?), alpha.as_ref(), DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_of_exact_products() {
        let bits = |bits| Bits::new(bits).unwrap();
        assert!(exact(74_565, bits(4), bits(4)) && !exact(74_566, bits(4), bits(4)));
        assert!(exact(518, bits(8), bits(7)) && !exact(519, bits(8), bits(7)));
        assert!(!exact(1, bits(4), bits(8)));
    }

    /// Sums of the largest products are exact in f32 up to the bound, and not beyond it.
    #[test]
    fn sums_at_the_bound_are_exact() {
        let sum = |k: usize, product: f32| (0..k).fold(0f32, |sum, _| sum + product);
        assert_eq!(f64::from(sum(74_565, 225.0)), 74_565.0 * 225.0);
        assert_eq!(f64::from(sum(518, 255.0 * 127.0)), 518.0 * 255.0 * 127.0);
        assert_ne!(f64::from(sum(100_000, 225.0)), 100_000.0 * 225.0);
        // bf16 holds all these levels exactly.
        for level in -255i16..=255 {
            let tensor = Tensor::new(&[f32::from(level)], &candle_core::Device::Cpu).unwrap();
            let back = tensor.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            assert_eq!(back.to_vec1::<f32>().unwrap(), [f32::from(level)]);
        }
    }
}
