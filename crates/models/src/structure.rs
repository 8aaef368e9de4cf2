//! The part of a network's file that is not tensors.

use crate::quantizer::Entry;
use crate::{BatchNorm, HEAD, Image, Kernel, Network, Node, Norm, Pool, Quantizer, Sum, Unit};
use candle_core::{DType, Device, Tensor};
use kernels::Activation;
use serde::{Deserialize, Serialize};

/// The largest number of nodes of a network.
const MOST_NODES: usize = 10_000;

/// Everything of a network except its tensors.
///
/// Most networks are a chain: each of the `units` reads the previous one, residuals add the outputs
/// of earlier units to later ones, and pooling and a classifier follow. A network that is no chain
/// has its `nodes` instead.
#[derive(Serialize, Deserialize)]
pub(crate) struct Structure {
    name: String,
    input: [usize; 3],
    epsilon: f64,
    input_quantizer: Option<Entry>,
    units: Vec<UnitEntry>,
    residuals: Vec<Residual>,
    head_quantizer: Option<Entry>,
    head_weight_quantizer: Option<Entry>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    nodes: Vec<NodeEntry>,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct UnitEntry {
    name: String,
    kernel: Kernel,
    activation: Activation,
    /// Whether there is batch normalization. Otherwise, there is a bias.
    normalized: bool,
    /// Whether the activation has caps. `false` is not written, as in files from before caps
    /// existed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    capped: bool,
    weight_quantizer: Option<Entry>,
    /// The output's quantizer. If a residual ends here, it is the sum's quantizer.
    output_quantizer: Option<Entry>,
}

/// A residual: the output of unit `from` is added to that of unit `to`, which has no activation.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Residual {
    from: usize,
    to: usize,
}

/// A node after the image, which is node 0.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum NodeEntry {
    Unit { input: usize, unit: UnitEntry },
    Sum { name: String, inputs: [usize; 2], activation: Activation, quantizer: Option<Entry> },
    Pool { name: String, input: usize, quantizer: Option<Entry> },
}

impl NodeEntry {
    fn of(node: &Node) -> Option<Self> {
        let quantizer = node.quantizer().map(Entry::of_activations);
        Some(match node {
            Node::Image(_) => return None,
            Node::Unit(unit) => Self::Unit {
                input: unit.input,
                unit: UnitEntry {
                    name: unit.name.clone(),
                    kernel: unit.kernel,
                    activation: unit.activation,
                    normalized: unit.batch_norm().is_some(),
                    capped: unit.cap.is_some(),
                    weight_quantizer: unit.weight_quantizer.as_ref().map(Entry::of_weights),
                    output_quantizer: quantizer,
                },
            },
            Node::Sum(Sum { name, inputs, activation, .. }) => {
                Self::Sum { name: name.clone(), inputs: *inputs, activation: *activation, quantizer }
            }
            Node::Pool(Pool { name, input, .. }) => {
                Self::Pool { name: name.clone(), input: *input, quantizer }
            }
        })
    }

    /// Returns the node with `empty` in place of each tensor.
    fn node(self, empty: &Tensor) -> Result<Node, String> {
        Ok(match self {
            Self::Unit { input, unit } => Node::Unit(Unit {
                name: unit.name,
                input,
                kernel: unit.kernel,
                weight: empty.clone(),
                weight_quantizer: of_weights(unit.weight_quantizer, empty)?,
                norm: match unit.normalized {
                    true => Norm::Batch(BatchNorm {
                        gamma: empty.clone(),
                        beta: empty.clone(),
                        mean: empty.clone(),
                        variance: empty.clone(),
                    }),
                    false => Norm::Bias(empty.clone()),
                },
                activation: unit.activation,
                cap: unit.capped.then(|| empty.clone()),
                output_quantizer: of_activations(unit.output_quantizer, empty)?,
            }),
            Self::Sum { name, inputs, activation, quantizer: entry } => {
                Node::Sum(Sum { name, inputs, activation, quantizer: of_activations(entry, empty)? })
            }
            Self::Pool { name, input, quantizer: entry } => {
                Node::Pool(Pool { name, input, quantizer: of_activations(entry, empty)? })
            }
        })
    }
}

fn of_activations(entry: Option<Entry>, empty: &Tensor) -> Result<Option<Quantizer>, String> {
    entry.map(|entry| entry.quantizer(false, empty)).transpose()
}

fn of_weights(entry: Option<Entry>, empty: &Tensor) -> Result<Option<Quantizer>, String> {
    entry.map(|entry| entry.quantizer(true, empty)).transpose()
}

