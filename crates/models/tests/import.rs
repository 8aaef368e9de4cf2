//! Public weights compared with the networks of torchvision and timm.
//!
//! `import/make_import.py` writes the checkpoints and the logits, which it computes in float64.

use candle_core::{DType, Device, Tensor};
use kernels::Activation;
use models::{Extras, Import, Input, MobileNet, Naming, Network, Node, Norm, Origin, Version};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The tolerance for logits of order 1. Here everything is float32: 53 layers, each with sums of up
/// to a thousand products that are rounded by 6e-8 of their size. 2e-6 was found. A layer in a
/// wrong place or layout shows as 1e-1.
const TOLERANCE: f32 = 1e-4;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import").join(name)
}

fn expected(name: &str) -> Tensor {
    let all = candle_core::safetensors::load(file("expected.safetensors"), &Device::Cpu).unwrap();
    all[name].clone()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn check(name: &str, extension: &str, naming: Naming, version: Version) {
    let path = file(&format!("{name}.{extension}"));
    let (network, origin) = Network::open(&path, &Import::default(), &Device::Cpu).unwrap();
    let Origin::Public { naming: found, config } = origin else { panic!("{name} is not our own file") };
    assert_eq!(found, naming);
    let MobileNet { version: v, input, classes, width, first_expansion, activation } = config;
    assert_eq!((v, input, classes, width), (version, Input::Imagenet, 10, 0.1));
    assert!(!first_expansion);
    assert_eq!(activation, Activation::Relu6);
    let logits = network.forward(&expected("images")).unwrap();
    let error = distance(&logits, &expected(name));
    assert!(error < TOLERANCE, "{name}: logits differ by {error}");

    // Saved as a state dict, the network has the same tensors, bit for bit. The names of a V2 are
    // torchvision's.
    let folder = tempfile::tempdir().unwrap();
    let back = folder.path().join("back.safetensors");
    let names = network.save_state_dict(&back).unwrap();
    assert_eq!(names, if version == Version::V2 { Naming::Torchvision } else { Naming::Timm });
    // The other files are in half precision, or within a checkpoint.
    if naming == Naming::Torchvision {
        let theirs = candle_core::pickle::read_all(&path).unwrap();
        let mut theirs: HashMap<String, Tensor> = theirs.into_iter().collect();
        theirs.retain(|name, _| !name.ends_with("num_batches_tracked"));
        let ours = candle_core::safetensors::load(&back, &Device::Cpu).unwrap();
        assert_eq!(ours.len(), theirs.len());
        for (name, tensor) in &theirs {
            assert_eq!(distance(&ours[name], &tensor.to_dtype(DType::F32).unwrap()), 0.0, "{name}");
        }
    }
    let (again, _) = Network::open(&back, &Import::default(), &Device::Cpu).unwrap();
    assert_eq!(distance(&again.forward(&expected("images")).unwrap(), &logits), 0.0);

    // Saved as our own file, it is the same network.
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("own.safetensors");
    network.save(&own, &Extras::default()).unwrap();
    let (again, origin) = Network::open(&own, &Import::default(), &Device::Cpu).unwrap();
    assert_eq!(origin, Origin::Own);
    assert_eq!(distance(&again.forward(&expected("images")).unwrap(), &logits), 0.0);
}

#[test]
fn torchvision_v2_as_state_dict() {
    check("torchvision_v2", "pth", Naming::Torchvision, Version::V2);
}

#[test]
fn timm_v2_in_half_precision() {
    check("timm_v2", "safetensors", Naming::Timm, Version::V2);
}

#[test]
fn timm_v1_in_a_training_checkpoint() {
    check("timm_v1", "pth.tar", Naming::Timm, Version::V1);
}

/// Changes the tensors of timm's V2 with `change` and writes them to a new file.
fn changed(change: impl Fn(&mut HashMap<String, Tensor>)) -> (tempfile::TempDir, PathBuf) {
    let mut tensors = candle_core::safetensors::load(file("timm_v2.safetensors"), &Device::Cpu).unwrap();
    change(&mut tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    (folder, path)
}

fn error_of(path: &Path, import: Import) -> String {
    Network::open(path, &import, &Device::Cpu).unwrap_err().to_string()
}

/// Checks that the error for a changed file contains all of `parts`.
fn check_error(change: impl Fn(&mut HashMap<String, Tensor>), import: Import, parts: &[&str]) {
    let (_folder, path) = changed(change);
    let error = error_of(&path, import);
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

#[test]
fn errors_name_the_tensors() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let default = Import::default();
    check_error(
        |t| {
            t.remove("blocks.2.1.bn2.running_var");
            t.insert("blocks.2.1.se.weight".into(), zeros(&[1]));
            t.insert("conv_head.weight".into(), zeros(&[1280, 32, 3, 3]));
        },
        default,
        &[
            "changed.safetensors",
            "mobilenet_v2 of width 0.1 with 10 classes in timm's naming",
            "missing: blocks.2.1.bn2.running_var",
            "left over: blocks.2.1.se.weight",
            "of another shape: conv_head.weight ([1280, 32, 3, 3] instead of [1280, 32, 1, 1])",
        ],
    );
    let all = |t: &mut HashMap<String, Tensor>| t.retain(|name, _| name.starts_with("blocks.0"));
    check_error(
        all,
        default,
        &["features.0.0.weight", "conv_stem.weight", "but blocks.0.0.bn1.bias", "more"],
    );
    check_error(|t| drop(t.remove("classifier.weight")), default, &["classifier.weight", "classes"]);
    let none = |t: &mut HashMap<String, Tensor>| {
        let weight = Tensor::zeros((0, 1280), DType::F32, &Device::Cpu).unwrap();
        t.insert("classifier.weight".into(), weight);
    };
    check_error(none, default, &["has no classes (classifier.weight)", "expected 1 to 131072"]);
    // Explicit settings are used, and do not fit.
    check_error(
        |_| (),
        Import { width: Some(1.0), ..default },
        &["of width 1 ", "[8, 3, 3, 3] instead of [32"],
    );
    check_error(
        |_| (),
        Import { classes: Some(7), ..default },
        &["7 classes", "classifier.bias ([10] instead"],
    );
    check_error(|_| (), Import { version: Some(Version::V1), ..default }, &["mobilenet_v2", "mobilenet_v1"]);
}

#[test]
fn names_may_be_wrapped_and_the_first_expansion_there() {
    // timm's names for a V2 with its first expansion, with the prefix of parallel training.
    let config = MobileNet { width: 0.35, ..MobileNet::new(Version::V2, Input::Cifar, 7) };
    let network = config.init(3, &Device::Cpu).unwrap();
    let mut tensors = HashMap::new();
    let stages = [1, 2, 3, 4, 3, 3, 1];
    let blocks = stages.iter().enumerate().flat_map(|(s, &n)| (0..n).map(move |b| format!("blocks.{s}.{b}")));
    let mut names = vec![("conv_stem".to_string(), "bn1".to_string())];
    for block in blocks {
        for (conv, norm) in [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")] {
            names.push((format!("{block}.{conv}"), format!("{block}.{norm}")));
        }
    }
    names.push(("conv_head".into(), "bn2".into()));
    assert_eq!(names.len() + 1, network.units().count());
    for (unit, (conv, norm)) in network.units().zip(names) {
        let (f, c) = (unit.filters(), unit.input_channels());
        let [f, c, k, _] = unit.kernel.pytorch_dims(c, f);
        let weight = unit.weight.reshape((k, k, c, f)).unwrap();
        let weight = weight.permute((3, 2, 0, 1)).unwrap().contiguous().unwrap();
        tensors.insert(format!("module.{conv}.weight"), weight);
        let Norm::Batch(n) = &unit.norm else { panic!("a new network is normalized") };
        for (field, t) in
            [("weight", &n.gamma), ("bias", &n.beta), ("running_mean", &n.mean), ("running_var", &n.variance)]
        {
            tensors.insert(format!("module.{norm}.{field}"), t.clone());
        }
    }
    let classifier = network.classifier();
    let Norm::Bias(bias) = &classifier.norm else { panic!("a classifier has a bias") };
    tensors.insert("module.classifier.weight".into(), classifier.weight.t().unwrap().contiguous().unwrap());
    tensors.insert("module.classifier.bias".into(), bias.clone());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrapped.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();

    let import = Import { input: Input::Cifar, ..Import::default() };
    let (read, origin) = Network::open(&path, &import, &Device::Cpu).unwrap();
    assert_eq!(origin, Origin::Public { naming: Naming::Timm, config });
    let images = expected("images");
    assert_eq!(distance(&read.forward(&images).unwrap(), &network.forward(&images).unwrap()), 0.0);
}

#[test]
fn what_no_library_has_gets_no_names() {
    let refused = |network: &Network, what: &str| {
        let error = network.state_dict().unwrap_err().to_string();
        for part in [what, "torchvision and timm have no such", "pfq export FILE OUT.onnx"] {
            assert!(error.contains(part), "{error}");
        }
    };
    let open = || Network::open(&file("torchvision_v2.pth"), &Import::default(), &Device::Cpu).unwrap().0;
    let mut quantized = open();
    let eight = quant_core::Precision::try_from(8).unwrap();
    quantized.quantize(&models::Quantization { weights: eight, ..Default::default() }).unwrap();
    refused(&quantized, "are quantized");
    // One input channel less, as in a pruned network.
    let mut pruned = open();
    let last = pruned.units_mut().next_back().unwrap();
    last.weight = last.weight.narrow(0, 1, last.input_channels() - 1).unwrap();
    refused(&pruned, "of any width");
    // All shapes are as they were, but what follows the first residual reads past its sum.
    let mut wired = open();
    let sum = wired.nodes.iter().position(|node| matches!(node, Node::Sum(_))).unwrap();
    let readers = wired.units_mut().filter(|unit| unit.input == sum).map(|unit| unit.input = sum - 1);
    assert_eq!(readers.count(), 1);
    refused(&wired, "of any width");
    let mut active = open();
    active.units_mut().find(|unit| unit.name == "blocks.2.project").unwrap().activation = Activation::Relu6;
    refused(&active, "of any width");
    let paper = MobileNet { width: 0.1, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
    refused(&paper.init(0, &Device::Cpu).unwrap(), "has an expansion");
}

#[test]
fn files_of_other_kinds_are_errors_that_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, data: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, data).unwrap();
        error_of(&path, Import::default())
    };
    let whole = std::fs::read(file("timm_v2.safetensors")).unwrap();
    assert!(write("cut.safetensors", &whole[..whole.len() / 2]).contains("whole safetensors"));
    assert!(write("text.pth", b"not weights at all").contains("neither"));
    for begin in [&[0x80, 2, 0x8a, 10][..], &[0x80, 4, 0x95], b"L119547037146038801333356L\n.M"] {
        assert!(write("old.pth", begin).contains("torch.save(torch.load(FILE), NEW)"));
    }
    let pth = std::fs::read(file("torchvision_v2.pth")).unwrap();
    assert!(write("cut.pth", &pth[..pth.len() / 2]).contains("state dict"));
    let absent = error_of(&folder.path().join("absent.pth"), Import::default());
    assert!(absent.contains("absent.pth") && absent.contains("could not be read"), "{absent}");
}
