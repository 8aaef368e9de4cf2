// The depthwise 3×3 convolution. depthwise.rs has the definitions.
//
// A thread handles V channels and moves down a strip of one or two columns of a map. It keeps the
// rows of the window in registers, so that each row is read once. Neighbouring threads handle
// neighbouring channels, so that reads and writes are contiguous. Threads that differ in
// threadIdx.y handle neighbouring strips, which share columns in the cache.
#include "moments.cuh"

// Strips of maps [images, height, width, channels]. A strip has `columns` columns and `band` rows
// of the map that is written (for the gradient of the weight: of the map that is summed over).
struct Strips {
    // The size of the map that is read (h, w) and of the map that is cut into strips (to_h, to_w).
    u32 images, h, w, to_h, to_w, channels;
    // The rows of a strip, and the number of strips in a row and in a column of the map.
    u32 band, across, down;

    __device__ u32 count() const { return images * across * down; }
};

// The strip of a thread.
struct Strip {
    u32 image, row, end, column;

    __device__ Strip(const Strips &s, u32 index, u32 columns) {
        column = index % s.across * columns;
        u32 rest = index / s.across;
        row = rest % s.down * s.band;
        end = row + s.band < s.to_h ? row + s.band : s.to_h;
        image = rest / s.down;
    }
};

// The three rows of a map that one row of a strip reads, in registers. Values outside of the map
// are 0.
template <typename X, int V, int STRIDE, int COLUMNS> struct Window {
    static constexpr int WIDTH = (COLUMNS - 1) * STRIDE + 3;
    const X *x;
    const Reader<X> &reader;
    const Strips &s;
    const Strip &strip;
    u32 channel;
    Vec<V> at[3][WIDTH];

    // Reads the first 3 − STRIDE rows of the first window, to the places from which `go_to` moves
    // them.
    __device__ Window(const X *x, const Reader<X> &reader, const Strips &s, const Strip &strip, u32 channel)
        : x(x), reader(reader), s(s), strip(strip), channel(channel) {
#pragma unroll
        for (int i = 0; i < 3 - STRIDE; i++) read(at[STRIDE + i], strip.row * STRIDE + i);
    }

    // Moves the window to `row`, the next row of the strip.
    __device__ void go_to(u32 row) {
#pragma unroll
        for (int i = 0; i < 3 - STRIDE; i++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) at[i][j] = at[STRIDE + i][j];
        }
#pragma unroll
        for (int i = 3 - STRIDE; i < 3; i++) read(at[i], row * STRIDE + i);
    }

    // Reads row `row` − 1 of the map.
    __device__ void read(Vec<V> (&to)[WIDTH], u32 row) const {
        bool inside = row >= 1 && row <= s.h;
        size_t from = ((size_t)strip.image * s.h + row - 1) * s.w;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            u32 column = strip.column * STRIDE + i;
            bool reads = inside && column >= 1 && column <= s.w;
            to[i] = reads ? reader.template read<V>(x, (from + column - 1) * s.channels + channel) : splat<V>(0.0f);
        }
    }
};

struct Convolve {
    const void *x;
    // [3, 3, channels]
    const float *w;
    void *z;
    // The range of x, if x is levels.
    const float *range;
    // The place for the statistics; null if they are not needed.
    Partials partials;
    Strips strips;
    float max_level;
    // 1: the taps of the weight in reverse order, which gives the gradient of the input (stride 1).
    u32 reversed;
};

