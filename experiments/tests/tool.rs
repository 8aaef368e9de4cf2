//! The tool `pfq` from end to end, on a checkpoint that torchvision wrote.
//!
//! The checkpoint is `crates/models/tests/import/torchvision_v2.pth`: MobileNetV2 of width 0.1 with
//! random weights and seven planted filters whose outputs are almost constant.

use candle_core::{Device, Tensor};
use models::{Import, Network, Norm, Origin};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/models/tests/import").join(name)
}

/// Returns what the tool prints; it must succeed.
#[track_caller]
fn run(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_pfq")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Checks that the tool fails with a message that contains all of `parts`.
#[track_caller]
fn check_error(arguments: &[&str], parts: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_pfq")).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{arguments:?} succeeded");
    for part in parts {
        assert!(error.contains(part), "{arguments:?}: {error:?} lacks {part:?}");
    }
}

fn open(path: &Path) -> (Network, Origin) {
    Network::open(path, &Import::default(), &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// The tolerance for logits of order 1, before and after pruning at τ = ε. The removed filters vary
/// by 1e-8 and are normalized to 3e-6 of their usual size; the rest is rounding in float32.
const TOLERANCE: f32 = 1e-4;

#[test]
fn pruning_a_torchvision_checkpoint_keeps_its_outputs() {
    let folder = tempfile::tempdir().unwrap();
    let (input, out) = (fixture("torchvision_v2.pth"), folder.path().join("pruned.safetensors"));
    let (input_text, out_text) = (input.to_str().unwrap(), out.to_str().unwrap());
    let text = run(&["prune", input_text, out_text]);
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    // Layer, filters, below τ, removed. The planted channel of blocks 3 to 5 is low in all three.
    for row in [
        ["blocks.2.expand", "48", "0", "1"],
        ["blocks.2.depthwise", "48", "1", "1"],
        ["blocks.3.project", "8", "1", "1"],
        ["blocks.4.project", "8", "1", "1"],
        ["blocks.5.expand", "48", "1", "1"],
        ["blocks.5.project", "8", "1", "1"],
        ["blocks.11.project", "16", "1", "0"],
        ["last", "1280", "1", "1"],
    ] {
        assert!(rows.iter().any(|found| found == &row), "{text} lacks {row:?}");
    }
    assert!(text.contains("1 channel is kept though"), "{text}");

    let images = candle_core::safetensors::load(fixture("expected.safetensors"), &Device::Cpu).unwrap();
    let (before, _) = open(&input);
    let (after, origin) = open(&out);
    assert_eq!(origin, Origin::Own);
    assert!(after.macs() < before.macs() && after.weights() < before.weights());
    let (whole, pruned) =
        (before.forward(&images["images"]).unwrap(), after.forward(&images["images"]).unwrap());
    assert!(distance(&whole, &pruned) < TOLERANCE, "off by {}", distance(&whole, &pruned));
    // They agree with torchvision's own logits too.
    assert!(distance(&images["torchvision_v2"], &pruned) < TOLERANCE);

    // The constants matter: without them the outputs differ.
    let bare = folder.path().join("bare.safetensors");
    run(&["prune", input_text, bare.to_str().unwrap(), "--no-bias-correction"]);
    let bare = open(&bare).0.forward(&images["images"]).unwrap();
    assert!(distance(&whole, &bare) > 100.0 * TOLERANCE, "off by {}", distance(&whole, &bare));

    // Every command can read the pruned file. Nothing is left to prune except a channel that is
    // tied.
    let again = run(&["variance", out_text]);
    assert!(again.contains("1 of ") && again.contains("below τ = 1e-5"), "{again}");
    let macs = run(&["macs", out_text, "--size", "64"]);
    let total = macs.lines().last().unwrap();
    assert!(total.contains("64×64") && total.contains("M weights"), "{total}");
    let at_64 = |mut network: Network| {
        network.input = [64, 64, 3];
        network.macs()
    };
    assert!(total.contains(&format!("({})", at_64(after))), "{total}");
}

#[test]
fn variances_are_shown_drawn_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let input = fixture("torchvision_v2.pth");
    let text = run(&[
        "variance",
        input.to_str().unwrap(),
        "--csv",
        &path("v.csv"),
        "--plot",
        &path("v.svg"),
        "--threshold",
        "1e-6",
    ]);
    let what = "mobilenet_v2, width 0.1, named as in torchvision, strides 2,1,2,2,2,1,2,1 (assumed; --strides says others), \
                relu6 (assumed; --activation says others), ε 1e-5 (assumed; --epsilon says others); 10 classes, 224×224";
    assert!(text.contains(what), "{text}");
    // The seven planted filters, and the depthwise filter that reads a planted zero.
    assert!(text.contains("8 of ") && text.contains("τ = 1e-6"), "{text}");
    let csv = std::fs::read_to_string(path("v.csv")).unwrap();
    assert_eq!(csv.lines().next(), Some("layer,filter,running_variance,below_threshold"));
    let filters: usize =
        open(&input).0.units().filter(|u| u.batch_norm().is_some()).map(|u| u.filters()).sum();
    assert_eq!(csv.lines().count(), 1 + filters);
    assert_eq!(csv.lines().filter(|line| line.ends_with("true")).count(), 8);
    assert!(std::fs::read_to_string(path("v.svg")).unwrap().contains("torchvision_v2.pth"));
    assert!(std::fs::read(path("v.png")).unwrap().starts_with(b"\x89PNG"));
}

/// A dot in a picture's name is a part of the name, unless it starts the extension.
#[test]
fn pictures_are_named_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let input = fixture("torchvision_v2.pth");
    for name in ["mobilenet_v2_0.25", "mobilenet_v2_0.75", "c.svg", "d.e.png"] {
        let text =
            run(&["variance", input.to_str().unwrap(), "--plot", folder.path().join(name).to_str().unwrap()]);
        assert!(text.contains("drawn in"), "{text}");
    }
    let mut found: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let stems = ["c", "d.e", "mobilenet_v2_0.25", "mobilenet_v2_0.75"];
    assert_eq!(found, stems.map(|stem| [format!("{stem}.png"), format!("{stem}.svg")]).concat());
}

