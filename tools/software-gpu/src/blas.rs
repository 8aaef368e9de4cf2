//! The cuBLAS functions that are used: matrix products.
//!
//! Sums are taken in ascending order, in `f32`. For TF32, the operands are rounded to TF32.

// These are functions of a C library, which take pointers from the caller.
#![allow(unsafe_code)]

use crate::device::touch;
use crate::driver::{functions, give};
use crate::graphs;
use crate::memory;
use crate::ops::Value;
use crate::{Error, Result};
use half::bf16;
use rayon::prelude::*;
use std::ffi::{c_int, c_void};

type Address = u64;

/// The state behind a handle.
struct Blas {
    stream: u64,
    /// Whether the factors alpha and beta are on the device.
    factors_on_device: bool,
}

/// Returns the state of a handle. Only one thread at a time makes calls with a handle.
fn blas(handle: *mut c_void) -> Result<&'static mut Blas> {
    if handle.is_null() {
        return Err(Error::Call("no handle".into()));
    }
    // SAFETY: the handle comes from `cublasCreate_v2`.
    Ok(unsafe { &mut *handle.cast::<Blas>() })
}

/// A matrix as cuBLAS describes it: column-major, with a stride of `lead` elements between columns.
#[derive(Clone, Copy)]
struct Matrix {
    at: Address,
    /// The type of an element, as `cudaDataType` numbers it.
    kind: c_int,
    lead: c_int,
    transposed: bool,
}

const F32: c_int = 0;
const BF16: c_int = 14;
/// `CUBLAS_COMPUTE_32F_FAST_TF32`.
const TF32: c_int = 77;

fn size_of(kind: c_int) -> Result<usize> {
    match kind {
        F32 => Ok(4),
        BF16 => Ok(2),
        _ => Err(Error::NotSupported(format!("the type {kind} of matrices"))),
    }
}

impl Matrix {
    /// Returns the matrix's address and size in bytes, for `columns` stored columns of `rows`
    /// elements.
    fn bytes(&self, rows: usize, columns: usize) -> Result<(Address, usize)> {
        let lead = self.lead as usize;
        if lead < rows.max(1) {
            return Err(Error::Call(format!("columns of {rows} elements, and {lead} from one to the next")));
        }
        let count = if rows == 0 || columns == 0 { 0 } else { (columns - 1) * lead + rows };
        Ok((self.at, count * size_of(self.kind)?))
    }

    /// Returns the stored element `(row, column)`.
    fn element(&self, row: usize, column: usize) -> Result<f32> {
        let size = size_of(self.kind)?;
        let at = self.at + ((column * self.lead as usize + row) * size) as u64;
        // SAFETY: `touch` has checked that these bytes are within an allocation.
        let bits = unsafe { memory::load(at, size) };
        Ok(match self.kind {
            F32 => f32::of(bits),
            _ => bf16::of(bits).into(),
        })
    }

    /// Returns the elements of the matrix `[rows, columns]` in row-major order, after its
    /// transposition, if any.
    fn rows(&self, rows: usize, columns: usize, tf32: bool) -> Result<Vec<f32>> {
        let all = (0..rows * columns).into_par_iter().map(|i| {
            let (row, column) = (i / columns, i % columns);
            let value = if self.transposed { self.element(column, row) } else { self.element(row, column) }?;
            Ok(if tf32 { rounded_to_tf32(value) } else { value })
        });
        all.collect()
    }
}

/// Rounds to TF32: to 10 fraction bits, to nearest, ties to even.
fn rounded_to_tf32(x: f32) -> f32 {
    if !x.is_finite() {
        return x;
    }
    let bits = x.to_bits();
    f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff)
}

/// Reads a factor from the host or the device.
fn factor(at: u64) -> f32 {
    // SAFETY: the API asks for a pointer to a factor.
    unsafe { *(at as *const f32) }
}