template <typename X, typename T, int V, int STRIDE, int COLUMNS> __device__ void convolve(const Convolve &a) {
    const Strips &s = a.strips;
    u32 c = s.channels, channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    u32 index = blockIdx.y * blockDim.y + threadIdx.y;
    // The statistics are sums of differences from the strip's first value. A strip has few enough
    // values for sums in float32.
    Vec<V> pivot = splat<V>(0.0f), sum = pivot, squares = pivot, lo = splat<V>(INFINITY), hi = splat<V>(-INFINITY);
    u32 count = 0;
    if (channel < c && index < s.count()) {
        T *z = (T *)a.z;
        Reader<X> reader(a.range, a.max_level);
        Strip strip(s, index, COLUMNS);
        Vec<V> w[9];
#pragma unroll
        for (int tap = 0; tap < 9; tap++) w[tap] = load<V>(a.w, (size_t)(a.reversed ? 8 - tap : tap) * c + channel);
        Window<X, V, STRIDE, COLUMNS> window((const X *)a.x, reader, s, strip, channel);
        for (u32 row = strip.row; row < strip.end; row++) {
            window.go_to(row);
            size_t to = (((size_t)strip.image * s.to_h + row) * s.to_w + strip.column) * c + channel;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                if (strip.column + j >= s.to_w) continue;
                Vec<V> y = splat<V>(0.0f);
#pragma unroll
                for (int tap = 0; tap < 9; tap++) {
#pragma unroll
                    for (int i = 0; i < V; i++) {
                        y.at[i] = fmaf(window.at[tap / 3][j * STRIDE + tap % 3].at[i], w[tap].at[i], y.at[i]);
                    }
                }
                // The statistics are taken from the values as they are stored.
#pragma unroll
                for (int i = 0; i < V; i++) y.at[i] = value(element<T>(y.at[i]));
                store<V>(z, to + (size_t)j * c, y);
                if (a.partials.sums) {
                    if (count == 0) pivot = y;
                    count++;
#pragma unroll
                    for (int i = 0; i < V; i++) {
                        float difference = y.at[i] - pivot.at[i];
                        sum.at[i] += difference;
                        squares.at[i] = fmaf(difference, difference, squares.at[i]);
                        lo.at[i] = y.at[i] < lo.at[i] ? y.at[i] : lo.at[i];
                        hi.at[i] = y.at[i] > hi.at[i] ? y.at[i] : hi.at[i];
                    }
                }
            }
        }
    }
    if (!a.partials.sums) return;
    Moment moments[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        double n = (double)count, mean = count > 0 ? (double)sum.at[i] / n : 0.0;
        double rest = (double)squares.at[i] - (double)sum.at[i] * mean;
        moments[i].n = n;
        moments[i].mean = (double)pivot.at[i] + mean;
        moments[i].squares = rest < 0.0 ? 0.0 : rest;
        moments[i].min = lo.at[i];
        moments[i].max = hi.at[i];
    }
    write_part(moments, a.partials, channel, c);
}

