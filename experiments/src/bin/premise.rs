//! The paper's premise, without training: what pruning changes of folded weights and their quantization.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::premise::main())
}
