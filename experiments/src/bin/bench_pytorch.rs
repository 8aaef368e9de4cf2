//! Speed compared with PyTorch: training, evaluation and single operations.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::bench::main())
}
