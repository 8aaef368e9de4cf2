use baselines::Dfq;
use models::{MobileNet, Quantization};
use pfq::PfQ;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use train::Training;

/// One step of a workflow: what is done, and to which stage's network.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// What is done.
    pub kind: Kind,
    /// The stage whose network is the input; none for pre-training.
    pub parent: Option<Arc<Stage>>,
}

/// What a stage does, with all of its settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Trains a fresh network in float.
    Pretrain {
        /// Which network.
        network: MobileNet,
        /// How it is trained.
        training: Training,
        /// Seed of the parameters, the order of the images and their augmentation.
        seed: u64,
    },
    /// Removes low-variance filters.
    Prune {
        /// Threshold and bias correction.
        pfq: PfQ,
    },
    /// Trains on with quantizers.
    FineTune {
        /// What is quantized.
        quantization: Quantization,
        /// How it is trained.
        training: Training,
        /// Seed of the order of the images and their augmentation.
        seed: u64,
    },
    /// Prepares a network as DFQ does.
    Equalize {
        /// The method's steps.
        dfq: Dfq,
        /// What is quantized.
        quantization: Quantization,
    },
}

/// Enters every key. To be raised when a change makes stages give other results from the same
/// inputs, so that stored results of older versions are not taken for new ones.
const RESULT_VERSION: u32 = 2;

impl Stage {
    /// A stage that begins a workflow.
    pub fn root(kind: Kind) -> Arc<Self> {
        Arc::new(Self { kind, parent: None })
    }

    /// The stage `kind` on this one's network.
    pub fn then(self: &Arc<Self>, kind: Kind) -> Arc<Self> {
        Arc::new(Self { kind, parent: Some(self.clone()) })
    }

    /// The stage that the workflow began with.
    pub fn origin(&self) -> &Stage {
        self.parent.as_ref().map_or(self, |parent| parent.origin())
    }

    /// This stage and all before it, the first one first.
    pub fn lineage(self: &Arc<Self>) -> Vec<Arc<Stage>> {
        let mut all = self.parent.as_ref().map_or_else(Vec::new, |parent| parent.lineage());
        all.push(self.clone());
        all
    }

    /// The key under which the stage's result is stored: 16 hexadecimal digits of the SHA-256 of its
    /// inputs (settings, seed, the parent's key, the data's fingerprint).
    pub fn key(&self, data_fingerprint: &str) -> String {
        let parent = self.parent.as_ref().map(|parent| parent.key(data_fingerprint));
        let inputs = serde_json::json!({
            "version": RESULT_VERSION,
            "stage": self.kind,
            "parent": parent,
            "data": data_fingerprint,
        });
        let hash = Sha256::digest(inputs.to_string());
        hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The model that the workflow began with, e.g. `mobilenet_v2`.
    pub fn model(&self) -> &'static str {
        match &self.origin().kind {
            Kind::Pretrain { network, .. } => network.version.name(),
            // Only `root` makes stages without a parent, and tables begin with pre-training.
            _ => "network",
        }
    }

    /// A short readable name, e.g. `mobilenet_v2 fine-tune A4/W4 seed 0`.
    pub fn label(&self) -> String {
        let model = self.model();
        match &self.kind {
            Kind::Pretrain { seed, .. } => format!("{model} pre-train seed {seed}"),
            Kind::Prune { pfq } if pfq.bias_correction => format!("{model} PfQ"),
            Kind::Prune { .. } => format!("{model} PfQ without bias correction"),
            Kind::FineTune { quantization: q, seed, .. } => {
                format!("{model} fine-tune A{}/W{} seed {seed}", q.activations, q.weights)
            }
            Kind::Equalize { quantization: q, .. } => {
                format!("{model} DFQ A{}/W{}", q.activations, q.weights)
            }
        }
    }

    /// The training settings, for stages that train.
    pub fn training(&self) -> Option<&Training> {
        match &self.kind {
            Kind::Pretrain { training, .. } | Kind::FineTune { training, .. } => Some(training),
            Kind::Prune { .. } | Kind::Equalize { .. } => None,
        }
    }
}
