//! Import of public weights: MobileNets with the tensor names and layouts of torchvision and timm.
//!
//! The names and shapes of a file's tensors determine what it holds, so that a downloaded file
//! needs no description. No tensor tells the strides; they are those for ImageNet unless specified.

use crate::file::STRUCTURE;
use crate::{
    Error, HEAD, Input, MOST_CHANNELS, MobileNet, Network, Node, Norm, Result, Strides, Version, input, pth,
};
use candle_core::{DType, Device, Tensor};
use kernels::Activation;
use safetensors::tensor::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

/// What is known in advance about a file of public weights. By default, everything that can be
/// detected is detected, and the rest is as in published weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Import {
    /// V1 or V2. If `None`, the tensors' names determine it.
    pub version: Option<Version>,
    /// The width multiplier. If `None`, the numbers of filters determine it.
    pub width: Option<f64>,
    /// The number of classes. If `None`, the classifier determines it.
    pub classes: Option<usize>,
    /// The strides, which no tensor tells.
    pub input: Input,
    /// φ after every convolution except V2's projections, which no tensor tells.
    pub activation: Activation,
    /// The ε of batch normalization, which no tensor tells.
    pub epsilon: f64,
}

impl Default for Import {
    fn default() -> Self {
        Self {
            version: None,
            width: None,
            classes: None,
            input: Input::Imagenet,
            activation: Activation::Relu6,
            epsilon: 1e-5,
        }
    }
}

/// The naming of the tensors in a file of public weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `features.0.0.weight`, `features.1.conv.0.0.weight`, … (only MobileNetV2).
    Torchvision,
    /// `conv_stem.weight`, `blocks.0.0.conv_dw.weight`, …
    Timm,
}

impl Naming {
    /// Returns the library's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Torchvision => "torchvision",
            Self::Timm => "timm",
        }
    }
}

/// The origin of a network that was read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Origin {
    /// A file that [`Network::save`] wrote, which contains the structure.
    Own,
    /// Public weights.
    Public {
        /// The naming of the tensors.
        naming: Naming,
        /// The detected network.
        config: MobileNet,
    },
}

impl Network {
    /// Reads a network from a file of any known kind.
    ///
    /// The file may be one that [`Network::save`] wrote, or public weights of MobileNetV1 or V2
    /// with the names of torchvision or timm, as .safetensors or as PyTorch's .pth. `import`
    /// concerns only public weights.
    ///
    /// # Errors
    /// If the file can't be read, or its tensors are not those of such a network. The message names
    /// what is missing, left over, or of another shape.
    pub fn open(path: &Path, import: &Import, device: &Device) -> Result<(Self, Origin)> {
        let fail = |problem| Error::File { path: path.display().to_string(), problem };
        let data = input::read(path).map_err(|e| fail(format!("could not be read: {e}")))?;
        let tensors = match Format::of(&data).map_err(fail)? {
            Format::Own => return Ok((Self::load(path, device)?.0, Origin::Own)),
            Format::Safetensors => candle_core::safetensors::load_buffer(&data, device)
                .map_err(|e| fail(format!("is not a whole safetensors file ({e})")))?
                .into_iter()
                .collect(),
            Format::Pickle => pth::read(&data).map_err(|problem| {
                let advice =
                    "if it is no state dict, save one in Python: torch.save(model.state_dict(), FILE)";
                fail(format!("{problem}; {advice}"))
            })?,
        };
        let (network, naming, config) = import.network(tensors, device, &fail)?;
        network.check_values().map_err(|e| fail(e.to_string()))?;
        Ok((network, Origin::Public { naming, config }))
    }
}

/// The kinds of network files.
enum Format {
    Own,
    Safetensors,
    Pickle,
}

impl Format {
    fn of(data: &[u8]) -> std::result::Result<Self, String> {
        if data.starts_with(b"PK") {
            return Ok(Self::Pickle);
        }
        // A pickle without an archive, of any protocol. Protocols before the second begin with
        // PyTorch's magic number.
        if matches!(data, [0x80, 2..=5, ..]) || data.starts_with(b"L119547037146038801333356L\n") {
            return Err("was saved in the format that PyTorch had before 1.6; convert it in Python: \
                        torch.save(torch.load(FILE), NEW)"
                .into());
        }
        match SafeTensors::read_metadata(data) {
            Ok((_, header)) => {
                let own = header.metadata().as_ref().is_some_and(|all| all.contains_key(STRUCTURE));
                Ok(if own { Self::Own } else { Self::Safetensors })
            }
            Err(e) => Err(format!(
                "is neither a whole safetensors file ({e}) nor a zip archive as torch.save writes it (.pth, .pt)"
            )),
        }
    }
}

