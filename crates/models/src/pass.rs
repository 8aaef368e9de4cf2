//! The forward and backward passes. The forward pass fills a tape with what each node's gradient
//! needs, and the backward pass walks it once in reverse.
//!
//! The order within a node is that of [`Node`]: the operation, the activation, the quantizer. If
//! the quantizer of a unit or a sum is uniform, the kernel that applies the activation also
//! quantizes ([`Node::fused`]) and returns levels. Every other quantizer takes the floats that the
//! kernel returns, and so does the quantizer of a unit with caps, which come before it.
//!
//! A pass runs on the network's device ([`Network::to_device`]), which must also hold the images.
//! Feature maps and their gradients are stored in the images' dtype: `F32`, or `BF16`, which halves
//! the memory traffic and, on a GPU, needs compute capability 8.0 or higher. Parameters, their
//! gradients, statistics and everything from the pooled features on are always `F32`. Nothing in a
//! pass waits for the GPU.

use crate::quantizer::Quantized;
use crate::{BatchNorm, Fold, Gradients, Kernel, Network, Node, Norm, Quantizer, Result, Sum, Unit};
use candle_core::{DType, Tensor};
use kernels::convolution::{self, Below};
use kernels::norm::{self, BatchNormalization, DeferredGradient, Epilogue, MapGradient, Running, Stats};
use kernels::{Activation, FeatureMap, Weight, bias, cap, pool, quantize, residual};
use ranks::Ranks;
use std::ops::Index;

/// The momentum of batch normalization's running statistics, as in PyTorch.
const NORM_MOMENTUM: f64 = 0.1;

/// How a training step computes statistics and updates the network's moving averages.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The fraction by which a batch moves the activation ranges.
    pub range_momentum: f64,
    /// The ranks that hold the other parts of the batch, if the images are a part of one and
    /// statistics and extremes must be those of the whole batch.
    pub together: Option<&'a dyn Ranks>,
}

impl<'a> Step<'a> {
    /// Returns a step whose statistics are those of its own images.
    pub const fn alone(range_momentum: f64) -> Self {
        Self { range_momentum, together: None }
    }

    /// Returns the statistics of the batch and the number of its rows, given those of the local
    /// images.
    fn stats(&self, stats: Stats, rows: usize) -> Result<(Stats, usize)> {
        let Some(ranks) = self.together else { return Ok((stats, rows)) };
        Ok(Stats::merged(&ranks.gather(&stats.to_values(rows)?), stats.mean.elem_count())?)
    }

    /// Returns the extremes `[2]` of a tensor over the batch, given those of the local images.
    fn extremes(&self, extremes: Tensor) -> Result<Tensor> {
        let Some(ranks) = self.together else { return Ok(extremes) };
        crate::agree::widest(ranks, &extremes)
    }
}

/// An observer of a forward pass, which is called as `observe(node, z, y)`.
///
/// `node` is the node's index and `y` its output. `z` is the convolution's output before the
/// normalization, if the node is a convolution.
pub type Observer<'a> = dyn FnMut(usize, Option<&Tensor>, &Tensor) -> Result<()> + 'a;

/// The outputs of the nodes. Each is kept until its last reader is done.
struct Outputs<T> {
    readers: Vec<Vec<usize>>,
    outputs: Vec<Option<T>>,
}

impl<T> Outputs<T> {
    fn new(network: &Network) -> Self {
        Self { readers: network.readers(), outputs: Vec::new() }
    }

    /// Adds the next node's output, and drops the outputs that no later node reads.
    fn push(&mut self, node: &Node, output: T) {
        let i = self.outputs.len();
        self.outputs.push(Some(output));
        for &input in node.inputs() {
            if self.readers[input].last() == Some(&i) {
                self.outputs[input] = None;
            }
        }
    }

    /// Returns the last node's output.
    fn into_last(mut self) -> T {
        self.outputs.pop().flatten().expect("a network has nodes, and nothing reads the last one")
    }
}

impl<T> Index<usize> for Outputs<T> {
    type Output = T;

    fn index(&self, node: usize) -> &T {
        self.outputs[node].as_ref().expect("it is kept until its last reader is done")
    }
}

