//! Table 3 of the paper: DFQ + fine-tuning beside Algorithm 1, on CIFAR-100.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE3]))
}