/// Puts `c = alpha·a·b + beta·c` into the handle's stream.
///
/// `c` is `[m, n]`, and a sum has `k` terms. There are `batch` matrices, at strides that count
/// elements.
fn product(
    handle: *mut c_void,
    (m, n, k): (c_int, c_int, c_int),
    (alpha, beta): (*const c_void, *const c_void),
    (a, b, c): (Matrix, Matrix, Matrix),
    compute: c_int,
    (batch, strides): (c_int, [i64; 3]),
) -> Result<()> {
    let blas = blas(handle)?;
    let [m, n, k] = [m, n, k].map(|n| n as usize);
    let places = [alpha as u64, beta as u64];
    // Factors on the host are read now.
    let known = (!blas.factors_on_device).then(|| places.map(factor));
    graphs::put(blas.stream, move |stream| {
        let [alpha, beta] = match known {
            Some(factors) => factors,
            None => {
                touch(stream, &places.map(|place| (place, 4)))?;
                places.map(factor)
            }
        };
        products((m, n, k), (alpha, beta), (a, b, c), compute, (batch, strides), stream)
    })
}

/// Computes a [`product`] now.
fn products(
    (m, n, k): (usize, usize, usize),
    (alpha, beta): (f32, f32),
    (a, b, c): (Matrix, Matrix, Matrix),
    compute: c_int,
    (batch, strides): (c_int, [i64; 3]),
    stream: u64,
) -> Result<()> {
    for i in 0..i64::from(batch) {
        let moved = |matrix: &Matrix, stride: i64| -> Result<Matrix> {
            let at = matrix.at + (i * stride) as u64 * size_of(matrix.kind)? as u64;
            Ok(Matrix { at, ..*matrix })
        };
        let (a, b, c) = (moved(&a, strides[0])?, moved(&b, strides[1])?, moved(&c, strides[2])?);
        let stored = |matrix: &Matrix, rows, columns| {
            if matrix.transposed { matrix.bytes(columns, rows) } else { matrix.bytes(rows, columns) }
        };
        touch(stream, &[stored(&a, m, k)?, stored(&b, k, n)?, c.bytes(m, n)?])?;
        multiply((&a, &b, &c), (m, n, k), (alpha, beta), compute == TF32)?;
    }
    Ok(())
}

/// Computes one product.
fn multiply(
    (a, b, c): (&Matrix, &Matrix, &Matrix),
    (m, n, k): (usize, usize, usize),
    (alpha, beta): (f32, f32),
    tf32: bool,
) -> Result<()> {
    let (left, right) = (a.rows(m, k, tf32)?, b.rows(k, n, tf32)?);
    let size = size_of(c.kind)?;
    (0..m).into_par_iter().try_for_each(|row| {
        let mut sums = vec![0.0; n];
        for (&x, others) in left[row * k..][..k].iter().zip(right.chunks_exact(n)) {
            for (sum, &other) in sums.iter_mut().zip(others) {
                *sum += x * other;
            }
        }
        for (column, &sum) in sums.iter().enumerate() {
            let scaled = alpha * sum;
            // With beta = 0, the old value is not read: it may be NaN.
            let value = match beta {
                0.0 => scaled,
                _ => {
                    let old = f64::from(beta) * f64::from(c.element(row, column)?);
                    (f64::from(scaled) + old) as f32
                }
            };
            let bits = match c.kind {
                F32 => value.bits(),
                _ => bf16::from_f32(value).bits(),
            };
            // SAFETY: `touch` has checked that these bytes are within an allocation.
            unsafe { memory::store(c.at + ((column * c.lead as usize + row) * size) as u64, size, bits) };
        }
        Ok(())
    })
}