/// The readers of a unit's output in a training step, which determine where it is normalized.
#[derive(Clone, Copy)]
enum Readers {
    /// Only a sum reads it, and the unit ends with its normalization: the sum normalizes while it
    /// adds.
    Sum,
    /// One node reads it and may normalize while it reads.
    One,
    /// Several nodes or no node read it.
    Several,
}

/// The output of a node in a training step.
enum Output {
    Map(FeatureMap),
    /// Levels, and the map that the backward pass reads instead.
    Levels {
        now: FeatureMap,
        later: FeatureMap,
    },
    /// `scale·z + shift`, which the sum that reads it computes.
    Affine {
        z: Tensor,
        scale: Tensor,
        shift: Tensor,
    },
}

impl Output {
    fn map(&self) -> Result<FeatureMap> {
        Ok(match self {
            Self::Map(map) | Self::Levels { now: map, .. } => map.clone(),
            Self::Affine { z, scale, shift } => norm::forward(z, scale, shift, Activation::Identity, None)?,
        })
    }
}

/// The weights that the products use.
struct UsedWeight {
    /// The network's own tensor.
    parameter: Tensor,
    value: Tensor,
    /// The record of the quantization, if there was one.
    quantized: Option<Quantized>,
    /// Whether `value` was divided by a folding factor after quantization, so that it is not on a
    /// single grid.
    divided: bool,
}

/// The record of a forward pass for the backward pass.
pub struct Tape<'a> {
    /// One record for each node.
    records: Vec<Record>,
    readers: Vec<Vec<usize>>,
    /// The ranks of [`Step::together`].
    together: Option<&'a dyn Ranks>,
}

/// The data that one node's backward pass needs.
enum Record {
    Image,
    Unit(UnitRecord),
    Sum(SumRecord),
    Pool { input: usize, size: (usize, usize), dtype: DType, quantized: Option<Quantized> },
}

struct UnitRecord {
    input: usize,
    /// The input that the convolution reads in the backward pass.
    x: FeatureMap,
    kernel: Kernel,
    weight: UsedWeight,
    /// γ, if the convolution was normalized, and β or the bias.
    gamma: Option<Tensor>,
    shift: Tensor,
    /// The convolution by the float weights, whose statistics fold the filters, with
    /// [`Fold::FloatStatistics`].
    float: Option<FloatConvolution>,
    /// The operations after the convolution, as the forward pass applied them.
    epilogue: Epilogue,
    /// The capped output and the caps, if there are any.
    capped: Option<[Tensor; 2]>,
    /// The record of the quantizer, if it is not a part of the epilogue.
    quantized: Option<Quantized>,
}

/// A convolution by the float weights, and its normalization with the batch's statistics.
struct FloatConvolution {
    z: Tensor,
    norm: BatchNormalization,
}

struct SumRecord {
    inputs: [usize; 2],
    /// The unit whose normalization the sum computed, if there is one.
    normalized: Option<usize>,
    /// The activation, if there is one.
    activated: Option<Epilogue>,
    quantized: Option<Quantized>,
}

impl UsedWeight {
    /// Returns the weights as the operand of a convolution.
    fn operand(&self) -> Weight<'_> {
        let quantized = self.quantized.as_ref().filter(|_| !self.divided).and_then(Quantized::on_grid);
        Weight { value: &self.value, quantized }
    }
}

impl Unit {
    /// Returns `γ/√(V+ε)` of each filter if the unit's quantizer is that of folded weights.
    pub(crate) fn folding_factor(&self, epsilon: f64) -> Result<Option<Tensor>> {
        let quantizer = self.weight_quantizer.as_ref();
        let norm = self.batch_norm().filter(|_| quantizer.is_some_and(Quantizer::folded));
        norm.map(|norm| norm.scale(epsilon)).transpose()
    }

    /// Returns the weights that the products use, quantized if the unit has a quantizer. The
    /// running statistics of batch normalization give the folding factor.
    fn used_weight(&self, epsilon: f64) -> Result<UsedWeight> {
        let factor = self.folding_factor(epsilon)?;
        let mut used = self.quantized_weight(factor.as_ref())?;
        if let Some(factor) = factor {
            // A factor is 0 if the filter's γ is 0. Its weights are 0 already.
            let divisor = (&factor + factor.eq(0.0)?.to_dtype(factor.dtype())?)?;
            (used.value, used.divided) = (used.value.broadcast_div(&divisor)?, true);
        }
        Ok(used)
    }

