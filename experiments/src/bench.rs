//! The benchmark against PyTorch: the same networks, operations, shapes and threads, in turns.
//!
//! Every implementation runs in its own process (ours is this program with a hidden flag), so that
//! each has its own memory and allocator. All of them answer the same JSON requests, one per line.
//! For each case, all processes are set up and warmed up. In each round, they then take turns to
//! run steps for some time, while the other processes block. Ratios are taken within a round, so a
//! machine that becomes slower or faster over time favours none of them.
//!
//! On a GPU, the implementations take turns in the same way. The notes of that report say what is
//! different there.

mod case;
mod machine;
mod ours;
mod pytorch;
pub mod step_profile;
mod worker;

use crate::command::quoted;
use crate::device::{self, Arithmetic};
use crate::{output, process};
use anyhow::{Context, Result, bail};
use case::{Case, Layers, picked};
use clap::Parser;
use machine::Ticks;
use report::bench::{IMPLEMENTATIONS, Implementation, OURS, Place, Speed, Spread};
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;
use worker::{Hello, Ran, Ready, Run, Settings, Setup, Traffic, Worker};

/// Flags of the benchmark beside PyTorch.
#[derive(Debug, Clone, Parser)]
#[command(version, about = "Measures training, evaluation and single operations, compared with PyTorch")]
struct Flags {
    /// Device: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,

    /// Arithmetic (tf32 only on a GPU); if not given, f32, and also bf16 on a CPU that has
    /// instructions for it
    ///
    /// In bf16, ours stores feature maps in bfloat16, and PyTorch runs under autocast on a CPU.
    #[arg(long, value_enum, value_name = "KIND")]
    arithmetic: Option<Arithmetic>,

    /// On a GPU, launch our training steps as CUDA graphs
    #[arg(long)]
    cuda_graphs: bool,

    /// Python interpreter that has torch; if not given, PyTorch is installed in the target folder
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,

    /// Number of threads of every implementation; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Number of turns of every implementation
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,

    /// Duration of a turn, which has at least one step
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    seconds: f64,

    /// Batch sizes of the networks, e.g. 64,128; if not given, 64, or 128 on a GPU
    ///
    /// torch.compile and the single operations are measured only at the first size.
    #[arg(long, value_name = "SIZES", value_delimiter = ',',
          value_parser = clap::value_parser!(u16).range(2..=4096))]
    batches: Vec<u16>,

    /// Modes of PyTorch to compare with; none needs no Python
    #[arg(long, value_name = "MODES", value_delimiter = ',', value_parser = MODES,
          default_value = "eager,channels_last,compile")]
    modes: Vec<String>,

    /// Measure only these cases, e.g. mobilenet_v2,1.0,64,train,a4w4 or depthwise
    ///
    /// A case is measured if it matches a term of every kind that is given (network, width, batch,
    /// what, bits, arithmetic). Nothing is written without --out.
    #[arg(long, value_name = "TERMS", value_delimiter = ',')]
    only: Vec<String>,

    /// Folder for the results, which are written after each case; results/bench if everything is measured
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Answer requests from standard input
    #[arg(long, hide = true)]
    worker: bool,
}

/// The values of `--modes`: `none` and the labels of PyTorch's implementations.
const MODES: [&str; 4] = ["none", "eager", "channels_last", "compile"];

/// The settings of the training steps.
const SETTINGS: Settings = Settings { rate: 1e-3, momentum: 0.9, weight_decay: 1e-3, range_momentum: 0.01 };

/// The pause between two turns, in which threads that still spin come to rest.
const REST: Duration = Duration::from_millis(30);