impl Import {
    /// Returns the network that the tensors form. `fail` makes the error from a problem with them.
    fn network(
        &self,
        tensors: BTreeMap<String, Tensor>,
        device: &Device,
        fail: &dyn Fn(String) -> Error,
    ) -> Result<(Network, Naming, MobileNet)> {
        let tensors = unwrap_names(tensors);
        let naming = naming_of(&tensors).map_err(fail)?;
        let version = self.version_of(naming, &tensors).map_err(fail)?;
        let classifier = format!("{}.weight", naming.classifier());
        let found = tensors.get(&classifier).and_then(|t| t.dims().first().copied());
        let Some(classes) = self.classes.or(found) else {
            return Err(fail(format!("has no {classifier} to tell the number of classes")));
        };
        if classes == 0 {
            return Err(fail(format!("has no classes ({classifier}): expected 1 to {MOST_CHANNELS}")));
        }
        let config = MobileNet {
            version,
            input: self.input,
            classes,
            width: self.width.unwrap_or(1.0),
            first_expansion: tensors.contains_key(naming.first_expansion()),
            activation: self.activation,
        };
        let config = match self.width {
            Some(_) => config,
            None => MobileNet { width: width_of(&config, naming, &tensors)?, ..config },
        };

        let mut network = config.outline()?;
        network.epsilon = self.epsilon;
        let mut source = StateDict { tensors, missing: Vec::new(), misfits: Vec::new() };
        for (unit, (convolution, norm)) in network.units_mut().zip(naming.layers(&config)) {
            let (filters, dims) =
                (unit.filters(), unit.kernel.pytorch_dims(unit.input_channels(), unit.filters()));
            // The classifier is a linear layer there, not a convolution.
            let shape = if unit.name == HEAD { &dims[..2] } else { &dims[..] };
            if let Some(weight) = source.take(format!("{convolution}.weight"), shape, device)? {
                unit.weight = unit.kernel.weight_from_pytorch(&weight.reshape(&dims)?)?;
            }
            let fields = match &mut unit.norm {
                Norm::Batch(to) => vec![
                    ("weight", &mut to.gamma),
                    ("bias", &mut to.beta),
                    ("running_mean", &mut to.mean),
                    ("running_var", &mut to.variance),
                ],
                Norm::Bias(to) => vec![("bias", to)],
            };
            for (field, to) in fields {
                if let Some(tensor) = source.take(format!("{norm}.{field}"), &[filters], device)? {
                    *to = tensor;
                }
            }
        }
        source.finish(&config, naming).map_err(fail)?;
        network.validate()?;
        Ok((network, naming, config))
    }

    fn version_of(
        &self,
        naming: Naming,
        tensors: &BTreeMap<String, Tensor>,
    ) -> std::result::Result<Version, String> {
        let found = match naming {
            Naming::Torchvision => Version::V2,
            // V2 has a projection after each depthwise layer, and a last pointwise layer.
            Naming::Timm if tensors.contains_key("blocks.1.0.conv_pwl.weight") => Version::V2,
            Naming::Timm => Version::V1,
        };
        match self.version {
            Some(wanted) if wanted != found => Err(format!(
                "is named as a {} of {} is, not as a {}",
                found.name(),
                naming.name(),
                wanted.name()
            )),
            _ => Ok(found),
        }
    }
}

/// The prefixes that wrappers (parallel training, compilation, an outer module) add to every name.
const WRAPPERS: [&str; 3] = ["module.", "_orig_mod.", "model."];

/// Removes the prefixes of wrappers from the names.
fn unwrap_names(mut tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    while let Some(wrapper) =
        WRAPPERS.iter().find(|w| !tensors.is_empty() && tensors.keys().all(|name| name.starts_with(**w)))
    {
        tensors = tensors.into_iter().map(|(name, t)| (name[wrapper.len()..].to_string(), t)).collect();
    }
    tensors
}

fn naming_of(tensors: &BTreeMap<String, Tensor>) -> std::result::Result<Naming, String> {
    if tensors.contains_key("features.0.0.weight") {
        Ok(Naming::Torchvision)
    } else if tensors.contains_key("conv_stem.weight") {
        Ok(Naming::Timm)
    } else {
        Err(format!(
            "has neither features.0.0.weight (as torchvision names a MobileNetV2) nor conv_stem.weight (as timm \
             names MobileNetV1 and V2), but {}",
            listed(tensors.keys().cloned())
        ))
    }
}

