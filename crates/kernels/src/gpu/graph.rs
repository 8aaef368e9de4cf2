//! Work on a GPU that is recorded once and done again by one call: a CUDA graph.
//!
//! A training step is hundreds of short kernels, each of which costs the host some microseconds to launch, and the GPU waits
//! for it where batches are small. A graph costs one launch.

use candle_core::{Device, Error};

/// Work that was recorded in a device's stream.
///
/// It reads and writes the memory that it was recorded with, so its owner keeps the tensors alive that were there before; what
/// was made and dropped while it was recorded is memory of the graph.
pub struct Graph {
    #[cfg(feature = "cuda")]
    graph: candle_core::cuda::cudarc::driver::CudaGraph,
}

impl Graph {
    /// Records what `work` puts into the stream of `device`; nothing of it is done. Tensors that it makes must not outlive it.
    ///
    /// It should have been done before in the usual way, so that what happens only once (loading modules, setting up
    /// libraries) is over. Nothing in it may wait for the device or copy from the host's memory.
    ///
    /// # Errors
    /// The work's own, and what the driver says against recording it. The stream is as it was before then.
    pub fn record<E: From<Error>>(device: &Device, work: impl FnOnce() -> Result<(), E>) -> Result<Self, E> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => super::cuda::record(device, work).map(|graph| Self { graph }),
            _ => {
                let _ = work;
                Err(E::from(Error::Msg(format!("{device:?} has no CUDA graphs")).bt()))
            }
        }
    }

    /// Puts the work at the end of the stream of the device that it was recorded on.
    pub fn launch(&self) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        super::cuda::replay(&self.graph)?;
        Ok(())
    }
}
