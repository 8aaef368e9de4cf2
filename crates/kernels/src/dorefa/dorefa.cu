// DoReFa-Net's weights; the definitions stand in dorefa.rs.
#include "learned.cuh"

// max|tanh w|, from the weights' extremes.
__device__ inline float maximum_of(const float *extremes) {
    return fmaxf(fmaxf(fabsf(tangent(extremes[0])), fabsf(tangent(extremes[1]))), MIN_POSITIVE);
}

struct Forward {
    const float *w;
    // [2]: the smallest and the largest weight.
    const float *extremes;
    float *y;
    u32 count;
    float steps;
};

__device__ inline void forward(const Forward &a) {
    float half = 0.5f / maximum_of(a.extremes);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        float level = rintf(fmaf(tangent(a.w[at]), half, 0.5f) * a.steps);
        level = level > 0.0f ? level : 0.0f;
        level = level < a.steps ? level : a.steps;
        a.y[at] = (2.0f * level - a.steps) / a.steps;
    }
}

KERNEL(dorefa_forward, Forward, forward)

struct Backward {
    const float *w, *gy, *extremes;
    float *gw;
    u32 count;
};

__device__ inline void backward(const Backward &a) {
    float scale = 1.0f / maximum_of(a.extremes);
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.count; at += gridDim.x * blockDim.x) {
        float t = tangent(a.w[at]);
        a.gw[at] = a.gy[at] * ((1.0f - t * t) * scale);
    }
}

KERNEL(dorefa_backward, Backward, backward)
