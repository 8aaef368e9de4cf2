//! Where the time of a training step goes: every operation beside the machine's peaks.

fn main() -> anyhow::Result<()> {
    experiments::step_profile::main()
}
