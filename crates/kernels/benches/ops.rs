//! Times each operation of a training step of MobileNetV2, width 1, on a batch of 64 images of
//! 32×32.
//!
//! Run `cargo bench -p kernels -- [part of a name]`; `-- --help` lists the other options. A name
//! consists of the operation, the contents of its feature maps ([`Floats`] or [`Levels`]) and its
//! [`Layer`]: `depthwise::forward_stats::Levels::32×32×96 /2`.
//!
//! The first row of a benchmark has its times, each of one call on rayon's threads: the fastest
//! shows what the machine can do, the median what it usually does. The second row has a rate, to
//! compare with a bound. For a product (`item/s`) the rate is its multiply-accumulates per second.
//! For all other operations (`B/s`) it is the memory of operands and results per second, as if each
//! were read or written once.
//!
//! Operands are made before the clock starts, and results are freed after it stops. The allocator
//! keeps their pages, as in the programs that train.

use candle_core::{DType, Device, Tensor};
use divan::counter::{BytesCount, IntoCounter, ItemsCount};
use divan::{Bencher, Divan};
use kernels::augment::Views;
use kernels::norm::{BatchNormalization, Epilogue, Gradients, MapGradient};
use kernels::sgd::{Rate, Rule, Update};
use kernels::{Activation, FeatureMap, Quantizer, Result, Weight};
use quant_core::Bits;
use std::fmt;
use std::sync::LazyLock;
use std::time::Duration;

const BATCH: usize = 64;
const ACTIVATION: Activation = Activation::Relu6;

/// The sizes of what an operation reads and writes.
///
/// It reads maps of `size`×`size` positions with `inputs` channels, and writes maps with `outputs`
/// channels that are `stride` times smaller along each side.
#[derive(Clone, Copy)]
struct Layer {
    size: usize,
    inputs: usize,
    outputs: usize,
    stride: usize,
}

const DEPTHWISE: [Layer; 9] = [
    Layer::depthwise(32, 32, 1),
    Layer::depthwise(32, 96, 2),
    Layer::depthwise(16, 144, 1),
    Layer::depthwise(16, 144, 2),
    Layer::depthwise(8, 192, 1),
    Layer::depthwise(8, 384, 1),
    Layer::depthwise(8, 576, 1),
    Layer::depthwise(8, 960, 1),
    // From a pruned network: the channels do not fill whole vectors.
    Layer::depthwise(8, 357, 1),
];

const POINTWISE: [Layer; 10] = [
    STEM,
    Layer::product(32, 32, 16),
    Layer::product(32, 16, 96),
    Layer::product(16, 96, 24),
    Layer::product(16, 24, 144),
    Layer::product(8, 64, 384),
    Layer::product(8, 384, 64),
    Layer::product(8, 160, 960),
    Layer::product(8, 960, 320),
    Layer::product(8, 320, 1280),
];

/// The maps that are normalized. The second is from a pruned network.
const MAPS: [Layer; 5] =
    [Layer::map(32, 96), Layer::map(32, 13), Layer::map(16, 144), Layer::map(8, 384), LAST];

/// The ends of residual branches.
const RESIDUALS: [Layer; 3] = [Layer::map(16, 24), Layer::map(8, 64), Layer::map(8, 160)];

const IMAGES: Layer = Layer::map(32, 3);

/// The first convolution, as a product with the images' 3×3 patches.
const STEM: Layer = Layer::product(32, 27, 32);

/// The last maps, whose averages are classified.
const LAST: Layer = Layer::map(8, 1280);

const CLASSIFIER: Layer = Layer::product(1, 1280, 100);

impl Layer {
    const fn map(size: usize, channels: usize) -> Self {
        Self::depthwise(size, channels, 1)
    }

    const fn depthwise(size: usize, channels: usize, stride: usize) -> Self {
        Self { size, inputs: channels, outputs: channels, stride }
    }

    const fn product(size: usize, inputs: usize, outputs: usize) -> Self {
        Self { size, inputs, outputs, stride: 1 }
    }

