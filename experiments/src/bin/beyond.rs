//! Beyond the paper: quantizers that learn beside Algorithm 1.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::BEYOND]))
}
