//! The processes of a job that train together, started by `mpirun` or `srun`.
//!
//! Rank 0 does all the work of a program. The other ranks take part in its trainings.

use crate::{output, process};
use anyhow::Result;
use candle_core::Device;
use ranks::Ranks;
#[cfg(feature = "nccl")]
use std::cell::OnceCell;
use std::rc::Rc;

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;

/// This process's place in a job. The process may also work alone.
pub(crate) struct Job {
    #[cfg(feature = "mpi")]
    mpi: Option<Rc<mpi::Mpi>>,
    /// The connection between the GPUs, kept until all ranks leave.
    #[cfg(feature = "nccl")]
    gpus: OnceCell<Rc<nccl::Nccl>>,
}

impl Job {
    /// Finds out how this process was started. In a job of several processes, waits for the other
    /// ones.
    ///
    /// # Errors
    /// If MPI can't be initialized.
    #[cfg(feature = "mpi")]
    pub fn open() -> Result<Self> {
        Ok(Self {
            mpi: started_by_a_launcher().then(mpi::Mpi::open).transpose()?.map(Rc::new),
            #[cfg(feature = "nccl")]
            gpus: OnceCell::new(),
        })
    }

    /// Finds out how this process was started.
    ///
    /// # Errors
    /// If it is one of several processes, because this program was built without MPI.
    #[cfg(not(feature = "mpi"))]
    pub fn open() -> Result<Self> {
        let several = |name: &str| std::env::var(name).is_ok_and(|size| !matches!(size.as_str(), "0" | "1"));
        if ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().any(several) {
            anyhow::bail!(
                "this process was started as one of several, but this program was built without MPI: build \
                 it with `cargo build --release -p experiments --features mpi` (docs/cluster.md), or start \
                 a single process"
            );
        }
        Ok(Self {})
    }

    /// Returns the ranks that train together, if there are several.
    pub fn ranks(&self) -> Option<Rc<dyn Ranks>> {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = self.mpi.clone().filter(|mpi| mpi.size() > 1) {
            return Some(mpi);
        }
        None
    }

    /// Returns [`Job::ranks`] for trainings on `device`. On GPUs, NCCL adds up the gradients if
    /// this program was built with it.
    ///
    /// # Errors
    /// If NCCL can't be initialized, or only some of the ranks compute on GPUs.
    pub fn ranks_on(&self, device: &Device) -> Result<Option<Rc<dyn Ranks>>> {
        #[cfg(feature = "nccl")]
        if let Some(ranks) = self.ranks()
            && nccl::all_on_gpus(&*ranks, device)?
        {
            let gpus = Rc::new(nccl::Nccl::open(ranks, device)?);
            return Ok(Some(self.gpus.get_or_init(|| gpus).clone()));
        }
        let _ = device;
        Ok(self.ranks())
    }

    /// Ends this process's part of the job and passes on the result of its work. An error ends the
    /// whole job, because the other ranks would wait for this one forever.
    pub fn end<T>(self, result: Result<T>) -> Result<T> {
        let Some(ranks) = self.ranks() else {
            self.leave();
            return result;
        };
        match &result {
            Ok(_) if ranks.is_first() => train::dismiss(&*ranks),
            Ok(_) => (),
            Err(error) => {
                let error = process::one_line(error);
                output::complain(&format!("Error: rank {} of {}: {error}", ranks.rank(), ranks.size()));
                // Returning without leaving ends the whole job.
                return result;
            }
        }
        self.leave();
        result
    }

    /// Declares that the job may end without this process.
    fn leave(&self) {
        #[cfg(feature = "nccl")]
        if let Some(gpus) = self.gpus.get() {
            gpus.part();
        }
        #[cfg(feature = "mpi")]
        if let Some(mpi) = &self.mpi {
            mpi.leave();
        }
    }
}

/// Returns whether a launcher that may have started other processes too has started this one: Open
/// MPI's mpirun, or `srun` or another launcher with PMIx or PMI.
#[cfg(feature = "mpi")]
fn started_by_a_launcher() -> bool {
    ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"].into_iter().any(|name| std::env::var_os(name).is_some())
}
