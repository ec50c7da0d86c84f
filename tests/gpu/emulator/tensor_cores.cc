// The product and the loads that a warp does as one, of the values that its lanes hold.
#include "ptx.h"

#include <array>
#include <cstring>

namespace emulator {
namespace {

float wide(__half x) {
    static const std::vector<float> all = [] { // faster than the toolkit's function for the CPU, by which it is made
        std::vector<float> all(1 << 16);
        for (unsigned i = 0; i < all.size(); i++) all[i] = __half2float(__ushort_as_half(i));
        return all;
    }();
    return all[__half_as_ushort(x)];
}
float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> std::array<float, 2> pair(uint32_t packed) {
    T values[2];
    memcpy((void *)values, &packed, sizeof values);
    return {wide(values[0]), wide(values[1])};
}

template <class O> O &of(void *const (&lanes)[LANES], unsigned lane, const char *what) {
    if (!lanes[lane]) fail("%s by a warp that ends at lane %u", what, lane);
    return *static_cast<O *>(lanes[lane]);
}

template <bool TRANSPOSED> void give(void *const (&lanes)[LANES]) {
    uint16_t matrices[4][8][8];
    for (unsigned i = 0; i < LANES; i++) memcpy(matrices[i / 8][i % 8], of<Matrices>(lanes, i, "ldmatrix").row, 16);
    for (unsigned i = 0; i < LANES; i++)
        for (unsigned m = 0; m < 4; m++) {
            const unsigned row = i / 4, column = i % 4 * 2;
            const uint16_t low = TRANSPOSED ? matrices[m][column][row] : matrices[m][row][column];
            const uint16_t high = TRANSPOSED ? matrices[m][column + 1][row] : matrices[m][row][column + 1];
            of<Matrices>(lanes, i, "ldmatrix").r[m] = low | (uint32_t)high << 16;
        }
}

// Lane i holds rows i / 4 and 8 further of a and c, column i / 4 of b; a register holds two neighbours.
template <class T> void multiply(void *const (&lanes)[LANES]) {
    float a[16][16], b[16][8], c[16][8];
    for (unsigned i = 0; i < LANES; i++) {
        const Product &own = of<Product>(lanes, i, "mma");
        const unsigned row = i / 4, column = i % 4 * 2;
        for (unsigned j = 0; j < 2; j++) {
            c[row][column + j] = own.c[j], c[row + 8][column + j] = own.c[2 + j];
            for (unsigned right = 0; right < 2; right++) {
                a[row][8 * right + column + j] = pair<T>(own.a[2 * right])[j];
                a[row + 8][8 * right + column + j] = pair<T>(own.a[2 * right + 1])[j];
                b[8 * right + column + j][row] = pair<T>(own.b[right])[j];
            }
        }
    }
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (unsigned i = 0; i < LANES; i++)
        for (unsigned j = 0; j < 4; j++) of<Product>(lanes, i, "mma").c[j] = c[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
}

} // namespace

void give_rows(void *const (&lanes)[LANES]) { give<false>(lanes); }
void give_columns(void *const (&lanes)[LANES]) { give<true>(lanes); }
void multiply_f16(void *const (&lanes)[LANES]) { multiply<__half>(lanes); }
void multiply_bf16(void *const (&lanes)[LANES]) { multiply<__nv_bfloat16>(lanes); }

} // namespace emulator
