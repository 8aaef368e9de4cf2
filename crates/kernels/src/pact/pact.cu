// PACT. pact.rs has the definitions. Elements are processed in memory order, V at a time; `count`
// is the number of groups of V elements.
#include "learned.cuh"

// Returns the clipping bound; a negative α stands for 0.
__device__ inline float bound_of(const float *alpha) { return *alpha < 0.0f ? 0.0f : *alpha; }

// Returns the same grid as quant_core::Grid::symmetric.
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
    apply<V>((const T *)a.x, (T *)a.y, a.count, [&](float x, size_t) { return grid.value(grid.level(x)); });
}

KERNELS(pact_forward, Forward, forward)

struct Backward {
    const void *x, *gy;
    const float *alpha;
    void *gx;
    // [gridDim.x]: the gradient of α from each block.
    double *parts;
    u32 count, both_signs;
};

template <typename T, int V> __device__ void backward(const Backward &a) {
    float high = bound_of(a.alpha), low = a.both_signs ? -high : 0.0f, below = a.both_signs ? -1.0f : 0.0f;
    gradients<1, V>((const T *)a.x, (const T *)a.gy, (T *)a.gx, a.count, 1.0, a.parts, [&](float x, float gy, double *sums) {
        float low_share = x <= low ? below * gy : 0.0f;
        sums[0] += (double)(x >= high ? gy : low_share);
        return x > low && x < high ? gy : 0.0f;
    });
}

KERNELS(pact_backward, Backward, backward)
KERNEL(pact_totals, Totals, totals)
