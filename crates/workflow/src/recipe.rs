//! The paper's workflows, built from stages.

use crate::{Error, Result, Stage, StageKind};
use baselines::Dfq;
use models::{Fold, Method, Quantization, WeightGrid};
use pfq::PfQ;
use quant_core::Precision;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use train::Training;

/// The purpose of a training. In a profile it is the name of the settings, as in `[training.once]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Purpose {
    /// Training of the float network from scratch.
    Pretraining,
    /// Fine-tuning with quantized activations (Algorithm 1, step 3).
    Activations,
    /// Fine-tuning with quantized activations and weights (Algorithm 1, step 5).
    Weights,
    /// Fine-tuning with activations and weights quantized at once, from the float network (Table
    /// 2's "fine-tune once").
    Once,
    /// Fine-tuning after DFQ.
    Dfq,
    /// Fine-tuning with a method that learns its quantizers, from the float network. The default is
    /// the training for [`Purpose::Once`].
    Learned(Method),
}

impl Purpose {
    fn all() -> impl Iterator<Item = Self> {
        let fixed = [Self::Pretraining, Self::Activations, Self::Weights, Self::Once, Self::Dfq];
        fixed.into_iter().chain(Method::learned().map(Self::Learned))
    }
}

impl std::fmt::Display for Purpose {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pretraining => "pretraining",
            Self::Activations => "activations",
            Self::Weights => "weights",
            Self::Once => "once",
            Self::Dfq => "dfq",
            Self::Learned(method) => method.name(),
        })
    }
}

impl From<Purpose> for String {
    fn from(purpose: Purpose) -> Self {
        purpose.to_string()
    }
}

impl TryFrom<String> for Purpose {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        Self::all().find(|purpose| purpose.to_string() == name).ok_or_else(|| {
            let all: Vec<String> = Self::all().map(String::from).collect();
            format!("there is no training {name:?}: expected one of {}", all.join(", "))
        })
    }
}

/// The trainings of a profile, by purpose.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Trainings(pub BTreeMap<Purpose, Training>);

impl Trainings {
    /// Returns the training for `purpose`.
    ///
    /// # Errors
    /// If the settings have no such training.
    pub fn get(&self, purpose: Purpose) -> Result<Training> {
        let given = self.0.get(&purpose);
        let given = match purpose {
            Purpose::Learned(_) => given.or_else(|| self.0.get(&Purpose::Once)),
            _ => given,
        };
        given.copied().ok_or(Error::NoTraining(purpose))
    }

    /// Sets the training for `purpose`.
    pub fn set(&mut self, purpose: Purpose, training: Training) {
        self.0.insert(purpose, training);
    }
}

/// The settings from which the workflows of one table cell are made.
///
/// A workflow is an error if the settings lack a training that it needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// The bit widths, and how batch normalization is treated while the weights are quantized.
    pub quantization: Quantization,
    /// The settings of pruning.
    pub pfq: PfQ,
    /// The settings of the DFQ baseline.
    pub dfq: Dfq,
    /// The trainings that the workflows need.
    pub trainings: Trainings,
    /// The seed of the fine-tuning stages.
    pub seed: u64,
}

impl Recipe {
    /// Builds "Original" of Table 1: fine-tuning of the unpruned network with only the activations
    /// quantized.
    pub fn activations_only(&self, network: &Arc<Stage>) -> Result<Arc<Stage>> {
        self.activations_only_with(network, Fold::Unfolded)
    }

    /// Builds [`Recipe::activations_only`] with running statistics, also in training. Normalization
    /// is folded before training, so that a running mean that bias correction changed becomes part
    /// of a bias.
    pub fn frozen_activations_only(&self, network: &Arc<Stage>) -> Result<Arc<Stage>> {
        self.activations_only_with(network, Fold::Frozen)
    }

