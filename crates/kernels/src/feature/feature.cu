// Levels and the floats that they stand for. `count` counts groups of V elements.
#include "common.cuh"

struct Convert {
    const void *x;
    // [2, grids]: of one grid for all or, in `integers_of_floats`, of one for each channel.
    const float *range;
    void *y;
    u32 count, grids;
    float max_level;
};

template <typename T, int V> __device__ void levels(const Convert &a) {
    Grid grid = grid_of(a.range, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const T *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) x.at[i] = grid.level(x.at[i]);
        store<V>((u8 *)a.y, (size_t)at * V, x);
    }
}

KERNEL(feature_levels_f32_1, Convert, levels<float, 1>)
KERNEL(feature_levels_f32_4, Convert, levels<float, 4>)
KERNEL(feature_levels_bf16_1, Convert, levels<bf16, 1>)
KERNEL(feature_levels_bf16_4, Convert, levels<bf16, 4>)

template <typename T, int V> __device__ void values(const Convert &a) {
    Reader<u8> reader(a.range, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        store<V>((T *)a.y, (size_t)at * V, reader.template read<V>((const u8 *)a.x, (size_t)at * V));
    }
}

KERNEL(feature_values_f32_1, Convert, values<float, 1>)
KERNEL(feature_values_f32_4, Convert, values<float, 4>)
KERNEL(feature_values_bf16_1, Convert, values<bf16, 1>)
KERNEL(feature_values_bf16_4, Convert, values<bf16, 4>)

// Levels less the zero point, which are whole numbers of at most 8 bits, as bf16 holds them.
template <int V> __device__ void integers_of_levels(const Convert &a) {
    Grid grid = grid_of(a.range, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const u8 *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) x.at[i] -= grid.zero_point;
        store<V>((bf16 *)a.y, (size_t)at * V, x);
    }
}

KERNEL(feature_integers_u8_1, Convert, integers_of_levels<1>)
KERNEL(feature_integers_u8_4, Convert, integers_of_levels<4>)

// The same from the floats before quantization.
template <int V> __device__ void integers_of_floats(const Convert &a) {
    Grid grid = grid_at(a.range, a.grids, 0, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const float *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) {
            if (a.grids > 1) grid = grid_at(a.range, a.grids, (size_t)at * V + i, a.max_level);
            x.at[i] = grid.level(x.at[i]) - grid.zero_point;
        }
        store<V>((bf16 *)a.y, (size_t)at * V, x);
    }
}

KERNEL(feature_integers_f32_1, Convert, integers_of_floats<1>)
KERNEL(feature_integers_f32_4, Convert, integers_of_floats<4>)

struct Steps {
    // Ranges: [2], and [2, grids] or null.
    const float *a, *b;
    // [grids + 1]: the products of the steps, and 0.
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

// Each column times its factor.
template <typename T, int V> __device__ void scale(const Scale &a) {
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>(a.sums, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) x.at[i] *= a.factors[((size_t)at * V + i) % a.channels];
        store<V>((T *)a.y, (size_t)at * V, x);
    }
}

KERNEL(feature_scale_f32_1, Scale, scale<float, 1>)
KERNEL(feature_scale_f32_4, Scale, scale<float, 4>)
KERNEL(feature_scale_bf16_1, Scale, scale<bf16, 1>)
KERNEL(feature_scale_bf16_4, Scale, scale<bf16, 4>)
