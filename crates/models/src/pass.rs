//! The forward and backward passes: a tape of what each unit's gradient needs, walked back once.
//!
//! A pass runs where the network is ([`Network::to_device`]), which must be where its images are. On a GPU the images'
//! dtype is that in which feature maps and their gradients are stored: `F32`, or, from compute capability 8.0 on,
//! `BF16`, which takes half of the memory traffic. Parameters, their gradients, statistics and everything from the pooled features on are `F32`
//! always. Nothing in a pass waits for the GPU.

use crate::quantizer::Quantized;
use crate::{BatchNorm, Gradients, Network, Norm, Quantizer, Result, Unit};
use candle_core::{DType, Tensor};
use kernels::convolution::{self, Below};
use kernels::norm::{self, Epilogue, MapGradient, Running};
use kernels::{FeatureMap, Weight, bias, pointwise, pool, quantize, residual};

/// Momentum of the running statistics of batch normalization, as in PyTorch.
const NORM_MOMENTUM: f64 = 0.1;

/// How a training step updates the network's moving averages.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Share by which a batch moves the activation ranges.
    pub range_momentum: f64,
}

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
    /// What the output's quantizer made of it, where it is none that the kernels have built in.
    quantized: Option<Quantized>,
}

impl Record {
    /// What followed the convolution, if the gradient of the unit's output goes to it as it is.
    fn bare_epilogue(&self) -> Option<&Epilogue> {
        (self.sum.is_none() && self.quantized.is_none()).then_some(&self.epilogue)
    }
}

/// What looks on at a forward pass: `observe(unit, z, y)`.
type Observer<'a> = dyn FnMut(usize, &Tensor, &Tensor) -> Result<()> + 'a;

/// The weights as the products see them.
struct UsedWeight {
    value: Tensor,
    /// How they were quantized, if they were.
    quantized: Option<Quantized>,
    /// Whether `value` is divided by a folding factor after quantization, so that it is no multiple of one step.
    divided: bool,
}

/// What the forward pass leaves for the backward pass.
pub struct Tape {
    records: Vec<Record>,
    /// Height, width and dtype before pooling.
    pooled_from: (usize, usize, DType),
    /// The pooled features after their quantizer.
    features: Tensor,
    /// What it made of them.
    quantized: Option<Quantized>,
    head_weight: UsedWeight,
}

impl UsedWeight {
    /// The weights `[…, C]` after their quantizer; `factor` `[C]` is that of the batch normalization behind them.
    fn new(weight: &Tensor, quantizer: Option<&Quantizer>, factor: Option<&Tensor>) -> Result<Self> {
        let Some(quantizer) = quantizer else {
            return Ok(Self { value: weight.clone(), quantized: None, divided: false });
        };
        let Some(factor) = factor.filter(|_| quantizer.folded()) else {
            let (value, quantized) = quantizer.forward(weight)?;
            return Ok(Self { value, quantized: Some(quantized), divided: false });
        };
        let (value, quantized) = quantizer.forward(&weight.broadcast_mul(factor)?)?;
        // A factor of 0 stands for a filter whose γ is 0: its weights are 0 already.
        let divisor = (factor + factor.eq(0.0)?.to_dtype(factor.dtype())?)?;
        Ok(Self { value: value.broadcast_div(&divisor)?, quantized: Some(quantized), divided: true })
    }

    /// As the operand of a product.
    fn operand(&self) -> Weight<'_> {
        let quantized = self.quantized.as_ref().filter(|_| !self.divided).and_then(Quantized::on_grid);
        Weight { value: &self.value, quantized }
    }

    /// Files the gradient of the network's own `weight`, and those of what its quantizer learns. The folding factor
    /// is held constant, so it cancels.
    fn backward(&self, weight: &Tensor, gradient: Tensor, gradients: &mut Gradients) -> Result<()> {
        let gradient = match &self.quantized {
            Some(quantized) => quantized.backward(&gradient, gradients)?,
            None => gradient,
        };
        gradients.set(weight, gradient);
        Ok(())
    }
}

