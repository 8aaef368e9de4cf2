//! Where a run takes place.

use anyhow::{Result, bail};
use candle_core::Device;

/// The device that `--device` asks for, and its name for the records.
pub fn open(wanted: &str) -> Result<(Device, String)> {
    match wanted {
        "auto" | "cpu" => Ok((Device::Cpu, processor())),
        cuda if cuda == "cuda" || cuda.starts_with("cuda:") => {
            bail!("--device {cuda}: this version trains on the CPU only; use --device cpu")
        }
        other => bail!("--device {other} is unknown: expected auto, cpu, cuda or cuda:N"),
    }
}

/// The processor's name and the number of threads, as far as the system tells.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("cpu ({name}, {threads} threads)")
}
