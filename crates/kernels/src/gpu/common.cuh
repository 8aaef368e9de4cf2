// Definitions that the kernels share. nvcc compiles them for GPUs and, in tests, a C++ compiler
// compiles them for the CPU (host.h).
//
// The arithmetic is the same as that of the CPU's kernels, operation by operation. Contraction is
// off in both compilations (nvcc --fmad=false, c++ -ffp-contract=off), so that a product and a sum
// are rounded once only in an explicit `fmaf`. Divisions and square roots are correctly rounded,
// and subnormal numbers are kept (nvcc's defaults).
//
// A kernel takes one struct of arguments, whose fields the Rust side lists in the same order
// (`Launch` in gpu.rs). Pointers may be null where a comment says so. Blocks have at most THREADS
// threads.
#pragma once

#ifndef __CUDACC__
#include "host.h"
#endif

typedef unsigned char u8;
typedef unsigned int u32;

#define THREADS 256

// The smallest normal number. Its reciprocal does not overflow.
#define MIN_POSITIVE 1.17549435e-38f

#ifdef __CUDACC__
#define KERNEL(name, Arguments, ...) \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Arguments a) { __VA_ARGS__(a); }
#else
#define KERNEL(name, Arguments, ...)                                                                     \
    extern "C" int name(const void *a, size_t size, const u32 *launch, int reverse) {                    \
        return emulation::run(*(const Arguments *)a, size, __VA_ARGS__, launch, reverse);                \
    }
#endif

