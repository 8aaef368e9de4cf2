//! Every table of the paper on CIFAR-100, one after the other, from one set of stages.

fn main() -> anyhow::Result<()> {
    experiments::main(&experiments::tables::ALL)
}
