// Rows of any width in f32: what lies between products. A warp to a row.
#include "half.cuh"

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
}

// The row of this warp, or none.
__device__ inline bool own_row(long rows, long &row, int &lane) {
    row = (long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    return row < rows;
}

// y = x + bias of the column + residual, over [rows, width]; bias and residual may be absent.
extern "C" __global__ void add_bias_f32(const float *x, const float *bias, const float *residual, float *y, long count, int width) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = x[i] + (bias ? bias[i % width] : 0) + (residual ? residual[i] : 0);
}

struct Moments {
    float mean, inverse_deviation;
};

__device__ inline Moments moments(const float *x, int width, float eps, int lane) {
    float sum = 0, squares = 0;
    for (int i = lane; i < width; i += 32) sum += x[i];
    const float mean = warp_sum(sum) / width;
    for (int i = lane; i < width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
    return {mean, rsqrtf(warp_sum(squares) / width + eps)};
}

extern "C" __global__ void layer_norm_f32(const float *x, const float *weight, const float *bias, float *y, long rows,
                                          int width, float eps) {
    long row;
    int lane;
    if (!own_row(rows, row, lane)) return;
    x += row * width, y += row * width;
    const Moments of = moments(x, width, eps, lane);
    for (int i = lane; i < width; i += 32) y[i] = (x[i] - of.mean) * of.inverse_deviation * weight[i] + bias[i];
}

// The gradient for x, plus `before` where it is there.
extern "C" __global__ void layer_norm_vjp_f32(const float *x, const float *dy, const float *before, const float *weight, float *dx,
                                              long rows, int width, float eps) {
    long row;
    int lane;
    if (!own_row(rows, row, lane)) return;
    x += row * width, dy += row * width, dx += row * width;
    const Moments of = moments(x, width, eps, lane);
    float d = 0, d_normal = 0;
    for (int i = lane; i < width; i += 32) {
        const float in = dy[i] * weight[i];
        d += in, d_normal += in * (x[i] - of.mean) * of.inverse_deviation;
    }
    d = warp_sum(d) / width, d_normal = warp_sum(d_normal) / width;
    for (int i = lane; i < width; i += 32) {
        const float normal = (x[i] - of.mean) * of.inverse_deviation;
        dx[i] = of.inverse_deviation * (dy[i] * weight[i] - d - normal * d_normal) + (before ? before[row * width + i] : 0);
    }
}

extern "C" __global__ void softmax_rows_f32(const float *x, float *y, long rows, int width) {
    long row;
    int lane;
    if (!own_row(rows, row, lane)) return;
    x += row * width, y += row * width;
    float most = -INFINITY, sum = 0;
    for (int i = lane; i < width; i += 32) most = fmaxf(most, x[i]);
    most = warp_max(most);
    for (int i = lane; i < width; i += 32) sum += expf(x[i] - most);
    sum = warp_sum(sum);
    for (int i = lane; i < width; i += 32) y[i] = expf(x[i] - most) / sum;
}

// y (dy - sum(y dy)).
extern "C" __global__ void softmax_rows_vjp_f32(const float *y, const float *dy, float *dx, long rows, int width) {
    long row;
    int lane;
    if (!own_row(rows, row, lane)) return;
    y += row * width, dy += row * width, dx += row * width;
    float dot = 0;
    for (int i = lane; i < width; i += 32) dot += y[i] * dy[i];
    dot = warp_sum(dot);
    for (int i = lane; i < width; i += 32) dx[i] = y[i] * (dy[i] - dot);
}
