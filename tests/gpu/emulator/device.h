// What nvcc gives a kernel without being asked, for a C++ compiler: goes before each .cu file. The toolkit's own headers bring
// vectors and half precision, with conversions and arithmetic for the CPU.
#pragma once
#include "emulator.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <math.h>

#include <cstring>
#include <cuda/std/limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ptx.h"

// `build.sh` reads and takes away `__global__` and `__shared__`.
#undef __global__
#undef __shared__
#undef __device__
#undef __launch_bounds__
#define __device__
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#define threadIdx (*emulator::thread_index)
#define blockIdx (emulator::place->block)
#define blockDim (emulator::place->block_size)
#define gridDim (emulator::place->grid_size)
inline void __syncthreads() { emulator::wait_for_block(); }

namespace emulator {

template <class T> T *dynamic_shared() { return reinterpret_cast<T *>(place->shared); }

template <auto F> struct Caller;
template <class... A, void (*F)(A...)> struct Caller<F> {
    static void call(void **arguments) { unpacked(arguments, std::index_sequence_for<A...>{}); }
    template <size_t... I> static void unpacked(void **arguments, std::index_sequence<I...>) {
        F(*static_cast<std::remove_cv_t<A> *>(arguments[I])...);
    }

    static std::vector<const void *> pointers(void **arguments) { return pointed(arguments, std::index_sequence_for<A...>{}); }
    template <size_t... I> static std::vector<const void *> pointed(void **arguments, std::index_sequence<I...>) {
        std::vector<const void *> all;
        (([&] {
             if constexpr (std::is_pointer_v<A>) all.push_back(*static_cast<void *const *>(arguments[I]));
         }()),
         ...);
        return all;
    }

    struct Kept {
        std::tuple<std::remove_cv_t<A>...> values;
        void *arguments[sizeof...(A)];
        template <size_t... I>
        Kept(void **from, std::index_sequence<I...>)
            : values(*static_cast<std::remove_cv_t<A> *>(from[I])...), arguments{&std::get<I>(values)...} {}
    };
    static std::shared_ptr<void *> keep(void **arguments) {
        auto kept = std::make_shared<Kept>(arguments, std::index_sequence_for<A...>{});
        return {kept, kept->arguments};
    }
};

// The value of lane `own ^ with`; of a lane that is not there, all bits are set.
template <class T> [[gnu::always_inline]] inline T exchange(unsigned mask, T value, int with, int width) {
    if (mask != ~0u || width != (int)LANES) fail("__shfl_xor_sync of mask %#x and width %d is not emulated", mask, width);
    struct Operands {
        T value, result;
        int with;
    } own{value, value, with};
    with_warp("__shfl_xor_sync", [](void *const (&lanes)[LANES]) {
        for (unsigned i = 0; i < LANES; i++) {
            auto *to = static_cast<Operands *>(lanes[i]);
            if (!to) continue;
            auto *from = static_cast<Operands *>(lanes[(i ^ to->with) % LANES]);
            if (from) to->result = from->value;
            else memset((void *)&to->result, 0xff, sizeof(T));
        }
    }, &own);
    return own.result;
}

// Applies `change` to what is at the address, whatever other blocks do there; what was there.
template <class T, class F> T atomically(T *address, F change) {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    do after = change(before);
    while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}

} // namespace emulator

template <class T> [[gnu::always_inline]] inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = emulator::LANES) {
    return emulator::exchange(mask, value, with, width);
}

template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }

template <class T, class X> T atomicAdd(T *at, X x) { return emulator::atomically(at, [=](T old) { return T(old + T(x)); }); }
template <class T, class X> T atomicMax(T *at, X x) { return emulator::atomically(at, [=](T old) { return max(old, T(x)); }); }
template <class T, class X> T atomicMin(T *at, X x) { return emulator::atomically(at, [=](T old) { return min(old, T(x)); }); }
template <class T> T atomicCAS(T *at, T from, T to) {
    return emulator::atomically(at, [=](T old) { return old == from ? to : old; });
}

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
inline float __expf(float x) { return expf(x); }

template <class To, class From> To emulated_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &x, sizeof to);
    return to;
}
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }

// In half precision by way of f32, rounded once.
#define EMULATED(name, of_float)                                                                                             \
    inline __half name(__half x) { return __float2half(of_float(__half2float(x))); }                                        \
    inline __nv_bfloat16 name(__nv_bfloat16 x) { return __float2bfloat16(of_float(__bfloat162float(x))); }
EMULATED(hsqrt, sqrtf) EMULATED(hcos, cosf) EMULATED(hsin, sinf) EMULATED(hlog, logf) EMULATED(hexp, expf)
#undef EMULATED
