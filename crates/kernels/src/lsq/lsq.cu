// Learned step size quantization. lsq.rs has the definitions. Elements are processed in memory
// order, V at a time; `count` is the number of groups of V elements.
#include "learned.cuh"

// Returns the step, or the smallest step if that is larger. NaN stays NaN.
__device__ inline float positive(float step, float least) { return step < least ? least : step; }

// The step of a quantizer, its reciprocal, and its offset.
struct Scale {
    float step, per_step, offset;

    // `offset` may be null.
    __device__ Scale(const float *step, const float *offset, float least)
        : step(positive(*step, least)), per_step(1.0f / this->step), offset(offset ? *offset : 0.0f) {}

    __device__ float position(float x) const { return (x - offset) * per_step; }
};

struct Forward {
    const void *x;
    // `offset` may be null.
    const float *step, *offset;
    void *y;
    u32 count;
    // The lowest and the highest level, and the smallest step.
    float low, high, least;
};

template <typename T, int V> __device__ void forward(const Forward &a) {
    Scale scale(a.step, a.offset, a.least);
    apply<V>((const T *)a.x, (T *)a.y, a.count, [&](float x, size_t) {
        float level = clamped(rintf(scale.position(x)), a.low, a.high);
        return fmaf(level, scale.step, scale.offset);
    });
}

KERNELS(lsq_forward, Forward, forward)

struct Backward {
    const void *x, *gy;
    // `offset` may be null.
    const float *step, *offset;
    void *gx;
    // [2][gridDim.x]: the gradients of the step and of the offset from each block.
    double *parts;
    // The factor of the gradients of the step and of the offset.
    double g;
    u32 count;
    // See Forward.
    float low, high, least;
};

template <typename T, int V> __device__ void backward(const Backward &a) {
    Scale scale(a.step, a.offset, a.least);
    gradients<2, V>((const T *)a.x, (const T *)a.gy, (T *)a.gx, a.count, a.g, a.parts, [&](float x, float gy, double *sums) {
        float position = scale.position(x);
        bool below = position <= a.low, above = position >= a.high, clipped = below || above;
        float slope = below ? a.low : above ? a.high : rintf(position) - position;
        sums[0] += (double)(gy * slope);
        sums[1] += (double)(clipped ? gy : 0.0f);
        return clipped ? 0.0f : gy;
    });
}

KERNELS(lsq_backward, Backward, backward)

struct Magnitude {
    const void *x;
    // [gridDim.x]: the sum of the absolute values from each block.
    double *parts;
    u32 count;
};

template <typename T, int V> __device__ void magnitude(const Magnitude &a) {
    double sums[1] = {0.0};
    for (u32 at = blockIdx.x * THREADS + thread(); at < a.count; at += gridDim.x * THREADS) {
        Vec<V> x = load<V>((const T *)a.x, (size_t)at * V);
#pragma unroll
        for (int i = 0; i < V; i++) sums[0] += (double)fabsf(x.at[i]);
    }
    write_sums(sums, a.parts);
}

KERNELS(lsq_magnitude, Magnitude, magnitude)
KERNEL(lsq_totals, Totals, totals)

struct Project {
    // [1]
    float *step;
    float least;
};

// Runs as one thread.
__device__ inline void project(const Project &a) { *a.step = positive(*a.step, a.least); }

KERNEL(lsq_project, Project, project)
