//! Figure 3 of the paper: the outputs of filters with low and with ordinary running variance.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::figure3::main())
}
