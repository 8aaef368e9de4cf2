# Recipes for people; everything here is a plain cargo command.

# A table of the paper (flags: just table3 --help); the fourth on ImageNet with --profile imagenet
table1 *flags:
    cargo run --release --bin table1 -- {{flags}}

table2 *flags:
    cargo run --release --bin table2 -- {{flags}}

table3 *flags:
    cargo run --release --bin table3 -- {{flags}}

table4 *flags:
    cargo run --release --bin table4 -- {{flags}}

table5 *flags:
    cargo run --release --bin table5 -- {{flags}}

# Beyond the paper: methods that learn their quantizers, LSQ among them, compared with ours
beyond *flags:
    cargo run --release --bin beyond -- {{flags}}

# Every table of the paper and Figure 3, from one set of stages
all *flags:
    cargo run --release --bin all -- {{flags}}

# What the paper leaves open, measured: each setting compared with its alternatives
ablation *flags:
    cargo run --release --bin ablation -- {{flags}}

# One page of all results, results/index.html, with a verdict on every claim of the paper
report *flags:
    cargo run --release --bin report -- {{flags}}

# Figure 3 of the paper (flags: just figure3 --help)
figure3 *flags:
    cargo run --release --bin figure3 -- {{flags}}

# The paper's premise without training: folded weights, their quantization, activation ranges
premise *flags:
    cargo run --release --bin premise -- {{flags}}

# The tool for networks in files (just pfq help)
pfq *arguments:
    cargo run --release --bin pfq -- {{arguments}}

# Every test
test:
    cargo test --workspace

# Timings of the custom operations, one by one
bench:
    cargo bench -p kernels

# Training, evaluation and operations compared with PyTorch (flags: just bench-pytorch --help)
bench-pytorch *flags:
    cargo run --release --bin bench_pytorch -- {{flags}}

# Where a training step's time goes, compared with the machine's peaks
profile *flags:
    cargo run --release --bin profile_step -- {{flags}}

# The programs with CUDA, for this machine's GPU or for CUDA_COMPUTE_CAP; fetches NVIDIA's compiler if needed
cuda-build *flags:
    scripts/cuda-toolchain run cargo build --release -p experiments --bins --features cuda {{flags}}

# The CUDA programs as an archive, for a machine that has only the driver and CUDA's libraries
dist-cuda *capability:
    scripts/dist-cuda {{capability}}

# Every operation on the GPU compared with its CPU twin, and training there; skipped if no GPU answers
test-cuda *flags:
    scripts/cuda-toolchain run cargo test --workspace --features experiments/cuda {{flags}}

# The same on a GPU in software; slow
test-cuda-software *flags:
    scripts/software-gpu cargo test --workspace --features experiments/cuda --test cuda --test device --test fit {{flags}}

# Two processes whose gradients NCCL adds up, on a GPU in software; needs Open MPI and libclang
test-nccl-software *flags:
    scripts/software-gpu cargo test --workspace --features experiments/nccl --test mpi on_gpus {{flags}}

# Training, evaluation and operations compared with PyTorch on a GPU (flags: just bench-cuda --help)
bench-cuda *flags:
    scripts/cuda-toolchain run cargo run --release -p experiments --features cuda --bin bench_pytorch -- --device cuda {{flags}}

# Two processes that train together; needs Open MPI and libclang (docs/cluster.md)
test-mpi *flags:
    cargo test --workspace --features experiments/mpi --test mpi --test slurm together {{flags}}

# Licences, sources and versions of the dependencies, checked against deny.toml
deny:
    scripts/cargo-deny

# What must pass before a change is accepted
ci:
    bash .ci/run
