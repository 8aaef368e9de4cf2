use crate::{Error, Network, Result};
use candle_core::{Tensor, TensorId};
use std::collections::HashMap;

/// The kind of a parameter, which determines its weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Convolution or classifier weights.
    Weight,
    /// γ, β or a bias, which decays if the settings say so.
    NormOrBias,
    /// The bound α of PACT, which decays like weights. This is a part of the method.
    Clip,
    /// A parameter that determines a quantizer's levels, such as DSQ's bounds and softness. It
    /// never decays.
    Interval,
}

impl Role {
    /// Returns whether weight decay applies to the parameter. `decay_norm` is the setting for γ, β
    /// and biases.
    pub fn decays(self, decay_norm: bool) -> bool {
        match self {
            Self::Weight | Self::Clip => true,
            Self::NormOrBias => decay_norm,
            Self::Interval => false,
        }
    }
}

/// A learned tensor. It shares its storage with the network's own tensor, so that an optimizer can
/// update it in place.
pub struct Parameter {
    /// `unit.weight`, `unit.gamma`, …. The names of a network's parameters are unique.
    pub name: String,
    /// The tensor itself.
    pub tensor: Tensor,
    /// The kind of the parameter.
    pub role: Role,
}

/// The gradients of the mean loss, one for each parameter of a network, with the parameter's shape.
///
/// A gradient is stored under the tensor that it belongs to, so that it can't be confused with that
/// of another parameter.
#[derive(Debug, Default)]
pub struct Gradients(HashMap<TensorId, Vec<Tensor>>);

impl Gradients {
    /// Stores the gradient of a parameter's tensor.
    pub(crate) fn set(&mut self, parameter: &Tensor, gradient: Tensor) {
        self.0.entry(parameter.id()).or_default().push(gradient);
    }

    /// Checks that every parameter of `network` has one gradient of its shape, and that there are
    /// no other gradients.
    pub(crate) fn check(self, network: &Network) -> Result<Self> {
        let parameters = network.parameters();
        for parameter in &parameters {
            self.of(parameter)?;
        }
        let (found, expected) = (self.0.len(), parameters.len());
        if found != expected {
            let problem = format!("there are gradients of {found} tensors for {expected} parameters");
            return Err(network.structure_error("backward pass", problem));
        }
        Ok(self)
    }

    /// Returns the gradient of a parameter.
    ///
    /// # Errors
    /// If the backward pass was that of another network.
    pub fn of(&self, parameter: &Parameter) -> Result<&Tensor> {
        let fail = |problem| Err(Error::Gradient { parameter: parameter.name.clone(), problem });
        match self.0.get(&parameter.tensor.id()).map_or(&[][..], Vec::as_slice) {
            [gradient] if gradient.dims() == parameter.tensor.dims() => Ok(gradient),
            [gradient] => {
                let (found, expected) = (gradient.dims(), parameter.tensor.dims());
                fail(format!("its gradient has shape {found:?}, expected {expected:?}"))
            }
            all => fail(format!("it has {} gradients, expected one", all.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Input, MobileNet, Version};
    use candle_core::Device;

    fn network() -> Network {
        let config = MobileNet { width: 0.1, ..MobileNet::new(Version::V1, Input::Cifar, 3) };
        config.init(1, &Device::Cpu).unwrap()
    }

    #[track_caller]
    fn check(spoil: impl FnOnce(&mut Gradients, &[Parameter]), message: &[&str]) {
        let network = network();
        let parameters = network.parameters();
        let mut gradients = Gradients::default();
        for parameter in &parameters {
            gradients.set(&parameter.tensor, parameter.tensor.zeros_like().unwrap());
        }
        spoil(&mut gradients, &parameters);
        match (gradients.check(&network), message) {
            (Ok(gradients), []) => assert_eq!(gradients.0.len(), parameters.len()),
            (Ok(_), _) => panic!("no error, expected {message:?}"),
            (Err(error), _) => {
                let found = error.to_string();
                assert!(!message.is_empty() && message.iter().all(|part| found.contains(part)), "{found}");
            }
        }
    }

    #[test]
    fn every_parameter_has_one_gradient_of_its_shape() {
        check(|_, _| (), &[]);
        let fourth = |all: &[Parameter]| all[3].tensor.clone();
        check(
            |gradients, all| drop(gradients.0.remove(&fourth(all).id())),
            &["blocks.0.depthwise.weight", "0 gradients"],
        );
        check(
            |gradients, all| gradients.set(&fourth(all), fourth(all).zeros_like().unwrap()),
            &["blocks.0.depthwise.weight", "2 gradients"],
        );
        check(
            |gradients, all| {
                gradients.0.insert(fourth(all).id(), vec![fourth(all).flatten_all().unwrap()]);
            },
            &["blocks.0.depthwise.weight", "[72]", "[3, 3, 8]"],
        );
        let foreign = Tensor::zeros(2, candle_core::DType::F32, &Device::Cpu).unwrap();
        check(|gradients, _| gradients.set(&foreign, foreign.clone()), &["gradients of 84 tensors for 83"]);
    }
}
