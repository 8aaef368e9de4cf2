//! Invalid network files: each is an error that names the place, and never causes a panic, a wait
//! or an allocation beyond the file's own size.

use candle_core::{DType, Device, Tensor};
use models::{Extras, Fold, Import, Input, MOST_CHANNELS, MobileNet, Network, Quantization, Version};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The names, shapes and bytes of tensors.
type Tensors = HashMap<String, (Vec<usize>, Vec<u8>)>;

/// Writes a quantized network's file and returns its path.
fn written(folder: &Path) -> PathBuf {
    let config = MobileNet { width: 0.1, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
    let mut network = config.init(1, &Device::Cpu).unwrap();
    let bits = serde_json::from_value(json!(4)).unwrap();
    let settings =
        Quantization { activations: bits, weights: bits, fold: Fold::Unfolded, ..Quantization::default() };
    network.quantize(&settings).unwrap();
    let path = folder.join("network.safetensors");
    network.save(&path, &Extras::default()).unwrap();
    path
}

/// Rewrites the file with its structure and its tensors changed.
fn change(path: &Path, change: &dyn Fn(&mut Value, &mut Tensors)) {
    let data = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&data).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    let mut structure: Value = serde_json::from_str(&metadata["network"]).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let mut tensors: Tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut structure, &mut tensors);
    metadata.insert("network".into(), structure.to_string());
    let views = tensors
        .iter()
        .map(|(name, (shape, data))| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    std::fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

#[track_caller]
fn refused(path: &Path, parts: &[&str]) {
    let message = Network::load(path, &Device::Cpu).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    // A caller that does not know the file's origin gets the same error.
    assert_eq!(Network::open(path, &Import::default(), &Device::Cpu).unwrap_err().to_string(), message);
}

#[track_caller]
fn check(changed: &dyn Fn(&mut Value, &mut Tensors), parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path());
    change(&path, changed);
    refused(&path, parts);
}

/// Checks that a structure with this value is an error.
#[track_caller]
fn check_structure(pointer: &str, value: Value, parts: &[&str]) {
    let set = |structure: &mut Value, _: &mut Tensors| {
        *structure.pointer_mut(pointer).expect("the structure has it") = value.clone();
    };
    check(&set, parts);
}

/// Checks that a tensor of this shape, cut or padded with zeros, is an error.
#[track_caller]
fn check_tensor(name: &str, shape: &[usize], parts: &[&str]) {
    let set = |_: &mut Value, tensors: &mut Tensors| {
        let (found, data) = tensors.get_mut(name).expect("the file has it");
        *found = shape.to_vec();
        data.resize(4 * shape.iter().product::<usize>(), 0);
    };
    check(&set, parts);
}

#[test]
fn an_unchanged_file_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path());
    change(&path, &|_, _| ());
    Network::load(&path, &Device::Cpu).unwrap();
}

#[test]
fn sizes_and_strides_that_nothing_can_be_computed_with() {
    // The first unit is the stem, and the third is depthwise.
    check_structure("/units/0/kernel/full/stride", json!(0), &["stem", "stride of at least 1"]);
    check_structure("/units/0/kernel/full/size", json!(0), &["stem", "odd size"]);
    check_structure("/units/0/kernel/full/size", json!(2), &["stem", "odd size"]);
    check_structure("/units/0/kernel/full/size", json!(u64::MAX), &["stem", "odd size"]);
    check_structure("/units/0/kernel/full/size", json!(5), &["stem", "channels"]);
    check_structure("/units/2/kernel/depthwise/stride", json!(0), &["depthwise", "at most 2"]);
    check_structure("/units/2/kernel/depthwise/stride", json!(3), &["depthwise", "at most 2"]);
    check_structure("/units/2/kernel", json!("pointwise"), &["depthwise", "[3, 3, "]);
    for input in [json!([0, 0, 3]), json!([0, 32, 3]), json!([32, u64::MAX, 3]), json!([32, 32, 0])] {
        check_structure("/input", input, &["input", "from 1 to 8192"]);
    }
    check_structure("/input", json!([32, 32, 1]), &["stem", "3 channels, but 1"]);
    for epsilon in [json!(-1), json!(0), json!(1e-300), json!(2)] {
        check_structure("/epsilon", epsilon, &["epsilon", "expected a number from"]);
    }
    let quantizer = json!({"bits": 9, "ready": true});
    check_structure("/units/2/output_quantizer", quantizer, &["can't be understood"]);
    // A quantizer of weights for activations, and the other way round.
    let quantizer = json!({"bits": 4, "folded": true});
    check_structure("/units/2/output_quantizer", quantizer, &["needs the field", "ready"]);
    let quantizer = json!({"bits": 4, "ready": false});
    check_structure("/units/2/weight_quantizer", quantizer, &["needs the field", "folded"]);
}

