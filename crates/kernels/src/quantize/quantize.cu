// Fake quantization and extremes; the definitions stand in quantize.rs. Elements are taken one after the other, V at
// a time: `count` counts groups of V.
#include "common.cuh"

struct Fake {
    const void *x;
    // [2, grids]: of one grid for all, or of one for each channel.
    const float *range;
    void *y;
    u32 count, grids;
    float max_level;
};

template <typename T, int V> __device__ void fake(const Fake &a) {
    Grid grid = grid_at(a.range, a.grids, 0, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const T *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) {
            if (a.grids > 1) grid = grid_at(a.range, a.grids, (size_t)at * V + i, a.max_level);
            x.at[i] = grid.value(grid.level(x.at[i]));
        }
        store<V>((T *)a.y, (size_t)at * V, x);
    }
}

KERNEL(quantize_fake_f32_1, Fake, fake<float, 1>)
KERNEL(quantize_fake_f32_4, Fake, fake<float, 4>)
KERNEL(quantize_fake_bf16_1, Fake, fake<bf16, 1>)
KERNEL(quantize_fake_bf16_4, Fake, fake<bf16, 4>)

struct Mask {
    const void *x, *gy;
    // As in Fake.
    const float *range;
    void *gx;
    u32 count, grids;
    float max_level;
};

template <typename T, int V> __device__ void mask(const Mask &a) {
    Grid grid = grid_at(a.range, a.grids, 0, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const T *)a.x, (size_t)at * V), gy = load<V>((const T *)a.gy, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) {
            if (a.grids > 1) grid = grid_at(a.range, a.grids, (size_t)at * V + i, a.max_level);
            x.at[i] = grid.passes(x.at[i]) ? gy.at[i] : 0.0f;
        }
        store<V>((T *)a.gx, (size_t)at * V, x);
    }
}

KERNEL(quantize_mask_f32_1, Mask, mask<float, 1>)
KERNEL(quantize_mask_f32_4, Mask, mask<float, 4>)
KERNEL(quantize_mask_bf16_1, Mask, mask<bf16, 1>)
KERNEL(quantize_mask_bf16_4, Mask, mask<bf16, 4>)

struct Extremes {
    const void *x;
    // [2][gridDim.x]: the smallest and the largest element of each block.
    float *extremes;
    u32 count;
};

template <typename T, int V> __device__ void extremes(const Extremes &a) {
    float lo = INFINITY, hi = -INFINITY;
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const T *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) {
            lo = x.at[i] < lo ? x.at[i] : lo;
            hi = x.at[i] > hi ? x.at[i] : hi;
        }
    }
    block_extremes(lo, hi);
    if (thread() == 0) a.extremes[blockIdx.x] = lo, a.extremes[gridDim.x + blockIdx.x] = hi;
}

KERNEL(quantize_extremes_f32_1, Extremes, extremes<float, 1>)
KERNEL(quantize_extremes_f32_4, Extremes, extremes<float, 4>)
KERNEL(quantize_extremes_bf16_1, Extremes, extremes<bf16, 1>)
KERNEL(quantize_extremes_bf16_4, Extremes, extremes<bf16, 4>)

struct ExtremesOfAll {
    // [2][count]
    const float *parts;
    // [2]
    float *extremes;
    u32 count;
};

// One block.
__device__ inline void extremes_of_all(const ExtremesOfAll &a) {
    float lo = INFINITY, hi = -INFINITY;
    for (u32 i = thread(); i < a.count; i += blockDim.x * blockDim.y) {
        lo = fminf(lo, a.parts[i]);
        hi = fmaxf(hi, a.parts[a.count + i]);
    }
    block_extremes(lo, hi);
    if (thread() == 0) a.extremes[0] = lo, a.extremes[1] = hi;
}

KERNEL(quantize_extremes_of_all, ExtremesOfAll, extremes_of_all)

struct UpdateRange {
    float *range;
    const float *batch;
    float momentum;
};

// One block of two threads.
__device__ inline void update_range(const UpdateRange &a) {
    u32 i = threadIdx.x;
    a.range[i] += a.momentum * (a.batch[i] - a.range[i]);
}

KERNEL(quantize_update_range, UpdateRange, update_range)
