//! The device that a run uses, and its arithmetic.

use crate::output;
use crate::process::one_line;
use anyhow::{Context, Result, bail};
use candle_core::Device;
use clap::ValueEnum;

/// Opens the device that `--device` asks for; also returns its name for the records.
///
/// If a job has several processes on the node, `cuda` is a GPU of this process's own, otherwise the
/// first GPU. `auto` is the same GPU if it answers, and the CPU otherwise. If this program was
/// built for GPUs and none answers, `auto` says so on stderr. To find out whether a GPU answers,
/// this computes something on it, because the build says nothing about the machine.
///
/// # Errors
/// If the name is unknown, or the requested GPU does not answer.
pub fn open(wanted: &str) -> Result<(Device, String)> {
    match Wanted::parse(wanted)? {
        Wanted::Cpu => Ok(cpu()),
        Wanted::Auto if cfg!(feature = "cuda") => gpu(None).or_else(|problem| {
            output::tell(&format!("device: the CPU, because {}", one_line(&problem)));
            Ok(cpu())
        }),
        Wanted::Auto => Ok(cpu()),
        Wanted::Gpu(number) => gpu(number).with_context(|| format!("--device {wanted}")),
    }
}

/// Returns whether `--cuda-graphs` was given, for a device that has CUDA graphs.
///
/// # Errors
/// If the flag is given for a CPU.
pub fn allow_graphs(device: &Device, wanted: bool) -> Result<bool> {
    if wanted && device.is_cpu() {
        bail!("--cuda-graphs is for GPUs, but this runs on the CPU: leave it out, or use --device cuda");
    }
    Ok(wanted)
}

/// The arithmetic of `--arithmetic`, which replaces the one of a profile's trainings
/// ([`train::Arithmetic`]). Parameters and all statistics are float32 in each of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Arithmetic {
    /// Everything is in float32.
    #[default]
    F32,
    /// On a GPU, products round the significands of their operands to 10 bits, and tensor cores
    /// multiply them.
    Tf32,
    /// Feature maps and their gradients are stored in bfloat16, and products round their operands
    /// to it: half of the memory traffic.
    Bf16,
}

impl Arithmetic {
    /// Returns the flag's value for this arithmetic.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
    }

    /// Sets how products on `device`, named `name`, are computed. Returns the arithmetic in which
    /// feature maps are stored, and the device's name for the records.
    ///
    /// # Errors
    /// If TF32 is requested on a CPU.
    pub fn set(self, device: &Device, name: String) -> Result<(train::Arithmetic, String)> {
        if device.is_cpu() && self == Self::Tf32 {
            bail!("--arithmetic tf32 is for GPUs, but this runs on {name}: expected f32 or bf16");
        }
        Ok(match self {
            Self::F32 => (train::Arithmetic::F32, name),
            Self::Tf32 => {
                kernels::gpu::set_tf32(true);
                (train::Arithmetic::F32, name + ", TF32")
            }
            Self::Bf16 => (train::Arithmetic::Bf16, name + BFLOAT16),
        })
    }
}

/// The suffix of a device's name if feature maps are stored in bfloat16.
pub(crate) const BFLOAT16: &str = ", bfloat16";

/// A parsed value of `--device`.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Auto,
    Cpu,
    /// The GPU of that number, or the process's own.
    Gpu(Option<usize>),
}

impl Wanted {
    fn parse(text: &str) -> Result<Self> {
        let number = |text: &str| text.parse().ok().filter(|number| *number < 1024);
        Ok(match (text, text.strip_prefix("cuda:").and_then(number)) {
            ("auto", _) => Self::Auto,
            ("cpu", _) => Self::Cpu,
            ("cuda", _) => Self::Gpu(None),
            (_, number @ Some(_)) => Self::Gpu(number),
            _ => bail!("--device {text} is unknown: expected auto, cpu, cuda or cuda:N with N from 0"),
        })
    }
}

fn cpu() -> (Device, String) {
    (Device::Cpu, processor())
}

/// Returns the processor's name and the number of threads, as far as the system tells.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("cpu ({name}, {threads} threads)")
}

/// Fails, because this program was built without CUDA.
#[cfg(not(feature = "cuda"))]
fn gpu(_number: Option<usize>) -> Result<(Device, String)> {
    bail!(
        "this program was built for the CPU only; build it with `just cuda-build` (docs/cuda.md), or use \
         --device cpu"
    )
}

