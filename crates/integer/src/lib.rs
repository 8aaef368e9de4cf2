//! Integer evaluation of quantized networks.
//!
//! Training simulates quantization with floats that lie on a lattice. [`Engine`] computes with the
//! levels themselves, as an integer inference engine does. Levels have 8 bits or fewer, and
//! products are summed in 32 bits. A multiplier of [`MULTIPLIER_BITS`] bits, an addition and a
//! shift, in 64 bits, turn these sums into the next levels. There is no float between the image's
//! levels and the logits.
//!
//! A value that is not quantized, such as the branch of a residual, has [`FRACTION`] fractional
//! bits relative to a level of the sum. Logits have 16 fractional bits.

#![forbid(unsafe_code)]

mod rescale;

use candle_core::{DType, Device, Tensor};
use models::{Kernel, Lattice, Network, Node, Norm, Quantizer, Unit};
use rayon::prelude::*;
use rescale::Rescale;

pub use rescale::MULTIPLIER_BITS;

/// The number of fractional bits of a summand that is not quantized, relative to a level of the
/// sum.
///
/// This leaves 11 bits for the integer part. With 12 fractional bits, about one level in eight
/// thousand would differ from the simulation.
pub const FRACTION: u32 = 20;

/// The number of fractional bits of a logit.
const LOGIT_FRACTION: u32 = 16;

