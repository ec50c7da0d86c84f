// The two products of cuBLAS that candle asks for, with sums in f32 or f64.
#include "graph.h"
#include "launch.h"
#include "memory.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#define API extern "C" __attribute__((visibility("default"))) cublasStatus_t

namespace {

struct Matrix {
    const void *values;
    cudaDataType type;
    bool transposed;
    int leading;
    long long stride; // from one of the batch to the next
};

template <class S> S wide(const void *values, cudaDataType type, size_t i) {
    switch (type) {
    case CUDA_R_16F: return __half2float(static_cast<const __half *>(values)[i]);
    case CUDA_R_16BF: return __bfloat162float(static_cast<const __nv_bfloat16 *>(values)[i]);
    case CUDA_R_32F: return static_cast<const float *>(values)[i];
    case CUDA_R_64F: return static_cast<const double *>(values)[i];
    default: emulator::fail("cuBLAS with numbers of type %d", type);
    }
}
template <class S> void narrow(void *values, cudaDataType type, size_t i, S x) {
    switch (type) {
    case CUDA_R_16F: static_cast<__half *>(values)[i] = __float2half((float)x); break;
    case CUDA_R_16BF: static_cast<__nv_bfloat16 *>(values)[i] = __float2bfloat16((float)x); break;
    case CUDA_R_32F: static_cast<float *>(values)[i] = x; break;
    default: static_cast<double *>(values)[i] = x;
    }
}

// [rows, columns] of one of the batch, its columns one after the other, as numbers of the sums' type.
template <class S> std::vector<S> unpack(const Matrix &m, int item, int rows, int columns) {
    std::vector<S> all((size_t)rows * columns);
    const size_t first = item * m.stride;
    for (int column = 0; column < columns; column++)
        for (int row = 0; row < rows; row++)
            all[(size_t)column * rows + row] =
                wide<S>(m.values, m.type, first + (m.transposed ? (size_t)row * m.leading + column : (size_t)column * m.leading + row));
    return all;
}

template <class S>
void multiply_now(int m, int n, int k, S alpha, const Matrix &a, const Matrix &b, S beta, const Matrix &c, int batch) {
    emulator::counts.products++;
    const int rows_at_once = 256, columns_at_once = 64;
    const int across = (m + rows_at_once - 1) / rows_at_once, tiles = across * ((n + columns_at_once - 1) / columns_at_once);
    for (int item = 0; item < batch; item++) {
        const std::vector<S> left = unpack<S>(a, item, m, k), right = unpack<S>(b, item, k, n);
        emulator::in_parallel(tiles, [&](size_t tile) {
            const int row = tile % across * rows_at_once, rows = std::min(rows_at_once, m - row);
            const int first = tile / across * columns_at_once, last = std::min(first + columns_at_once, n);
            for (int column = first; column < last; column++) {
                S sums[rows_at_once] = {};
                for (int i = 0; i < k; i++) {
                    const S *from = &left[(size_t)i * m + row], factor = right[(size_t)column * k + i];
                    for (int r = 0; r < rows; r++) sums[r] += from[r] * factor;
                }
                for (int r = 0; r < rows; r++) {
                    const size_t at = item * c.stride + (size_t)column * c.leading + row + r;
                    // With beta zero, what is there may be anything, NaN too.
                    const S before = beta == 0 ? 0 : beta * wide<S>(c.values, c.type, at);
                    narrow<S>(const_cast<void *>(c.values), c.type, at, alpha * sums[r] + before);
                }
            }
        });
    }
}

template <class S>
cublasStatus_t multiply(cublasHandle_t handle, int m, int n, int k, const void *alpha, const Matrix &a, const Matrix &b, const void *beta,
                        const Matrix &c, int batch) {
    const S by = *static_cast<const S *>(alpha), keep = *static_cast<const S *>(beta);
    const cudaStream_t stream = *reinterpret_cast<cudaStream_t *>(handle);
    for (const Matrix *matrix : {&a, &b, &c})
        if (emulator::device_of(reinterpret_cast<CUdeviceptr>(matrix->values)) != emulator::stream_device(stream))
            emulator::fail("cuBLAS was given another device's memory");
    const CUresult asked = emulator::ask(stream,
                                         [=] { return multiply_now<S>(m, n, k, by, a, b, keep, c, batch), CUDA_SUCCESS; });
    return asked == CUDA_SUCCESS ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

} // namespace

// A handle is its stream.
API cublasCreate_v2(cublasHandle_t *handle) { *handle = reinterpret_cast<cublasHandle_t>(new cudaStream_t{}); return CUBLAS_STATUS_SUCCESS; }
API cublasDestroy_v2(cublasHandle_t handle) { delete reinterpret_cast<cudaStream_t *>(handle); return CUBLAS_STATUS_SUCCESS; }
API cublasSetWorkspace_v2(cublasHandle_t, void *workspace, size_t bytes) {
    return emulator::is_device(reinterpret_cast<CUdeviceptr>(workspace), bytes) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
API cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) { *reinterpret_cast<cudaStream_t *>(handle) = stream; return CUBLAS_STATUS_SUCCESS; }

API cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k,
                               const void *alpha, const void *a, cudaDataType a_type, int lda, long long a_stride, const void *b,
                               cudaDataType b_type, int ldb, long long b_stride, const void *beta, void *c, cudaDataType c_type,
                               int ldc, long long c_stride, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
    const Matrix left{a, a_type, of_a != CUBLAS_OP_N, lda, a_stride}, right{b, b_type, of_b != CUBLAS_OP_N, ldb, b_stride};
    const Matrix out{c, c_type, false, ldc, c_stride};
    switch (compute) {
    case CUBLAS_COMPUTE_32F: case CUBLAS_COMPUTE_32F_FAST_TF32: return multiply<float>(handle, m, n, k, alpha, left, right, beta, out, batch);
    case CUBLAS_COMPUTE_64F: return multiply<double>(handle, m, n, k, alpha, left, right, beta, out, batch);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

API cublasDgemmStridedBatched(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k,
                              const double *alpha, const double *a, int lda, long long a_stride, const double *b, int ldb,
                              long long b_stride, const double *beta, double *c, int ldc, long long c_stride, int batch) {
    return multiply<double>(handle, m, n, k, alpha, {a, CUDA_R_64F, of_a != CUBLAS_OP_N, lda, a_stride},
                            {b, CUDA_R_64F, of_b != CUBLAS_OP_N, ldb, b_stride}, beta, {c, CUDA_R_64F, false, ldc, c_stride}, batch);
}
