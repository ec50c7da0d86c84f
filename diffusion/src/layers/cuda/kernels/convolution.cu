// 3 x 3 convolutions and their input gradients as products of matrices that are never written out: rows are output pixels,
// columns output channels, and the contraction runs over taps and input channels.
//
// Images are [B, h, w, C]; the weights [9][outputs][inputs], channels filled up to multiples of 8 with zeros. The gradient
// reads the same weights, transposed on their way into the registers.
#include "half.cuh"

struct Shape {
    int batch;
    int from_height, from_width, from_channels; // what is read; channels a multiple of 8
    int to_height, to_width, to_channels;       // what is written, two channels together
    int weight_rows, weight_columns;            // outputs and inputs of the weights
    int stride, padding; // a stride of 1 or 2
    int bias_stride; // from one image's biases to the next's; 0: the same for all
    int splits;      // of the contraction
};

constexpr int DEPTH = 64, CHUNKS = DEPTH / 8, STAGES = 3;

// The 16-byte chunk of a row that holds chunk `chunk`: neighbouring rows begin at other banks.
__device__ inline int swizzle(int row, int chunk) { return chunk ^ (row & 7); }

template <class T, int ROWS, int COLUMNS, int WARPS_M, int WARPS_N, bool ADJOINT>
__device__ void convolution(const T *x, const T *weights, const T *bias, const T *residual, T *y, float *partial, Shape s) {
    constexpr int THREADS = 32 * WARPS_M * WARPS_N, WARP_ROWS = ROWS / WARPS_M, WARP_COLUMNS = COLUMNS / WARPS_N;
    constexpr int TILES_M = WARP_ROWS / 16, TILES_N = WARP_COLUMNS / 8;
    constexpr int LOADS_A = ROWS * CHUNKS / THREADS, LOADS_B = COLUMNS * CHUNKS / THREADS;
    static_assert(TILES_N % 2 == 0 && LOADS_A > 0 && LOADS_B > 0, "tiles fit the warps");
    extern __shared__ uint4 shared[];
    uint4 *a_tiles = shared, *b_tiles = shared + STAGES * ROWS * CHUNKS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_m = warp / WARPS_N * WARP_ROWS, warp_n = warp % WARPS_N * WARP_COLUMNS;
    const int pixels = s.to_height * s.to_width, m0 = blockIdx.x * ROWS, n0 = blockIdx.y * COLUMNS;
    const int blocks = (s.from_channels + DEPTH - 1) / DEPTH, steps = 9 * blocks;
    const int begin = (int)((long)steps * blockIdx.z / s.splits), end = (int)((long)steps * (blockIdx.z + 1) / s.splits);

    // For each pixel whose neighbourhood this thread copies: where the first tap reads, and which taps are inside the image.
    // What a tap adds to the place is the same for all: with the gradient of stride 2, whose taps fall between pixels
    // unless row and tap agree in parity, it is a step back for the last tap alone.
    const int chunk = threadIdx.x % CHUNKS, halved = s.stride - 1; // by how many bits, and what is lost
    int first[LOADS_A], taps[LOADS_A];
#pragma unroll
    for (int i = 0; i < LOADS_A; i++) {
        const int m = m0 + threadIdx.x / CHUNKS + i * (THREADS / CHUNKS);
        const int row = m % pixels / s.to_width, column = m % s.to_width;
        const int r = ADJOINT ? row + s.padding : row * s.stride - s.padding;
        const int q = ADJOINT ? column + s.padding : column * s.stride - s.padding;
        const int down = ADJOINT ? r >> halved : r, right = ADJOINT ? q >> halved : q;
        first[i] = ((m / pixels * s.from_height + down) * s.from_width + right) * s.from_channels + chunk * 8;
        taps[i] = 0;
        for (int tap = 0; tap < 9 && m < s.batch * pixels; tap++) {
            int tap_r = ADJOINT ? r - tap / 3 : r + tap / 3, tap_q = ADJOINT ? q - tap % 3 : q + tap % 3;
            bool inside = tap_r >= 0 && tap_q >= 0;
            if (ADJOINT) {
                inside = inside && ((tap_r | tap_q) & halved) == 0;
                tap_r >>= halved, tap_q >>= halved;
            }
            taps[i] |= (inside && tap_r < s.from_height && tap_q < s.from_width) << tap;
        }
    }
    // The weights that this thread copies: rows of the contraction (the weights' outputs) or of the product's columns.
    constexpr int PARTS = COLUMNS / 8;
    const int b_row = threadIdx.x / (ADJOINT ? PARTS : CHUNKS), b_chunk = ADJOINT ? threadIdx.x % PARTS : chunk;
    constexpr int B_ROWS = THREADS / (ADJOINT ? PARTS : CHUNKS);
    const int b_first = ADJOINT ? b_row * s.weight_columns + n0 + b_chunk * 8 : (n0 + b_row) * s.weight_columns + chunk * 8;
    const bool b_inside = ADJOINT ? n0 + b_chunk * 8 < s.weight_columns : true;

    int tap = begin / blocks, c0 = (begin - tap * blocks) * DEPTH; // of the step that is loaded next
    auto load = [&](int step) {
        if (step < end) {
            const int stage = step % STAGES, tap_row = tap / 3, tap_column = tap - 3 * tap_row;
            const int back_row = s.stride == 1 ? tap_row : tap_row / 2, back_column = s.stride == 1 ? tap_column : tap_column / 2;
            const int moved = ADJOINT ? -(back_row * s.from_width + back_column) : tap_row * s.from_width + tap_column;
            uint4 *a = a_tiles + stage * ROWS * CHUNKS, *b = b_tiles + stage * COLUMNS * CHUNKS;
            const T *from = x + (moved * s.from_channels + c0);
            const bool inside = c0 + chunk * 8 < s.from_channels;
#pragma unroll
            for (int i = 0; i < LOADS_A; i++) {
                const bool valid = inside && taps[i] >> tap & 1;
                const int at = threadIdx.x / CHUNKS + i * (THREADS / CHUNKS);
                copy_async(a + at * CHUNKS + swizzle(at, chunk), valid ? from + first[i] : x, valid);
            }
            const T *weight = weights + ((long)tap * s.weight_rows * s.weight_columns + (ADJOINT ? (long)c0 * s.weight_columns : c0));
#pragma unroll
            for (int i = 0; i < LOADS_B; i++) {
                const int at = b_row + i * B_ROWS;
                const bool valid = ADJOINT ? b_inside && c0 + at < s.weight_rows : inside && n0 + at < s.weight_rows;
                copy_async(b + at * (ADJOINT ? PARTS : CHUNKS) + swizzle(at, b_chunk),
                           valid ? weight + b_first + i * B_ROWS * s.weight_columns : weights, valid);
            }
            c0 += DEPTH;
            if (c0 >= s.from_channels) c0 = 0, tap++;
        }
        commit(); // also when there is nothing left, so that groups count steps
    };

    float sums[TILES_M][TILES_N][4] = {};
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(begin + i);
    for (int step = begin; step < end; step++) {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        const uint4 *a = a_tiles + step % STAGES * ROWS * CHUNKS, *b = b_tiles + step % STAGES * COLUMNS * CHUNKS;
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) {
            uint32_t left[TILES_M][4], right[TILES_N / 2][4];
#pragma unroll
            for (int i = 0; i < TILES_M; i++) {
                const int r = warp_m + i * 16 + lane % 16;
                load_matrices(left[i], a + r * CHUNKS + swizzle(r, 2 * k + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < TILES_N / 2; j++) {
                if (ADJOINT) {
                    const int r = k * 16 + lane % 16;
                    const int part = (warp_n + j * 16) / 8 + lane / 16;
                    load_matrices_transposed(right[j], b + r * (COLUMNS / 8) + swizzle(r, part));
                } else {
                    const int r = warp_n + j * 16 + lane % 8 + lane / 16 * 8;
                    load_matrices(right[j], b + r * CHUNKS + swizzle(r, 2 * k + lane / 8 % 2));
                }
            }
#pragma unroll
            for (int i = 0; i < TILES_M; i++)
#pragma unroll
                for (int j = 0; j < TILES_N; j++)
                    mma<T>(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
    }

    // Where each lane's values lie: rows lane / 4 and 8 further, columns 2 (lane % 4) and the next.
    partial += (long)blockIdx.z * s.batch * pixels * s.to_channels;
#pragma unroll
    for (int i = 0; i < TILES_M; i++) {
#pragma unroll
        for (int below = 0; below < 2; below++) {
            const int m = m0 + warp_m + i * 16 + lane / 4 + below * 8;
            if (m >= s.batch * pixels) continue;
            const T *item_bias = bias ? bias + (long)(m / pixels) * s.bias_stride : nullptr;
#pragma unroll
            for (int j = 0; j < TILES_N; j++) {
                const int n = n0 + warp_n + j * 8 + lane % 4 * 2;
                if (n >= s.to_channels) continue;
                const long at = (long)m * s.to_channels + n;
                float2 value = {sums[i][j][below * 2], sums[i][j][below * 2 + 1]};
                if (s.splits > 1) {
                    *reinterpret_cast<float2 *>(partial + at) = value;
                    continue;
                }
                if (item_bias) value.x += Half<T>::wide(item_bias[n]), value.y += Half<T>::wide(item_bias[n + 1]);
                if (residual) {
                    const float2 more = Half<T>::wide(*reinterpret_cast<const typename Half<T>::Pair *>(residual + at));
                    value.x += more.x, value.y += more.y;
                }
                *reinterpret_cast<uint32_t *>(y + at) = pack<T>(value.x, value.y);
            }
        }
    }
}

// The parts of a split contraction, added in their order.
template <class T>
__device__ void convolution_sum(const float *partial, const T *bias, const T *residual, T *y, Shape s) {
    const long count = (long)s.batch * s.to_height * s.to_width * s.to_channels;
    const long at = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float value = 0;
    for (int i = 0; i < s.splits; i++) value += partial[i * count + at];
    const int n = at % s.to_channels;
    const long image = at / s.to_channels / (s.to_height * s.to_width);
    if (bias) value += Half<T>::wide(bias[image * s.bias_stride + n]);
    if (residual) value += Half<T>::wide(residual[at]);
    y[at] = Half<T>::narrow(value);
}

#define OF_SIZE(T, name, SIZE, ROWS, COLUMNS, WARPS_M, WARPS_N)                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N) convolution_##SIZE##_##name(                        \
        const T *x, const T *w, const T *bias, const T *residual, T *y, float *partial, Shape s) {                           \
        convolution<T, ROWS, COLUMNS, WARPS_M, WARPS_N, false>(x, w, bias, residual, y, partial, s);                         \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N) convolution_adjoint_##SIZE##_##name(                \
        const T *x, const T *w, const T *bias, const T *residual, T *y, float *partial, Shape s) {                           \
        convolution<T, ROWS, COLUMNS, WARPS_M, WARPS_N, true>(x, w, bias, residual, y, partial, s);                          \
    }
#define ONE(T, name)                                                                                                         \
    OF_SIZE(T, name, large, 128, 128, 2, 2)                                                                                  \
    OF_SIZE(T, name, small, 64, 64, 2, 2)                                                                                    \
    extern "C" __global__ void convolution_sum_##name(const float *partial, const T *bias, const T *residual, T *y, Shape s) { \
        convolution_sum<T>(partial, bias, residual, y, s);                                                                   \
    }
BOTH_HALVES(ONE)