    fn input(self) -> [usize; 4] {
        [BATCH, self.size, self.size, self.inputs]
    }

    fn output(self) -> [usize; 4] {
        [BATCH, self.size / self.stride, self.size / self.stride, self.outputs]
    }

    /// Returns the shape of the weight of a product.
    fn weight(self) -> [usize; 2] {
        [self.inputs, self.outputs]
    }

    /// Returns the number of multiply-accumulates of a product.
    fn macs(self) -> usize {
        count(self.output()) * self.inputs
    }

    /// Returns the work of an operation that moves `bytes` for each element of the input.
    fn moving(self, bytes: usize) -> BytesCount {
        BytesCount::new(count(self.input()) * bytes)
    }
}

/// Writes `32×32×96`, with a stride of 2 `32×32×96 /2`, and for a product `32×32×16→96`.
impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, inputs, outputs, stride } = self;
        write!(f, "{size}×{size}×{inputs}")?;
        if inputs != outputs {
            write!(f, "→{outputs}")?;
        }
        if *stride != 1 {
            write!(f, " /{stride}")?;
        }
        Ok(())
    }
}

/// The contents of the feature maps that one unit of the network hands to the next.
trait Maps {
    /// The size of an element in bytes.
    const BYTES: usize;

    /// Returns the quantizer that makes the maps, if there is one.
    fn quantizer() -> Option<Quantizer<'static>>;
}

/// Floats, as in a network that is not quantized yet. Gradients are always floats.
struct Floats;

/// The levels of a 4-bit quantizer, one byte each. The weights of products are quantized too.
struct Levels;

impl Maps for Floats {
    const BYTES: usize = 4;

    fn quantizer() -> Option<Quantizer<'static>> {
        None
    }
}

impl Maps for Levels {
    const BYTES: usize = 1;

    fn quantizer() -> Option<Quantizer<'static>> {
        Some(quantizer())
    }
}

fn quantizer() -> Quantizer<'static> {
    static RANGE: LazyLock<Tensor> =
        LazyLock::new(|| Tensor::new(&[0f32, 6.0], &Device::Cpu).expect("a range"));
    Quantizer { range: &RANGE, bits: Bits::new(4).expect("a width") }
}

fn random<const RANK: usize>(dims: [usize; RANK]) -> Tensor {
    Tensor::randn(0f32, 1.0, &dims, &Device::Cpu).expect("a tensor")
}

fn maps<M: Maps>(dims: [usize; 4]) -> FeatureMap {
    FeatureMap::quantize(&random(dims), M::quantizer()).expect("maps")
}

fn count(dims: [usize; 4]) -> usize {
    dims.iter().product()
}

/// Times `operation`, which does `work`.
fn measure<T>(bencher: Bencher, work: impl IntoCounter, operation: impl Fn() -> Result<T>) {
    bencher.counter(work).bench_local(|| operation().expect("operands that agree"));
}

fn main() {
    kernels::memory::keep_pages();
    // One second for each line, unless the command line says otherwise.
    Divan::default().max_time(Duration::from_secs(1)).config_with_args().main();
}

/// The depthwise convolution, which is bound by memory more than by arithmetic.
mod depthwise {
    use super::*;
    use kernels::depthwise;

    fn weight(layer: Layer) -> Tensor {
        random([3, 3, layer.inputs])
    }

    fn moved<M: Maps>(layer: Layer) -> BytesCount {
        BytesCount::new(count(layer.input()) * M::BYTES + count(layer.output()) * Floats::BYTES)
    }

    /// The forward pass alone. What [`forward_stats`] takes longer is the cost of the statistics.
    #[divan::bench(types = [Floats, Levels], args = DEPTHWISE)]
    fn forward<M: Maps>(bencher: Bencher, layer: Layer) {
        let (x, w) = (maps::<M>(layer.input()), weight(layer));
        measure(bencher, moved::<M>(layer), || depthwise::forward(&x, &w, layer.stride));
    }

