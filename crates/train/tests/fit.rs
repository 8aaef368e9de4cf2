//! Training runs on a tiny network and synthetic images are reproducible and resumable, and the
//! network learns.
//!
//! The interruption is real: this binary starts itself again as another process and kills it with
//! SIGKILL in the middle of an epoch.

mod together;

use candle_core::{DType, Device, Tensor};
use datasets::{Augmentation, Batches, Dataset, Epoch, Images, InMemoryDataset, Part, train_batches};
use kernels::gpu::emulation::{self, Order};
use kernels::{Activation, loss::softmax_cross_entropy, sgd};
use models::{BatchNorm, Extras, Fold, Kernel, Method, Network, Norm, Quantization, Step};
use quant_core::Precision;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use train::{
    Arithmetic, Decay, EpochMetrics, Error, Progress, TimeLimit, Trained, Training, TrainingRun, evaluate,
    fit,
};

/// The number of classes of [`data`]: five textures, in warm or in cold colours.
const CLASSES: usize = 10;
/// The number of training images of [`data`]: 25 steps of 8, so that progress is also reported in
/// the middle of an epoch.
const TRAIN: usize = 200;
const BATCH: usize = 8;
const EPOCHS: usize = 3;
/// The environment variable that names the folder to the process that will be killed.
const FOLDER: &str = "PFQ_TEST_KILLED_RUN";

/// Returns synthetic images, with all shapes merged into one class.
fn data(train: usize, test: usize) -> Arc<InMemoryDataset> {
    let whole = datasets::synthetic(train, test, 5).unwrap();
    let merge =
        |images: Images| Images { labels: images.labels.iter().map(|label| label / 10).collect(), ..images };
    let (train, test) = (merge(whole.train), merge(whole.test));
    Arc::new(InMemoryDataset::new("synthetic", whole.source, CLASSES, train, test).unwrap())
}

/// Returns pseudorandom numbers between −`scale` and `scale` that depend only on the seed
/// (SplitMix64).
fn noise(shape: &[usize], seed: u64, scale: f64) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (scale * (((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0)) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Returns a small MobileNet: stem, separable blocks of stride 2, an inverted residual.
fn network() -> Network {
    wide_network(32)
}

/// Returns [`network`] with `last` filters in the last layer.
fn wide_network(last: usize) -> Network {
    let units = [
        ("stem", Kernel::Full { size: 3, stride: 2 }, 3, 8, Activation::Relu6),
        ("a.depthwise", Kernel::Depthwise { stride: 2 }, 8, 8, Activation::Relu6),
        ("a.project", Kernel::Pointwise, 8, 16, Activation::Identity),
        ("b.expand", Kernel::Pointwise, 16, 24, Activation::Relu6),
        ("b.depthwise", Kernel::Depthwise { stride: 1 }, 24, 24, Activation::Relu6),
        ("b.project", Kernel::Pointwise, 24, 16, Activation::Identity),
        ("last", Kernel::Pointwise, 16, last, Activation::Relu6),
    ];
    let mut network = Network::of_image("tiny", [32, 32, 3]);
    let shortcut = 3;
    for (i, (name, kernel, input, filters, activation)) in units.into_iter().enumerate() {
        let shape = kernel.weight_dims(input, filters);
        let fan_in: usize = shape[..shape.len() - 1].iter().product();
        let weight = noise(&shape, 100 + i as u64, (6.0 / fan_in as f64).sqrt());
        let norm = Norm::Batch(BatchNorm::init(filters, &Device::Cpu).unwrap());
        network.push_unit(name, kernel, weight, norm, activation);
        if name == "b.project" {
            network.push_sum(shortcut);
        }
    }
    network.push_head(noise(&[last, CLASSES], 99, 0.05), noise(&[CLASSES], 98, 0.01));
    network.validate().unwrap();
    network
}

/// Returns [`network`] with every kind of quantizer, and so with ranges that a checkpoint must
/// hold.
fn quantized() -> Network {
    quantized_with(Fold::BatchStatistics, Method::Uniform)
}

fn quantized_with(fold: Fold, method: Method) -> Network {
    let [four, eight] = [4, 8].map(|bits| Precision::try_from(bits).unwrap());
    let mut network = network();
    network
        .quantize(&Quantization {
            activations: four,
            weights: four,
            first_layer: eight,
            last_layer: eight,
            fold,
            method,
            ..Quantization::default()
        })
        .unwrap();
    network
}

fn training() -> Training {
    Training {
        warmup_epochs: 1.0,
        cosine_epochs: EPOCHS as f64 - 1.0,
        learning_rate: 0.05,
        batch: BATCH,
        momentum: 0.9,
        weight_decay: 1e-4,
        decay_norm: false,
        label_smoothing: 0.1,
        range_momentum: 0.1,
        augmentation: Augmentation { pad: 2, flip: true },
        decay: Decay::Cosine,
        arithmetic: Arithmetic::F32,
        sync_norm: false,
    }
}

/// The run of these tests: seed 3, one process, no time limit.
fn the_run<'a>(data: &'a Arc<InMemoryDataset>, training: &'a Training, folder: &'a Path) -> TrainingRun<'a> {
    TrainingRun {
        data,
        training,
        seed: 3,
        folder,
        identity: "the-run",
        parent_network: None,
        limit: None,
        ranks: None,
        graphs: false,
    }
}

