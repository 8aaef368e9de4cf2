//! The 1×1 convolution, which is a matrix product in NHWC.
//!
//! With the rows `m` running over all positions of all images, `z[m,o] = Σ_i x[m,i]·w[i,o]`, so
//! `∂x[m,i] = Σ_o ∂z[m,o]·w[i,o]` and `∂w[i,o] = Σ_m x[m,i]·∂z[m,o]`. Linear layers are the same
//! operation.
//!
//! If both operands are levels of quantizers, `x = s·(q − z)` and `w = t·v` with unsigned bytes `q`
//! and signed bytes `v`, then the product of the levels is computed exactly and multiplied by
//! `s·t`. `t` may differ between columns.
//!
//! [`backward`] computes a block of `∂z` and uses it for both gradients while it is in cache, so
//! `∂z` is never in memory as a whole. On a GPU, cuBLAS computes the products, so `∂z` is written
//! once, and statistics are computed from stored values.

mod gpu;

use crate::affine::AffineActivation;
use crate::blockwise::{self, Blockwise};
use crate::check::Check;
use crate::cpu::{self, open};
use crate::elements::{Stored, by_element, signed_levels};
use crate::feature::Operand;
use crate::norm::{
    self, DeferredGradient, Epilogue, GradientAccumulator, GradientSums, MapGradient, OpenEpilogue, Stats,
};
use crate::product::{self, IntegerPanels, LANES, Multiplicand, Operands, Panels};
use crate::work::{CHUNK, Progress, Written, append, blocks, fill};
use crate::{Activation, FeatureMap, ProductSizes, Quantizer, Result, Weight, profiler};
use candle_core::Tensor;
use quant_core::Grid;
use std::iter;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Computes `z = x[…, Cin] · w[Cin, Cout]`, of shape `[…, Cout]`.
pub fn forward<'a>(x: impl Into<FeatureMap>, w: impl Into<Weight<'a>>) -> Result<Tensor> {
    fn of(x: &FeatureMap, w: Weight<'_>) -> Result<Tensor> {
        let check = Check("pointwise::forward");
        if crate::gpu::runs(w.value.device()) {
            return gpu::forward(&check, x, w);
        }
        by_element!(x.dtype(), T => with_product::<T, _>(&check, x, w, |product| blockwise::plain(product)))
    }
    of(&x.into(), w.into())
}

/// Computes [`forward`] and the statistics of `z`.
pub fn forward_stats<'a>(x: impl Into<FeatureMap>, w: impl Into<Weight<'a>>) -> Result<(Tensor, Stats)> {
    fn of(x: &FeatureMap, w: Weight<'_>) -> Result<(Tensor, Stats)> {
        let check = Check("pointwise::forward_stats");
        if crate::gpu::runs(w.value.device()) {
            let z = gpu::forward(&check, x, w)?;
            let stats = norm::channel_stats(&z)?;
            return Ok((z, stats));
        }
        by_element!(x.dtype(), T => with_product::<T, _>(&check, x, w, |product| blockwise::with_stats(product)))
    }
    of(&x.into(), w.into())
}

/// Computes `Q(φ(scale·z + shift))`, with `scale` and `shift` of shape `[Cout]`.
pub fn forward_normalized<'a>(
    x: impl Into<FeatureMap>,
    w: impl Into<Weight<'a>>,
    affine: (&Tensor, &Tensor),
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    fn of(
        x: &FeatureMap,
        w: Weight<'_>,
        (scale, shift): (&Tensor, &Tensor),
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<FeatureMap> {
        let check = Check("pointwise::forward_normalized");
        if crate::gpu::runs(w.value.device()) {
            let z = gpu::forward(&check, x, w)?;
            return norm::forward(&z, scale, shift, act, quant);
        }
        check.quantizer(quant)?;
        by_element!(x.dtype(), T => with_product::<T, _>(&check, x, w, |product| {
            let affine = AffineActivation::new(&check, product.sizes.columns, scale, shift, act)?;
            blockwise::normalized(product, &affine, quant)
        }))
    }
    of(&x.into(), w.into(), affine, act, quant)
}

