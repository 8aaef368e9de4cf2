//! Exported networks in ONNX Runtime: the logits are the same, and `onnx.checker` accepts the file.
//!
//! The tests need the Python environment that `scripts/onnx-environment` makes in the target
//! folder, or the path of a Python with onnxruntime, onnx and numpy in the environment variable
//! `PFQ_ONNX_PYTHON`. Without it, they print a message and pass.

#[path = "../../models/tests/networks/mod.rs"]
mod networks;

use candle_core::{Device, Tensor};
use kernels::Activation;
use models::{Fold, Kernel, Method, Network, Norm, Quantization, Version, WeightGrid};
use networks::{images, random, settings};
use onnx::{Normalize, Options};
use quant_core::Precision;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The tolerance for the logits of float networks, which are of order 1: both sides are float32,
/// but sum in different orders.
const FLOAT: f32 = 1e-4;

fn python() -> Option<PathBuf> {
    let made = || {
        // The test executable is in target/PROFILE/deps.
        let program = std::env::current_exe().unwrap();
        program.ancestors().nth(3).unwrap().join("onnx-venv/bin/python")
    };
    let python = std::env::var_os("PFQ_ONNX_PYTHON").map_or_else(made, PathBuf::from);
    if !python.exists() {
        eprintln!("skipped: there is no {}; scripts/onnx-environment makes it", python.display());
        return None;
    }
    Some(python)
}