/// Trains in `folder` from the start or from the checkpoint.
fn run(
    network: Network,
    data: &Arc<InMemoryDataset>,
    training: &Training,
    seed: u64,
    folder: &Path,
    observe: &mut dyn FnMut(Progress),
) -> train::Result<Trained> {
    fit(network, &TrainingRun { seed, ..the_run(data, training, folder) }, observe)
}

/// Trains in a folder of its own, without interruption.
fn run_through(network: Network, training: &Training, seed: u64) -> Trained {
    let folder = tempfile::tempdir().unwrap();
    run(network, &data(TRAIN, 50), training, seed, folder.path(), &mut |_| ()).unwrap()
}

type Bits = BTreeMap<String, Vec<u32>>;

fn bits_of(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn bits(network: &Network) -> Bits {
    network.tensors().into_iter().map(|(name, tensor)| (name, bits_of(tensor))).collect()
}

/// Returns the velocities in a run's checkpoint.
fn velocities(folder: &Path) -> Bits {
    let (_, extras) = Network::load(&folder.join("checkpoint.safetensors"), &Device::Cpu).unwrap();
    extras.tensors.iter().map(|(name, tensor)| (name.clone(), bits_of(tensor))).collect()
}

/// Compares all metrics except the time, to within the last bit. JSON itself keeps every bit, see
/// [`json_keeps_every_bit`].
#[track_caller]
fn check_metrics(found: &[EpochMetrics], expected: &[EpochMetrics]) {
    let numbers = |m: &EpochMetrics| {
        [m.epoch as f64, m.rate, m.train_loss, m.train_top1_percent, m.test_loss, m.test_top1_percent]
    };
    assert_eq!(found.len(), expected.len(), "epochs");
    for (found, expected) in found.iter().zip(expected) {
        let near = |(a, b): (f64, f64)| (a - b).abs() <= 3e-16 * b.abs();
        let all = numbers(found).into_iter().zip(numbers(expected)).all(near);
        assert!(all, "{found:?} and not {expected:?}");
    }
}

/// The metadata of a checkpoint is read back exactly as it was written.
#[test]
fn json_keeps_every_bit() {
    for i in 1..1000 {
        let x = (f64::from(i) * 0.618).sin() * 5.0;
        let read: f64 = serde_json::from_str(&serde_json::to_string(&x).unwrap()).unwrap();
        assert_eq!(read.to_bits(), x.to_bits(), "{read} was {x}");
    }
}

#[track_caller]
fn check_same(found: &Bits, expected: &Bits, what: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}: names");
    let different: Vec<_> =
        found.iter().filter(|(name, bits)| expected[*name] != **bits).map(|x| x.0).collect();
    assert!(different.is_empty(), "{what}: other bits in {different:?}");
}

#[test]
fn a_seed_gives_the_same_bits() {
    let first = run_through(quantized(), &training(), 3);
    let again = run_through(quantized(), &training(), 3);
    check_same(&bits(&again.network), &bits(&first.network), "the same seed");
    check_metrics(&again.metrics, &first.metrics);
    let other = run_through(quantized(), &training(), 4);
    let (other, first) = (bits(&other.network), bits(&first.network));
    for (name, bits) in first {
        assert_ne!(other[&name], bits, "{name} is the same with another seed");
    }
}