    /// Returns the weights times a factor for each filter, quantized if the unit has a quantizer.
    fn quantized_weight(&self, factor: Option<&Tensor>) -> Result<UsedWeight> {
        let parameter = self.weight.clone();
        let value = factor.map_or(Ok(parameter.clone()), |factor| parameter.broadcast_mul(factor))?;
        let quantized =
            self.weight_quantizer.as_ref().map(|quantizer| quantizer.forward(&value)).transpose()?;
        let (value, quantized) =
            quantized.map_or((value, None), |(value, quantized)| (value, Some(quantized)));
        Ok(UsedWeight { parameter, value, quantized, divided: false })
    }

    /// Computes the convolution of `x[N, H, W, C]` by the float weights, if its statistics fold the
    /// filters, and updates the running statistics.
    fn float_convolution(
        &self,
        x: &FeatureMap,
        epsilon: f64,
        step: Step<'_>,
    ) -> Result<Option<FloatConvolution>> {
        let fold = self.weight_quantizer.as_ref().map(Quantizer::fold);
        match &self.norm {
            Norm::Batch(norm) if fold == Some(Fold::FloatStatistics) => {
                let (z, stats) = convolution::forward_stats(self.kernel, x.clone(), &self.weight)?;
                let (norm, _) = norm.prepare(&z, stats, epsilon, step)?;
                Ok(Some(FloatConvolution { z, norm }))
            }
            _ => Ok(None),
        }
    }

    /// Returns the output for `x` with the running statistics, but without a quantizer that is not
    /// fused.
    ///
    /// If `observed`, it also returns the convolution's output, which otherwise is never in memory
    /// as a whole.
    fn evaluate(
        &self,
        x: &FeatureMap,
        quant: Option<kernels::Quantizer<'_>>,
        epsilon: f64,
        observed: bool,
    ) -> Result<(Option<Tensor>, FeatureMap)> {
        let weight = self.used_weight(epsilon)?;
        let (kernel, act) = (self.kernel, self.activation);
        let (scale, shift) = match &self.norm {
            Norm::Batch(norm) => norm.affine(epsilon)?,
            Norm::Bias(bias) => (bias.ones_like()?, bias.clone()),
        };
        if !observed {
            let affine = (&scale, &shift);
            let y = convolution::forward_normalized(kernel, x, weight.operand(), affine, act, quant)?;
            return Ok((None, y));
        }
        let z = convolution::forward(kernel, x, weight.operand())?;
        let y = norm::forward(&z, &scale, &shift, act, quant)?;
        Ok((Some(z), y))
    }

