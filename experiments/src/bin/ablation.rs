//! What the paper leaves open, measured: each setting beside its alternatives.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&experiments::tables::ABLATIONS))
}
