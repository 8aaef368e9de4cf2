// Fake quantization and extremes. quantize.rs has the definitions. Elements are processed in memory
// order, V at a time; `count` is the number of groups of V elements.
#include "common.cuh"

struct Fake {
    const void *x;
    // [2, grids]: one grid for all elements, or one for each channel.
    const float *range;
    void *y;
    u32 count, grids;
    float max_level;
};

template <typename T, int V> __device__ void fake(const Fake &a) {
    Grid grid = grid_at(a.range, a.grids, 0, a.max_level);
    apply<V>((const T *)a.x, (T *)a.y, a.count, [&](float x, size_t at) {
        if (a.grids > 1) grid = grid_at(a.range, a.grids, at, a.max_level);
        return grid.value(grid.level(x));
    });
}

KERNELS(quantize_fake, Fake, fake)

struct Mask {
    const void *x, *gy;
    // See Fake.
    const float *range;
    void *gx;
    u32 count, grids;
    float max_level;
};

template <typename T, int V> __device__ void mask(const Mask &a) {
    Grid grid = grid_at(a.range, a.grids, 0, a.max_level);
    apply<V>((const T *)a.x, (const T *)a.gy, (T *)a.gx, a.count, [&](float x, float gy, size_t at) {
        if (a.grids > 1) grid = grid_at(a.range, a.grids, at, a.max_level);
        return grid.passes(x) ? gy : 0.0f;
    });
}

KERNELS(quantize_mask, Mask, mask)

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

KERNELS(quantize_extremes, Extremes, extremes)

struct ExtremesOfAll {
    // [2][count]
    const float *parts;
    // [2]
    float *extremes;
    u32 count;
};

// Runs as one block.
__device__ inline void extremes_of_all(const ExtremesOfAll &a) {
    float lo = INFINITY, hi = -INFINITY;
    for (u32 i = thread(); i < a.count; i += threads()) {
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

// Runs as one block of two threads.
__device__ inline void update_range(const UpdateRange &a) {
    u32 i = threadIdx.x;
    a.range[i] += a.momentum * (a.batch[i] - a.range[i]);
}

KERNEL(quantize_update_range, UpdateRange, update_range)
