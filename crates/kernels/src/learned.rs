//! What the operations of learned quantizers share: their gradients are a tensor and some sums over all elements.

use crate::cpu::{self, CHUNK, Check};
use crate::{Error, Result};
use candle_core::{DeviceLocation, Tensor};
use std::ops::Range;

/// Independent sums that a loop keeps, so that it vectorizes.
pub(crate) const LANES: usize = 16;

/// Sums that a loop keeps lane by lane.
pub(crate) type Lanes = [f64; LANES];

/// An error where a tensor is not on the CPU.
pub(crate) fn on_cpu(check: &Check, tensor: &Tensor) -> Result<()> {
    match elsewhere(check, tensor.device().location()) {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

fn elsewhere(check: &Check, location: DeviceLocation) -> Option<Error> {
    let place = match location {
        DeviceLocation::Cpu => return None,
        DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
    };
    Some(check.setting(format!(
        "has kernels for the CPU only, and a tensor is on {place}; move the network to the CPU, or choose \
         the uniform quantizers"
    )))
}

/// `len` elements and `N` sums over all of them. `f(range, elements)` computes the elements of a chunk, and its share
/// of the sums; the shares are added up in order, so that the threads do not show.
pub(crate) fn map_and_sum<const N: usize>(
    len: usize,
    f: impl Fn(Range<usize>, &mut [f32]) -> [f64; N] + Sync + Send,
) -> (Vec<f32>, [f64; N]) {
    let chunk = |(): &mut (), i: usize, elements: &mut [f32]| {
        let start = i * CHUNK;
        f(start..start + elements.len(), elements)
    };
    let (elements, shares) = cpu::generate(len, 0, CHUNK, || (), chunk);
    let mut sums = [0.0; N];
    for share in shares {
        for (sum, share) in sums.iter_mut().zip(share) {
            *sum += share;
        }
    }
    (elements, sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_devices_are_errors_that_name_the_operation() {
        let check = Check("dsq::forward");
        assert!(elsewhere(&check, DeviceLocation::Cpu).is_none());
        let message = elsewhere(&check, DeviceLocation::Cuda { gpu_id: 1 }).unwrap().to_string();
        for part in ["dsq::forward", "CUDA device 1", "CPU only", "uniform"] {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}
