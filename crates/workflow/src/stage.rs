use baselines::Dfq;
use models::{Method, MobileNet, Quantization};
use pfq::{Corrected, Criterion, PfQ};
use std::sync::Arc;
use train::Training;

/// One step of a workflow: what is done, and to which stage's network.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// What is done.
    pub kind: StageKind,
    /// The stage whose network is the input; none for the first one.
    pub parent: Option<Arc<Stage>>,
}

/// What a stage does, with all of its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StageKind {
    /// Takes the network that [`Resources::given`](crate::Resources::given) has, as one begins that was trained elsewhere.
    Given {
        /// The first 128 bits of its [`Network::sha256`](models::Network::sha256).
        hash: u128,
    },
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

impl Stage {
    /// A stage that begins a workflow.
    pub fn root(kind: StageKind) -> Arc<Self> {
        Arc::new(Self { kind, parent: None })
    }

    /// The stage `kind` on this one's network.
    pub fn then(self: &Arc<Self>, kind: StageKind) -> Arc<Self> {
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

    /// The model that the workflow began with, e.g. `mobilenet_v2`.
    pub fn model(&self) -> &'static str {
        match &self.origin().kind {
            StageKind::Pretrain { network, .. } => network.version.name(),
            // Only `root` makes stages without a parent: this one was given.
            _ => "network",
        }
    }

    /// A short readable name: model, step and seed, e.g. `mobilenet_v2 fine-tune A4/W4 seed 0`.
    pub fn label(&self) -> String {
        let seed = self.seed().map(|seed| format!(" seed {seed}")).unwrap_or_default();
        format!("{} {}{seed}", self.model(), self.step())
    }

    /// What it does, e.g. `fine-tune A4/W4`.
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

    /// Its seed, for stages that have one.
    pub fn seed(&self) -> Option<u64> {
        match &self.kind {
            StageKind::Pretrain { seed, .. } | StageKind::FineTune { seed, .. } => Some(*seed),
            StageKind::Given { .. } | StageKind::Prune { .. } | StageKind::Equalize { .. } => None,
        }
    }

    /// The training settings, for stages that train.
    pub fn training(&self) -> Option<&Training> {
        match &self.kind {
            StageKind::Pretrain { training, .. } | StageKind::FineTune { training, .. } => Some(training),
            StageKind::Given { .. } | StageKind::Prune { .. } | StageKind::Equalize { .. } => None,
        }
    }
}
