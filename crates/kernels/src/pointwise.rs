//! The 1×1 convolution: in NHWC a matrix product.
//!
//! With the rows `m` running over all positions of all images, `z[m,o] = Σ_i x[m,i]·w[i,o]`, so
//! `∂x[m,i] = Σ_o ∂z[m,o]·w[i,o]` and `∂w[i,o] = Σ_m x[m,i]·∂z[m,o]`. Linear layers are the same
//! operation.
//!
//! Where both operands are levels of quantizers, `x = s·(q − z)` and `w = t·v` with whole numbers `q` of one byte
//! and `v` of a signed one, the forward product is that of the levels, exact, times `s·t`, where `t` may differ from
//! column to column.
//!
//! [`backward`] computes a block of `∂z` and uses it for both gradients while it is in cache; `∂z` as a
//! whole is never in memory. On a GPU the products are cuBLAS's, so there `∂z` is written once, and statistics are
//! taken of what was written.

mod gpu;

use crate::blockwise::{self, Blockwise};
use crate::cpu::{self, CHUNK, Check, open, simd};
use crate::feature::{Source, byte};
use crate::norm::{
    self, Epilogue, Gradient, GradientSums, Normalizer, OpenEpilogue, OutputGradient, Stats, Sums,
};
use crate::product::{self, IntegerPanels, LANES, Left, Operands, Panels};
use crate::{Activation, FeatureMap, Input, Quantizer, Result, Weight, profile};
use candle_core::{Device, Tensor};
use quant_core::Grid;
use std::iter;
use std::mem::MaybeUninit;
use std::ops::Range;

/// `z = x[…, Cin] · w[Cin, Cout]`, of shape `[…, Cout]`.
pub fn forward<'a>(x: impl Into<Input<'a>>, w: impl Into<Weight<'a>>) -> Result<Tensor> {
    let (x, w) = (x.into(), w.into());
    if crate::gpu::runs(w.value.device()) {
        return gpu::forward(&Check("pointwise::forward"), x, w);
    }
    with_product("pointwise::forward", x, w, |product| blockwise::plain(product))
}

/// [`forward`], with the statistics of `z`.
pub fn forward_stats<'a>(x: impl Into<Input<'a>>, w: impl Into<Weight<'a>>) -> Result<(Tensor, Stats)> {
    let (x, w) = (x.into(), w.into());
    if crate::gpu::runs(w.value.device()) {
        let z = gpu::forward(&Check("pointwise::forward_stats"), x, w)?;
        let stats = norm::channel_stats(&z)?;
        return Ok((z, stats));
    }
    with_product("pointwise::forward_stats", x, w, |product| blockwise::with_stats(product))
}

/// `Q(φ(scale·z + shift))`, with `scale` and `shift` of shape `[Cout]`.
pub fn forward_normalized<'a>(
    x: impl Into<Input<'a>>,
    w: impl Into<Weight<'a>>,
    (scale, shift): (&Tensor, &Tensor),
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let (x, w) = (x.into(), w.into());
    if crate::gpu::runs(w.value.device()) {
        let z = gpu::forward(&Check("pointwise::forward_normalized"), x, w)?;
        return norm::forward(&z, scale, shift, act, quant);
    }
    with_product("pointwise::forward_normalized", x, w, |product| {
        let check = Check("pointwise::forward_normalized");
        let normalizer = Normalizer::new(&check, product.n, scale, shift, act, quant)?;
        blockwise::normalized(product, &normalizer, quant)
    })
}

/// The gradient of the input: `∂z[…, Cout] · wᵀ`, of shape `[…, Cin]`.
pub fn grad_input(gz: &Tensor, w: &Tensor) -> Result<Tensor> {
    let check = Check("pointwise::grad_input");
    let (_, n) = check.rows("gz", gz)?;
    let k = match w.dims() {
        &[k, found] if found == n => k,
        _ => return Err(check.shape("w", w, format!("[input channels, {n}]"))),
    };
    let rows = gz.elem_count() / n;
    let _note = profile::note(check.0, 2 * rows * k * n, 4 * (rows * (k + n) + k * n));
    let (gz, w) = (check.map_float("gz", gz)?, check.float("w", w)?);
    if crate::gpu::runs(gz.device()) {
        return gpu::grad_input(&gz, &w);
    }
    let panels = Panels::transposed(open(&w).floats()?, n);
    let opened = open(&gz);
    let x = Source::Float(opened.floats()?);
    blockwise::plain(&Product { x, w: Operand::Float(panels), dims: with_channels(gz.dims(), k), k: n, n: k })
}

