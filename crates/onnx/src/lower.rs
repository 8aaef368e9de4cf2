//! Translation of a network's nodes to ONNX operators.

use crate::graph::{Builder, float, int, ints};
use crate::proto::{Entry, Model};
use crate::{Error, Options, Result};
use candle_core::{DType, Tensor};
use kernels::Activation;
use models::{BatchNorm, Lattice, Network, Node, Norm, Unit, WeightLevels};

/// The names of the graph's input and output.
const IMAGES: &str = "images";
const LOGITS: &str = "logits";

/// Returns the model and its operator set version.
pub(crate) fn model(network: &Network, options: &Options) -> Result<(Model, i64)> {
    let mut builder = Builder::new(options.int8);
    let [height, width, channels] = network.input;
    let mut images = IMAGES.to_string();
    if let Some(normalize) = options.normalize {
        if channels != normalize.mean.len() {
            return Err(Error::Channels(channels));
        }
        let mean = builder.floats("input.mean", &[1, channels, 1, 1], &normalize.mean);
        let std = builder.floats("input.std", &[1, channels, 1, 1], &normalize.std);
        images = builder.node("Sub", "input.centred", &[&images, &mean], vec![]);
        images = builder.node("Div", "input.normalized", &[&images, &std], vec![]);
    }
    // The name of each node's output value.
    let mut outputs: Vec<String> = Vec::new();
    for node in &network.nodes {
        let (name, x) = match node {
            Node::Image(_) => ("input".into(), images.clone()),
            Node::Unit(unit) => (
                unit.name.clone(),
                self::unit(&mut builder, unit, &outputs[unit.input], network.epsilon, options)?,
            ),
            // The plain name belongs to the unit.
            Node::Sum(sum) => {
                let name = format!("{}.sum", sum.name);
                let [a, b] = sum.inputs.map(|input| outputs[input].as_str());
                (name.clone(), builder.node("Add", name, &[a, b], vec![]))
            }
            Node::Pool(pool) => {
                let name = format!("{}.pool", pool.name);
                (name.clone(), builder.node("GlobalAveragePool", name, &[&outputs[pool.input]], vec![]))
            }
        };
        let lattice = match node.quantizer() {
            // The lattice of an activation quantizer does not depend on the values.
            Some(quantizer) => quantizer.output_lattice()?,
            None => None,
        };
        // min(φ(x), cap) = φ(min(x, cap)) if the cap is one of φ's values. With the Min before the
        // activation, runtimes do not take the activation for one that their quantized convolution
        // has built in.
        let x = match node.unit().and_then(|unit| unit.cap.as_ref()) {
            Some(cap) => {
                let cap = builder.tensor(format!("{name}.cap"), &cap.reshape((1, (), 1, 1))?)?;
                builder.node("Min", format!("{name}.capped"), &[&x, &cap], vec![])
            }
            None => x,
        };
        let in_float = node.unit().is_some_and(|unit| unit.weight_quantizer.is_none());
        let x = activation(&mut builder, &name, x, node.activation(), lattice.as_ref(), in_float);
        outputs.push(match lattice {
            Some(lattice) => quantized(&mut builder, &name, x, &lattice),
            None => x,
        });
    }
    builder.node("Flatten", LOGITS, &[&outputs[network.last()]], vec![int("axis", 1)]);
    let entry = |key: &str, value: String| Entry { key: key.into(), value };
    let metadata = vec![
        entry("network", network.name.clone()),
        entry("macs", network.macs().to_string()),
        entry("weights", network.weights().to_string()),
    ];
    let input = (IMAGES, [channels, height, width]);
    Ok(builder.finish(&network.name, input, (LOGITS, network.classes()), metadata))
}

