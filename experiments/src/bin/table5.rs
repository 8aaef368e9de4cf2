//! Table 5 of the paper, on CIFAR-100: DFQ + fine-tuning, compared with Algorithm 1 "using accuracy
//! drop".

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE5]))
}
