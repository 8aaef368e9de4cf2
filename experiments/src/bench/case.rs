//! The cases to measure: their names, and their description for an implementation that does not
//! know our networks.

use anyhow::{Context, Result, bail};
use candle_core::Device;
use kernels::Activation;
use models::{Fold, HEAD, Input, Kernel, MobileNet, Network, Node, Quantization, Version};
use quant_core::{Bits, Precision};
use serde::{Deserialize, Serialize};
use train::Arithmetic;

/// The number of classes of CIFAR-100.
pub(super) const CLASSES: usize = 100;

/// A case to measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Case {
    pub(super) network: Version,
    pub(super) width: f64,
    pub(super) batch: usize,
    pub(super) what: What,
    /// Whether the case uses fake quantization, A4/W4.
    pub(super) quantized: bool,
    /// The arithmetic in which feature maps are stored. For `bf16`, PyTorch runs under autocast.
    #[serde(default)]
    pub(super) arithmetic: Arithmetic,
}

/// The work of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    /// Forward pass, cross-entropy, backward pass, SGD with momentum and weight decay.
    Train,
    /// The forward pass with running statistics.
    Eval,
    /// Forward and backward pass of one operation of the network.
    Operation(Layer),
}

/// A convolution with what follows it, or a single operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layer {
    pub(super) kind: Kind,
    /// The side of the kernel.
    pub(super) size: usize,
    pub(super) stride: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// The height and width of the input.
    pub(super) input_size: [usize; 2],
    /// The height and width of the output.
    pub(super) output_size: [usize; 2],
    pub(super) activation: Activation,
    pub(super) weight_bits: Option<u32>,
    pub(super) output_bits: Option<u32>,
}

/// The kind of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// A full convolution of the image, which needs no gradient.
    Stem,
    /// A depthwise convolution.
    Depthwise,
    /// A 1×1 convolution.
    Pointwise,
    /// Batch normalization and activation, with a quantizer if the layer has bits.
    Norm,
}

/// A network's structure, and the bits of its quantizers.
#[derive(Debug, Serialize)]
pub(super) struct Layers {
    image: [usize; 3],
    classes: usize,
    input_bits: Option<u32>,
    units: Vec<Layer>,
    /// The unit whose output a residual reads, and the unit whose output it is added to.
    residuals: Vec<[usize; 2]>,
    features_bits: Option<u32>,
    classifier_bits: Option<u32>,
}

impl Case {
    /// Returns every case, networks first, in the order of the report. Single operations use only
    /// the first arithmetic.
    pub(super) fn all(batches: &[usize], arithmetics: &[Arithmetic]) -> Result<Vec<Self>> {
        let mut cases = Vec::new();
        for &batch in batches {
            for network in [Version::V1, Version::V2] {
                for width in [1.0, 0.25] {
                    for what in [What::Train, What::Eval] {
                        for quantized in [false, true] {
                            for &arithmetic in arithmetics {
                                let what = what.clone();
                                cases.push(Self { network, width, batch, what, quantized, arithmetic });
                            }
                        }
                    }
                }
            }
        }
        let batch = batches.first().copied().unwrap_or(64);
        let arithmetic = arithmetics.first().copied().unwrap_or_default();
        let of = |what: What, quantized| Self {
            network: Version::V2,
            width: 1.0,
            batch,
            what,
            quantized,
            arithmetic,
        };
        for layer in operations()? {
            let quantized = layer.output_bits.is_some();
            cases.push(of(What::Operation(layer), quantized));
        }
        Ok(cases)
    }

    /// Builds the network with random weights and with its quantizers.
    pub(super) fn build(&self) -> Result<Network> {
        let config = MobileNet { width: self.width, ..MobileNet::new(self.network, Input::Cifar, CLASSES) };
        let mut network = config.init(0, &Device::Cpu)?;
        if self.quantized {
            let bits = |bits| Bits::new(bits).map(Precision::Quantized);
            network.quantize(&Quantization {
                activations: bits(4)?,
                weights: bits(4)?,
                first_layer: bits(8)?,
                last_layer: bits(8)?,
                fold: Fold::Unfolded,
                ..Quantization::default()
            })?;
        }
        Ok(network)
    }

    /// Returns whether the case is a whole network.
    pub(super) fn of_network(&self) -> bool {
        !matches!(self.what, What::Operation(_))
    }

    /// Returns "train", "eval" or the operation's name.
    pub(super) fn what(&self) -> String {
        match &self.what {
            What::Train => "train".into(),
            What::Eval => "eval".into(),
            What::Operation(layer) => layer.name(),
        }
    }