    /// The forward pass in training, with the statistics of each channel.
    #[divan::bench(types = [Floats, Levels], args = DEPTHWISE)]
    fn forward_stats<M: Maps>(bencher: Bencher, layer: Layer) {
        let (x, w) = (maps::<M>(layer.input()), weight(layer));
        measure(bencher, moved::<M>(layer), || depthwise::forward_stats(&x, &w, layer.stride));
    }

    /// The gradient of the input.
    #[divan::bench(args = DEPTHWISE)]
    fn grad_input(bencher: Bencher, layer: Layer) {
        let (gz, w) = (random(layer.output()), weight(layer));
        let size = (layer.size, layer.size);
        measure(bencher, moved::<Floats>(layer), || depthwise::grad_input(&gz, &w, layer.stride, size));
    }

    /// The gradient of the weight.
    #[divan::bench(types = [Floats, Levels], args = DEPTHWISE)]
    fn grad_weight<M: Maps>(bencher: Bencher, layer: Layer) {
        let (x, gz) = (maps::<M>(layer.input()), random(layer.output()));
        measure(bencher, moved::<M>(layer), || depthwise::grad_weight(&x, &gz, layer.stride));
    }
}

/// The pointwise convolution, the stem and the classifier, all of which are products.
mod pointwise {
    use super::*;
    use kernels::{pointwise, quantize};

    /// The forward pass in training, with the statistics of each channel: a product of floats or of
    /// whole numbers.
    #[divan::bench(types = [Floats, Levels], args = POINTWISE)]
    fn forward_stats<M: Maps>(bencher: Bencher, layer: Layer) {
        let (x, original) = (maps::<M>(layer.input()), random(layer.weight()));
        let value = match M::quantizer() {
            Some(quant) => quantize::forward(&original, quant).expect("weights"),
            None => original.clone(),
        };
        let quantized = M::quantizer().map(|quant| (&original, quant));
        let w = Weight { value: &value, quantized };
        measure(bencher, ItemsCount::new(layer.macs()), || pointwise::forward_stats(&x, w));
    }

    /// Both gradients, which are two products. They include [`norm::backward_gradient`], and the
    /// sums for the epilogue that made the input.
    #[divan::bench(types = [Floats, Levels], args = POINTWISE)]
    fn backward<M: Maps>(bencher: Bencher, layer: Layer) {
        let (x, w) = (maps::<M>(layer.input()), random(layer.weight()));
        let gz = norm::Normalized::new(layer.output()).backward::<M>().expect("gradients").z;
        let below = norm::Normalized::new(layer.input()).epilogue::<M>().expect("what made the input");
        let backward = || pointwise::backward(&x, &w, &gz, Some(&below));
        measure(bencher, ItemsCount::new(2 * layer.macs()), backward);
    }

    /// The logits.
    #[divan::bench(args = [CLASSIFIER])]
    fn forward(bencher: Bencher, layer: Layer) {
        let (x, w) = (random(layer.input()), random(layer.weight()));
        measure(bencher, ItemsCount::new(layer.macs()), || pointwise::forward(&x, &w));
    }

    /// The gradient of the input from which the logits are computed.
    #[divan::bench(args = [CLASSIFIER])]
    fn grad_input(bencher: Bencher, layer: Layer) {
        let (gz, w) = (random(layer.output()), random(layer.weight()));
        measure(bencher, ItemsCount::new(layer.macs()), || pointwise::grad_input(&gz, &w));
    }

    /// The gradient of the weight alone.
    #[divan::bench(args = [CLASSIFIER, STEM])]
    fn grad_weight(bencher: Bencher, layer: Layer) {
        let (x, gz) = (random(layer.input()), random(layer.output()));
        measure(bencher, ItemsCount::new(layer.macs()), || pointwise::grad_weight(&x, &gz));
    }
}

/// Batch normalization with ReLU6 and, for levels, the quantizer.
mod norm {
    use super::*;
    use kernels::norm;