    /// Returns a training step's output for `x`, and the data that its gradient needs.
    ///
    /// Batch normalization uses the batch's statistics, and updates the running ones.
    fn train(
        &mut self,
        x: FeatureMap,
        epsilon: f64,
        readers: Readers,
        step: Step<'_>,
    ) -> Result<(Output, UnitRecord)> {
        if let Some(quantizer) = &mut self.weight_quantizer {
            quantizer.settle(&self.weight)?;
        }
        let float = self.float_convolution(&x, epsilon, step)?;
        let weight = match &float {
            Some(float) => self.quantized_weight(Some(&float.norm.scale))?,
            None => self.used_weight(epsilon)?,
        };
        let (kernel, act, operand) = (self.kernel, self.activation, weight.operand());
        let bias = match (&float, &self.norm) {
            (Some(float), _) => Some(float.norm.shift.clone()),
            (None, Norm::Bias(bias)) => Some(bias.clone()),
            (None, Norm::Batch(_)) => None,
        };
        let (z, stats, batch, scale, shift) = match (bias, &self.norm) {
            (None, Norm::Batch(norm)) => {
                let (z, stats) = convolution::forward_stats(kernel, &x, operand)?;
                let (batch, stats) = norm.prepare(&z, stats, epsilon, step)?;
                let (scale, shift) = (batch.scale.clone(), batch.shift.clone());
                (z, Some(stats), Some(batch), scale, shift)
            }
            (bias, _) => {
                let bias = bias.expect("a unit without normalization has a bias");
                // Without normalization, only the quantizer's range needs the statistics.
                let (z, stats) = if self.output_quantizer.is_none() {
                    (convolution::forward(kernel, &x, operand)?, None)
                } else {
                    let (z, stats) = convolution::forward_stats(kernel, &x, operand)?;
                    let (stats, _) = step.stats(stats, z.elem_count() / bias.elem_count())?;
                    (z, Some(stats))
                };
                (z, stats, None, bias.ones_like()?, bias)
            }
        };
        if let (Some(quantizer), Some(stats), None) = (&mut self.output_quantizer, &stats, &self.cap) {
            let extremes = || Ok(norm::output_range(stats, &scale, &shift, act)?);
            quantizer.observe(extremes, step.range_momentum)?;
        }
        let quant = self.output_quantizer.as_ref().and_then(Quantizer::grid).filter(|_| self.cap.is_none());
        let epilogue = match &batch {
            Some(batch) => Epilogue::batch(&z, batch, act, quant)?,
            None => Epilogue::affine(&z, &scale, &shift, act, quant)?,
        };
        let mut capped = None;
        let (y, quantized) = match (&self.cap, readers, quant) {
            (Some(cap), ..) => {
                let y = norm::forward(&z, &scale, &shift, act, None)?.to_float()?;
                let y = cap::forward(&y, cap)?;
                capped = Some([y.clone(), cap.clone()]);
                let (y, quantized) = train_levels(y, None, &mut self.output_quantizer, step)?;
                (Output::Map(y), quantized)
            }
            (None, Readers::Sum, _) => (Output::Affine { z, scale, shift }, None),
            (None, _, Some(_)) => {
                let now = norm::forward(&z, &scale, &shift, act, quant)?;
                let later = norm::recomputed(&now, &z, &scale, &shift, act, quant)?;
                (Output::Levels { now, later }, None)
            }
            (None, readers, None) => {
                let y = match readers {
                    Readers::One => norm::deferred(&z, &scale, &shift, act)?,
                    _ => norm::forward(&z, &scale, &shift, act, None)?,
                };
                let (y, quantized) = train_quantizer(y, &mut self.output_quantizer, step)?;
                (Output::Map(y), quantized)
            }
        };
        let (gamma, shift) = match &self.norm {
            Norm::Batch(norm) => (Some(norm.gamma.clone()), norm.beta.clone()),
            Norm::Bias(bias) => (None, bias.clone()),
        };
        let input = self.input;
        Ok((y, UnitRecord { input, x, kernel, weight, gamma, shift, float, epilogue, capped, quantized }))
    }
}

impl BatchNorm {
    /// Returns the normalization of a training step and the batch's statistics, given the
    /// statistics of the local `z[N, H, W, C]`. Updates the running statistics.
    fn prepare(
        &self,
        z: &Tensor,
        stats: Stats,
        epsilon: f64,
        step: Step<'_>,
    ) -> Result<(BatchNormalization, Stats)> {
        let Self { gamma, beta, mean, variance } = self;
        let (stats, rows) = step.stats(stats, z.elem_count() / gamma.elem_count())?;
        let running = Running { mean: mean.clone(), variance: variance.clone() };
        Ok((norm::prepare(&stats, gamma, beta, epsilon, &running, NORM_MOMENTUM, rows)?, stats))
    }
}

impl Sum {
    /// Returns the sum of two maps, after the activation and without a quantizer that is not fused.
    fn evaluate(
        &self,
        [shortcut, branch]: [&FeatureMap; 2],
        quant: Option<kernels::Quantizer<'_>>,
    ) -> Result<FeatureMap> {
        if self.activation == Activation::Identity {
            return Ok(residual::add_quantize(&branch.to_float()?, shortcut, quant)?);
        }
        let sum = residual::add(&branch.to_float()?, shortcut)?;
        let (ones, zeros) = identity(&sum)?;
        Ok(norm::forward(&sum, &ones, &zeros, self.activation, quant)?)
    }

