// Functions that the kernels of learned quantizers share: the hyperbolic tangent of tanh.rs, and
// sums over all elements.
#pragma once
#include "common.cuh"

// The coefficients ln2^k / k!, the highest power first.
struct Series {
    float at[7];

    __host__ __device__ constexpr Series() : at() {
        double term = 1.0;
        for (int k = 0; k < 7; k++) {
            term *= 0.693147180559945309417232121458 / (k + 1);
            at[6 - k] = (float)term;
        }
    }
};

// Returns tanh(x). It does the same operations in the same order as the CPU.
__device__ inline float tangent(float x) {
    constexpr Series series;
    float scaled = clamped(x, -9.1f, 9.1f) * (2.0f * 1.44269504088896340736f);
    float whole = rintf(scaled), rest = scaled - whole;
    float sum = series.at[0];
#pragma unroll
    for (int k = 1; k < 7; k++) sum = fmaf(sum, rest, series.at[k]);
    float power = __uint_as_float(__float_as_uint(whole + (8388608.0f + 127.0f)) << 23);
    float less_one = fmaf(power, sum * rest, power - 1.0f);
    return less_one / (less_one + 2.0f);
}

// Writes the sums over a block to parts[N][gridDim.x]. The block must have its THREADS threads
// along y.
template <int N> __device__ inline void write_sums(const double (&sums)[N], double *parts) {
    for (int n = 0; n < N; n++) {
        double sum = column_sum(sums[n]);
        if (thread() == 0) parts[(size_t)n * gridDim.x + blockIdx.x] = sum;
    }
}

// Computes gx = f(x, gy, sums) for `count` groups of V elements, where f adds to sums[N]. Each
// block writes its sums, multiplied by `by`, to parts[N][gridDim.x].
template <int N, int V, typename T, typename F>
__device__ inline void gradients(const T *x, const T *gy, T *gx, u32 count, double by, double *parts, F f) {
    double sums[N];
    for (int n = 0; n < N; n++) sums[n] = 0.0;
    apply<V>(x, gy, gx, count, [&](float x, float gy, size_t) { return f(x, gy, sums); });
    for (int n = 0; n < N; n++) sums[n] *= by;
    write_sums(sums, parts);
}

struct Totals {
    // [blockDim.x][count]
    const double *parts;
    // [blockDim.x]
    float *totals;
    u32 count;
};

// Runs as one block, with a column of threads for each sum.
__device__ inline void totals(const Totals &a) {
    double sum = 0.0;
    for (u32 i = threadIdx.y; i < a.count; i += blockDim.y) sum += a.parts[(size_t)threadIdx.x * a.count + i];
    sum = column_sum(sum);
    if (threadIdx.y == 0) a.totals[threadIdx.x] = (float)sum;
}
