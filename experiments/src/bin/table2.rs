//! Table 2 of the paper: fine-tuning once after PfQ beside Algorithm 1 on CIFAR-100.

use anyhow::Result;
use experiments::{Method, ModelName, Table};
use workflow::Recipe;

fn main() -> Result<()> {
    experiments::main(&Table {
        number: 2,
        title: "Table 2: fine-tuning once and Algorithm 1",
        models: &[ModelName::MobilenetV1, ModelName::MobilenetV2],
        bits: &[(4, 4), (3, 3)],
        methods: &[
            Method { name: "fine_tune_once_with_pfq", workflow: Recipe::fine_tune_once },
            Method { name: "algorithm1", workflow: Recipe::algorithm1 },
        ],
    })
}
