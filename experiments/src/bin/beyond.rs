//! Beyond the paper: methods that learn their quantizers, compared with Algorithm 1.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::BEYOND]))
}
