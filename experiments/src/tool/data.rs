//! Images for the tool's commands.

use crate::profile::DataSettings;
use crate::progress::Display;
use crate::session;
use anyhow::{Context as _, Result, bail};
use datasets::Dataset;
use datasets::imagenet::{Limit, Options};
use models::Network;
use std::path::Path;

/// The minimum input height, in pixels, from which images are ImageNet's rather than CIFAR-100's if
/// `--data` is not a folder of pictures.
pub(super) const LARGE: usize = 64;

/// The folders that mark a folder as one of pictures. One of CIFAR-100's files is called `train` too.
const FOLDERS: [&str; 4] = ["train", "val", "validation", "ILSVRC"];

/// The files that do so.
const ARCHIVES: [&str; 2] = ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"];

/// The images that a command uses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// The value of `--data`.
    pub place: &'a str,
    /// The maximum number of training and of test images.
    pub limits: [Option<usize>; 2],
    /// The share of pictures that may be damaged, in percent.
    pub bad_percent: f64,
    /// The settings that say how much of CIFAR-100 is used, which training images replace the test
    /// set, and how pictures are cropped.
    pub settings: Option<&'a DataSettings>,
}

/// Loads the images at the size of the network's input: pictures if the place is a folder of them
/// or the input is large, CIFAR-100 otherwise.
pub(super) fn load(wanted: Wanted, network: &Network) -> Result<Box<dyn Dataset>> {
    let Wanted { place, limits: [train, test], bad_percent, settings } = wanted;
    let [height, width, _] = network.input;
    let at = |name: &&str| Path::new(place).join(name);
    let is_folder_of_pictures =
        FOLDERS.iter().any(|name| at(name).is_dir()) || ARCHIVES.iter().any(|name| at(name).is_file());
    let imagenet = (is_folder_of_pictures || height >= LARGE).then(|| {
        let given = settings.and_then(|settings| settings.imagenet.clone());
        let given = given.unwrap_or_else(|| Options { resize: height * 8 / 7, ..Options::default() });
        Options {
            side: height,
            train_limit: train.map(Limit::Total).or(given.train_limit),
            test_limit: test.map(Limit::Total).or(given.test_limit),
            bad_percent,
            ..given
        }
    });
    let of_imagenet = imagenet.is_some();
    let of_cifar = |limit: Option<usize>, given: fn(&DataSettings) -> Option<usize>| {
        limit.or_else(|| settings.and_then(given)).filter(|_| !of_imagenet)
    };
    let settings = DataSettings {
        train_images: of_cifar(train, |settings| settings.train_images),
        test_images: of_cifar(test, |settings| settings.test_images),
        hold_out: settings.and_then(|settings| settings.hold_out),
        imagenet,
    };
    let mut data = session::load(place, &settings, &mut Display::new());
    if of_imagenet && !is_folder_of_pictures {
        data = data.with_context(|| {
            format!(
                "the network's input has {height}×{width} pixels, so --data must be pictures (for public weights \
                 trained on CIFAR-100's 32×32, give their --strides)"
            )
        });
    }
    let data = data?;
    if data.side() != (height, width) {
        let (rows, columns) = data.side();
        bail!(
            "the network expects images of {height}×{width} pixels, but those of {} have {rows}×{columns}",
            data.title()
        );
    }
    if network.classes() != data.classes() {
        bail!(
            "the network tells {} apart, but there are {} ({})",
            report::counted(network.classes(), "class"),
            data.classes(),
            data.title()
        );
    }
    Ok(data)
}