/// The gradient of the weight: `xᵀ · ∂z`, of shape `[Cin, Cout]`.
pub fn grad_weight<'a>(x: impl Into<Input<'a>>, gz: &Tensor) -> Result<Tensor> {
    let check = Check("pointwise::grad_weight");
    let x = x.into();
    let (rows, k, n) = sizes(&check, x, gz)?;
    let _note = profile::note(check.0, 2 * rows * k * n, x.bytes() + 4 * (rows * n + k * n));
    if crate::gpu::runs(gz.device()) {
        return gpu::grad_weight(&check, x, gz);
    }
    let (x, gz) = (x.open(&check, "x")?, check.float("gz", gz)?);
    let (x, gz) = (x.opened(), open(&gz));
    let (x, gz) = (Source::new(&x)?, gz.floats()?);
    let gradient = |rows: Range<usize>, block: &mut [MaybeUninit<f32>]| {
        block.write_copy_of_slice(&gz[rows.start * n..rows.end * n]);
    };
    let (gw, ..) = gradients(x, gradient, None, (rows, k, n));
    Ok(Tensor::from_vec(gw, (k, n), &Device::Cpu)?)
}

/// [`grad_weight`] and [`grad_input`] of the gradient `∂z` of the output: `([Cin, Cout], […, Cin])`. `below` is what
/// made `x`, if its gradient is what is found here as it is: then its sums are taken of what is in cache. (Not on a
/// GPU.)
pub fn backward<'a>(
    x: impl Into<Input<'a>>,
    w: &Tensor,
    gz: &OutputGradient,
    below: Option<&Epilogue>,
) -> Result<(Tensor, Gradient)> {
    let check = Check("pointwise::backward");
    let x = x.into();
    let (rows, k, n) = sizes(&check, x, gz.z())?;
    let w = check.dims("w", w, &[k, n])?;
    let bytes = x.bytes_with(below) + 4 * (rows * (k + 2 * n) + 2 * k * n);
    let _note = profile::note(check.0, 4 * rows * k * n, bytes);
    let dims = x.dims().to_vec();
    if crate::gpu::runs(w.device()) {
        let gz = gz.tensor()?;
        return Ok((gpu::grad_weight(&check, x, &gz)?, gpu::grad_input(&gz, &w)?.reshape(dims)?.into()));
    }
    let x = x.open(&check, "x")?;
    let x = x.opened();
    let gz = gz.open()?;
    let below = below.map(|below| below.open_below(&check, &dims)).transpose()?;
    let to = Some((&Panels::transposed(open(&w).floats()?, n), below.as_ref()));
    let (gw, gx, sums) = gradients(Source::new(&x)?, |rows, block| gz.rows(rows, block), to, (rows, k, n));
    let gx = Gradient { tensor: Tensor::from_vec(gx, dims, &Device::Cpu)?, sums };
    Ok((Tensor::from_vec(gw, (k, n), &Device::Cpu)?, gx))
}

/// Rows, input and output channels of a backward product of `x[…, k]` and `gz[…, n]`.
fn sizes(check: &Check, x: Input<'_>, gz: &Tensor) -> Result<(usize, usize, usize)> {
    let (rows, n) = check.rows("gz", gz)?;
    match x.dims() {
        [positions @ .., k] if *k > 0 && positions.iter().product::<usize>() == rows => Ok((rows, *k, n)),
        dims => Err(check.shape("gz", gz, format!("the rows of {dims:?}"))),
    }
}

/// Input and output channels of a forward product.
fn operands(check: &Check, x: Input<'_>, w: Weight<'_>) -> Result<(usize, usize)> {
    let k = match x.dims().last() {
        Some(&k) if !x.dims().contains(&0) => k,
        _ => return Err(check.sizes("x", x.dims(), "[…, channels], not empty")),
    };
    match w.value.dims() {
        &[found, n] if found == k => Ok((k, n)),
        _ => Err(check.shape("w", w.value, format!("[{k}, output channels]"))),
    }
}