    /// Returns a training step's output, and the data that its gradient needs.
    fn train(&mut self, [shortcut, branch]: [&Output; 2], step: Step<'_>) -> Result<(FeatureMap, SumRecord)> {
        let (sum, mut extremes, normalized) = match (shortcut, branch) {
            (other, Output::Affine { z, scale, shift }) => {
                let (sum, extremes) = residual::add_normalized(z, scale, shift, &other.map()?)?;
                (sum, Some(extremes), Some(self.inputs[1]))
            }
            (Output::Affine { z, scale, shift }, other) => {
                let (sum, extremes) = residual::add_normalized(z, scale, shift, &other.map()?)?;
                (sum, Some(extremes), Some(self.inputs[0]))
            }
            (shortcut, branch) => (residual::add(&branch.map()?.to_float()?, &shortcut.map()?)?, None, None),
        };
        let (mut y, mut activated) = (sum, None);
        if self.activation != Activation::Identity {
            let (ones, zeros) = identity(&y)?;
            activated = Some(Epilogue::affine(&y, &ones, &zeros, self.activation, None)?);
            y = norm::forward(&y, &ones, &zeros, self.activation, None)?.to_float()?;
            extremes = None;
        }
        let (y, quantized) = train_levels(y, extremes, &mut self.quantizer, step)?;
        Ok((y, SumRecord { inputs: self.inputs, normalized, activated, quantized }))
    }
}

/// Returns the scale and shift of the identity normalization for a map's channels.
fn identity(map: &Tensor) -> Result<(Tensor, Tensor)> {
    let ones = Tensor::ones(map.dim(candle_core::D::Minus1)?, DType::F32, map.device())?;
    let zeros = ones.zeros_like()?;
    Ok((ones, zeros))
}

/// Quantizes like [`train_quantizer`], but a uniform quantizer observes `y` and returns levels.
/// `extremes` are those of `y`, if they are known.
fn train_levels(
    y: Tensor,
    extremes: Option<Tensor>,
    quantizer: &mut Option<Quantizer>,
    step: Step<'_>,
) -> Result<(FeatureMap, Option<Quantized>)> {
    if let Some(quantizer) = quantizer {
        let extremes = || extremes.map_or_else(|| quantize::min_max(&y), Ok);
        quantizer.observe(|| step.extremes(extremes()?), step.range_momentum)?;
    }
    let levels = quantizer.as_ref().map(|quantizer| quantizer.levels(&y)).transpose()?.flatten();
    match levels {
        Some((y, quantized)) => Ok((y, Some(quantized))),
        None => train_quantizer(FeatureMap::Float(y), quantizer, step),
    }
}

/// Applies a quantizer that is not fused to `y` in a training step.
///
/// Returns the quantized values and the data that their gradient needs, or `y` itself if there is
/// no quantizer.
fn train_quantizer(
    y: FeatureMap,
    quantizer: &mut Option<Quantizer>,
    step: Step<'_>,
) -> Result<(FeatureMap, Option<Quantized>)> {
    let Some(quantizer) = quantizer else { return Ok((y, None)) };
    let floats = y.to_float()?;
    match quantizer.tracks_extremes() {
        true => quantizer.observe(|| step.extremes(quantize::min_max(&floats)?), step.range_momentum)?,
        false => quantizer.settle(&floats)?,
    }
    let (y, quantized) = quantizer.forward(&floats)?;
    Ok((FeatureMap::Float(y), Some(quantized)))
}

