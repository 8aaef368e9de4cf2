//! The processes of a job that train together, started by `mpirun` or `srun`: rank 0 does all the work of a program, and in its
//! trainings the other ranks take part.

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

/// This process's place in a job, or none where it works alone.
pub(crate) struct Job {
    #[cfg(feature = "mpi")]
    mpi: Option<Rc<mpi::Mpi>>,
    /// Kept until all ranks leave.
    #[cfg(feature = "nccl")]
    gpus: OnceCell<Rc<nccl::Nccl>>,
}

impl Job {
    /// Finds out what this process was started as; in a job of several, waits for the others.
    ///
    /// # Errors
    /// Where MPI can't begin.
    #[cfg(feature = "mpi")]
    pub fn open() -> Result<Self> {
        Ok(Self {
            mpi: started_by_a_launcher().then(mpi::Mpi::open).transpose()?.map(Rc::new),
            #[cfg(feature = "nccl")]
            gpus: OnceCell::new(),
        })
    }

    /// Finds out what this process was started as.
    ///
    /// # Errors
    /// Where it is one of several, as it was built without MPI.
    #[cfg(not(feature = "mpi"))]
    pub fn open() -> Result<Self> {
        let several = |name: &str| std::env::var(name).is_ok_and(|size| !matches!(size.as_str(), "0" | "1"));
        if ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().any(several) {
            anyhow::bail!(
                "this process was started as one of several, and this program was built without MPI: build it with \
                 `cargo build --release -p experiments --features mpi` (docs/cluster.md), or start it alone"
            );
        }
        Ok(Self {})
    }

    /// The ranks that train together, where there are several.
    pub fn ranks(&self) -> Option<Rc<dyn Ranks>> {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = self.mpi.clone().filter(|mpi| mpi.size() > 1) {
            return Some(mpi);
        }
        None
    }

    /// [`Job::ranks`] for trainings on `device`: of GPUs NCCL adds up the gradients, where this was built with it.
    ///
    /// # Errors
    /// Where NCCL can't begin.
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

    /// Ends this process's part of the job with what came of it. An error ends the whole job, as the other ranks would wait for
    /// this one for ever.
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
                // Leaves the job unfinished, which ends it.
                return result;
            }
        }
        self.leave();
        result
    }

    /// Says that the job may end without this process.
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

/// Whether something started this process that may have started others with it: Open MPI's mpirun, or `srun` or another with
/// PMIx or PMI.
#[cfg(feature = "mpi")]
fn started_by_a_launcher() -> bool {
    ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"].into_iter().any(|name| std::env::var_os(name).is_some())
}