/// Checks the operands and calls `f` with the product.
fn with_product<R>(
    name: &'static str,
    x: Input<'_>,
    w: Weight<'_>,
    f: impl FnOnce(&Product<'_>) -> Result<R>,
) -> Result<R> {
    let check = Check(name);
    let (k, n) = operands(&check, x, w)?;
    let dims = with_channels(x.dims(), n);
    let outputs = dims.iter().product::<usize>();
    let _note = profile::note(name, 2 * outputs * k, x.bytes() + 4 * (k * n + outputs));
    let x = x.open(&check, "x")?;
    let x = x.opened();
    let x = Source::new(&x)?;
    let value = check.float("w", w.value)?;
    let levels = match (x, w.quantized) {
        (Source::Levels(_, grid), Some((original, quant))) => integers(&check, original, quant, grid)?,
        _ => None,
    };
    let w = match levels {
        Some(operand) => operand,
        None => Operand::Float(Panels::new(open(&value).floats()?, n)),
    };
    f(&Product { x, w, dims, k, n })
}

/// The weights' levels, if each fits a signed byte: so with up to 7 bits.
fn integers(check: &Check, w: &Tensor, quant: Quantizer<'_>, x: Grid) -> Result<Option<Operand>> {
    check.grids(w, quant)?;
    if quant.bits.max_level() > 127 {
        return Ok(None);
    }
    let grids = cpu::grids(quant)?;
    let (k, n) = w.dims2()?;
    let w = check.float("w", w)?;
    let w = open(&w);
    let w = w.floats()?;
    let mut levels = vec![0; k * n];
    signed_levels(w, &mut levels, &grids);
    let steps = grids.iter().cycle().take(n).map(|grid| x.step() * grid.step());
    Ok(Some(Operand::Levels {
        panels: IntegerPanels::new(&levels, k, n),
        zero_point: x.zero_point() as i32,
        scale: steps.chain(iter::repeat(0.0)).take(n.next_multiple_of(LANES)).collect(),
    }))
}

simd! {
    /// Levels less their zero point; where each channel has a grid, of whole rows.
    fn signed_levels(w: &[f32], levels: &mut [i8], grids: &[Grid]) {
        #[inline(always)]
        fn signed(grid: &Grid, w: f32) -> i8 {
            byte(grid.level(w)).wrapping_sub(byte(grid.zero_point())) as i8
        }
        if let [grid] = grids {
            let grid = *grid;
            for (level, w) in levels.iter_mut().zip(w) {
                *level = signed(&grid, *w);
            }
        } else {
            let n = grids.len();
            for (levels, w) in levels.chunks_exact_mut(n).zip(w.chunks_exact(n)) {
                for ((level, w), grid) in levels.iter_mut().zip(w).zip(grids) {
                    *level = signed(grid, *w);
                }
            }
        }
    }
}

/// The right operand of a forward product.
enum Operand {
    Float(Panels),
    Levels { panels: IntegerPanels, zero_point: i32, scale: Vec<f32> },
}

/// A forward product of `k` by `n` channels.
struct Product<'a> {
    x: Source<'a>,
    w: Operand,
    dims: Vec<usize>,
    k: usize,
    n: usize,
}

/// Rows of a block: what they read and write takes about half of a small second-level cache.
fn rows_per_block(k: usize, n: usize) -> usize {
    (4 * CHUNK / (k + n)).max(64).next_multiple_of(8)
}

impl Blockwise for Product<'_> {
    type Scratch = Vec<f32>;

    fn dims(&self) -> &[usize] {
        &self.dims
    }

    fn rows_per_block(&self) -> usize {
        rows_per_block(self.k, self.n)
    }

    fn scratch(&self) -> Vec<f32> {
        Vec::new()
    }

    fn compute(&self, scratch: &mut Vec<f32>, rows: Range<usize>, z: &mut [MaybeUninit<f32>]) {
        let &Self { k, n, .. } = self;
        let m = rows.len();
        let x = self.x.part(rows.start * k..rows.end * k);
        match (&self.w, x) {
            (Operand::Levels { panels, zero_point, scale }, Source::Levels(x, _)) => {
                product::set_levels(x, k, *zero_point, panels, scale, z);
            }
            (Operand::Levels { .. }, _) => unreachable!("only levels meet levels"),
            (Operand::Float(panels), x) => {
                let x = Left::rows(x.floats(scratch), k);
                product::set(x, panels.right(), (m, n, k), z);
            }
        }
    }
}

/// The most memory that the parts of a weight's gradient may take, in elements.
const PARTIAL_SUMS: usize = 1 << 20;

