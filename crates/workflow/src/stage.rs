use baselines::Dfq;
use models::{Method, MobileNet, Quantization};
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
const RESULT_VERSION: u32 = 3;

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
        self.key_of(RESULT_VERSION, data_fingerprint)
    }

    fn key_of(&self, version: u32, data_fingerprint: &str) -> String {
        let parent = self.parent.as_ref().map(|parent| parent.key_of(version, data_fingerprint));
        let inputs = serde_json::json!({
            "version": version,
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
                let method = match q.method {
                    Method::Uniform => String::new(),
                    learned => format!("{} ", learned.title()),
                };
                format!("{model} fine-tune {method}A{}/W{} seed {seed}", q.activations, q.weights)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The stages of MobileNetV2, A4/W4, ours, in results/table3/reduced, which were run at [`RESULT_VERSION`] 2. A
    /// setting that came later, such as the method, must not be in the key where it says what went without saying.
    #[test]
    fn keys_of_stored_stages_stay_what_they_were() {
        let data = "1465f6dce7af2ddf02526af1c2774137ae118fdb11dc8d28a714b4fd619a771e";
        let training = |batch: usize, warmup: f64, cosine: f64, rate: f64| {
            serde_json::json!({
                "warmup_epochs": warmup, "cosine_epochs": cosine, "learning_rate": rate, "batch": batch,
                "momentum": 0.9, "weight_decay": 0.0005, "decay_norm": true, "label_smoothing": 0.0,
                "range_momentum": 0.01, "augmentation": { "pad": 4, "flip": true },
            })
        };
        let tune = |weights: u32, rate: f64| {
            let quantization = serde_json::json!({
                "activations": 4, "weights": weights, "first_layer": 8, "last_layer": 8, "fold": "unfolded",
            });
            let training = training(64, 0.0, 1.0, rate);
            serde_json::json!({ "fine_tune": { "quantization": quantization, "training": training, "seed": 0 } })
        };
        let network = serde_json::json!({
            "version": "mobilenet_v2", "input": "cifar", "classes": 100, "width": 0.25, "first_expansion": true,
            "activation": "relu6",
        });
        let pretrain = serde_json::json!({ "pretrain": { "network": network, "training": training(64, 1.0, 15.0, 0.1), "seed": 0 } });
        let prune = serde_json::json!({ "prune": { "pfq": { "threshold": null, "bias_correction": true } } });
        let mut parent = None;
        for (stage, key) in [
            (pretrain, "20c9dec823f353e6"),
            (prune.clone(), "39c7080382015ffe"),
            (tune(32, 0.01), "c2e576991450d12b"),
            (prune, "e14dc7877acc4e5a"),
            (tune(4, 0.001), "5b487442a8fa4314"),
        ] {
            let stage = Stage { kind: serde_json::from_value(stage).unwrap(), parent };
            assert_eq!(stage.key_of(2, data), key, "{}", stage.label());
            parent = Some(Arc::new(stage));
        }
    }
}
