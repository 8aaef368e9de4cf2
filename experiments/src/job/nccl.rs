//! [`Ranks`] implemented with NCCL for tensors on GPUs, and with MPI for everything else.

use crate::output;
use anyhow::{Context as _, Result, bail};
use candle_core::{Device, Tensor};
use kernels::gpu::nccl::{Communicator, Id};
use ranks::Ranks;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The interval of checks for a failure of NCCL, while the host may be waiting for its sums.
const WATCH: Duration = Duration::from_secs(1);

/// This process as a rank whose GPU is connected to the GPUs of the other ranks.
pub(crate) struct Nccl {
    host: Rc<dyn Ranks>,
    gpus: Arc<Communicator>,
    /// Whether a failure ends the job.
    watched: Arc<AtomicBool>,
}

/// Returns whether all ranks compute on GPUs.
///
/// # Errors
/// If only some of them do, because the ranks would wait for each other.
pub(crate) fn all_on_gpus(ranks: &dyn Ranks, device: &Device) -> Result<bool> {
    let all = ranks.gather(&[f64::from(u8::from(device.is_cuda()))]);
    let shown = |on_gpu: f64| if on_gpu > 0.0 { "a GPU" } else { "the CPU" };
    if let Some(other) = all.iter().position(|on_gpu| *on_gpu != all[0]) {
        let (first, found) = (shown(all[0]), shown(all[other]));
        bail!(
            "rank {other} computes on {found}, but rank 0 on {first}: expected a GPU for each process, or \
             --device cpu"
        );
    }
    Ok(device.is_cuda())
}

impl Nccl {
    /// Connects the GPUs of all ranks; `host` does all other communication.
    ///
    /// # Errors
    /// If NCCL is not installed, or can't connect the GPUs.
    pub fn open(host: Rc<dyn Ranks>, device: &Device) -> Result<Self> {
        let id = if host.is_first() { Id::new()?.0.to_vec() } else { Vec::new() };
        let id = host.broadcast(id).try_into().ok().map(Id);
        let id = id.context("rank 0 did not send the ID for NCCL: expected the same program on all ranks")?;
        let gpus = Communicator::join(id, host.rank(), host.size(), device);
        let gpus =
            gpus.context("the GPUs of the processes can't be connected: expected one GPU for each process")?;
        output::tell(&format!("gradients are added up by NCCL (version {})", gpus.version()));
        let (gpus, watched) = (Arc::new(gpus), Arc::new(AtomicBool::new(true)));
        let (seen, wanted, who) =
            (gpus.clone(), watched.clone(), format!("rank {} of {}", host.rank(), host.size()));
        std::thread::spawn(move || watch(&seen, &wanted, &who));
        Ok(Self { host, gpus, watched })
    }

    /// Waits until no rank has anything left to add up. After that, ranks may disconnect without
    /// causing a failure.
    pub fn part(&self) {
        self.watched.store(false, Ordering::SeqCst);
        self.host.barrier();
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.watched.store(false, Ordering::SeqCst);
    }
}

/// Ends the process, and with it the job, if NCCL fails during the work. The thread that does the
/// work may otherwise wait forever.
fn watch(gpus: &Communicator, watched: &AtomicBool, who: &str) {
    while watched.load(Ordering::SeqCst) {
        // The order of the two checks matters. Ranks disconnect only after the barrier in `part`,
        // before which each of them clears `watched`. So if a failure comes from a rank that has
        // left, `watched` is false by now.
        if let Some(error) = gpus.failure()
            && watched.load(Ordering::SeqCst)
        {
            output::complain(&format!("Error: {who}: {error}"));
            // The job is not finished, so this ends all of it.
            std::process::exit(1);
        }
        std::thread::sleep(WATCH);
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} (NCCL)", self.rank(), self.size())
    }
}

impl Ranks for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn sum(&self, values: &mut [f32]) {
        self.host.sum(values);
    }

    /// NCCL chooses the order of the terms by the numbers of ranks and values, and by how the GPUs
    /// are connected.
    fn sum_tensor(&self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        self.gpus.sum(tensor).map_err(candle_core::Error::wrap)
    }

    fn gather(&self, values: &[f64]) -> Vec<f64> {
        self.host.gather(values)
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        self.host.broadcast(bytes)
    }
}
