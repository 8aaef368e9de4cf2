// The sum of a residual branch and its shortcut, quantized. residual.rs has the definitions.
#include "common.cuh"

struct Add {
    const void *a, *b;
    // The range of b, if b is levels, and the range of the sum, if it is quantized.
    const float *b_range, *range;
    void *y;
    // The number of groups of V elements.
    u32 count;
    float b_max_level, max_level;
};

template <typename T, typename B, typename Y, int V> __device__ void add(const Add &a) {
    Reader<B> reader(a.b_range, a.b_max_level);
    Grid grid;
    if (sizeof(Y) == 1) grid = grid_of(a.range, a.max_level);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        Vec<V> x = load<V>((const T *)a.a, (size_t)at * V);
        Vec<V> b = reader.template read<V>((const B *)a.b, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float sum = x.at[i] + b.at[i];
            x.at[i] = sizeof(Y) == 1 ? grid.level(sum) : sum;
        }
        store<V>((Y *)a.y, (size_t)at * V, x);
    }
}

#define ADD(t, b, y, T, B, Y)                                  \
    KERNEL(residual_add_##t##_##b##_##y##_1, Add, add<T, B, Y, 1>) \
    KERNEL(residual_add_##t##_##b##_##y##_4, Add, add<T, B, Y, 4>)
ADD(f32, f32, f32, float, float, float)
ADD(f32, f32, u8, float, float, u8)
ADD(f32, u8, f32, float, u8, float)
ADD(f32, u8, u8, float, u8, u8)
ADD(bf16, bf16, bf16, bf16, bf16, bf16)
ADD(bf16, bf16, u8, bf16, bf16, u8)
ADD(bf16, u8, bf16, bf16, u8, bf16)
ADD(bf16, u8, u8, bf16, u8, u8)

struct AddNormalized {
    const void *z, *b;
    const float *scale, *shift;
    // The range of b, if b is levels.
    const float *b_range;
    void *sum;
    // [2][blocks]: the extremes of each block.
    float *extremes;
    Columns columns;
    float b_max_level;
};

template <typename T, typename B, int V> __device__ void add_normalized(const AddNormalized &a) {
    u32 channel = a.columns.channel<V>(), channels = a.columns.channels, end = a.columns.end();
    float lo = INFINITY, hi = -INFINITY;
    if (channel < channels) {
        Reader<B> reader(a.b_range, a.b_max_level);
        Vec<V> scale = load<V>(a.scale, channel), shift = load<V>(a.shift, channel);
        for (u32 row = a.columns.first(); row < end; row += blockDim.y) {
            size_t at = (size_t)row * channels + channel;
            Vec<V> z = load<V>((const T *)a.z, at), b = reader.template read<V>((const B *)a.b, at);
#pragma unroll
            for (int i = 0; i < V; i++) {
                // The extremes are taken from the sum as it is stored.
                float sum = value(element<T>(fmaf(z.at[i], scale.at[i], shift.at[i]) + b.at[i]));
                z.at[i] = sum;
                lo = sum < lo ? sum : lo;
                hi = sum > hi ? sum : hi;
            }
            store<V>((T *)a.sum, at, z);
        }
    }
    block_extremes(lo, hi);
    if (thread() == 0) {
        u32 block = blockIdx.y * gridDim.x + blockIdx.x;
        a.extremes[block] = lo;
        a.extremes[gridDim.x * gridDim.y + block] = hi;
    }
}

#define ADD_NORMALIZED(t, b, T, B)                                                              \
    KERNEL(residual_add_normalized_##t##_##b##_1, AddNormalized, add_normalized<T, B, 1>)       \
    KERNEL(residual_add_normalized_##t##_##b##_4, AddNormalized, add_normalized<T, B, 4>)
ADD_NORMALIZED(f32, f32, float, float)
ADD_NORMALIZED(f32, u8, float, u8)
ADD_NORMALIZED(bf16, bf16, bf16, bf16)
ADD_NORMALIZED(bf16, u8, bf16, u8)