/// An epoch consists of batches, forward pass, loss, backward pass and an update of every
/// parameter. Weight decay applies to γ, β and biases only if `decay_norm` is set.
#[test]
fn an_epoch_is_what_it_says() {
    let data = data(60, 50);
    for decay_norm in [false, true] {
        let training =
            Training { decay_norm, warmup_epochs: 0.0, cosine_epochs: 1.0, weight_decay: 0.01, ..training() };
        let folder = tempfile::tempdir().unwrap();
        let found = run(quantized(), &data, &training, 7, folder.path(), &mut |_| ()).unwrap();

        let mut network = quantized();
        let parameters = network.parameters();
        let velocity: Vec<_> = parameters.iter().map(|p| p.tensor.zeros_like().unwrap()).collect();
        let (mut rate, mut loss, mut hits) = (0.0, 0.0, 0.0);
        // 60 images in batches of 8: the last batch has 4.
        let steps = 8;
        for (step, batch) in train_batches(&data, BATCH, training.augmentation, 7, 0).enumerate() {
            let batch = batch.unwrap();
            rate = training.rate((step as f64 + 0.5) / steps as f64, &[]);
            let (logits, tape) = network.forward_train(&batch.images, Step::alone(0.1)).unwrap();
            let result = softmax_cross_entropy(&logits, &batch.labels, 0.1).unwrap();
            let gradients = network.backward(tape, &result.grad).unwrap();
            for (p, v) in parameters.iter().zip(&velocity) {
                let decay = if p.role.decays(decay_norm) { 0.01 } else { 0.0 };
                sgd::step(&p.tensor, gradients.of(p).unwrap(), v, rate, 0.9, decay).unwrap();
            }
            let images = batch.labels.elem_count() as f64;
            loss += images * f64::from(result.loss.to_scalar::<f32>().unwrap());
            let guesses = logits.argmax(1).unwrap().eq(&batch.labels).unwrap();
            hits += f64::from(
                guesses.to_dtype(DType::F32).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(),
            );
        }
        check_same(&bits(&found.network), &bits(&network), "the epoch by hand");
        let velocity: Bits = parameters
            .iter()
            .zip(&velocity)
            .map(|(p, v)| (format!("velocity.{}", p.name), bits_of(v)))
            .collect();
        check_same(&velocities(folder.path()), &velocity, "the checkpoint's velocities");
        let [metrics] = found.metrics[..] else { panic!("one epoch") };
        let evaluation = evaluate(&network, &data).unwrap();
        assert_eq!((metrics.epoch, metrics.rate), (1, rate));
        assert!((metrics.train_loss - loss / 60.0).abs() < 1e-12, "{metrics:?}: {}", loss / 60.0);
        assert!((metrics.train_top1_percent - 100.0 * hits / 60.0).abs() < 1e-9, "{metrics:?}: {hits} of 60");
        assert_eq!(
            (metrics.test_loss, metrics.test_top1_percent),
            (evaluation.loss, evaluation.top1_percent)
        );
    }
}

/// The process that [`a_killed_run_goes_on_bit_for_bit`] starts and kills; by itself it tests
/// nothing.
#[test]
fn run_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    run(quantized(), &data(TRAIN, 50), &training(), 3, Path::new(&folder), &mut |progress| match progress {
        Progress::Resumed { epoch } => println!("resumed after {epoch}"),
        Progress::Steps { epoch, step, steps, .. } if step < steps => {
            println!("in epoch {epoch}");
            // Waits to be killed here, or to be told to continue.
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
        }
        _ => (),
    })
    .unwrap();
    println!("finished");
}

