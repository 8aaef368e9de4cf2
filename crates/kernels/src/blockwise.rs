//! Convolutions that compute their output block by block, and what is done with a block while it is in cache.
//!
//! A block is some rows (positions) of the output. In training its statistics are taken at once ([`with_stats`]); in
//! evaluation it is normalized and quantized at once and never written to memory ([`normalized`]).

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

/// A convolution with its operands, which computes its output block by block.
pub(crate) trait Blockwise: Sync {
    /// What its output is stored as.
    type Element: Element;

    /// Scratch memory of a thread.
    type Scratch: Send;

    /// The output's dimensions, channels last.
    fn dims(&self) -> &[usize];

    /// Rows in a block, which is to fit in cache with what it is computed from.
    fn rows_per_block(&self) -> usize;

    fn scratch(&self) -> Self::Scratch;

    /// Writes some rows of the output, which begin at a multiple of [`Blockwise::rows_per_block`].
    fn compute<'z>(
        &self,
        scratch: &mut Self::Scratch,
        rows: Range<usize>,
        z: &'z mut [MaybeUninit<f32>],
    ) -> Written<'z>;
}

/// Rows and channels of the output.
fn size(convolution: &impl Blockwise) -> (usize, usize) {
    let dims = convolution.dims();
    let channels = dims[dims.len() - 1];
    (dims.iter().product::<usize>() / channels, channels)
}

/// The output.
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

/// The output and its statistics, which are those of what is stored. They are summed up in parts of some blocks, whose
/// number depends on the shape alone.
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

/// The output, normalized, activated and quantized.
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
