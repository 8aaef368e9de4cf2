//! Algorithm 1 on pictures that are read from files when they are needed.

mod common;

use candle_core::Device;
use common::{executed, mobilenet, recipe, run_well, training};
use datasets::imagenet::{self, ImageNet, Limit, Options};
use datasets::{Augmentation, DataSource, Dataset};
use image::{Rgb, RgbImage};
use models::{Input, MobileNet, Version};
use std::path::Path;
use train::{Training, evaluate};
use workflow::{Purpose, Stage, StageKind, Store};

fn load(folder: &Path, options: &Options) -> ImageNet {
    imagenet::load(&DataSource::Folder(folder.into()), options, &mut |_| ()).unwrap()
}

/// Runs pre-training, pruning and both fine-tunings, one epoch each, on images of 224 × 224 pixels.
fn check_algorithm1(data: &ImageNet) {
    let training = Training { augmentation: Augmentation { pad: 0, flip: true }, batch: 10, ..training(1) };
    let network = MobileNet { input: Input::Imagenet, classes: data.classes(), ..mobilenet(Version::V2) };
    let mut recipe = recipe(4);
    recipe.trainings.set(Purpose::Activations, training);
    recipe.trainings.set(Purpose::Weights, training);
    let end = recipe.algorithm1(&Stage::root(StageKind::Pretrain { network, training, seed: 3 })).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path());
    let (outcome, told) = run_well(&store, &end, data);
    assert_eq!(executed(&told).len(), 5);
    assert_eq!(outcome.data.name, data.name());
    assert!(outcome.metrics[0].train_loss.is_finite());
    // The reported evaluation is that of the network in the file, and the next call finds it.
    let network = store.network(&end, data.fingerprint(), &Device::Cpu).unwrap();
    assert_eq!(network.input, [224, 224, 3]);
    assert_eq!(evaluate(&network, data).unwrap(), outcome.evaluation);
    assert!(executed(&run_well(&store, &end, data).1).is_empty());
}

#[test]
fn a_folder_of_pictures_is_trained_on_and_damaged_ones_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    for (split, count) in [("train", 12u32), ("val", 4)] {
        for (class, colour) in [("cats", [200, 80, 40]), ("dogs", [40, 90, 210])] {
            let place = folder.path().join(split).join(class);
            std::fs::create_dir_all(&place).unwrap();
            for i in 0..count {
                let shade = |x: u32, y: u32, value: u8| value.wrapping_add(((x * y + 7 * i) % 40) as u8);
                let picture =
                    RgbImage::from_fn(40 + i, 36, |x, y| Rgb(colour.map(|value| shade(x, y, value))));
                picture.save(place.join(format!("{i}.png"))).unwrap();
            }
        }
    }
    std::fs::write(folder.path().join("train/cats/5.png"), b"not a picture").unwrap();
    let data = load(folder.path(), &Options { bad_percent: 10.0, ..Options::default() });
    assert_eq!((data.classes(), data.train_images(), data.test_images()), (2, 24, 8));
    check_algorithm1(&data);
    let skipped = data.skipped();
    assert!(skipped.len() == 1 && skipped[0].file.ends_with("5.png"), "{skipped:?}");
}

/// Algorithm 1 runs on ImageNet's validation images, if `PFQ_IMAGENET` names their folder. They are
/// used for training too, because the folder may have no others.
#[test]
#[cfg(unix)]
fn real_pictures_are_trained_on() {
    let Some(real) = std::env::var_os("PFQ_IMAGENET").filter(|value| !value.is_empty()) else {
        eprintln!("SKIPPED: PFQ_IMAGENET names no folder with ImageNet's validation images in val/");
        return;
    };
    let (real, folder) = (Path::new(&real), tempfile::tempdir().unwrap());
    for split in ["train", "val"] {
        std::os::unix::fs::symlink(real.join("val").canonicalize().unwrap(), folder.path().join(split))
            .unwrap();
    }
    for list in ["class_index.tsv", "val.txt", "LOC_val_solution.csv"] {
        std::fs::copy(real.join(list), folder.path().join(list)).ok();
    }
    let limit = Some(Limit::Total(100));
    check_algorithm1(&load(
        folder.path(),
        &Options { train_limit: limit, test_limit: limit, ..Options::default() },
    ));
}
