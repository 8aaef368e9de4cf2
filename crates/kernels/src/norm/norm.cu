// Batch normalization, activation and fake quantization. norm.rs has the definitions.
#include "moments.cuh"

// The statistics: `norm_moments` computes the moments of the parts of a map, and `norm_merge`
// merges them.

struct MomentsOf {
    const void *z;
    Partials partials;
    Columns columns;
};

template <typename T, int V> __device__ void moments(const MomentsOf &a) {
    const T *z = (const T *)a.z;
    u32 channel = a.columns.channel<V>(), channels = a.columns.channels;
    Moment moments[V];
    for (int i = 0; i < V; i++) moments[i] = no_moment();
    if (channel < channels) {
        for (u32 row = a.columns.first(); row < a.columns.end(); row += RUN * blockDim.y) {
            Vec<V> run[RUN];
            int count = a.columns.read(z, row, channel, run);
#pragma unroll
            for (int i = 0; i < V; i++) merge(moments[i], moment_of(run, count, i));
        }
    }
    write_part(moments, a.partials, channel, channels);
}

KERNELS(norm_moments, MomentsOf, moments)

struct Merge {
    Partials partials;
    // [4][channels]: the mean, the biased variance, the smallest and the largest value.
    float *stats;
    u32 parts, channels;
};

// A block merges the parts of blockDim.x channels; each thread merges every blockDim.y-th part.
__device__ inline void merge_parts(const Merge &a) {
    __shared__ double ns[THREADS], means[THREADS], squares[THREADS];
    __shared__ float mins[THREADS], maxs[THREADS];
    u32 channel = blockIdx.x * blockDim.x + threadIdx.x, t = thread();
    size_t plane = (size_t)a.parts * a.channels;
    Moment all = no_moment();
    if (channel < a.channels) {
        for (u32 part = threadIdx.y; part < a.parts; part += blockDim.y) {
            size_t at = (size_t)part * a.channels + channel;
            Moment more = {(double)a.partials.extremes[2 * plane + part], a.partials.sums[at],
                           a.partials.sums[plane + at], a.partials.extremes[at], a.partials.extremes[plane + at]};
            merge(all, more);
        }
    }
    ns[t] = all.n, means[t] = all.mean, squares[t] = all.squares, mins[t] = all.min, maxs[t] = all.max;
    __syncthreads();
    if (threadIdx.y > 0 || channel >= a.channels) return;
    for (u32 y = 1; y < blockDim.y; y++) {
        u32 other = t + y * blockDim.x;
        Moment more = {ns[other], means[other], squares[other], mins[other], maxs[other]};
        merge(all, more);
    }
    a.stats[channel] = (float)all.mean;
    a.stats[a.channels + channel] = (float)(all.squares / all.n);
    a.stats[2 * a.channels + channel] = all.min;
    a.stats[3 * a.channels + channel] = all.max;
}

KERNEL(norm_merge, Merge, merge_parts)

struct Prepare {
    const float *mean, *variance, *gamma, *beta;
    // The running statistics, which move towards those of the batch.
    float *running_mean, *running_variance;
    // [3][channels]: 1/√(V + ε), the scale and the shift.
    float *out;
    u32 channels;
    // ε, N/(N − 1), and the share of the batch in the running statistics.
    float epsilon, unbias, momentum;
};

__device__ inline void prepare(const Prepare &a) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, c = a.channels;
    if (i >= c) return;
    float inv_std = 1.0f / sqrtf(a.variance[i] + a.epsilon);
    float scale = a.gamma[i] * inv_std;
    a.out[i] = inv_std;
    a.out[c + i] = scale;
    a.out[2 * c + i] = a.beta[i] - a.mean[i] * scale;
    a.running_mean[i] = a.running_mean[i] + (a.mean[i] - a.running_mean[i]) * a.momentum;
    float unbiased = a.variance[i] * a.unbias;
    a.running_variance[i] = a.running_variance[i] + (unbiased - a.running_variance[i]) * a.momentum;
}

KERNEL(norm_prepare, Prepare, prepare)

struct OutputRange {
    const float *min, *max, *scale, *shift;
    // [2]: the extremes of the outputs.
    float *extremes;
    u32 channels;
    float lo, hi;
};