impl Unit {
    /// The weights as the products see them, quantized if the unit says so; batch normalization's
    /// running statistics give the folding factor.
    fn used_weight(&self, epsilon: f64) -> Result<UsedWeight> {
        let quantizer = self.weight_quantizer.as_ref();
        let folded = quantizer.is_some_and(Quantizer::folded);
        let factor = self.batch_norm().filter(|_| folded).map(|norm| norm.scale(epsilon)).transpose()?;
        UsedWeight::new(&self.weight, quantizer, factor.as_ref())
    }

    /// Scale and shift of the running statistics, or of the bias that they were folded into.
    fn running_affine(&self, epsilon: f64) -> Result<(Tensor, Tensor)> {
        match &self.norm {
            Norm::Batch(norm) => norm.affine(epsilon),
            Norm::Bias(bias) => Ok((bias.ones_like()?, bias.clone())),
        }
    }
}

/// The quantizer, if the kernels have it built in.
fn grid_of(quantizer: &Option<Quantizer>) -> Option<kernels::Quantizer<'_>> {
    quantizer.as_ref().and_then(Quantizer::grid)
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
        let images = self.input_quantizer.as_ref().map_or(Ok(images.clone()), |q| q.apply(images))?;
        let mut x = FeatureMap::Float(images);
        // Only what a residual will still read is kept.
        let mut shortcuts: Vec<Option<FeatureMap>> = vec![None; self.units.len()];
        for (i, unit) in self.units.iter().enumerate() {
            let weight = unit.used_weight(self.epsilon)?;
            let operand = weight.operand();
            let (scale, shift) = unit.running_affine(self.epsilon)?;
            let quantizer = grid_of(&unit.output_quantizer);
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
            if let Some(quantizer) = unit.output_quantizer.as_ref().filter(|q| q.grid().is_none()) {
                y = FeatureMap::Float(quantizer.apply(&y.to_float()?)?);
            }
            if let (Some(observe), Some(z)) = (&mut observe, &z) {
                observe(i, z, &y.to_float()?)?;
            }
            if self.residuals.iter().any(|r| r.from == i) {
                shortcuts[i] = Some(y.clone());
            }
            x = y;
        }
        let pooled = pool::global_average(&x)?;
        let features = self.head.input_quantizer.as_ref().map_or(Ok(pooled.clone()), |q| q.apply(&pooled))?;
        let weight = UsedWeight::new(&self.head.weight, self.head.weight_quantizer.as_ref(), None)?;
        Ok(bias::add(&pointwise::forward(&features, &weight.value)?, &self.head.bias)?)
    }

    /// A training forward pass: batch statistics (where normalization is live), moving averages of
    /// statistics and ranges updated. Gives the logits and the tape for [`Network::backward`].
    pub fn forward_train(&mut self, images: &Tensor, step: Step) -> Result<(Tensor, Tape)> {
        let epsilon = self.epsilon;
        let (images, _) = quantize_in_training(images, &mut self.input_quantizer, step)?;
        let mut x = FeatureMap::Float(images);
        let residuals = self.residuals.clone();
        let mut shortcuts: Vec<Option<FeatureMap>> = vec![None; self.units.len()];
        let mut records = Vec::with_capacity(self.units.len());
        for (i, unit) in self.units.iter_mut().enumerate() {
            if let Some(q) = &mut unit.weight_quantizer {
                q.settle(&unit.weight, step.range_momentum)?;
            }
            let weight = unit.used_weight(epsilon)?;
            let operand = weight.operand();
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
                let quantizer = grid_of(&unit.output_quantizer);
                (FeatureMap::quantize(&sum, quantizer)?, quantizer.map(|_| sum))
            } else {
                if let (Some(q), Some(stats)) = (&mut unit.output_quantizer, &stats) {
                    let extremes = norm::output_range(stats, &scale, &shift, unit.activation)?;
                    q.observe(&extremes, step.range_momentum)?;
                }
                let output = match grid_of(&unit.output_quantizer) {
                    // A shortcut is read again where it ends.
                    None if !residuals.iter().any(|r| r.from == i) => {
                        norm::deferred(&z, &scale, &shift, unit.activation)?
                    }
                    quantizer => norm::forward(&z, &scale, &shift, unit.activation, quantizer)?,
                };
                (output, None)
            };
            let mut quantized = None;
            if unit.output_quantizer.as_ref().is_some_and(|q| q.grid().is_none()) {
                let (y, record) =
                    quantize_in_training(&output.to_float()?, &mut unit.output_quantizer, step)?;
                (output, quantized) = (FeatureMap::Float(y), record);
            }
            if residuals.iter().any(|r| r.from == i) {
                shortcuts[i] = Some(output.clone());
            }
            // Where a residual ends, it is the sum that is quantized.
            let (act, quantizer) =
                (unit.activation, grid_of(&unit.output_quantizer).filter(|_| from.is_none()));
            let epilogue = match &batch {
                Some(batch) => Epilogue::batch(&z, batch, act, quantizer)?,
                None => Epilogue::affine(&z, &scale, &shift, act, quantizer)?,
            };
            let input = std::mem::replace(&mut x, output);
            records.push(Record { input, weight, epilogue, sum, quantized });
        }
        let (h, w) = spatial(&x);
        let pooled_from = (h, w, x.dtype());
        let pooled = pool::global_average(&x)?;
        let (features, quantized) = quantize_in_training(&pooled, &mut self.head.input_quantizer, step)?;
        let head_weight = UsedWeight::new(&self.head.weight, self.head.weight_quantizer.as_ref(), None)?;
        let logits = bias::add(&pointwise::forward(&features, &head_weight.value)?, &self.head.bias)?;
        Ok((logits, Tape { records, pooled_from, features, quantized, head_weight }))
    }

    /// The gradients of every parameter from that of the logits `[N, classes]`.
    pub fn backward(&self, tape: Tape, logits: &Tensor) -> Result<Gradients> {
        let Tape { mut records, pooled_from: (h, w, dtype), features, quantized, head_weight } = tape;
        let mut gradients = Gradients::default();
        gradients.set(&self.head.bias, bias::gradient(logits)?);
        head_weight.backward(
            &self.head.weight,
            pointwise::grad_weight(&features, logits)?,
            &mut gradients,
        )?;
        let mut g = pointwise::grad_input(logits, &head_weight.value)?;
        if let Some(quantized) = quantized {
            g = quantized.backward(&g, &mut gradients)?;
        }
        let mut g = MapGradient::from(pool::backward_as(&g, h, w, dtype)?);

        let mut shortcuts: Vec<Option<Tensor>> = vec![None; self.units.len()];
        for (i, unit) in self.units.iter().enumerate().rev() {
            let Record { input, weight, epilogue, sum, quantized } =
                records.pop().expect("one record for every unit");
            if let Some(shortcut) = shortcuts[i].take() {
                g = residual::add(&g.tensor, &shortcut)?.into();
            }
            if let Some(quantized) = quantized {
                g = quantized.backward(&g.tensor, &mut gradients)?.into();
            }
            if let Some(from) = self.residual_into(i) {
                if let (Some(sum), Some(quantizer)) = (sum, grid_of(&unit.output_quantizer)) {
                    g = quantize::backward(&sum, &g.tensor, quantizer)?.into();
                }
                shortcuts[from] = Some(g.tensor.clone());
            }
            let norm::Gradients { z: gz, gamma, shift } = epilogue.backward(&g)?;
            match &unit.norm {
                Norm::Batch(norm) => {
                    gamma.into_iter().for_each(|gamma| gradients.set(&norm.gamma, gamma));
                    gradients.set(&norm.beta, shift);
                }
                Norm::Bias(bias) => gradients.set(bias, shift),
            }
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
            weight.backward(&unit.weight, weight_gradient, &mut gradients)?;
        }
        gradients.check(self)
    }
}

/// The quantized `x` in a training step, and what its gradient needs; `x` itself without a quantizer.
fn quantize_in_training(
    x: &Tensor,
    quantizer: &mut Option<Quantizer>,
    step: Step,
) -> Result<(Tensor, Option<Quantized>)> {
    let Some(quantizer) = quantizer else { return Ok((x.clone(), None)) };
    quantizer.settle(x, step.range_momentum)?;
    let (y, quantized) = quantizer.forward(x)?;
    Ok((y, Some(quantized)))
}

/// Height and width of a feature map `[N, H, W, C]`.
fn spatial(map: &FeatureMap) -> (usize, usize) {
    (map.dims()[1], map.dims()[2])
}
