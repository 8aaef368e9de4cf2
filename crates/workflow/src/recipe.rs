//! The paper's workflows, as values made of stages.

use crate::{Kind, Stage};
use baselines::Dfq;
use models::{Fold, Method, Quantization};
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
    /// Training with activations and weights quantized at once, from the float network ("fine-tune once").
    pub once_training: Training,
    /// Training of the network that DFQ prepared.
    pub dfq_training: Training,
    /// Training with PACT, from the float network.
    pub pact_training: Training,
    /// Training with DSQ, from the float network.
    pub dsq_training: Training,
    /// Seed of the fine-tuning stages.
    pub seed: u64,
}

impl Recipe {
    /// "Original" of Table 1: fine-tuning with only the activations quantized, of the network as it is.
    pub fn activations_only(&self, network: &Arc<Stage>) -> Arc<Stage> {
        // How batch normalization is folded says nothing while the weights are float, and must not make
        // another stage.
        let quantization =
            Quantization { weights: Precision::Float, fold: Fold::Unfolded, ..self.quantization };
        network.then(self.fine_tune(quantization, self.activation_training))
    }

    /// "PfQ" of Table 1, which is Algorithm 1 up to step 3: prune, then fine-tune with only the activations
    /// quantized.
    pub fn pfq(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        self.activations_only(&pretrained.then(Kind::Prune { pfq: self.pfq }))
    }

    /// "PfQ (w/o bias correction)" of Table 1: the same, but the constants of removed filters are lost.
    pub fn pfq_without_bias_correction(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        let pfq = PfQ { bias_correction: false, ..self.pfq };
        self.activations_only(&pretrained.then(Kind::Prune { pfq }))
    }

    /// "Fine-tune once (w/ PfQ)" of Table 2: prune, then fine-tune with activations and weights quantized at
    /// once.
    pub fn fine_tune_once(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        pretrained
            .then(Kind::Prune { pfq: self.pfq })
            .then(self.fine_tune(self.quantization, self.once_training))
    }

    /// Algorithm 1 of the paper (method section 3) on a pre-trained network: prune, fine-tune with
    /// quantized activations, prune again, fine-tune with quantized activations and weights.
    pub fn algorithm1(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        self.pfq(pretrained)
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

    /// "PACT" of Table 4: fine-tuning once with activations and weights quantized by PACT and DoReFa; nothing is pruned.
    pub fn pact(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        self.learned(pretrained, Method::Pact, self.pact_training)
    }

    /// "DSQ" of Table 4: the same with differentiable soft quantization.
    pub fn dsq(&self, pretrained: &Arc<Stage>) -> Arc<Stage> {
        self.learned(pretrained, Method::Dsq, self.dsq_training)
    }

    fn learned(&self, pretrained: &Arc<Stage>, method: Method, training: Training) -> Arc<Stage> {
        // Both methods leave batch normalization as it is; PACT's weights even need it, as they are rescaled.
        let quantization = Quantization { method, fold: Fold::Unfolded, ..self.quantization };
        pretrained.then(self.fine_tune(quantization, training))
    }

    fn fine_tune(&self, quantization: Quantization, training: Training) -> Kind {
        Kind::FineTune { quantization, training, seed: self.seed }
    }
}