/// Notes for readers of results on a CPU.
const NOTES: [&str; 9] = [
    "train is forward pass, cross-entropy, backward pass, and SGD with momentum and weight decay; eval is the \
     forward pass with running statistics. The images are in memory, the same in every step.",
    "A4/W4 is fake quantization of every weight and activation to 4 bits, 8 in the first and last layer, with \
     live batch normalization. PyTorch's is its own fused module (FusedMovingAvgObsFakeQuantize) at the same \
     places; in eval the observers are off. Numbers of quantizers and parameters are checked to be equal.",
    "eager is PyTorch in NCHW, channels_last the same in NHWC, compile is torch.compile with the default \
     backend from NCHW, which chooses its own layouts. Operations are measured in the first two modes.",
    "PyTorch has what helps it: fused SGD, ReLU and residual sums in place, the same allocator settings as ours \
     (pages are kept; 10 to 20 % faster), and for torch.compile a fake quantizer that does not cut the graph, \
     which PyTorch's module does.",
    "bf16: ours keeps feature maps and their gradients in bfloat16, PyTorch runs under autocast to it. Its fused fake \
     quantizer takes float32 only, so under autocast it runs in float32.",
    "torch.compile is measured at the first batch size only, as compiling takes up to minutes for each case.",
    "Memory is that of the measured steps, not of compiling.",
    "A turn is at least one step, so it takes longer than --seconds for the large networks.",
    "Ratios of single operations say less than those of networks: ours runs several of them as one there.",
];

/// Notes for readers of results on a GPU.
const NOTES_GPU: [&str; 5] = [
    "train is forward pass, cross-entropy, backward pass, and SGD with momentum and weight decay; eval is the \
     forward pass with running statistics. The images are on the GPU, the same in every step. A turn is measured \
     from an idle GPU to an idle GPU.",
    "eager is PyTorch in NCHW and float32 with TF32 products, channels_last the same in NHWC under autocast to \
     bfloat16, compile is torch.compile of the latter in its mode reduce-overhead, which uses CUDA graphs where it \
     can. Ours computes as `--arithmetic` says, which the name of the GPU tells.",
    "PyTorch has what helps it: fused SGD, cudnn.benchmark, ReLU and residual sums in place, and for torch.compile a \
     fake quantizer that does not cut the graph. Its fused fake quantizer takes float32 only, so under autocast it \
     runs in float32.",
    "A4/W4 is fake quantization of every weight and activation to 4 bits, 8 in the first and last layer, with \
     live batch normalization. Numbers of quantizers and parameters are checked to be equal.",
    "MiB a step counts each operand and each result of each of our operations once, in the type that it is stored \
     in. The copy is one of 1 GiB within the GPU's memory, bytes read and written, in the same process.",
];

