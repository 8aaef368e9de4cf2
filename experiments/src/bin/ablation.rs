//! What the paper leaves open, measured: each setting beside its alternatives.

fn main() -> anyhow::Result<()> {
    experiments::main(&experiments::tables::ABLATIONS)
}
