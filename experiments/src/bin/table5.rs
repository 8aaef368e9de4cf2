//! Table 5 of the paper: DFQ + fine-tuning beside Algorithm 1 "using accuracy drop", on CIFAR-100.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE5]))
}
