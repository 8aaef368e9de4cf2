//! The forward and backward passes: a tape of what each unit's gradient needs, walked back once.
//!
//! A pass runs where the network is ([`Network::to_device`]), which must be where its images are. On a GPU the images'
//! dtype is that in which feature maps and their gradients are stored: `F32`, or, from compute capability 8.0 on,
//! `BF16`, which takes half of the memory traffic. Parameters, their gradients, statistics and everything from the pooled features on are `F32`
//! always. Nothing in a pass waits for the GPU.

use crate::learned::LearnedGradients;
use crate::{ActivationQuantizer, BatchNorm, Network, Norm, Result, Unit, WeightQuantizer};
use candle_core::{DType, Tensor};
use kernels::convolution::{self, Below};
use kernels::norm::{Epilogue, Gradient, Grads, Running};
use kernels::{FeatureMap, Quantizer, Weight, bias, norm, pointwise, pool, quantize, residual};

/// Momentum of the running statistics of batch normalization, as in PyTorch.
const NORM_MOMENTUM: f64 = 0.1;

/// How a training step updates the network's moving averages.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Share by which a batch moves the activation ranges.
    pub range_momentum: f64,
}

/// Gradients of the mean loss, in the order of [`Network::parameters`].
pub type Gradients = Vec<Tensor>;

/// What one unit's backward pass needs.
struct Record {
    /// The unit's input.
    input: FeatureMap,
    /// The weights that the convolution used, and how they came about.
    weight: UsedWeight,
    /// What followed the convolution, as the forward pass applied it.
    epilogue: Epilogue,
    /// Where a residual ends and the sum is quantized: the sum, before its quantizer.
    sum: Option<Tensor>,
    /// What a learned quantizer of the output read.
    learned: Option<Tensor>,
}

impl Record {
    /// What followed the convolution, if the gradient of the unit's output goes to it as it is.
    fn bare_epilogue(&self) -> Option<&Epilogue> {
        (self.sum.is_none() && self.learned.is_none()).then_some(&self.epilogue)
    }
}

/// What looks on at a forward pass: `observe(unit, z, y)`.
type Observer<'a> = dyn FnMut(usize, &Tensor, &Tensor) -> Result<()> + 'a;

/// The weights as the products see them.
struct UsedWeight {
    value: Tensor,
    /// The tensor that was quantized and its range, if it was.
    quantized: Option<(Tensor, Tensor)>,
    /// Whether `value` is divided by a folding factor after quantization, so that it is no multiple of one step.
    divided: bool,
}

/// What the forward pass leaves for the backward pass.
pub struct Tape {
    records: Vec<Record>,
    /// Height, width and dtype before pooling.
    pooled_from: (usize, usize, DType),
    /// The pooled features before and after their quantizer.
    features: (Tensor, Tensor),
    head_weight: UsedWeight,
}

impl UsedWeight {
    /// The weights `[…, C]` after their quantizer; `scale` `[C]` is the folding factor.
    fn new(weight: &Tensor, quantizer: &Option<WeightQuantizer>, scale: Option<&Tensor>) -> Result<Self> {
        let as_is = |value| Self { value, quantized: None, divided: false };
        let Some(quantizer) = quantizer else { return Ok(as_is(weight.clone())) };
        if let Some(value) = quantizer.apply(weight)? {
            return Ok(as_is(value));
        }
        let bits = quantizer.bits;
        let scale = scale.filter(|_| quantizer.folded);
        let original = match scale {
            Some(scale) => weight.broadcast_mul(scale)?,
            None => weight.clone(),
        };
        let range = quantize::min_max(&original)?;
        let mut value = quantize::forward(&original, Quantizer { range: &range, bits })?;
        if let Some(scale) = scale {
            // A scale of 0 stands for a filter whose γ is 0: its weights are 0 already.
            let divisor = (scale + scale.eq(0.0)?.to_dtype(scale.dtype())?)?;
            value = value.broadcast_div(&divisor)?;
        }
        Ok(Self { value, quantized: Some((original, range)), divided: scale.is_some() })
    }