    fn activations_only_with(&self, network: &Arc<Stage>, fold: Fold) -> Result<Arc<Stage>> {
        // The settings for batch normalization and weight grids have no effect while the weights
        // are float, so they must not change the stage's key.
        let weight_grid = WeightGrid::Tensor;
        let quantization = Quantization { weights: Precision::Float, fold, weight_grid, ..self.quantization };
        Ok(network.then(self.fine_tune(quantization, Purpose::Activations)?))
    }

    /// Builds the pruned pre-trained network.
    pub fn pruned(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        pretrained.then(StageKind::Prune { pfq: self.pfq })
    }

    /// Builds [`Recipe::algorithm1`] without pruning.
    pub fn algorithm1_unpruned(&self, pretrained: &Arc<Stage>) -> Result<Arc<Stage>> {
        let tuned = self.fine_tune(self.quantization, Purpose::Weights)?;
        Ok(self.activations_only(pretrained)?.then(tuned))
    }

    /// Builds DFQ without fine-tuning.
    pub fn dfq_alone(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        let quantization = Quantization { fold: self.dfq.fold(), ..self.quantization };
        pretrained.then(StageKind::Equalize { dfq: self.dfq, quantization })
    }

    /// Builds "PfQ" of Table 1, which is Algorithm 1 up to step 3: prune, then fine-tune with only
    /// the activations quantized.
    pub fn pfq(&self, pretrained: &Arc<Stage>) -> Result<Arc<Stage>> {
        self.activations_only(&self.pruned(pretrained))
    }

    /// Builds "PfQ (w/o bias correction)" of Table 1: [`Recipe::pfq`], but the constants of removed
    /// filters are lost.
    pub fn pfq_without_bias_correction(&self, pretrained: &Arc<Stage>) -> Result<Arc<Stage>> {
        let pfq = PfQ { bias_correction: false, ..self.pfq };
        self.activations_only(&pretrained.then(StageKind::Prune { pfq }))
    }

    /// Builds "Fine-tune once (w/ PfQ)" of Table 2: prune, then fine-tune with activations and
    /// weights quantized at once.
    pub fn fine_tune_once(&self, pretrained: &Arc<Stage>) -> Result<Arc<Stage>> {
        let tuned = self.fine_tune(self.quantization, Purpose::Once)?;
        Ok(self.pruned(pretrained).then(tuned))
    }

    /// Builds Algorithm 1 of the paper (method section 3) on a pre-trained network: prune,
    /// fine-tune with quantized activations, prune again, fine-tune with quantized activations and
    /// weights.
    pub fn algorithm1(&self, pretrained: &Arc<Stage>) -> Result<Arc<Stage>> {
        let tuned = self.fine_tune(self.quantization, Purpose::Weights)?;
        Ok(self.pruned(&self.pfq(pretrained)?).then(tuned))
    }

    /// Builds "DFQ + fine-tune" of Table 3.
    pub fn dfq_with_fine_tune(&self, pretrained: &Arc<Stage>) -> Result<Arc<Stage>> {
        let quantization = Quantization { fold: self.dfq.fold(), ..self.quantization };
        let tuned = self.fine_tune(quantization, Purpose::Dfq)?;
        Ok(self.dfq_alone(pretrained).then(tuned))
    }

    /// Builds fine-tuning by a method that learns its quantizers, such as "PACT" and "DSQ" of Table
    /// 4, with activations and weights quantized at once. Nothing is pruned.
    pub fn learned(&self, pretrained: &Arc<Stage>, method: Method) -> Result<Arc<Stage>> {
        // These methods do not fold batch normalization. PACT even needs it, because it rescales
        // the weights.
        let quantization = Quantization { method, fold: Fold::Unfolded, ..self.quantization };
        Ok(pretrained.then(self.fine_tune(quantization, Purpose::Learned(method))?))
    }

    fn fine_tune(&self, quantization: Quantization, purpose: Purpose) -> Result<StageKind> {
        Ok(StageKind::FineTune { quantization, training: self.trainings.get(purpose)?, seed: self.seed })
    }
}
