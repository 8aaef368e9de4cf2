//! The end of a residual branch: the sum of the branch and its shortcut, quantized.
//!
//! `y = Q(a + b)`. The gradient of the sum is that of either input; it follows from `y`'s by
//! [`crate::quantize::backward`].

mod gpu;

use crate::cpu::{self, CHUNK, Check, open, simd};
use crate::feature::{OpenInput, Source, byte};
use crate::norm::tiled;
use crate::{FeatureMap, Input, Quantizer, Result, profile};
use candle_core::{Device, Tensor};
use quant_core::Grid;
use std::mem::MaybeUninit;
use std::ops::Range;

/// `a + b`.
pub fn add<'a>(a: &Tensor, b: impl Into<Input<'a>>) -> Result<Tensor> {
    match add_quantize(a, b, None)? {
        FeatureMap::Float(sum) => Ok(sum),
        _ => unreachable!("there is no quantizer"),
    }
}

/// `Q(a + b)`.
pub fn add_quantize<'a>(
    a: &Tensor,
    b: impl Into<Input<'a>>,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let check = Check("residual::add_quantize");
    check.quantizer(quant)?;
    let b = b.into();
    let written = if quant.is_some() { 1 } else { 4 };
    let _note = profile::note(check.0, 0, b.bytes() + (4 + written) * a.elem_count());
    if crate::gpu::runs(a.device()) {
        return gpu::add_quantize(&check, a, b, quant);
    }
    let (a, b) = operands(&check, a, b)?;
    let dims = a.dims();
    let (a, b) = (open(&a), b.opened());
    let (a, b) = (a.floats()?, Source::new(&b)?);
    // SAFETY: both functions write all of `y`, which is as long as its parts of `a` and `b`.
    #[allow(unsafe_code)]
    unsafe {
        match quant {
            None => {
                let fill = |(): &mut (), part: Range<usize>, y: &mut [_]| {
                    sums(&a[part.clone()], b.part(part), y);
                };
                let (y, _) = cpu::blocks((a.len(), 1), CHUNK, || (), fill);
                Ok(FeatureMap::Float(Tensor::from_vec(y, dims, &Device::Cpu)?))
            }
            Some(quant) => {
                let grid = cpu::grid(quant)?;
                let fill = |(): &mut (), part: Range<usize>, y: &mut [_]| {
                    levels_of_sums(&a[part.clone()], b.part(part), y, &grid);
                };
                let (y, _) = cpu::blocks((a.len(), 1), CHUNK, || (), fill);
                FeatureMap::of_levels(y, dims, quant)
            }
        }
    }
}

/// The sum `scale·z + shift + b`, with `scale` and `shift` `[C]`, of the shape of `z`, and its smallest and
/// largest element, `[2]`.
pub fn add_normalized<'a>(
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    b: impl Into<Input<'a>>,
) -> Result<(Tensor, Tensor)> {
    let check = Check("residual::add_normalized");
    let (rows, c) = check.rows("z", z)?;
    let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
    let b = b.into();
    let _note = profile::note(check.0, 0, b.bytes() + 8 * z.elem_count());
    if crate::gpu::runs(z.device()) {
        return gpu::add_normalized(&check, z, &scale, &shift, b);
    }
    let (scale, shift) = (tiled(&scale)?, tiled(&shift)?);
    let (z, b) = operands(&check, z, b)?;
    let dims = z.dims();
    let (z, b) = (open(&z), b.opened());
    let (z, b) = (z.floats()?, Source::new(&b)?);
    let per_block = (CHUNK / scale.len()).max(1) * (scale.len() / c);
    let fill = |(): &mut (), part: Range<usize>, sum: &mut [MaybeUninit<f32>]| {
        let part = part.start * c..part.end * c;
        normalized_sums(&z[part.clone()], b.part(part), sum, &scale, &shift)
    };
    // SAFETY: `normalized_sums` writes all of the sums.
    #[allow(unsafe_code)]
    let (sum, ranges) = unsafe { cpu::blocks((rows, c), per_block, || (), fill) };
    let range = ranges.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |a, b| (a.0.min(b.0), a.1.max(b.1)));
    Ok((Tensor::from_vec(sum, dims, &Device::Cpu)?, Tensor::new(&[range.0, range.1], &Device::Cpu)?))
}

fn same_dims(check: &Check, a: &Tensor, b: Input<'_>) -> Result<()> {
    if a.dims() != b.dims() {
        return Err(check.sizes("b", b.dims(), format!("{:?}", a.dims())));
    }
    Ok(())
}

fn operands(check: &Check, a: &Tensor, b: Input<'_>) -> Result<(Tensor, OpenInput)> {
    same_dims(check, a, b)?;
    let b = match b {
        // Its parts are not whole rows here.
        Input::Normalized(_) => Input::Float(&b.to_float()?).open(check, "b")?,
        _ => b.open(check, "b")?,
    };
    Ok((check.float("a", a)?, b))
}

