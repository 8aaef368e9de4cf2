//! Launches of residual.cu.

use super::same_dims;
use crate::check::Check;
use crate::feature::gpu::Map;
use crate::gpu::{Columns, Launch, Module, empty, module, name, quantizer, width};
use crate::quantize::gpu::extremes_of_all;
use crate::{Error, FeatureMap, Quantizer, Result};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("residual");

/// Returns the operands, contiguous. `b` must be floats of the dtype of `a`, or levels that stand
/// for such.
fn operands(check: &Check, a: &Tensor, b: &FeatureMap) -> Result<(Tensor, Map)> {
    same_dims(check, a, b)?;
    let a = check.map_float("a", a)?;
    if b.dtype() != a.dtype() {
        return Err(Error::DType { op: check.0, argument: "b", found: b.dtype(), expected: a.dtype() });
    }
    Ok((a, Map::new(check, "b", b)?))
}

/// Returns the sum, or its levels if there is a quantizer.
pub(super) fn add(check: &Check, a: &Tensor, b: &FeatureMap, quant: Option<Quantizer<'_>>) -> Result<Tensor> {
    let (a, b) = operands(check, a, b)?;
    let out = if quant.is_some() { DType::U8 } else { a.dtype() };
    let y = empty(a.dims(), out, a.device())?;
    let width = width(a.elem_count(), [&a, &b.tensor, &y])?;
    let count = a.elem_count() / width;
    let (range, max_level) = quantizer(quant);
    let kernel = format!("add_{}_{}_{}_{width}", name(a.dtype()), b.name(), name(out));
    Launch::shared(MODULE, kernel, count)
        .read(&a)?
        .read(&b.tensor)?
        .read_if(b.range.as_ref())?
        .read_if(range)?
        .write(&y)?
        .sizes([count])?
        .floats([b.max_level, max_level])
        .run()?;
    Ok(y)
}

pub(super) fn add_normalized(
    check: &Check,
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    b: &FeatureMap,
) -> Result<(Tensor, Tensor)> {
    let (z, b) = operands(check, z, b)?;
    let c = scale.elem_count();
    let sum = empty(z.dims(), z.dtype(), z.device())?;
    let width = width(c, [&z, &b.tensor, scale, shift, &sum])?;
    let columns = Columns::long(z.elem_count() / c, c, width);
    let [across, down] = columns.grid();
    let extremes = empty((2, across * down), DType::F32, z.device())?;
    columns
        .launch(MODULE, format!("add_normalized_{}_{}_{width}", name(z.dtype()), b.name()))
        .read(&z)?
        .read(&b.tensor)?
        .read(scale)?
        .read(shift)?
        .read_if(b.range.as_ref())?
        .write(&sum)?
        .write(&extremes)?
        .sizes(columns.fields())?
        .floats([b.max_level])
        .run()?;
    Ok((sum, extremes_of_all(&extremes)?))
}