/// Starts the run in `folder`, kills it in the middle of `epoch`, and returns what it printed.
fn kill_in_epoch(epoch: usize, folder: &Path) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "run_that_is_killed", "--nocapture", "--test-threads", "1"])
        .env(FOLDER, folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut answers = child.stdin.take().unwrap();
    let mut printed = Vec::new();
    let mut reached = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        // The test harness prints the start of this line.
        let said = line.unwrap().trim_start_matches("test run_that_is_killed ... ").to_string();
        reached = said == format!("in epoch {epoch}");
        if reached {
            break;
        }
        if said.starts_with("in epoch") {
            answers.write_all(b"go on\n").unwrap();
        }
        printed.push(said);
    }
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(reached && !status.success(), "epoch {epoch} was not reached: {status}, printed {printed:?}");
    printed
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let data = data(TRAIN, 50);
    let whole_folder = tempfile::tempdir().unwrap();
    let whole = run(quantized(), &data, &training(), 3, whole_folder.path(), &mut |_| ()).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let has_said = |printed: &[String], what: &str| printed.iter().any(|line| line == what);
    // In the first epoch there is no checkpoint yet.
    kill_in_epoch(1, folder.path());
    assert!(!folder.path().join("checkpoint.safetensors").exists());
    // Kills it in the second epoch, then again in the second, then in the third.
    let printed = kill_in_epoch(2, folder.path());
    assert!(has_said(&printed, "in epoch 1"), "{printed:?}");
    let printed = kill_in_epoch(2, folder.path());
    assert!(has_said(&printed, "resumed after 1") && !has_said(&printed, "in epoch 1"), "{printed:?}");
    // The file that a process killed while writing leaves.
    std::fs::write(folder.path().join(".unfinished-a1b2c3.safetensors"), "half a file").unwrap();
    let printed = kill_in_epoch(3, folder.path());
    assert!(has_said(&printed, "resumed after 1") && has_said(&printed, "in epoch 2"), "{printed:?}");

    let mut events = Vec::new();
    let resumed = run(quantized(), &data, &training(), 3, folder.path(), &mut |p| events.push(p)).unwrap();
    assert!(matches!(events[0], Progress::Resumed { epoch: 2 }), "{:?}", events[0]);
    let epochs: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Progress::Epoch { metrics, .. } => Some(metrics.epoch),
            _ => None,
        })
        .collect();
    assert_eq!(epochs, [3], "epochs that the resumed run trained");
    check_same(&bits(&resumed.network), &bits(&whole.network), "resumed");
    check_same(&velocities(folder.path()), &velocities(whole_folder.path()), "resumed velocities");
    check_metrics(&resumed.metrics, &whole.metrics);

    // A finished run is only read.
    let mut events = 0;
    let finished = run(quantized(), &data, &training(), 3, folder.path(), &mut |_| events += 1).unwrap();
    assert_eq!(events, 1, "a finished run was trained on");
    check_same(&bits(&finished.network), &bits(&whole.network), "read again");
}

