// Differentiable soft quantization. dsq.rs has the definitions. Elements are processed in memory
// order, V at a time; `count` is the number of groups of V elements.
#include "learned.cuh"

// The intervals between the bounds.
struct Intervals {
    float low, high, count, width, per_width;
};

__device__ inline Intervals intervals_of(const float *bounds, float count) {
    Intervals intervals;
    intervals.low = bounds[0];
    intervals.high = bounds[1];
    intervals.count = count;
    float width = (bounds[1] - bounds[0]) / count;
    intervals.width = width < MIN_POSITIVE ? MIN_POSITIVE : width;
    intervals.per_width = 1.0f / intervals.width;
    return intervals;
}

struct Forward {
    const void *x;
    const float *bounds;
    void *y;
    u32 count;
    float intervals;
};

template <typename T, int V> __device__ void forward(const Forward &a) {
    Intervals intervals = intervals_of(a.bounds, a.intervals);
    apply<V>((const T *)a.x, (T *)a.y, a.count, [&](float x, size_t) {
        float level = floorf((x - intervals.low) * intervals.per_width + 0.5f);
        level = level > 0.0f ? level : 0.0f;
        level = level < intervals.count ? level : intervals.count;
        return fmaf(level, intervals.width, intervals.low);
    });
}

KERNELS(dsq_forward, Forward, forward)

// The intervals and the coefficients of the soft function.
struct Soft {
    Intervals intervals;
    float per_count, scale, steepness, slope, by_softness[2];

    // The derivatives with respect to x, l, u and α.
    __device__ void slopes(float x, float (&slopes)[4]) const {
        float at = (x - intervals.low) * intervals.per_width;
        float interval = clamped(floorf(at), 0.0f, intervals.count - 1.0f);
        float from_middle = at - interval - 0.5f;
        float t = tangent(steepness * from_middle);
        float rest = 1.0f - t * t;
        float by_x = slope * rest;
        float level = interval + 0.5f * fmaf(scale, t, 1.0f);
        float by_high = (level - by_x * at) * per_count;
        float by_alpha = by_softness[0] * t - by_softness[1] * (rest * from_middle);
        bool below = x < intervals.low, above = x > intervals.high, outside = below || above;
        slopes[0] = outside ? 0.0f : by_x;
        slopes[1] = below ? 1.0f : outside ? 0.0f : 1.0f - by_x - by_high;
        slopes[2] = above ? 1.0f : outside ? 0.0f : by_high;
        slopes[3] = outside ? 0.0f : by_alpha;
    }
};

__device__ inline Soft soft_of(const Intervals &intervals, float softness, float least, float most) {
    // This is in double precision, so only one thread of a block computes it.
    double alpha = clamped(softness, least, most);
    double scale = 1.0 / (1.0 - alpha), steepness = log(2.0 / alpha - 1.0), half = 0.5 * (double)intervals.width;
    Soft soft;
    soft.intervals = intervals;
    soft.per_count = 1.0f / intervals.count;
    soft.scale = (float)scale;
    soft.steepness = (float)steepness;
    soft.slope = (float)(0.5 * scale * steepness);
    soft.by_softness[0] = (float)(half * scale * scale);
    soft.by_softness[1] = (float)(half * scale * 2.0 / (alpha * (2.0 - alpha)));
    return soft;
}

struct Backward {
    const void *x, *gy;
    const float *bounds, *softness;
    void *gx;
    // [3][gridDim.x]: the gradients of l, u and α from each block.
    double *parts;
    u32 count;
    float intervals;
    // The range of the softness.
    float least, most;
};

template <typename T, int V> __device__ void backward(const Backward &a) {
    __shared__ Soft shared;
    if (thread() == 0) shared = soft_of(intervals_of(a.bounds, a.intervals), *a.softness, a.least, a.most);
    __syncthreads();
    Soft soft = shared;
    gradients<3, V>((const T *)a.x, (const T *)a.gy, (T *)a.gx, a.count, 1.0, a.parts, [&](float x, float gy, double *sums) {
        float slopes[4];
        soft.slopes(x, slopes);
#pragma unroll
        for (int n = 0; n < 3; n++) sums[n] += (double)(gy * slopes[n + 1]);
        return gy * slopes[0];
    });
}

KERNELS(dsq_backward, Backward, backward)
KERNEL(dsq_totals, Totals, totals)

struct Project {
    // [2], [1]
    float *bounds, *softness;
    float least, most;
};

// Runs as one thread.
__device__ inline void project(const Project &a) {
    float low = a.bounds[0], high = a.bounds[1];
    if (low > high) a.bounds[0] = a.bounds[1] = 0.5f * (low + high);
    *a.softness = clamped(*a.softness, a.least, a.most);
}

KERNEL(dsq_project, Project, project)
