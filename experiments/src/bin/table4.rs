//! Table 4 of the paper, on CIFAR-100: DFQ + fine-tuning, PACT, DSQ and Algorithm 1.

fn main() -> anyhow::Result<()> {
    experiments::main(&[&experiments::tables::TABLE4])
}
