use crate::{BatchNorm, Error, Kernel, MOST_CHANNELS, Network, Norm, Result, Unit};
use candle_core::{DType, Device, Tensor};
use kernels::Activation;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The version of a MobileNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// MobileNetV1 (Howard et al. 2017): 13 depthwise separable blocks.
    #[serde(rename = "mobilenet_v1")]
    V1,
    /// MobileNetV2 (Sandler et al. 2018): 17 inverted residual blocks.
    #[serde(rename = "mobilenet_v2")]
    V2,
}

impl Version {
    /// Returns the name in the paper's tables and in ours.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "mobilenet_v1",
            Self::V2 => "mobilenet_v2",
        }
    }
}

/// The image size that the strides are designed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// 32 × 32, with the strides that give the paper's MAC counts on CIFAR-100.
    Cifar,
    /// 224 × 224, with the usual strides.
    Imagenet,
    /// Other strides. The images are 224 × 224 if the strides shrink a side by a factor of 32 or
    /// more, as the usual ones do, and 32 × 32 otherwise.
    Other(Strides),
}

impl Input {
    /// Returns the strides of a network of this version.
    pub fn strides(self, version: Version) -> Strides {
        match (self, version) {
            // On CIFAR, only the stem and the 12th block have stride 2 (16×16 → 8×8). This choice
            // gives 510.84 M.
            (Self::Cifar, Version::V1) => Strides::of(&[2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1]),
            (Self::Imagenet, Version::V1) => Strides::of(&[2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]),
            // On CIFAR, two of the seven stages halve the map (8×8 at the end). This gives 147.24
            // M.
            (Self::Cifar, Version::V2) => Strides::of(&[1, 1, 2, 2, 1, 1, 1, 1]),
            (Self::Imagenet, Version::V2) => Strides::of(&[2, 1, 2, 2, 2, 1, 2, 1]),
            (Self::Other(strides), _) => strides,
        }
    }

    /// Returns the height and width of the images.
    pub fn side(self) -> usize {
        match self {
            Self::Cifar => 32,
            Self::Imagenet => 224,
            Self::Other(strides) if strides.as_slice().iter().product::<usize>() < 32 => 32,
            Self::Other(_) => 224,
        }
    }
}

/// The strides of a MobileNet. The stem's stride is first. V1 continues with the strides of the 13
/// blocks, V2 with those of the seven stages, which apply to the first block of each stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strides {
    /// The strides, padded with zeros at the end.
    values: [usize; Self::MOST],
}

impl Strides {
    const MOST: usize = 14;

    fn of(strides: &[usize]) -> Self {
        let mut values = [0; Self::MOST];
        values[..strides.len()].copy_from_slice(strides);
        Self { values }
    }

    /// Returns the strides in order.
    pub fn as_slice(&self) -> &[usize] {
        let count = self.values.iter().position(|&stride| stride == 0).unwrap_or(Self::MOST);
        &self.values[..count]
    }

    /// Reads the strides of a MobileNet of this version from its units: those of the stem and of the
    /// depthwise convolutions, in V2 of the first in each stage. Returns `None` if there are too few.
    pub(crate) fn of_units<'a>(version: Version, units: impl Iterator<Item = &'a Unit>) -> Option<Self> {
        let strides: Vec<usize> = units
            .enumerate()
            .filter(|(i, unit)| *i == 0 || unit.kernel.is_depthwise())
            .map(|(_, unit)| unit.kernel.stride())
            .collect();
        let repeats: &[usize] = match version {
            Version::V1 => &[1; 13],
            Version::V2 => &V2_STAGES.map(|(_, _, repeats)| repeats),
        };
        let mut first = 1;
        let mut found = vec![*strides.first()?];
        for repeat in repeats {
            found.push(*strides.get(first)?);
            first += repeat;
        }
        Some(Self::of(&found))
    }

    /// Returns the number of strides of a network.
    fn count(version: Version) -> usize {
        match version {
            Version::V1 => 14,
            Version::V2 => 8,
        }
    }
}