    /// Returns "float" or "a4w4".
    pub(super) fn precision(&self) -> &'static str {
        if self.quantized { "a4w4" } else { "float" }
    }

    /// Returns a name that no other case has.
    pub(super) fn name(&self) -> String {
        let Self { network, width, batch, .. } = self;
        let network = network.name();
        format!("{network} {width:?} {batch} {} {} {}", self.what(), self.precision(), self.arithmetic.name())
    }
}

impl Layer {
    /// Returns a name such as "depthwise s2 96@32x32": the kind, the stride, the channels and the
    /// input's size.
    fn name(&self) -> String {
        let Self { stride, inputs, outputs, input_size: [h, w], .. } = self;
        let quantizer = if self.output_bits.is_some() { "+quantize" } else { "" };
        match self.kind {
            Kind::Stem => format!("stem {inputs}-{outputs}@{h}x{w}"),
            Kind::Depthwise => format!("depthwise s{stride} {outputs}@{h}x{w}"),
            Kind::Pointwise => format!("pointwise {inputs}-{outputs}@{h}x{w}"),
            Kind::Norm => format!("norm+relu6{quantizer} {outputs}@{h}x{w}"),
        }
    }
}

/// Returns the single operations, taken from units of MobileNetV2 with typical shapes.
fn operations() -> Result<Vec<Layer>> {
    let network = MobileNet::new(Version::V2, Input::Cifar, CLASSES).init(0, &Device::Cpu)?;
    let layers = Layers::of(&network);
    let unit = |name: &str| -> Result<&Layer> {
        let index = network.units().position(|unit| unit.name == name);
        index.map(|index| &layers.units[index]).with_context(|| format!("MobileNetV2 has no unit {name}"))
    };
    let norm = |layer: &Layer, bits| Layer {
        kind: Kind::Norm,
        size: 1,
        stride: 1,
        inputs: layer.outputs,
        input_size: layer.output_size,
        output_bits: bits,
        ..layer.clone()
    };
    // At most one layer of each kind and stride has large maps; the other one has many channels.
    let convolutions = [
        "stem",
        "blocks.0.depthwise",
        "blocks.14.depthwise",
        "blocks.1.depthwise",
        "blocks.3.depthwise",
        "blocks.1.expand",
        "blocks.2.project",
        "blocks.14.expand",
    ];
    let mut all = Vec::new();
    for name in convolutions {
        all.push(unit(name)?.clone());
    }
    for bits in [None, Some(4)] {
        for name in ["blocks.1.expand", "blocks.14.expand"] {
            all.push(norm(unit(name)?, bits));
        }
    }
    Ok(all)
}

impl Layers {
    /// Describes a network.
    pub(super) fn of(network: &Network) -> Self {
        let bits = |q: Option<&models::Quantizer>| q.map(|q| q.bits.get());
        let mut layers = Self {
            image: network.input,
            classes: network.classes(),
            input_bits: None,
            units: Vec::new(),
            residuals: Vec::new(),
            features_bits: None,
            classifier_bits: None,
        };
        let shapes = network.shapes();
        // For each node, the unit that its output comes from.
        let mut unit_of: Vec<usize> = Vec::new();
        for (node, &[h, w, outputs]) in network.nodes.iter().zip(&shapes) {
            let quantizer = bits(node.quantizer());
            match node {
                Node::Image(_) => layers.input_bits = quantizer,
                Node::Pool(_) => layers.features_bits = quantizer,
                Node::Unit(unit) if unit.name == HEAD => {
                    layers.classifier_bits = bits(unit.weight_quantizer.as_ref());
                }
                Node::Unit(unit) => {
                    let [input_h, input_w, inputs] = shapes[unit.input];
                    layers.units.push(Layer {
                        kind: match unit.kernel {
                            Kernel::Full { .. } => Kind::Stem,
                            Kernel::Depthwise { .. } => Kind::Depthwise,
                            Kernel::Pointwise => Kind::Pointwise,
                        },
                        size: unit.kernel.side(),
                        stride: unit.kernel.stride(),
                        inputs,
                        outputs,
                        input_size: [input_h, input_w],
                        output_size: [h, w],
                        activation: unit.activation,
                        weight_bits: bits(unit.weight_quantizer.as_ref()),
                        output_bits: quantizer,
                    });
                }
                Node::Sum(sum) => {
                    let to = layers.units.len() - 1;
                    layers.units[to].output_bits = quantizer;
                    layers.residuals.push([unit_of[sum.inputs[0]], to]);
                }
            }
            unit_of.push(layers.units.len().saturating_sub(1));
        }
        layers
    }

    /// Returns the number of fake quantizers of activations and weights.
    pub(super) fn quantizers(&self) -> usize {
        let of_units = self.units.iter().flat_map(|unit| [unit.weight_bits, unit.output_bits]);
        of_units.chain([self.input_bits, self.features_bits, self.classifier_bits]).flatten().count()
    }
}

