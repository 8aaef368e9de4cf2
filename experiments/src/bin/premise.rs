//! The paper's premise, without training: how pruning changes folded weights and their
//! quantization.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::premise::main())
}