/// Runs the benchmark's binary.
pub fn main() -> Result<()> {
    let flags = Flags::parse();
    if flags.worker {
        // The worker runs in the same way as the programs that train.
        return process::run(|| {
            let (device, name) = device::open(&flags.device)?;
            flags.arithmetic.unwrap_or_default().set(&device, name)?;
            let graphs = device::allow_graphs(&device, flags.cuda_graphs)?;
            ours::serve(std::io::stdin().lock(), std::io::stdout(), &device, graphs)
        });
    }
    if !(flags.seconds > 0.0 && flags.seconds <= 600.0) {
        bail!("--seconds {}: expected more than 0, at most 600", flags.seconds);
    }
    // The device is opened first: without it there is nothing to measure.
    let (place, device_name, arithmetics) = {
        let (device, name) = device::open(&flags.device)?;
        let (arithmetic, mut name) = flags.arithmetic.unwrap_or_default().set(&device, name)?;
        if device::allow_graphs(&device, flags.cuda_graphs)? {
            name += ", training steps of ours as CUDA graphs";
        }
        let place = if device.is_cpu() { Place::Cpu } else { Place::Gpu };
        let mut arithmetics = vec![arithmetic];
        if flags.arithmetic.is_none() && place == Place::Cpu && machine::has_bf16() {
            arithmetics.push(train::Arithmetic::Bf16);
        }
        (place, name, arithmetics)
    };
    let mut batches: Vec<usize> = flags.batches.iter().copied().map(usize::from).collect();
    if batches.is_empty() {
        batches.push(if place == Place::Cpu { 64 } else { 128 });
    }
    let cases = picked(&flags.only, Case::all(&batches, &arithmetics)?)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = flags.threads.map_or(cores, usize::from);
    let mut machine = machine::facts(threads);
    if place == Place::Gpu {
        machine.insert(0, ("GPU".into(), device_name));
    }
    let everything =
        flags.only.is_empty() && MODES[1..].iter().all(|mode| flags.modes.iter().any(|m| m == mode));
    let folder = flags.out.clone().or_else(|| everything.then(|| PathBuf::from("results/bench")));
    let compared = |i: &Implementation| i.id == OURS || flags.modes.iter().any(|mode| mode == i.label);
    let implementations: Vec<_> = IMPLEMENTATIONS.into_iter().filter(compared).collect();
    let python = match &flags.python {
        _ if implementations.len() == 1 => None,
        Some(python) => Some(python.clone()),
        None => Some(pytorch::environment(place)?),
    };
    let bench = Bench {
        implementations,
        python,
        device: flags.device.clone(),
        arithmetic: flags.arithmetic.unwrap_or_default(),
        graphs: flags.cuda_graphs,
        place,
        threads,
        rounds: flags.rounds.into(),
        seconds: flags.seconds,
        compiled_batch: batches[0],
    };
    if let Some(version) = bench.pytorch_version()? {
        machine.push(("PyTorch".into(), version));
    }
    let context = |others: &[f64]| {
        let mut machine = machine.clone();
        if let Some(Spread { median, max, .. }) = Spread::of(others.iter().map(|share| 100.0 * share)) {
            let text = format!("{median:.0} % of the cores in the median case, {max:.0} % in the worst");
            machine.push(("other programs during the rounds".into(), text));
        }
        let notes = match place {
            Place::Cpu => NOTES.map(String::from).into(),
            Place::Gpu => NOTES_GPU.map(String::from).into(),
        };
        report::bench::About { command: command_line(std::env::args().skip(1)), notes, machine, place }
    };
    let (mut rows, mut others) = (Vec::new(), Vec::new());
    for (index, case) in cases.iter().enumerate() {
        output::print(&format!("[{}/{}] {}", index + 1, cases.len(), case.name()));
        let (measured, of_others) = bench.measure(case).with_context(|| case.name())?;
        output::print(&format!("    {}", summary(&measured)));
        rows.extend(measured);
        others.extend(of_others);
        // Writing after each case keeps the measurements of a run that is stopped, but only in a
        // folder of its own: a record must not be replaced by a part of another one.
        if let Some(folder) = &flags.out {
            report::bench::write(&rows, &context(&others), folder)?;
        }
    }
    if let Some(folder) = &folder {
        report::bench::write(&rows, &context(&others), folder)?;
    }
    output::print(&format!("\n{}", report::bench::terminal(&rows, &context(&others))));
    if let Some(folder) = folder {
        output::print(&format!("Written to {}.", folder.display()));
    }
    Ok(())
}

/// The beginning of the command of a build for GPUs.
const ON_GPU: &str =
    "scripts/cuda-toolchain run cargo run --release -p experiments --features cuda --bin bench_pytorch --";

/// Returns the command as it can be given elsewhere: without flags that name local paths.
fn command_line(mut flags: impl Iterator<Item = String>) -> String {
    let mut words = vec![if cfg!(feature = "cuda") { ON_GPU } else { "just bench-pytorch" }.to_string()];
    while let Some(word) = flags.next() {
        let place = ["--python", "--out"].into_iter().find(|flag| word.starts_with(flag));
        if place.is_none() {
            words.push(quoted(word));
        } else if place == Some(word.as_str()) {
            flags.next();
        }
    }
    words.join(" ")
}

/// Returns a path of this program. On Linux, it stays valid if a new build replaces the file.
fn own_program() -> Result<PathBuf> {
    let running = PathBuf::from("/proc/self/exe");
    Ok(if running.exists() { running } else { std::env::current_exe()? })
}

/// The settings of a benchmark run.
struct Bench {
    /// The implementations to compare, ours first.
    implementations: Vec<Implementation>,
    /// An interpreter that has PyTorch, if any of its modes is compared.
    python: Option<PathBuf>,
    /// The value of `--device`.
    device: String,
    arithmetic: Arithmetic,
    graphs: bool,
    place: Place,
    threads: usize,
    rounds: usize,
    seconds: f64,
    /// The batch size at which torch.compile is measured.
    compiled_batch: usize,
}

/// An implementation that runs a case, or the reason why it does not.
type Slot = Result<Runner, (Implementation, String)>;

/// An implementation that runs a case.
struct Runner {
    implementation: Implementation,
    worker: Worker,
    ready: Option<Ready>,
    /// The number of steps per turn.
    steps: usize,
    /// Images per second, one value per round.
    speeds: Vec<f64>,
    peak_mib: Option<f64>,
}