// The kernels NAME_f32_1, NAME_f32_4, NAME_bf16_1 and NAME_bf16_4 of a function template over the
// type of floats and V, the number of elements that are processed at once.
#define KERNELS(name, Arguments, function)              \
    KERNEL(name##_f32_1, Arguments, function<float, 1>) \
    KERNEL(name##_f32_4, Arguments, function<float, 4>) \
    KERNEL(name##_bf16_1, Arguments, function<bf16, 1>) \
    KERNEL(name##_bf16_4, Arguments, function<bf16, 4>)

// A float of 16 bits as tensors store it: the upper half of a float32.
struct bf16 {
    unsigned short bits;
};

// Converts an element to a float.
__device__ inline float value(float x) { return x; }
__device__ inline float value(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ inline float value(u8 x) { return (float)x; }

// Converts a float to an element. For bf16 it rounds to nearest, ties to even; NaN stays NaN.
template <typename T> __device__ T element(float x);
template <> __device__ inline float element<float>(float x) { return x; }
template <> __device__ inline bf16 element<bf16>(float x) {
    u32 bits = __float_as_uint(x);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bf16 y = {(unsigned short)(nan ? ((bits >> 16) | 0x40u) : rounded)};
    return y;
}
// x is a whole number from 0 to 255.
template <> __device__ inline u8 element<u8>(float x) { return (u8)(u32)x; }

// V neighbouring elements in memory, which are read and written at once, and V floats in registers.
template <typename T, int V> struct alignas(sizeof(T) * V) Pack {
    T at[V];
};
template <int V> struct Vec {
    float at[V];
};

template <int V> __device__ inline Vec<V> splat(float x) {
    Vec<V> y;
#pragma unroll
    for (int i = 0; i < V; i++) y.at[i] = x;
    return y;
}

template <int V, typename T> __device__ inline Vec<V> load(const T *from, size_t at) {
    Pack<T, V> pack = *(const Pack<T, V> *)(from + at);
    Vec<V> y;
#pragma unroll
    for (int i = 0; i < V; i++) y.at[i] = value(pack.at[i]);
    return y;
}

template <int V, typename T> __device__ inline void store(T *to, size_t at, const Vec<V> &x) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; i++) pack.at[i] = element<T>(x.at[i]);
    *(Pack<T, V> *)(to + at) = pack;
}

// A quantization grid. It does the same operations in the same order as quant_core::Grid.
struct Grid {
    float step, per_step, zero_point, max_level;

    // The level before clamping.
    __device__ float unclamped(float x) const { return rintf(x * per_step) + zero_point; }

    // The level, 0 … max_level. A NaN has level 0.
    __device__ float level(float x) const {
        float level = unclamped(x);
        level = level > 0.0f ? level : 0.0f;
        return level < max_level ? level : max_level;
    }

    __device__ float value(float level) const { return (level - zero_point) * step; }

    // Returns whether x rounds to a level without being clamped.
    __device__ bool passes(float x) const {
        float level = unclamped(x);
        return level >= 0.0f && level <= max_level;
    }
};

// Returns the grid over a range (lo, hi), widened to contain zero.
__device__ inline Grid grid_of(const float *range, float max_level) {
    Grid grid;
    float lo = fminf(range[0], 0.0f), hi = fmaxf(range[1], 0.0f);
    grid.step = fmaxf((hi - lo) / max_level, MIN_POSITIVE);
    float zero_point = rintf(-lo / grid.step);
    zero_point = zero_point < 0.0f ? 0.0f : zero_point;
    grid.zero_point = zero_point > max_level ? max_level : zero_point;
    grid.per_step = 1.0f / grid.step;
    grid.max_level = max_level;
    return grid;
}

// Returns the grid of the element at index `at`. `range` is [2, grids]: one grid for all elements,
// or one for each channel, which is the last dimension.
__device__ inline Grid grid_at(const float *range, u32 grids, size_t at, float max_level) {
    u32 channel = (u32)(at % grids);
    float own[2] = {range[channel], range[grids + channel]};
    return grid_of(own, max_level);
}

// Reads elements of a feature map, which are floats or levels of a grid.
template <typename X> struct Reader {
    __device__ Reader(const float *, float) {}
    template <int V> __device__ Vec<V> read(const X *x, size_t at) const { return load<V>(x, at); }
};
template <> struct Reader<u8> {
    Grid grid;
    __device__ Reader(const float *range, float max_level) : grid(grid_of(range, max_level)) {}
    template <int V> __device__ Vec<V> read(const u8 *x, size_t at) const {
        Vec<V> y = load<V>(x, at);
#pragma unroll
        for (int i = 0; i < V; i++) y.at[i] = grid.value(y.at[i]);
        return y;
    }
};

// The division of the rows and channels of a map [rows, channels]. Block x takes blockDim.x groups
// of V channels. Block y takes the rows of a part, and each of its threads every blockDim.y-th of
// them.
struct Columns {
    u32 rows, channels, rows_per_part;

    template <int V> __device__ u32 channel() const { return (blockIdx.x * blockDim.x + threadIdx.x) * V; }
    __device__ u32 first() const { return blockIdx.y * rows_per_part + threadIdx.y; }
    __device__ u32 end() const {
        u32 end = (blockIdx.y + 1) * rows_per_part;
        return end < rows ? end : rows;
    }

    // Reads V channels of up to N rows of the part, every blockDim.y-th from `row` on. Returns the
    // number of rows read.
    template <int V, int N, typename T> __device__ int read(const T *map, u32 row, u32 channel, Vec<V> (&to)[N]) const {
        int count = 0;
#pragma unroll
        for (int r = 0; r < N; r++) {
            u32 at = row + r * blockDim.y;
            if (at < end()) {
                to[r] = load<V>(map, (size_t)at * channels + channel);
                count = r + 1;
            }
        }
        return count;
    }
};

// The number of threads of a block, and a thread's index among them.
__device__ inline u32 threads() { return blockDim.x * blockDim.y; }
__device__ inline u32 thread() { return threadIdx.y * blockDim.x + threadIdx.x; }

// Computes y = f(x, at) for `count` groups of V elements, which all threads share. `at` is an
// element's index in memory.
template <int V, typename X, typename Y, typename F>
__device__ inline void apply(const X *x, Y *y, u32 count, F f) {
    for (u32 group = blockIdx.x * threads() + thread(); group < count; group += gridDim.x * threads()) {
        size_t at = (size_t)group * V;
        Vec<V> values = load<V>(x, at);
#pragma unroll
        for (int i = 0; i < V; i++) values.at[i] = f(values.at[i], at + i);
        store<V>(y, at, values);
    }
}

// Computes the same from two maps: y = f(x, other, at).
template <int V, typename X, typename Y, typename F>
__device__ inline void apply(const X *x, const X *other, Y *y, u32 count, F f) {
    for (u32 group = blockIdx.x * threads() + thread(); group < count; group += gridDim.x * threads()) {
        size_t at = (size_t)group * V;
        Vec<V> values = load<V>(x, at), others = load<V>(other, at);
#pragma unroll
        for (int i = 0; i < V; i++) values.at[i] = f(values.at[i], others.at[i], at + i);
        store<V>(y, at, values);
    }
}

// Decides where a gradient passes through an activation (a clamp to (lo, hi)) and through a
// quantizer, if there is a range.
struct Gate {
    float lo, hi;
    bool quantized;
    Grid grid;

    __device__ Gate(float lo, float hi, const float *range, float max_level) : lo(lo), hi(hi), quantized(range) {
        if (quantized) grid = grid_of(range, max_level);
    }

    __device__ float gated(float u, float gy) const {
        bool passes = lo < u && u < hi && (!quantized || grid.passes(u));
        return passes ? gy : 0.0f;
    }
};

// Returns x clamped to (lo, hi). NaN stays NaN.
__device__ inline float clamped(float x, float lo, float hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

// Returns half of the smallest power of two that is at least n: the first stride of a tree sum over
// n values.
__device__ inline u32 half_of(u32 n) {
    u32 half = 1;
    while (2 * half < n) half *= 2;
    return n > 1 ? half : 0;
}

// Computes the extremes over all threads of the block. Every thread receives them.
__device__ inline void block_extremes(float &lo, float &hi) {
    __shared__ float los[THREADS], his[THREADS];
    u32 t = thread(), count = threads();
    los[t] = lo;
    his[t] = hi;
    __syncthreads();
    for (u32 half = half_of(count); half > 0; half /= 2) {
        if (t < half && t + half < count) {
            los[t] = fminf(los[t], los[t + half]);
            his[t] = fmaxf(his[t], his[t + half]);
        }
        __syncthreads();
    }
    lo = los[0];
    hi = his[0];
    __syncthreads();
}

// Returns the sum over the threads of a block that have the same threadIdx.x. Each of them receives
// it.
__device__ inline double column_sum(double x) {
    __shared__ double sums[THREADS];
    u32 t = thread();
    sums[t] = x;
    __syncthreads();
    for (u32 half = half_of(blockDim.y); half > 0; half /= 2) {
        if (threadIdx.y < half && threadIdx.y + half < blockDim.y) sums[t] += sums[t + half * blockDim.x];
        __syncthreads();
    }
    x = sums[threadIdx.x];
    __syncthreads();
    return x;
}

struct Total {
    // [parts, count]
    const float *sums;
    // [count]
    float *total;
    u32 parts, count;
};

// Computes the sum over the parts. A block handles blockDim.x elements; each thread adds every
// blockDim.y-th part.
__device__ inline void total(const Total &a) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    double sum = 0.0;
    if (i < a.count) {
        for (u32 part = threadIdx.y; part < a.parts; part += blockDim.y) {
            sum += (double)a.sums[(size_t)part * a.count + i];
        }
    }
    sum = column_sum(sum);
    if (threadIdx.y == 0 && i < a.count) a.total[i] = (float)sum;
}