/// Calls a run again whenever its time is up; returns its result and the number of epochs that each
/// call trained.
fn run_in_pieces(network: impl Fn() -> Network, folder: &Path, limit: Duration) -> (Trained, Vec<usize>) {
    let (data, training) = (data(TRAIN, 50), training());
    let mut pieces = Vec::new();
    loop {
        let limit = TimeLimit::after(limit);
        let run = TrainingRun { limit: Some(&limit), ..the_run(&data, &training, folder) };
        let mut epochs = 0;
        let result =
            fit(network(), &run, &mut |p| epochs += usize::from(matches!(p, Progress::Epoch { .. })));
        pieces.push(epochs);
        match result {
            Ok(trained) => return (trained, pieces),
            Err(ref error @ Error::TimeLimit { epoch, epochs }) => {
                assert_eq!((epoch, epochs), (pieces.iter().sum(), EPOCHS));
                assert!(error.to_string().contains("the same command goes on"), "{error}");
                assert!(pieces.len() <= EPOCHS, "no progress: {pieces:?}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_run_in_pieces_gives_the_bits_of_one() {
    let whole = run_through(quantized(), &training(), 3);
    // Without any time, each call trains the one epoch that it may always start.
    let folder = tempfile::tempdir().unwrap();
    let (pieced, pieces) = run_in_pieces(quantized, folder.path(), Duration::ZERO);
    assert_eq!(pieces, [1, 1, 1]);
    check_same(&bits(&pieced.network), &bits(&whole.network), "in pieces");
    check_metrics(&pieced.metrics, &whole.metrics);

    // Enough time for the whole run.
    let folder = tempfile::tempdir().unwrap();
    let (_, pieces) = run_in_pieces(quantized, folder.path(), Duration::from_secs(3600));
    assert_eq!(pieces, [3]);
}

/// Returns a network whose checkpoint, with the momenta, does not fit into one file.
fn large() -> Network {
    wide_network(90_000)
}

/// A checkpoint is independent of the device, so epochs on a CPU and with the GPU kernels can
/// alternate; the kernels run emulated, and on a GPU if there is one. They sum in another order,
/// and 75 training steps amplify the rounding, so the losses are only close to each other.
#[test]
fn a_run_goes_on_from_device_to_device() {
    let (data, training) = (data(TRAIN, 50), training());
    let expected = run_through(network(), &training, 3).metrics;
    let epoch = |device: &Device, arithmetic: Arithmetic, folder: &Path| {
        let limit = TimeLimit::after(Duration::ZERO);
        let limit = Some(&limit);
        let network = network().to_device(device).unwrap();
        let training = Training { arithmetic, ..training };
        let run = TrainingRun { limit, ..the_run(&data, &training, folder) };
        fit(network, &run, &mut |_| ())
    };
    let check = |place: &str, arithmetic: Arithmetic, elsewhere: &dyn Fn(&Path) -> train::Result<Trained>| {
        let folder = tempfile::tempdir().unwrap();
        elsewhere(folder.path()).unwrap_err();
        epoch(&Device::Cpu, Arithmetic::F32, folder.path()).unwrap_err();
        let found = elsewhere(folder.path()).unwrap().metrics;
        // bf16 has 8 bits of precision.
        let (whole, first) = if arithmetic == Arithmetic::F32 { (0.02, 1e-4) } else { (0.05, 0.01) };
        assert_eq!(found.len(), EPOCHS);
        for (found, expected) in found.iter().zip(&expected) {
            let off = (found.train_loss - expected.train_loss).abs();
            eprintln!("{place}, {arithmetic:?}, epoch {}: the training loss is {off:.1e} off", found.epoch);
            assert!(off <= whole, "{place}: {found:?} and not {expected:?}");
        }
        // The images and their order are the same, or the first epoch would already differ.
        assert!((found[0].train_loss - expected[0].train_loss).abs() <= first, "{place}: {found:?}");
    };
    check("on the CPU", Arithmetic::Bf16, &|folder| epoch(&Device::Cpu, Arithmetic::Bf16, folder));
    for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
        match emulation::available() {
            Ok(()) => check("emulated", arithmetic, &|folder| {
                emulation::run(Order::Forward, || epoch(&Device::Cpu, arithmetic, folder))
            }),
            Err(message) => eprintln!("skipped: {message}"),
        }
        #[cfg(feature = "cuda")]
        match Device::new_cuda(0) {
            Ok(device) => check("on the GPU", arithmetic, &|folder| epoch(&device, arithmetic, folder)),
            Err(error) => eprintln!("skipped: no GPU answers: {error}"),
        }
    }
}

/// Steps that are launches of a CUDA graph give the same bits as steps that are not, for every
/// quantizer and with a smaller batch at the end of the epoch. Folded weights cannot be recorded,
/// because Candle copies shapes to the device for them: their steps are launched without a graph,
/// which is reported. A CPU has no graphs and reports nothing.
#[test]
fn a_cuda_graph_changes_no_bit() {
    let short = Training { warmup_epochs: 0.0, cosine_epochs: 1.0, ..training() };
    let (data, training) = (data(4 * BATCH + 3, 10), short);
    let check = |device: &Device| {
        let quantized = [Method::Uniform, Method::Pact, Method::Dsq, Method::Lsq]
            .map(|method| quantized_with(Fold::Unfolded, method));
        // A network as DFQ leaves it.
        let mut capped = quantized_with(Fold::Frozen, Method::Uniform);
        for unit in capped.units_mut().filter(|unit| unit.activation != Activation::Identity) {
            unit.cap = Some(Tensor::full(2f32, unit.filters(), &Device::Cpu).unwrap());
        }
        let all = [network(), capped].into_iter().chain(quantized).map(|network| (network, false));
        for (network, fails) in
            all.chain([(quantized_with(Fold::BatchStatistics, Method::Uniform), device.is_cuda())])
        {
            let run = |graphs| {
                let (folder, mut told) = (tempfile::tempdir().unwrap(), Vec::new());
                let run = TrainingRun { graphs, ..the_run(&data, &training, folder.path()) };
                let network = network.duplicate().unwrap().to_device(device).unwrap();
                let trained = fit(network, &run, &mut |progress| {
                    if let Progress::NoGraphs(problem) = progress {
                        told.push(problem.to_string());
                    }
                });
                (trained.unwrap(), velocities(folder.path()), told)
            };
            let ((expected, expected_velocities, none), (found, found_velocities, told)) =
                (run(false), run(true));
            check_same(&bits(&found.network), &bits(&expected.network), "of the network");
            check_same(&found_velocities, &expected_velocities, "of the momenta");
            check_metrics(&found.metrics, &expected.metrics);
            assert_eq!((none.len(), told.len()), (0, usize::from(fails)), "{told:?}");
        }
    };
    check(&Device::Cpu);
    #[cfg(feature = "cuda")]
    match Device::new_cuda(0) {
        Ok(device) => check(&device),
        Err(error) => eprintln!("skipped: no GPU answers: {error}"),
    }
}

#[test]
fn a_checkpoint_in_parts_goes_on_bit_for_bit() {
    let (data, training) = (data(16, 8), Training { cosine_epochs: 1.0, ..training() });
    let fit_in = |folder: &Path, limit| {
        let run = TrainingRun { limit, ..the_run(&data, &training, folder) };
        fit(large(), &run, &mut |_| ())
    };
    let whole_folder = tempfile::tempdir().unwrap();
    let whole = fit_in(whole_folder.path(), None).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let limit = TimeLimit::after(Duration::ZERO);
    let stopped = fit_in(folder.path(), Some(&limit)).unwrap_err();
    assert!(matches!(stopped, Error::TimeLimit { epoch: 1, epochs: 2 }), "{stopped}");
    let files = || std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    assert!(files().all(|file| file.metadata().unwrap().len() <= models::MAX_FILE_BYTES as u64));
    let parts: Vec<_> = files().filter(|file| file.display().to_string().contains(".part-")).collect();
    assert!(parts.len() > 1, "{parts:?}");

    // A checkpoint that lacks a part is an error that names the part.
    let aside = tempfile::tempdir().unwrap();
    let (part, kept) = (&parts[0], aside.path().join("part"));
    std::fs::copy(part, &kept).unwrap();
    std::fs::remove_file(part).unwrap();
    let message = fit_in(folder.path(), None).unwrap_err().to_string();
    assert!(message.contains(&part.display().to_string()), "{message}");

    // With the part back in its place, for example copied from another machine, the run resumes.
    std::fs::copy(&kept, part).unwrap();
    let resumed = fit_in(folder.path(), None).unwrap();
    check_same(&bits(&resumed.network), &bits(&whole.network), "resumed from parts");
    check_same(&velocities(folder.path()), &velocities(whole_folder.path()), "resumed velocities");
    assert_eq!(
        files().filter(|file| file.display().to_string().contains(".part-")).count(),
        parts.len(),
        "parts of the first epoch are left"
    );
}

/// A data set whose test images cannot be read.
struct Untestable(Arc<InMemoryDataset>);

impl Dataset for Untestable {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn source(&self) -> &str {
        self.0.source()
    }
    fn classes(&self) -> usize {
        self.0.classes()
    }
    fn train_images(&self) -> usize {
        self.0.train_images()
    }
    fn test_images(&self) -> usize {
        self.0.test_images()
    }
    fn side(&self) -> (usize, usize) {
        self.0.side()
    }
    fn mean(&self) -> [f32; 3] {
        self.0.mean()
    }
    fn std(&self) -> [f32; 3] {
        self.0.std()
    }
    fn fingerprint(&self) -> &str {
        self.0.fingerprint()
    }
    fn train_parts(&self, batch: usize, part: Part, epoch: Epoch) -> Batches {
        self.0.train_parts(batch, part, epoch)
    }
    fn test_parts(&self, _: usize, _: Part) -> Batches {
        panic!("a picture can't be read")
    }
}

/// A failing evaluation does not lose the epoch: its checkpoint is already written, and the next
/// call evaluates it.
#[test]
fn an_evaluation_that_fails_does_not_cost_the_epoch() {
    let whole = run_through(quantized(), &training(), 3);
    let (data, training, folder) = (data(TRAIN, 50), training(), tempfile::tempdir().unwrap());
    let untestable = Untestable(data.clone());
    for call in [1, 2] {
        let run = TrainingRun { data: &untestable, ..the_run(&data, &training, folder.path()) };
        let failed = catch_unwind(AssertUnwindSafe(|| fit(quantized(), &run, &mut |_| ())));
        assert!(failed.is_err(), "call {call}");
    }
    let mut events = Vec::new();
    let resumed = run(quantized(), &data, &training, 3, folder.path(), &mut |p| events.push(p)).unwrap();
    assert!(matches!(events[0], Progress::Resumed { epoch: 1 }), "{:?}", events[0]);
    let begun = |p: &&Progress| matches!(p, Progress::Steps { step: 20, .. });
    assert_eq!(events.iter().filter(begun).count(), EPOCHS - 1, "the first epoch was trained again");
    check_same(&bits(&resumed.network), &bits(&whole.network), "resumed");
    check_metrics(&resumed.metrics, &whole.metrics);
    let metrics = std::fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
    assert_eq!(metrics.lines().count(), 1 + EPOCHS);
}

/// A run that was killed between writing a checkpoint and writing its metrics has all metrics in
/// the end.
#[test]
fn metrics_that_lag_behind_the_checkpoint_catch_up() {
    let (data, training, folder) = (data(40, 20), training(), tempfile::tempdir().unwrap());
    let first = run(network(), &data, &training, 3, folder.path(), &mut |_| ()).unwrap();
    let path = folder.path().join("metrics.csv");
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, whole.lines().next().unwrap()).unwrap();
    let again = run(network(), &data, &training, 3, folder.path(), &mut |_| ()).unwrap();
    check_metrics(&again.metrics, &first.metrics);
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), whole.lines().count());
}

