use baselines::Dfq;
use models::{Method, MobileNet, Quantization};
use pfq::{Corrected, Criterion, PfQ};
use std::sync::Arc;
use train::Training;

/// One step of a workflow: an operation and the stage whose network it is applied to.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// The operation and its settings.
    pub kind: StageKind,
    /// The stage whose network is the input, or `None` for the first stage.
    pub parent: Option<Arc<Stage>>,
}

/// The operation of a stage, with all of its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StageKind {
    /// Takes the network in [`Resources::given`](crate::Resources::given), for workflows that start
    /// from a network that was trained elsewhere.
    Given {
        /// The first 128 bits of the network's [`Network::sha256`](models::Network::sha256).
        hash: u128,
    },
    /// Trains a fresh network in float.
    Pretrain {
        /// The architecture of the network.
        network: MobileNet,
        /// The settings of the training.
        training: Training,
        /// The seed of the parameters, the order of the images and their augmentation.
        seed: u64,
    },
    /// Removes low-variance filters.
    Prune {
        /// The settings of pruning, such as the threshold and bias correction.
        pfq: PfQ,
    },
    /// Trains the network further, with quantizers.
    FineTune {
        /// The settings of the quantizers.
        quantization: Quantization,
        /// The settings of the training.
        training: Training,
        /// The seed of the order of the images and their augmentation.
        seed: u64,
    },
    /// Prepares the network as DFQ does.
    Equalize {
        /// The settings of DFQ.
        dfq: Dfq,
        /// The settings of the quantizers.
        quantization: Quantization,
    },
}

impl Stage {
    /// Creates the first stage of a workflow.
    pub fn root(kind: StageKind) -> Arc<Self> {
        Arc::new(Self { kind, parent: None })
    }

    /// Creates the stage that applies `kind` to this stage's network.
    pub fn then(self: &Arc<Self>, kind: StageKind) -> Arc<Self> {
        Arc::new(Self { kind, parent: Some(self.clone()) })
    }

    /// Returns the first stage of the workflow.
    pub fn origin(&self) -> &Stage {
        self.parent.as_ref().map_or(self, |parent| parent.origin())
    }

    /// Returns this stage and all stages before it, starting with the first one.
    pub fn lineage(self: &Arc<Self>) -> Vec<Arc<Stage>> {
        let mut all = self.parent.as_ref().map_or_else(Vec::new, |parent| parent.lineage());
        all.push(self.clone());
        all
    }

    /// Returns the name of the workflow's initial model, such as `mobilenet_v2`, or `network` for a
    /// given network.
    pub fn model(&self) -> &'static str {
        match &self.origin().kind {
            StageKind::Pretrain { network, .. } => network.version.name(),
            // A workflow starts with a pre-training or with a given network.
            _ => "network",
        }
    }

    /// Returns a short readable name of model, step and seed, such as
    /// `mobilenet_v2 fine-tune A4/W4 seed 0`.
    pub fn label(&self) -> String {
        let seed = self.seed().map(|seed| format!(" seed {seed}")).unwrap_or_default();
        format!("{} {}{seed}", self.model(), self.step())
    }

    /// Returns a short readable name of the operation, such as `fine-tune A4/W4`.
    pub fn step(&self) -> String {
        match &self.kind {
            StageKind::Given { .. } => "as given".into(),
            StageKind::Pretrain { .. } => "pre-train".into(),
            StageKind::Prune { pfq } => match (pfq.criterion, pfq.bias_correction, pfq.corrected) {
                (Criterion::SmallestGamma, ..) => "pruning by γ".into(),
                (Criterion::Random { seed }, ..) => format!("pruning by lot {seed}"),
                (_, false, _) => "PfQ without bias correction".into(),
                (_, true, Corrected::Beta) => "PfQ with correction of β".into(),
                (_, true, Corrected::Mean) => "PfQ".into(),
            },
            StageKind::FineTune { quantization: q, .. } => {
                let method = match q.method {
                    Method::Uniform => String::new(),
                    learned => format!("{} ", learned.title()),
                };
                format!("fine-tune {method}A{}/W{}", q.activations, q.weights)
            }
            StageKind::Equalize { quantization: q, .. } => format!("DFQ A{}/W{}", q.activations, q.weights),
        }
    }

    /// Returns the seed, for stages that have one.
    pub fn seed(&self) -> Option<u64> {
        match &self.kind {
            StageKind::Pretrain { seed, .. } | StageKind::FineTune { seed, .. } => Some(*seed),
            StageKind::Given { .. } | StageKind::Prune { .. } | StageKind::Equalize { .. } => None,
        }
    }

    /// Returns the training settings, for stages that train.
    pub fn training(&self) -> Option<&Training> {
        match &self.kind {
            StageKind::Pretrain { training, .. } | StageKind::FineTune { training, .. } => Some(training),
            StageKind::Given { .. } | StageKind::Prune { .. } | StageKind::Equalize { .. } => None,
        }
    }
}
