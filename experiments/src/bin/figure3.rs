//! Figure 3 of the paper: what filters of low and of ordinary running variance give.

fn main() -> anyhow::Result<()> {
    experiments::figure3::main()
}