    /// Maps with their normalization, and a gradient of the result.
    pub struct Normalized {
        z: Tensor,
        gy: MapGradient,
        norm: BatchNormalization,
    }

    impl Normalized {
        pub fn new(dims: [usize; 4]) -> Self {
            let (z, gamma, beta) = (random(dims), random([dims[3]]), random([dims[3]]));
            let stats = norm::channel_stats(&z).expect("statistics");
            let norm = BatchNormalization::new(&stats, &gamma, &beta, 1e-5).expect("a normalization");
            Self { z, gy: random(dims).into(), norm }
        }

        pub fn epilogue<M: Maps>(&self) -> Result<Epilogue> {
            Epilogue::batch(&self.z, &self.norm, ACTIVATION, M::quantizer())
        }

        pub fn backward<M: Maps>(&self) -> Result<Gradients> {
            self.epilogue::<M>()?.backward(&self.gy)
        }
    }

    /// The forward pass, which reads floats and writes floats or levels.
    #[divan::bench(types = [Floats, Levels], args = MAPS)]
    fn forward<M: Maps>(bencher: Bencher, layer: Layer) {
        let Normalized { z, norm: BatchNormalization { scale, shift, .. }, .. } =
            Normalized::new(layer.input());
        measure(bencher, layer.moving(Floats::BYTES + M::BYTES), || {
            norm::forward(&z, &scale, &shift, ACTIVATION, M::quantizer())
        });
    }

    /// The gradients of `γ` and `β`: sums over two maps.
    #[divan::bench(types = [Floats, Levels], args = MAPS)]
    fn backward_sums<M: Maps>(bencher: Bencher, layer: Layer) {
        let of = Normalized::new(layer.input());
        measure(bencher, layer.moving(2 * Floats::BYTES), || of.backward::<M>());
    }

    /// The gradient of the input, which is computed from the sums and the two maps.
    #[divan::bench(types = [Floats, Levels], args = MAPS)]
    fn backward_gradient<M: Maps>(bencher: Bencher, layer: Layer) {
        let gz = Normalized::new(layer.input()).backward::<M>().expect("gradients").z;
        measure(bencher, layer.moving(3 * Floats::BYTES), || gz.tensor());
    }
}

/// Fake quantization from floats to floats.
mod quantize {
    use super::*;
    use kernels::quantize;

    /// The forward pass, as for images and weights.
    #[divan::bench(args = [IMAGES])]
    fn forward(bencher: Bencher, layer: Layer) {
        let x = random(layer.input());
        measure(bencher, layer.moving(2 * Floats::BYTES), || quantize::forward(&x, quantizer()));
    }

    /// The gradient, as for weights and the sums of residual branches.
    #[divan::bench(args = RESIDUALS)]
    fn backward(bencher: Bencher, layer: Layer) {
        let (x, gy) = (random(layer.input()), random(layer.input()));
        measure(bencher, layer.moving(3 * Floats::BYTES), || quantize::backward(&x, &gy, quantizer()));
    }

    /// The range of images or weights.
    #[divan::bench(args = [IMAGES])]
    fn min_max(bencher: Bencher, layer: Layer) {
        let x = random(layer.input());
        measure(bencher, layer.moving(Floats::BYTES), || quantize::min_max(&x));
    }
}

/// The end of a residual branch.
mod residual {
    use super::*;
    use kernels::residual;

    /// The forward pass: the sum of the normalized branch and the shortcut, with its range.
    #[divan::bench(types = [Floats, Levels], args = RESIDUALS)]
    fn add_normalized<M: Maps>(bencher: Bencher, layer: Layer) {
        let (z, shortcut) = (random(layer.input()), maps::<M>(layer.input()));
        let (scale, shift) = (random([layer.inputs]), random([layer.inputs]));
        measure(bencher, layer.moving(2 * Floats::BYTES + M::BYTES), || {
            residual::add_normalized(&z, &scale, &shift, &shortcut)
        });
    }

