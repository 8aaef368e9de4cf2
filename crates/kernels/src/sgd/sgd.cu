// Stochastic gradient descent of many parameters at once. sgd.rs has the definition.
#include "common.cuh"

// The number of parameters of a launch, and of elements that a block updates.
#define PARAMETERS 64
#define PER_BLOCK 4096

struct Parameter {
    float *param;
    const float *grad;
    float *velocity;
    // The number of elements, and the index of the parameter's first block.
    u32 count, first;
    float decay;
};

struct Step {
    Parameter of[PARAMETERS];
    // The learning rate on the device, or null if `rate` holds it.
    const float *rate_at;
    u32 parameters;
    float rate, momentum;
};

__device__ inline void step(const Step &a) {
    // Find the parameter of this block: the last one whose first block is not after it.
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
