//! Tests of the CUDA kernels, emulated on the CPU, against the operations' CPU twins. Each kernel
//! runs with the threads of a block in forward and in reverse order, and both must give the same
//! bits.

mod twin;

use candle_core::{DType, Tensor};
use kernels::gpu::emulation::{self, Order};
use twin::Other;

struct Emulation;

impl Other for Emulation {
    fn to(&self, tensor: &Tensor) -> Tensor {
        tensor.copy().unwrap()
    }

    fn run(&self, operation: &dyn Fn() -> Vec<Tensor>) -> Vec<Tensor> {
        let [found, reverse] = [Order::Forward, Order::Reverse].map(|order| emulation::run(order, operation));
        for (found, reverse) in found.iter().zip(&reverse) {
            let bits = |tensor: &Tensor| -> Vec<u64> {
                let wide = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
                wide.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
            };
            assert!(
                bits(found) == bits(reverse),
                "the order of the threads changes the result: a barrier lacks"
            );
        }
        found
    }
}

macro_rules! emulated {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                match emulation::available() {
                    Ok(()) => twin::$name(&Emulation),
                    Err(message) => eprintln!("skipped: {message}"),
                }
            }
        )*
    };
}

twin::all!(emulated);