/// Quantizers hide a network's NaN from the loss, so the network's values are checked too.
#[test]
fn divergence_that_no_loss_shows_is_an_error() {
    let (data, folder) = (data(TRAIN, 50), tempfile::tempdir().unwrap());
    let training = Training { learning_rate: 1e9, warmup_epochs: 0.0, cosine_epochs: 2.0, ..training() };
    let result = run(quantized(), &data, &training, 3, folder.path(), &mut |_| ());
    let error = result.map(|trained| trained.metrics).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Diverged { epoch: 1, .. }), "{message}");
    assert!(!folder.path().join("checkpoint.safetensors").exists(), "a diverged epoch was stored");
}

/// Reading a file also checks the network's values, because quantizers would hide a NaN.
#[test]
fn a_network_that_is_not_finite_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.safetensors");
    let mut network = quantized();
    let head = network.units_mut().last().unwrap();
    let Norm::Bias(bias) = &mut head.norm else { panic!("the classifier has a bias") };
    *bias = (&*bias * f64::NAN).unwrap();
    network.save(&path, &Extras::default()).unwrap();
    let message = Network::load(&path, &Device::Cpu).unwrap_err().to_string();
    for part in ["network.safetensors", "head.bias", "filter 0", "NaN", "finite"] {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let (data, training) = (data(40, 20), Training { cosine_epochs: 1.0, ..training() });
    let folder = tempfile::tempdir().unwrap();
    run(network(), &data, &training, 3, folder.path(), &mut |_| ()).unwrap();
    let other = TrainingRun { identity: "another-run", ..the_run(&data, &training, folder.path()) };
    let message = fit(network(), &other, &mut |_| ()).unwrap_err().to_string();
    for part in ["the-run", "another-run", "checkpoint.safetensors"] {
        assert!(message.contains(part), "{message:?} does not name {part}");
    }
    // A network file that was not written by a run has no identity.
    network().save(&folder.path().join("checkpoint.safetensors"), &Extras::default()).unwrap();
    let message = fit(network(), &other, &mut |_| ()).unwrap_err().to_string();
    assert!(message.contains("another-run"), "{message}");
}