    /// As the operand of a product.
    fn operand(&self, quantizer: &Option<WeightQuantizer>) -> Weight<'_> {
        let quantized = match (&self.quantized, quantizer) {
            (Some((original, range)), Some(WeightQuantizer { bits, .. })) if !self.divided => {
                Some((original, Quantizer { range, bits: *bits }))
            }
            _ => None,
        };
        Weight { value: &self.value, quantized }
    }

    /// The gradient for the network's own `weight`, and those of what its quantizer learns. Uniform: straight
    /// through, where not clamped; the folding factor is held constant, so it cancels.
    fn gradients(
        &self,
        weight: &Tensor,
        gradient: Tensor,
        quantizer: &Option<WeightQuantizer>,
    ) -> Result<LearnedGradients> {
        if let Some(gradients) =
            quantizer.as_ref().map(|q| q.gradients(weight, &gradient)).transpose()?.flatten()
        {
            return Ok(gradients);
        }
        let input = match (&self.quantized, quantizer) {
            (Some((original, range)), Some(WeightQuantizer { bits, .. })) => {
                quantize::backward(original, &gradient, Quantizer { range, bits: *bits })?
            }
            _ => gradient,
        };
        Ok(LearnedGradients { input, parameters: Vec::new() })
    }
}

impl Unit {
    /// The weights as the products see them, quantized if the unit says so; batch normalization's
    /// running statistics give the folding factor.
    fn used_weight(&self, epsilon: f64) -> Result<UsedWeight> {
        let scale = match (&self.weight_quantizer, &self.norm) {
            (Some(WeightQuantizer { folded: true, .. }), Norm::Batch(norm)) => Some(norm.scale(epsilon)?),
            _ => None,
        };
        UsedWeight::new(&self.weight, &self.weight_quantizer, scale.as_ref())
    }

    /// Scale and shift of the running statistics, or of the bias that they were folded into.
    fn running_affine(&self, epsilon: f64) -> Result<(Tensor, Tensor)> {
        match &self.norm {
            Norm::Batch(norm) => norm.affine(epsilon),
            Norm::Bias(bias) => Ok((bias.ones_like()?, bias.clone())),
        }
    }
}

/// The uniform quantizer, as the fused kernels take it.
fn kernel_of(quantizer: &Option<ActivationQuantizer>) -> Option<Quantizer<'_>> {
    quantizer.as_ref().filter(|q| q.ready && !q.is_learned()).map(ActivationQuantizer::kernel)
}

/// The learned quantizer, which acts on floats by itself.
fn learned_of(quantizer: &Option<ActivationQuantizer>) -> Option<&ActivationQuantizer> {
    quantizer.as_ref().filter(|q| q.ready && q.is_learned())
}

fn fake_quantize(x: &Tensor, quantizer: &Option<ActivationQuantizer>) -> Result<Tensor> {
    match kernel_of(quantizer) {
        Some(q) => Ok(quantize::forward(x, q)?),
        None => Ok(x.clone()),
    }
}

