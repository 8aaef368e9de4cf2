//! Convolutions that compute their output block by block, and the work done on a block while it is
//! in cache.
//!
//! A block is a range of rows (positions) of the output. In training, its statistics are computed
//! at once ([`with_stats`]). In evaluation, it is normalized and quantized at once, and the
//! convolution's output is never written to memory ([`normalized`]).

use crate::affine::AffineActivation;
use crate::cpu;
use crate::elements::Element;
use crate::moments::MomentAccumulator;
use crate::norm::Stats;
use crate::work::{MAX_PARTS, Progress, Written, append, blocks};
use crate::{FeatureMap, Quantizer, Result};
use candle_core::Tensor;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A convolution with its operands that computes its output block by block.
pub(crate) trait Blockwise: Sync {
    /// The type of the output's elements in memory.
    type Element: Element;

    /// The scratch memory of a thread.
    type Scratch: Send;

    /// Returns the output's dimensions, channels last.
    fn dims(&self) -> &[usize];

    /// Returns the number of rows in a block. A block should fit in cache together with the data
    /// from which it is computed.
    fn rows_per_block(&self) -> usize;

    fn scratch(&self) -> Self::Scratch;

    /// Writes output rows `rows`, which begin at a multiple of [`Blockwise::rows_per_block`], to
    /// `z`.
    fn compute<'z>(
        &self,
        scratch: &mut Self::Scratch,
        rows: Range<usize>,
        z: &'z mut [MaybeUninit<f32>],
    ) -> Written<'z>;
}

/// Returns the numbers of rows and channels of the output.
fn size(convolution: &impl Blockwise) -> (usize, usize) {
    let dims = convolution.dims();
    let channels = dims[dims.len() - 1];
    (dims.iter().product::<usize>() / channels, channels)
}

/// Computes the output.
pub(crate) fn plain<C: Blockwise>(convolution: &C) -> Result<Tensor> {
    let (per_block, init) = (convolution.rows_per_block(), || (convolution.scratch(), Vec::new()));
    let (rows, c) = size(convolution);
    let (z, _) = blocks((rows, c), per_block, init, |(scratch, floats), rows, z| {
        let mut block = Progress::<C::Element>::new(z);
        Element::next_floats(&mut block, rows.len() * c, floats, |z| convolution.compute(scratch, rows, z));
        (block.finish().into(), ())
    });
    cpu::tensor(z, convolution.dims())
}

/// Computes the output and the statistics of its values as they are stored.
///
/// The statistics are summed up in parts of several blocks. The number of parts depends only on the
/// shape.
pub(crate) fn with_stats<C: Blockwise>(convolution: &C) -> Result<(Tensor, Stats)> {
    let (rows, c) = size(convolution);
    let per_block = convolution.rows_per_block();
    let per_part = rows.div_ceil(MAX_PARTS).next_multiple_of(per_block);
    let (z, moments) = blocks(
        (rows, c),
        per_part,
        || (convolution.scratch(), Vec::new()),
        |(scratch, floats), rows, z| {
            let mut moments = MomentAccumulator::new(c);
            let mut part = Progress::<C::Element>::new(z);
            for start in rows.clone().step_by(per_block) {
                let rows = start..rows.end.min(start + per_block);
                moments.add(Element::next_floats(&mut part, rows.len() * c, floats, |z| {
                    convolution.compute(scratch, rows, z)
                }));
            }
            let z = &*part.finish();
            (z.into(), moments.finish(z))
        },
    );
    Ok((cpu::tensor(z, convolution.dims())?, Stats::of_parts(moments)?))
}

/// Computes the output, normalized, activated and quantized.
pub(crate) fn normalized<C: Blockwise>(
    convolution: &C,
    affine: &AffineActivation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let (rows, c) = size(convolution);
    let init = || (convolution.scratch(), Vec::new());
    let per_block = convolution.rows_per_block();
    FeatureMap::write::<C::Element, _>(
        convolution.dims(),
        (rows, c),
        quant,
        per_block,
        init,
        |(scratch, z), rows, y| {
            z.clear();
            let z: &[f32] = append(z, rows.len() * c, |z| convolution.compute(scratch, rows, z));
            affine.write(z, y)
        },
    )
}
