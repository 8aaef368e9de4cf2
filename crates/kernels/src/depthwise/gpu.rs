//! Launches of depthwise.cu.

use super::Geometry;
use crate::check::Check;
use crate::feature::gpu::Map;
use crate::gpu::{Launch, Module, block_of, empty, module, name, total, width};
use crate::norm::Stats;
use crate::norm::gpu::Partials;
use crate::{FeatureMap, Result, profiler};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("depthwise");

/// The maximum number of rows of a strip. It is small enough for `f32` sums in the statistics, and
/// for enough threads with small batches.
const BAND: usize = 16;

/// The strips that maps are cut into (`Strips` in depthwise.cu).
struct Strips {
    images: usize,
    from: (usize, usize),
    to: (usize, usize),
    channels: usize,
    band: usize,
    across: usize,
    down: usize,
}

impl Strips {
    /// Returns strips of `columns` columns over the `cells` (rows, columns) of the map that is cut.
    fn new(
        images: usize,
        from: (usize, usize),
        to: (usize, usize),
        channels: usize,
        cells: (usize, usize),
        columns: usize,
    ) -> Self {
        // All bands have about the same height.
        let band = cells.0.div_ceil(cells.0.div_ceil(BAND));
        let (across, down) = (cells.1.div_ceil(columns), cells.0.div_ceil(band));
        Self { images, from, to, channels, band, across, down }
    }

    fn count(&self) -> usize {
        self.images * self.across * self.down
    }

    fn fields(&self) -> [usize; 9] {
        let &Self { images, from, to, channels, band, across, down } = self;
        [images, from.0, from.1, to.0, to.1, channels, band, across, down]
    }
}

/// Returns the number of columns of a strip in the convolution, as its kernels are compiled.
fn columns(stride: usize) -> usize {
    if stride == 1 { 2 } else { 1 }
}

/// Convolves a contiguous map to one of `dtype`. Also returns the moments of its parts if `stats`
/// is set.
fn convolve(
    x: &Map,
    w: &Tensor,
    (stride, reversed): (usize, bool),
    strips: &Strips,
    dtype: DType,
    stats: bool,
) -> Result<(Tensor, Option<Partials>)> {
    let (device, c) = (x.tensor.device(), strips.channels);
    let z = empty((strips.images, strips.to.0, strips.to.1, c), dtype, device)?;
    let width = width(c, [&x.tensor, w, &z])?;
    let (block, slices) = block_of(c, width);
    let parts = strips.count().div_ceil(block[1]);
    let partials = stats.then(|| Partials::new(parts, c, device)).transpose()?;
    let kernel = format!("convolve_{}_{}_{stride}_{width}", x.name(), name(dtype));
    let launch = Launch::new(MODULE, kernel, [slices, parts], block)
        .read(&x.tensor)?
        .read(w)?
        .write(&z)?
        .read_if(x.range.as_ref())?;
    Partials::fields(partials.as_ref(), launch)?
        .sizes(strips.fields())?
        .floats([x.max_level])
        .sizes([usize::from(reversed)])?
        .run()?;
    Ok((z, partials))
}

/// Returns the convolution.
pub(super) fn forward(check: &Check, x: &FeatureMap, w: &Tensor, stride: usize) -> Result<Tensor> {
    Ok(convolve_map(check, x, w, stride, false)?.0)
}

/// Returns the convolution and its statistics.
pub(super) fn forward_stats(
    check: &Check,
    x: &FeatureMap,
    w: &Tensor,
    stride: usize,
) -> Result<(Tensor, Stats)> {
    let (z, partials) = convolve_map(check, x, w, stride, true)?;
    Ok((z, partials.expect("statistics were asked for").merged()?))
}

fn convolve_map(
    check: &Check,
    x: &FeatureMap,
    w: &Tensor,
    stride: usize,
    stats: bool,
) -> Result<(Tensor, Option<Partials>)> {
    let (n, h, width, c) = check.map("x", x.dims())?;
    let w = check.dims("w", w, &[3, 3, c])?;
    let Geometry { ho, wo, .. } = Geometry::new(check, h, width, c, stride)?;
    let outputs = n * ho * wo * c;
    let _note = profiler::note(check.0, 18 * outputs, x.bytes() + x.dtype().size_in_bytes() * outputs);
    let strips = Strips::new(n, (h, width), (ho, wo), c, (ho, wo), columns(stride));
    convolve(&Map::new(check, "x", x)?, &w, (stride, false), &strips, x.dtype(), stats)
}

/// Returns the gradient of the input. For stride 1 it is a convolution with the weight rotated by
/// 180°.
pub(super) fn grad_input(gz: &Tensor, w: &Tensor, stride: usize, size: (usize, usize)) -> Result<Tensor> {
    let (n, ho, wo, c) = gz.dims4()?;
    if stride == 1 {
        let map = Map::float(gz.clone());
        let strips = Strips::new(n, (ho, wo), size, c, size, columns(1));
        return Ok(convolve(&map, w, (1, true), &strips, gz.dtype(), false)?.0);
    }
    let gx = empty((n, size.0, size.1, c), gz.dtype(), gz.device())?;
    let width = width(c, [gz, w, &gx])?;
    let cells = (size.0.div_ceil(2), size.1.div_ceil(2));
    let strips = Strips::new(n, (ho, wo), size, c, cells, 1);
    let (block, slices) = block_of(c, width);
    let grid = [slices, strips.count().div_ceil(block[1])];
    Launch::new(MODULE, format!("spread_{}_{width}", name(gz.dtype())), grid, block)
        .read(gz)?
        .read(w)?
        .write(&gx)?
        .sizes(strips.fields())?
        .run()?;
    Ok(gx)
}

/// The approximate number of parts that the weight's gradient is summed in.
const PARTS: usize = 1024;

/// Returns the gradient of the weight, `[3, 3, C]` in `f32`.
pub(super) fn grad_weight(check: &Check, x: &FeatureMap, gz: &Tensor, stride: usize) -> Result<Tensor> {
    let (n, h, w, c) = check.map("x", x.dims())?;
    let (_, ho, wo, _) = gz.dims4()?;
    let x = Map::new(check, "x", x)?;
    let width = width(c, [&x.tensor, gz])?;
    let strips = Strips::new(n, (h, w), (ho, wo), c, (ho, wo), 1);
    let (block, slices) = block_of(c, width);
    // A part is a whole number of blocks of strips, at least two, because each part writes its
    // sums.
    let per_part =
        strips.count().div_ceil((PARTS / slices).max(1)).max(2 * block[1]).next_multiple_of(block[1]);
    let parts = strips.count().div_ceil(per_part);
    let sums = empty((parts, 9 * c), DType::F32, gz.device())?;
    let kernel = format!("correlate_{}_{}_{stride}_{width}", x.name(), name(gz.dtype()));
    Launch::new(MODULE, kernel, [slices, parts], block)
        .read(&x.tensor)?
        .read(gz)?
        .read_if(x.range.as_ref())?
        .write(&sums)?
        .sizes(strips.fields())?
        .sizes([per_part])?
        .floats([x.max_level])
        .run()?;
    total(MODULE, &sums, (3, 3, c))
}
