//! Figure 3 of the paper: what filters of low and of ordinary running variance give.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::figure3::main())
}