#define CONVOLVE(x, t, X, T)                                                             \
    KERNEL(depthwise_convolve_##x##_##t##_1_1, Convolve, convolve<X, T, 1, 1, 2>)        \
    KERNEL(depthwise_convolve_##x##_##t##_1_4, Convolve, convolve<X, T, 4, 1, 2>)        \
    KERNEL(depthwise_convolve_##x##_##t##_2_1, Convolve, convolve<X, T, 1, 2, 1>)        \
    KERNEL(depthwise_convolve_##x##_##t##_2_4, Convolve, convolve<X, T, 4, 2, 1>)
CONVOLVE(f32, f32, float, float)
CONVOLVE(u8, f32, u8, float)
CONVOLVE(bf16, bf16, bf16, bf16)
CONVOLVE(u8, bf16, u8, bf16)

struct Spread {
    const void *gz;
    // [3, 3, channels]
    const float *w;
    void *gx;
    // The strips cut gx and read gz. They are one cell wide, and `band` counts cells: blocks of 2×2
    // elements of gx.
    Strips strips;
};

// The gradient of the input for stride 2. In the cell at (2i, 2j), the even row and column have one
// tap, the odd ones two.
template <typename T, int V> __device__ void spread(const Spread &a) {
    const Strips &s = a.strips;
    u32 c = s.channels, channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    u32 index = blockIdx.y * blockDim.y + threadIdx.y;
    if (channel >= c || index >= s.count()) return;
    const T *gz = (const T *)a.gz;
    T *gx = (T *)a.gx;
    u32 j = index % s.across, rest = index / s.across, first = rest % s.down * s.band, image = rest / s.down;
    u32 cells = (s.to_h + 1) / 2, end = first + s.band < cells ? first + s.band : cells;
    Vec<V> w[9];
#pragma unroll
    for (int tap = 0; tap < 9; tap++) w[tap] = load<V>(a.w, (size_t)tap * c + channel);
    // Reads gz[row, j] and gz[row, j + 1].
    auto read = [&](Vec<V>(&to)[2], u32 row) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bool inside = row < s.h && j + i < s.w;
            size_t from = (((size_t)image * s.h + row) * s.w + j + i) * c + channel;
            to[i] = inside ? load<V>(gz, from) : splat<V>(0.0f);
        }
    };
    Vec<V> upper[2], lower[2];
    read(lower, first);
    for (u32 cell = first; cell < end; cell++) {
        upper[0] = lower[0], upper[1] = lower[1];
        read(lower, cell + 1);
        Vec<V> y[4];
#pragma unroll
        for (int i = 0; i < V; i++) {
            y[0].at[i] = w[4].at[i] * upper[0].at[i];
            y[1].at[i] = fmaf(w[3].at[i], upper[1].at[i], w[5].at[i] * upper[0].at[i]);
            y[2].at[i] = fmaf(w[1].at[i], lower[0].at[i], w[7].at[i] * upper[0].at[i]);
            float right = fmaf(w[0].at[i], lower[1].at[i], w[6].at[i] * upper[1].at[i]);
            y[3].at[i] = fmaf(w[2].at[i], lower[0].at[i], fmaf(w[8].at[i], upper[0].at[i], right));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 row = 2 * cell + k / 2, column = 2 * j + k % 2;
            if (row < s.to_h && column < s.to_w) {
                store<V>(gx, (((size_t)image * s.to_h + row) * s.to_w + column) * c + channel, y[k]);
            }
        }
    }
}

KERNELS(depthwise_spread, Spread, spread)

struct Correlate {
    const void *x, *gz;
    // The range of x, if x is levels.
    const float *range;
    // [parts, 3, 3, channels]
    float *sums;
    // The strips cut gz and read x.
    Strips strips;
    // The number of strips in a part.
    u32 per_part;
    float max_level;
};

// The gradient of the weight: computes the sums of a part.
template <typename X, typename T, int V, int STRIDE> __device__ void correlate(const Correlate &a) {
    const Strips &s = a.strips;
    u32 c = s.channels, channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    Vec<V> sums[9];
#pragma unroll
    for (int tap = 0; tap < 9; tap++) sums[tap] = splat<V>(0.0f);
    if (channel < c) {
        const T *gz = (const T *)a.gz;
        Reader<X> reader(a.range, a.max_level);
        u32 last = (blockIdx.y + 1) * a.per_part, strips = s.count();
        last = last < strips ? last : strips;
        for (u32 index = blockIdx.y * a.per_part + threadIdx.y; index < last; index += blockDim.y) {
            Strip strip(s, index, 1);
            Window<X, V, STRIDE, 1> window((const X *)a.x, reader, s, strip, channel);
            for (u32 row = strip.row; row < strip.end; row++) {
                window.go_to(row);
                Vec<V> g = load<V>(gz, (((size_t)strip.image * s.to_h + row) * s.to_w + strip.column) * c + channel);
#pragma unroll
                for (int tap = 0; tap < 9; tap++) {
#pragma unroll
                    for (int i = 0; i < V; i++) {
                        sums[tap].at[i] = fmaf(window.at[tap / 3][tap % 3].at[i], g.at[i], sums[tap].at[i]);
                    }
                }
            }
        }
    }
    // Add the sums of the block's threads that have the same channels.
    __shared__ float shared[THREADS];
    u32 t = thread();
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
#pragma unroll
        for (int i = 0; i < V; i++) {
            shared[t] = sums[tap].at[i];
            __syncthreads();
            for (u32 half = half_of(blockDim.y); half > 0; half /= 2) {
                if (threadIdx.y < half && threadIdx.y + half < blockDim.y) shared[t] += shared[t + half * blockDim.x];
                __syncthreads();
            }
            if (threadIdx.y == 0 && channel + i < c) {
                a.sums[((size_t)blockIdx.y * 9 + tap) * c + channel + i] = shared[t];
            }
            __syncthreads();
        }
    }
}

#define CORRELATE(x, t, X, T)                                                           \
    KERNEL(depthwise_correlate_##x##_##t##_1_1, Correlate, correlate<X, T, 1, 1>)       \
    KERNEL(depthwise_correlate_##x##_##t##_1_4, Correlate, correlate<X, T, 4, 1>)       \
    KERNEL(depthwise_correlate_##x##_##t##_2_1, Correlate, correlate<X, T, 1, 2>)       \
    KERNEL(depthwise_correlate_##x##_##t##_2_4, Correlate, correlate<X, T, 4, 2>)
CORRELATE(f32, f32, float, float)
CORRELATE(u8, f32, u8, float)
CORRELATE(bf16, bf16, bf16, bf16)
CORRELATE(u8, bf16, u8, bf16)

KERNEL(depthwise_total, Total, total)
