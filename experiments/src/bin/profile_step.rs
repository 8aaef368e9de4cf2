//! Where the time of a training step goes: every operation beside the machine's peaks.

fn main() -> anyhow::Result<()> {
    experiments::bench::step_profile::main()
}
