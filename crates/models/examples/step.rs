use candle_core::{Device, Tensor};
use models::*;
use std::time::Instant;
fn main() {
    for (v, width, batch) in [(Version::V2, 0.25, 64), (Version::V1, 0.25, 64), (Version::V2, 1.0, 64)] {
        let d = Device::Cpu;
        let mut n = MobileNet { width, ..MobileNet::new(v, Input::Cifar, 100) }.init(0, &d).unwrap();
        let x = Tensor::randn(0f32, 1.0, (batch, 32, 32, 3), &d).unwrap();
        let y = Tensor::zeros(batch, candle_core::DType::U32, &d).unwrap();
        let mut best = f64::MAX;
        let mut best_f = f64::MAX;
        for _ in 0..6 {
            let t = Instant::now();
            let (l, tape) = n.forward_train(&x, Step { range_momentum: 0.01 }).unwrap();
            best_f = best_f.min(t.elapsed().as_secs_f64());
            let r = kernels::loss::softmax_cross_entropy(&l, &y, 0.0).unwrap();
            let g = n.backward(tape, &r.grad).unwrap();
            for (p, g) in n.parameters().iter().zip(&g) {
                let v = p.tensor.zeros_like().unwrap();
                kernels::sgd::step(&p.tensor, g, &v, 0.1, 0.9, 1e-4).unwrap();
            }
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!("{v:?} {width} batch {batch} macs {}: step {:.1} ms (fwd {:.1}) {:.0} img/s", n.macs(), best * 1e3, best_f * 1e3, batch as f64 / best);
    }
}