impl Naming {
    fn classifier(self) -> &'static str {
        match self {
            Self::Torchvision => "classifier.1",
            Self::Timm => "classifier",
        }
    }

    /// Returns the name of a tensor that exists only if V2's first block has an expansion.
    fn first_expansion(self) -> &'static str {
        match self {
            Self::Torchvision => "features.1.conv.3.weight",
            Self::Timm => "blocks.0.0.conv_pwl.weight",
        }
    }

    /// Returns the names of every unit's convolution and of its normalization or bias, in the order
    /// of the units.
    fn layers(self, config: &MobileNet) -> Vec<(String, String)> {
        let stages: &[usize] = match config.version {
            Version::V1 => &[1, 2, 2, 6, 2],
            Version::V2 => &[1, 2, 3, 4, 3, 3, 1],
        };
        let pair = |convolution: &str, norm: &str| (convolution.to_string(), norm.to_string());
        let mut layers = vec![match self {
            Self::Torchvision => pair("features.0.0", "features.0.1"),
            Self::Timm => pair("conv_stem", "bn1"),
        }];
        let mut block = 0;
        for (stage, &repeats) in stages.iter().enumerate() {
            for repeat in 0..repeats {
                let expanded = config.version == Version::V2 && (block > 0 || config.first_expansion);
                block += 1;
                let (prefix, parts): (String, &[(&str, &str)]) = match (self, expanded) {
                    (Self::Torchvision, true) => {
                        (format!("features.{block}.conv"), &[("0.0", "0.1"), ("1.0", "1.1"), ("2", "3")])
                    }
                    (Self::Torchvision, false) => {
                        (format!("features.{block}.conv"), &[("0.0", "0.1"), ("1", "2")])
                    }
                    (Self::Timm, true) => (
                        format!("blocks.{stage}.{repeat}"),
                        &[("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")],
                    ),
                    (Self::Timm, false) => {
                        (format!("blocks.{stage}.{repeat}"), &[("conv_dw", "bn1"), ("conv_pw", "bn2")])
                    }
                };
                layers.extend(parts.iter().map(|(c, n)| (format!("{prefix}.{c}"), format!("{prefix}.{n}"))));
            }
        }
        if config.version == Version::V2 {
            layers.push(match self {
                Self::Torchvision => pair("features.18.0", "features.18.1"),
                Self::Timm => pair("conv_head", "bn2"),
            });
        }
        layers.push(pair(self.classifier(), self.classifier()));
        layers
    }
}

/// Returns the width multiplier that matches the most of the tensors' numbers of filters.
fn width_of(config: &MobileNet, naming: Naming, tensors: &BTreeMap<String, Tensor>) -> Result<f64> {
    let filters: Vec<Option<usize>> = naming
        .layers(config)
        .iter()
        .map(|(name, _)| tensors.get(&format!("{name}.weight")).and_then(|t| t.dims().first().copied()))
        .collect();
    let there = filters.iter().flatten().count();
    let mut best = (0, 1.0);
    for width in widths() {
        let network = MobileNet { width, ..*config }.outline()?;
        let fitting = network.units().zip(&filters).filter(|(u, f)| **f == Some(u.filters())).count();
        if fitting > best.0 {
            best = (fitting, width);
        }
        if fitting == there {
            break;
        }
    }
    Ok(best.1)
}

/// Returns the candidate widths. Channels are rounded, so several may fit; published widths come
/// first.
fn widths() -> impl Iterator<Item = f64> {
    let usual = [1.0, 0.75, 0.5, 0.35, 0.25, 1.4, 1.25];
    let widths = usual.into_iter().chain((1..=80).map(|n| f64::from(n) / 20.0));
    widths.chain((1..=400).map(|n| f64::from(n) / 100.0))
}