/// Computes the gradient of the input, `∂z[…, Cout] · wᵀ`, of shape `[…, Cin]`.
pub fn grad_input(gz: &Tensor, w: &Tensor) -> Result<Tensor> {
    let check = Check("pointwise::grad_input");
    let (rows, depth) = check.rows("gz", gz)?;
    let columns = match w.dims() {
        &[columns, found] if found == depth && columns > 0 => columns,
        _ => return Err(check.shape("w", w, format!("[input channels, {depth}]"))),
    };
    let sizes = ProductSizes { rows, columns, depth };
    let bytes = gz.dtype().size_in_bytes() * rows * (depth + columns) + 4 * depth * columns;
    let _note = profiler::note(check.0, sizes.operations(), bytes);
    let (gz, w) = (check.map_float("gz", gz)?, check.float("w", w)?);
    if crate::gpu::runs(gz.device()) {
        return gpu::grad_input(&gz, &w);
    }
    by_element!(gz.dtype(), T => {
        let panels = Panels::<T>::transposed(open(&w).floats()?, depth);
        let opened = open(&gz);
        let factors = Factors::Floats(Operand::Stored(Stored::Floats(opened.elements()?)), panels);
        blockwise::plain(&Product { factors, dims: with_channels(gz.dims(), columns), sizes })
    })
}

/// Computes the gradient of the weight, `xᵀ · ∂z`, of shape `[Cin, Cout]`.
pub fn grad_weight(x: impl Into<FeatureMap>, gz: &Tensor) -> Result<Tensor> {
    fn of(x: &FeatureMap, gz: &Tensor) -> Result<Tensor> {
        let check = Check("pointwise::grad_weight");
        let sizes = sizes(&check, x, gz)?;
        let ProductSizes { rows, columns, depth } = sizes;
        let bytes = x.bytes() + (gz.dtype().size_in_bytes() * rows + 4 * depth) * columns;
        let _note = profiler::note(check.0, sizes.operations(), bytes);
        if crate::gpu::runs(gz.device()) {
            return gpu::grad_weight(&check, x, gz);
        }
        let gz = check.dtype("gz", gz, x.dtype())?;
        by_element!(x.dtype(), T => x.read::<T, _>(&check, "x", |x| {
            let gz = open(&gz);
            let gz = gz.elements()?;
            let of_rows = |rows: Range<usize>, block: &mut Vec<T>| {
                block.extend_from_slice(&gz[rows.start * columns..rows.end * columns]);
            };
            let (gw, ..) = gradients(x, of_rows, None, sizes);
            cpu::tensor(gw, (depth, columns))
        }))
    }
    of(&x.into(), gz)
}

