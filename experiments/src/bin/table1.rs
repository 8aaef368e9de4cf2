//! Table 1 of the paper, on CIFAR-100: fine-tuning with quantized activations after no pruning, PfQ
//! without bias correction, and PfQ.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE1]))
}
