//! Times the operations at the shapes of MobileNetV2 on 32×32 images, batch 64, beside a simple bound:
//! GB/s of the memory that an operation must read and write, or GFLOP/s of a product.
//!
//! `cargo bench -p kernels -- [part of an operation's name]`. Each number is the best of many runs, so
//! it says what the machine can do, not what it does under load. Large tensors are fresh allocations;
//! `MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296` makes glibc keep their pages, as
//! a training program's allocator should.

use candle_core::{Device, Tensor};
use kernels::{
    Activation, FeatureMap, Quantizer, depthwise, im2col, loss, norm, pointwise, pool, quantize, residual,
    sgd,
};
use quant_core::Bits;
use std::time::{Duration, Instant};

const BATCH: usize = 64;

/// What bounds an operation: the floats it moves, or the multiplications and additions it makes.
enum Work {
    Floats(usize),
    Flops(usize),
}

fn measure<T>(name: &str, filter: Option<&str>, work: Work, operation: impl Fn() -> kernels::Result<T>) {
    if filter.is_some_and(|filter| !name.contains(filter)) {
        return;
    }
    let (start, mut best, mut runs) = (Instant::now(), Duration::MAX, 0);
    while runs < 5 || start.elapsed() < Duration::from_millis(300) {
        let start = Instant::now();
        std::hint::black_box(operation().expect("shapes that agree"));
        best = best.min(start.elapsed());
        runs += 1;
    }
    let seconds = best.as_secs_f64();
    let rate = match work {
        Work::Floats(floats) => format!("{:7.1} GB/s", floats as f64 * 4e-9 / seconds),
        Work::Flops(flops) => format!("{:7.1} GFLOP/s", flops as f64 * 1e-9 / seconds),
    };
    println!("{name:52} {:9.1} µs {rate}", seconds * 1e6);
}

fn random(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &Device::Cpu).expect("a tensor")
}

