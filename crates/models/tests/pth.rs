//! PyTorch checkpoints: those of training scripts are read, and damaged or hostile ones are errors.

use candle_core::{Device, Tensor};
use models::{Import, Network};
use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import").join(name)
}

/// Returns the weights of a file with timm's names, in float32.
fn weights() -> BTreeMap<String, Tensor> {
    let all = candle_core::safetensors::load(file("timm_v2.safetensors"), &Device::Cpu).unwrap();
    all.into_iter().map(|(name, t)| (name, t.to_dtype(candle_core::DType::F32).unwrap())).collect()
}

fn images() -> Tensor {
    candle_core::safetensors::load(file("expected.safetensors"), &Device::Cpu).unwrap()["images"].clone()
}

fn logits(path: &Path) -> Vec<f32> {
    let (network, _) = Network::open(path, &Import::default(), &Device::Cpu).unwrap();
    network.forward(&images()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

// The functions below return pieces of a pickle, each of which leaves a value on the stack.

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn int(value: usize) -> Vec<u8> {
    [b"\x8a\x08", &(value as u64).to_le_bytes()[..]].concat()
}

fn tuple(elements: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &elements.concat()[..], b"t"].concat()
}

fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> =
        items.iter().flat_map(|(name, value)| [text(name), value.clone()].concat()).collect();
    [b"}(", &items[..], b"u"].concat()
}

/// Returns the pickle of a tensor in a storage.
fn tensor(storage: &str, offset: usize, sizes: &[usize], strides: &[usize]) -> Vec<u8> {
    let kind = b"ctorch\nFloatStorage\n".to_vec();
    let id = tuple(&[text("storage"), kind, text(storage), text("cpu"), int(0)]);
    let ints = |values: &[usize]| tuple(&values.iter().map(|&value| int(value)).collect::<Vec<_>>());
    let storage = [&id[..], b"Q"].concat();
    let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
    let arguments = tuple(&[storage, int(offset), ints(sizes), ints(strides), b"\x89".to_vec(), hooks]);
    [b"ctorch._utils\n_rebuild_tensor_v2\n", &arguments[..], b"R"].concat()
}

/// Returns the bytes of a storage.
fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Returns an archive of `top` and the storages.
fn archive(top: &[u8], storages: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut add = |name: String, data: &[u8]| {
        zip.start_file(name, stored).unwrap();
        zip.write_all(data).unwrap();
    };
    add("net/data.pkl".into(), &[b"\x80\x02", top, b"."].concat());
    add("net/byteorder".into(), b"little");
    storages.iter().for_each(|(key, data)| add(format!("net/data/{key}"), data));
    zip.finish().unwrap().into_inner()
}

/// Returns the weights as a state dict. From a tensor's name, numbers and shape, `form` makes its
/// name, storage and pickle.
fn state_dict(
    form: impl Fn(&str, Vec<f32>, &[usize]) -> (String, Vec<f32>, Vec<u8>),
) -> (Vec<u8>, BTreeMap<String, Vec<u8>>) {
    let mut storages = BTreeMap::new();
    let mut items = Vec::new();
    for (name, t) in weights() {
        let numbers = t.flatten_all().unwrap().to_vec1().unwrap();
        let (renamed, storage, pickle) = form(&name, numbers, t.dims());
        storages.insert(name, bytes(&storage));
        items.push((renamed, pickle));
    }
    let items: Vec<(&str, Vec<u8>)> =
        items.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    (dict(&items), storages)
}

/// Returns the strides of a contiguous tensor.
fn strides(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect()
}

fn plain(name: &str, numbers: Vec<f32>, shape: &[usize]) -> (String, Vec<f32>, Vec<u8>) {
    (name.into(), numbers, tensor(name, 0, shape, &strides(shape)))
}

/// Checks that such a file gives the same network as the weights.
#[track_caller]
fn same(top: &[u8], storages: &BTreeMap<String, Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.pth");
    std::fs::write(&path, archive(top, storages)).unwrap();
    assert_eq!(logits(&path), logits(&file("timm_v2.safetensors")));
}

