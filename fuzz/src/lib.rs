//! The fuzz targets. Whatever bytes an input has, nothing may panic, hang, or use memory out of
//! proportion to the input.
//!
//! The test `tests/corpus.rs` of the main workspace runs the same targets on the inputs in
//! `corpus/` and on damaged copies of them.

use candle_core::{DType, Device, Tensor};
use datasets::imagenet::fuzzing;
use models::{Import, Network};
use std::path::Path;

/// The name of a target and of its corpus, and the function that processes an input.
type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 10] = [
    ("network", |data| network(data, "input.safetensors")),
    ("pth", |data| network(data, "input.pth")),
    ("cifar_pickle", fuzzing::cifar_pickle),
    ("picture", fuzzing::picture),
    ("tar", |data| in_folder(|folder| fuzzing::tar(data, folder))),
    ("tar_index", |data| in_folder(|folder| fuzzing::index(data, folder))),
    ("labels", |data| in_folder(|folder| fuzzing::labels(data, folder))),
    ("profile", |data| with_file(data, "input.toml", |path| drop(experiments::Profile::read(path)))),
    ("results_csv", |data| with_file(data, "input.csv", |path| drop(report::read_csv(path)))),
    ("results_json", |data| {
        // The reader takes the folder, not the file.
        with_file(data, report::STAGES, |path| drop(path.parent().map(report::read_stages)));
    }),
];

/// Opens a network of any kind. A network that can be read can also be counted and copied, and its
/// forward pass ends, at worst with an error.
fn network(data: &[u8], name: &str) {
    with_file(data, name, |path| {
        let Ok((network, _)) = Network::open(path, &Import::default(), &Device::Cpu) else { return };
        network.macs();
        network.duplicate().expect("whatever is read can be copied");
        let [height, width, channels] = network.input;
        // A network may be large, so only small ones are computed.
        if network.macs() < 1_000_000 && height * width * channels < 100_000 {
            let images =
                Tensor::ones((1, height, width, channels), DType::F32, &Device::Cpu).expect("a small image");
            drop(network.forward(&images));
        }
    });
}

fn in_folder(act: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    act(folder.path());
}

fn with_file(data: &[u8], name: &str, act: impl FnOnce(&Path)) {
    in_folder(|folder| {
        let path = folder.join(name);
        std::fs::write(&path, data).expect("the folder can be written");
        act(&path);
    });
}

/// Runs the target with the given name.
pub fn run(target: &str, data: &[u8]) {
    let (_, act) = TARGETS.into_iter().find(|(name, _)| *name == target).expect("a target's name");
    act(data);
}
