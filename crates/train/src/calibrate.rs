use crate::{Error, Result};
use candle_core::DType;
use datasets::{Augmentation, Dataset, Feed};
use models::{Network, Step};

/// Moves the ranges of the uniform quantizers of `network`'s activations, on its device, to those of training images, in
/// place: the first of `batches` batches of `batch` images sets them, and each further one moves them by `momentum` of the
/// distance to its extremes. Images are not augmented; their order is that of seed 0. Nothing else of the network changes.
///
/// # Errors
/// When there are fewer training images than a batch has, or a pass can't be computed.
pub fn calibrate(
    network: &mut Network,
    data: &dyn Dataset,
    (batches, batch): (usize, usize),
    momentum: f64,
) -> Result<()> {
    // A training pass moves running statistics too.
    let mut moved = network.duplicate()?;
    let mut feed = Feed::new(data, network.device(), DType::F32);
    let mut passes = 0;
    for batch in feed.train(batch, Augmentation { pad: 0, flip: false }, 0, 0)?.take(batches) {
        let range_momentum = if passes == 0 { 1.0 } else { momentum };
        moved.forward_train(&batch?.images, Step::alone(range_momentum))?;
        passes += 1;
    }
    if passes == 0 {
        let expected = "at least one batch, of at most the number of training images";
        return Err(Error::Setting { key: "calibration", found: format!("{batches} of {batch}"), expected });
    }
    Ok(network.take_ranges(&moved)?)
}