/// Adds a convolution and its normalization, and returns the name of the output.
fn unit(builder: &mut Builder, unit: &Unit, x: &str, epsilon: f64, options: &Options) -> Result<String> {
    let name = &unit.name;
    let levels = unit.weight_levels(epsilon)?;
    // What remains to be done after the convolution, and the factor of its weights.
    let (mut norm, mut bias, mut scale) = match &unit.norm {
        Norm::Batch(norm) => (Some(norm), None, None),
        Norm::Bias(bias) => (None, Some(bias.clone()), None),
    };
    let folded = levels.as_ref().is_some_and(|levels| levels.folded);
    if let Some(batch) = norm.filter(|_| options.fold || folded) {
        let (factor, shift) = batch.affine(epsilon)?;
        (norm, bias, scale) = (None, Some(shift), Some(factor).filter(|_| !folded));
    }
    let weight = match &levels {
        Some(levels) => dequantized(builder, unit, levels, scale.as_ref())?,
        None => {
            let weight = match &scale {
                Some(scale) => unit.weight.broadcast_mul(scale)?,
                None => unit.weight.clone(),
            };
            builder.tensor(format!("{name}.weight"), &unit.in_pytorch_layout(&weight)?)?
        }
    };
    // After quantized weights, ONNX Runtime rounds a convolution's bias to a multiple of the
    // product of both steps. It does not round a separate Add.
    let apart = bias.take_if(|_| levels.is_some() && !options.fold);
    let z = convolution(builder, unit, x, &weight, bias.as_ref())?;
    if let Some(bias) = apart {
        let bias = builder.tensor(format!("{name}.bias"), &bias.reshape((1, (), 1, 1))?)?;
        return Ok(builder.node("Add", format!("{name}.biased"), &[&z, &bias], vec![]));
    }
    let Some(BatchNorm { gamma, beta, mean, variance }) = norm else { return Ok(z) };
    let mut inputs = vec![z];
    for (field, tensor) in [("gamma", gamma), ("beta", beta), ("mean", mean), ("variance", variance)] {
        inputs.push(builder.tensor(format!("{name}.{field}"), tensor)?);
    }
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    Ok(builder.node("BatchNormalization", format!("{name}.norm"), &inputs, vec![float("epsilon", epsilon)]))
}

/// Adds weights from their levels and returns their name. If there is a `scale` `[C_out]`, each
/// filter is multiplied by its factor.
///
/// ONNX Runtime's integer convolution (1.32) uses the first filter's zero point for all filters. So
/// if the zero points differ, they become a part of the added offset, and a negative factor gives a
/// negative step instead of reversed levels. ONNX Runtime rounds biases to multiples of the steps,
/// so a step of 0 would remove the bias. A filter with a factor of 0 therefore keeps its step and
/// has zero weights.
fn dequantized(
    builder: &mut Builder,
    unit: &Unit,
    WeightLevels { levels, lattice, .. }: &WeightLevels,
    scale: Option<&Tensor>,
) -> Result<String> {
    let name = &unit.name;
    let Lattice { mut steps, mut zero_points, offset, max_level } = lattice.clone();
    let mut offsets = vec![offset];
    let mut levels = levels.clone();
    if let Some(scale) = scale {
        let zeros =
            Tensor::new(zero_points.iter().map(|&z| f32::from(z)).collect::<Vec<_>>(), levels.device())?;
        let none = scale.eq(0.0)?.broadcast_as(levels.shape())?;
        levels = none.where_cond(&zeros.broadcast_as(levels.shape())?, &levels)?;
        let factors: Vec<f32> = scale.to_vec1()?;
        let of_each = |values: &[f32]| -> Vec<f32> {
            factors.iter().enumerate().map(|(i, factor)| factor * values[i.min(values.len() - 1)]).collect()
        };
        offsets = of_each(&offsets);
        let scaled = of_each(&steps).into_iter().enumerate();
        steps = scaled.map(|(i, new)| if new == 0.0 { steps[i.min(steps.len() - 1)] } else { new }).collect();
    }
    if zero_points.iter().any(|&zero_point| zero_point != zero_points[0]) {
        let each = zero_points.iter().zip(&steps).enumerate();
        offsets = each
            .map(|(i, (&zero_point, step))| offsets[i.min(offsets.len() - 1)] - step * f32::from(zero_point))
            .collect();
        zero_points.fill(0);
    }
    zero_points.resize(steps.len(), zero_points[0]);
    let (dims, axis) = match steps.len() {
        1 => (vec![], vec![]),
        filters => (vec![filters], vec![int("axis", 0)]),
    };
    let levels = unit.in_pytorch_layout(&levels)?;
    let stored: Vec<u8> = levels.to_dtype(DType::U8)?.flatten_all()?.to_vec1()?;
    let stored = builder.levels(format!("{name}.weight"), levels.dims(), &stored, max_level);
    let step = builder.floats(format!("{name}.weight_step"), &dims, &steps);
    let zero_point = builder.levels(format!("{name}.weight_zero_point"), &dims, &zero_points, max_level);
    let inputs = [stored.as_str(), &step, &zero_point];
    let weight = builder.node("DequantizeLinear", format!("{name}.weight_dequantized"), &inputs, axis);
    if offsets.iter().all(|&offset| offset == 0.0) {
        return Ok(weight);
    }
    let dims = if offsets.len() == 1 { vec![] } else { vec![offsets.len(), 1, 1, 1] };
    let offset = builder.floats(format!("{name}.weight_offset"), &dims, &offsets);
    Ok(builder.node("Add", format!("{name}.weight_value"), &[&weight, &offset], vec![]))
}

