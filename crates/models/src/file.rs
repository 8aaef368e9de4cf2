//! Networks as safetensors files: the tensors by name, the structure as JSON in the metadata, so
//! that a pruned or quantized network is read back from its file alone.

use crate::{
    ActivationQuantizer, BatchNorm, Error, Head, Kernel, Network, Norm, Residual, Result, Unit,
    WeightQuantizer,
};
use candle_core::{DType, Device, Tensor};
use kernels::Activation;
use quant_core::Bits;
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Metadata key that holds the [`Structure`].
pub(crate) const STRUCTURE: &str = "network";

/// Everything of a network that is not a tensor.
#[derive(Serialize, Deserialize)]
pub(crate) struct Structure {
    name: String,
    input: [usize; 3],
    epsilon: f64,
    input_quantizer: Option<QuantizerEntry>,
    units: Vec<UnitEntry>,
    residuals: Vec<Residual>,
    head_quantizer: Option<QuantizerEntry>,
    head_weight_quantizer: Option<WeightQuantizer>,
}

#[derive(Serialize, Deserialize)]
struct UnitEntry {
    name: String,
    kernel: Kernel,
    activation: Activation,
    /// Whether batch normalization is live; a bias otherwise.
    normalized: bool,
    weight_quantizer: Option<WeightQuantizer>,
    output_quantizer: Option<QuantizerEntry>,
}

#[derive(Serialize, Deserialize)]
struct QuantizerEntry {
    bits: Bits,
    ready: bool,
}

/// What a file holds beside the network.
#[derive(Debug, Default)]
pub struct Extras {
    /// Free text by name.
    pub metadata: BTreeMap<String, String>,
    /// Tensors that are not the network's own, such as an optimizer's velocities.
    pub tensors: BTreeMap<String, Tensor>,
}

/// A tensor's bytes, as safetensors wants to see them.
struct Bytes {
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

fn bytes(tensor: &Tensor) -> Result<Bytes> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let data = values.into_iter().flat_map(f32::to_le_bytes).collect();
    Ok(Bytes { shape: tensor.dims().to_vec(), data })
}

fn entry(quantizer: &Option<ActivationQuantizer>) -> Option<QuantizerEntry> {
    quantizer.as_ref().map(|q| QuantizerEntry { bits: q.bits, ready: q.ready })
}

impl Network {
    pub(crate) fn structure(&self) -> Structure {
        let units = self.units.iter().map(|unit| UnitEntry {
            name: unit.name.clone(),
            kernel: unit.kernel,
            activation: unit.activation,
            normalized: unit.batch_norm().is_some(),
            weight_quantizer: unit.weight_quantizer,
            output_quantizer: entry(&unit.output_quantizer),
        });
        Structure {
            name: self.name.clone(),
            input: self.input,
            epsilon: self.epsilon,
            input_quantizer: entry(&self.input_quantizer),
            units: units.collect(),
            residuals: self.residuals.clone(),
            head_quantizer: entry(&self.head.input_quantizer),
            head_weight_quantizer: self.head.weight_quantizer,
        }
    }

    /// Writes the network and `extras` to `path`, whole or not at all.
    pub fn save(&self, path: &Path, extras: &Extras) -> Result<()> {
        let fail = |problem: String| Error::File { path: path.display().to_string(), problem };
        let mut tensors = Vec::new();
        for (name, tensor) in self.tensors() {
            tensors.push((name, bytes(tensor)?));
        }
        for (name, tensor) in &extras.tensors {
            tensors.push((name.clone(), bytes(tensor)?));
        }
        let structure = serde_json::to_string(&self.structure()).map_err(|e| fail(e.to_string()))?;
        let mut metadata: HashMap<String, String> = extras.metadata.clone().into_iter().collect();
        metadata.insert(STRUCTURE.into(), structure);
        let data = safetensors::serialize(tensors, Some(metadata)).map_err(|e| fail(e.to_string()))?;
        whole_file::write(path, data).map_err(|e| fail(format!("could not be written: {e}")))
    }

    /// Reads a network that [`Network::save`] wrote.
    ///
    /// # Errors
    /// When the file is missing, cut short, not a network file, or lacks a tensor.
    pub fn load(path: &Path, device: &Device) -> Result<(Self, Extras)> {
        let fail = |problem: String| Error::File { path: path.display().to_string(), problem };
        let data = std::fs::read(path).map_err(|e| fail(format!("could not be read: {e}")))?;
        let damaged = |e: &dyn std::fmt::Display| {
            fail(format!("is not a whole safetensors file ({e}); delete it and run the stage again"))
        };
        let (_, header) = SafeTensors::read_metadata(&data).map_err(|e| damaged(&e))?;
        let file = SafeTensors::deserialize(&data).map_err(|e| damaged(&e))?;
        let mut metadata: BTreeMap<String, String> =
            header.metadata().clone().unwrap_or_default().into_iter().collect();
        let structure = metadata.remove(STRUCTURE).ok_or_else(|| {
            fail(format!("has no `{STRUCTURE}` in its metadata: expected a file that this project wrote"))
        })?;
        let structure: Structure = serde_json::from_str(&structure)
            .map_err(|e| fail(format!("its `{STRUCTURE}` metadata can't be understood: {e}")))?;

        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            if view.dtype() != Dtype::F32 {
                return Err(fail(format!("tensor {name} is {:?}, expected F32", view.dtype())));
            }
            let (chunks, _) = view.data().as_chunks::<4>();
            let values: Vec<f32> = chunks.iter().map(|b| f32::from_le_bytes(*b)).collect();
            tensors.insert(name, Tensor::from_vec(values, view.shape(), device)?);
        }
        let mut network = structure.skeleton(device)?;
        for (name, _, tensor) in network.slots_mut() {
            let missing = || fail(format!("tensor {name} is missing; was the file edited?"));
            *tensor = tensors.remove(&name).ok_or_else(missing)?;
        }
        network.validate()?;
        Ok((network, Extras { metadata, tensors }))
    }
}

impl Structure {
    /// The network with an empty tensor in every slot, to be filled through [`Network::slots_mut`].
    pub(crate) fn skeleton(self, device: &Device) -> Result<Network> {
        let empty = Tensor::zeros(0, DType::F32, device)?;
        let quantizer = |entry: Option<QuantizerEntry>| {
            let range = empty.clone();
            entry.map(|QuantizerEntry { bits, ready }| ActivationQuantizer { bits, range, ready })
        };
        let unit = |entry: UnitEntry| -> Result<Unit> {
            Ok(Unit {
                name: entry.name,
                kernel: entry.kernel,
                weight: empty.clone(),
                weight_quantizer: entry.weight_quantizer,
                norm: match entry.normalized {
                    true => Norm::Batch(BatchNorm::init(0, device)?),
                    false => Norm::Bias(empty.clone()),
                },
                activation: entry.activation,
                output_quantizer: quantizer(entry.output_quantizer),
            })
        };
        Ok(Network {
            name: self.name,
            input: self.input,
            input_quantizer: quantizer(self.input_quantizer),
            units: self.units.into_iter().map(unit).collect::<Result<_>>()?,
            residuals: self.residuals,
            head: Head {
                input_quantizer: quantizer(self.head_quantizer),
                weight: empty.clone(),
                weight_quantizer: self.head_weight_quantizer,
                bias: empty.clone(),
            },
            epsilon: self.epsilon,
        })
    }
}
