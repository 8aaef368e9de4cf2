//! CUDA graphs: work on a GPU that is recorded once and repeated by one call.
//!
//! A training step is hundreds of short kernels, and each launch costs the host some microseconds.
//! With small batches the GPU waits for the host. A graph costs one launch.

use candle_core::{Device, Error};

/// Work that was recorded in a device's stream.
///
/// It reads and writes the memory that it was recorded with. So its owner must keep the tensors
/// alive that existed before the recording. Memory that was allocated and freed during the
/// recording belongs to the graph.
pub struct Graph {
    #[cfg(feature = "cuda")]
    graph: candle_core::cuda::cudarc::driver::CudaGraph,
}

impl Graph {
    /// Records what `work` puts into the stream of `device`, without running it. Tensors that
    /// `work` makes must not outlive it.
    ///
    /// The same work should have run normally before, so that one-time steps (loading modules,
    /// setting up libraries) are done. Nothing in it may wait for the device or copy from the
    /// host's memory.
    ///
    /// # Errors
    /// Returns the errors of `work`, and the driver's if it cannot record the work. The stream is
    /// then as it was before.
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

    /// Appends the work to the stream of the device that it was recorded on.
    pub fn launch(&self) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        super::cuda::replay(&self.graph)?;
        Ok(())
    }
}
