// What the kernels share: half-precision types, the tensor cores' 16 x 8 x 16 product, copies into shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

template <class T> struct Half;

template <> struct Half<__half> {
    using Pair = __half2;
    static __device__ float wide(__half x) { return __half2float(x); }
    static __device__ float2 wide(__half2 x) { return __half22float2(x); }
    static __device__ __half narrow(float x) { return __float2half_rn(x); }
    static __device__ __half2 narrow(float x, float y) { return __floats2half2_rn(x, y); }
    static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <> struct Half<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static __device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ float2 wide(__nv_bfloat162 x) { return __bfloat1622float2(x); }
    static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
    static __device__ __nv_bfloat162 narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
    static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
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

__device__ inline uint32_t shared_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// 16 bytes to shared memory, or zeros where `valid` is false; arrives with the group that is committed next.
__device__ inline void copy_async(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0));
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ void wait_for_all_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// Four 8 x 8 matrices: each lane gives the address of one row of 16 bytes.
__device__ inline void load_matrices(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// One name for each type: `DEFINE(name, parameters, call)`.
#define BOTH_HALVES(ONE) ONE(__half, f16) ONE(__nv_bfloat16, bf16)
