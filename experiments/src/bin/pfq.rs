//! The tool for networks in files: inspection, pruning, evaluation, quantization and export.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::tool::main())
}
