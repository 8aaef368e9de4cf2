// The bias of a classifier. bias.rs has the definitions.
#include "common.cuh"

struct Add {
    const float *x, *bias;
    float *y;
    u32 images, classes;
};

__device__ inline void add(const Add &a) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.images * a.classes) a.y[i] = a.x[i] + a.bias[i % a.classes];
}

KERNEL(bias_add, Add, add)

KERNEL(bias_total, Total, total)
