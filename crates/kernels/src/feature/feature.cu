// Conversions between levels and the floats that they stand for. `count` is the number of groups of
// V elements.
#include "common.cuh"

struct Convert {
    const void *x;
    // [2, grids]: one grid for all elements or, in `integers_of_floats`, one for each channel.
    const float *range;
    void *y;
    u32 count, grids;
    float max_level;
};

template <typename T, int V> __device__ void levels(const Convert &a) {
    Grid grid = grid_of(a.range, a.max_level);
    apply<V>((const T *)a.x, (u8 *)a.y, a.count, [&](float x, size_t) { return grid.level(x); });
}

KERNELS(feature_levels, Convert, levels)

template <typename T, int V> __device__ void values(const Convert &a) {
    Grid grid = grid_of(a.range, a.max_level);
    apply<V>((const u8 *)a.x, (T *)a.y, a.count, [&](float level, size_t) { return grid.value(level); });
}

KERNELS(feature_values, Convert, values)

// Levels minus the zero point. These are whole numbers of at most 8 bits, which bf16 holds exactly.
template <int V> __device__ void integers_of_levels(const Convert &a) {
    Grid grid = grid_of(a.range, a.max_level);
    apply<V>((const u8 *)a.x, (bf16 *)a.y, a.count, [&](float level, size_t) { return level - grid.zero_point; });
}

KERNEL(feature_integers_u8_1, Convert, integers_of_levels<1>)
KERNEL(feature_integers_u8_4, Convert, integers_of_levels<4>)

// The same numbers, from the floats before quantization.
template <int V> __device__ void integers_of_floats(const Convert &a) {
    Grid grid = grid_at(a.range, a.grids, 0, a.max_level);
    apply<V>((const float *)a.x, (bf16 *)a.y, a.count, [&](float x, size_t at) {
        if (a.grids > 1) grid = grid_at(a.range, a.grids, at, a.max_level);
        return grid.level(x) - grid.zero_point;
    });
}

KERNEL(feature_integers_f32_1, Convert, integers_of_floats<1>)
KERNEL(feature_integers_f32_4, Convert, integers_of_floats<4>)

struct Steps {
    // The ranges: [2], and [2, grids] or null.
    const float *a, *b;
    // [grids + 1]: the products of the steps, followed by 0.
    float *factors;
    u32 grids;
    float a_max_level, b_max_level;
};

__device__ inline void steps(const Steps &a) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i > a.grids) return;
    float step = grid_of(a.a, a.a_max_level).step;
    if (i == a.grids) step = 0.0f;
    else if (a.b) step *= grid_at(a.b, a.grids, i, a.b_max_level).step;
    a.factors[i] = step;
}

KERNEL(feature_steps, Steps, steps)

struct Scale {
    // [rows, channels]
    const float *sums;
    // [channels]
    const float *factors;
    void *y;
    u32 count, channels;
};

// Multiplies each column by its factor.
template <typename T, int V> __device__ void scale(const Scale &a) {
    apply<V>(a.sums, (T *)a.y, a.count, [&](float sum, size_t at) { return sum * a.factors[at % a.channels]; });
}

KERNELS(feature_scale, Scale, scale)