    /// The forward pass: the levels of the sum.
    #[divan::bench(args = RESIDUALS)]
    fn quantize(bencher: Bencher, layer: Layer) {
        let sum = random(layer.input());
        measure(bencher, layer.moving(Floats::BYTES + Levels::BYTES), || {
            FeatureMap::quantize(&sum, Some(quantizer()))
        });
    }

    /// The backward pass: the sum of the gradients of the branch and the shortcut.
    #[divan::bench(args = RESIDUALS)]
    fn add(bencher: Bencher, layer: Layer) {
        let (a, b) = (random(layer.input()), random(layer.input()));
        measure(bencher, layer.moving(3 * Floats::BYTES), || residual::add(&a, &b));
    }
}

/// A batch of images, mirrored and shifted, from bytes to floats.
#[divan::bench(args = [IMAGES])]
fn augment(bencher: Bencher, layer: Layer) {
    let ones = |dims: &[usize], dtype| Tensor::ones(dims, dtype, &Device::Cpu).expect("ones");
    let index = Tensor::arange(0, BATCH as u32, &Device::Cpu).expect("an index");
    let (corners, flip) = (ones(&[BATCH, 2], DType::U32), ones(&[BATCH], DType::U8));
    let views = Views { index: &index, corners: &corners, flip: &flip, pad: 4 };
    let (images, mean, std) = (ones(&layer.input(), DType::U8), random([3]), random([3]));
    measure(bencher, layer.moving(1 + Floats::BYTES), || {
        kernels::augment::batch(&images, views, &mean, &std, DType::F32)
    });
}

/// The 3×3 patches of the images, which are nine times as large as the images.
#[divan::bench(args = [IMAGES])]
fn im2col(bencher: Bencher, layer: Layer) {
    let images = random(layer.input());
    measure(bencher, layer.moving((1 + 9) * Floats::BYTES), || kernels::im2col::forward(&images, 3, 1));
}

/// The averages of the last maps; the benchmark counts the maps that are read.
#[divan::bench(types = [Floats, Levels], args = [LAST])]
fn pool<M: Maps>(bencher: Bencher, layer: Layer) {
    let x = maps::<M>(layer.input());
    measure(bencher, layer.moving(M::BYTES), || kernels::pool::global_average(&x));
}

/// The gradient of the last maps; the benchmark counts the gradient that is written.
#[divan::bench(args = [LAST])]
fn pool_backward(bencher: Bencher, layer: Layer) {
    let gy = random([BATCH, layer.inputs]);
    measure(bencher, layer.moving(Floats::BYTES), || {
        kernels::pool::backward(&gy, layer.size, layer.size, DType::F32)
    });
}

/// The cross-entropy of a batch and its gradient.
#[divan::bench]
fn loss(bencher: Bencher) {
    let logits = random([BATCH, CLASSIFIER.outputs]);
    let labels = Tensor::zeros(BATCH, DType::U32, &Device::Cpu).expect("labels");
    let moved = BytesCount::f32(2 * logits.elem_count());
    measure(bencher, moved, || kernels::loss::softmax_cross_entropy(&logits, &labels, 0.1));
}

/// One step of SGD with momentum for the weights of [`POINTWISE`], about a million. Each weight is
/// read with its gradient and velocity, and written with its velocity.
#[divan::bench]
fn sgd(bencher: Bencher) {
    let weights = || POINTWISE.map(|layer| random(layer.weight()));
    let (params, grads, velocities) = (weights(), weights(), weights());
    let updates: [_; POINTWISE.len()] = std::array::from_fn(|i| Update {
        param: &params[i],
        grad: &grads[i],
        velocity: &velocities[i],
        weight_decay: 1e-4,
    });
    let moved = BytesCount::f32(5 * params.iter().map(Tensor::elem_count).sum::<usize>());
    measure(bencher, moved, || {
        kernels::sgd::step_all(&updates, Rule { lr: Rate::Number(1e-3), momentum: 0.9 })
    });
}