#[test]
fn a_damaged_checkpoint_is_an_error_that_names_it() {
    let (data, training) = (data(40, 20), Training { cosine_epochs: 1.0, ..training() });
    let folder = tempfile::tempdir().unwrap();
    run(network(), &data, &training, 3, folder.path(), &mut |_| ()).unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[20] ^= 0x55;
    let cuts = [0, 5, 500, whole.len() / 2, whole.len() - 1].map(|end| whole[..end].to_vec());
    for damaged in cuts.into_iter().chain([flipped]) {
        std::fs::write(&path, &damaged).unwrap();
        let result = run(network(), &data, &training, 3, folder.path(), &mut |_| ());
        let message = result.expect_err("a damaged checkpoint was read").to_string();
        assert!(message.contains("checkpoint.safetensors"), "{message}");
        assert_eq!(std::fs::read(&path).unwrap(), damaged, "the file was touched");
    }
}

/// Guessing gives 10 %. The classes are textures and colours, which a small network learns quickly.
#[test]
fn it_learns() {
    let data = data(1000, 200);
    let training = Training {
        cosine_epochs: 5.0,
        learning_rate: 0.1,
        batch: 20,
        label_smoothing: 0.0,
        augmentation: Augmentation { pad: 2, flip: true },
        decay: Decay::Cosine,
        arithmetic: Arithmetic::F32,
        sync_norm: false,
        ..training()
    };
    let folder = tempfile::tempdir().unwrap();
    let trained = run(network(), &data, &training, 1, folder.path(), &mut |_| ()).unwrap();
    let losses: Vec<f64> = trained.metrics.iter().map(|m| m.train_loss).collect();
    assert!(losses[0] < 2.4 && losses[5] < 0.75 * losses[0], "losses of the epochs: {losses:?}");
    let top1 = trained.metrics[5].test_top1_percent;
    assert!(top1 > 35.0, "{top1} % after training, losses {losses:?}");
    // The reported accuracy is the network's.
    assert_eq!(evaluate(&trained.network, &data).unwrap().top1_percent, top1);

    let text = std::fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let rows: Vec<EpochMetrics> = reader.deserialize().collect::<Result<_, _>>().unwrap();
    assert_eq!(rows, trained.metrics, "metrics.csv");
    assert_eq!(text.lines().count(), 1 + 6, "a heading and a line for every epoch");
    assert!(text.starts_with("epoch,") && text.contains(",low_variance_percent\n"), "{text}");
    // No filter decays to a constant in so few steps.
    assert_eq!(trained.low_variance_percent, [Some(0.0); 6]);
    let [highest, median] = [1.0, 0.5].map(|factor| {
        let mut all: Vec<f32> = Vec::new();
        for norm in trained.network.units().filter_map(models::Unit::batch_norm) {
            all.extend(norm.variance.to_vec1::<f32>().unwrap());
        }
        all.sort_by(f32::total_cmp);
        all[(factor * (all.len() - 1) as f64) as usize]
    });
    let share = |threshold: f32| trained.network.low_variance_percent(threshold.into()).unwrap().unwrap();
    assert!(
        share(f32::INFINITY) == 100.0
            && share(highest) < 100.0
            && share(median) <= 50.0
            && share(median) > 30.0
    );
}