impl Network {
    /// The logits `[N, classes]` of images `[N, H, W, C]`, with the running statistics and the
    /// ranges as they are. Quantizers whose range has never been set pass values through.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.infer(images, None)
    }

    /// [`Network::forward`], showing every unit's convolution output `z` and final output `y`
    /// (after activation, residual and quantizer) to `observe(unit, z, y)`. Gives the same bits.
    pub fn forward_observed(
        &self,
        images: &Tensor,
        observe: &mut dyn FnMut(usize, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        self.infer(images, Some(observe))
    }

    fn infer(&self, images: &Tensor, mut observe: Option<&mut Observer<'_>>) -> Result<Tensor> {
        let mut x = FeatureMap::Float(fake_quantize(images, &self.input_quantizer)?);
        // Only what a residual will still read is kept.
        let mut shortcuts: Vec<Option<FeatureMap>> = vec![None; self.units.len()];
        for (i, unit) in self.units.iter().enumerate() {
            let weight = unit.used_weight(self.epsilon)?;
            let operand = weight.operand(&unit.weight_quantizer);
            let (scale, shift) = unit.running_affine(self.epsilon)?;
            let quantizer = kernel_of(&unit.output_quantizer);
            let shortcut = self.residual_into(i).map(|from| shortcuts[from].take().expect("kept when made"));
            // Where a residual ends, the sum is quantized.
            let of_unit = if shortcut.is_some() { None } else { quantizer };
            let (z, mut y) = if observe.is_some() {
                let z = convolution::forward(unit.kernel, &x, operand)?;
                let y = norm::forward(&z, &scale, &shift, unit.activation, of_unit)?;
                (Some(z), y)
            } else {
                let (affine, act) = ((&scale, &shift), unit.activation);
                (None, convolution::forward_normalized(unit.kernel, &x, operand, affine, act, of_unit)?)
            };
            if let Some(shortcut) = &shortcut {
                y = residual::add_quantize(&y.to_float()?, shortcut, quantizer)?;
            }
            if let Some(learned) = learned_of(&unit.output_quantizer) {
                y = FeatureMap::Float(learned.apply(&y.to_float()?)?);
            }
            if let (Some(observe), Some(z)) = (&mut observe, &z) {
                observe(i, z, &y.to_float()?)?;
            }
            if self.residuals.iter().any(|r| r.from == i) {
                shortcuts[i] = Some(y.clone());
            }
            x = y;
        }
        let features = fake_quantize(&pool::global_average(&x)?, &self.head.input_quantizer)?;
        let weight = UsedWeight::new(&self.head.weight, &self.head.weight_quantizer, None)?;
        Ok(bias::add(&pointwise::forward(&features, &weight.value)?, &self.head.bias)?)
    }

    /// A training forward pass: batch statistics (where normalization is live), moving averages of
    /// statistics and ranges updated. Gives the logits and the tape for [`Network::backward`].
    pub fn forward_train(&mut self, images: &Tensor, step: Step) -> Result<(Tensor, Tape)> {
        let epsilon = self.epsilon;
        if let Some(q) = &mut self.input_quantizer {
            q.observe(&quantize::min_max(images)?, step.range_momentum)?;
        }
        let mut x = FeatureMap::Float(fake_quantize(images, &self.input_quantizer)?);
        let residuals = self.residuals.clone();
        let mut shortcuts: Vec<Option<FeatureMap>> = vec![None; self.units.len()];
        let mut records = Vec::with_capacity(self.units.len());
        for (i, unit) in self.units.iter_mut().enumerate() {
            if let Some(q) = &unit.weight_quantizer {
                q.project()?;
            }
            let weight = unit.used_weight(epsilon)?;
            let operand = weight.operand(&unit.weight_quantizer);
            // With a bias the statistics serve only the range, so they are not taken in float.
            let (z, stats) = match (&unit.norm, &unit.output_quantizer) {
                (Norm::Bias(_), None) => (convolution::forward(unit.kernel, &x, operand)?, None),
                _ => {
                    let (z, stats) = convolution::forward_stats(unit.kernel, &x, operand)?;
                    (z, Some(stats))
                }
            };
            let (batch, (scale, shift)) = match (&mut unit.norm, &stats) {
                (Norm::Batch(norm), Some(stats)) => {
                    let BatchNorm { gamma, beta, mean, variance } = norm;
                    let running = Running { mean: mean.clone(), variance: variance.clone() };
                    let rows = z.elem_count() / z.dim(candle_core::D::Minus1)?;
                    let (batch, running) =
                        norm::prepare(stats, gamma, beta, epsilon, &running, NORM_MOMENTUM, rows)?;
                    (norm.mean, norm.variance) = (running.mean, running.variance);
                    let affine = (batch.scale.clone(), batch.shift.clone());
                    (Some(batch), affine)
                }
                (Norm::Bias(bias), _) => (None, (bias.ones_like()?, bias.clone())),
                (Norm::Batch(_), None) => unreachable!("live normalization always takes statistics"),
            };
            let from = residuals.iter().find(|r| r.to == i).map(|r| r.from);
            let (mut output, sum) = if let Some(from) = from {
                let shortcut = shortcuts[from].take().expect("kept when it was made");
                let (sum, extremes) = residual::add_normalized(&z, &scale, &shift, &shortcut)?;
                if let Some(q) = &mut unit.output_quantizer {
                    q.observe(&extremes, step.range_momentum)?;
                }
                let quantizer = kernel_of(&unit.output_quantizer);
                (FeatureMap::quantize(&sum, quantizer)?, quantizer.map(|_| sum))
            } else {
                if let (Some(q), Some(stats)) = (&mut unit.output_quantizer, &stats) {
                    let extremes = norm::output_range(stats, &scale, &shift, unit.activation)?;
                    q.observe(&extremes, step.range_momentum)?;
                }
                let output = match kernel_of(&unit.output_quantizer) {
                    // A shortcut is read again where it ends.
                    None if !residuals.iter().any(|r| r.from == i) => {
                        FeatureMap::normalized(&z, &scale, &shift, unit.activation)?
                    }
                    quantizer => norm::forward(&z, &scale, &shift, unit.activation, quantizer)?,
                };
                (output, None)
            };
            let mut learned = None;
            if let Some(quantizer) = learned_of(&unit.output_quantizer) {
                let read = output.to_float()?;
                output = FeatureMap::Float(quantizer.apply(&read)?);
                learned = Some(read);
            }
            if residuals.iter().any(|r| r.from == i) {
                shortcuts[i] = Some(output.clone());
            }
            // Where a residual ends, it is the sum that is quantized.
            let (act, quantizer) =
                (unit.activation, kernel_of(&unit.output_quantizer).filter(|_| from.is_none()));
            let epilogue = match &batch {
                Some(batch) => Epilogue::batch(&z, batch, act, quantizer)?,
                None => Epilogue::affine(&z, &scale, &shift, act, quantizer)?,
            };
            let input = std::mem::replace(&mut x, output);
            records.push(Record { input, weight, epilogue, sum, learned });
        }
        let (h, w) = spatial(&x);
        let pooled_from = (h, w, x.dtype());
        let pooled = pool::global_average(&x)?;
        if let Some(q) = &mut self.head.input_quantizer {
            q.observe(&quantize::min_max(&pooled)?, step.range_momentum)?;
        }
        let features = fake_quantize(&pooled, &self.head.input_quantizer)?;
        let head_weight = UsedWeight::new(&self.head.weight, &self.head.weight_quantizer, None)?;
        let logits = bias::add(&pointwise::forward(&features, &head_weight.value)?, &self.head.bias)?;
        Ok((logits, Tape { records, pooled_from, features: (pooled, features), head_weight }))
    }

    /// The gradients of every parameter from that of the logits `[N, classes]`.
    pub fn backward(&self, tape: Tape, logits: &Tensor) -> Result<Gradients> {
        let Tape { mut records, pooled_from: (h, w, dtype), features: (pooled, features), head_weight } =
            tape;
        // Collected from the last parameter to the first.
        let mut gradients = Vec::new();
        gradients.push(bias::gradient(logits)?);
        let weight = pointwise::grad_weight(&features, logits)?;
        let head = &self.head;
        push_gradients(&mut gradients, head_weight.gradients(&head.weight, weight, &head.weight_quantizer)?);
        let mut g = pointwise::grad_input(logits, &head_weight.value)?;
        if let Some(q) = kernel_of(&self.head.input_quantizer) {
            g = quantize::backward(&pooled, &g, q)?;
        }
        let mut g = Gradient::from(pool::backward_as(&g, h, w, dtype)?);

        let mut shortcuts: Vec<Option<Tensor>> = vec![None; self.units.len()];
        for (i, unit) in self.units.iter().enumerate().rev() {
            let Record { input, weight, epilogue, sum, learned } =
                records.pop().expect("one record for every unit");
            if let Some(shortcut) = shortcuts[i].take() {
                g = residual::add(&g.tensor, &shortcut)?.into();
            }
            if let (Some(quantizer), Some(read)) = (&unit.output_quantizer, learned) {
                let LearnedGradients { input, parameters } = quantizer.gradients(&read, &g.tensor)?;
                gradients.extend(parameters.into_iter().rev());
                g = input.into();
            }
            if let Some(from) = self.residual_into(i) {
                if let (Some(sum), Some(quantizer)) = (sum, kernel_of(&unit.output_quantizer)) {
                    g = quantize::backward(&sum, &g.tensor, quantizer)?.into();
                }
                shortcuts[from] = Some(g.tensor.clone());
            }
            let Grads { z: gz, gamma, shift } = epilogue.backward(&g)?;
            gradients.push(shift);
            gradients.extend(gamma);
            let below = match records.last() {
                None => Below::Image,
                Some(record) => match record.bare_epilogue() {
                    Some(epilogue) if shortcuts[i - 1].is_none() => Below::Epilogue(epilogue),
                    _ => Below::Map,
                },
            };
            let (weight_gradient, input_gradient) =
                convolution::backward(unit.kernel, &input, &weight.value, &gz, below)?;
            if let Some(gradient) = input_gradient {
                g = gradient;
            }
            let weight = weight.gradients(&unit.weight, weight_gradient, &unit.weight_quantizer)?;
            push_gradients(&mut gradients, weight);
        }
        gradients.reverse();
        Ok(gradients)
    }
}

/// Adds the gradients of a tensor and of what its quantizer learns, the last parameter first.
fn push_gradients(gradients: &mut Gradients, more: LearnedGradients) {
    gradients.extend(more.parameters.into_iter().rev());
    gradients.push(more.input);
}

/// Height and width of a feature map `[N, H, W, C]`.
fn spatial(map: &FeatureMap) -> (usize, usize) {
    (map.dims()[1], map.dims()[2])
}
