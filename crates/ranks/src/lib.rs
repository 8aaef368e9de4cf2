//! Processes that train one network together, seen from one of them.
//!
//! They need only sums of gradients, the values of all ranks, and broadcasts from rank 0; [`Ranks`]
//! has these operations. Programs implement it with MPI and, for tensors on GPUs, with NCCL (in
//! `experiments`). [`threads()`] are ranks within one process.

#![forbid(unsafe_code)]

mod threads;

pub use threads::{Thread, threads};

use candle_core::{Result, Tensor};
use std::fmt::Debug;

/// The ranks of a job, seen from one of them.
///
/// All ranks must make the same calls in the same order, and each call waits for the other ranks.
/// The calls other than [`Ranks::sum_tensor`] cannot fail: a job cannot continue after it has lost
/// a rank, so an implementation ends the whole job.
pub trait Ranks: Debug {
    /// Returns the number of this rank, from 0. Rank 0 stores and reports the results.
    fn rank(&self) -> usize;

    /// Returns the number of ranks, at least 1.
    fn size(&self) -> usize;

    /// Replaces `values` by their sums over all ranks.
    ///
    /// Every rank must pass the same number of values, and gets the same bits. The order of the
    /// terms depends only on the number of ranks and the number of values.
    fn sum(&self, values: &mut [f32]);

    /// Returns the sums of an `f32` tensor over all ranks, with the shape and the device of
    /// `tensor`.
    ///
    /// # Errors
    /// If the tensor has another dtype or its device fails. The caller must then end the job,
    /// because the other ranks wait.
    fn sum_tensor(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut values = tensor.flatten_all()?.to_vec1()?;
        self.sum(&mut values);
        Tensor::from_vec(values, tensor.shape(), tensor.device())
    }

    /// Returns the values of all ranks, in the order of the ranks. Every rank must pass the same
    /// number of values.
    fn gather(&self, values: &[f64]) -> Vec<f64>;

    /// Returns what rank 0 passes, of any length. What the other ranks pass is ignored.
    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8>;

    /// Waits until every rank has made this call.
    fn barrier(&self) {
        self.gather(&[0.0]);
    }

    /// Returns whether this is rank 0, which stores and reports the results.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Returns the sums of `values` over all ranks, in `f64`, added in the order of the ranks.
    fn totals(&self, values: &[f64]) -> Vec<f64> {
        let all = self.gather(values);
        let of = |i: usize| all[i..].iter().step_by(values.len()).sum();
        (0..values.len()).map(of).collect()
    }
}