/// Reading a loss waits for the accelerator, so losses are read only every 20 steps and at the end
/// of an epoch.
#[test]
fn losses_are_read_rarely() {
    let folder = tempfile::tempdir().unwrap();
    let mut read = Vec::new();
    run(network(), &data(TRAIN, 50), &training(), 1, folder.path(), &mut |progress| {
        if let Progress::Steps { epoch, step, .. } = progress {
            read.push((epoch, step));
        }
    })
    .unwrap();
    assert_eq!(read, [(1, 20), (1, 25), (2, 20), (2, 25), (3, 20), (3, 25)]);
}

#[test]
fn divergence_is_an_error_that_says_when() {
    let data = data(TRAIN, 50);
    let training = Training { learning_rate: 1e20, warmup_epochs: 0.0, cosine_epochs: 2.0, ..training() };
    let folder = tempfile::tempdir().unwrap();
    let error = run(network(), &data, &training, 1, folder.path(), &mut |_| ()).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Diverged { epoch: 1, .. }), "{message}");
    assert!(message.contains("diverged") && message.contains("learning rate"), "{message}");
    assert!(!folder.path().join("checkpoint.safetensors").exists(), "a diverged epoch was stored");
}

/// If the last step of a run breaks the network, only the evaluation shows it: no training loss
/// follows.
#[test]
fn divergence_in_the_last_step_is_an_error_too() {
    let training =
        Training { learning_rate: 1e38, warmup_epochs: 0.0, cosine_epochs: 1.0, batch: 40, ..training() };
    let folder = tempfile::tempdir().unwrap();
    // The epoch is stored before its evaluation, which fails in every call.
    for call in 0..2 {
        let result = run(network(), &data(40, 50), &training, 1, folder.path(), &mut |_| ());
        let metrics = result.map(|trained| trained.metrics);
        assert!(matches!(metrics, Err(Error::Diverged { epoch: 1, .. })), "call {call}: {metrics:?}");
        assert!(!folder.path().join("metrics.csv").exists(), "a diverged epoch has metrics");
    }
}

/// Impossible settings are reported before anything is written.
#[test]
fn impossible_settings_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let training = Training { momentum: 1.5, ..training() };
    let error = run(network(), &data(40, 20), &training, 1, folder.path(), &mut |_| ()).unwrap_err();
    assert!(matches!(error, Error::Setting { key: "momentum", .. }), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
