// Group norm over [B, pixels, C], with or without SiLU, and layer norm over the last dimension; forward and the gradient for the
// input. Statistics in f32.
//
// A group's sums are first taken over slices of its pixels, many blocks at once; every block that needs them adds the slices'
// in their order, so that results do not depend on which was finished first.
#include "half.cuh"

struct Groups {
    int pixels, channels, groups;
    int slices; // of the pixels
    float eps;
    int silu;
};

struct Statistics {
    float mean, inverse_deviation;
};

// The sums of a pair of values over the block; in the first thread.
__device__ inline float2 block_sum(float2 x) {
    __shared__ float2 of_warps[32];
    x = {warp_sum(x.x), warp_sum(x.y)};
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x < 32) {
        x = threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : float2{0, 0};
        x = {warp_sum(x.x), warp_sum(x.y)};
    }
    return x;
}

__device__ inline float2 add_slices(const float2 *sums, long group, int slices) {
    float2 all{0, 0};
    for (int i = 0; i < slices; i++) all.x += sums[group * slices + i].x, all.y += sums[group * slices + i].y;
    return all;
}

// Sums are taken of differences from the group's first value: squares of what is far from zero would cancel.
template <class T> __device__ float group_origin(const T *x, const Groups &s, long item, int group) {
    return Half<T>::wide(x[item * s.pixels * s.channels + group * (s.channels / s.groups)]);
}

template <class T> __device__ Statistics statistics(const T *x, const float2 *sums, const Groups &s, long item, int group) {
    const float2 sum = add_slices(sums, item * s.groups + group, s.slices);
    const float count = (float)s.pixels * (s.channels / s.groups), mean = sum.x / count;
    return {group_origin(x, s, item, group) + mean, rsqrtf(fmaxf(sum.y / count - mean * mean, 0.f) + s.eps)};
}

// The gradient of SiLU at `x`.
__device__ inline float silu_slope(float x) {
    const float sigmoid = 1 / (1 + __expf(-x));
    return sigmoid * (1 + x * (1 - sigmoid));
}

// Calls `each` with the place of every value of a block's group in its slice of pixels, and the channel.
template <class F> __device__ void for_slice(const Groups &s, F each) {
    const int width = s.channels / s.groups, group = blockIdx.y;
    const long from = (long)s.pixels * blockIdx.x / s.slices, to = (long)s.pixels * (blockIdx.x + 1) / s.slices;
    const long item = (long)blockIdx.z * s.pixels * s.channels;
    for (long i = threadIdx.x; i < (to - from) * width; i += blockDim.x) {
        const int channel = group * width + (int)(i % width);
        each(item + (from + i / width) * s.channels + channel, channel);
    }
}

