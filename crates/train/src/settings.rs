use crate::{Error, Result};
use candle_core::DType;
use datasets::Augmentation;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Everything that determines a training run in addition to the network, the data and the seed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// The number of epochs of linear warm-up, `w` in the paper's (19).
    pub warmup_epochs: f64,
    /// The number of epochs of decay after the warm-up, `λ` in (19). The sum of warm-up and decay
    /// is a whole number of epochs.
    pub cosine_epochs: f64,
    /// The learning rate at the end of the warm-up, `l₋₁` in (19).
    pub learning_rate: f64,
    /// The number of images per step, of all processes together.
    pub batch: usize,
    /// The momentum of SGD.
    pub momentum: f64,
    /// The L2 penalty, added to the gradient as in PyTorch.
    pub weight_decay: f64,
    /// Whether the penalty also applies to γ, β and biases, as it does by default in PyTorch.
    pub decay_norm: bool,
    /// The share of the target that is spread evenly over all classes; 0 is plain cross-entropy.
    pub label_smoothing: f64,
    /// The share by which each batch moves the activation ranges.
    pub range_momentum: f64,
    /// The augmentation of the training images.
    pub augmentation: Augmentation,
    /// How the rate decays after the warm-up. A cosine is not serialized, so that the serialized
    /// form is that of older versions, which lack this field.
    #[serde(default, skip_serializing_if = "Decay::is_cosine")]
    pub decay: Decay,
    /// The dtype of feature maps and their gradients. `f32` is not serialized, for the same reason.
    #[serde(default, skip_serializing_if = "Arithmetic::is_f32")]
    pub arithmetic: Arithmetic,
    /// Whether several processes that train together use the statistics and extremes of the whole
    /// batch, and not of the part that each process has. It has no effect on one process. `false`
    /// is not serialized, for the same reason.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sync_norm: bool,
}

/// The dtype of feature maps and their gradients.
///
/// Parameters, their gradients, statistics, sums, the pooled features and everything after them are
/// always `f32`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arithmetic {
    /// `f32`, in which values are computed.
    #[default]
    F32,
    /// `bf16`, with 8 bits of precision. It halves the memory traffic, which takes most of the time
    /// of a training step.
    Bf16,
}

impl Arithmetic {
    fn is_f32(&self) -> bool {
        *self == Self::F32
    }

    /// Returns the name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Returns the dtype of the images, and so of all feature maps.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// How the learning rate decays after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Decays to 0 by the cosine of the paper's (19).
    #[default]
    Cosine,
    /// Multiplies the rate by 0.1 after each epoch whose training accuracy, measured during
    /// training, is below that of the previous epoch. This is our reading of Table 5's "using
    /// accuracy drop".
    AccuracyDrop,
}

impl Decay {
    fn is_cosine(&self) -> bool {
        *self == Self::Cosine
    }
}

impl Training {
    /// Returns the total number of epochs.
    pub fn epochs(&self) -> usize {
        (self.warmup_epochs + self.cosine_epochs).round() as usize
    }

    /// Computes the learning rate at time `t` in epochs, given the training accuracies of the
    /// finished epochs.
    ///
    /// This is the paper's (19): `l₋₁·t/w` up to `w`, then `l₋₁·½(1 + cos(π(t − w)/λ))`. With
    /// [`Decay::AccuracyDrop`] it is `l₋₁·10⁻ᵈ` after the warm-up, where `d` is the number of drops
    /// of the accuracy.
    pub fn rate(&self, t: f64, accuracies: &[f64]) -> f64 {
        if t < self.warmup_epochs {
            return self.learning_rate * t / self.warmup_epochs;
        }
        match self.decay {
            Decay::Cosine => {
                let share = ((t - self.warmup_epochs) / self.cosine_epochs).min(1.0);
                self.learning_rate * 0.5 * (1.0 + (PI * share).cos())
            }
            Decay::AccuracyDrop => {
                let drops = accuracies.windows(2).filter(|pair| pair[1] < pair[0]).count();
                self.learning_rate * 0.1f64.powi(drops as i32)
            }
        }
    }

    /// Checks that every setting is in its allowed range.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, key, found: f64, expected| {
            if ok { Ok(()) } else { Err(Error::Setting { key, found: found.to_string(), expected }) }
        };
        let total = self.warmup_epochs + self.cosine_epochs;
        check(self.warmup_epochs >= 0.0, "warmup_epochs", self.warmup_epochs, "0 or more")?;
        check(self.cosine_epochs > 0.0, "cosine_epochs", self.cosine_epochs, "more than 0")?;
        check(
            total.fract() == 0.0 && total <= 10_000.0,
            "warmup_epochs + cosine_epochs",
            total,
            "a whole number of epochs, at most 10000",
        )?;
        let rate = self.learning_rate;
        check(rate > 0.0 && rate.is_finite(), "learning_rate", rate, "a number above 0")?;
        check((1..=65_536).contains(&self.batch), "batch", self.batch as f64, "1 to 65536")?;
        check((0.0..1.0).contains(&self.momentum), "momentum", self.momentum, "0 up to, not including, 1")?;
        check(
            (0.0..1.0).contains(&self.weight_decay),
            "weight_decay",
            self.weight_decay,
            "0 up to, not including, 1",
        )?;
        check(
            (0.0..1.0).contains(&self.label_smoothing),
            "label_smoothing",
            self.label_smoothing,
            "0 up to, not including, 1",
        )?;
        check(
            self.range_momentum > 0.0 && self.range_momentum <= 1.0,
            "range_momentum",
            self.range_momentum,
            "more than 0, at most 1",
        )?;
        // With more padding, some crops of an image of 32 pixels would show nothing of it.
        let pad = self.augmentation.pad;
        check(pad < 32, "augmentation.pad", pad as f64, "0 to 31")
    }
}