#[test]
fn tensors_of_any_strides() {
    let (top, storages) = state_dict(plain);
    same(&top, &storages);
    // channels_last: the second dimension is contiguous.
    let channels_last = |name: &str, numbers: Vec<f32>, shape: &[usize]| {
        let &[f, c, h, w] = shape else { return plain(name, numbers, shape) };
        let at = |i: usize| (((i / (h * w * c)) * c + i % c) * h + i / (w * c) % h) * w + i / c % w;
        let moved = (0..numbers.len()).map(|i| numbers[at(i)]).collect();
        (name.into(), moved, tensor(name, 0, &[f, c, h, w], &[h * w * c, 1, w * c, c]))
    };
    let (top, storages) = state_dict(channels_last);
    same(&top, &storages);
    // Every second number of a storage, after two numbers that are not the tensor's.
    let sparse = |name: &str, numbers: Vec<f32>, shape: &[usize]| {
        let spread =
            [-1.0, -2.0].into_iter().chain(numbers.into_iter().flat_map(|v| [v, f32::NAN])).collect();
        let doubled: Vec<usize> = strides(shape).iter().map(|stride| 2 * stride).collect();
        (name.into(), spread, tensor(name, 2, shape, &doubled))
    };
    let (top, storages) = state_dict(sparse);
    same(&top, &storages);
}

