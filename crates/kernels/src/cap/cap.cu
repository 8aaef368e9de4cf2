// Upper bounds of channels. cap.rs has the definitions. `count` is the number of groups of V
// elements.
#include "common.cuh"

struct Lower {
    const void *x;
    const float *cap;
    void *y;
    u32 count, channels;
};

template <typename T, int V> __device__ void lower(const Lower &a) {
    apply<V>((const T *)a.x, (T *)a.y, a.count, [&](float x, size_t at) {
        float cap = a.cap[at % a.channels];
        // NaN stays NaN.
        return x > cap ? cap : x;
    });
}

KERNELS(cap_lower, Lower, lower)

struct Pass {
    const void *y, *gy;
    const float *cap;
    void *gx;
    u32 count, channels;
};

template <typename T, int V> __device__ void pass(const Pass &a) {
    apply<V>((const T *)a.y, (const T *)a.gy, (T *)a.gx, a.count, [&](float y, float gy, size_t at) {
        // y was stored as T, so it is compared with the cap rounded to T.
        return y < value(element<T>(a.cap[at % a.channels])) ? gy : 0.0f;
    });
}

KERNELS(cap_pass, Pass, pass)
