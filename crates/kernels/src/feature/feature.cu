// Levels and the floats that they stand for. `count` counts groups of V elements.
#include "common.cuh"

struct Convert {
    const void *x;
    const float *range;
    void *y;
    u32 count;
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
    Grid grid = grid_of(a.range, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const float *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) x.at[i] = grid.level(x.at[i]) - grid.zero_point;
        store<V>((bf16 *)a.y, (size_t)at * V, x);
    }
}

KERNEL(feature_integers_f32_1, Convert, integers_of_floats<1>)
KERNEL(feature_integers_f32_4, Convert, integers_of_floats<4>)

struct Steps {
    // Ranges, [2] each; the second may be null.
    const float *a, *b;
    // [2]: the product of the steps, and 0.
    float *factors;
    float a_max_level, b_max_level;
};

// One thread.
__device__ inline void steps(const Steps &a) {
    float step = grid_of(a.a, a.a_max_level).step;
    a.factors[0] = a.b ? step * grid_of(a.b, a.b_max_level).step : step;
    a.factors[1] = 0.0f;
}

KERNEL(feature_steps, Steps, steps)