impl Network {
    /// Returns the logits `[N, classes]` of images `[N, H, W, C]`, with the current running
    /// statistics and ranges.
    ///
    /// A quantizer whose range has never been set passes values through.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.evaluate(images, None)
    }

    /// Runs [`Network::forward`] with an observer. The logits have the same bits.
    pub fn forward_observed(&self, images: &Tensor, observe: &mut Observer<'_>) -> Result<Tensor> {
        self.evaluate(images, Some(observe))
    }

    fn evaluate(&self, images: &Tensor, mut observe: Option<&mut Observer<'_>>) -> Result<Tensor> {
        let mut outputs = Outputs::new(self);
        for (i, node) in self.nodes.iter().enumerate() {
            let quant = node.fused();
            let (z, mut y) = match node {
                Node::Image(_) => (None, FeatureMap::Float(images.clone())),
                Node::Unit(unit) => {
                    unit.evaluate(&outputs[unit.input], quant, self.epsilon, observe.is_some())?
                }
                Node::Sum(sum) => (None, sum.evaluate(sum.inputs.map(|input| &outputs[input]), quant)?),
                Node::Pool(pool) => (None, FeatureMap::Float(pool::global_average(&outputs[pool.input])?)),
            };
            if let Node::Unit(Unit { cap: Some(cap), output_quantizer, .. }) = node {
                let capped = cap::forward(&y.to_float()?, cap)?;
                let levels = output_quantizer.as_ref().map(|q| q.levels(&capped)).transpose()?.flatten();
                y = levels.map_or(FeatureMap::Float(capped), |(y, _)| y);
            }
            let is_left = quant.is_none() && !matches!(y, FeatureMap::Levels(_));
            if let Some(quantizer) = node.quantizer().filter(|_| is_left) {
                y = FeatureMap::Float(quantizer.apply(&y.to_float()?)?);
            }
            if let Some(observe) = &mut observe {
                observe(i, z.as_ref(), &y.to_float()?)?;
            }
            outputs.push(node, y);
        }
        Ok(outputs.into_last().to_float()?)
    }

    /// Runs a training forward pass and returns the logits and the tape for [`Network::backward`].
    ///
    /// Live normalizations use batch statistics. The moving averages of statistics and ranges are
    /// updated.
    pub fn forward_train<'a>(&mut self, images: &Tensor, step: Step<'a>) -> Result<(Tensor, Tape<'a>)> {
        let mut outputs: Outputs<Output> = Outputs::new(self);
        let readers = self.kinds_of_readers(&outputs.readers);
        let mut records = Vec::with_capacity(self.nodes.len());
        for (node, readers) in self.nodes.iter_mut().zip(readers) {
            let (y, record) = match node {
                Node::Image(image) => {
                    let images = FeatureMap::Float(images.clone());
                    (Output::Map(train_quantizer(images, &mut image.quantizer, step)?.0), Record::Image)
                }
                Node::Unit(unit) => {
                    let input = &outputs[unit.input];
                    let x = input.map()?;
                    let (y, mut record) = unit.train(x, self.epsilon, readers, step)?;
                    if let Output::Levels { later, .. } = input {
                        record.x = later.clone();
                    }
                    (y, Record::Unit(record))
                }
                Node::Sum(sum) => {
                    let (y, record) = sum.train(sum.inputs.map(|input| &outputs[input]), step)?;
                    (Output::Map(y), Record::Sum(record))
                }
                Node::Pool(pool) => {
                    let x = outputs[pool.input].map()?;
                    let pooled = FeatureMap::Float(pool::global_average(&x)?);
                    let (y, quantized) = train_quantizer(pooled, &mut pool.quantizer, step)?;
                    let (size, dtype) = ((x.dims()[1], x.dims()[2]), x.dtype());
                    (Output::Map(y), Record::Pool { input: pool.input, size, dtype, quantized })
                }
            };
            records.push(record);
            outputs.push(node, y);
        }
        let readers = outputs.readers.clone();
        Ok((outputs.into_last().map()?.to_float()?, Tape { records, readers, together: step.together }))
    }

    /// Returns the kind of readers of each node's output.
    fn kinds_of_readers(&self, readers: &[Vec<usize>]) -> Vec<Readers> {
        let of = |(node, readers): (&Node, &Vec<usize>)| match (node, &readers[..]) {
            (
                Node::Unit(Unit {
                    activation: Activation::Identity, cap: None, output_quantizer: None, ..
                }),
                [reader],
            ) if matches!(self.nodes[*reader], Node::Sum(_)) => Readers::Sum,
            (_, [_]) => Readers::One,
            _ => Readers::Several,
        };
        self.nodes.iter().zip(readers).map(of).collect()
    }

    /// Returns the gradients of every parameter, given the gradient of the logits `[N, classes]`.
    ///
    /// If several ranks took the step together, these are the contributions of the local images to
    /// the gradients of the whole batch's loss. The caller must add them up over the ranks.
    pub fn backward(&self, tape: Tape<'_>, logits: &Tensor) -> Result<Gradients> {
        let Tape { mut records, readers, together } = tape;
        let mut gradients = Gradients::default();
        // The gradients of the nodes' outputs, as far as they are known.
        let mut found: Vec<Option<MapGradient>> = vec![None; records.len()];
        if let Some(last) = found.last_mut() {
            *last = Some(logits.clone().into());
        }
        while let (Some(record), Some(g)) = (records.pop(), found.pop()) {
            match (record, g) {
                (Record::Unit(unit), Some(g)) => {
                    let below = below(&records, &readers, unit.input);
                    let input = unit.input;
                    if let Some(g) = unit.backward(g, below, together, &mut gradients)? {
                        add(&mut found[input], g)?;
                    }
                }
                (Record::Sum(sum), Some(g)) => {
                    let (inputs, normalized) = (sum.inputs, sum.normalized);
                    let g = sum.backward(g, &mut gradients)?;
                    for input in inputs {
                        // The sums that may come with the gradient belong to the normalization.
                        let own = if normalized == Some(input) { g.clone() } else { g.tensor.clone().into() };
                        add(&mut found[input], own)?;
                    }
                }
                (Record::Pool { input, size: (h, w), dtype, quantized }, Some(g)) => {
                    let g =
                        quantized.map_or(Ok(g.tensor.clone()), |q| q.backward(&g.tensor, &mut gradients))?;
                    add(&mut found[input], pool::backward(&g, h, w, dtype)?.into())?;
                }
                // The image has no gradient.
                (Record::Image, _) | (_, None) => (),
            }
        }
        gradients.check(self)
    }
}