/// The gradients of a product of `rows` by `k` by `n`, where `gz(rows, block)` writes a block of `∂z`: of the
/// weight, and, if asked for, of the input from the transposed weight, with the sums of what made it. The weight's
/// and these are summed up in parts, whose number depends on the shape alone.
fn gradients(
    x: Source<'_>,
    gz: impl Fn(Range<usize>, &mut [MaybeUninit<f32>]) + Sync + Send,
    input: Option<(&Panels, Option<&OpenEpilogue<'_>>)>,
    (rows, k, n): (usize, usize, usize),
) -> (Vec<f32>, Vec<f32>, Option<Sums>) {
    let per_block = rows_per_block(k, n);
    let parts = (PARTIAL_SUMS / (k * n)).clamp(4, 16);
    let per_part = rows.div_ceil(parts).next_multiple_of(per_block);
    let width = if input.is_some() { k } else { 0 };
    let init =
        || (vec![MaybeUninit::uninit(); per_block.min(rows) * n + LANES], Vec::new(), Operands::default());
    type Scratch = (Vec<MaybeUninit<f32>>, Vec<f32>, Operands);
    let part = |(block, floats, operands): &mut Scratch, rows: Range<usize>, gx: &mut [MaybeUninit<f32>]| {
        let mut gw = vec![0.0; k * n];
        let mut sums = input.and_then(|(_, below)| below).map(GradientSums::new);
        let mut gx = gx.chunks_mut((per_block * width).max(1));
        for start in rows.clone().step_by(per_block) {
            let rows = start..rows.end.min(start + per_block);
            let m = rows.len();
            gz(rows.clone(), &mut block[..m * n]);
            // What is read beyond the last row.
            block[m * n..m * n + LANES].fill(MaybeUninit::new(0.0));
            // SAFETY: `gz` writes all of its block.
            #[allow(unsafe_code)]
            let block = unsafe { block[..m * n + LANES].assume_init_ref() };
            if let Some((w, _)) = input {
                let gx = gx.next().expect("as many blocks as of rows");
                product::set(Left::rows(&block[..m * n], n), w.right(), (m, k, n), gx);
                if let Some(sums) = &mut sums {
                    // SAFETY: `product::set` writes all of its block.
                    #[allow(unsafe_code)]
                    sums.add(start, unsafe { gx.assume_init_ref() });
                }
            }
            let x = x.part(rows.start * k..rows.end * k).floats(floats);
            product::add_transposed(x, block, (m, k, n), operands, &mut gw);
        }
        (gw, sums.map(GradientSums::finish))
    };
    // SAFETY: `product::set` writes all of each block of the gradient.
    #[allow(unsafe_code)]
    let (gx, parts) = unsafe { cpu::blocks((rows, width), per_part, init, part) };
    let (of_weight, of_below): (Vec<Vec<f32>>, Vec<_>) = parts.into_iter().unzip();
    let gw = if of_weight.len() == 1 {
        of_weight.into_iter().next().expect("one")
    } else {
        cpu::fill(k * n, CHUNK / 4, |i, gw| {
            for sum in &of_weight {
                for (gw, sum) in gw.iter_mut().zip(&sum[i * (CHUNK / 4)..]) {
                    *gw += sum;
                }
            }
        })
    };
    (gw, gx, Sums::of_parts(of_below.into_iter().flatten()))
}

/// The dimensions of a tensor with another number of channels.
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

    /// Levels of `x[…, inputs]` and of `w[inputs, outputs]`, in a grid for all and in one for each output channel.
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
        // Of all lengths, on both sides of zero.
        let ends = [(random(3, &[outputs]) - 0.5).unwrap(), (random(4, &[outputs]) + 0.5).unwrap()];
        for range in [tensor(&[-0.8, 0.6]), Tensor::stack(&ends, 0).unwrap()] {
            let quant = Quantizer { range: &range, bits: bits(w_bits) };
            let value = crate::quantize::forward(&original, quant).unwrap();
            f(&x, Weight { value: &value, quantized: Some((&original, quant)) }, &value);
        }
    }

    /// To the bit: a product with a grid for each channel is that of each channel by itself.
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

    /// The levels' product is exact, so what is left is the rounding of the reference.
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

    /// What is done block by block is what is done in one piece after the other.
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
                let of_batch = norm::Normalization::new(&stats, &gamma, &beta, 1e-5).unwrap();
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
