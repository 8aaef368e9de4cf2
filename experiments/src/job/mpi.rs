//! [`Ranks`] implemented with MPI.

use anyhow::{Context as _, Result};
use mpi::Threading;
use mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use mpi::environment::Universe;
use mpi::topology::{Communicator, SimpleCommunicator};
use ranks::Ranks;
use std::cell::Cell;
use std::fmt;

/// This process as a rank of MPI. By MPI's default, an error in MPI ends the job. Dropping this
/// before the rank has left ends the job too.
pub(crate) struct Mpi {
    world: SimpleCommunicator,
    left: Cell<bool>,
    /// Dropped last, because dropping it waits for the other ranks.
    _universe: Universe,
}

impl Mpi {
    /// Joins the ranks that were started with this process. After that, only this thread may call
    /// MPI.
    pub fn open() -> Result<Self> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled)
            .context("MPI has already been initialized")?;
        Ok(Self { world: universe.world(), left: Cell::new(false), _universe: universe })
    }

    /// Declares that the job may end without this rank.
    pub fn leave(&self) {
        self.left.set(true);
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // This is an error or a panic: the other ranks would wait for this one forever.
        if !self.left.get() {
            self.world.abort(1);
        }
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} (MPI)", self.rank(), self.size())
    }
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    /// MPI requires that every rank gets identical results. It only recommends that they are the
    /// same from run to run; Open MPI chooses the order by the numbers of ranks and of values.
    fn sum(&self, values: &mut [f32]) {
        let own = values.to_vec();
        self.world.all_reduce_into(&own[..], values, SystemOperation::sum());
    }

    fn gather(&self, values: &[f64]) -> Vec<f64> {
        let mut all = vec![0.0; values.len() * self.size()];
        self.world.all_gather_into(values, &mut all[..]);
        all
    }

    fn broadcast(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let first = self.world.process_at_rank(0);
        let mut length = bytes.len() as u64;
        first.broadcast_into(&mut length);
        bytes.resize(length as usize, 0);
        // MPI requires a valid address, which an empty buffer does not have.
        if length > 0 {
            first.broadcast_into(&mut bytes[..]);
        }
        bytes
    }
}