impl UnitRecord {
    /// Stores the gradients of the parameters. Returns the gradient of the input, unless the input
    /// is the image.
    fn backward(
        self,
        mut g: MapGradient,
        below: Below<'_>,
        together: Option<&dyn Ranks>,
        gradients: &mut Gradients,
    ) -> Result<Option<MapGradient>> {
        if let Some(quantized) = &self.quantized {
            g = quantized.backward(&g.tensor, gradients)?.into();
        }
        if let Some([y, cap]) = &self.capped {
            g = cap::backward(y, &g.tensor, cap)?.into();
        }
        let total = together.map(|ranks| |own: &[f64]| ranks.totals(own));
        let total = total.as_ref().map(|total| total as norm::Total<'_>);
        let norm::Gradients { z: gz, gamma, shift } = self.epilogue.backward_of_part(&g, total)?;
        if let Some(float) = &self.float {
            return self.backward_folded(float, &gz, &shift, below, together, gradients);
        }
        match (&self.gamma, gamma) {
            (Some(parameter), Some(gamma)) => {
                gradients.set(parameter, gamma);
                gradients.set(&self.shift, shift);
            }
            // The classifier's shift is summed separately, over only the images of a batch.
            _ if g.tensor.rank() == 2 && self.epilogue.is_affine() => {
                gradients.set(&self.shift, bias::gradient(&g.tensor)?)
            }
            _ => gradients.set(&self.shift, shift),
        }
        let (gw, gx) = convolution::backward(self.kernel, &self.x, &self.weight.value, &gz, below)?;
        // A folding factor is treated as a constant, so it cancels.
        let gw = match &self.weight.quantized {
            Some(quantized) => quantized.backward(&gw, gradients)?,
            None => gw,
        };
        gradients.set(&self.weight.parameter, gw);
        Ok(gx)
    }

    /// Does the work of [`UnitRecord::backward`] for filters that are folded with float statistics.
    ///
    /// `gz` is the gradient of the folded filters' output, `gshift` that of the shift after it. The
    /// quantized weights were `s·w` with `s = γ/√(V+ε)`, and the shift was `β − μ·s`. `μ` and `V`
    /// are the statistics of a convolution with gradients of its own.
    fn backward_folded(
        &self,
        float: &FloatConvolution,
        gz: &DeferredGradient,
        gshift: &Tensor,
        below: Below<'_>,
        together: Option<&dyn Ranks>,
        gradients: &mut Gradients,
    ) -> Result<Option<MapGradient>> {
        let (w, BatchNormalization { mean, inv_std, scale, .. }) = (&self.weight.parameter, &float.norm);
        let below = if matches!(below, Below::Image) { Below::Image } else { Below::Map };
        let (gw, gx) = convolution::backward(self.kernel, &self.x, &self.weight.value, gz, below)?;
        let gw = match &self.weight.quantized {
            Some(quantized) => quantized.backward(&gw, gradients)?,
            None => gw,
        };
        let of_filters = (&gw * w)?.reshape(((), scale.elem_count()))?.sum(0)?;
        let gscale = (of_filters - (mean * gshift)?)?;
        if let Some(gamma) = &self.gamma {
            gradients.set(gamma, (&gscale * inv_std)?);
        }
        gradients.set(&self.shift, gshift.clone());
        // The statistics may be those of more images than the local ones.
        let rows = float.z.elem_count() / scale.elem_count();
        let (gscale, gshift, rows) = match together {
            None => (gscale, gshift.clone(), rows),
            Some(ranks) => total(ranks, &gscale, gshift, rows)?,
        };
        // ∂s/∂V = −s/(2(V+ε)).
        let gvariance = (((gscale * scale)? * inv_std.sqr()?)? * -0.5)?;
        let gmean = (scale * gshift)?.neg()?;
        let gu = DeferredGradient::of_statistics(&float.z, &float.norm, rows, &gmean, &gvariance)?;
        let (gw_float, gx_float) = convolution::backward(self.kernel, &self.x, w, &gu, below)?;
        gradients.set(w, (gw.broadcast_mul(scale)? + gw_float)?);
        let (Some(gx), Some(gx_float)) = (gx, gx_float) else { return Ok(None) };
        Ok(Some(residual::add(&gx.tensor, &gx_float.tensor)?.into()))
    }
}

/// Returns the sums over all ranks of two gradients `[C]` and of the number of rows.
fn total(ranks: &dyn Ranks, a: &Tensor, b: &Tensor, rows: usize) -> Result<(Tensor, Tensor, usize)> {
    let c = a.elem_count();
    let mut own: Vec<f64> = Tensor::cat(&[a, b], 0)?.to_dtype(DType::F64)?.to_vec1()?;
    own.push(rows as f64);
    let mut all = ranks.totals(&own);
    let rows = all.pop().map_or(rows, |rows| rows as usize);
    let all = Tensor::new(all, a.device())?.to_dtype(DType::F32)?;
    Ok((all.narrow(0, 0, c)?, all.narrow(0, c, c)?, rows))
}

impl SumRecord {
    /// Returns the gradient of each input; it is the same for both.
    fn backward(self, mut g: MapGradient, gradients: &mut Gradients) -> Result<MapGradient> {
        if let Some(quantized) = &self.quantized {
            g = quantized.backward(&g.tensor, gradients)?.into();
        }
        if let Some(activated) = &self.activated {
            g = activated.backward(&g)?.z.tensor()?.into();
        }
        Ok(g)
    }
}

/// Returns what lies below a convolution that reads node `input`: the epilogue that receives its
/// gradient unchanged, if there is one.
fn below<'a>(records: &'a [Record], readers: &[Vec<usize>], input: usize) -> Below<'a> {
    match &records[input] {
        Record::Image => Below::Image,
        _ if readers[input].len() > 1 => Below::Map,
        Record::Unit(UnitRecord { epilogue, capped: None, quantized: None, .. }) => Below::Epilogue(epilogue),
        Record::Sum(SumRecord { normalized: Some(unit), activated: None, quantized: None, .. }) => {
            below(records, readers, *unit)
        }
        _ => Below::Map,
    }
}

/// Adds a gradient to the one found so far.
fn add(found: &mut Option<MapGradient>, gradient: MapGradient) -> Result<()> {
    *found = Some(match found.take() {
        Some(other) => residual::add(&gradient.tensor, &other.tensor)?.into(),
        None => gradient,
    });
    Ok(())
}
