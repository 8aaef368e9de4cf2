//! Beyond the paper: quantizers that learn beside Algorithm 1.

fn main() -> anyhow::Result<()> {
    experiments::main(&[&experiments::tables::BEYOND])
}