/// Computes [`grad_weight`] and [`grad_input`] from the gradient `∂z` of the output:
/// `([Cin, Cout], […, Cin])`.
///
/// `below` is the epilogue that made `x`, if it gets the input gradient unchanged. Its sums are
/// then computed while that gradient is in cache. (Not on a GPU.)
pub fn backward(
    x: impl Into<FeatureMap>,
    w: &Tensor,
    gz: &DeferredGradient,
    below: Option<&Epilogue>,
) -> Result<(Tensor, MapGradient)> {
    fn of(
        x: &FeatureMap,
        w: &Tensor,
        gz: &DeferredGradient,
        below: Option<&Epilogue>,
    ) -> Result<(Tensor, MapGradient)> {
        let check = Check("pointwise::backward");
        let sizes = sizes(&check, x, gz.z())?;
        let ProductSizes { rows, columns, depth } = sizes;
        let w = check.dims("w", w, &[depth, columns])?;
        let of_maps = gz.z().dtype().size_in_bytes() * rows * (depth + 2 * columns);
        let bytes = norm::bytes_with(x, below) + of_maps + 8 * depth * columns;
        let _note = profiler::note(check.0, 2 * sizes.operations(), bytes);
        let dims = x.dims();
        if crate::gpu::runs(w.device()) {
            let gz = gz.tensor()?;
            return Ok((gpu::grad_weight(&check, x, &gz)?, gpu::grad_input(&gz, &w)?.reshape(dims)?.into()));
        }
        by_element!(x.dtype(), T => {
            let transposed = Panels::<T>::transposed(open(&w).floats()?, columns);
            let (gw, gx, sums) = x.read(&check, "x", |x| {
                gz.read::<T, _>(|gz| {
                    Epilogue::read_below(below, &check, dims, |below| {
                        let of_rows = |rows: Range<usize>, block: &mut Vec<T>| {
                            append(block, rows.len() * columns, |block| gz.rows(rows, block));
                        };
                        Ok(gradients(x, of_rows, Some((&transposed, below)), sizes))
                    })
                })
            })?;
            Ok((cpu::tensor(gw, (depth, columns))?, MapGradient { tensor: cpu::tensor(gx, dims)?, sums }))
        })
    }
    of(&x.into(), w, gz, below)
}

/// Returns the sizes of the forward product from `x[…, depth]` and `gz[…, columns]`, and checks
/// that they fit together.
fn sizes(check: &Check, x: &FeatureMap, gz: &Tensor) -> Result<ProductSizes> {
    let (rows, columns) = check.rows("gz", gz)?;
    match x.dims() {
        &[ref positions @ .., depth] if depth > 0 && positions.iter().product::<usize>() == rows => {
            Ok(ProductSizes { rows, columns, depth })
        }
        dims => Err(check.shape("gz", gz, format!("the rows of {dims:?}"))),
    }
}

/// Returns the sizes of the forward product from its operands, and checks that they fit together.
fn forward_sizes(check: &Check, x: &FeatureMap, w: Weight<'_>) -> Result<ProductSizes> {
    let (rows, depth) = match x.dims() {
        &[ref positions @ .., depth] if !x.dims().contains(&0) => (positions.iter().product(), depth),
        dims => return Err(check.sizes("x", dims, "[…, channels], not empty")),
    };
    match w.value.dims() {
        &[found, columns] if found == depth && columns > 0 => Ok(ProductSizes { rows, columns, depth }),
        _ => Err(check.shape("w", w.value, format!("[{depth}, output channels]"))),
    }
}

/// Checks the operands of a forward product, and calls `f` with the product.
fn with_product<T: Multiplicand, R>(
    check: &Check,
    x: &FeatureMap,
    w: Weight<'_>,
    f: impl FnOnce(&Product<'_, T>) -> Result<R>,
) -> Result<R> {
    let sizes = forward_sizes(check, x, w)?;
    let ProductSizes { rows, columns, depth } = sizes;
    let bytes = x.bytes() + (4 * depth + size_of::<T>() * rows) * columns;
    let _note = profiler::note(check.0, sizes.operations(), bytes);
    let dims = with_channels(x.dims(), columns);
    let value = check.float("w", w.value)?;
    x.read(check, "x", |x| {
        let of_levels = match (x, w.quantized) {
            (Operand::Stored(Stored::Levels(x, grid)), Some((original, quant))) => {
                level_factors(check, (x, grid), original, quant)?
            }
            _ => None,
        };
        let factors = match of_levels {
            Some(factors) => factors,
            None => Factors::Floats(x, Panels::new(open(&value).floats()?, columns)),
        };
        f(&Product { factors, dims, sizes })
    })
}

/// Returns the levels of both operands, or `None` if the weight's levels may not fit in a signed
/// byte. They fit if the quantizer has at most 7 bits.
fn level_factors<'a, T: Multiplicand>(
    check: &Check,
    (x, x_grid): (&'a [u8], Grid),
    w: &Tensor,
    quant: Quantizer<'_>,
) -> Result<Option<Factors<'a, T>>> {
    check.grids(w, quant)?;
    if quant.bits.max_level() > 127 {
        return Ok(None);
    }
    let grids = cpu::grids(quant)?;
    let (depth, columns) = w.dims2()?;
    let w = check.float("w", w)?;
    let mut levels = vec![0; depth * columns];
    signed_levels(open(&w).floats()?, &mut levels, &grids);
    let scale = grids.iter().cycle().take(columns).map(|grid| x_grid.step() * grid.step());
    Ok(Some(Factors::Levels {
        x,
        grid: x_grid,
        w: IntegerPanels::new(&levels, depth, columns),
        scale: scale.chain(iter::repeat(0.0)).take(columns.next_multiple_of(LANES)).collect(),
    }))
}