#[test]
fn tensors_of_other_shapes() {
    let (stem, depthwise) = ("stem", "blocks.0.depthwise");
    for shape in [&[][..], &[0], &[8], &[27, 8, 1], &[3, 9, 8]] {
        check_tensor("stem.weight", shape, &[stem, "shape"]);
    }
    check_tensor("stem.weight", &[27, 0], &[stem, "filters"]);
    check_tensor("stem.weight", &[26, 8], &[stem, "channels"]);
    check_tensor("blocks.0.depthwise.weight", &[3, 3, 9], &[depthwise, "channels"]);
    check_tensor("blocks.0.depthwise.weight", &[9, 8], &[depthwise, "shape"]);
    for name in ["gamma", "beta", "mean", "variance"] {
        for shape in [&[][..], &[0], &[1], &[7], &[9], &[8, 1], &[1, 8]] {
            check_tensor(&format!("stem.{name}"), shape, &[stem, name, "expected [8]"]);
        }
    }
    check_tensor("head.bias", &[9], &["head", "bias", "expected [10]"]);
    check_tensor("stem.range", &[3], &["stem", "range", "expected [2]"]);
    check_tensor("head.weight", &[1280, 0], &["head", "filters"]);
    // The tensor has no bytes, but its number of classes is too large for any memory.
    check_tensor("head.weight", &[0, 1 << 40], &["head"]);
    let many = MOST_CHANNELS + 1;
    check_tensor("head.weight", &[1280, many], &["head", "filters"]);
}

#[test]
fn structures_that_no_network_has() {
    let unit = |structure: &Value| structure["units"][2].clone();
    let backwards = |s: &mut Value, _: &mut Tensors| s["residuals"][0] = json!({"from": 40, "to": 3});
    check(&backwards, &["backwards"]);
    let nowhere = |s: &mut Value, _: &mut Tensors| s["residuals"][0] = json!({"from": 0, "to": u64::MAX});
    check(&nowhere, &["ends nowhere"]);
    let many = move |s: &mut Value, _: &mut Tensors| s["units"] = vec![unit(s); 10_001].into();
    check(&many, &["at most 10000"]);
    let residuals = |s: &mut Value, _: &mut Tensors| {
        s["residuals"] = (0..100_000).rev().map(|i| json!({"from": 0, "to": i})).collect();
    };
    check(&residuals, &["at most 10000"]);
    let empty = |s: &mut Value, _: &mut Tensors| {
        s["units"] = json!([]);
        s["residuals"] = json!([]);
    };
    check(&empty, &["head", "1280 channels, but 3 come in"]);
    let itself = |s: &mut Value, _: &mut Tensors| {
        s["nodes"] = json!([{"pool": {"name": "head", "input": 1, "quantizer": null}}]);
    };
    check(&itself, &["comes later"]);
    let text = |s: &mut Value, _: &mut Tensors| *s = json!("[".repeat(100_000));
    check(&text, &["can't be understood"]);
}

#[test]
fn parts_elsewhere_are_refused() {
    for name in ["/etc/passwd", "../x.safetensors", "a/b", "", ".", "..", "a/", "/"] {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let data = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&data).unwrap();
        let mut metadata = header.metadata().clone().unwrap();
        metadata.insert("parts".into(), json!([{"file": name, "sha256": "0".repeat(64)}]).to_string());
        let none: [(String, TensorView); 0] = [];
        std::fs::write(&path, safetensors::serialize(none, Some(metadata)).unwrap()).unwrap();
        refused(&path, &["network.safetensors", "expected the name of a file beside it"]);
    }
}

/// Reading a pipe would wait for a writer, and a device never ends.
#[cfg(unix)]
#[test]
fn only_regular_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [&pipe, Path::new("/dev/zero"), Path::new("/dev/null"), folder.path()] {
        refused(path, &["no regular file"]);
    }
    // A sparse file may have any length without using the disk.
    let sparse = folder.path().join("sparse.safetensors");
    std::fs::File::create(&sparse).unwrap().set_len(1 << 42).unwrap();
    refused(&sparse, &["expected at most"]);
}

#[test]
fn public_weights_with_sizes_that_nothing_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("public.safetensors");
    let open = |import: Import| Network::open(&path, &import, &Device::Cpu).unwrap_err().to_string();
    let write = |classifier: &[usize]| {
        let stem = Tensor::zeros((8, 3, 3, 3), DType::F32, &Device::Cpu).unwrap();
        let data: Vec<u8> = stem
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let views = [
            ("conv_stem.weight", TensorView::new(Dtype::F32, vec![8, 3, 3, 3], &data).unwrap()),
            ("classifier.weight", TensorView::new(Dtype::F32, classifier.to_vec(), &[]).unwrap()),
        ];
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    };
    for classes in [1 << 40, MOST_CHANNELS + 1] {
        write(&[classes, 0]);
        assert!(open(Import::default()).contains("expected 1 to 131072"), "{}", open(Import::default()));
    }
    write(&[0, 8]);
    assert!(open(Import::default()).contains("expected 1 to 131072"));
    for width in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9] {
        let message = open(Import { width: Some(width), classes: Some(10), ..Import::default() });
        assert!(message.contains("at most 16"), "{message}");
    }
}
