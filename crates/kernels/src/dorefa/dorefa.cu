// The weights of DoReFa-Net. dorefa.rs has the definitions.
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
    apply<1>(a.w, a.y, a.count, [&](float w, size_t) {
        float level = rintf(fmaf(tangent(w), half, 0.5f) * a.steps);
        level = level > 0.0f ? level : 0.0f;
        level = level < a.steps ? level : a.steps;
        return (2.0f * level - a.steps) / a.steps;
    });
}

KERNEL(dorefa_forward, Forward, forward)

struct Backward {
    const float *w, *gy, *extremes;
    float *gw;
    u32 count;
};

__device__ inline void backward(const Backward &a) {
    float scale = 1.0f / maximum_of(a.extremes);
    apply<1>(a.w, a.gy, a.gw, a.count, [&](float w, float gy, size_t) {
        float t = tangent(w);
        return gy * ((1.0f - t * t) * scale);
    });
}

KERNEL(dorefa_backward, Backward, backward)