/// The cases that `--only` picks. A term is a network, a width, a batch size, a precision, an
/// arithmetic, or a part of the name of what is measured. A case is picked if it fits a term of
/// every kind given.
#[derive(Debug, Default)]
struct Filter(Vec<(usize, Vec<String>)>);

/// The number of kinds of terms.
const KINDS: usize = 6;

fn fits(case: &Case, kind: usize, term: &str) -> bool {
    match kind {
        0 => case.network.name() == term,
        1 => format!("{:?}", case.width) == term,
        2 => case.batch.to_string() == term,
        3 => case.precision() == term,
        4 => case.arithmetic.name() == term,
        _ => case.what().contains(term),
    }
}

impl Filter {
    /// Sorts the terms by kind. A term that fits no case is an error that names what is allowed.
    fn parse(terms: &[String], cases: &[Case]) -> Result<Self> {
        let mut filter = Self::default();
        for term in terms {
            let Some(kind) = (0..KINDS).find(|&kind| cases.iter().any(|case| fits(case, kind, term))) else {
                let names: Vec<String> = cases.iter().map(Case::name).collect();
                bail!(
                    "--only {term} fits no case; the cases are (network, width, batch, what, bits, arithmetic):\n  {}",
                    names.join("\n  ")
                );
            };
            match filter.0.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, terms)) => terms.push(term.clone()),
                None => filter.0.push((kind, vec![term.clone()])),
            }
        }
        Ok(filter)
    }

    /// Returns whether the case is picked.
    fn picks(&self, case: &Case) -> bool {
        self.0.iter().all(|(kind, terms)| terms.iter().any(|term| fits(case, *kind, term)))
    }
}

/// Returns the cases that `--only` picks; an error if there are none.
pub(super) fn picked(only: &[String], cases: Vec<Case>) -> Result<Vec<Case>> {
    let filter = Filter::parse(only, &cases)?;
    let picked: Vec<Case> = cases.into_iter().filter(|case| filter.picks(case)).collect();
    if picked.is_empty() {
        bail!("--only {} picks no case: no case fits a term of every kind", only.join(","));
    }
    Ok(picked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_narrow_down() {
        let cases = Case::all(&[64, 128], &[Arithmetic::F32]).unwrap();
        let check = |terms: &[&str], expected: &[&str]| {
            let terms: Vec<String> = terms.iter().map(|term| term.to_string()).collect();
            let filter = Filter::parse(&terms, &cases).unwrap();
            let picked: Vec<String> =
                cases.iter().filter(|case| filter.picks(case)).map(Case::name).collect();
            assert_eq!(picked, expected, "{terms:?}");
        };
        check(&["mobilenet_v2", "1.0", "64", "train", "a4w4"], &["mobilenet_v2 1.0 64 train a4w4 f32"]);
        check(
            &["mobilenet_v1", "0.25", "128", "eval", "train", "float"],
            &["mobilenet_v1 0.25 128 train float f32", "mobilenet_v1 0.25 128 eval float f32"],
        );
        check(
            &["depthwise s2"],
            &[
                "mobilenet_v2 1.0 64 depthwise s2 96@32x32 float f32",
                "mobilenet_v2 1.0 64 depthwise s2 144@16x16 float f32",
            ],
        );
        let all = Filter::parse(&[], &cases).unwrap();
        assert!(cases.iter().all(|case| all.picks(case)));
        let error = Filter::parse(&["resnet".into()], &cases).unwrap_err().to_string();
        assert!(error.contains("resnet") && error.contains("mobilenet_v2 1.0 64 train a4w4"), "{error}");
    }

    #[test]
    fn case_names_are_different() {
        let cases = Case::all(&[64, 128], &[Arithmetic::F32, Arithmetic::Bf16]).unwrap();
        let names: std::collections::BTreeSet<String> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len());
        assert_eq!(cases.iter().filter(|case| case.of_network()).count(), 64);
    }

    #[test]
    fn every_quantizer_is_described() {
        let check = |network, quantizers| {
            let arithmetic = Arithmetic::F32;
            let case =
                Case { network, width: 0.25, batch: 1, what: What::Train, quantized: true, arithmetic };
            assert_eq!(Layers::of(&case.build().unwrap()).quantizers(), quantizers);
            let float = Case { quantized: false, ..case };
            assert_eq!(Layers::of(&float.build().unwrap()).quantizers(), 0);
        };
        // Image and features; weights and output of each unit; the classifier's weights.
        check(Version::V1, 2 + 2 * 27 + 1);
        check(Version::V2, 2 + 2 * 53 + 1);
    }
}
