//! DSQ: soft steps with learned bounds and softness ([`kernels::dsq`]) for activations and weights.

use super::{Scheme, Schemes, Slopes, Slot};
use crate::{Lattice, Result, Role};
use candle_core::Tensor;
use kernels::{dsq, quantize};
use quant_core::Bits;
use serde_json::{Value, json};

pub(super) const SCHEMES: Schemes = Schemes {
    name: "dsq",
    title: "DSQ",
    unsigned: &Soft::Sums,
    signed: &Soft::Sums,
    weights: &[&Soft::Sums],
};

/// The schemes with scaled gradients of the bounds and the softness.
pub(super) const SCALED: Schemes = Schemes {
    unsigned: &Soft::Scaled { weights: false },
    signed: &Soft::Scaled { weights: false },
    weights: &[&Soft::Scaled { weights: true }],
    ..SCHEMES
};

/// The initial softness, as in the paper.
const FIRST_SOFTNESS: f64 = 0.2;

/// The form of the gradients of the bounds and the softness.
#[derive(Debug)]
enum Soft {
    /// The sums over all values, as derived.
    Sums,
    /// The sums divided by `√(N·(2^b − 1))`, where `N` is the number of weights, or of features of
    /// one image. LSQ does this with its step's gradient (Esser et al. 2020, section 2.2), so that
    /// the bounds move at the same relative pace as the tensor's values, whatever its size.
    Scaled { weights: bool },
}

impl Scheme for Soft {
    fn kind(&self) -> Value {
        match self {
            Self::Sums => "dsq".into(),
            Self::Scaled { .. } => json!({ "dsq": { "gradient_scale": true } }),
        }
    }

    fn tensors(&self) -> &'static [Slot] {
        &[
            Slot { name: "bounds", len: 2, role: Some(Role::Interval) },
            Slot { name: "softness", len: 1, role: Some(Role::Interval) },
        ]
    }

    /// Initializes the bounds to the extremes.
    fn start(&self, own: &[Tensor], x: &Tensor, _: Bits) -> Result<()> {
        own[0].slice_set(&quantize::min_max(x)?, 0, 0)?;
        Ok(own[1].slice_set(&(own[1].zeros_like()? + FIRST_SOFTNESS)?, 0, 0)?)
    }

    fn project(&self, own: &[Tensor]) -> Result<()> {
        Ok(dsq::project(&own[0], &own[1])?)
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(dsq::forward(x, &by[0], bits)?)
    }

    /// Returns the lattice. A value in the middle between two levels gets the upper one.
    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice> {
        let bounds = by[0].to_vec1::<f32>()?;
        let max_level = bits.max_level() as u8;
        let step = ((bounds[1] - bounds[0]) / f32::from(max_level)).max(f32::MIN_POSITIVE);
        Ok(Lattice { steps: vec![step], zero_points: vec![0], offset: bounds[0], max_level })
    }

    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], bits: Bits) -> Result<Slopes> {
        let dsq::Gradients { x: gx, bounds, softness } = dsq::backward(x, gy, &by[0], &by[1], bits)?;
        let items = match self {
            Self::Sums => return Ok(Slopes { x: gx, own: vec![bounds, softness] }),
            Self::Scaled { weights: true } => x.elem_count(),
            Self::Scaled { weights: false } => x.elem_count() / x.dims()[0],
        };
        let scale = 1.0 / (items as f64 * f64::from(bits.max_level())).sqrt();
        Ok(Slopes { x: gx, own: vec![(bounds * scale)?, (softness * scale)?] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Extras, Input, Method, MobileNet, Network, Quantization, Version};
    use candle_core::Device;
    use quant_core::Precision;

    /// Files record whether gradients are scaled, for activations and for weights.
    #[test]
    fn files_know_scaled_gradients() {
        let config = MobileNet { width: 0.01, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
        let mut network = config.init(0, &Device::Cpu).unwrap();
        let four = Precision::try_from(4).unwrap();
        let settings =
            Quantization { activations: four, weights: four, method: Method::Dsq, ..Quantization::default() };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        for gradient_scale in [false, true] {
            network.quantize(&Quantization { gradient_scale, ..settings }).unwrap();
            network.save(&path, &Extras::default()).unwrap();
            let (read, _) = Network::load(&path, &Device::Cpu).unwrap();
            let expected =
                if gradient_scale { json!({ "dsq": { "gradient_scale": true } }) } else { "dsq".into() };
            let of_dsq = |kind: &Value| !kind.is_null();
            let weights = read.units().filter_map(|unit| Some(unit.weight_quantizer.as_ref()?.kind()));
            let outputs = read.nodes.iter().filter_map(|node| Some(node.quantizer()?.kind()));
            let kinds: Vec<Value> = weights.chain(outputs).filter(of_dsq).collect();
            assert!(kinds.len() > 60 && kinds.iter().all(|kind| *kind == expected), "{kinds:?}");
        }
    }

    /// Five images of 2·2·5 features at 4 bits: the scale is 1/√(20·15), and for as many weights
    /// 1/√(100·15). The gradient of the tensor is not scaled.
    #[test]
    fn gradients_are_divided_by_the_root_of_features_and_levels() {
        let at = |i: usize, by: f32| (i as f32 * by).sin();
        let tensor = |by: f32| -> Tensor {
            Tensor::from_vec((0..100).map(|i| at(i, by)).collect::<Vec<_>>(), (5, 2, 2, 5), &Device::Cpu)
                .unwrap()
        };
        let (x, gy) = (tensor(0.37), tensor(0.61));
        let own = [&[-0.5f32, 0.75][..], &[0.2]].map(|values| Tensor::new(values, &Device::Cpu).unwrap());
        let bits = Bits::new(4).unwrap();
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let sums = Soft::Sums.backward(&x, &gy, &own, bits).unwrap();
        for (weights, scale) in [(false, 1.0 / 300f32.sqrt()), (true, 1.0 / 1500f32.sqrt())] {
            let scaled = Soft::Scaled { weights }.backward(&x, &gy, &own, bits).unwrap();
            assert_eq!(values(&scaled.x), values(&sums.x));
            for (scaled, sums) in scaled.own.iter().zip(&sums.own) {
                for (found, sum) in values(scaled).into_iter().zip(values(sums)) {
                    assert!(sum != 0.0 && (found / sum / scale - 1.0).abs() < 1e-6, "{found} of {sum}");
                }
            }
        }
    }
}
