// Softmax cross-entropy with label smoothing. loss.rs has the definitions.
#include "common.cuh"

struct Images {
    const float *logits;
    const u32 *labels;
    // [images, classes]: the gradient, followed by the loss and the number of correct images.
    float *all;
    // [2][images]: the losses, then 1 for each image that is classified correctly, else 0.
    double *found;
    double smoothing, scale;
    u32 images, classes;
};

// Returns the sum over the threads of a block, which are all along x. Every thread receives it.
__device__ inline double block_sum(double x) {
    __shared__ double sums[THREADS];
    u32 t = threadIdx.x;
    sums[t] = x;
    __syncthreads();
    for (u32 half = half_of(blockDim.x); half > 0; half /= 2) {
        if (t < half && t + half < blockDim.x) sums[t] += sums[t + half];
        __syncthreads();
    }
    x = sums[0];
    __syncthreads();
    return x;
}

// Each block handles an image. A label that is not a class makes the loss and the gradient NaN.
__device__ inline void images(const Images &a) {
    __shared__ float values[THREADS];
    __shared__ u32 places[THREADS];
    u32 image = blockIdx.x, t = threadIdx.x, k = a.classes;
    const float *logits = a.logits + (size_t)image * k;
    float best = -INFINITY;
    u32 place = 0xffffffffu;
    for (u32 i = t; i < k; i += blockDim.x) {
        if (place == 0xffffffffu || logits[i] > best) best = logits[i], place = i;
    }
    values[t] = best, places[t] = place;
    __syncthreads();
    for (u32 half = half_of(blockDim.x); half > 0; half /= 2) {
        if (t < half && t + half < blockDim.x) {
            float other = values[t + half];
            u32 at = places[t + half];
            // Of equal logits, the first wins.
            if (other > values[t] || (other == values[t] && at < places[t])) values[t] = other, places[t] = at;
        }
        __syncthreads();
    }
    double max = (double)values[0];
    place = places[0];
    double sum = 0.0, total = 0.0;
    for (u32 i = t; i < k; i += blockDim.x) {
        double shifted = (double)logits[i] - max;
        sum += exp(shifted);
        total += shifted;
    }
    sum = block_sum(sum);
    total = block_sum(total);
    u32 label = a.labels[image];
    bool valid = label < k;
    double spread = a.smoothing / (double)k;
    for (u32 i = t; i < k; i += blockDim.x) {
        double p = exp((double)logits[i] - max) / sum;
        double gradient = i == label ? p - spread - (1.0 - a.smoothing) : p - spread;
        a.all[(size_t)image * k + i] = valid ? (float)(gradient * a.scale) : NAN;
    }
    if (t == 0) {
        double at_label = valid ? (double)logits[label] - max : (double)NAN;
        a.found[image] = log(sum) - (1.0 - a.smoothing) * at_label - spread * total;
        a.found[a.images + image] = place == label ? 1.0 : 0.0;
    }
}

KERNEL(loss_images, Images, images)

// Runs as one block. Computes the mean loss and the number of correct images.
__device__ inline void batch(const Images &a) {
    double loss = 0.0, correct = 0.0;
    for (u32 i = threadIdx.x; i < a.images; i += blockDim.x) loss += a.found[i], correct += a.found[a.images + i];
    loss = block_sum(loss);
    correct = block_sum(correct);
    if (threadIdx.x == 0) {
        size_t end = (size_t)a.images * a.classes;
        a.all[end] = (float)(loss / (double)a.images);
        a.all[end + 1] = (float)correct;
    }
}

KERNEL(loss_batch, Images, batch)
