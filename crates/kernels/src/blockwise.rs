//! Convolutions that compute their output block by block, and what is done with a block while it is in cache.
//!
//! A block is some rows (positions) of the output. In training its statistics are taken at once ([`with_stats`]); in
//! evaluation it is normalized and quantized at once and never written to memory ([`normalized`]).

use crate::cpu;
use crate::moments::MomentSums;
use crate::norm::{Normalizer, Stats};
use crate::{FeatureMap, Quantizer, Result};
use candle_core::{Device, Tensor};
use std::mem::MaybeUninit;
use std::ops::Range;

/// A convolution with its operands, which computes its output block by block.
pub(crate) trait Blockwise: Sync {
    /// Scratch memory of a thread.
    type Scratch;

    /// The output's dimensions, channels last.
    fn dims(&self) -> &[usize];

    /// Rows in a block, which is to fit in cache with what it is computed from.
    fn rows_per_block(&self) -> usize;

    fn scratch(&self) -> Self::Scratch;

    /// Computes some rows of the output. Must write all of them; `rows` begins at a multiple of
    /// [`Blockwise::rows_per_block`].
    fn compute(&self, scratch: &mut Self::Scratch, rows: Range<usize>, z: &mut [MaybeUninit<f32>]);
}

/// Rows and channels of the output.
fn size(convolution: &impl Blockwise) -> (usize, usize) {
    let dims = convolution.dims();
    let channels = dims[dims.len() - 1];
    (dims.iter().product::<usize>() / channels, channels)
}

/// The elements of a block that was just computed.
#[allow(unsafe_code)]
fn written(block: &mut [MaybeUninit<f32>]) -> &[f32] {
    // SAFETY: by the trait's contract, `compute` has written all of it.
    unsafe { block.assume_init_ref() }
}

/// The output.
pub(crate) fn plain<C: Blockwise>(convolution: &C) -> Result<Tensor> {
    let (per_block, init) = (convolution.rows_per_block(), || convolution.scratch());
    // SAFETY: the trait's contract.
    #[allow(unsafe_code)]
    let (z, _) = unsafe {
        cpu::blocks(size(convolution), per_block, init, |scratch, rows, z| {
            convolution.compute(scratch, rows, z)
        })
    };
    Ok(Tensor::from_vec(z, convolution.dims(), &Device::Cpu)?)
}

/// The output and its statistics. These are summed up in parts of some blocks, whose number depends on the shape alone.
pub(crate) fn with_stats<C: Blockwise>(convolution: &C) -> Result<(Tensor, Stats)> {
    let (rows, c) = size(convolution);
    let per_block = convolution.rows_per_block();
    let per_part = rows.div_ceil(cpu::MAX_PARTS).next_multiple_of(per_block);
    let part = |scratch: &mut C::Scratch, rows: Range<usize>, z: &mut [MaybeUninit<f32>]| {
        let mut sums = MomentSums::new(c);
        for (start, block) in rows.clone().step_by(per_block).zip(z.chunks_mut(per_block * c)) {
            convolution.compute(scratch, start..rows.end.min(start + per_block), block);
            sums.add(written(block));
        }
        sums.moments(written(z))
    };
    // SAFETY: the trait's contract; the blocks cover the part.
    #[allow(unsafe_code)]
    let (z, moments) = unsafe { cpu::blocks((rows, c), per_part, || convolution.scratch(), part) };
    Ok((Tensor::from_vec(z, convolution.dims(), &Device::Cpu)?, Stats::of_parts(moments)?))
}

/// The output, normalized, activated and quantized.
pub(crate) fn normalized<C: Blockwise>(
    convolution: &C,
    normalizer: &Normalizer,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let dims = convolution.dims();
    match quant {
        None => {
            let y = each_block(convolution, |z, y| normalizer.floats(z, y));
            Ok(FeatureMap::Float(Tensor::from_vec(y, dims, &Device::Cpu)?))
        }
        Some(quant) => {
            let y = each_block(convolution, |z, y| normalizer.levels(z, y));
            FeatureMap::of_levels(y, dims, quant)
        }
    }
}

/// What `write(z, y)` makes of each block of the output; it must write all of `y`, which is as long as `z`.
fn each_block<C: Blockwise, T: Copy + Send>(
    convolution: &C,
    write: impl Fn(&[f32], &mut [MaybeUninit<T>]) + Sync + Send,
) -> Vec<T> {
    let (rows, c) = size(convolution);
    let per_block = convolution.rows_per_block();
    let init = || (convolution.scratch(), vec![MaybeUninit::uninit(); per_block.min(rows) * c]);
    let compute = |(scratch, z): &mut (C::Scratch, Vec<MaybeUninit<f32>>), rows, y: &mut [_]| {
        let z = &mut z[..y.len()];
        convolution.compute(scratch, rows, z);
        write(written(z), y);
    };
    // SAFETY: `write` writes all of its block.
    #[allow(unsafe_code)]
    let (y, _) = unsafe { cpu::blocks((rows, c), per_block, init, compute) };
    y
}
