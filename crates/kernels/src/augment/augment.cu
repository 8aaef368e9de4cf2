// Batches of randomly varied images from a data set. augment.rs has the definitions.
#include "common.cuh"

struct Batch {
    // [count, h, w, channels]
    const u8 *images;
    // [batch], [batch, 2] and [batch]
    const u32 *index, *corners;
    const u8 *flip;
    // [channels]
    const float *mean, *std;
    void *y;
    u32 count, h, w, channels, batch, pad;
};

// Each thread computes elements of the batch. An image index beyond the data set gives NaN.
template <typename T> __device__ void batch(const Batch &a) {
    size_t all = (size_t)a.batch * a.h * a.w * a.channels, step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
        u32 channel = (u32)(i % a.channels), x = (u32)(i / a.channels % a.w);
        u32 y = (u32)(i / a.channels / a.w % a.h), b = (u32)(i / a.channels / a.w / a.h);
        if (a.flip[b]) x = a.w - 1 - x;
        u32 row = y + a.corners[2 * b], column = x + a.corners[2 * b + 1], image = a.index[b];
        bool inside = row >= a.pad && row < a.h + a.pad && column >= a.pad && column < a.w + a.pad;
        float pixel = 0.0f;
        if (image >= a.count) {
            pixel = NAN;
        } else if (inside) {
            size_t from = ((size_t)image * a.h + row - a.pad) * a.w + column - a.pad;
            pixel = (float)a.images[from * a.channels + channel];
        }
        ((T *)a.y)[i] = element<T>((pixel / 255.0f - a.mean[channel]) / a.std[channel]);
    }
}

KERNEL(augment_batch_f32, Batch, batch<float>)
KERNEL(augment_batch_bf16, Batch, batch<bf16>)
