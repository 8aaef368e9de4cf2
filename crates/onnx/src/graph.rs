//! A builder of ONNX graphs, operator by operator.

use crate::Result;
use crate::proto::{
    Attribute, AttributeType, DataType, Dimension, Entry, Extent, Graph, Model, Node, OperatorSet, Shape,
    Tensor, TensorType, Type, Value,
};

/// The operator set version and the first IR version that supports it, without and with 4-bit
/// tensors.
const OPSET: (i64, i64) = (13, 7);
const OPSET_OF_4_BITS: (i64, i64) = (21, 10);

/// A graph under construction. A value has the name of the node that computes it.
#[derive(Default)]
pub(crate) struct Builder {
    graph: Graph,
    /// Whether levels of up to 4 bits take a byte each.
    int8: bool,
    /// Whether the graph has a 4-bit tensor.
    has_4_bits: bool,
}

impl Builder {
    pub(crate) fn new(int8: bool) -> Self {
        Self { int8, ..Self::default() }
    }

    /// Adds an operator and returns the name of its output, which is the operator's own name.
    pub(crate) fn node(
        &mut self,
        operator: &str,
        name: impl Into<String>,
        inputs: &[&str],
        attributes: Vec<Attribute>,
    ) -> String {
        let name = name.into();
        self.graph.node.push(Node {
            input: inputs.iter().map(|input| input.to_string()).collect(),
            output: vec![name.clone()],
            name: name.clone(),
            op_type: operator.into(),
            attribute: attributes,
        });
        name
    }

    fn constant(&mut self, name: String, dims: &[usize], data_type: DataType, raw_data: Vec<u8>) -> String {
        let dims = dims.iter().map(|&dim| dim as i64).collect();
        self.graph.initializer.push(Tensor {
            dims,
            data_type: data_type.into(),
            name: name.clone(),
            raw_data,
        });
        name
    }

    /// Adds a constant float tensor and returns its name.
    pub(crate) fn floats(&mut self, name: impl Into<String>, dims: &[usize], values: &[f32]) -> String {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name.into(), dims, DataType::Float, data)
    }

    /// Adds a tensor as a constant float tensor and returns its name.
    pub(crate) fn tensor(&mut self, name: impl Into<String>, tensor: &candle_core::Tensor) -> Result<String> {
        Ok(self.floats(name, tensor.dims(), &tensor.flatten_all()?.to_vec1()?))
    }

    /// Adds a constant byte tensor and returns its name.
    pub(crate) fn bytes(&mut self, name: impl Into<String>, dims: &[usize], values: &[u8]) -> String {
        self.constant(name.into(), dims, DataType::Uint8, values.to_vec())
    }

    /// Adds constant levels of at most `max_level`, in 4 bits if they fit, and returns their name.
    pub(crate) fn levels(
        &mut self,
        name: impl Into<String>,
        dims: &[usize],
        levels: &[u8],
        max_level: u8,
    ) -> String {
        if max_level > 15 || self.int8 {
            return self.bytes(name, dims, levels);
        }
        self.has_4_bits = true;
        // Two levels share a byte, the first in the lower half.
        let pack = |pair: &[u8]| pair[0] | pair.get(1).map_or(0, |second| second << 4);
        self.constant(name.into(), dims, DataType::Uint4, levels.chunks(2).map(pack).collect())
    }

    /// Returns the model with the graph from `input` to `output`, and its operator set version.
    pub(crate) fn finish(
        mut self,
        name: &str,
        input: (&str, [usize; 3]),
        output: (&str, usize),
        metadata: Vec<Entry>,
    ) -> (Model, i64) {
        self.graph.name = name.into();
        self.graph.input = vec![batch_of(input.0, &input.1)];
        self.graph.output = vec![batch_of(output.0, &[output.1])];
        let (version, ir_version) = if self.has_4_bits { OPSET_OF_4_BITS } else { OPSET };
        let model = Model {
            ir_version,
            producer_name: "pfq".into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(self.graph),
            opset_import: vec![OperatorSet { domain: String::new(), version }],
            metadata,
        };
        (model, version)
    }
}

/// Returns the declaration of a batch of float tensors of shape `dims`, of any number.
fn batch_of(name: &str, dims: &[usize]) -> Value {
    let fixed = dims.iter().map(|&dim| Extent::Fixed(dim as i64));
    let extents = std::iter::once(Extent::Named("N".into())).chain(fixed);
    let dim = extents.map(|extent| Dimension { extent: Some(extent) }).collect();
    let tensor = TensorType { element: DataType::Float.into(), shape: Some(Shape { dim }) };
    Value { name: name.into(), kind: Some(Type { tensor: Some(tensor) }) }
}

/// Returns an integer attribute.
pub(crate) fn int(name: &str, value: usize) -> Attribute {
    let value = Some(value as i64);
    Attribute { name: name.into(), i: value, kind: AttributeType::Int.into(), ..Attribute::default() }
}

/// Returns an attribute that is a list of integers.
pub(crate) fn ints(name: &str, values: &[usize]) -> Attribute {
    let ints = values.iter().map(|&value| value as i64).collect();
    Attribute { name: name.into(), ints, kind: AttributeType::Ints.into(), ..Attribute::default() }
}

/// Returns a float attribute.
pub(crate) fn float(name: &str, value: f64) -> Attribute {
    let value = Some(value as f32);
    Attribute { name: name.into(), f: value, kind: AttributeType::Float.into(), ..Attribute::default() }
}