impl fmt::Display for Strides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strides: Vec<String> = self.as_slice().iter().map(usize::to_string).collect();
        f.write_str(&strides.join(","))
    }
}

/// Parses numbers separated by commas, such as `1,1,1,2,2,1,2,1`.
impl FromStr for Strides {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let strides: Option<Vec<usize>> = text
            .split(',')
            .map(|s| s.trim().parse().ok().filter(|stride| (1..=2).contains(stride)))
            .collect();
        let counts = [Version::V1, Version::V2].map(Self::count);
        strides.filter(|strides| counts.contains(&strides.len())).map(|strides| Self::of(&strides)).ok_or_else(|| {
            format!(
                "{text:?}: expected strides of 1 or 2 with commas between: {} of a MobileNetV2 (the stem's and those of the \
                 seven stages) or {} of a V1 (the stem's and those of the 13 blocks)",
                counts[1], counts[0]
            )
        })
    }
}

/// The stages of MobileNetV2: the expansion, the output channels at width 1, and the number of blocks.
const V2_STAGES: [(usize, usize, usize); 7] =
    [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)];

/// The largest width multiplier.
const MOST_WIDTH: f64 = 16.0;

/// The description of a MobileNet. `MobileNet::new` has the defaults of the paper's networks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MobileNet {
    /// V1 or V2.
    pub version: Version,
    /// The image size and strides.
    pub input: Input,
    /// The number of classes.
    pub classes: usize,
    /// The width multiplier. Channels are rounded to multiples of 8, but never down by more than a
    /// tenth. V2's last pointwise layer is never narrower than 1280.
    pub width: f64,
    /// Whether V2's first block (expansion factor 1) has its 1×1 expansion too. The paper's MAC
    /// counts need it; torchvision's weights lack it.
    pub first_expansion: bool,
    /// φ after every convolution except V2's projections.
    pub activation: Activation,
}

impl MobileNet {
    /// Returns the paper's network: width 1, with the first expansion, ReLU6.
    pub fn new(version: Version, input: Input, classes: usize) -> Self {
        Self { version, input, classes, width: 1.0, first_expansion: true, activation: Activation::Relu6 }
    }

