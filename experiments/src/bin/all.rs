//! Every table of the paper and Figure 3, one after the other, from one set of stages.

fn main() -> std::process::ExitCode {
    experiments::exit(experiments::all::main())
}