/// The operands of a product, as floats or as levels.
enum Factors<'a, T: Multiplicand> {
    Floats(Operand<'a, T>, Panels<T>),
    Levels { x: &'a [u8], grid: Grid, w: IntegerPanels, scale: Vec<f32> },
}

/// A product whose result has the dimensions `dims`.
struct Product<'a, T: Multiplicand> {
    factors: Factors<'a, T>,
    dims: Vec<usize>,
    sizes: ProductSizes,
}

/// Returns the number of rows of a block. The data that they read and write take about 512 KiB, half
/// of the second-level cache of many servers.
fn rows_per_block<T: Multiplicand>(ProductSizes { columns, depth, .. }: ProductSizes) -> usize {
    let bytes = 16 * CHUNK;
    (bytes / size_of::<T>() / (depth + columns)).max(64).next_multiple_of(8)
}

/// Returns how many of a block's `rows` rows of `columns` floats are computed at once: at least two
/// matrix tiles, if the block has so many rows.
fn rows_at_once<T: Multiplicand>(columns: usize, rows: usize) -> usize {
    const TILES: usize = 32;
    (T::AT_ONCE / columns).clamp(1, rows).next_multiple_of(TILES).min(rows)
}

impl<T: Multiplicand> Blockwise for Product<'_, T> {
    type Element = T;
    type Scratch = (Vec<T>, Operands<T>);

    fn dims(&self) -> &[usize] {
        &self.dims
    }

    fn rows_per_block(&self) -> usize {
        rows_at_once::<T>(self.sizes.columns, rows_per_block::<T>(self.sizes))
    }

    fn scratch(&self) -> Self::Scratch {
        Default::default()
    }

    fn compute<'z>(
        &self,
        (elements, operands): &mut Self::Scratch,
        rows: Range<usize>,
        z: &'z mut [MaybeUninit<f32>],
    ) -> Written<'z> {
        let depth = self.sizes.depth;
        let part = rows.start * depth..rows.end * depth;
        match &self.factors {
            Factors::Levels { x, grid, w, scale } => {
                product::set_levels(&x[part], depth, grid, w, scale, operands, z)
            }
            Factors::Floats(x, panels) => {
                let sizes = ProductSizes { rows: rows.len(), ..self.sizes };
                let z = product::set(x.part(part).factors(elements), panels, sizes, operands, z);
                scale_by(x.scale(), z);
                z.into()
            }
        }
    }
}

/// The number of elements that all parts of a weight's gradient together should not exceed. Four
/// parts are always allowed.
const PARTIAL_SUMS: usize = 1 << 20;

