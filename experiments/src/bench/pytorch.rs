//! PyTorch's side of the benchmark: its modes, and a Python that has it.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The worker's program, and what it needs.
const WORKER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/pytorch_worker.py");
const REQUIREMENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/requirements.txt");

/// The worker's flags for one of [`report::bench::IMPLEMENTATIONS`]; `None` if it is not PyTorch.
pub(super) fn flags(implementation: &str) -> Option<&'static [&'static str]> {
    match implementation {
        "pytorch_eager" => Some(&[]),
        "pytorch_channels_last" => Some(&["--channels-last"]),
        // In NCHW: inductor chooses the layouts within the graph, and was not faster from channels_last.
        "pytorch_compile" => Some(&["--compile"]),
        _ => None,
    }
}

/// The command that starts a worker in a mode.
pub(super) fn worker(python: &Path, flags: &[&str], threads: usize) -> Result<Command> {
    let mut command = Command::new(python);
    command.arg(WORKER).args(flags).args(["--threads", &threads.to_string()]);
    command.env("OMP_NUM_THREADS", threads.to_string());
    // What is compiled is kept for the next run.
    command.env("TORCHINDUCTOR_CACHE_DIR", target()?.join("bench-inductor"));
    // What `process::run` sets for ours: an allocator that keeps its pages. It makes PyTorch faster too.
    command.env("MALLOC_MMAP_MAX_", "0");
    command.env("MALLOC_TRIM_THRESHOLD_", i32::MAX.to_string());
    command.env("MALLOC_TOP_PAD_", (64 << 20).to_string());
    Ok(command)
}

/// A Python with PyTorch: of the environment that this makes in the target folder, if it is not there yet.
pub(super) fn environment() -> Result<PathBuf> {
    let folder = target()?.join("bench-venv");
    let (python, marker) = (folder.join("bin/python"), folder.join("requirements.txt"));
    let wanted = std::fs::read_to_string(REQUIREMENTS)
        .with_context(|| format!("{REQUIREMENTS} could not be read; run it where it was built"))?;
    if std::fs::read_to_string(&marker).is_ok_and(|found| found == wanted) {
        return Ok(python);
    }
    println!("Installing PyTorch in {} (once)", folder.display());
    run(
        Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder),
        "Python 3.10 or later with venv is needed (Debian: apt install python3-venv python3-dev)",
    )?;
    run(
        Command::new(&python).args(["-m", "pip", "install", "--retries", "2", "-r", REQUIREMENTS]),
        "PyTorch could not be installed; it needs a connection to PyPI, better also to the index of PyTorch",
    )?;
    // Written last: an environment without it is made anew.
    std::fs::write(&marker, wanted)?;
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

/// Cargo's target folder: this program lies in target/PROFILE.
pub(super) fn target() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent);
    Ok(target.with_context(|| format!("{} lies in no target folder", program.display()))?.into())
}
