//! Table 1 of the paper: fine-tuning with quantized activations after no pruning, PfQ without bias correction,
//! and PfQ, on CIFAR-100.

use anyhow::Result;
use experiments::{Method, ModelName, Table};
use workflow::Recipe;

fn main() -> Result<()> {
    experiments::main(&Table {
        number: 1,
        title: "Table 1: activations quantized, with and without PfQ",
        models: &[ModelName::MobilenetV1, ModelName::MobilenetV2],
        bits: &[(4, 32), (3, 32)],
        methods: &[
            Method { name: "original", workflow: Recipe::activations_only },
            Method { name: "pfq_without_bias_correction", workflow: Recipe::pfq_without_bias_correction },
            Method { name: "pfq", workflow: Recipe::pfq },
        ],
    })
}
