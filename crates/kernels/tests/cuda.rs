//! Tests of the operations on a GPU against their CPU twins. They are skipped, with a message, if
//! no GPU answers.
#![cfg(feature = "cuda")]

mod twin;

use candle_core::{Device, Tensor};
use twin::Other;

struct Cuda(Device);

impl Other for Cuda {
    fn to(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(&self.0).unwrap()
    }

    fn run(&self, operation: &dyn Fn() -> Vec<Tensor>) -> Vec<Tensor> {
        operation()
    }
}

macro_rules! on_a_gpu {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                match Device::new_cuda(0) {
                    Ok(device) => twin::$name(&Cuda(device)),
                    Err(error) => eprintln!("skipped: no GPU answers: {error}"),
                }
            }
        )*
    };
}

twin::all!(on_a_gpu);
