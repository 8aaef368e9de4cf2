//! Table 4 of the paper: DFQ + fine-tuning, PACT, DSQ and Algorithm 1. The paper compares them on ImageNet; here it is
//! the same comparison on CIFAR-100, and named so.

use anyhow::{Result, bail};
use clap::Parser;
use experiments::{Flags, Method, ModelName, Table};
use workflow::Recipe;

fn main() -> Result<()> {
    let flags = Flags::parse();
    if flags.config.is_none() && flags.profile == "paper" {
        bail!(
            "--profile paper of Table 4 is of ImageNet, which is not supported yet; --profile quick and reduced make \
             the same comparison on CIFAR-100"
        );
    }
    experiments::main(&Table {
        number: 4,
        title: "Table 4 on CIFAR-100 (the paper's is on ImageNet): DFQ, PACT, DSQ and ours",
        models: &[ModelName::MobilenetV2],
        bits: &[(4, 4)],
        methods: &[
            Method { name: "dfq_with_fine_tune", workflow: Recipe::dfq_with_fine_tune },
            Method { name: "pact", workflow: Recipe::pact },
            Method { name: "dsq", workflow: Recipe::dsq },
            Method { name: "ours", workflow: Recipe::algorithm1 },
        ],
    })
}
