//! Processes that train one network together, as each of them sees the others.
//!
//! What they need of an engine is little: sums of gradients, the numbers of all, and what the first one says. [`Ranks`] is
//! that; the engines of programs are MPI and, for what lies on GPUs, NCCL (in `experiments`), and [`threads`] are ranks within
//! one process.

#![forbid(unsafe_code)]

mod threads;

pub use threads::{Thread, threads};

use candle_core::{Result, Tensor};
use std::fmt::Debug;

/// The ranks of a job, seen from one of them.
///
/// All ranks make the same calls in the same order, and each call waits for the others. None of them fails: where a rank is
/// lost there is nothing to go on with, so an engine ends the whole job.
pub trait Ranks: Debug {
    /// This one's number, from 0. Rank 0 keeps what comes of the work and tells of it.
    fn rank(&self) -> usize;

    /// How many there are, at least 1.
    fn size(&self) -> usize;

    /// Replaces `values`, of which every rank has as many, by their sums over all ranks. Every rank gets the same bits; the
    /// order of the terms depends on the numbers of ranks and of values alone.
    fn sum(&self, values: &mut [f32]);

    /// [`Ranks::sum`] of a tensor of `f32`, where it lies; the sums are a tensor of the same shape.
    ///
    /// # Errors
    /// Where the tensor is of another type, or its device fails: the job is to be ended then, as the others wait.
    fn sum_tensor(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut values = tensor.flatten_all()?.to_vec1()?;
        self.sum(&mut values);
        Tensor::from_vec(values, tensor.shape(), tensor.device())
    }

    /// The values of all ranks, each of which gives as many, in the order of the ranks.
    fn gather(&self, values: &[f64]) -> Vec<f64>;

    /// What rank 0 says, of any length; what others give is not looked at.
    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8>;

    /// Waits until every rank has come here.
    fn barrier(&self) {
        self.gather(&[0.0]);
    }

    /// Whether this is the rank that keeps what comes of the work.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// The sums of `values` over all ranks, in `f64`, added up in the order of the ranks.
    fn totals(&self, values: &[f64]) -> Vec<f64> {
        let all = self.gather(values);
        let of = |i: usize| all[i..].iter().step_by(values.len()).sum();
        (0..values.len()).map(of).collect()
    }
}
