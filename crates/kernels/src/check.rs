//! Checks of the arguments of operations.

use crate::{Error, Quantizer, Result};
use candle_core::{DType, Shape, Tensor};

/// The checks of the arguments of one operation, whose error messages begin with its name.
pub(crate) struct Check(pub(crate) &'static str);

impl Check {
    /// Checks that the tensor is `f32`, and returns it as a contiguous tensor.
    pub(crate) fn float(&self, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
        self.dtype(argument, tensor, DType::F32)
    }

    /// Checks that the tensor has the expected dtype, and returns it as a contiguous tensor.
    pub(crate) fn dtype(&self, argument: &'static str, tensor: &Tensor, expected: DType) -> Result<Tensor> {
        if tensor.dtype() != expected {
            return Err(Error::DType { op: self.0, argument, found: tensor.dtype(), expected });
        }
        Ok(tensor.contiguous()?)
    }

    /// Checks that a feature map is `f32` or `bf16`, and returns it as a contiguous tensor.
    pub(crate) fn map_float(&self, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
        let half = tensor.dtype() == DType::BF16;
        self.dtype(argument, tensor, if half { DType::BF16 } else { DType::F32 })
    }

    /// Checks that the tensor has the shape and dtype of another one, and returns it as a
    /// contiguous tensor.
    pub(crate) fn map_of(&self, argument: &'static str, tensor: &Tensor, other: &Tensor) -> Result<Tensor> {
        self.of(argument, tensor, other.dims(), other.dtype())
    }

    /// Checks that the tensor has the given dimensions and dtype, and returns it as a contiguous
    /// tensor.
    pub(crate) fn of(
        &self,
        argument: &'static str,
        tensor: &Tensor,
        dims: &[usize],
        dtype: DType,
    ) -> Result<Tensor> {
        if tensor.dims() != dims {
            return Err(self.shape(argument, tensor, format!("{dims:?}")));
        }
        self.dtype(argument, tensor, dtype)
    }

    /// Returns the error for a wrong shape.
    pub(crate) fn shape(&self, argument: &'static str, tensor: &Tensor, expected: impl ToString) -> Error {
        let expected = expected.to_string();
        Error::Shape { op: self.0, argument, found: tensor.shape().clone(), expected }
    }

    /// Returns the error of [`Check::shape`] for dimensions without a tensor.
    pub(crate) fn sizes(&self, argument: &'static str, dims: &[usize], expected: impl ToString) -> Error {
        Error::Shape { op: self.0, argument, found: Shape::from(dims), expected: expected.to_string() }
    }

    /// Returns the error for a setting that the operation does not support.
    pub(crate) fn setting(&self, message: String) -> Error {
        Error::Setting { op: self.0, message }
    }

    /// Checks that the tensor is `f32` and has the given dimensions, and returns it as a contiguous
    /// tensor.
    pub(crate) fn dims(&self, argument: &'static str, tensor: &Tensor, dims: &[usize]) -> Result<Tensor> {
        self.of(argument, tensor, dims, DType::F32)
    }

    /// Returns the dimensions `[N, H, W, C]` of a feature map, all of which must be at least 1.
    pub(crate) fn map(&self, argument: &'static str, dims: &[usize]) -> Result<(usize, usize, usize, usize)> {
        match dims {
            &[n, h, w, c] if !dims.contains(&0) => Ok((n, h, w, c)),
            _ => Err(self.sizes(argument, dims, "[images, height, width, channels], none of them 0")),
        }
    }

    /// Returns the numbers of rows and channels of a tensor whose last dimension is the channel.
    /// The tensor must not be empty.
    pub(crate) fn rows(&self, argument: &'static str, tensor: &Tensor) -> Result<(usize, usize)> {
        match tensor.dims().last() {
            Some(&c) if tensor.elem_count() > 0 => Ok((tensor.elem_count() / c, c)),
            _ => Err(self.shape(argument, tensor, "[…, channels], not empty")),
        }
    }

    /// Checks that a quantizer's range is `f32` and has the shape `[2]` or, with one column per
    /// channel of `x`, `[2, C]`.
    pub(crate) fn grids(&self, x: &Tensor, quant: Quantizer<'_>) -> Result<()> {
        match (quant.range.dims(), x.dims()) {
            ([2, columns], [.., channels]) if columns == channels => {}
            ([2], _) => {}
            _ => {
                let expected = format!("[2], or [2, C] with C the last of {:?}", x.dims());
                return Err(self.shape("range", quant.range, expected));
            }
        }
        self.float("range", quant.range).map(drop)
    }

    /// Checks that the range of a quantizer, if there is one, is `f32` and has the shape `[2]`.
    pub(crate) fn quantizer(&self, quant: Option<Quantizer<'_>>) -> Result<()> {
        quant.map_or(Ok(()), |quant| self.dims("range", quant.range, &[2]).map(drop))
    }
}
