//! Table 3 of the paper, on CIFAR-100: DFQ + fine-tuning, compared with Algorithm 1.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE3]))
}