fn convolution(
    builder: &mut Builder,
    unit: &Unit,
    x: &str,
    weight: &str,
    bias: Option<&Tensor>,
) -> Result<String> {
    let (side, stride) = (unit.kernel.side(), unit.kernel.stride());
    let groups = if unit.kernel.is_depthwise() { unit.filters() } else { 1 };
    let attributes = vec![
        ints("kernel_shape", &[side; 2]),
        ints("strides", &[stride; 2]),
        ints("pads", &[(side - 1) / 2; 4]),
        int("group", groups),
    ];
    let bias = bias.map(|bias| builder.tensor(format!("{}.bias", unit.name), bias)).transpose()?;
    let inputs: Vec<&str> = [x, weight].into_iter().chain(bias.as_deref()).collect();
    Ok(builder.node("Conv", &unit.name, &inputs, attributes))
}

/// Adds φ, and clips to the range of the lattice if it has fewer levels than a byte. Returns the
/// name of the output.
///
/// Levels of activations are bytes at every width. ONNX Runtime (1.32) refuses a QuantizeLinear to
/// 4 bits after a Clip or a Relu, and clipping first gives the same levels. Between a float
/// convolution (`in_float`) and a QuantizeLinear, Max and Min do the clipping: ONNX Runtime
/// quantizes the weights of a convolution whose output goes through a Clip to a QuantizeLinear.
fn activation(
    builder: &mut Builder,
    name: &str,
    x: String,
    activation: Activation,
    lattice: Option<&Lattice>,
    in_float: bool,
) -> String {
    let (mut low, mut high) = activation.bounds();
    if let Some(lattice) = lattice.filter(|lattice| lattice.max_level < u8::MAX) {
        let range = lattice.range();
        // An activation's bound that lies outside of the lattice's range becomes the nearest end of
        // the range.
        (low, high) = (low.max(range.0).min(range.1), high.min(range.1).max(range.0));
    }
    let name = format!("{name}.activation");
    match (low.is_finite(), high.is_finite()) {
        _ if in_float && lattice.is_some() => {
            let low = builder.floats(format!("{name}.min"), &[], &[low]);
            let high = builder.floats(format!("{name}.max"), &[], &[high]);
            let x = builder.node("Max", format!("{name}.low"), &[&x, &low], vec![]);
            builder.node("Min", name, &[&x, &high], vec![])
        }
        (false, false) => x,
        (true, false) if low == 0.0 => builder.node("Relu", name, &[&x], vec![]),
        _ => {
            let mut bound = |field: &str, value: f32| match value.is_finite() {
                true => builder.floats(format!("{name}.{field}"), &[], &[value]),
                false => String::new(),
            };
            let (low, high) = (bound("min", low), bound("max", high));
            builder.node("Clip", name, &[&x, &low, &high], vec![])
        }
    }
}

/// Adds the rounding to the nearest values of the lattice, and returns the name of the output.
fn quantized(builder: &mut Builder, name: &str, mut x: String, lattice: &Lattice) -> String {
    let offset =
        (lattice.offset != 0.0).then(|| builder.floats(format!("{name}.offset"), &[], &[lattice.offset]));
    if let Some(offset) = &offset {
        x = builder.node("Sub", format!("{name}.centred"), &[&x, offset], vec![]);
    }
    let step = builder.floats(format!("{name}.step"), &[], &lattice.steps);
    let zero_point = builder.bytes(format!("{name}.zero_point"), &[], &lattice.zero_points);
    x = builder.node("QuantizeLinear", format!("{name}.quantized"), &[&x, &step, &zero_point], vec![]);
    x = builder.node("DequantizeLinear", format!("{name}.dequantized"), &[&x, &step, &zero_point], vec![]);
    if let Some(offset) = &offset {
        x = builder.node("Add", format!("{name}.value"), &[&x, offset], vec![]);
    }
    x
}
