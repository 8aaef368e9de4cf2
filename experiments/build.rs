//! Tells the binaries which commit and which GPU architecture they were built for.

use std::process::Command;

fn main() {
    for path in ["../.git/logs/HEAD", "../Cargo.lock", "../crates", "../experiments"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // The message that a GPU can't run the kernels shows this.
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    let capability = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "of the GPU there".into());
    println!("cargo::rustc-env=PFQ_COMPUTE_CAP={capability}");
    let commit = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok());
    println!("cargo::rustc-env=PFQ_COMMIT={}", commit.as_deref().map_or("unknown", str::trim));
}
