//! The launch of im2col.cu.

use crate::Result;
use crate::gpu::{Launch, Module, empty, module, name};
use candle_core::Tensor;

const MODULE: Module = module!("im2col");

pub(super) fn forward(x: &Tensor, kernel: usize, stride: usize, padding: usize) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let out = |size: usize| (size + 2 * padding - kernel) / stride + 1;
    let (ho, wo) = (out(h), out(w));
    let y = empty((n, ho, wo, kernel * kernel * c), x.dtype(), x.device())?;
    Launch::shared(MODULE, format!("patches_{}", name(x.dtype())), y.elem_count())
        .read(x)?
        .write(&y)?
        .sizes([n, h, w, c, kernel, stride, padding, ho, wo])?
        .run()?;
    Ok(y)
}