impl Structure {
    pub(crate) fn of(network: &Network) -> Self {
        let nodes: Vec<NodeEntry> = network.nodes.iter().filter_map(NodeEntry::of).collect();
        let without_nodes = || Self {
            name: network.name.clone(),
            input: network.input,
            epsilon: network.epsilon,
            input_quantizer: network.nodes[0].quantizer().map(Entry::of_activations),
            units: Vec::new(),
            residuals: Vec::new(),
            head_quantizer: None,
            head_weight_quantizer: None,
            nodes: Vec::new(),
        };
        // The chain that the network is, if it is a chain.
        let mut chain = without_nodes();
        let mut unit_of = vec![0];
        for node in &nodes {
            match node {
                NodeEntry::Unit { unit, .. } if unit.name == HEAD => {
                    chain.head_weight_quantizer = unit.weight_quantizer.clone();
                }
                NodeEntry::Unit { unit, .. } => chain.units.push(unit.clone()),
                NodeEntry::Sum { inputs: [from, _], quantizer, .. } => {
                    if let Some(unit) = chain.units.last_mut() {
                        unit.output_quantizer = quantizer.clone();
                        chain.residuals.push(Residual { from: unit_of[*from], to: chain.units.len() - 1 });
                    }
                }
                NodeEntry::Pool { quantizer, .. } => chain.head_quantizer = quantizer.clone(),
            }
            unit_of.push(chain.units.len().saturating_sub(1));
        }
        if chain.expanded().as_ref() == Ok(&nodes) { chain } else { Self { nodes, ..without_nodes() } }
    }

    /// Returns the nodes of a chain.
    fn expanded(&self) -> Result<Vec<NodeEntry>, String> {
        let mut nodes = Vec::new();
        // For each unit, the node of its output, including the residual.
        let mut outputs = Vec::new();
        let mut residuals = self.residuals.clone();
        for (i, unit) in self.units.iter().enumerate() {
            let mut unit = unit.clone();
            let mut sum = None;
            if let Some(found) = residuals.iter().position(|residual| residual.to == i) {
                let Residual { from, to } = residuals.remove(found);
                let from =
                    *outputs.get(from).ok_or_else(|| format!("residual {from} → {to} runs backwards"))?;
                sum = Some((from, unit.name.clone(), unit.output_quantizer.take()));
            }
            // The previous node. It is the image, which is not listed, for the first unit.
            nodes.push(NodeEntry::Unit { input: nodes.len(), unit });
            if let Some((from, name, quantizer)) = sum {
                let inputs = [from, nodes.len()];
                nodes.push(NodeEntry::Sum { name, inputs, activation: Activation::Identity, quantizer });
            }
            outputs.push(nodes.len());
        }
        if let Some(Residual { from, to }) = residuals.first() {
            return Err(format!("residual {from} → {to} ends nowhere, or where another does"));
        }
        let quantizer = self.head_quantizer.clone();
        nodes.push(NodeEntry::Pool { name: HEAD.into(), input: nodes.len(), quantizer });
        let classifier = UnitEntry {
            name: HEAD.into(),
            kernel: Kernel::Pointwise,
            activation: Activation::Identity,
            normalized: false,
            capped: false,
            weight_quantizer: self.head_weight_quantizer.clone(),
            output_quantizer: None,
        };
        nodes.push(NodeEntry::Unit { input: nodes.len(), unit: classifier });
        Ok(nodes)
    }

    /// Returns the network with an empty tensor in every slot, to be filled through
    /// [`Network::slots_mut`].
    ///
    /// The tensors are on the CPU, because a GPU can't hold tensors without elements.
    pub(crate) fn skeleton(self) -> Result<Network, String> {
        let count = self.units.len() + self.residuals.len() + self.nodes.len();
        if count > MOST_NODES {
            return Err(format!("it has {count} nodes: expected at most {MOST_NODES}"));
        }
        let empty = Tensor::zeros(0, DType::F32, &Device::Cpu).map_err(|e| e.to_string())?;
        let entries = if self.nodes.is_empty() { self.expanded()? } else { self.nodes };
        let mut nodes = vec![Node::Image(Image { quantizer: of_activations(self.input_quantizer, &empty)? })];
        for entry in entries {
            nodes.push(entry.node(&empty)?);
        }
        Ok(Network { name: self.name, input: self.input, nodes, epsilon: self.epsilon })
    }
}
