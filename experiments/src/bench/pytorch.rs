//! PyTorch's side of the benchmark: its modes, and a Python environment with PyTorch.

use crate::output;
use anyhow::{Context, Result, bail};
use report::bench::Place;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The worker's program and its requirements, embedded because the binary may run without the
/// sources.
const WORKER: &str = include_str!("../../bench/pytorch_worker.py");
const REQUIREMENTS: &str = include_str!("../../bench/requirements.txt");
const REQUIREMENTS_GPU: &str = include_str!("../../bench/requirements-cuda.txt");

/// Returns the worker's flags for one of [`report::bench::IMPLEMENTATIONS`]; `None` if it is not
/// PyTorch.
pub(super) fn flags(implementation: &str, place: Place) -> Option<&'static [&'static str]> {
    Some(match (implementation, place) {
        ("pytorch_eager", _) => &[],
        ("pytorch_channels_last", Place::Cpu) => &["--channels-last"],
        ("pytorch_channels_last", Place::Gpu) => &["--channels-last", "--autocast"],
        // In NCHW: inductor chooses the layouts within the graph, and was not faster from
        // channels_last.
        ("pytorch_compile", Place::Cpu) => &["--compile"],
        ("pytorch_compile", Place::Gpu) => &["--compile", "--channels-last", "--autocast"],
        _ => return None,
    })
}

/// Returns the command that starts a worker in a mode; writes the worker's program to the folder
/// `place`.
pub(super) fn worker(
    python: &Path,
    place: &Path,
    flags: &[&str],
    device: &str,
    threads: usize,
) -> Result<Command> {
    let program = place.join("pytorch_worker.py");
    whole_file::write(&program, WORKER)
        .with_context(|| format!("{} could not be written", program.display()))?;
    let mut command = Command::new(python);
    command.arg(program).args(flags).args(["--device", device, "--threads", &threads.to_string()]);
    command.env("OMP_NUM_THREADS", threads.to_string());
    // Compiled code is kept for the next run.
    command.env("TORCHINDUCTOR_CACHE_DIR", target()?.join("bench-inductor"));
    // The same as `process::run` sets for ours: an allocator that keeps its pages. PyTorch is
    // faster with it too.
    command.env("MALLOC_MMAP_MAX_", "0");
    command.env("MALLOC_TRIM_THRESHOLD_", i32::MAX.to_string());
    command.env("MALLOC_TOP_PAD_", (64 << 20).to_string());
    Ok(command)
}

/// Returns a Python with PyTorch. Creates an environment for it in the target folder if there is
/// none.
pub(super) fn environment(place: Place) -> Result<PathBuf> {
    let (name, wanted) = match place {
        Place::Cpu => ("bench-venv", REQUIREMENTS),
        Place::Gpu => ("bench-venv-cuda", REQUIREMENTS_GPU),
    };
    let folder = target()?.join(name);
    let (python, marker) = (folder.join("bin/python"), folder.join("requirements.txt"));
    if std::fs::read_to_string(&marker).is_ok_and(|found| found == wanted) {
        return Ok(python);
    }
    output::print(&format!("Installing PyTorch in {} (once)", folder.display()));
    run(
        Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder),
        "Python 3.10 or later with venv is needed (Debian: apt install python3-venv python3-dev)",
    )?;
    let asked = folder.join("asked.txt");
    std::fs::write(&asked, wanted)?;
    run(
        Command::new(&python).args(["-m", "pip", "install", "--retries", "2", "-r"]).arg(&asked),
        "PyTorch could not be installed; it needs a connection to PyPI, preferably also to PyTorch's index",
    )?;
    // The marker is renamed last, so that an incomplete environment is made again.
    std::fs::rename(&asked, &marker)?;
    Ok(python)
}

fn run(command: &mut Command, advice: &str) -> Result<()> {
    let advice = || format!("{advice}; or pass --python with an interpreter that has torch");
    let status = command.status().with_context(advice)?;
    if !status.success() {
        bail!("{} ended with {status}: {}", command.get_program().display(), advice());
    }
    Ok(())
}

/// Returns Cargo's target folder; this program is in target/PROFILE.
pub(super) fn target() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent);
    Ok(target.with_context(|| format!("{} is not in a target folder of Cargo", program.display()))?.into())
}