fn main() {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let filter = filter.as_deref();

    // (size of the input, channels, stride)
    for (size, c, stride) in [
        (32, 32, 1),
        (32, 96, 1),
        (32, 96, 2),
        (32, 144, 2),
        (16, 144, 1),
        (16, 192, 2),
        (8, 384, 1),
        (8, 576, 2),
        (4, 960, 1),
        (8, 357, 1),
        (16, 13, 1),
    ] {
        let (x, w) = (random(&[BATCH, size, size, c]), random(&[3, 3, c]));
        let y = depthwise::forward(&x, &w, stride).expect("a map");
        let floats = x.elem_count() + y.elem_count();
        let at = format!("{c}@{size}×{size} s{stride}");
        let name = |op: &str| format!("depthwise::{op} {at}");
        measure(&name("forward"), filter, Work::Floats(floats), || depthwise::forward(&x, &w, stride));
        measure(&name("grad_input"), filter, Work::Floats(floats), || {
            depthwise::grad_input(&y, &w, stride, (size, size))
        });
        measure(&name("grad_weight"), filter, Work::Floats(floats), || {
            depthwise::grad_weight(&x, &y, stride)
        });
    }

    let range = Tensor::new(&[0f32, 6.0], &Device::Cpu).expect("a range");
    let quant = Quantizer { range: &range, bits: Bits::new(4).expect("a width") };
    for (size, c) in [(32, 96), (32, 13), (16, 144), (8, 384), (4, 1280)] {
        let (z, gy) = (random(&[BATCH, size, size, c]), random(&[BATCH, size, size, c]));
        let (gamma, beta) = (random(&[c]), random(&[c]));
        let stats = norm::channel_stats(&z).expect("statistics");
        let of_batch = norm::Normalization::new(&stats, &gamma, &beta, 1e-5).expect("a normalization");
        let (scale, shift) = (&of_batch.scale, &of_batch.shift);
        let (n, act) = (z.elem_count(), Activation::Relu6);
        let at = format!("{c}@{size}×{size}");
        measure(&format!("norm::channel_stats {at}"), filter, Work::Floats(n), || norm::channel_stats(&z));
        for quant in [None, Some(quant)] {
            let at = format!("{at}{}", quant.map_or("", |_| " quantized"));
            measure(&format!("norm::forward {at}"), filter, Work::Floats(2 * n), || {
                norm::forward(&z, scale, shift, act, quant)
            });
            measure(&format!("norm::backward_batch {at}"), filter, Work::Floats(5 * n), || {
                norm::backward_batch(&z, &gy, &of_batch, act, quant)?.z.tensor()
            });
            measure(&format!("norm::backward_affine {at}"), filter, Work::Floats(3 * n), || {
                norm::backward_affine(&z, &gy, scale, shift, act, quant)?.0.tensor()
            });
        }
    }

    for (size, inputs, outputs) in [
        (32, 16, 96),
        (32, 27, 32),
        (16, 24, 144),
        (16, 144, 24),
        (8, 64, 384),
        (8, 384, 64),
        (4, 160, 960),
        (4, 960, 320),
        (4, 320, 1280),
    ] {
        let (x, w) = (random(&[BATCH, size, size, inputs]), random(&[inputs, outputs]));
        let gy = random(&[BATCH, size, size, outputs]);
        let flops = 2 * x.elem_count() * outputs;
        let name = |op: &str| format!("pointwise::{op} {inputs}→{outputs}@{size}×{size}");
        measure(&name("forward"), filter, Work::Flops(flops), || pointwise::forward(&x, &w));
        let levels = FeatureMap::quantize(&x, Some(quant)).expect("levels");
        let weight = pointwise::Weight { value: &w, quantized: Some((&w, quant)) };
        measure(&name("forward of levels"), filter, Work::Flops(flops), || {
            pointwise::forward(&levels, weight)
        });
        measure(&name("grad_input"), filter, Work::Flops(flops), || pointwise::grad_input(&gy, &w));
        measure(&name("grad_weight"), filter, Work::Flops(flops), || pointwise::grad_weight(&x, &gy));
    }

    let (a, b) = (random(&[BATCH, 32, 32, 24]), random(&[BATCH, 32, 32, 24]));
    let n = a.elem_count();
    measure("quantize::forward", filter, Work::Floats(2 * n), || quantize::forward(&a, quant));
    measure("quantize::backward", filter, Work::Floats(3 * n), || quantize::backward(&a, &b, quant));
    measure("quantize::min_max", filter, Work::Floats(n), || quantize::min_max(&a));
    measure("residual::add_quantize", filter, Work::Floats(3 * n), || {
        residual::add_quantize(&a, &b, Some(quant))
    });
    let (scale, shift) = (random(&[24]), random(&[24]));
    measure("residual::add_normalized", filter, Work::Floats(3 * n), || {
        residual::add_normalized(&a, &scale, &shift, &b)
    });

    let images = random(&[BATCH, 32, 32, 3]);
    measure("im2col::forward", filter, Work::Floats(images.elem_count() * 10), || {
        im2col::forward(&images, 3, 1, 1)
    });
    let (x, gy) = (random(&[BATCH, 4, 4, 1280]), random(&[BATCH, 1280]));
    measure("pool::global_average", filter, Work::Floats(x.elem_count()), || pool::global_average(&x));
    measure("pool::backward", filter, Work::Floats(x.elem_count()), || pool::backward(&gy, 4, 4));
    let (logits, labels) =
        (random(&[BATCH, 100]), Tensor::zeros(BATCH, candle_core::DType::U32, &Device::Cpu));
    let labels = labels.expect("labels");
    measure("loss::softmax_cross_entropy", filter, Work::Floats(2 * logits.elem_count()), || {
        loss::softmax_cross_entropy(&logits, &labels, 0.1)
    });
    let (p, g, v) = (random(&[1_000_000]), random(&[1_000_000]), random(&[1_000_000]));
    measure("sgd::step of 1 M parameters", filter, Work::Floats(7_000_000), || {
        sgd::step(&p, &g, &v, 1e-3, 0.9, 1e-4)
    });
}
