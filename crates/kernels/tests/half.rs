//! The operations on the CPU with maps in `bf16`, beside themselves with maps of floats: what is stored differs by half a
//! last place of a half, and what is not, by the order of the sums.

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
