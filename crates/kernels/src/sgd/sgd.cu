// Stochastic gradient descent of many parameters at once; the definition stands in sgd.rs.
#include "common.cuh"

// Parameters of a launch, and elements that a block changes.
#define PARAMETERS 64
#define PER_BLOCK 4096

struct Parameter {
    float *param;
    const float *grad;
    float *velocity;
    // Elements; the first block of this parameter.
    u32 count, first;
    float decay;
    u32 unused;
};

struct Step {
    Parameter of[PARAMETERS];
    // Where the learning rate stands, or null: then it is `rate`.
    const float *rate_at;
    u32 parameters;
    float rate, momentum;
};

__device__ inline void step(const Step &a) {
    // The last parameter that does not begin behind this block.
    u32 low = 0, high = a.parameters;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (a.of[middle].first <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const Parameter &p = a.of[low];
    float rate = a.rate_at ? *a.rate_at : a.rate;
    u32 start = (blockIdx.x - p.first) * PER_BLOCK;
    u32 end = start + PER_BLOCK < p.count ? start + PER_BLOCK : p.count;
    for (u32 i = start + threadIdx.x; i < end; i += blockDim.x) {
        float param = p.param[i];
        float velocity = a.momentum * p.velocity[i] + (p.grad[i] + p.decay * param);
        p.velocity[i] = velocity;
        p.param[i] = param - rate * velocity;
    }
}

KERNEL(sgd_step, Step, step)