/// Returns ONNX Runtime's logits for `images` `[N, H, W, C]`.
///
/// If normalization is folded, the optimizations of ONNX Runtime are off: they would round the
/// biases, as an integer engine does.
fn runtime(python: &Path, network: &Network, options: &Options, images: &Tensor) -> Tensor {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    onnx::save(network, options, &path("network.onnx")).unwrap();
    let nchw = images.permute((0, 3, 1, 2)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    std::fs::write(path("images"), nchw.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/run.py");
    let mut command = Command::new(python);
    command.arg(script).args([path("network.onnx"), path("images"), path("logits")]);
    if options.fold {
        command.arg("--plain");
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let data = std::fs::read(path("logits")).unwrap();
    let logits: Vec<f32> = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Tensor::from_vec(logits, (images.dims()[0], network.classes()), &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn network(version: Version, settings: Option<&Quantization>) -> Network {
    networks::network(version, settings, (16, 30), true)
}

#[test]
fn float_networks_give_the_same_logits() {
    let Some(python) = python() else { return };
    for version in [Version::V1, Version::V2] {
        let network = network(version, None);
        let images = images(20, &network);
        let logits = network.forward(&images).unwrap();
        for fold in [false, true] {
            let found = runtime(&python, &network, &Options { fold, ..Options::default() }, &images);
            let off = distance(&logits, &found);
            assert!(off < FLOAT, "{version:?}, fold {fold}: off by {off}");
        }
        // Images as intensities, which the graph normalizes.
        let normalize = Normalize { mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.25] };
        let of = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu).unwrap();
        let raw =
            images.broadcast_mul(&of(normalize.std)).unwrap().broadcast_add(&of(normalize.mean)).unwrap();
        let found =
            runtime(&python, &network, &Options { normalize: Some(normalize), ..Options::default() }, &raw);
        let off = distance(&logits, &found);
        assert!(off < FLOAT, "{version:?}, normalized there: off by {off}");
    }
}

/// Compares every scheme, with live normalization, with normalization folded into the steps, and
/// with 4-bit levels in bytes.
///
/// Rounding moves a few activations across the border between two levels. So most logits are equal
/// up to rounding, and a few images differ by a fraction of a level. A wrong zero point, offset or
/// step changes every logit.
#[test]
fn quantized_networks_give_the_same_logits() {
    let Some(python) = python() else { return };
    let mut cases = Vec::new();
    for &method in Method::ALL {
        for bits in [4, 8] {
            cases.push((format!("{method:?} {bits}"), settings(bits, method)));
        }
    }
    cases.push(("3 bits".into(), settings(3, Method::Uniform)));
    let uniform = settings(4, Method::Uniform);
    cases.push(("channels".into(), Quantization { weight_grid: WeightGrid::Channel, ..uniform }));
    let frozen = Quantization { fold: Fold::Frozen, ..uniform };
    cases.push(("frozen".into(), frozen));
    cases.push(("frozen channels".into(), Quantization { weight_grid: WeightGrid::Channel, ..frozen }));
    cases.push(("folded grid".into(), Quantization { fold: Fold::BatchStatistics, ..uniform }));
    cases.push(("float statistics".into(), Quantization { fold: Fold::FloatStatistics, ..uniform }));
    let float = Precision::Float;
    cases.push(("activations alone".into(), Quantization { weights: float, ..uniform }));
    cases.push(("linear outputs in float".into(), Quantization { linear: Some(float), ..uniform }));
    cases.push(("weights alone".into(), Quantization { activations: float, ..uniform }));
    for (name, settings) in cases {
        let network = network(Version::V2, Some(&settings));
        let images = images(20, &network);
        let logits = network.forward(&images).unwrap();
        for (fold, int8) in [(false, false), (true, true)] {
            let found = runtime(&python, &network, &Options { fold, int8, normalize: None }, &images);
            let mut off: Vec<f32> =
                (&logits - &found).unwrap().abs().unwrap().max(1).unwrap().to_vec1::<f32>().unwrap();
            off.sort_by(f32::total_cmp);
            let spread = distance(&logits, &logits.zeros_like().unwrap());
            assert!(off[10] < 0.01 * spread, "{name}, fold {fold}, int8 {int8}: {off:?} of {spread}");
        }
    }
}

/// A network that is no MobileNet: a sum with an activation, a unit with two readers, a full
/// convolution of another size.
#[test]
fn a_network_of_other_nodes() {
    let Some(python) = python() else { return };
    let mut network = Network::of_image("branches", [9, 7, 3]);
    let bias = |seed, c| Norm::Bias(random(seed, &[c], -0.3, 0.3));
    let kernel = Kernel::Full { size: 5, stride: 2 };
    network.push_unit("stem", kernel, random(1, &[75, 6], -0.2, 0.2), bias(2, 6), Activation::Relu);
    let stem = network.last();
    let depthwise = Kernel::Depthwise { stride: 1 };
    network.push_unit("a", depthwise, random(3, &[3, 3, 6], -0.5, 0.5), bias(4, 6), Activation::Identity);
    network.push_sum(stem);
    if let Some(models::Node::Sum(sum)) = network.nodes.last_mut() {
        sum.activation = Activation::Relu6;
    }
    network.push_unit("b", Kernel::Pointwise, random(5, &[6, 5], -0.5, 0.5), bias(6, 5), Activation::Relu6);
    let last = network.last();
    network.nodes[last].unit_mut().unwrap().cap = Some(random(9, &[5], 0.0, 0.5));
    network.push_head(random(7, &[5, 4], -1.0, 1.0), random(8, &[4], -1.0, 1.0));
    network.validate().unwrap();
    let images = images(6, &network);
    let off = distance(
        &network.forward(&images).unwrap(),
        &runtime(&python, &network, &Options::default(), &images),
    );
    assert!(off < 1e-5, "off by {off}");
}

/// The fraction of predictions on real images in which a trained network may differ.
const DIFFERENT: f64 = 0.001;

/// Runs the networks of a store, or of a folder of files, on test images of CIFAR-100.
///
/// `PFQ_ONNX_STORE` names the store and `PFQ_DATA` the folder of the images.
#[test]
fn trained_networks_predict_the_same() {
    let Some(python) = python() else { return };
    let folder = |name| std::env::var_os(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let (Some(store), Some(data)) = (folder("PFQ_ONNX_STORE"), folder("PFQ_DATA")) else {
        eprintln!("skipped: PFQ_ONNX_STORE or PFQ_DATA is not set");
        return;
    };
    let data = std::sync::Arc::new(datasets::load(&datasets::DataSource::Folder(data), &mut |_| ()).unwrap());
    let batches = datasets::Dataset::test_batches(&data, 250).take(8);
    let images: Vec<Tensor> = batches.map(|batch| batch.unwrap().images).collect();
    let images = Tensor::cat(&images, 0).unwrap();
    let classes = |logits: &Tensor| logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
    let (mut networks, mut failed) = (0, Vec::new());
    for entry in std::fs::read_dir(store).unwrap() {
        let path = entry.unwrap().path();
        let file = if path.is_dir() { path.join("network.safetensors") } else { path };
        if !file.exists() || file.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        networks += 1;
        let (network, _) = Network::load(&file, &Device::Cpu).unwrap();
        let logits = network.forward(&images).unwrap();
        let found = runtime(&python, &network, &Options::default(), &images);
        let different = classes(&logits).iter().zip(classes(&found)).filter(|(a, b)| **a != *b).count();
        let off = distance(&logits, &found);
        eprintln!("{}: {different} of {} differ, logits by {off:e}", file.display(), images.dims()[0]);
        let floats = network.units().all(|unit| unit.weight_quantizer.is_none())
            && network.nodes.iter().all(|node| node.quantizer().is_none());
        if different as f64 > DIFFERENT * images.dims()[0] as f64 || floats && off > FLOAT {
            failed.push(file);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
    assert!(networks > 0, "the store has no networks");
}