/// Computes the gradients of a forward product.
///
/// `gz(rows, block)` appends these rows of `∂z` to `block`. The results are the gradient of the
/// weight and, if `input` holds the transposed weight, the gradient of the input and the sums for
/// the epilogue that made the input. The weight's gradient and these sums are added up in parts,
/// whose number depends only on the shape.
fn gradients<T: Multiplicand>(
    x: Operand<'_, T>,
    gz: impl Fn(Range<usize>, &mut Vec<T>) + Sync + Send,
    input: Option<(&Panels<T>, Option<&OpenEpilogue<'_, T>>)>,
    sizes: ProductSizes,
) -> (Vec<f32>, Vec<T>, Option<GradientSums>) {
    let ProductSizes { rows, columns, depth } = sizes;
    let per_block = rows_per_block::<T>(sizes);
    let parts = (PARTIAL_SUMS / (depth * columns)).clamp(4, 16);
    let per_part = rows.div_ceil(parts).next_multiple_of(per_block);
    let width = if input.is_some() { depth } else { 0 };
    let room = per_block.min(rows) * columns + LANES;
    let init = || (Vec::with_capacity(room), Vec::new(), Vec::new(), Operands::default());
    let (gx, parts) =
        blocks((rows, width), per_part, init, |(block, elements, floats, operands), rows, gx| {
            let mut gw = vec![0.0; depth * columns];
            let mut sums = input.and_then(|(_, below)| below).map(GradientAccumulator::new);
            let mut gx = Progress::new(gx);
            for start in rows.clone().step_by(per_block) {
                let rows = start..rows.end.min(start + per_block);
                let m = rows.len();
                block.clear();
                gz(rows.clone(), block);
                // Vector loads read beyond the last row.
                block.extend_from_slice(&[T::default(); LANES]);
                if let Some((w, _)) = input {
                    let at_once = rows_at_once::<T>(depth, m);
                    for (i, gz) in block[..m * columns].chunks(at_once * columns).enumerate() {
                        let sizes = ProductSizes { rows: gz.len() / columns, columns: depth, depth: columns };
                        let gx = T::next_floats(&mut gx, sizes.rows * depth, floats, |gx| {
                            product::set(gz, w, sizes, operands, gx).into()
                        });
                        if let Some(sums) = &mut sums {
                            sums.add(start + i * at_once, gx);
                        }
                    }
                }
                let x = x.part(rows.start * depth..rows.end * depth).factors(elements);
                let sizes = ProductSizes { rows: depth, columns, depth: m };
                product::add_transposed(x, block, sizes, operands, &mut gw);
            }
            (gx.finish().into(), (gw, sums.map(GradientAccumulator::finish)))
        });
    let (mut of_weight, of_below): (Vec<Vec<f32>>, Vec<_>) = parts.into_iter().unzip();
    let mut gw = if of_weight.len() == 1 {
        of_weight.remove(0)
    } else {
        fill(depth * columns, CHUNK / 4, |range, gw| {
            for sum in &of_weight {
                for (gw, sum) in gw.iter_mut().zip(&sum[range.clone()]) {
                    *gw += sum;
                }
            }
        })
    };
    scale_by(x.scale(), &mut gw);
    (gw, gx, GradientSums::of_parts(of_below.into_iter().flatten()))
}

/// Multiplies a product of [`Operand::factors`] by the scale that these factors leave out.
fn scale_by(scale: f32, product: &mut [f32]) {
    if scale != 1.0 {
        product.iter_mut().for_each(|element| *element *= scale);
    }
}

/// Returns the dimensions with another number of channels.
fn with_channels(dims: &[usize], channels: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = channels;
    }
    dims
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use quant_core::Bits;

    const SHAPES: [(usize, usize); 7] = [(1, 3), (7, 1), (16, 33), (33, 7), (5, 48), (50, 100), (230, 91)];

    #[test]
    fn forward_and_gradients_match_the_reference() {
        for (n, h, w) in MAPS {
            for (inputs, outputs) in SHAPES {
                let context = format!("{n}×{h}×{w}, {inputs} to {outputs}");
                let (x, weight) = (random(1, &[n, h, w, inputs]), random(2, &[inputs, outputs]));
                let reference = |inputs: &[Tensor]| inputs[0].broadcast_matmul(&inputs[1]);
                let expected = reference(&[x.clone(), weight.clone()]).unwrap();
                assert_close(&forward(&x, &weight).unwrap(), &expected, 1e-6, &context);
                let gy = random(3, expected.dims());
                let (gx, gw) = (grad_input(&gy, &weight).unwrap(), grad_weight(&x, &gy).unwrap());
                assert_gradients(&[&x, &weight], &gy, reference, &[&gx, &gw], &context);
            }
        }
    }

    /// Calls `f` with levels of `x[…, inputs]` and of `w[inputs, outputs]`, with one grid for the
    /// whole weight and then with one for each output channel.
    fn quantized(
        dims: &[usize],
        outputs: usize,
        (x_bits, w_bits): (u32, u32),
        lo: f32,
        f: impl Fn(&FeatureMap, Weight<'_>, &Tensor),
    ) {
        let bits = |bits| Bits::new(bits).unwrap();
        let x_range = tensor(&[lo, 0.9]);
        let quant = Quantizer { range: &x_range, bits: bits(x_bits) };
        let x = FeatureMap::quantize(&random(1, dims), Some(quant)).unwrap();
        let original = random(2, &[dims[dims.len() - 1], outputs]);
        // The ranges have many lengths and lie on both sides of zero.
        let ends = [(random(3, &[outputs]) - 0.5).unwrap(), (random(4, &[outputs]) + 0.5).unwrap()];
        for range in [tensor(&[-0.8, 0.6]), Tensor::stack(&ends, 0).unwrap()] {
            let quant = Quantizer { range: &range, bits: bits(w_bits) };
            let value = crate::quantize::forward(&original, quant).unwrap();
            f(&x, Weight { value: &value, quantized: Some((&original, quant)) }, &value);
        }
    }

    /// Checks that a product with a grid for each channel has the same bits as the products of
    /// single channels.
    #[test]
    fn products_of_channels_are_those_of_each_by_itself() {
        for (inputs, outputs) in SHAPES {
            quantized(&[2, 5, 3, inputs], outputs, (4, 4), -0.3, |x, weight, _| {
                let Some((original, Quantizer { range, bits })) = weight.quantized else { panic!("levels") };
                let z = forward(x, weight).unwrap();
                for c in 0..outputs {
                    let column = |t: &Tensor| t.narrow(1, c, 1).unwrap().contiguous().unwrap();
                    let range = match range.rank() {
                        1 => range.clone(),
                        _ => column(range).flatten_all().unwrap(),
                    };
                    let quant = Quantizer { range: &range, bits };
                    let (original, value) = (column(original), column(weight.value));
                    let weight = Weight { value: &value, quantized: Some((&original, quant)) };
                    let found = z.narrow(3, c, 1).unwrap();
                    assert_eq!(elements(&found), elements(&forward(x, weight).unwrap()), "column {c}");
                }
            });
        }
    }

    /// Checks products of levels against a float reference. The products are exact, so the
    /// tolerance is for the rounding of the reference.
    #[test]
    fn products_of_levels_are_those_of_the_floats() {
        for (n, h, w) in MAPS {
            for (inputs, outputs) in SHAPES {
                for (bits, lo) in
                    [((4, 4), 0.0), ((3, 2), -0.7), ((8, 7), -0.9), ((8, 8), -0.9), ((2, 8), 0.0)]
                {
                    quantized(&[n, h, w, inputs], outputs, bits, lo, |x, weight, value| {
                        let context = format!("{n}×{h}×{w}, {inputs} to {outputs}, {bits:?} bits");
                        let expected = x.to_float().unwrap().broadcast_matmul(value).unwrap();
                        assert_close(&forward(x, weight).unwrap(), &expected, 2e-6, &context);
                        assert_close(&forward(x, value).unwrap(), &expected, 2e-6, &context);
                    });
                }
            }
        }
    }

    #[test]
    fn products_of_levels_have_the_same_bits_everywhere() {
        for (dims, outputs) in [([700, 24], 33), ([1001, 163], 130)] {
            quantized(&dims, outputs, (4, 4), -0.3, |x, weight, _| {
                assert_same_everywhere(|| {
                    let (z, stats) = forward_stats(x, weight).unwrap();
                    vec![forward(x, weight).unwrap(), z, stats.mean, stats.variance]
                });
            });
        }
    }

    /// Checks that the fused passes, which work block by block, give the results of the separate
    /// operations.
    #[test]
    fn fused_passes_are_the_single_operations() {
        let act = Activation::Relu6;
        for (dims, outputs) in [([2, 5, 7, 19], 33), ([3, 41, 20, 33], 130), ([1, 1, 3, 4], 1)] {
            quantized(&dims, outputs, (4, 4), -0.3, |x, weight, value| {
                let context = format!("{dims:?} to {outputs}");
                let close = |found: &Tensor, expected: &Tensor| assert_close(found, expected, 2e-6, &context);
                let range = tensor(&[0.0, 2.0]);
                let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
                let gamma = (random(3, &[outputs]) + 1.5).unwrap();
                let beta = random(4, &[outputs]);
                let z = forward(x, weight).unwrap();
                let (found, stats) = forward_stats(x, weight).unwrap();
                assert_eq!(elements(&found), elements(&z), "{context}");
                let expected = norm::channel_stats(&z).unwrap();
                close(&stats.mean, &expected.mean);
                close(&stats.variance, &expected.variance);
                assert_eq!(elements(&stats.min), elements(&expected.min));
                assert_eq!(elements(&stats.max), elements(&expected.max));
                for quant in [None, Some(quant)] {
                    let found = forward_normalized(x, weight, (&gamma, &beta), act, quant).unwrap();
                    let expected = norm::forward(&z, &gamma, &beta, act, quant).unwrap();
                    let [found, expected] = [found, expected].map(|y| elements(&y.to_float().unwrap()));
                    assert_eq!(found, expected, "{context}");
                }
                let of_batch = norm::BatchNormalization::new(&stats, &gamma, &beta, 1e-5).unwrap();
                let gy = random(5, z.dims());
                let of_z = Epilogue::batch(&z, &of_batch, act, Some(quant)).unwrap();
                let gz = of_z.backward(&gy.into()).unwrap().z;
                let below = epilogue(&dims, Some(quant));
                let (gw, gx) = backward(x, value, &gz, Some(&below)).unwrap();
                assert_sums(&below, &gx, &context);
                let gx = gx.tensor;
                let gz = gz.tensor().unwrap();
                close(&gx, &grad_input(&gz, value).unwrap());
                close(&gw, &grad_weight(x, &gz).unwrap());
                close(&gw, &grad_weight(&x.to_float().unwrap(), &gz).unwrap());
            });
        }
    }

    #[test]
    fn same_bits_everywhere() {
        for (rows, inputs, outputs) in [(20_000, 24, 33), (1000, 160, 320)] {
            let (x, w, gy) =
                (random(1, &[rows, inputs]), random(2, &[inputs, outputs]), random(3, &[rows, outputs]));
            assert_same_everywhere(|| {
                vec![forward(&x, &w).unwrap(), grad_input(&gy, &w).unwrap(), grad_weight(&x, &gy).unwrap()]
            });
        }
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_the_argument() {
        let (x, w) = (random(1, &[2, 3, 5]), random(2, &[4, 6]));
        let message = forward(&x, &w).unwrap_err().to_string();
        assert_eq!(message, "pointwise::forward: w has shape [4, 6], expected [5, output channels]");
        assert!(grad_input(&x, &w).is_err());
        assert!(grad_weight(&x, &random(3, &[5, 4])).is_err());
    }
}
