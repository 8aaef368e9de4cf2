//! Tests of the operations on the CPU with `bf16` maps against the same operations with `f32` maps.
//! Results that are stored in `bf16` differ by half a unit in the last place, and other results by
//! the order of their sums.

#[allow(dead_code, unused_macros, unused_imports)]
mod twin;

use candle_core::Tensor;
use twin::Other;

struct Here;

impl Other for Here {
    fn to(&self, tensor: &Tensor) -> Tensor {
        tensor.copy().unwrap()
    }

    fn run(&self, operation: &dyn Fn() -> Vec<Tensor>) -> Vec<Tensor> {
        operation()
    }

    fn is_the_cpu(&self) -> bool {
        true
    }
}

macro_rules! in_halves {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                twin::$name(&Here);
            }
        )*
    };
}

twin::of_maps!(in_halves);
