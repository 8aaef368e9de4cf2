//! The end of a residual branch: the quantized sum of the branch and its shortcut.
//!
//! `y = Q(a + b)`. Both inputs have the gradient of the sum, which [`crate::quantize::backward`]
//! computes from the gradient of `y`.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, simd};
use crate::elements::{Element, Sink, Stored, by_element};
use crate::tile::{block_rows, tiled};
use crate::work::{CHUNK, Progress, Written, blocks, write_with};
use crate::{FeatureMap, Quantizer, Result, profiler};
use candle_core::Tensor;
use std::mem::MaybeUninit;

/// Computes `a + b`.
pub fn add(a: &Tensor, b: impl Into<FeatureMap>) -> Result<Tensor> {
    sum(&Check("residual::add"), a, &b.into(), None)?.to_float()
}

/// Computes `Q(a + b)`.
pub fn add_quantize(
    a: &Tensor,
    b: impl Into<FeatureMap>,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    sum(&Check("residual::add_quantize"), a, &b.into(), quant)
}

fn sum(check: &Check, a: &Tensor, b: &FeatureMap, quant: Option<Quantizer<'_>>) -> Result<FeatureMap> {
    check.quantizer(quant)?;
    let read = a.dtype().size_in_bytes();
    let written = if quant.is_some() { 1 } else { read };
    let _note = profiler::note(check.0, 0, b.bytes() + (read + written) * a.elem_count());
    if crate::gpu::runs(a.device()) {
        return Ok(FeatureMap::of(gpu::add(check, a, b, quant)?, a.dtype(), quant));
    }
    by_element!(a.dtype(), T => with_operands::<T, _>(check, a, b, |x, b| {
        FeatureMap::write::<T, _>(
            a.dims(),
            (x.len(), 1),
            quant,
            CHUNK,
            || (),
            |(), part, y| sums(&x[part.clone()], b.part(part), y),
        )
    }))
}

/// Computes the sum `scale·z + shift + b`, of the shape of `z`, and its smallest and largest
/// element, `[2]`; `scale` and `shift` are `[C]`.
pub fn add_normalized(
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    b: impl Into<FeatureMap>,
) -> Result<(Tensor, Tensor)> {
    fn of(z: &Tensor, scale: &Tensor, shift: &Tensor, b: &FeatureMap) -> Result<(Tensor, Tensor)> {
        let check = Check("residual::add_normalized");
        let (rows, c) = check.rows("z", z)?;
        let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
        let _note = profiler::note(check.0, 0, b.bytes() + 2 * z.dtype().size_in_bytes() * z.elem_count());
        if crate::gpu::runs(z.device()) {
            return gpu::add_normalized(&check, z, &scale, &shift, b);
        }
        let (scale, shift) = (tiled(&scale)?, tiled(&shift)?);
        by_element!(z.dtype(), T => with_operands::<T, _>(&check, z, b, |x, b| {
            let (sum, ranges) = blocks(
                (rows, c),
                block_rows(c),
                || (),
                |(), rows, sum| {
                    let part = rows.start * c..rows.end * c;
                    normalized_sums(&x[part.clone()], b.part(part), sum, &scale, &shift)
                },
            );
            let range =
                ranges.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |a, b| (a.0.min(b.0), a.1.max(b.1)));
            Ok((cpu::tensor::<T>(sum, z.dims())?, cpu::tensor(vec![range.0, range.1], 2)?))
        }))
    }
    of(z, scale, shift, &b.into())
}

fn same_dims(check: &Check, a: &Tensor, b: &FeatureMap) -> Result<()> {
    if a.dims() != b.dims() {
        return Err(check.sizes("b", b.dims(), format!("{:?}", a.dims())));
    }
    Ok(())
}

/// Checks the operands, and calls `f` with their elements.
fn with_operands<T: Element, R>(
    check: &Check,
    a: &Tensor,
    b: &FeatureMap,
    f: impl FnOnce(&[T], Stored<'_, T>) -> Result<R>,
) -> Result<R> {
    same_dims(check, a, b)?;
    let a = check.dtype("a", a, T::DTYPE)?;
    b.read_stored(check, "b", |b| f(open(&a).elements()?, b))
}

simd! {
    /// Writes the sum of each pair of elements.
    fn sums<'y, T: Element>(a: &[T], b: Stored<'_, T>, y: Sink<'y, T>) -> Written<'y> {
        assert!(a.len() == y.len() && b.len() == y.len());
        match b {
            Stored::Floats(b) => y.write_with(|i| a[i].float() + b[i].float()),
            Stored::Levels(b, grid) => y.write_with(|i| a[i].float() + grid.value(f32::from(b[i]))),
        }
    }
}

simd! {
    /// Writes `scale·z + shift + b` of whole rows, and returns the smallest and the largest sum.
    fn normalized_sums<'y, T: Element>(
        z: &[T],
        b: Stored<'_, T>,
        sums: &'y mut [MaybeUninit<T>],
        scale: &[f32],
        shift: &[f32],
    ) -> (Written<'y>, (f32, f32)) {
        let (mut lo, mut hi) = (f32::INFINITY, f32::NEG_INFINITY);
        let (mut sums, tile) = (Progress::new(sums), scale.len());
        for (i, z) in z.chunks(tile).enumerate() {
            let b = b.part(i * tile..i * tile + z.len());
            let written = sums.next(z.len(), |y| {
                let n = y.len();
                let (z, scale, shift) = (&z[..n], &scale[..n], &shift[..n]);
                let normalized = |i: usize| z[i].float().mul_add(scale[i], shift[i]);
                match b {
                    Stored::Floats(b) => {
                        let b = &b[..n];
                        write_with(y, |i| T::nearest(normalized(i) + b[i].float())).into()
                    }
                    Stored::Levels(b, grid) => {
                        let b = &b[..n];
                        write_with(y, |i| T::nearest(normalized(i) + grid.value(f32::from(b[i])))).into()
                    }
                }
            });
            for sum in written {
                let sum = sum.float();
                lo = if sum < lo { sum } else { lo };
                hi = if sum > hi { sum } else { hi };
            }
        }
        (sums.finish().into(), (lo, hi))
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
            for (b, input) in [(b.clone(), FeatureMap::from(&b)), (levels.to_float().unwrap(), levels)] {
                let sum = (&a + &b).unwrap();
                assert_eq!(elements(&add(&a, &input).unwrap()), elements(&sum));
                let expected = quantize::forward(&sum, quant).unwrap();
                let found = add_quantize(&a, &input, Some(quant)).unwrap().to_float().unwrap();
                assert_eq!(elements(&found), elements(&expected));
                // The same with a normalized first operand.
                let c = dims[dims.len() - 1];
                let (scale, shift) = (random(3, &[c]), random(4, &[c]));
                let (found, range) = add_normalized(&a, &scale, &shift, &input).unwrap();
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
