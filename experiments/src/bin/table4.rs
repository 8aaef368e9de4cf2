//! Table 4 of the paper: DFQ + fine-tuning, PACT, DSQ and Algorithm 1, on ImageNet with profile
//! `imagenet` and on CIFAR-100 otherwise.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE4]))
}
