//! Where the time of a training step goes: every operation beside the machine's peaks.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::bench::step_profile::main())
}