functions! {
    fn cublasCreate_v2(handle: *mut *mut c_void) {
        give(handle, Box::into_raw(Box::new(Blas { stream: 0, factors_on_device: false })).cast())
    }

    fn cublasDestroy_v2(handle: *mut c_void) {
        let blas: *mut Blas = blas(handle)?;
        // SAFETY: the handle comes from `cublasCreate_v2`.
        drop(unsafe { Box::from_raw(blas) });
        Ok(())
    }

    fn cublasSetStream_v2(handle: *mut c_void, stream: u64) {
        blas(handle)?.stream = stream;
        Ok(())
    }

    fn cublasSetPointerMode_v2(handle: *mut c_void, mode: c_int) {
        blas(handle)?.factors_on_device = mode == 1;
        Ok(())
    }

    fn cublasGemmEx(
        handle: *mut c_void, a_transposed: c_int, b_transposed: c_int, m: c_int, n: c_int, k: c_int,
        alpha: *const c_void, a: Address, a_kind: c_int, a_lead: c_int, b: Address, b_kind: c_int, b_lead: c_int,
        beta: *const c_void, c: Address, c_kind: c_int, c_lead: c_int, compute: c_int, _algorithm: c_int,
    ) {
        let a = Matrix { at: a, kind: a_kind, lead: a_lead, transposed: a_transposed != 0 };
        let b = Matrix { at: b, kind: b_kind, lead: b_lead, transposed: b_transposed != 0 };
        let c = Matrix { at: c, kind: c_kind, lead: c_lead, transposed: false };
        product(handle, (m, n, k), (alpha, beta), (a, b, c), compute, (1, [0; 3]))
    }

    fn cublasGemmStridedBatchedEx(
        handle: *mut c_void, a_transposed: c_int, b_transposed: c_int, m: c_int, n: c_int, k: c_int,
        alpha: *const c_void, a: Address, a_kind: c_int, a_lead: c_int, a_stride: i64, b: Address, b_kind: c_int,
        b_lead: c_int, b_stride: i64, beta: *const c_void, c: Address, c_kind: c_int, c_lead: c_int, c_stride: i64,
        batch: c_int, compute: c_int, _algorithm: c_int,
    ) {
        let a = Matrix { at: a, kind: a_kind, lead: a_lead, transposed: a_transposed != 0 };
        let b = Matrix { at: b, kind: b_kind, lead: b_lead, transposed: b_transposed != 0 };
        let c = Matrix { at: c, kind: c_kind, lead: c_lead, transposed: false };
        product(handle, (m, n, k), (alpha, beta), (a, b, c), compute, (batch, [a_stride, b_stride, c_stride]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{allocated, alone, upload};

    /// `[1 2 3; 4 5 6]·[1 0; 0 1; 1 1] = [4 5; 10 11]`, column-major, plain and transposed, times
    /// 2, plus 10 times the old values.
    #[test]
    fn products_in_columns() {
        let _alone = alone();
        let (plain_a, transposed_a) = ([1., 4., 2., 5., 3., 6.], [1., 2., 3., 4., 5., 6.]);
        let (plain_b, transposed_b) = ([1., 0., 1., 0., 1., 1.], [1., 0., 0., 1., 1., 1.]);
        for (a, a_lead, a_transposed) in [(plain_a, 2, 0), (transposed_a, 3, 1)] {
            for (b, b_lead, b_transposed) in [(plain_b, 3, 0), (transposed_b, 2, 1)] {
                let (a, b, c) = (upload(&a), upload(&b), upload(&[1f32, 2., f32::NAN, 3., 4.]));
                let mut handle = std::ptr::null_mut();
                assert_eq!(cublasCreate_v2(&raw mut handle), 0);
                let (alpha, beta) = (2f32, 10f32);
                let status = cublasGemmEx(
                    handle,
                    a_transposed,
                    b_transposed,
                    2,
                    2,
                    3,
                    (&raw const alpha).cast(),
                    a,
                    F32,
                    a_lead,
                    b,
                    F32,
                    b_lead,
                    (&raw const beta).cast(),
                    c,
                    F32,
                    3,
                    68,
                    0,
                );
                assert_eq!(status, 0);
                let found: Vec<f32> = allocated(c, 5);
                assert_eq!([found[0], found[1], found[3], found[4]], [18., 40., 40., 62.]);
                assert!(found[2].is_nan(), "between the columns nothing is written");
                assert_eq!(cublasDestroy_v2(handle), 0);
            }
        }
    }

    #[test]
    fn ten_bits_are_left() {
        let unit = 2f32.powi(-10);
        assert_eq!(rounded_to_tf32(1.0 + unit), 1.0 + unit);
        assert_eq!(rounded_to_tf32(1.0 + 0.5 * unit), 1.0);
        assert_eq!(rounded_to_tf32(1.0 + 1.5 * unit), 1.0 + 2.0 * unit);
        assert_eq!(rounded_to_tf32(-1.0 - 0.51 * unit), -1.0 - unit);
        assert!(rounded_to_tf32(f32::NAN).is_nan());
    }
}