// Runs as one block.
__device__ inline void output_range(const OutputRange &a) {
    float lo = INFINITY, hi = -INFINITY;
    for (u32 i = thread(); i < a.channels; i += blockDim.x) {
        float p = clamped(fmaf(a.min[i], a.scale[i], a.shift[i]), a.lo, a.hi);
        float q = clamped(fmaf(a.max[i], a.scale[i], a.shift[i]), a.lo, a.hi);
        lo = fminf(lo, fminf(p, q));
        hi = fmaxf(hi, fmaxf(p, q));
    }
    block_extremes(lo, hi);
    if (thread() == 0) a.extremes[0] = lo, a.extremes[1] = hi;
}

KERNEL(norm_output_range, OutputRange, output_range)

// The number of rows that a thread reads before it writes.
#define BATCH 4

struct Forward {
    const void *z;
    const float *scale, *shift;
    void *y;
    // Null without a quantizer.
    const float *range;
    Columns columns;
    float lo, hi, max_level;
};

template <typename T, typename Y, int V> __device__ void forward(const Forward &a) {
    const T *__restrict__ z = (const T *)a.z;
    Y *__restrict__ y = (Y *)a.y;
    u32 channel = a.columns.channel<V>(), channels = a.columns.channels, end = a.columns.end();
    if (channel >= channels) return;
    Vec<V> scale = load<V>(a.scale, channel), shift = load<V>(a.shift, channel);
    Grid grid;
    if (sizeof(Y) == 1) grid = grid_of(a.range, a.max_level);
    for (u32 row = a.columns.first(); row < end; row += BATCH * blockDim.y) {
        Vec<V> batch[BATCH];
        a.columns.read(z, row, channel, batch);
#pragma unroll
        for (int r = 0; r < BATCH; r++) {
            u32 at = row + r * blockDim.y;
            if (at >= end) break;
            Vec<V> out;
#pragma unroll
            for (int i = 0; i < V; i++) {
                float u = clamped(fmaf(batch[r].at[i], scale.at[i], shift.at[i]), a.lo, a.hi);
                out.at[i] = sizeof(Y) == 1 ? grid.level(u) : u;
            }
            store<V>(y, (size_t)at * channels + channel, out);
        }
    }
}

KERNEL(norm_forward_f32_f32_1, Forward, forward<float, float, 1>)
KERNEL(norm_forward_f32_f32_4, Forward, forward<float, float, 4>)
KERNEL(norm_forward_f32_u8_1, Forward, forward<float, u8, 1>)
KERNEL(norm_forward_f32_u8_4, Forward, forward<float, u8, 4>)
KERNEL(norm_forward_bf16_bf16_1, Forward, forward<bf16, bf16, 1>)
KERNEL(norm_forward_bf16_bf16_4, Forward, forward<bf16, bf16, 4>)
KERNEL(norm_forward_bf16_u8_1, Forward, forward<bf16, u8, 1>)
KERNEL(norm_forward_bf16_u8_4, Forward, forward<bf16, u8, 4>)

// The gradient: `norm_sums` computes the sums of the parts of a map, `norm_coefficients` adds them
// up and computes the coefficients, and `norm_gradient` applies them.

struct Sums {
    const void *z, *gy;
    const float *scale, *shift;
    // The mean, [channels]; null means 0.
    const float *mean;
    // Null without a quantizer.
    const float *range;
    // [2][parts][channels]: Σg, then Σg·(z − mean).
    double *sums;
    Columns columns;
    float lo, hi, max_level;
};

