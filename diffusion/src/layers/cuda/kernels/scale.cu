// Cotangents of f16 by a power of two that brings the largest near 1.
#include "half.cuh"

// The bits of the largest |x|, in `most`, which is zero before: those of floats that are not negative are in the floats' order, NaN
// beyond infinity.
extern "C" __global__ void largest_f32(const float *x, int *most, long count) {
    int own = 0;
    for (long i = (long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (long)gridDim.x * blockDim.x)
        own = max(own, __float_as_int(fabsf(x[i])));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) own = max(own, __shfl_xor_sync(~0u, own, lanes));
    if (threadIdx.x % 32 == 0) atomicMax(most, own);
}

// The power is 2^-floor(log2 largest); zero, what is below the normal numbers, and what is not finite have none: 1.
__device__ inline float power(const int *most) {
    const int exponent = *most >> 23;
    return exponent == 0 || exponent == 255 ? 1 : ldexpf(1, max(-100, min(100, 127 - exponent)));
}

extern "C" __global__ void scale_f16(const float *x, const int *most, __half *y, long count) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = __float2half(x[i] * power(most));
}

extern "C" __global__ void unscale_f16(const __half *x, const int *most, float *y, long count) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = __half2float(x[i]) / power(most);
}
