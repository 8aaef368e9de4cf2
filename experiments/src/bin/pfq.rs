//! The tool for networks in files: running variances, pruning, multiply–accumulates, evaluation.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::tool::main())
}
