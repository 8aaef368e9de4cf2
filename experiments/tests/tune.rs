//! `pfq tune` from end to end: a network and pictures of the user, and an interruption.

mod tiny;

use candle_core::{Device, Tensor};
use datasets::imagenet::Options;
use datasets::{DataSource, Dataset};
use models::{Extras, Input, MobileNet, Network, Step, Version};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tiny::said;

/// Returns a folder with pictures, a network for them, `net.safetensors`, and settings,
/// `tiny.toml`, whose trainings take one epoch.
fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny::write_pictures(&folder.path().join("pictures"), &["cat", "dog", "newt"]);
    let config = MobileNet { width: 0.1, ..MobileNet::new(Version::V2, Input::Cifar, 3) };
    let mut network = config.init(7, &Device::Cpu).unwrap();
    // With its small initial weights, the classifier would give meaningless logits.
    let classifier = network.units_mut().next_back().unwrap();
    classifier.weight = (&classifier.weight * 100.0).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let pixels = (0..16 * 32 * 32 * 3).map(|_| random.random_range(-2f32..2.0)).collect();
    let images = Tensor::from_vec(pixels, (16, 32, 32, 3), &Device::Cpu).unwrap();
    for _ in 0..20 {
        network.forward_train(&images, Step::alone(0.1)).unwrap();
    }
    network.save(&folder.path().join("net.safetensors"), &Extras::default()).unwrap();
    tiny::write_profile(folder.path());
    let path = folder.path().join("tiny.toml");
    let mut profile: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
    // Pictures are cropped instead of padded.
    let augmentation: toml::Table = "pad = 0\nflip = true".parse().unwrap();
    profile["training"]["pretraining"]
        .as_table_mut()
        .unwrap()
        .insert("augmentation".into(), augmentation.into());
    std::fs::write(path, profile.to_string()).unwrap();
    folder
}

fn tune(folder: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pfq"));
    command.current_dir(folder).args(["tune", "net.safetensors", "out.safetensors", "--data", "pictures"]);
    command.args(["--config", "tiny.toml", "--device", "cpu"]).args(flags);
    command
}

#[track_caller]
fn succeeded(output: Output) -> (String, String) {
    assert!(output.status.success(), "{}", said(&output));
    (String::from_utf8(output.stdout.clone()).unwrap(), said(&output))
}

/// A run that is killed during a training resumes to the same bits.
#[test]
fn an_interrupted_run_goes_on_to_the_same_network() {
    let flags = ["--bits", "a4w4", "--epochs", "3"];
    let undisturbed = place();
    let (text, _) = succeeded(tune(undisturbed.path(), &flags).output().unwrap());
    for part in
        ["3 classes", "as given", "PfQ", "fine-tune A4/W32", "fine-tune A4/W4", "filters removed", "→"]
    {
        assert!(text.contains(part), "{text} lacks {part:?}");
    }
    let written = |folder: &Path| {
        Network::load(&folder.join("out.safetensors"), &Device::Cpu).unwrap().0.sha256().unwrap()
    };
    let (network, _) = Network::load(&undisturbed.path().join("out.safetensors"), &Device::Cpu).unwrap();
    let (before, _) = Network::load(&undisturbed.path().join("net.safetensors"), &Device::Cpu).unwrap();
    assert!(network.units().all(|unit| unit.weight_quantizer.is_some()));
    assert!(network.macs() < before.macs(), "nothing was pruned");

    let folder = place();
    for epoch in 1..3 {
        let mut child =
            tune(folder.path(), &flags).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(
            lines.any(|line| line.starts_with(&format!("  epoch {epoch}/3"))),
            "epoch {epoch} was not reached"
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(!folder.path().join("out.safetensors").exists());
    let (_, told) = succeeded(tune(folder.path(), &flags).output().unwrap());
    assert!(told.contains("going on from the checkpoint"), "{told}");
    assert!(written(folder.path()) == written(undisturbed.path()), "other bits after an interruption");

    // One more run uses what is stored.
    std::fs::remove_file(folder.path().join("out.safetensors")).unwrap();
    let (again, told) = succeeded(tune(folder.path(), &flags).output().unwrap());
    assert!(!told.contains("epoch"), "{told}");
    assert!(written(folder.path()) == written(undisturbed.path()));
    assert!(again.contains("written to out.safetensors"), "{again}");

    // Every command can read the written network, and the store can be verified.
    let pfq = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pfq"));
        succeeded(command.current_dir(folder.path()).args(arguments).output().unwrap()).0
    };
    let top1 = text.lines().find(|line| line.starts_with("top-1")).unwrap();
    let top1 = top1.split("→ ").nth(1).unwrap().split(';').next().unwrap();
    let evaluated = pfq(&["eval", "out.safetensors", "--data", "pictures"]);
    assert!(evaluated.contains(&format!("top-1 {top1}")), "{evaluated} and {top1}");
    // The network can be evaluated in whole numbers too.
    let whole = pfq(&["eval", "out.safetensors", "--data", "pictures", "--integer"]);
    assert!(whole.contains(&format!("simulated: top-1 {top1}")), "{whole} and {top1}");
    assert!(
        whole.contains("in whole numbers: top-1") && whole.contains("of 18 predictions differ"),
        "{whole}"
    );
    pfq(&["export", "out.safetensors", "out.onnx"]);
    assert!(pfq(&["verify", "runs"]).contains("nothing wrong"));
}

/// Settings that hold out images are not chosen on the test images.
#[test]
fn images_that_settings_hold_out_stand_in_for_the_test_images() {
    let folder = place();
    let path = folder.path().join("tiny.toml");
    let mut profile: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
    profile["data"].as_table_mut().unwrap().insert("hold_out".into(), 9.into());
    std::fs::write(path, profile.to_string()).unwrap();
    let (_, told) = succeeded(tune(folder.path(), &["--bits", "a4w4", "--method", "once"]).output().unwrap());
    assert!(told.contains("9 training images held out as test"), "{told}");
    assert!(told.contains("27 training, 9 test images"), "{told}");
}

#[test]
fn other_methods_tune_too() {
    let folder = place();
    for (method, step) in [("once", "fine-tune A4/W3"), ("dfq", "DFQ A4/W3"), ("lsq", "fine-tune LSQ A4/W3")]
    {
        let out = format!("{method}.safetensors");
        let mut command = Command::new(env!("CARGO_BIN_EXE_pfq"));
        command.current_dir(folder.path()).args(["tune", "net.safetensors", &out, "--data", "pictures"]);
        command.args(["--config", "tiny.toml", "--device", "cpu", "--method", method, "--bits", "a4w3"]);
        let (text, _) = succeeded(command.args(["--size", "40"]).output().unwrap());
        assert!(text.contains(step), "{text} lacks {step:?}");
        let (network, _) = Network::load(&folder.path().join(out), &Device::Cpu).unwrap();
        assert_eq!(network.input, [40, 40, 3]);
    }
    // A float network can't be evaluated in whole numbers.
    let mut eval = Command::new(env!("CARGO_BIN_EXE_pfq"));
    eval.current_dir(folder.path()).args(["eval", "net.safetensors", "--data", "pictures", "--integer"]);
    assert!(said(&eval.output().unwrap()).contains("the image is not quantized: quantize"));
    // All methods start from the same network, which is one stage.
    let names =
        std::fs::read_dir(folder.path().join("runs")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_string_lossy().starts_with("network-given-")).count(), 1);
}

