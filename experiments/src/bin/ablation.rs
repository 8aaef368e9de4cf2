//! Ablations: each setting that the paper leaves open, compared with its alternatives.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&experiments::tables::ABLATIONS))
}
