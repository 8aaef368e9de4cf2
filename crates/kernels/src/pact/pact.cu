// PACT; the definitions stand in pact.rs. Elements are taken one after the other, V at a time: `count` counts groups of V.
#include "learned.cuh"

// A bound below 0 stands for 0.
__device__ inline float bound_of(const float *alpha) { return *alpha < 0.0f ? 0.0f : *alpha; }

// quant_core::Grid::symmetric.
__device__ inline Grid symmetric_grid(float bound, float max_level) {
    Grid grid;
    float half = floorf(0.5f * max_level);
    grid.step = bound < half * MIN_POSITIVE ? MIN_POSITIVE : bound / half;
    grid.per_step = 1.0f / grid.step;
    grid.zero_point = half;
    grid.max_level = 2.0f * half;
    return grid;
}

struct Forward {
    const void *x;
    const float *alpha;
    void *y;
    u32 count, both_signs;
    float max_level;
};

template <typename T, int V> __device__ void forward(const Forward &a) {
    float range[2] = {0.0f, bound_of(a.alpha)};
    Grid grid = a.both_signs ? symmetric_grid(range[1], a.max_level) : grid_of(range, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const T *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) x.at[i] = grid.value(grid.level(x.at[i]));
        store<V>((T *)a.y, (size_t)at * V, x);
    }
}

KERNEL(pact_forward_f32_1, Forward, forward<float, 1>)
KERNEL(pact_forward_f32_4, Forward, forward<float, 4>)
KERNEL(pact_forward_bf16_1, Forward, forward<bf16, 1>)
KERNEL(pact_forward_bf16_4, Forward, forward<bf16, 4>)

struct Backward {
    const void *x, *gy;
    const float *alpha;
    void *gx;
    // [gridDim.x]: of each block the gradient of α.
    double *parts;
    u32 count, both_signs;
};

template <typename T, int V> __device__ void backward(const Backward &a) {
    float high = bound_of(a.alpha), low = a.both_signs ? -high : 0.0f, below = a.both_signs ? -1.0f : 0.0f;
    double sums[1] = {0.0};
    for (u32 at = blockIdx.x * THREADS + thread(); at < a.count; at += gridDim.x * THREADS) {
        Vec<V> x = load<V>((const T *)a.x, (size_t)at * V), gy = load<V>((const T *)a.gy, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float low_share = x.at[i] <= low ? below * gy.at[i] : 0.0f;
            sums[0] += (double)(x.at[i] >= high ? gy.at[i] : low_share);
            x.at[i] = x.at[i] > low && x.at[i] < high ? gy.at[i] : 0.0f;
        }
        store<V>((T *)a.gx, (size_t)at * V, x);
    }
    write_sums(sums, a.parts);
}

KERNEL(pact_backward_f32_1, Backward, backward<float, 1>)
KERNEL(pact_backward_f32_4, Backward, backward<float, 4>)
KERNEL(pact_backward_bf16_1, Backward, backward<bf16, 1>)
KERNEL(pact_backward_bf16_4, Backward, backward<bf16, 4>)
KERNEL(pact_totals, Totals, totals)