template <typename T, int V> __device__ void sums(const Sums &a) {
    const T *z = (const T *)a.z, *gy = (const T *)a.gy;
    u32 channel = a.columns.channel<V>(), channels = a.columns.channels, end = a.columns.end();
    Gate gate(a.lo, a.hi, a.range, a.max_level);
    double sum[V], product[V];
    for (int i = 0; i < V; i++) sum[i] = product[i] = 0.0;
    if (channel < channels) {
        Vec<V> scale = load<V>(a.scale, channel), shift = load<V>(a.shift, channel);
        Vec<V> mean = a.mean ? load<V>(a.mean, channel) : splat<V>(0.0f);
        for (u32 row = a.columns.first(); row < end; row += BATCH * blockDim.y) {
            Vec<V> zs[BATCH], gys[BATCH];
            int count = a.columns.read(z, row, channel, zs);
            a.columns.read(gy, row, channel, gys);
            Vec<V> s = splat<V>(0.0f), p = splat<V>(0.0f);
#pragma unroll
            for (int r = 0; r < BATCH; r++) {
                if (r >= count) break;
#pragma unroll
                for (int i = 0; i < V; i++) {
                    float g = gate.gated(fmaf(zs[r].at[i], scale.at[i], shift.at[i]), gys[r].at[i]);
                    s.at[i] += g;
                    p.at[i] = fmaf(g, zs[r].at[i] - mean.at[i], p.at[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < V; i++) sum[i] += (double)s.at[i], product[i] += (double)p.at[i];
        }
    }
    size_t plane = (size_t)gridDim.y * channels, at = (size_t)blockIdx.y * channels + channel;
    for (int i = 0; i < V; i++) {
        double s = column_sum(sum[i]), p = column_sum(product[i]);
        if (threadIdx.y == 0 && channel < channels) a.sums[at + i] = s, a.sums[plane + at + i] = p;
    }
}

KERNELS(norm_sums, Sums, sums)

struct Coefficients {
    const double *sums;
    // The scale and 1/√(V + ε), [channels]; `inv_std` is null if the statistics are frozen.
    const float *scale, *inv_std;
    // [4][channels]: ∂γ, ∂β (or ∂shift), the slope and the offset.
    float *out;
    u32 parts, channels;
    float rows;
};

__device__ inline void coefficients(const Coefficients &a) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, c = a.channels;
    size_t plane = (size_t)a.parts * c;
    double sum = 0.0, product = 0.0;
    if (i < c) {
        for (u32 part = threadIdx.y; part < a.parts; part += blockDim.y) {
            sum += a.sums[(size_t)part * c + i];
            product += a.sums[plane + (size_t)part * c + i];
        }
    }
    sum = column_sum(sum);
    product = column_sum(product);
    if (threadIdx.y > 0 || i >= c) return;
    float beta = (float)sum, gamma = 0.0f, slope = 0.0f, offset = 0.0f;
    if (a.inv_std) {
        float scale = a.scale[i], inv_std = a.inv_std[i];
        gamma = (float)(product * (double)inv_std);
        slope = -scale * inv_std * (gamma / a.rows);
        offset = -scale * (beta / a.rows);
    }
    a.out[i] = gamma;
    a.out[c + i] = beta;
    a.out[2 * c + i] = slope;
    a.out[3 * c + i] = offset;
}

KERNEL(norm_coefficients, Coefficients, coefficients)

struct Gradient {
    const void *z, *gy;
    // A null mean stands for 0.
    const float *scale, *shift, *mean, *slope, *offset;
    // Null without a quantizer.
    const float *range;
    void *gz;
    Columns columns;
    float lo, hi, max_level;
};

template <typename T, int V> __device__ void gradient(const Gradient &a) {
    const T *__restrict__ z = (const T *)a.z, *__restrict__ gy = (const T *)a.gy;
    T *__restrict__ gz = (T *)a.gz;
    u32 channel = a.columns.channel<V>(), channels = a.columns.channels, end = a.columns.end();
    if (channel >= channels) return;
    Gate gate(a.lo, a.hi, a.range, a.max_level);
    Vec<V> scale = load<V>(a.scale, channel), shift = load<V>(a.shift, channel);
    Vec<V> mean = a.mean ? load<V>(a.mean, channel) : splat<V>(0.0f);
    Vec<V> slope = load<V>(a.slope, channel), offset = load<V>(a.offset, channel);
    for (u32 row = a.columns.first(); row < end; row += BATCH * blockDim.y) {
        Vec<V> zs[BATCH], gys[BATCH];
        a.columns.read(z, row, channel, zs);
        a.columns.read(gy, row, channel, gys);
#pragma unroll
        for (int r = 0; r < BATCH; r++) {
            u32 at = row + r * blockDim.y;
            if (at >= end) break;
            Vec<V> out;
#pragma unroll
            for (int i = 0; i < V; i++) {
                float x = zs[r].at[i];
                float g = gate.gated(fmaf(x, scale.at[i], shift.at[i]), gys[r].at[i]);
                out.at[i] = fmaf(scale.at[i], g, fmaf(slope.at[i], x - mean.at[i], offset.at[i]));
            }
            store<V>(gz, (size_t)at * channels + channel, out);
        }
    }
}

KERNELS(norm_gradient, Gradient, gradient)