/// If RUST_BACKTRACE is set, Candle's messages contain a backtrace. Our messages are still one
/// line.
#[test]
fn errors_are_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let whole = std::fs::read(fixture("timm_v2.safetensors")).unwrap();
    std::fs::write(path("cut.safetensors"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(path("cut.pth"), &std::fs::read(fixture("torchvision_v2.pth")).unwrap()[..2000]).unwrap();
    for name in ["cut.safetensors", "cut.pth", "absent.pth"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pfq"));
        let output = command.env("RUST_BACKTRACE", "1").arg("macs").arg(path(name)).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((error.lines().count(), output.status.code()), (1, Some(1)), "{error}");
        assert!(error.starts_with("Error: ") && error.contains(name) && error.len() < 400, "{error}");
    }
}

/// It is no error if the reader closes the pipe, as `head` does. A full disk is one.
#[test]
#[cfg(target_os = "linux")]
fn a_closed_output_is_no_error() {
    let input = fixture("torchvision_v2.pth");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pfq"));
    command.arg("macs").arg(&input);
    let mut gone = Command::new("true").stdin(Stdio::piped()).spawn().unwrap();
    let pipe = gone.stdin.take().unwrap();
    gone.wait().unwrap();
    let output = command.stdout(pipe).stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command.stdout(full).stderr(Stdio::piped()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.starts_with("Error: standard output"), "{error}");
}

/// Weights don't tell their strides, and the networks that are published for CIFAR have other
/// strides than this project's.
#[test]
fn strides_are_taken_as_given() {
    let folder = tempfile::tempdir().unwrap();
    // The names and shapes are those of torchvision's MobileNetV2 of width 1 and of the published
    // networks for CIFAR-100.
    let config = models::MobileNet {
        first_expansion: false,
        ..models::MobileNet::new(models::Version::V2, models::Input::Cifar, 100)
    };
    let mut tensors = std::collections::HashMap::new();
    for (index, unit) in config.init(0, &Device::Cpu).unwrap().units().enumerate() {
        let (filters, channels) = (unit.filters(), unit.input_channels());
        let (convolution, norm) = names(index);
        let dims = unit.kernel.pytorch_dims(channels, filters);
        let shape = if unit.batch_norm().is_some() { &dims[..] } else { &dims[..2] };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        tensors.insert(format!("{convolution}.weight"), zeros(shape));
        let fields: &[&str] = match &unit.norm {
            Norm::Batch(_) => &["weight", "bias", "running_mean", "running_var"],
            Norm::Bias(_) => &["bias"],
        };
        fields.iter().for_each(|field| drop(tensors.insert(format!("{norm}.{field}"), zeros(&[filters]))));
    }
    let file = folder.path().join("cifar100_mobilenetv2.safetensors");
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let file = file.to_str().unwrap();
    let macs = |strides: &[&str]| run(&[&["macs", file], strides].concat());
    let lines = |text: &str| {
        let ends = text.lines().next().zip(text.lines().last());
        ends.map(|(first, last)| (first.to_string(), last.to_string())).unwrap()
    };
    // The published figure is 88.09 M.
    let (head, total) = lines(&macs(&["--strides", "1,1,1,2,2,1,2,1"]));
    assert!(head.contains("strides 1,1,1,2,2,1,2,1, relu6 (assumed"), "{head}");
    assert!(head.contains("; 100 classes, 32×32"), "{head}");
    let (head, _) = lines(&macs(&["--strides", "cifar", "--activation", "relu", "--epsilon", "1e-3"]));
    assert!(head.contains("strides 1,1,2,2,1,1,1,1, relu, ε 1e-3; "), "{head}");
    assert!(total.contains("88.09 M MACs") && total.contains("32×32"), "{total}");
    let (head, total) = lines(&macs(&["--strides", "cifar"]));
    assert!(head.contains("strides 1,1,2,2,1,1,1,1, relu6 (assumed"), "{head}");
    assert!(total.contains("146.19 M MACs"), "{total}");
    // Torchvision has 300.8 M with 1000 classes.
    let (head, total) = lines(&macs(&[]));
    assert!(head.contains("2,1,2,2,2,1,2,1 (assumed; --strides says others)"), "{head}");
    assert!(total.contains("299.62 M MACs") && total.contains("224×224"), "{total}");

    // The pruned file contains its strides.
    let out = folder.path().join("pruned.safetensors");
    let out = out.to_str().unwrap();
    run(&["prune", file, out, "--strides", "1,1,1,2,2,1,2,1"]);
    assert!(run(&["macs", out]).contains("32×32 images"));
    for wrong in ["1,1,2", "1,1,1,2,2,1,2,3", "1,1,1,2,2,1,2,0", "1,1,1,2,2,1,2,", "none"] {
        check_error(&["macs", file, "--strides", wrong], &["--strides", "8 of a MobileNetV2", "14 of a V1"]);
    }
    // This is the number of strides of a V1.
    check_error(&["macs", file, "--strides", "2,1,1,1,1,1,1,1,1,1,1,1,2,1"], &["14 strides", "expected 8"]);
}

/// Returns torchvision's names of a MobileNetV2 unit: of its convolution, and of its normalization
/// or bias.
fn names(unit: usize) -> (String, String) {
    let parts: &[(&str, &str)] = &[("0.0", "0.1"), ("1.0", "1.1"), ("2", "3")];
    let (place, convolution, norm) = match unit {
        0 => ("features.0".to_string(), "0", "1"),
        1 => ("features.1.conv".into(), "0.0", "0.1"),
        2 => ("features.1.conv".into(), "1", "2"),
        3..51 => (format!("features.{}.conv", unit / 3 + 1), parts[unit % 3].0, parts[unit % 3].1),
        51 => ("features.18".into(), "0", "1"),
        _ => return ("classifier.1".into(), "classifier.1".into()),
    };
    (format!("{place}.{convolution}"), format!("{place}.{norm}"))
}

/// A network with the strides for CIFAR has the same accuracy before and after pruning.
#[test]
fn evaluation_before_and_after_pruning_agrees() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    // The ten classes are repeated to give the hundred classes of the data.
    let (mut network, _) = Network::open(
        &fixture("torchvision_v2.pth"),
        &Import { input: models::Input::Cifar, ..Import::default() },
        &Device::Cpu,
    )
    .unwrap();
    let classifier = network.units_mut().next_back().unwrap();
    let columns: Vec<Tensor> =
        (0..10).map(|i| (&classifier.weight * (1.0 + 0.05 * f64::from(i))).unwrap()).collect();
    classifier.weight = Tensor::cat(&columns, 1).unwrap();
    let Norm::Bias(bias) = &mut classifier.norm else { panic!("a classifier has a bias") };
    *bias = Tensor::cat(&vec![bias.clone(); 10], 0).unwrap();
    network.save(Path::new(&path("net.safetensors")), &models::Extras::default()).unwrap();
    run(&["prune", &path("net.safetensors"), &path("pruned.safetensors")]);
    let eval = |name: &str| {
        let text = run(&["eval", &path(name), "--data", "synthetic", "--limit", "200"]);
        assert!(text.contains("200 test images"), "{text}");
        let line = text.lines().find(|line| line.starts_with("top-1")).unwrap().to_string();
        let (top1, loss) = line.split_once(" %, loss ").unwrap();
        (top1.to_string(), loss.parse::<f64>().unwrap())
    };
    let (before, after) = (eval("net.safetensors"), eval("pruned.safetensors"));
    assert_eq!(before.0, after.0);
    assert!((before.1 - after.1).abs() < 2e-4, "loss {} and {}", before.1, after.1);
}