impl Bench {
    /// Checks that PyTorch works, if it is needed; returns its version.
    fn pytorch_version(&self) -> Result<Option<String>> {
        let Some(python) = &self.python else { return Ok(None) };
        let mut worker = self.start(&self.implementations[1])?;
        let Hello { version, threads } = worker.answer().with_context(|| {
            format!("{} can't run PyTorch; install torch there, or leave --python out", python.display())
        })?;
        if threads != self.threads {
            bail!("PyTorch computes with {threads} threads: expected {}", self.threads);
        }
        Ok(Some(version))
    }

    fn start(&self, implementation: &Implementation) -> Result<Worker> {
        let logs = pytorch::target()?.join("bench-logs");
        std::fs::create_dir_all(&logs).with_context(|| format!("{} could not be created", logs.display()))?;
        let command = match (pytorch::flags(implementation.id, self.place), &self.python) {
            (Some(flags), Some(python)) => pytorch::worker(python, &logs, flags, &self.device, self.threads)?,
            _ => {
                let mut command = Command::new(own_program()?);
                command.args(["--worker", "--device", &self.device, "--arithmetic", &self.arithmetic.name()]);
                if self.graphs {
                    command.arg("--cuda-graphs");
                }
                command.env("RAYON_NUM_THREADS", self.threads.to_string());
                command
            }
        };
        Worker::start(command, logs.join(format!("{}.log", implementation.id)))
    }

    /// Returns whether the implementation takes part in the case.
    fn takes_part(&self, implementation: &Implementation, case: &Case) -> bool {
        implementation.id != "pytorch_compile" || (case.of_network() && case.batch == self.compiled_batch)
    }

    /// Returns a row for each implementation that takes part, ours first, and the share of the
    /// cores that other programs used. If a mode of PyTorch fails, its row says why. If ours fails,
    /// that is an error.
    fn measure(&self, case: &Case) -> Result<(Vec<Speed>, Option<f64>)> {
        let taking_part = self.implementations.iter().filter(|i| self.takes_part(i, case));
        // All workers are started before the first request, so that they load PyTorch in parallel.
        let mut runners: Vec<Slot> = Vec::new();
        for &implementation in taking_part {
            let worker = self.start(&implementation)?;
            runners.push(Ok(Runner {
                implementation,
                worker,
                ready: None,
                steps: 1,
                speeds: Vec::new(),
                peak_mib: None,
            }));
        }
        let layers = if case.of_network() { Some(Layers::of(&case.build()?)) } else { None };
        let mut expected = None;
        each(&mut runners, |runner| {
            runner.worker.answer::<Hello>()?;
            let ready = runner.set_up(case, layers.as_ref())?;
            // Our implementation is the first.
            let expected = *expected.get_or_insert((ready.parameters, ready.quantizers));
            if layers.is_some() && (ready.parameters, ready.quantizers) != expected {
                bail!(
                    "its numbers of parameters and quantizers are {:?}, ours {expected:?}",
                    (ready.parameters, ready.quantizers)
                );
            }
            Ok(())
        })?;
        each(&mut runners, |runner| {
            let Ran { seconds, .. } = runner.worker.ask(&Run { run: 1 })?;
            runner.steps = ((self.seconds / seconds).round() as usize).max(1);
            Ok(())
        })?;
        let ticks = |runners: &[Slot]| Ticks::now(runners.iter().flatten().map(|runner| runner.worker.id()));
        let before = ticks(&runners);
        for _ in 0..self.rounds {
            each(&mut runners, |runner| {
                sleep(REST);
                runner.turn(case.batch)
            })?;
        }
        let others = ticks(&runners).zip(before).map(|(now, before)| now.others_since(before));
        Ok((self.rows(case, &runners), others))
    }

    fn rows(&self, case: &Case, runners: &[Slot]) -> Vec<Speed> {
        let ours: &[f64] = runners.iter().flatten().next().map_or(&[], |runner| &runner.speeds);
        let row = |implementation: &Implementation| Speed {
            network: case.network.name().into(),
            width: case.width,
            batch: case.batch,
            what: case.what(),
            precision: case.precision().into(),
            arithmetic: case.arithmetic.name().into(),
            implementation: implementation.id.into(),
            threads: self.threads,
            ..Speed::default()
        };
        let rows = runners.iter().map(|runner| match runner {
            Ok(runner) => {
                let speed = Speed {
                    peak_mib: runner.peak_mib,
                    before_mib: runner.ready.and_then(|ready| ready.before_mib),
                    ..row(&runner.implementation)
                };
                let speed = speed.measured(&runner.speeds, (!runner.is_ours()).then_some(ours));
                with_traffic(speed, runner.ready.and_then(|ready| ready.traffic))
            }
            Err((implementation, problem)) => Speed { problem: Some(problem.clone()), ..row(implementation) },
        });
        rows.collect()
    }
}

