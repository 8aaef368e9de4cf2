//! Table 1 of the paper: fine-tuning with quantized activations after no pruning, PfQ without bias correction,
//! and PfQ, on CIFAR-100.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::main(&[&experiments::tables::TABLE1]))
}