/// The crate `onnx` compares the outputs of exported networks with ONNX Runtime.
#[test]
fn networks_are_exported() {
    let folder = tempfile::tempdir().unwrap();
    let (input, out) = (fixture("torchvision_v2.pth"), folder.path().join("net.onnx"));
    let (input, out) = (input.to_str().unwrap(), out.to_str().unwrap());
    let text = run(&["export", input, out, "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]);
    let bytes = std::fs::metadata(out).unwrap().len();
    assert!(text.contains(&format!("net.onnx: opset 13, {bytes} bytes")), "{text}");
    // Every weight is stored, as a float.
    assert!(bytes > 4 * open(Path::new(input)).0.weights(), "{bytes}");
    check_error(&["export", input, "net.pb"], &["net.pb", ".onnx"]);
    // The crate `models` compares PyTorch's names.
    let state = folder.path().join("state.safetensors");
    let state = state.to_str().unwrap();
    let torch = ["--format", "safetensors-torch"];
    let text = run(&[&["export", input, state], &torch[..]].concat());
    assert!(text.contains("with torchvision's names"), "{text}");
    assert!(run(&["macs", state]).contains("named as in torchvision"));
    let pruned = folder.path().join("pruned.safetensors");
    let pruned = pruned.to_str().unwrap();
    run(&["prune", input, pruned]);
    check_error(
        &[&["export", pruned, state], &torch[..]].concat(),
        &["state.safetensors is not written", "no such network", "pruned", "OUT.onnx"],
    );
    check_error(&[&["export", input, out], &torch[..]].concat(), &[".safetensors"]);
    check_error(&[&["export", input, state, "--fold"], &torch[..]].concat(), &["are about ONNX"]);
    check_error(&["export", input, out, "--mean", "0.5,0.5", "--std", "1,1,1"], &["--mean", "three numbers"]);
    check_error(&["export", input, out, "--mean", "0,0,0", "--std", "1,0,1"], &["--std", "above 0"]);
}

/// Networks are quantized without training, and every command can read the result.
#[test]
fn networks_are_quantized_without_training() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let input = fixture("torchvision_v2.pth");
    let input = input.to_str().unwrap();
    // The network is for 224×224 images. torchvision's own logits were made from these images.
    let images = candle_core::safetensors::load(fixture("expected.safetensors"), &Device::Cpu).unwrap();
    let logits = &images["torchvision_v2"];
    let spread = distance(logits, &logits.zeros_like().unwrap());
    let quantized = |flags: &[&str]| {
        let out = path("quantized.safetensors");
        run(&[&["quantize", input, &out, "--image-range=-4,4"], flags].concat());
        let (network, _) = open(Path::new(&out));
        assert!(network.units().all(|unit| unit.weight_quantizer.is_some()));
        distance(logits, &network.forward(&images["images"]).unwrap()) / spread
    };
    let (eight, channels) = (quantized(&["--bits", "a8w8"]), quantized(&["--bits", "a8w8", "--per-channel"]));
    let four = quantized(&["--bits", "a4w4", "--end-layers", "4"]);
    // These are shares of the largest logit. The checkpoint's statistics are random, so ranges of β
    // ± 6γ do not fit it well.
    assert!(eight < 0.8 && channels < 0.8 && four > 2.0 * eight, "{eight}, {channels}, {four}");
    assert!(eight != channels, "one grid and many give the same");

    // A level of 4 bits takes an eighth of the space of a float.
    let (float, levels) = (path("float.onnx"), path("levels.onnx"));
    run(&["export", input, &float]);
    let text = run(&["export", &path("quantized.safetensors"), &levels]);
    assert!(text.contains("opset 21"), "{text}");
    let bytes = |path: &str| std::fs::metadata(path).unwrap().len() as f64;
    assert!(bytes(&levels) < 0.5 * bytes(&float), "{} and {}", bytes(&levels), bytes(&float));

    let twice = path("twice.safetensors");
    check_error(
        &["quantize", &path("quantized.safetensors"), &twice, "--bits", "a8w8"],
        &["no batch normalization"],
    );
    check_error(&["quantize", input, &twice, "--bits", "8"], &["a8w8"]);
    check_error(&["quantize", input, &twice, "--bits", "a1w8"], &["expected 2 to 8 bits, not 1"]);
    check_error(
        &["quantize", input, &twice, "--bits", "a8w8", "--image-range", "a,2"],
        &["expected numbers"],
    );
    check_error(&["quantize", input, &twice, "--bits", "a8w32"], &["2 to 8"]);
    check_error(&["quantize", input, &twice, "--bits", "a8w8", "--image-range", "1,2"], &["around 0"]);
}

/// Finite weights may give outputs that are not finite.
#[test]
fn a_loss_that_is_no_number_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let config = models::MobileNet {
        width: 0.1,
        ..models::MobileNet::new(models::Version::V1, models::Input::Cifar, 100)
    };
    let mut network = config.init(0, &Device::Cpu).unwrap();
    let last = network.units_mut().next_back().unwrap();
    last.weight = Tensor::full(3e38f32, last.weight.shape(), &Device::Cpu).unwrap();
    for unit in network.units_mut() {
        if let Norm::Batch(norm) = &mut unit.norm {
            norm.beta = (&norm.beta + 3.0).unwrap();
        }
    }
    network.save(Path::new(&path("net.safetensors")), &models::Extras::default()).unwrap();
    let eval = ["eval", &path("net.safetensors"), "--data", "synthetic", "--limit", "100"];
    check_error(&eval, &["mobilenet_v1", "loss of NaN", "finite"]);
}

