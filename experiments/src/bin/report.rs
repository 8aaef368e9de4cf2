//! One page of all results, with a verdict on every claim of the paper.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::report_page::main())
}
