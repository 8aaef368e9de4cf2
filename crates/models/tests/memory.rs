//! The peak memory of a full-width training step. It is the only test of its binary, because the
//! peak is that of the process.

use candle_core::{DType, Device, Tensor};
use kernels::{loss::softmax_cross_entropy, sgd};
use models::{Input, MobileNet, Step, Version};

/// Returns the peak resident memory of this process in bytes, or `None` if the system does not
/// report it.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[test]
fn a_full_width_v2_step_at_batch_64_stays_below_4_gib() {
    let device = Device::Cpu;
    let mut network = MobileNet::new(Version::V2, Input::Cifar, 100).init(0, &device).unwrap();
    let images = Tensor::randn(0f32, 1.0, (64, 32, 32, 3), &device).unwrap();
    let labels = Tensor::zeros(64, DType::U32, &device).unwrap();
    let (logits, tape) = network.forward_train(&images, Step::alone(0.01)).unwrap();
    let result = softmax_cross_entropy(&logits, &labels, 0.0).unwrap();
    let gradients = network.backward(tape, &result.grad).unwrap();
    for parameter in &network.parameters() {
        let velocity = parameter.tensor.zeros_like().unwrap();
        let gradient = gradients.of(parameter).unwrap();
        sgd::step(&parameter.tensor, gradient, &velocity, 0.1, 0.9, 1e-4).unwrap();
    }
    match peak() {
        Some(peak) => {
            println!("peak: {:.2} GiB", peak as f64 / (1u64 << 30) as f64);
            assert!(peak < 4 << 30, "peak of {peak} bytes");
        }
        None => println!("skipped: this system has no /proc/self/status"),
    }
}
