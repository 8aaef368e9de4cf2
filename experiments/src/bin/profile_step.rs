//! The time of a training step by operation, compared with the machine's peaks.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::bench::step_profile::main())
}
