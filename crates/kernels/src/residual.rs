//! The end of a residual branch: the sum of both inputs, quantized.
//!
//! `y = Q(a + b)`. The gradient of the sum, `g = ∂y` where the quantizer does not clamp `a + b` and 0
//! elsewhere, is that of either input. Neither the sum nor a mask is kept: the backward pass adds again.

use crate::cpu::{self, CHUNK, Check, simd};
use crate::{Quantizer, Result};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use quant_core::Grid;

/// `Q(a + b)`, or the sum itself without a quantizer.
pub fn add_quantize(a: &Tensor, b: &Tensor, quant: Option<Quantizer<'_>>) -> Result<Tensor> {
    let check = Check("residual::add_quantize");
    check.quantizer(quant)?;
    let b = check.dims("b", b, a.dims())?;
    Ok(check.float("a", a)?.apply_op2_no_bwd(&b, &Forward(quant))?)
}

/// The gradient of the sum, which is the gradient of `a` and that of `b`.
pub fn backward(a: &Tensor, b: &Tensor, gy: &Tensor, quant: Option<Quantizer<'_>>) -> Result<Tensor> {
    let check = Check("residual::backward");
    check.quantizer(quant)?;
    let (b, gy) = (check.dims("b", b, a.dims())?, check.dims("gy", gy, a.dims())?);
    match quant {
        None => Ok(gy),
        Some(quant) => Ok(check.float("a", a)?.apply_op3_no_bwd(&b, &gy, &Backward(quant))?),
    }
}

struct Forward<'a>(Option<Quantizer<'a>>);

simd! {
    fn add(a: &[f32], b: &[f32], y: &mut [f32], grid: Option<Grid>) {
        let terms = y.iter_mut().zip(a).zip(b);
        match grid {
            None => terms.for_each(|((y, a), b)| *y = a + b),
            Some(grid) => terms.for_each(|((y, a), b)| *y = grid.fake(a + b)),
        }
    }
}

impl CustomOp2 for Forward<'_> {
    fn name(&self) -> &'static str {
        "residual-add-quantize"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (a, b) = (cpu::slice(a, layout)?, cpu::slice(b, b_layout)?);
        let grid = self.0.map(cpu::grid).transpose()?;
        let y = cpu::fill(a.len(), CHUNK, |i, y| {
            let (start, len) = (i * CHUNK, y.len());
            add(&a[start..][..len], &b[start..][..len], y, grid);
        });
        cpu::output(y, layout.shape())
    }
}

struct Backward<'a>(Quantizer<'a>);

simd! {
    fn mask(a: &[f32], b: &[f32], gy: &[f32], g: &mut [f32], grid: &Grid) {
        let grid = *grid;
        for (((g, gy), a), b) in g.iter_mut().zip(gy).zip(a).zip(b) {
            *g = if grid.passes(a + b) { *gy } else { 0.0 };
        }
    }
}

impl CustomOp3 for Backward<'_> {
    fn name(&self) -> &'static str {
        "residual-backward"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
        gy: &CpuStorage,
        gy_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (a, b, gy) = (cpu::slice(a, layout)?, cpu::slice(b, b_layout)?, cpu::slice(gy, gy_layout)?);
        let grid = cpu::grid(self.0)?;
        let g = cpu::fill(a.len(), CHUNK, |i, g| {
            let (start, len) = (i * CHUNK, g.len());
            mask(&a[start..][..len], &b[start..][..len], &gy[start..][..len], g, &grid);
        });
        cpu::output(g, layout.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize;
    use crate::testing::*;
    use quant_core::Bits;

    #[test]
    fn is_the_sum_then_the_quantizer() {
        for dims in [&[1, 1, 1, 3][..], &[2, 5, 3, 7], &LARGE[0]] {
            let (a, b, gy) = (random(1, dims), random(2, dims), random(3, dims));
            let sum = (&a + &b).unwrap();
            let range = tensor(&[-0.7, 1.1]);
            let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
            let expected = quantize::forward(&sum, quant).unwrap();
            assert_eq!(elements(&add_quantize(&a, &b, Some(quant)).unwrap()), elements(&expected));
            let expected = quantize::backward(&sum, &gy, quant).unwrap();
            assert_eq!(elements(&backward(&a, &b, &gy, Some(quant)).unwrap()), elements(&expected));
            assert_eq!(elements(&add_quantize(&a, &b, None).unwrap()), elements(&sum));
            assert_eq!(elements(&backward(&a, &b, &gy, None).unwrap()), elements(&gy));
        }
        assert!(add_quantize(&random(1, &[2, 3]), &random(2, &[3, 2]), None).is_err());
    }

    #[test]
    fn a_tensor_can_be_added_to_itself() {
        let a = random(1, &[40]);
        assert_eq!(elements(&add_quantize(&a, &a, None).unwrap()), elements(&(&a * 2.0).unwrap()));
    }

    #[test]
    fn same_bits_everywhere() {
        let (a, b, gy) = (random(1, &[300_001]), random(2, &[300_001]), random(3, &[300_001]));
        let range = tensor(&[-0.7, 1.1]);
        let quant = Some(Quantizer { range: &range, bits: Bits::new(5).unwrap() });
        assert_same_everywhere(|| {
            vec![add_quantize(&a, &b, quant).unwrap(), backward(&a, &b, &gy, quant).unwrap()]
        });
    }
}
