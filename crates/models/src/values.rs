//! Checks of a network's numbers.

use crate::{Network, Result};

impl Network {
    /// Checks that every parameter, running statistic and range is finite, and that no running
    /// variance or cap is negative.
    ///
    /// The outputs need not show such a number, because quantizers map NaN to a level.
    ///
    /// # Errors
    /// An error that names the first tensor with such a number and, within it, the first filter:
    /// the index along the last dimension.
    pub fn check_values(&self) -> Result<()> {
        for (name, tensor) in self.tensors() {
            let least =
                if [".variance", ".cap"].iter().any(|end| name.ends_with(end)) { 0.0 } else { f32::MIN };
            let wrong = |value: &f32| !(value.is_finite() && *value >= least);
            let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
            if let Some(first) = values.iter().position(wrong) {
                let filter = first % tensor.dims().last().copied().unwrap_or(1);
                let problem = format!(
                    "is {} ({} such numbers of {}): expected a finite one{}",
                    values[first],
                    values.iter().filter(|value| wrong(value)).count(),
                    values.len(),
                    if least == 0.0 { " from 0" } else { "" }
                );
                return Err(self.structure_error(format!("{name} of filter {filter}"), problem));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::{Input, MobileNet, Norm, Version};
    use candle_core::{Device, Tensor};

    /// Checks a new network in which one element of the variance and one of the weight is changed,
    /// both of filter 5.
    #[track_caller]
    fn check(variance: f32, weight: f32, expected: Option<&str>) {
        let config = MobileNet { width: 0.1, ..MobileNet::new(Version::V1, Input::Cifar, 10) };
        let mut network = config.init(0, &Device::Cpu).unwrap();
        let unit = network.units_mut().find(|unit| unit.name == "blocks.1.depthwise").unwrap();
        let changed = |tensor: &Tensor, value: f32| {
            let mut values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            values[5] = value;
            Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap()
        };
        unit.weight = changed(&unit.weight, weight);
        let Norm::Batch(norm) = &mut unit.norm else { panic!("a new network is normalized") };
        norm.variance = changed(&norm.variance, variance);
        let found = network.check_values().map_err(|error| error.to_string());
        assert_eq!(found.err().as_deref(), expected);
    }

    #[test]
    fn what_cannot_be_computed_with_is_named() {
        check(0.0, -1e38, None);
        let of = |what: &str| format!("network mobilenet_v1, blocks.1.depthwise.{what}");
        check(
            -1e-9,
            0.0,
            Some(&of(
                "variance of filter 5: is -0.000000001 (1 such numbers of 8): expected a finite one from 0",
            )),
        );
        check(
            f32::INFINITY,
            0.0,
            Some(&of("variance of filter 5: is inf (1 such numbers of 8): expected a finite one from 0")),
        );
        check(
            1.0,
            f32::NAN,
            Some(&of("weight of filter 5: is NaN (1 such numbers of 72): expected a finite one")),
        );
    }
}
