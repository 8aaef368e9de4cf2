// The bias of a classifier; the definitions stand in bias.rs.
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

struct Gradient {
    const float *gy;
    float *gradient;
    u32 images, classes;
};

// A block's threads, [ROWS, CLASSES].
constexpr u32 CLASSES = 32, ROWS = 8;

// The threads of a class share the images; their sums are added in a fixed order.
__device__ inline void gradient(const Gradient &a) {
    __shared__ double sums[ROWS][CLASSES];
    u32 k = blockIdx.x * CLASSES + threadIdx.x;
    double sum = 0.0;
    if (k < a.classes) {
        for (u32 n = threadIdx.y; n < a.images; n += ROWS) sum += a.gy[(size_t)n * a.classes + k];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && k < a.classes) {
        for (u32 row = 1; row < ROWS; row++) sum += sums[row][threadIdx.x];
        a.gradient[k] = (float)sum;
    }
}

KERNEL(bias_gradient, Gradient, gradient)