#[test]
fn errors_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let input = fixture("torchvision_v2.pth");
    let input = input.to_str().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let own = path("own.safetensors");
    let own = own.as_str();
    run(&["prune", input, own]);
    check_error(&["prune", input, "out.pth"], &["out.pth", ".safetensors"]);
    check_error(&["prune", own, own], &["is the file that is read"]);
    // The same file is also refused by another path, and as the output of other commands.
    let roundabout = format!(
        "{}/../{}",
        folder.path().display(),
        Path::new(own).parent().unwrap().file_name().unwrap().to_str().unwrap()
    );
    check_error(&["prune", own, &format!("{roundabout}/own.safetensors")], &["is the file that is read"]);
    let whole = std::fs::read(own).unwrap();
    check_error(&["variance", own, "--csv", own], &["is the file that is read"]);
    check_error(
        &["variance", own, "--csv", &path("v.svg"), "--plot", &path("v")],
        &["v.svg would be written twice"],
    );
    // A mistyped name must not replace another network either.
    let other = path("other.safetensors");
    std::fs::copy(own, &other).unwrap();
    check_error(&["variance", input, "--csv", &other], &["other.safetensors", "ends in .csv"]);
    assert!(std::fs::read(&other).unwrap() == whole);
    let picture = path("w.svg");
    std::fs::copy(own, &picture).unwrap();
    check_error(&["variance", &picture, "--plot", &path("w")], &["w.svg is the file that is read"]);
    assert!(std::fs::read(own).unwrap() == whole && std::fs::read(&picture).unwrap() == whole);
    check_error(&["prune", input, own, "--threshold", "0"], &["--threshold", "expected a positive number"]);
    check_error(&["variance", input, "--threshold=-1"], &["'-1'", "expected a positive number"]);
    check_error(&["prune", input, own, "--threshold", "1e-9,3"], &["expected a positive number"]);
    check_error(&["eval", own, "--limit", "2/class"], &["expected a whole number above 0"]);
    check_error(&["macs", input, "--width", "0"], &["expected a number above 0, at most 4"]);
    // What cannot be written is named once, without a temporary file, and before any work.
    let absent = format!("{own}/net");
    for (command, ending) in [(&["export", input][..], "onnx"), (&["prune", input][..], "safetensors")] {
        let out = format!("{absent}.{ending}");
        let mut pfq = Command::new(env!("CARGO_BIN_EXE_pfq"));
        let error = String::from_utf8(pfq.args(command).arg(&out).output().unwrap().stderr).unwrap();
        let expected = format!("Error: {out} could not be written: ");
        assert!(error.starts_with(&expected) && error.matches(own).count() == 1, "{error}");
        assert!(!error.contains("unfinished"), "{error}");
    }
    // Results have no networks of a store.
    let results = format!("{}/../results", env!("CARGO_MANIFEST_DIR"));
    check_error(&["verify", &results, "--data", "synthetic"], &["leave --data out", "report --verify"]);
    check_error(&["macs", own, "--width", "0.5"], &["--width", "leave --width out"]);
    check_error(&["macs", input, "--width", "1"], &["of width 1 ", "features.0.0.weight", "instead of"]);
    check_error(&["macs", input, "--arch", "mobilenet_v1"], &["mobilenet_v2", "mobilenet_v1"]);
    check_error(&["macs", "absent.pth"], &["absent.pth", "could not be read"]);
    check_error(&["eval", own, "--data", "synthetic"], &["224×224", "32×32"]);
    check_error(&["eval", input, "--data", "synthetic", "--strides", "cifar"], &["10 classes", "100"]);
}