    /// Returns the network with new parameters drawn from `seed`.
    ///
    /// Convolutions are He-normal over the fan-out (as in torchvision, without regard to groups).
    /// The classifier's weights are N(0, 0.01²) and its bias is 0. Normalizations are as in
    /// [`BatchNorm::init`].
    pub fn init(&self, seed: u64, device: &Device) -> Result<Network> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        self.build(device, &mut |shape, deviation| normal(&mut random, shape, deviation, device))
    }

    /// Returns [`Network::macs`] of the network without drawing parameters.
    pub fn macs(&self) -> Result<u64> {
        Ok(self.outline()?.macs())
    }

    /// Returns the network with weights that have their shapes, but take no memory.
    pub(crate) fn outline(&self) -> Result<Network> {
        let zero = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        self.build(&Device::Cpu, &mut |shape, _| Ok(zero.broadcast_as(shape)?))
    }

    /// Returns the network with weights that `draw` makes from their shape and standard deviation.
    fn build(&self, device: &Device, draw: &mut Draw) -> Result<Network> {
        let refuse = |problem| {
            Err(Error::Structure {
                network: self.version.name().into(),
                place: "its settings".into(),
                problem,
            })
        };
        // These sizes are checked before anything is allocated.
        if !((1..=MOST_CHANNELS).contains(&self.classes) && self.width > 0.0 && self.width <= MOST_WIDTH) {
            return refuse(format!(
                "{} classes and width {}: expected 1 to {MOST_CHANNELS}, and more than 0, at most {MOST_WIDTH}",
                self.classes, self.width
            ));
        }
        let strides = self.input.strides(self.version);
        let &[stem, ref strides @ ..] = strides.as_slice() else { return refuse("no strides".into()) };
        if 1 + strides.len() != Strides::count(self.version) {
            return refuse(format!(
                "{} strides: expected {}, the stem's first",
                1 + strides.len(),
                Strides::count(self.version)
            ));
        }
        let side = self.input.side();
        let mut b = Builder {
            network: Network::of_image(self.version.name(), [side, side, 3]),
            channels: 3,
            draw,
            device,
        };
        match self.version {
            Version::V1 => self.build_v1(&mut b, stem, strides)?,
            Version::V2 => self.build_v2(&mut b, stem, strides)?,
        }
        let weight = (b.draw)(&[b.channels, self.classes], 0.01)?;
        let mut network = b.network;
        network.push_head(weight, Tensor::zeros(self.classes, DType::F32, device)?);
        network.validate()?;
        Ok(network)
    }

    fn scaled(&self, channels: usize) -> usize {
        let exact = channels as f64 * self.width;
        let rounded = (((exact + 4.0) / 8.0).floor() as usize * 8).max(8);
        if (rounded as f64) < 0.9 * exact { rounded + 8 } else { rounded }
    }

    fn build_v1(&self, b: &mut Builder, stem: usize, strides: &[usize]) -> Result<()> {
        let channels = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024];
        b.unit("stem", Kernel::Full { size: 3, stride: stem }, self.scaled(32), self.activation)?;
        for (i, (c, &stride)) in channels.into_iter().zip(strides).enumerate() {
            let input = b.channels;
            b.unit(format!("blocks.{i}.depthwise"), Kernel::Depthwise { stride }, input, self.activation)?;
            b.unit(format!("blocks.{i}.pointwise"), Kernel::Pointwise, self.scaled(c), self.activation)?;
        }
        Ok(())
    }

    fn build_v2(&self, b: &mut Builder, stem: usize, strides: &[usize]) -> Result<()> {
        b.unit("stem", Kernel::Full { size: 3, stride: stem }, self.scaled(32), self.activation)?;
        let mut block = 0;
        for ((expansion, c, repeats), &stage_stride) in V2_STAGES.into_iter().zip(strides) {
            for repeat in 0..repeats {
                let stride = if repeat == 0 { stage_stride } else { 1 };
                let (input, output, shortcut) = (b.channels, self.scaled(c), b.network.last());
                let name = |part: &str| format!("blocks.{block}.{part}");
                if expansion > 1 || self.first_expansion {
                    b.unit(name("expand"), Kernel::Pointwise, input * expansion, self.activation)?;
                }
                b.unit(name("depthwise"), Kernel::Depthwise { stride }, input * expansion, self.activation)?;
                b.unit(name("project"), Kernel::Pointwise, output, Activation::Identity)?;
                if stride == 1 && input == output {
                    b.network.push_sum(shortcut);
                }
                block += 1;
            }
        }
        let last = self.scaled(1280).max(1280);
        b.unit("last", Kernel::Pointwise, last, self.activation)?;
        Ok(())
    }
}

/// A function that makes weights from their shape and standard deviation.
type Draw<'a> = dyn FnMut(&[usize], f64) -> Result<Tensor> + 'a;

struct Builder<'a> {
    network: Network,
    /// The channels of the last node.
    channels: usize,
    draw: &'a mut Draw<'a>,
    device: &'a Device,
}

impl Builder<'_> {
    fn unit(
        &mut self,
        name: impl Into<String>,
        kernel: Kernel,
        filters: usize,
        activation: Activation,
    ) -> Result<()> {
        let shape = kernel.weight_dims(self.channels, filters);
        let deviation = (2.0 / (kernel.taps() * filters) as f64).sqrt();
        let weight = (self.draw)(&shape, deviation)?;
        let norm = Norm::Batch(BatchNorm::init(filters, self.device)?);
        self.network.push_unit(name, kernel, weight, norm, activation);
        self.channels = filters;
        Ok(())
    }
}

/// Returns a normally distributed tensor (Box–Muller).
fn normal(random: &mut ChaCha8Rng, shape: &[usize], deviation: f64, device: &Device) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            let (u, v): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
            (deviation * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        })
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}
