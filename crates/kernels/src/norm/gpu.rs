//! Launches of norm.cu.

use super::{BatchNormalization, Epilogue, Running, Stats};
use crate::check::Check;
use crate::gpu::{Columns, Launch, Module, OVER_PARTS, empty, module, name, planes, quantizer, width};
use crate::{Activation, FeatureMap, Quantizer, Result};
use candle_core::{DType, Device, Tensor};

const MODULE: Module = module!("norm");

/// The moments of parts, as the blocks of a kernel write them (`Partials` in moments.cuh).
pub(crate) struct Partials {
    sums: Tensor,
    extremes: Tensor,
    parts: usize,
    channels: usize,
}

impl Partials {
    pub(crate) fn new(parts: usize, channels: usize, device: &Device) -> Result<Self> {
        let sums = empty(2 * parts * channels, DType::F64, device)?;
        let extremes = empty(2 * parts * channels + parts, DType::F32, device)?;
        Ok(Self { sums, extremes, parts, channels })
    }

    /// Adds the fields of the struct to a launch; null pointers if there are no partials.
    pub(crate) fn fields(partials: Option<&Self>, launch: Launch) -> Result<Launch> {
        launch.write_if(partials.map(|p| &p.sums))?.write_if(partials.map(|p| &p.extremes))
    }

    /// Returns the statistics of all parts together.
    pub(crate) fn merged(&self) -> Result<Stats> {
        let &Self { parts, channels, .. } = self;
        let stats = empty((4, channels), DType::F32, self.sums.device())?;
        Launch::new(MODULE, "merge", [channels.div_ceil(OVER_PARTS[0]), 1], OVER_PARTS)
            .read(&self.sums)?
            .read(&self.extremes)?
            .write(&stats)?
            .sizes([parts, channels])?
            .run()?;
        let [mean, variance, min, max] = planes(&stats)?;
        Ok(Stats { mean, variance, min, max })
    }
}

/// Returns the rows and channels of a contiguous map.
fn size(z: &Tensor) -> (usize, usize) {
    let c = z.dims()[z.dims().len() - 1];
    (z.elem_count() / c, c)
}

pub(super) fn channel_stats(z: &Tensor) -> Result<Stats> {
    let (rows, c) = size(z);
    let width = width(c, [z])?;
    let columns = Columns::long(rows, c, width);
    let partials = Partials::new(columns.parts(), c, z.device())?;
    let launch = columns.launch(MODULE, format!("moments_{}_{width}", name(z.dtype()))).read(z)?;
    Partials::fields(Some(&partials), launch)?.sizes(columns.fields())?.run()?;
    partials.merged()
}

pub(super) fn prepare(
    stats: &Stats,
    gamma: &Tensor,
    beta: &Tensor,
    epsilon: f64,
    running: &Running,
    momentum: f64,
    unbias: f64,
) -> Result<BatchNormalization> {
    let check = Check("norm::prepare");
    let (_, c) = check.rows("stats.mean", &stats.mean)?;
    let out = empty((3, c), DType::F32, stats.mean.device())?;
    let mut launch = Launch::each(MODULE, "prepare", c);
    for (argument, tensor) in
        [("stats.mean", &stats.mean), ("stats.variance", &stats.variance), ("gamma", gamma), ("beta", beta)]
    {
        launch = launch.read(&check.dims(argument, tensor, &[c])?)?;
    }
    for (argument, tensor) in [("running.mean", &running.mean), ("running.variance", &running.variance)] {
        check.dims(argument, tensor, &[c])?;
        launch = launch.write(tensor)?;
    }
    let launch = launch.write(&out)?.sizes([c])?;
    launch.floats([epsilon as f32, unbias as f32, momentum as f32]).run()?;
    let [inv_std, scale, shift] = planes(&out)?;
    Ok(BatchNormalization { mean: stats.mean.clone(), inv_std, scale, shift })
}

