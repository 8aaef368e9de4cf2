//! Sets `cfg(checked)` in builds of the dev profile, which tests use, and not in releases. With the
//! feature `cuda`, compiles the CUDA kernels to PTX.
//!
//! nvcc comes from `CUDA_HOME` or `CUDA_PATH`, else from `PATH`. The PTX is for the compute
//! capability in `CUDA_COMPUTE_CAP` (75 for 7.5, the default). A GPU of that or any later
//! capability runs it, and its driver compiles it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(checked)");
    if env::var("PROFILE").is_ok_and(|profile| profile == "debug") {
        println!("cargo::rustc-cfg=checked");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(problem) = compile() {
        // Prints the problem as an error instead of a panic with a backtrace.
        for line in problem.lines() {
            println!("cargo::error={line}");
        }
    }
}

/// Compiles every module, the file `NAME/NAME.cu`, or returns what is missing.
fn compile() -> Result<(), String> {
    let nvcc = nvcc()?;
    let capability = capability()?;
    let source = Path::new("src");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; run cargo")?);
    // lib.rs names every operation, so adding one reruns this script. An existing operation that
    // gets its first kernels later needs a clean build.
    println!("cargo::rerun-if-changed={}", source.join("lib.rs").display());
    for header in files(&source.join("gpu"))?.filter(|file| file.extension().is_some_and(|e| e == "cuh")) {
        println!("cargo::rerun-if-changed={}", header.display());
    }
    for folder in files(source)?.filter(|file| file.is_dir()) {
        let name = folder.file_name().ok_or("a folder has no name")?;
        let file = folder.join(name).with_extension("cu");
        if !file.is_file() {
            continue;
        }
        println!("cargo::rerun-if-changed={}", file.display());
        let output = Command::new(&nvcc)
            // These flags make Candle's many kernels compile fast; they are not meant for these few
            // kernels.
            .env_remove("NVCC_APPEND_FLAGS")
            // Every operation is rounded by itself, as on the CPU (common.cuh).
            .args(["--ptx", "--std=c++17", "-O3", "--fmad=false"])
            .arg(format!("--gpu-architecture=compute_{capability}"))
            .arg("--include-path")
            .arg(source.join("gpu"))
            .arg("--output-file")
            .arg(out.join(name).with_extension("ptx"))
            .arg(&file)
            .output()
            .map_err(|e| format!("{}: {e}", nvcc.display()))?;
        if !output.status.success() {
            let found = String::from_utf8_lossy(&output.stderr);
            return Err(format!(
                "{} does not compile for compute capability {capability}:\n{found}",
                file.display()
            ));
        }
    }
    Ok(())
}

/// Returns the paths in a folder.
fn files(folder: &Path) -> Result<impl Iterator<Item = PathBuf>, String> {
    let fail = |e| format!("{}: {e}", folder.display());
    Ok(folder.read_dir().map_err(fail)?.filter_map(|file| Some(file.ok()?.path())))
}

fn nvcc() -> Result<PathBuf, String> {
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
        .ok_or_else(|| {
            "the feature cuda needs nvcc, which is neither in CUDA_HOME nor in CUDA_PATH nor in PATH.\n\
             scripts/cuda-toolchain fetches NVIDIA's compiler and libraries and says what to set."
                .into()
        })
}

/// Returns `CUDA_COMPUTE_CAP` without its dot.
fn capability() -> Result<String, String> {
    let found = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "75".into());
    let digits: String = found.chars().filter(|c| *c != '.').collect();
    match digits.parse::<u32>() {
        Ok(75..) => Ok(digits),
        _ => Err(format!(
            "CUDA_COMPUTE_CAP is {found:?}, expected 75 (compute capability 7.5) or more, e.g. 90"
        )),
    }
}
