//! Table 4 of the paper, on CIFAR-100: DFQ + fine-tuning, PACT, DSQ and Algorithm 1.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE4]))
}