impl Network {
    /// Returns the tensors with the names and shapes of torchvision for a MobileNetV2, or of timm
    /// for a V1.
    ///
    /// `load_state_dict` takes them: this is the inverse of [`Network::open`]. The counts of
    /// batches are left out, because PyTorch sets them itself. The module must have the network's
    /// strides, activation and ε, which no tensor tells.
    ///
    /// # Errors
    /// If the network is quantized, folded, capped, pruned, or otherwise not one of these
    /// libraries' networks.
    pub fn state_dict(&self) -> Result<(Naming, BTreeMap<String, Tensor>)> {
        let refuse = |problem: &str| Error::Structure {
            network: self.name.clone(),
            place: "as a state dict".into(),
            problem: format!(
                "{problem}, and torchvision and timm have no such network; ONNX can hold any: pfq export FILE OUT.onnx"
            ),
        };
        if self.nodes.iter().any(|node| node.quantizer().is_some())
            || self.units().any(|unit| unit.weight_quantizer.is_some())
        {
            return Err(refuse("its layers are quantized"));
        }
        if self.units().any(|unit| unit.batch_norm().is_none() != (unit.name == HEAD)) {
            return Err(refuse("its batch normalization has been folded into the weights"));
        }
        if self.units().any(|unit| unit.cap.is_some()) {
            return Err(refuse("its activations have caps, as DFQ sets them"));
        }
        let config = self.config()?.ok_or_else(|| {
            refuse("its layers are not those of a MobileNet of any width, as if filters were pruned")
        })?;
        let naming = match config.version {
            Version::V1 => Naming::Timm,
            Version::V2 if config.first_expansion => {
                return Err(refuse("its first block has an expansion, as in the paper"));
            }
            Version::V2 => Naming::Torchvision,
        };
        let mut tensors = BTreeMap::new();
        for (unit, (convolution, norm)) in self.units().zip(naming.layers(&config)) {
            let mut weight = unit.in_pytorch_layout(&unit.weight)?;
            if unit.name == HEAD {
                weight = weight.flatten_from(1)?;
            }
            tensors.insert(format!("{convolution}.weight"), weight);
            let fields = match &unit.norm {
                Norm::Batch(of) => vec![
                    ("weight", &of.gamma),
                    ("bias", &of.beta),
                    ("running_mean", &of.mean),
                    ("running_var", &of.variance),
                ],
                Norm::Bias(bias) => vec![("bias", bias)],
            };
            tensors.extend(
                fields.into_iter().map(|(field, tensor)| (format!("{norm}.{field}"), tensor.clone())),
            );
        }
        Ok((naming, tensors))
    }

    /// Returns the description of the network, if its layers and what each of them reads are those of
    /// a MobileNet of some width.
    fn config(&self) -> Result<Option<MobileNet>> {
        let kinds = [(Version::V2, false), (Version::V2, true), (Version::V1, true)];
        let shape = |node: &Node| node.unit().map(|unit| (unit.kernel, unit.weight.dims().to_vec()));
        let same = |(a, b): (&Node, &Node)| {
            shape(a) == shape(b) && a.inputs() == b.inputs() && a.activation() == b.activation()
        };
        let Some(stem) = self.units().next() else { return Ok(None) };
        for (version, first_expansion) in kinds {
            // Blocks have a residual where the stride is 1 and both ends are of the same width.
            let Some(strides) = Strides::of_units(version, self.units()) else { continue };
            for width in widths() {
                let config = MobileNet {
                    width,
                    first_expansion,
                    activation: stem.activation,
                    ..MobileNet::new(version, Input::Other(strides), self.classes())
                };
                let outline = config.outline()?;
                if outline.units().count() != self.units().count() {
                    break;
                }
                if outline.nodes.len() == self.nodes.len() && outline.nodes.iter().zip(&self.nodes).all(same)
                {
                    return Ok(Some(config));
                }
            }
        }
        Ok(None)
    }
}

/// The tensors of a file, which are taken by name, and the problems found so far.
struct StateDict {
    tensors: BTreeMap<String, Tensor>,
    missing: Vec<String>,
    misfits: Vec<String>,
}

impl StateDict {
    fn take(
        &mut self,
        name: String,
        shape: &[usize],
        device: &Device,
    ) -> candle_core::Result<Option<Tensor>> {
        match self.tensors.remove(&name) {
            Some(tensor) if tensor.dims() == shape => {
                Ok(Some(tensor.to_device(device)?.to_dtype(DType::F32)?.contiguous()?))
            }
            Some(tensor) => {
                self.misfits.push(format!("{name} ({:?} instead of {shape:?})", tensor.dims()));
                Ok(None)
            }
            None => {
                self.missing.push(name);
                Ok(None)
            }
        }
    }

    /// Returns an error unless every tensor was present and nothing is left over except counts of
    /// batches.
    fn finish(self, config: &MobileNet, naming: Naming) -> std::result::Result<(), String> {
        let left: Vec<String> =
            self.tensors.into_keys().filter(|name| !name.ends_with("num_batches_tracked")).collect();
        let mut problems = Vec::new();
        for (names, what) in
            [(self.missing, "missing"), (left, "left over"), (self.misfits, "of another shape")]
        {
            if !names.is_empty() {
                problems.push(format!("{what}: {}", listed(names.into_iter())));
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(format!(
            "is no {} of width {} with {} {} in {}'s naming; {}",
            config.version.name(),
            config.width,
            config.classes,
            if config.classes == 1 { "class" } else { "classes" },
            naming.name(),
            problems.join("; ")
        ))
    }
}

/// Returns the first names, and how many more there are.
fn listed(names: impl ExactSizeIterator<Item = String>) -> String {
    const SHOWN: usize = 4;
    let all = names.len();
    let shown: Vec<String> = names.take(SHOWN).collect();
    match all {
        0 => "nothing".into(),
        n if n > SHOWN => format!("{} and {} more", shown.join(", "), n - SHOWN),
        _ => shown.join(", "),
    }
}
