//! Table 2 of the paper: fine-tuning once after PfQ beside Algorithm 1, on CIFAR-100.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE2]))
}
