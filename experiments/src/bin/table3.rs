//! Table 3 of the paper: DFQ + fine-tuning beside Algorithm 1 on CIFAR-100.

use anyhow::Result;
use experiments::{Method, ModelName, Table};
use workflow::Recipe;

fn main() -> Result<()> {
    experiments::main(&Table {
        number: 3,
        title: "Table 3: DFQ + fine-tune and ours",
        models: &[ModelName::MobilenetV1, ModelName::MobilenetV2],
        bits: &[(4, 4), (3, 3)],
        methods: &[
            Method { name: "dfq_with_fine_tune", workflow: Recipe::dfq_with_fine_tune },
            Method { name: "ours", workflow: Recipe::algorithm1 },
        ],
    })
}