/// `f(a, b)` of each pair of elements.
#[inline(always)]
fn pairs<T>(a: &[f32], b: Source<'_>, y: &mut [MaybeUninit<T>], f: impl Fn(f32) -> T) {
    assert_eq!(a.len(), y.len());
    match b {
        Source::Float(b) => y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| {
            y.write(f(a + b));
        }),
        Source::Levels(b, grid) => y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| {
            y.write(f(a + grid.value(f32::from(*b))));
        }),
        Source::Normalized(..) => unreachable!("`operands` computes it"),
    }
}

simd! {
    fn sums(a: &[f32], b: Source<'_>, y: &mut [MaybeUninit<f32>]) {
        pairs(a, b, y, |sum| sum);
    }
}

simd! {
    fn levels_of_sums(a: &[f32], b: Source<'_>, y: &mut [MaybeUninit<u8>], grid: &Grid) {
        let grid = *grid;
        pairs(a, b, y, |sum| byte(grid.level(sum)));
    }
}

simd! {
    fn normalized_sums(
        z: &[f32],
        b: Source<'_>,
        sums: &mut [MaybeUninit<f32>],
        scale: &[f32],
        shift: &[f32],
    ) -> (f32, f32) {
        let tile = scale.len();
        let (mut lo, mut hi) = (f32::INFINITY, f32::NEG_INFINITY);
        let mut normalized = vec![0.0; tile];
        for (i, (z, sums)) in z.chunks(tile).zip(sums.chunks_mut(tile)).enumerate() {
            let normalized = &mut normalized[..z.len()];
            for (((u, z), scale), shift) in normalized.iter_mut().zip(z).zip(scale).zip(shift) {
                *u = z.mul_add(*scale, *shift);
            }
            pairs(normalized, b.part(i * tile..i * tile + z.len()), sums, |sum| sum);
            // SAFETY: just written.
            #[allow(unsafe_code)]
            for sum in unsafe { sums.assume_init_ref() } {
                lo = if *sum < lo { *sum } else { lo };
                hi = if *sum > hi { *sum } else { hi };
            }
        }
        (lo, hi)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use crate::{Activation, norm, quantize};
    use quant_core::Bits;

    #[test]
    fn is_the_sum_then_the_quantizer() {
        for dims in [&[1, 1, 1, 3][..], &[2, 5, 3, 7], &LARGE[0]] {
            let (a, b) = (random(1, dims), random(2, dims));
            let range = tensor(&[-0.7, 1.1]);
            let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
            let levels = FeatureMap::quantize(&b, Some(quant)).unwrap();
            for (b, input) in [(b.clone(), Input::from(&b)), (levels.to_float().unwrap(), (&levels).into())] {
                let sum = (&a + &b).unwrap();
                assert_eq!(elements(&add(&a, input).unwrap()), elements(&sum));
                let expected = quantize::forward(&sum, quant).unwrap();
                let found = add_quantize(&a, input, Some(quant)).unwrap().to_float().unwrap();
                assert_eq!(elements(&found), elements(&expected));
                // Normalized first.
                let c = dims[dims.len() - 1];
                let (scale, shift) = (random(3, &[c]), random(4, &[c]));
                let (found, range) = add_normalized(&a, &scale, &shift, input).unwrap();
                let y = norm::forward(&a, &scale, &shift, Activation::Identity, None).unwrap();
                let expected = (y.to_float().unwrap() + &b).unwrap();
                assert_eq!(elements(&found), elements(&expected));
                assert_eq!(elements(&range), elements(&quantize::min_max(&expected).unwrap()));
            }
        }
        assert!(add_quantize(&random(1, &[2, 3]), &random(2, &[3, 2]), None).is_err());
    }

    #[test]
    fn a_tensor_can_be_added_to_itself() {
        let a = random(1, &[40]);
        assert_eq!(elements(&add(&a, &a).unwrap()), elements(&(&a * 2.0).unwrap()));
    }

    #[test]
    fn same_bits_everywhere() {
        let (a, b) = (random(1, &[3001, 100]), random(2, &[3001, 100]));
        let (scale, shift, range) = (random(3, &[100]), random(4, &[100]), tensor(&[-0.7, 1.1]));
        let quant = Some(Quantizer { range: &range, bits: Bits::new(5).unwrap() });
        let levels = FeatureMap::quantize(&b, quant).unwrap();
        assert_same_everywhere(|| {
            let (sum, range) = add_normalized(&a, &scale, &shift, &levels).unwrap();
            vec![add_quantize(&a, &b, quant).unwrap().to_float().unwrap(), sum, range]
        });
    }
}
