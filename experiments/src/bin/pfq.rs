//! The tool for networks in files: running variances, pruning, multiply–accumulates, evaluation.

fn main() -> anyhow::Result<()> {
    experiments::tool::main()
}
