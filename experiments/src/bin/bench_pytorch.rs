//! Speed beside PyTorch: training, evaluation and single operations.

fn main() -> anyhow::Result<()> {
    experiments::bench::main()
}
