use crate::{Error, Result};
use candle_core::DType;
use datasets::{Augmentation, Dataset, Feed};
use models::{Network, Step};

/// Sets the ranges of the uniform activation quantizers of `network` from training images.
///
/// The first of `batches` batches of `batch` images sets the ranges, and each further batch moves
/// them by `momentum` of the distance to its extremes. Images are not augmented, and their order is
/// that of seed 0. Nothing else in the network changes.
///
/// # Errors
/// If no batch is asked for or there are no training images, or if a forward pass fails.
pub fn calibrate(
    network: &mut Network,
    data: &dyn Dataset,
    (batches, batch): (usize, usize),
    momentum: f64,
) -> Result<()> {
    // A training pass also moves the running statistics, so it runs on a copy.
    let mut moved = network.duplicate()?;
    let mut feed = Feed::new(data, network.device(), DType::F32);
    let mut passes = 0;
    for batch in feed.train(batch, Augmentation { pad: 0, flip: false }, 0, 0)?.take(batches) {
        let range_momentum = if passes == 0 { 1.0 } else { momentum };
        moved.forward_train(&batch?.images, Step::alone(range_momentum))?;
        passes += 1;
    }
    if passes == 0 {
        let expected = "at least one batch of at least one training image";
        return Err(Error::Setting { key: "calibration", found: format!("{batches} of {batch}"), expected });
    }
    Ok(network.take_ranges(&moved)?)
}
