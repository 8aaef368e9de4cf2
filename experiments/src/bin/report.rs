//! One page of all results, with a verdict on every claim of the paper.

fn main() -> anyhow::Result<()> {
    experiments::report_page::main()
}