/// The reasons why a network can't be evaluated with integers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A network operation failed.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A weight or an output is not quantized.
    #[error(
        "{place}: {what} is not quantized: quantize the weights and activations of the network first (pfq quantize or \
         pfq tune)"
    )]
    Float {
        /// The node's name.
        place: String,
        /// Which tensor: the weight, the output or the image.
        what: &'static str,
    },
    /// Integers may overflow, or a factor is not finite.
    #[error("{place}: sums may need more than 32 bits, or steps, γ or β are not finite")]
    Range {
        /// The node's name.
        place: String,
    },
    /// The images have the wrong size.
    #[error("images of the shape {found:?}: expected [N, {0}, {1}, {2}]", expected[0], expected[1], expected[2])]
    Images {
        /// The shape of the images.
        found: Vec<usize>,
        /// The height, width and channels of the network's input.
        expected: [usize; 3],
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A quantized network that is evaluated with integers.
#[derive(Debug)]
pub struct Engine {
    input: [usize; 3],
    image: Quantizer,
    image_scale: Scale,
    logit_scale: Scale,
    /// The steps of every node except the image.
    steps: Vec<Step>,
    /// The height, width and channels of each node's output.
    shapes: Vec<[usize; 3]>,
}

/// The meaning and range of the integers `u` of a node's output: `u` stands for the value
/// `offset + step·u`. For a quantized output, `u` is the level minus the zero point.
#[derive(Debug, Clone, Copy)]
struct Scale {
    step: f64,
    offset: f64,
    lowest: i64,
    highest: i64,
}

impl Scale {
    fn of(lattice: &Lattice) -> Self {
        let zero = i64::from(lattice.zero_points[0]);
        Self {
            step: lattice.steps[0].into(),
            offset: lattice.offset.into(),
            lowest: -zero,
            highest: i64::from(lattice.max_level) - zero,
        }
    }

    /// Returns the scale of 32-bit integers for an output that is not quantized.
    fn fine(step: f64) -> Self {
        Self { step, offset: 0.0, lowest: i32::MIN.into(), highest: i32::MAX.into() }
    }

    /// Returns the scale with its range limited to the bounds of an activation.
    fn within(self, (low, high): (f32, f32)) -> Self {
        let level = |bound: f32| ((f64::from(bound) - self.offset) / self.step).round_ties_even();
        let bounded = |bound: f32| level(bound).clamp(self.lowest as f64, self.highest as f64) as i64;
        Self { lowest: bounded(low), highest: bounded(high), ..self }
    }

    /// Returns the largest absolute value of the integers.
    fn most(self) -> f64 {
        self.lowest.unsigned_abs().max(self.highest.unsigned_abs()) as f64
    }

    fn clamp(self, number: i64) -> i32 {
        number.clamp(self.lowest, self.highest) as i32
    }
}

/// The computation of a node.
#[derive(Debug)]
enum Step {
    Unit(Convolution),
    Sum { inputs: [usize; 2], rescale: Rescale<2>, output: Scale },
    Pool { input: usize, rescale: Rescale<1>, output: Scale },
}

/// A convolution, its normalization and its requantization.
#[derive(Debug)]
struct Convolution {
    input: usize,
    kernel: Kernel,
    /// The levels minus the zero point, as `[taps·C_in, C_out]` or `[taps, C]`.
    weights: Vec<i16>,
    /// The requantization of each filter, from the four sums of [`Sums`] and the number of
    /// products.
    rescale: Vec<Rescale<4>>,
    /// Whether the sum of the inputs and the sum of the weights are needed: each is if the other
    /// operand's lattice has an offset.
    sums_inputs: bool,
    sums_weights: bool,
    /// The output scale of each filter, which may have its own cap.
    outputs: Vec<Scale>,
}

/// For each filter, the sums of the products, the inputs and the weights over the taps inside the
/// map.
struct Sums {
    products: Vec<i32>,
    inputs: Vec<i32>,
    weights: Vec<i32>,
}

impl Engine {
    /// Returns the engine for a network whose activations and weights are all quantized.
    ///
    /// # Errors
    /// [`Error::Float`] if something is not quantized, [`Error::Range`] if numbers are too large.
    pub fn new(network: &Network) -> Result<Self> {
        let network = &network.to_device(&Device::Cpu)?;
        let shapes = network.shapes();
        let readers = network.readers();
        let mut scales: Vec<Scale> = Vec::new();
        let mut image = None;
        let mut steps = Vec::new();
        for (index, node) in network.nodes.iter().enumerate() {
            let place = node.name();
            let output = match node.quantizer() {
                Some(quantizer) => lattice(quantizer, node)?,
                None if index == network.last() => Scale::fine(2f64.powi(-(LOGIT_FRACTION as i32))),
                // An output that only sums read gets a scale relative to the first of these sums.
                None => {
                    let sums = readers[index].iter().map(|&reader| match &network.nodes[reader] {
                        Node::Sum(sum) => sum.quantizer.as_ref(),
                        _ => None,
                    });
                    let sums: Option<Vec<&Quantizer>> = sums.collect();
                    let first = sums.as_deref().and_then(<[_]>::first).copied();
                    Scale::fine(
                        lattice(first.ok_or_else(|| float(node))?, node)?.step
                            * 2f64.powi(-(FRACTION as i32)),
                    )
                }
            };
            let output = output.within(node.activation().bounds());
            match node {
                Node::Image(_) => image = node.quantizer().cloned(),
                Node::Unit(unit) => {
                    let unit = Convolution::new(unit, scales[unit.input], output, network.epsilon)?;
                    steps.push(Step::Unit(unit));
                }
                Node::Sum(sum) => {
                    let [a, b] = sum.inputs.map(|input| scales[input]);
                    let ratios = [a, b].map(|scale| scale.step / output.step);
                    let added = (a.offset + b.offset - output.offset) / output.step;
                    let rescale = Rescale::new(ratios, added, [a.most(), b.most()], place)?;
                    steps.push(Step::Sum { inputs: sum.inputs, rescale, output });
                }
                Node::Pool(pool) => {
                    let (x, [height, width, _]) = (scales[pool.input], shapes[pool.input]);
                    let area = (height * width) as f64;
                    let added = (x.offset - output.offset) / output.step;
                    let rescale =
                        Rescale::new([x.step / output.step / area], added, [x.most() * area], place)?;
                    steps.push(Step::Pool { input: pool.input, rescale, output });
                }
            }
            scales.push(output);
        }
        let image = image.ok_or_else(|| float(&network.nodes[0]))?;
        let (image_scale, logit_scale) = (scales[0], scales[network.last()]);
        Ok(Self { input: network.input, image, image_scale, logit_scale, steps, shapes })
    }

    /// Returns the logits `[N, classes]` of normalized images `[N, H, W, C]`, whose levels are
    /// those of the simulation.
    pub fn logits(&self, images: &Tensor) -> Result<Tensor> {
        let [height, width, channels] = self.input;
        if images.dims().get(1..) != Some(&self.input) {
            return Err(Error::Images { found: images.dims().into(), expected: self.input });
        }
        let Scale { step, offset, .. } = self.image_scale;
        let images = self.image.apply(&images.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)?;
        let values = images.flatten_all()?.to_vec1::<f32>()?;
        let one = height * width * channels;
        let logits: Vec<Vec<f32>> = values
            .par_chunks(one)
            .map(|image| {
                let level = |&value: &f32| ((f64::from(value) - offset) / step).round() as i64;
                self.run(image.iter().map(|value| self.image_scale.clamp(level(value))).collect())
            })
            .collect();
        let count = logits.len();
        Ok(Tensor::from_vec(logits.concat(), (count, self.shapes[self.shapes.len() - 1][2]), &Device::Cpu)?)
    }

    /// Returns the logits of an image that is given as integers.
    fn run(&self, image: Vec<i32>) -> Vec<f32> {
        let Scale { step, offset, .. } = self.logit_scale;
        let value = |logit| logit as f32 * step as f32 + offset as f32;
        self.outputs(image).pop().unwrap_or_default().into_iter().map(value).collect()
    }

    /// Returns the integers of every node's output.
    fn outputs(&self, image: Vec<i32>) -> Vec<Vec<i32>> {
        let mut outputs = vec![image];
        for step in &self.steps {
            let index = outputs.len();
            outputs.push(match step {
                Step::Unit(unit) => {
                    unit.run(&outputs[unit.input], self.shapes[unit.input], self.shapes[index])
                }
                Step::Sum { inputs: [a, b], rescale, output } => {
                    let pairs = outputs[*a].iter().zip(&outputs[*b]);
                    pairs.map(|(&a, &b)| output.clamp(rescale.apply([a.into(), b.into()]))).collect()
                }
                Step::Pool { input, rescale, output } => {
                    let channels = self.shapes[*input][2];
                    let mut sums = vec![0; channels];
                    for pixel in outputs[*input].chunks_exact(channels) {
                        sums.iter_mut().zip(pixel).for_each(|(sum, &x)| *sum += i64::from(x));
                    }
                    sums.into_iter().map(|sum| output.clamp(rescale.apply([sum]))).collect()
                }
            });
        }
        outputs
    }
}

/// Returns the scale of an activation quantizer.
fn lattice(quantizer: &Quantizer, node: &Node) -> Result<Scale> {
    let lattice = quantizer.output_lattice()?;
    lattice.as_ref().map(Scale::of).ok_or_else(|| float(node))
}

/// Returns the error that the output of a node is not quantized.
fn float(node: &Node) -> Error {
    let what = if matches!(node, Node::Image(_)) { "the image" } else { "the output" };
    Error::Float { place: node.name().into(), what }
}

impl Convolution {
    fn new(unit: &Unit, x: Scale, output: Scale, epsilon: f64) -> Result<Self> {
        let place = unit.name.as_str();
        let levels = unit.weight_levels(epsilon)?;
        let levels = levels.ok_or_else(|| Error::Float { place: place.into(), what: "the weight" })?;
        let filters = unit.filters();
        let zeros: Vec<f32> = levels.lattice.zero_points.iter().map(|&zero| f32::from(zero)).collect();
        let centred = levels.levels.broadcast_sub(&Tensor::new(zeros, &Device::Cpu)?)?;
        let weights: Vec<i16> =
            centred.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|level| level as i16).collect();
        // What remains to be done after the convolution.
        let (factor, shift) = match &unit.norm {
            Norm::Bias(bias) => (vec![1.0; filters], bias.to_vec1::<f32>()?),
            Norm::Batch(norm) => {
                let (factor, shift) = norm.affine(epsilon)?;
                let factor = if levels.folded { vec![1.0; filters] } else { factor.to_vec1::<f32>()? };
                (factor, shift.to_vec1::<f32>()?)
            }
        };
        let offset = f64::from(levels.lattice.offset);
        let taps = (weights.len() / filters) as f64;
        let mut sizes = vec![0.0; filters];
        for row in weights.chunks_exact(filters) {
            sizes.iter_mut().zip(row).for_each(|(size, &weight)| *size += f64::from(weight.unsigned_abs()));
        }
        let of_filter = |filter: usize| {
            let steps = &levels.lattice.steps;
            let step = f64::from(steps[filter.min(steps.len() - 1)]);
            let factor = f64::from(factor[filter]) / output.step;
            let ratios = [x.step * step, x.step * offset, x.offset * step, x.offset * offset];
            let most = [x.most() * sizes[filter], x.most() * taps, sizes[filter], taps];
            if most.iter().any(|&most| most >= 2f64.powi(31)) {
                return Err(Error::Range { place: place.into() });
            }
            let added = (f64::from(shift[filter]) - output.offset) / output.step;
            Rescale::new(ratios.map(|ratio| ratio * factor), added, most, place)
        };
        let rescale = (0..filters).map(of_filter).collect::<Result<_>>()?;
        // The level of the smaller of two values is the smaller of their levels.
        let outputs = match &unit.cap {
            None => vec![output; filters],
            Some(caps) => {
                let capped = |cap| output.within((f32::NEG_INFINITY, cap));
                caps.to_vec1::<f32>()?.into_iter().map(capped).collect()
            }
        };
        Ok(Self {
            input: unit.input,
            kernel: unit.kernel,
            weights,
            rescale,
            sums_inputs: offset != 0.0,
            sums_weights: x.offset != 0.0,
            outputs,
        })
    }

    fn run(
        &self,
        x: &[i32],
        [height, width, channels]: [usize; 3],
        [rows, columns, filters]: [usize; 3],
    ) -> Vec<i32> {
        // Levels have at most 8 bits.
        let x: Vec<i16> = x.iter().map(|&x| x as i16).collect();
        let (side, stride) = (self.kernel.side(), self.kernel.stride());
        let padding = (side - 1) / 2;
        let mut output = Vec::with_capacity(rows * columns * filters);
        let zeros = || vec![0; filters];
        let mut sums = Sums { products: zeros(), inputs: zeros(), weights: zeros() };
        for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
            sums.products.fill(0);
            sums.inputs.fill(0);
            sums.weights.fill(0);
            let mut taps = 0;
            for tap in 0..side * side {
                let place = |at: usize, tap: usize, end: usize| {
                    (at * stride + tap).checked_sub(padding).filter(|&place| place < end)
                };
                let (Some(y), Some(z)) = (place(row, tap / side, height), place(column, tap % side, width))
                else {
                    continue;
                };
                let pixel = &x[(y * width + z) * channels..][..channels];
                taps += self.add(tap, pixel, filters, &mut sums);
            }
            for (filter, (rescale, scale)) in self.rescale.iter().zip(&self.outputs).enumerate() {
                let Sums { products, inputs, weights } = &sums;
                let sums = [products[filter].into(), inputs[filter].into(), weights[filter].into(), taps];
                output.push(scale.clamp(rescale.apply(sums)));
            }
        }
        output
    }

    /// Adds the terms of one tap to the sums, and returns the number of products of each filter.
    fn add(&self, tap: usize, pixel: &[i16], filters: usize, sums: &mut Sums) -> i64 {
        if self.kernel.is_depthwise() {
            let weights = &self.weights[tap * filters..][..filters];
            for (sum, (&x, &w)) in sums.products.iter_mut().zip(pixel.iter().zip(weights)) {
                *sum += i32::from(x) * i32::from(w);
            }
            if self.sums_inputs {
                sums.inputs.iter_mut().zip(pixel).for_each(|(sum, &x)| *sum += i32::from(x));
            }
            if self.sums_weights {
                sums.weights.iter_mut().zip(weights).for_each(|(sum, &w)| *sum += i32::from(w));
            }
            return 1;
        }
        let weights = &self.weights[tap * pixel.len() * filters..][..pixel.len() * filters];
        for (&x, weights) in pixel.iter().zip(weights.chunks_exact(filters)) {
            // After a ReLU, about half of the inputs are zero.
            if x != 0 {
                for (sum, &w) in sums.products.iter_mut().zip(weights) {
                    *sum += i32::from(x) * i32::from(w);
                }
            }
            if self.sums_weights {
                sums.weights.iter_mut().zip(weights).for_each(|(sum, &w)| *sum += i32::from(w));
            }
        }
        if self.sums_inputs {
            let sum: i32 = pixel.iter().map(|&x| i32::from(x)).sum();
            sums.inputs.iter_mut().for_each(|all| *all += sum);
        }
        pixel.len() as i64
    }
}
