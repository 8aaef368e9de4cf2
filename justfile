# Recipes for people; everything here is a plain cargo command.

# Table 3 of the paper (flags: just table3 --help)
table3 *flags:
    cargo run --release --bin table3 -- {{flags}}

# One page of all results, results/index.html, with a verdict on every claim of the paper
report *flags:
    cargo run --release --bin report -- {{flags}}

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
