// What lies between products: biases and residuals, GEGLU, nearest upsampling, columns of a matrix. Eight values to a thread.
#include "half.cuh"

// y = x + bias of the column + residual, over [rows, width]; bias and residual may be absent.
template <class T> __device__ void add_bias(const T *x, const T *bias, const T *residual, T *y, long count, int width) {
    const long at = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    Eight<T> value(x + at);
    if (bias) {
        const Eight<T> b(bias + at % width);
#pragma unroll
        for (int j = 0; j < 8; j++) value.v[j] += b.v[j];
    }
    if (residual) {
        const Eight<T> more(residual + at);
#pragma unroll
        for (int j = 0; j < 8; j++) value.v[j] += more.v[j];
    }
    value.store(y + at);
}

// [rows, 2 width] = [value | gate] to [rows, width]: value gelu(gate), with the exact GELU.
template <class T> __device__ void geglu(const T *x, T *y, long count, int width) {
    const long at = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const long row = at / width, column = at % width;
    Eight<T> value(x + row * 2 * width + column);
    const Eight<T> gate(x + row * 2 * width + width + column);
#pragma unroll
    for (int j = 0; j < 8; j++) value.v[j] *= gate.v[j] * normcdff(gate.v[j]);
    value.store(y + at);
}

// d gelu / dg = Phi(g) + g phi(g).
template <class T> __device__ void geglu_vjp(const T *x, const T *dy, T *dx, long count, int width) {
    const long at = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const long row = at / width, column = at % width, first = row * 2 * width + column;
    Eight<T> value(x + first), gate(x + first + width);
    const Eight<T> d(dy + at);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float g = gate.v[j], cumulative = normcdff(g), density = 0.3989422804014327f * __expf(-0.5f * g * g);
        gate.v[j] = d.v[j] * value.v[j] * (cumulative + g * density);
        value.v[j] = d.v[j] * g * cumulative;
    }
    value.store(dx + first);
    gate.store(dx + first + width);
}

// [B, h, w, C] to [B, height, width, C], where height is 2 h or 2 h - 1, width likewise.
template <class T> __device__ void upsample(const T *x, T *y, long count, int h, int w, int height, int width, int channels) {
    const long at = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const long pixel = at / channels, item = pixel / width / height;
    const int row = pixel / width % height, column = pixel % width;
    const long from = ((item * h + row / 2) * w + column / 2) * channels + at % channels;
    *reinterpret_cast<uint4 *>(y + at) = *reinterpret_cast<const uint4 *>(x + from);
}

// The sum of each pixel's up to four copies.
template <class T> __device__ void upsample_vjp(const T *dy, T *dx, long count, int h, int w, int height, int width, int channels) {
    const long at = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const long pixel = at / channels, item = pixel / w / h;
    const int row = pixel / w % h * 2, column = pixel % w * 2;
    const T *from = dy + ((item * height + row) * width + column) * channels + at % channels;
    Eight<T> sum(from);
    for (int i = 1; i < 4; i++) {
        if (row + i / 2 >= height || column + i % 2 >= width) continue;
        const Eight<T> more(from + ((long)(i / 2) * width + i % 2) * channels);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] += more.v[j];
    }
    sum.store(dx + at);
}

// Columns `first ..` of [rows, from_width] to columns `to_first ..` of [rows, to_width]; all in units of eight values.
template <class T>
__device__ void copy_columns(const T *x, T *y, long rows, int columns, int from_width, int first, int to_width, int to_first) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * columns) return;
    const long row = i / columns, column = i % columns;
    const uint4 *from = reinterpret_cast<const uint4 *>(x) + row * from_width + first + column;
    reinterpret_cast<uint4 *>(y)[row * to_width + to_first + column] = *from;
}

#define ONE(T, name)                                                                                                         \
    extern "C" __global__ void add_bias_##name(const T *x, const T *bias, const T *residual, T *y, long count, int width) {   \
        add_bias<T>(x, bias, residual, y, count, width);                                                                     \
    }                                                                                                                        \
    extern "C" __global__ void geglu_##name(const T *x, T *y, long count, int width) { geglu<T>(x, y, count, width); }        \
    extern "C" __global__ void geglu_vjp_##name(const T *x, const T *dy, T *dx, long count, int width) {                      \
        geglu_vjp<T>(x, dy, dx, count, width);                                                                               \
    }                                                                                                                        \
    extern "C" __global__ void upsample_##name(const T *x, T *y, long count, int h, int w, int height, int width,             \
                                               int channels) {                                                               \
        upsample<T>(x, y, count, h, w, height, width, channels);                                                             \
    }                                                                                                                        \
    extern "C" __global__ void upsample_vjp_##name(const T *dy, T *dx, long count, int h, int w, int height, int width,       \
                                                   int channels) {                                                           \
        upsample_vjp<T>(dy, dx, count, h, w, height, width, channels);                                                       \
    }                                                                                                                        \
    extern "C" __global__ void copy_columns_##name(const T *x, T *y, long rows, int columns, int from_width, int first,       \
                                                   int to_width, int to_first) {                                             \
        copy_columns<T>(x, y, rows, columns, from_width, first, to_width, to_first);                                         \
    }
BOTH_HALVES(ONE)
