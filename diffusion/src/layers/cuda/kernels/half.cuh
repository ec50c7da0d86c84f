// What the kernels share: half-precision types, eight values at a time, sums over a warp.
#pragma once
#include "ptx.cuh"

template <class T> struct Half;

template <> struct Half<__half> {
    using Pair = __half2;
    static __device__ float wide(__half x) { return __half2float(x); }
    static __device__ float2 wide(__half2 x) { return __half22float2(x); }
    static __device__ __half narrow(float x) { return __float2half_rn(x); }
    static __device__ __half2 narrow(float x, float y) { return __floats2half2_rn(x, y); }
};

template <> struct Half<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static __device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ float2 wide(__nv_bfloat162 x) { return __bfloat1622float2(x); }
    static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
    static __device__ __nv_bfloat162 narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

template <class T> __device__ uint32_t pack(float x, float y) {
    auto pair = Half<T>::narrow(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
}

// Eight values, the 16 bytes that one access moves.
template <class T> struct Eight {
    static constexpr int N = 8;
    float v[8];
    __device__ explicit Eight(const T *from) {
        uint4 raw = *reinterpret_cast<const uint4 *>(from);
        auto *pairs = reinterpret_cast<typename Half<T>::Pair *>(&raw);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 two = Half<T>::wide(pairs[i]);
            v[2 * i] = two.x, v[2 * i + 1] = two.y;
        }
    }
    __device__ void store(T *to) const {
        uint4 raw;
        auto *pairs = reinterpret_cast<typename Half<T>::Pair *>(&raw);
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = Half<T>::narrow(v[2 * i], v[2 * i + 1]);
        *reinterpret_cast<uint4 *>(to) = raw;
    }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// One name for each type: `DEFINE(name, parameters, call)`.
#define BOTH_HALVES(ONE) ONE(__half, f16) ONE(__nv_bfloat16, bf16)
