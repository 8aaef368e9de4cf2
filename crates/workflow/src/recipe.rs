//! The paper's workflows, as values made of stages.

use crate::{Kind, Stage};
use baselines::Dfq;
use models::{Fold, Quantization};
use pfq::PfQ;
use quant_core::Precision;
use std::sync::Arc;
use train::Training;

/// The settings from which the workflows of one table cell are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Bits, and batch normalization under quantized weights.
    pub quantization: Quantization,
    /// Pruning.
    pub pfq: PfQ,
    /// The baseline's preparation.
    pub dfq: Dfq,
    /// Training with only the activations quantized (Algorithm 1, step 3).
    pub activation_training: Training,
    /// Training with activations and weights quantized (Algorithm 1, step 5).
    pub weight_training: Training,
    /// Training of the network that DFQ prepared.
    pub dfq_training: Training,
    /// Seed of the fine-tuning stages.
    pub seed: u64,
}

impl Recipe {
    /// Algorithm 1 of the paper (method section 3) on a pre-trained network: prune, fine-tune with
    /// quantized activations, prune again, fine-tune with quantized activations and weights.
    pub fn algorithm1(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        // How batch normalization is folded says nothing while the weights are float, and must not make
        // another stage.
        let activations_only =
            Quantization { weights: Precision::Float, fold: Fold::Unfolded, ..self.quantization };
        pretrained
            .then(Kind::Prune { pfq: self.pfq })
            .then(self.fine_tune(activations_only, self.activation_training))
            .then(Kind::Prune { pfq: self.pfq })
            .then(self.fine_tune(self.quantization, self.weight_training))
    }

    /// "DFQ + fine-tune" of Table 3.
    pub fn dfq_with_fine_tune(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        // DFQ is defined on the folded network.
        let quantization = Quantization { fold: Fold::Frozen, ..self.quantization };
        pretrained
            .then(Kind::Equalize { dfq: self.dfq, quantization })
            .then(self.fine_tune(quantization, self.dfq_training))
    }

    fn fine_tune(&self, quantization: Quantization, training: Training) -> Kind {
        Kind::FineTune { quantization, training, seed: self.seed }
    }
}
