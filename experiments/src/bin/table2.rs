//! Table 2 of the paper: fine-tuning once after PfQ beside Algorithm 1, on CIFAR-100.

fn main() -> anyhow::Result<()> {
    experiments::main(&[&experiments::tables::TABLE2])
}
