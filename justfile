# Recipes for people; everything here is a plain cargo command.

# Tables 1 to 4 of the paper, the fourth on CIFAR-100 (flags: just table3 --help)
table1 *flags:
    cargo run --release --bin table1 -- {{flags}}

table2 *flags:
    cargo run --release --bin table2 -- {{flags}}

table3 *flags:
    cargo run --release --bin table3 -- {{flags}}

table4 *flags:
    cargo run --release --bin table4 -- {{flags}}

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
