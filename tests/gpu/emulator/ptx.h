// The functions of kernels/ptx.cuh for the CPU: the same lanes hold the same values.
#pragma once
#define PTX_CUH
#include "emulator.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#pragma GCC visibility push(default)
namespace emulator {

// What a lane gives to, and gets from, the product: kernels/ptx.cuh.
struct Product {
    float (&c)[4];
    const uint32_t (&a)[4];
    uint32_t b[2];
};
void multiply_f16(void *const (&lanes)[LANES]);
void multiply_bf16(void *const (&lanes)[LANES]);

// What a lane gives to, and gets from, four 8 x 8 matrices of 2 bytes.
struct Matrices {
    uint32_t (&r)[4];
    const void *row;
};
void give_rows(void *const (&lanes)[LANES]);
void give_columns(void *const (&lanes)[LANES]);

} // namespace emulator
#pragma GCC visibility pop

template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Product own{c, a, {b0, b1}};
    emulator::with_warp("mma", std::is_same_v<T, __half> ? emulator::multiply_f16 : emulator::multiply_bf16, &own);
}

inline void load_matrices(uint32_t (&r)[4], const void *row) {
    emulator::check_shared(row, "ldmatrix");
    emulator::Matrices own{r, row};
    emulator::with_warp("ldmatrix", emulator::give_rows, &own);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
    emulator::check_shared(row, "ldmatrix.trans");
    emulator::Matrices own{r, row};
    emulator::with_warp("ldmatrix.trans", emulator::give_columns, &own);
}

inline void copy_async(void *to, const void *from, bool valid) { emulator::copy_later(to, from, valid); }
inline void commit() { emulator::end_group(); }
template <int N> void wait_for_all_but() { emulator::wait_for_groups(N); }

inline float exp2_fast(float x) { return exp2f(x); }
