// Moments of the channels of a feature map: the mean, the sum of squared differences from the mean,
// and the extremes. The normalization uses them, and convolutions that compute the statistics of
// their output.
#pragma once
#include "common.cuh"

// The moments of n values.
struct Moment {
    double n, mean, squares;
    float min, max;
};

__device__ inline Moment no_moment() {
    Moment none = {0.0, 0.0, 0.0, INFINITY, -INFINITY};
    return none;
}

// Merges moments by the rule of Chan, Golub and LeVeque (1983).
__device__ inline void merge(Moment &all, const Moment &more) {
    if (more.n == 0.0) return;
    double n = all.n + more.n, share = more.n / n, delta = more.mean - all.mean;
    all.squares += more.squares + delta * delta * (all.n * share);
    all.mean += delta * share;
    all.n = n;
    all.min = fminf(all.min, more.min);
    all.max = fmaxf(all.max, more.max);
}

// Returns the power of two that scales numbers up to `range` to about 1, so that no square
// underflows or overflows.
__device__ inline float normalizer(float range) {
    u32 exponent = __float_as_uint(range) >> 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    return __uint_as_float((254 - exponent) << 23);
}

// The number of values of a channel that are held in registers at once.
#define RUN 8

// Returns the moments of the first `count` (1 … RUN) values of a run, in two passes. The
// differences from the first value give the mean, which is exact for a constant channel. The
// differences from that mean give the squares; the sum of these differences corrects the mean's
// rounding.
template <int V> __device__ inline Moment moment_of(const Vec<V> (&run)[RUN], int count, int i) {
    float pivot = run[0].at[i], sum = 0.0f, lo = pivot, hi = pivot, n = (float)count;
#pragma unroll
    for (int r = 0; r < RUN; r++) {
        if (r < count) {
            float z = run[r].at[i];
            sum += z - pivot;
            lo = z < lo ? z : lo;
            hi = z > hi ? z : hi;
        }
    }
    float mean = pivot + sum / n, scale = normalizer(hi - lo), differences = 0.0f, squares = 0.0f;
#pragma unroll
    for (int r = 0; r < RUN; r++) {
        if (r < count) {
            float difference = (run[r].at[i] - mean) * scale;
            differences += difference;
            squares = fmaf(difference, difference, squares);
        }
    }
    float correction = differences / n;
    squares -= differences * correction;
    squares = squares < 0.0f ? 0.0f : squares;
    double unit = (double)(1.0f / scale);
    Moment moment = {(double)count, (double)mean + (double)correction * unit, (double)squares * (unit * unit), lo, hi};
    return moment;
}

// The output of a kernel's blocks for `norm_merge`: for each part, the moments of each channel.
struct Partials {
    // [2][parts][channels]: the means, then the squares.
    double *sums;
    // [2][parts][channels]: the smallest, then the largest values. After them [parts]: the numbers
    // of values.
    float *extremes;
};

// Merges the moments of the threads that differ in threadIdx.y, and writes the moments of the
// block's part. All threads of the block must call this; a thread without a channel passes empty
// moments.
template <int V>
__device__ inline void write_part(Moment (&moments)[V], const Partials &partials, u32 channel, u32 channels) {
    __shared__ double ns[THREADS], means[THREADS], squares[THREADS];
    __shared__ float mins[THREADS], maxs[THREADS];
    u32 t = thread();
    size_t plane = (size_t)gridDim.y * channels, at = (size_t)blockIdx.y * channels + channel;
    for (int i = 0; i < V; i++) {
        Moment all = moments[i];
        ns[t] = all.n, means[t] = all.mean, squares[t] = all.squares, mins[t] = all.min, maxs[t] = all.max;
        __syncthreads();
        for (u32 half = half_of(blockDim.y); half > 0; half /= 2) {
            if (threadIdx.y < half && threadIdx.y + half < blockDim.y) {
                u32 other = t + half * blockDim.x;
                Moment more = {ns[other], means[other], squares[other], mins[other], maxs[other]};
                merge(all, more);
                ns[t] = all.n, means[t] = all.mean, squares[t] = all.squares, mins[t] = all.min, maxs[t] = all.max;
            }
            __syncthreads();
        }
        if (threadIdx.y == 0 && channel + i < channels) {
            partials.sums[at + i] = all.mean;
            partials.sums[plane + at + i] = all.squares;
            partials.extremes[at + i] = all.min;
            partials.extremes[plane + at + i] = all.max;
            if (channel + i == 0) partials.extremes[2 * plane + blockIdx.y] = (float)all.n;
        }
        __syncthreads();
    }
}