/// Opens the GPU of that number, or this process's own, and checks that it can compute.
#[cfg(feature = "cuda")]
fn gpu(number: Option<usize>) -> Result<(Device, String)> {
    use candle_core::cuda::cudarc::driver::CudaContext;
    let count = CudaContext::device_count();
    let number = number.unwrap_or_else(|| own(count.as_ref().map_or(0, |count| *count as usize)));
    let found = match count {
        Ok(0) => bail!("the driver answers but has no GPU; see `nvidia-smi`, or use --device cpu"),
        Ok(count) if number < count as usize => CudaContext::new(number),
        Ok(count) => bail!("there is no GPU {number}: there are {count}, numbered from 0"),
        Err(problem) => Err(problem),
    };
    let context = found.map_err(|problem| {
        anyhow::anyhow!("{problem}").context(
            "no GPU answers: expected an NVIDIA driver of the 580 branch or later; see `nvidia-smi`, or use \
             --device cpu",
        )
    })?;
    let (major, minor) = context.compute_capability()?;
    let name = format!("cuda:{number} ({}, compute capability {major}.{minor})", context.name()?);
    kernels::memory::keep_gpu_memory(&context);
    let device = works(number).with_context(|| {
        format!(
            "{name} can't run this program's kernels, which were built for compute capability {}; build \
             the program for this GPU with `CUDA_COMPUTE_CAP={major}{minor} just cuda-build`, or use \
             --device cpu",
            env!("PFQ_COMPUTE_CAP")
        )
    })?;
    Ok((device, name))
}

/// Returns which of `count` GPUs is this process's own: it goes by the rank on this node that
/// mpirun or Slurm set.
#[cfg(feature = "cuda")]
fn own(count: usize) -> usize {
    let number = |name| std::env::var(name).ok()?.parse::<usize>().ok();
    let number = ["OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"].into_iter().find_map(number);
    number.unwrap_or(0) % count.max(1)
}

/// Opens the device and computes a sum, to check that it runs this program's kernels.
#[cfg(feature = "cuda")]
fn works(number: usize) -> Result<Device> {
    let device = Device::new_cuda(number)?;
    kernels::gpu::expect_one_stream(&device);
    let ones = candle_core::Tensor::ones(1000, candle_core::DType::F32, &device)?;
    let sum = (ones.affine(2.0, 1.0)?.sum_all()?).to_scalar::<f32>()?;
    if sum != 3000.0 {
        bail!("a test sum came out as {sum}: expected 3000");
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        let check = |text: &str, expected: Wanted| assert_eq!(Wanted::parse(text).unwrap(), expected);
        check("auto", Wanted::Auto);
        check("cpu", Wanted::Cpu);
        check("cuda", Wanted::Gpu(None));
        check("cuda:3", Wanted::Gpu(Some(3)));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda3", "cpu:0", "cuda:99999999999999999999"] {
            let error = Wanted::parse(text).unwrap_err().to_string();
            assert!(error.contains("auto, cpu, cuda or cuda:N"), "{error}");
        }
    }

    #[test]
    fn the_cpu_is_always_there() {
        let (device, name) = open("cpu").unwrap();
        assert!(device.is_cpu() && name.starts_with("cpu ("), "{name}");
        // This must work with and without a GPU.
        open("auto").unwrap();
    }

    #[test]
    fn a_cpu_has_no_tensor_cores() {
        let set = |arithmetic: Arithmetic| arithmetic.set(&Device::Cpu, "cpu".into());
        assert_eq!(set(Arithmetic::F32).unwrap(), (train::Arithmetic::F32, "cpu".into()));
        assert_eq!(set(Arithmetic::Bf16).unwrap(), (train::Arithmetic::Bf16, "cpu, bfloat16".into()));
        let error = set(Arithmetic::Tf32).unwrap_err().to_string();
        assert!(error.contains("for GPUs") && error.contains("expected f32 or bf16"), "{error}");
    }

    /// If a GPU is not available, the message says what to do about it.
    #[test]
    fn a_gpu_that_does_not_answer_is_a_clear_error() {
        match open("cuda:1000") {
            Ok((_, name)) => panic!("there is no such GPU: {name}"),
            Err(error) => {
                let error = format!("{error:#}");
                assert!(error.starts_with("--device cuda:1000: "), "{error}");
                assert!(error.contains("--device cpu") || error.contains("numbered from 0"), "{error}");
            }
        }
    }
}
