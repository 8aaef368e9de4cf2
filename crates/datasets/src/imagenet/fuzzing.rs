//! Entry points for the fuzz targets, which read untrusted bytes.
//!
//! For any input they must return, with or without an error, and use memory in proportion to it.

use std::fs;
use std::path::Path;

use pictures::Scaler;

use super::classes::Classes;
use super::labels::ValidationLabels;
use super::transform::Transform;
use super::{Options, archive};
use crate::batches::Normalization;
use crate::memory::CHANNELS;

/// Reads the Python format of CIFAR-100 with two records.
pub fn cifar_pickle(data: &[u8]) {
    let _ = crate::cifar::parse_python("input", data, 2);
}

/// Decodes a picture and prepares it for evaluation and for training.
pub fn picture(data: &[u8]) {
    let Ok(picture) = pictures::decode(data) else { return };
    let options = Options { side: 28, resize: 32, ..Options::default() };
    let table = Normalization::of([0.0; 3], [1.0; 3]);
    for transform in [Transform::Test, Transform::Train { seed: 1, epoch: 0, index: 0, flip: true }] {
        let mut target = vec![0.0; options.side * options.side * CHANNELS];
        transform
            .write(&picture, &options, &table, &mut Scaler::default(), &mut target)
            .expect("any picture");
    }
}

/// Reads an archive of pictures. Every position that is found must lie inside the archive.
pub fn tar(data: &[u8], folder: &Path) {
    let path = folder.join("pictures.tar");
    fs::write(&path, data).expect("the folder can be written");
    for stored in archive::pictures(&path, &mut |_| {}).unwrap_or_default() {
        stored.read().expect("what is listed is there");
    }
}

/// Reads an index with these members next to an archive of 4096 bytes.
pub fn index(data: &[u8], folder: &Path) {
    let path = folder.join("pictures.tar");
    fs::write(&path, [0; 4096]).expect("the folder can be written");
    archive::set_index(&path, data);
    for stored in archive::pictures(&path, &mut |_| {}).unwrap_or_default() {
        stored.read().expect("what is listed is there");
    }
}

/// Reads files that give the classes and their order.
pub fn labels(data: &[u8], folder: &Path) {
    let (labels, classes) = (folder.join("val.txt"), folder.join("class_index.tsv"));
    for path in [&labels, &classes, &folder.join("map_clsloc.txt")] {
        fs::write(path, data).expect("the folder can be written");
    }
    let own = Classes::read(&classes).unwrap_or_else(|_| Classes::official());
    for classes in [own, Classes::official()] {
        let _ = ValidationLabels::find(Some(&labels), &[folder], &classes);
    }
}