/// If there are few levels, ranges between the extremes on images are better than β ± 6γ.
#[test]
fn ranges_come_from_images_where_there_are_any() {
    let folder = place();
    let quantize = |out: &str, flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pfq"));
        command.current_dir(folder.path()).args(["quantize", "net.safetensors", out, "--bits", "a4w8"]);
        succeeded(command.args(flags).output().unwrap()).0
    };
    quantize("without.safetensors", &[]);
    let text = quantize("with.safetensors", &["--data", "pictures", "--images", "30"]);
    assert!(text.contains("from 30 training images"), "{text}");

    let options = Options { side: 32, resize: 36, ..Options::default() };
    let place = DataSource::Folder(folder.path().join("pictures"));
    let data = datasets::imagenet::load(&place, &options, &mut |_| ()).unwrap();
    let images = data.test_batches(18).next().unwrap().unwrap().images;
    let network = |name: &str| Network::load(&folder.path().join(name), &Device::Cpu).unwrap().0;
    let float = network("net.safetensors").forward(&images).unwrap();
    let off = |name: &str| -> f32 {
        let logits = network(name).forward(&images).unwrap();
        (logits - &float).unwrap().abs().unwrap().mean_all().unwrap().to_scalar().unwrap()
    };
    let (with, without) = (off("with.safetensors"), off("without.safetensors"));
    assert!(with < 0.8 * without, "off by {with} and {without}");

    // Damaged pictures are left out up to the requested share.
    std::fs::write(folder.path().join("pictures/train/cat/damaged.png"), "no picture").unwrap();
    let flags = ["quantize", "net.safetensors", "some.safetensors", "--bits", "a4w8", "--data", "pictures"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_pfq"));
    let refused = said(&command.current_dir(folder.path()).args(flags).output().unwrap());
    assert!(refused.contains("1 of 37 training images") && refused.contains("--bad-percent"), "{refused}");
    let some = [&flags[5..], &["--bad-percent", "3"]].concat();
    assert!(quantize("some.safetensors", &some).contains("from 36 training images"));
}

#[test]
fn what_cannot_be_tuned_is_said_before_anything_runs() {
    let folder = place();
    let refused = |flags: &[&str], parts: &[&str]| {
        let output = tune(folder.path(), flags).output().unwrap();
        assert!(!output.status.success(), "{flags:?} was accepted");
        for part in parts {
            assert!(said(&output).contains(part), "{flags:?}: {} lacks {part:?}", said(&output));
        }
    };
    refused(&["--bits", "a4w32"], &["2 to 8"]);
    refused(&["--bits", "a4w4", "--epochs", "0"], &["--epochs", "more than 0"]);
    refused(&["--bits", "a4w4", "--epochs", "1.5"], &["--epochs", "whole number of epochs"]);
    refused(&["--bits", "a4w4", "--method", "magic"], &["ours", "lsq"]);
    // A class, or a split, that has no pictures.
    for (gone, part) in [("train/cat", "train/cat/*"), ("train", "train/CLASS/*"), ("val", "val/CLASS/*")] {
        let (from, to) = (folder.path().join("pictures").join(gone), folder.path().join("aside"));
        std::fs::rename(&from, &to).unwrap();
        refused(&["--bits", "a4w4"], &[part, "pictures"]);
        std::fs::rename(&to, &from).unwrap();
    }
    tiny::write_pictures(&folder.path().join("pictures"), &["frog"]);
    refused(&["--bits", "a4w4"], &["3 classes apart", "there are 4 (pictures in pictures)"]);
    let network = folder.path().join("net.safetensors");
    let mut quantized = Network::load(&network, &Device::Cpu).unwrap().0;
    let four = quant_core::Precision::try_from(4).unwrap();
    let quantization = models::Quantization { weights: four, ..models::Quantization::default() };
    quantized.quantize(&quantization).unwrap();
    quantized.save(&network, &Extras::default()).unwrap();
    refused(&["--bits", "a4w4"], &["net.safetensors", "expected a float network"]);
    assert!(!folder.path().join("runs").exists(), "something ran");
}
