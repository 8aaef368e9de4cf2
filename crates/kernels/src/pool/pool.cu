// Global average pooling. pool.rs has the definitions.
#include "common.cuh"

struct Average {
    const void *x;
    // The range of x, if x is levels.
    const float *range;
    // [images, channels]
    float *y;
    u32 images, positions, channels;
    float max_level;
};

// A thread averages V channels of an image.
template <typename X, int V> __device__ void average(const Average &a) {
    u32 groups = a.channels / V, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.images * groups) return;
    Reader<X> reader(a.range, a.max_level);
    size_t at = (size_t)(i / groups) * a.positions * a.channels + i % groups * V;
    Vec<V> sum = splat<V>(0.0f);
    for (u32 position = 0; position < a.positions; position++) {
        Vec<V> x = reader.template read<V>((const X *)a.x, at + (size_t)position * a.channels);
#pragma unroll
        for (int k = 0; k < V; k++) sum.at[k] += x.at[k];
    }
#pragma unroll
    for (int k = 0; k < V; k++) sum.at[k] /= (float)a.positions;
    store<V>(a.y, (size_t)i * V, sum);
}

KERNELS(pool_average, Average, average)
KERNEL(pool_average_u8_1, Average, average<u8, 1>)
KERNEL(pool_average_u8_4, Average, average<u8, 4>)

struct Backward {
    // [images, channels]
    const float *gy;
    void *gx;
    u32 images, positions, channels;
    float share;
};

template <typename T, int V> __device__ void backward(const Backward &a) {
    u32 groups = a.channels / V, count = a.images * a.positions * groups;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        u32 image = i / groups / a.positions;
        Vec<V> gy = load<V>(a.gy, (size_t)image * a.channels + i % groups * V);
#pragma unroll
        for (int k = 0; k < V; k++) gy.at[k] *= a.share;
        store<V>((T *)a.gx, (size_t)i * V, gy);
    }
}

KERNELS(pool_backward, Backward, backward)