template <class T> __device__ void group_sums(const T *x, float2 *sums, Groups s) {
    const float origin = group_origin(x, s, blockIdx.z, blockIdx.y);
    float2 sum{0, 0};
    for_slice(s, [&](long at, int) {
        const float value = Half<T>::wide(x[at]) - origin;
        sum.x += value, sum.y += value * value;
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[((long)blockIdx.z * s.groups + blockIdx.y) * s.slices + blockIdx.x] = sum;
}

// What comes in at the normalised value, when `dy` is the cotangent of what comes out.
template <class T>
__device__ float inward(float normal, float dy, float weight, float bias, int silu) {
    return weight * (silu ? dy * silu_slope(normal * weight + bias) : dy);
}

// Sums of the cotangents at the normalised values, and of these with the values.
template <class T>
__device__ void group_vjp_sums(const T *x, const T *dy, const T *weight, const T *bias, const float2 *sums, float2 *vjp_sums,
                               Groups s) {
    const Statistics group = statistics(x, sums, s, blockIdx.z, blockIdx.y);
    float2 sum{0, 0};
    for_slice(s, [&](long at, int c) {
        const float normal = (Half<T>::wide(x[at]) - group.mean) * group.inverse_deviation;
        const float d = inward<T>(normal, Half<T>::wide(dy[at]), Half<T>::wide(weight[c]), Half<T>::wide(bias[c]), s.silu);
        sum.x += d, sum.y += d * normal;
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) vjp_sums[((long)blockIdx.z * s.groups + blockIdx.y) * s.slices + blockIdx.x] = sum;
}

// y, or with dy the gradient: before + rstd (d - mean(d) - normal mean(d normal)).
template <class T, bool VJP>
__device__ void group_apply(const T *x, const T *dy, const T *before, const T *weight, const T *bias, const float2 *sums,
                            const float2 *vjp_sums, T *y, Groups s) {
    extern __shared__ float4 of_groups[]; // mean, inverse deviation, mean(d), mean(d normal)
    const long item = blockIdx.y;
    const int width = s.channels / s.groups;
    for (int group = threadIdx.x; group < s.groups; group += blockDim.x) {
        const Statistics of = statistics(x, sums, s, item, group);
        float2 d{0, 0};
        if (VJP) d = add_slices(vjp_sums, item * s.groups + group, s.slices);
        const float count = (float)s.pixels * width;
        of_groups[group] = {of.mean, of.inverse_deviation, d.x / count, d.y / count};
    }
    __syncthreads();
    const long count = (long)s.pixels * s.channels / 8, start = item * s.pixels * s.channels;
    for (long i = (long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (long)gridDim.x * blockDim.x) {
        const long at = start + 8 * i;
        const int c = (int)(8 * i % s.channels);
        Eight<T> value(x + at);
        const Eight<T> w(weight + c), b(bias + c);
        if (VJP) {
            const Eight<T> d(dy + at);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float4 of = of_groups[(c + j) / width];
                const float normal = (value.v[j] - of.x) * of.y;
                const float in = inward<T>(normal, d.v[j], w.v[j], b.v[j], s.silu);
                value.v[j] = of.y * (in - of.z - normal * of.w);
            }
            if (before) {
                const Eight<T> more(before + at);
#pragma unroll
                for (int j = 0; j < 8; j++) value.v[j] += more.v[j];
            }
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float4 of = of_groups[(c + j) / width];
                const float out = (value.v[j] - of.x) * of.y * w.v[j] + b.v[j];
                value.v[j] = s.silu ? out / (1 + __expf(-out)) : out;
            }
        }
        value.store(y + at);
    }
}

// One warp to a row of `width` values, a multiple of 8.
template <class T, bool VJP>
__device__ void layer_norm(const T *x, const T *dy, const T *before, const T *weight, const T *bias, T *y, long rows, int width,
                           float eps) {
    const long row = (long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    x += row * width, y += row * width;
    const int lane = threadIdx.x % 32;
    float sum = 0, squares = 0;
    for (int i = lane * 8; i < width; i += 256) {
        const Eight<T> value(x + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += value.v[j];
    }
    const float mean = warp_sum(sum) / width;
    for (int i = lane * 8; i < width; i += 256) {
        const Eight<T> value(x + i);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += (value.v[j] - mean) * (value.v[j] - mean);
    }
    const float inverse_deviation = rsqrtf(warp_sum(squares) / width + eps);
    float mean_d = 0, mean_dx = 0;
    if (VJP) {
        dy += row * width;
        for (int i = lane * 8; i < width; i += 256) {
            const Eight<T> value(x + i), d(dy + i), w(weight + i);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                mean_d += d.v[j] * w.v[j];
                mean_dx += d.v[j] * w.v[j] * (value.v[j] - mean) * inverse_deviation;
            }
        }
        mean_d = warp_sum(mean_d) / width, mean_dx = warp_sum(mean_dx) / width;
    }
    for (int i = lane * 8; i < width; i += 256) {
        Eight<T> value(x + i);
        const Eight<T> w(weight + i);
        if (VJP) {
            const Eight<T> d(dy + i);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float normal = (value.v[j] - mean) * inverse_deviation;
                value.v[j] = inverse_deviation * (d.v[j] * w.v[j] - mean_d - normal * mean_dx);
            }
            if (before) {
                const Eight<T> more(before + row * width + i);
#pragma unroll
                for (int j = 0; j < 8; j++) value.v[j] += more.v[j];
            }
        } else {
            const Eight<T> b(bias + i);
#pragma unroll
            for (int j = 0; j < 8; j++) value.v[j] = (value.v[j] - mean) * inverse_deviation * w.v[j] + b.v[j];
        }
        value.store(y + i);
    }
}

#define ONE(T, name)                                                                                                         \
    extern "C" __global__ void group_sums_##name(const T *x, float2 *sums, Groups s) { group_sums<T>(x, sums, s); }           \
    extern "C" __global__ void group_vjp_sums_##name(const T *x, const T *dy, const T *weight, const T *bias,                 \
                                                     const float2 *sums, float2 *vjp_sums, Groups s) {                       \
        group_vjp_sums<T>(x, dy, weight, bias, sums, vjp_sums, s);                                                           \
    }                                                                                                                        \
    extern "C" __global__ void group_norm_##name(const T *x, const T *weight, const T *bias, const float2 *sums, T *y,        \
                                                 Groups s) {                                                                 \
        group_apply<T, false>(x, nullptr, nullptr, weight, bias, sums, nullptr, y, s);                                       \
    }                                                                                                                        \
    extern "C" __global__ void group_norm_vjp_##name(const T *x, const T *dy, const T *before, const T *weight,               \
                                                     const T *bias, const float2 *sums, const float2 *vjp_sums, T *dx,       \
                                                     Groups s) {                                                             \
        group_apply<T, true>(x, dy, before, weight, bias, sums, vjp_sums, dx, s);                                            \
    }                                                                                                                        \
    extern "C" __global__ void layer_norm_##name(const T *x, const T *weight, const T *bias, T *y, long rows, int width,      \
                                                 float eps) {                                                                \
        layer_norm<T, false>(x, nullptr, nullptr, weight, bias, y, rows, width, eps);                                        \
    }                                                                                                                        \
    extern "C" __global__ void layer_norm_vjp_##name(const T *x, const T *dy, const T *before, const T *weight, T *dx,        \
                                                     long rows, int width, float eps) {                                      \
        layer_norm<T, true>(x, dy, before, weight, nullptr, dx, rows, width, eps);                                           \
    }
BOTH_HALVES(ONE)
