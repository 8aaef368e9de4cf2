//! Table 2 of the paper, on CIFAR-100: fine-tuning once after PfQ, compared with Algorithm 1.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE2]))
}