impl Runner {
    fn is_ours(&self) -> bool {
        self.implementation.id == OURS
    }

    fn set_up(&mut self, case: &Case, layers: Option<&Layers>) -> Result<Ready> {
        let ready: Ready = self.worker.ask(&Setup { case, layers, settings: SETTINGS })?;
        self.ready = Some(ready);
        Ok(ready)
    }

    fn turn(&mut self, batch: usize) -> Result<()> {
        let Ran { seconds, peak_mib } = self.worker.ask(&Run { run: self.steps })?;
        self.speeds.push((self.steps * batch) as f64 / seconds);
        self.peak_mib = peak_mib;
        Ok(())
    }
}

/// Adds the memory traffic of a step, and its bandwidth as a share of the copy's.
fn with_traffic(speed: Speed, traffic: Option<Traffic>) -> Speed {
    let Some((traffic, images_per_second)) = traffic.zip(speed.images_per_second) else { return speed };
    let bytes_per_second = traffic.step_bytes * images_per_second / speed.batch as f64;
    Speed {
        step_mib: Some(traffic.step_bytes / f64::from(1 << 20)),
        share_of_copy_percent: Some(100.0 * bytes_per_second / traffic.copy_bytes_per_second),
        ..speed
    }
}

/// Calls `act` for each implementation that still runs. If one of PyTorch's fails, the reason
/// replaces it.
fn each(runners: &mut [Slot], mut act: impl FnMut(&mut Runner) -> Result<()>) -> Result<()> {
    for slot in runners {
        let Ok(runner) = slot else { continue };
        if let Err(error) = act(runner) {
            if runner.is_ours() {
                return Err(error.context("our own worker failed"));
            }
            *slot = Err((runner.implementation, format!("{error:#}")));
        }
    }
    Ok(())
}

/// Formats the speeds of a case as one line.
fn summary(rows: &[Speed]) -> String {
    let one = |row: &Speed| {
        let label = report::bench::label(&row.implementation);
        match row.images_per_second {
            Some(speed) => {
                let ratio = row.ratio_of_ours.map(|ratio| format!(" (×{ratio:.2})")).unwrap_or_default();
                format!("{label} {speed:.0}/s{ratio}")
            }
            None => format!("{label} did not run: {}", row.problem.as_deref().unwrap_or("unknown")),
        }
    };
    rows.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_do_not_say_where_things_lie() {
        let check = |words: &[&str], expected: &str| {
            let found = command_line(words.iter().map(|word| word.to_string()));
            let program = if cfg!(feature = "cuda") { ON_GPU } else { "just bench-pytorch" };
            assert_eq!(found, format!("{program}{expected}"));
        };
        check(&[], "");
        check(&["--python", "a/b", "--rounds", "3", "--out=c"], " --rounds 3");
        check(&["--python=a/b", "--only", "train"], " --only train");
        check(&["--device", "cuda", "--out", "c"], " --device cuda");
    }

    #[test]
    fn shares_are_of_the_copy() {
        // 64 images take 32 ms and move 1 GiB; a copy moves 64 GiB per second.
        let gib = f64::from(1 << 30);
        let speed = Speed { batch: 64, ..Speed::default() }.measured(&[2000.0], None);
        let traffic = Traffic { step_bytes: gib, copy_bytes_per_second: 64.0 * gib };
        let speed = with_traffic(speed, Some(traffic));
        assert_eq!(speed.step_mib, Some(1024.0));
        assert!((speed.share_of_copy_percent.unwrap() - 48.828125).abs() < 1e-9, "{speed:?}");
        assert_eq!(with_traffic(Speed::default(), None), Speed::default());
    }

    #[test]
    fn flags_are_declared_well() {
        use clap::CommandFactory;
        Flags::command().debug_assert();
    }
}
