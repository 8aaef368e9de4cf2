// Patches of images as rows. im2col.rs has the definitions.
#include "common.cuh"

struct Patches {
    const void *x;
    void *y;
    u32 images, h, w, channels, kernel, stride, padding, to_h, to_w;
};

// Each thread copies elements of patches. Neighbouring threads write neighbouring elements, and
// mostly read neighbouring ones.
template <typename T> __device__ void patches(const Patches &a) {
    u32 row = a.kernel * a.channels, patch = a.kernel * row, positions = a.images * a.to_h * a.to_w;
    size_t count = (size_t)positions * patch, step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        u32 position = (u32)(i / patch), within = (u32)(i % patch);
        u32 image = position / (a.to_h * a.to_w), oh = position / a.to_w % a.to_h, ow = position % a.to_w;
        // These are coordinates in the padded image, so that none is negative.
        u32 ih = oh * a.stride + within / row, iw = ow * a.stride + within % row / a.channels;
        bool inside = ih >= a.padding && ih < a.h + a.padding && iw >= a.padding && iw < a.w + a.padding;
        T y = element<T>(0.0f);
        if (inside) {
            size_t from = ((size_t)image * a.h + ih - a.padding) * a.w + iw - a.padding;
            y = ((const T *)a.x)[from * a.channels + within % a.channels];
        }
        ((T *)a.y)[i] = y;
    }
}

KERNEL(im2col_patches_f32, Patches, patches<float>)
KERNEL(im2col_patches_bf16, Patches, patches<bf16>)