#[test]
fn expanded_tensors() {
    // One number represents all filters.
    let mut all = weights();
    let (name, value) = ("bn1.running_var", 1.5);
    let shape = all[name].dims().to_vec();
    all.insert(name.into(), Tensor::full(value, shape, &Device::Cpu).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.safetensors");
    candle_core::safetensors::save(&all.into_iter().collect(), &path).unwrap();
    let expanded = |this: &str, numbers: Vec<f32>, shape: &[usize]| match this == name {
        true => (this.into(), vec![value], tensor(this, 0, shape, &[0])),
        false => plain(this, numbers, shape),
    };
    let (top, storages) = state_dict(expanded);
    let pth = folder.path().join("expanded.pth");
    std::fs::write(&pth, archive(&top, &storages)).unwrap();
    assert_eq!(logits(&pth), logits(&path));
}

#[test]
fn checkpoints_of_training_scripts() {
    let wrapped = |name: &str, numbers: Vec<f32>, shape: &[usize]| {
        let (name, numbers, tensor) = plain(name, numbers, shape);
        (format!("module.{name}"), numbers, tensor)
    };
    let (top, storages) = state_dict(wrapped);
    let number = || b"G@Q\x80\x00\x00\x00\x00\x00".to_vec();
    for key in ["state_dict", "model_state_dict", "model", "net", "ema", "model_ema", "state_dict_ema"] {
        same(&dict(&[("epoch", int(90)), (key, top.clone()), ("best", number())]), &storages);
    }
    // Other tensors of the checkpoint are ignored.
    let best = tensor("bn1.bias", 0, &[], &[]);
    let rng = tensor("bn1.bias", 0, &[2], &[1]);
    same(&dict(&[("best_acc1", best), ("state_dict", top.clone()), ("rng_state", rng)]), &storages);
    // Parameters, as in a state dict made by hand.
    let parameters = |name: &str, numbers: Vec<f32>, shape: &[usize]| {
        let (name, numbers, tensor) = plain(name, numbers, shape);
        let arguments = tuple(&[tensor, b"\x88".to_vec(), b"}".to_vec()]);
        (name, numbers, [b"ctorch._utils\n_rebuild_parameter\n", &arguments[..], b"R"].concat())
    };
    let (top, storages) = state_dict(parameters);
    same(&top, &storages);
}

fn replaced(text: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut changed = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(old.len()).position(|window| window == old) {
        changed.extend([&rest[..at], new].concat());
        rest = &rest[at + old.len()..];
    }
    [&changed[..], rest].concat()
}

/// torch.save with pickle_protocol=4 writes different instructions for the same values.
#[test]
fn the_fourth_protocol() {
    let (top, storages) = state_dict(plain);
    let global = |top: &[u8], module: &str, name: &str| {
        let short = |text: &str| [b"\x8c", &[text.len() as u8][..], text.as_bytes(), b"\x94"].concat();
        let new = [&short(module)[..], &short(name), b"\x93\x94"].concat();
        replaced(top, format!("c{module}\n{name}\n").as_bytes(), &new)
    };
    let top = global(&top, "torch._utils", "_rebuild_tensor_v2");
    let top = global(&global(&top, "torch", "FloatStorage"), "collections", "OrderedDict");
    same(&[b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00", &top[..]].concat(), &storages);
}

/// torch.save with pickle_protocol=1 writes no version, and booleans and long integers as text.
#[test]
fn the_first_protocol() {
    let as_texts = |name: &str, numbers: Vec<f32>, shape: &[usize]| {
        let (name, numbers, tensor) = plain(name, numbers, shape);
        (name, numbers, replaced(&tensor, b"t\x89", b"tI00\n"))
    };
    let (top, storages) = state_dict(as_texts);
    same(&dict(&[("seed", b"L1099511627776L\n".to_vec()), ("net", top)]), &storages);
}

fn error(data: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.pth");
    std::fs::write(&path, data).unwrap();
    let error = Network::open(&path, &Import::default(), &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("checkpoint.pth"), "{error}");
    error
}

#[track_caller]
fn refused(top: &[u8], expected: &str) {
    let storages = BTreeMap::from([("0".to_string(), bytes(&[1.0; 16]))]);
    let found = error(&archive(top, &storages));
    assert!(found.contains(expected), "{found}");
}

#[test]
fn hostile_pickles_are_errors_in_bounded_memory() {
    // One is nested as deep as the file is long, and one is doubled at each step, to 2^100,000
    // values.
    refused(&[&b")"[..], &[0x85; 500_000]].concat(), "no state dict");
    refused(&[&b")q\x00"[..], &b"h\x00h\x00\x86q\x000".repeat(100_000), b"h\x00"].concat(), "no state dict");
    refused(&vec![b'N'; 1 << 21], "instructions");
    refused(&vec![b'N'; 17 << 20], "bytes that are expected");
    // Instructions without their operands.
    for top in [&b"R"[..], b"Q", b"b", b"s", b"u", b"t", b"(u", b"h\x05", b"\x93", b"ctorch"] {
        refused(top, "not a pickle that can be read");
    }
    for top in [int(3), b"}".to_vec(), b"]".to_vec(), dict(&[("state_dict", int(1))]), tuple(&[])] {
        refused(&top, "no state dict, neither alone nor under state_dict");
    }
    // The pickle names a function, which is not called.
    refused(b"cos\nsystem\nX\x04\x00\x00\x00exit\x85R", "no state dict");
}

#[test]
fn hostile_tensors_are_errors_in_bounded_memory() {
    let alone = |tensor: Vec<u8>| dict(&[("conv_stem.weight", tensor)]);
    let most = usize::MAX >> 1;
    for (sizes, strides) in [(&[17][..], &[1][..]), (&[2, 2], &[15, 1]), (&[2], &[most]), (&[3], &[most])] {
        refused(&alone(tensor("0", 0, sizes, strides)), "beyond its storage");
    }
    refused(&alone(tensor("0", 16, &[1], &[1])), "beyond its storage");
    refused(&alone(tensor("0", most, &[1], &[1])), "beyond its storage");
    // Sizes without any numbers.
    for sizes in [&[most][..], &[most, most], &[1 << 40], &[1 << 20, 1 << 20]] {
        refused(&alone(tensor("0", 0, sizes, &vec![0; sizes.len()])), "much more memory");
    }
    let many = vec![("x", tensor("0", 0, &[1 << 20], &[0])); 100];
    refused(&dict(&many), "much more memory");
    refused(&alone(tensor("0", 0, &[1; 9], &[1; 9])), "can't be understood");
    refused(&alone(tensor("0", 0, &[1, 1], &[1])), "can't be understood");
    refused(&alone(tensor("1", 0, &[1], &[1])), "data/1 can't be read");
    refused(&alone(tensor("../data.pkl", 0, &[1], &[1])), "can't be read");
    let call = |arguments: &[u8]| [b"ctorch._utils\n_rebuild_tensor_v2\n", arguments, b"R"].concat();
    for arguments in [&b")"[..], b"N", b"K\x01", b"(NNNNt", b"(K\x01QNNNt"] {
        let top = alone(call(arguments));
        let found = error(&archive(&top, &BTreeMap::new()));
        assert!(found.contains("can't be understood") || found.contains("no state dict"), "{found}");
    }
    let complex = replaced(&alone(tensor("0", 0, &[1], &[1])), b"FloatStorage", b"ComplexFloatStorage");
    refused(&complex, "not supported (ComplexFloatStorage)");
}

/// If any byte of an archive is changed, the result is an error or a network, and never a panic. A
/// changed number of a tensor is always an error, because the archive has a checksum of it.
#[test]
fn damaged_archives_are_errors() {
    let (top, storages) = state_dict(plain);
    let whole = archive(&top, &storages);
    for cut in [0, 2, 3, 30, 1000, whole.len() / 2, whole.len() - 22, whole.len() - 1] {
        error(&whole[..cut]);
    }
    let number = storages["bn1.running_var"].as_slice();
    let at = whole.windows(number.len()).position(|window| window == number).unwrap();
    let flip = |at: usize, bit: u8| {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << bit;
        damaged
    };
    for bit in 0..8 {
        let found = error(&flip(at + 2, bit));
        assert!(found.contains("bn1.running_var") && found.contains("hecksum"), "{found}");
    }
    // The pickle is the first file, and the archive's directory is at the end.
    let places = (0..400).chain(whole.len() - 400..whole.len());
    for at in places {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.pth");
        std::fs::write(&path, flip(at, (at % 8) as u8)).unwrap();
        let _ = Network::open(&path, &Import::default(), &Device::Cpu);
    }
}
