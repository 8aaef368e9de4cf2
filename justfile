# Recipes for people; everything here is a plain cargo command.

# Table 3 of the paper (flags: just table3 --help)
table3 *flags:
    cargo run --release --bin table3 -- {{flags}}

# Figure 3 of the paper (flags: just figure3 --help)
figure3 *flags:
    cargo run --release --bin figure3 -- {{flags}}

# The tool for networks in files (just pfq help)
pfq *arguments:
    cargo run --release --bin pfq -- {{arguments}}

# Every test
test:
    cargo test --workspace

# The custom operations, timed one by one
bench:
    cargo bench -p kernels

# Training, evaluation and operations beside PyTorch (flags: just bench-pytorch --help)
bench-pytorch *flags:
    cargo run --release --bin bench_pytorch -- {{flags}}

# Where a training step's time goes, beside the machine's peaks
profile *flags:
    cargo run --release --bin profile_step -- {{flags}}

# What must pass before a change is taken
ci:
    bash .ci/run
