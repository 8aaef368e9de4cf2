//! Test images for `pfq eval`.

use crate::progress::Display;
use crate::{profile, session};
use anyhow::{Context as _, Result, bail};
use datasets::Dataset;
use datasets::imagenet::{Limit, Options};
use models::Network;

/// Rows and columns of the smallest images that are ImageNet's rather than CIFAR-100's.
const LARGE: usize = 64;

/// The test images that `--data` asks for, of the data set that the network's input is laid out for.
pub(super) fn load(
    wanted: &str,
    limit: Option<usize>,
    bad_percent: f64,
    network: &Network,
) -> Result<Box<dyn Dataset>> {
    let [height, width, _] = network.input;
    let imagenet = (height >= LARGE).then(|| Options {
        side: height,
        resize: height * 8 / 7,
        test_limit: limit.map(Limit::Total),
        bad_percent,
        ..Options::default()
    });
    let of_imagenet = imagenet.is_some();
    let test_images = limit.filter(|_| !of_imagenet);
    let settings = profile::DataSettings { train_images: None, test_images, hold_out: None, imagenet };
    let mut data = session::load(wanted, &settings, &mut Display::new());
    if of_imagenet {
        data = data.with_context(|| {
            format!(
                "the network's input of {height}×{width} pixels is ImageNet's (public weights trained on CIFAR-100's \
                 32×32: say their --strides)"
            )
        });
    }
    let data = data?;
    if data.side() != (height, width) {
        let (rows, columns) = data.side();
        bail!(
            "the network is laid out for images of {height}×{width} pixels, {} has {rows}×{columns}",
            data.name()
        );
    }
    if network.classes() != data.classes() {
        bail!(
            "the network tells {} classes apart, {} has {}",
            network.classes(),
            data.name(),
            data.classes()
        );
    }
    Ok(data)
}