pub(super) fn output_range(
    min: &Tensor,
    max: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    act: Activation,
) -> Result<Tensor> {
    let extremes = empty(2, DType::F32, min.device())?;
    let (lo, hi) = act.bounds();
    Launch::each(MODULE, "output_range", 1)
        .read(min)?
        .read(max)?
        .read(scale)?
        .read(shift)?
        .write(&extremes)?
        .sizes([min.elem_count()])?
        .floats([lo, hi])
        .run()?;
    Ok(extremes)
}

pub(super) fn forward(
    check: &Check,
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let (rows, c) = size(z);
    check.quantizer(quant)?;
    let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
    let out = if quant.is_some() { DType::U8 } else { z.dtype() };
    let y = empty(z.dims(), out, z.device())?;
    let width = width(c, [z, &scale, &shift, &y])?;
    let columns = Columns::short(rows, c, width);
    let ((range, max_level), (lo, hi)) = (quantizer(quant), act.bounds());
    columns
        .launch(MODULE, format!("forward_{}_{}_{width}", name(z.dtype()), name(out)))
        .read(z)?
        .read(&scale)?
        .read(&shift)?
        .write(&y)?
        .read_if(range)?
        .sizes(columns.fields())?
        .floats([lo, hi, max_level])
        .run()?;
    Ok(FeatureMap::of(y, z.dtype(), quant))
}

/// Returns the gradients of `γ` and `β` (or of the shift), and the slope and the offset of the
/// gradient of `z`, each `[C]`. For frozen statistics, all but the second are 0.
pub(super) fn coefficients(of: &Epilogue, gy: &Tensor) -> Result<[Tensor; 4]> {
    let (rows, c) = size(&of.z);
    let width = width_of(of, gy)?;
    let columns = Columns::long(rows, c, width);
    let (parts, device) = (columns.parts(), of.z.device());
    let sums = empty(2 * parts * c, DType::F64, device)?;
    let ((range, max_level), (lo, hi)) = (quantizer(of.quantizer()), of.act.bounds());
    columns
        .launch(MODULE, format!("sums_{}_{width}", name(of.z.dtype())))
        .read(&of.z)?
        .read(gy)?
        .read(&of.scale)?
        .read(&of.shift)?
        .read_if(of.mean())?
        .read_if(range)?
        .write(&sums)?
        .sizes(columns.fields())?
        .floats([lo, hi, max_level])
        .run()?;
    let out = empty((4, c), DType::F32, device)?;
    Launch::new(MODULE, "coefficients", [c.div_ceil(OVER_PARTS[0]), 1], OVER_PARTS)
        .read(&sums)?
        .read(&of.scale)?
        .read_if(of.inv_std())?
        .write(&out)?
        .sizes([parts, c])?
        .floats([rows as f32])
        .run()?;
    planes(&out)
}

fn width_of(of: &Epilogue, gy: &Tensor) -> Result<usize> {
    let (_, c) = size(&of.z);
    width(c, [&of.z, gy, &of.scale, &of.shift].into_iter().chain(of.mean()))
}

pub(super) fn gradient(of: &Epilogue, gy: &Tensor, slope: &Tensor, offset: &Tensor) -> Result<Tensor> {
    let (rows, c) = size(&of.z);
    let gz = empty(of.z.dims(), of.z.dtype(), of.z.device())?;
    let width = width_of(of, gy)?.min(width(c, [slope, offset, &gz])?);
    let columns = Columns::short(rows, c, width);
    let ((range, max_level), (lo, hi)) = (quantizer(of.quantizer()), of.act.bounds());
    columns
        .launch(MODULE, format!("gradient_{}_{width}", name(of.z.dtype())))
        .read(&of.z)?
        .read(gy)?
        .read(&of.scale)?
        .read(&of.shift)?
        .read_if(of.mean())?
        .read(slope)?
        .read(offset)?
        .read_if(range)?
        .write(&gz)?
        .sizes(columns.fields())?
        .floats([lo, hi, max_level])
        .run()?;
    Ok(gz)
}
