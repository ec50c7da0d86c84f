// Scaled dot-product attention by tiles: scores are never in device memory. The backward pass computes them once more from the
// logarithms of the softmax's sums, in two runs of one kernel: by queries for dq, by keys for dk and dv, so that no two blocks
// add to the same value and results are the same from run to run.
//
// q, k, v and y are [B, tokens, heads * width]: a head's rows are strided, nothing is rearranged.
#include "half.cuh"

struct Attention {
    int queries, keys, heads, width;
    float scale; // of the scores
};

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Rows of WIDTH values in shared memory, an odd number of 16-byte chunks apart, so that eight rows begin at eight banks.
template <class T, int WIDTH> struct Rows {
    static constexpr int CHUNKS = WIDTH / 8, PITCH = CHUNKS | 1;
    uint4 *memory;
    static constexpr int bytes(int rows) { return rows * PITCH * 16; }

    // Copies `COUNT` rows from `first` on; zeros beyond `rows` and `width`.
    template <int COUNT> __device__ void load(const T *from, long row_stride, int first, int rows, int width) const {
        for (int id = threadIdx.x; id < COUNT * CHUNKS; id += THREADS) {
            const int r = id / CHUNKS, chunk = id % CHUNKS;
            const bool valid = first + r < rows && chunk * 8 < width;
            copy_async(memory + r * PITCH + chunk, valid ? from + (first + r) * row_stride + chunk * 8 : from, valid);
        }
    }
    // 16 rows by 16 columns as the left operand.
    __device__ void left(uint32_t (&r)[4], int row, int k) const {
        const int lane = threadIdx.x % 32;
        load_matrices(r, memory + (row + lane % 16) * PITCH + 2 * k + lane / 16);
    }
    // As the right operand of `rows rows^T`: 16 rows are 16 columns of the product, columns k are contracted.
    __device__ void right_by_columns(uint32_t (&r)[4], int row, int k) const {
        const int lane = threadIdx.x % 32;
        load_matrices(r, memory + (row + lane % 8 + lane / 16 * 8) * PITCH + 2 * k + lane / 8 % 2);
    }
    // As the right operand of `weights rows`: 16 rows are contracted, 16 columns are those of the product.
    __device__ void right_by_rows(uint32_t (&r)[4], int row, int n) const {
        const int lane = threadIdx.x % 32;
        load_matrices_transposed(r, memory + (row + lane % 16) * PITCH + 2 * n + lane / 16);
    }
};

// Sums of 16 x 16 products' values, rounded to be the left operand of the next product.
template <class T> __device__ void as_left(uint32_t (&left)[4], const float (&a)[4], const float (&b)[4]) {
    left[0] = pack<T>(a[0], a[1]), left[1] = pack<T>(a[2], a[3]);
    left[2] = pack<T>(b[0], b[1]), left[3] = pack<T>(b[2], b[3]);
}

template <class T, int WIDTH, int TILES, int BLOCK>
__device__ void attend(const T *q, const T *k, const T *v, T *y, float *log_sums, Attention s) {
    constexpr int ROWS = 16 * TILES * WARPS, STEPS = WIDTH / 16, COLUMNS = WIDTH / 8;
    constexpr bool HELD = WIDTH <= 64; // own rows in registers
    using R = Rows<T, WIDTH>;
    extern __shared__ uint4 shared[];
    const R queries{shared};
    const int lane = threadIdx.x % 32, first = blockIdx.x * ROWS, own = threadIdx.x / 32 * 16 * TILES;
    const int head = blockIdx.y, item = blockIdx.z;
    const long stride = (long)s.heads * s.width;
    q += ((long)item * s.queries * s.heads + head) * s.width, y += ((long)item * s.queries * s.heads + head) * s.width;
    k += ((long)item * s.keys * s.heads + head) * s.width, v += ((long)item * s.keys * s.heads + head) * s.width;
    auto block = [&](int stage, int of) { return R{shared + (ROWS + (2 * stage + of) * BLOCK) * R::PITCH}; };
    const int blocks = (s.keys + BLOCK - 1) / BLOCK;
    auto load = [&](int i) {
        if (i < blocks) {
            block(i % 2, 0).template load<BLOCK>(k, stride, i * BLOCK, s.keys, s.width);
            block(i % 2, 1).template load<BLOCK>(v, stride, i * BLOCK, s.keys, s.width);
        }
        commit();
    };
    queries.template load<ROWS>(q, stride, first, s.queries, s.width);
    load(0);

    float sums[TILES][COLUMNS][4] = {}, most[TILES][2], total[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; t++) most[t][0] = most[t][1] = -INFINITY, total[t][0] = total[t][1] = 0;
    const float scale = s.scale * LOG2_E;
    uint32_t held[HELD ? STEPS : 1][TILES][4];
    for (int i = 0; i < blocks; i++) {
        wait_for_all_but<0>();
        __syncthreads(); // this block is there, and nobody reads the one before any more
        load(i + 1);
        if (HELD && i == 0)
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int t = 0; t < TILES; t++) queries.left(held[step][t], own + 16 * t, step);
        const R keys = block(i % 2, 0), values = block(i % 2, 1);
        float scores[TILES][BLOCK / 8][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t(&left)[TILES][4] = held[HELD ? step : 0];
#pragma unroll
            for (int t = 0; t < TILES && !HELD; t++) queries.left(left[t], own + 16 * t, step);
#pragma unroll
            for (int n = 0; n < BLOCK / 16; n++) {
                uint32_t right[4];
                keys.right_by_columns(right, 16 * n, step);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    mma<T>(scores[t][2 * n], left[t], right[0], right[1]);
                    mma<T>(scores[t][2 * n + 1], left[t], right[2], right[3]);
                }
            }
        }
        if ((i + 1) * BLOCK > s.keys) {
#pragma unroll
            for (int n = 0; n < BLOCK / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (i * BLOCK + 8 * n + lane % 4 * 2 + j % 2 >= s.keys)
#pragma unroll
                        for (int t = 0; t < TILES; t++) scores[t][n][j] = -INFINITY;
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) { // rows lane / 4, and 8 further
                float high = most[t][half];
#pragma unroll
                for (int n = 0; n < BLOCK / 8; n++)
                    high = fmaxf(high, fmaxf(scores[t][n][2 * half], scores[t][n][2 * half + 1]));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
                // Minus infinity twice, of a row without a score, would be NaN.
                const float shift = high == -INFINITY ? 0 : high * scale, shrink = exp2_fast(most[t][half] * scale - shift);
                most[t][half] = high, total[t][half] *= shrink;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) sums[t][c][2 * half] *= shrink, sums[t][c][2 * half + 1] *= shrink;
#pragma unroll
                for (int n = 0; n < BLOCK / 8; n++)
#pragma unroll
                    for (int j = 2 * half; j < 2 * half + 2; j++) {
                        const float weight = exp2_fast(scores[t][n][j] * scale - shift);
                        scores[t][n][j] = weight, total[t][half] += weight;
                    }
            }
        }
#pragma unroll
        for (int n = 0; n < BLOCK / 16; n++) {
            uint32_t left[TILES][4];
#pragma unroll
            for (int t = 0; t < TILES; t++) as_left<T>(left[t], scores[t][2 * n], scores[t][2 * n + 1]);
#pragma unroll
            for (int c = 0; c < COLUMNS / 2; c++) {
                uint32_t right[4];
                values.right_by_rows(right, 16 * n, c);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    mma<T>(sums[t][2 * c], left[t], right[0], right[1]);
                    mma<T>(sums[t][2 * c + 1], left[t], right[2], right[3]);
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[t][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int row = first + own + 16 * t + lane / 4 + 8 * half;
            if (row >= s.queries) continue;
            if (lane % 4 == 0)
                log_sums[((long)item * s.heads + head) * s.queries + row] = most[t][half] * s.scale + log2f(sum) * LN_2;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const int column = 8 * c + lane % 4 * 2;
                if (column < s.width)
                    *reinterpret_cast<uint32_t *>(y + row * stride + column) =
                        pack<T>(sums[t][c][2 * half] / sum, sums[t][c][2 * half + 1] / sum);
            }
        }
    }
}

// With P = softmax(S), dP = dy v^T and each query's dot = sum(dy y): dS = P (dP - dot), dq = dS k, dk = dS^T q, dv = P^T dy.
// Each block holds rows (queries with their dy; or keys with their values) and passes the others by. Those of queries, which are
// run first, leave the dots for those of keys.
template <class T, int WIDTH, int BLOCK, bool OF_KEYS>
__device__ void attend_vjp(const T *q, const T *k, const T *v, const T *y, const T *dy, const float *log_sums, float *dots,
                           T *d_first, T *d_second, Attention s) {
    constexpr int ROWS = 16 * WARPS, STEPS = WIDTH / 16, COLUMNS = WIDTH / 8;
    constexpr bool HELD = WIDTH <= 64; // own rows in registers
    using R = Rows<T, WIDTH>;
    extern __shared__ uint4 shared[];
    const R own_first{shared}, own_second{shared + ROWS * R::PITCH};
    float *statistics = reinterpret_cast<float *>(shared + (2 * ROWS + 4 * BLOCK) * R::PITCH); // of passing queries
    const int lane = threadIdx.x % 32, first = blockIdx.x * ROWS, own = threadIdx.x / 32 * 16;
    const int head = blockIdx.y, item = blockIdx.z;
    const long stride = (long)s.heads * s.width, of_head = (long)head * s.width;
    const long at_queries = (long)item * s.queries * stride + of_head, at_keys = (long)item * s.keys * stride + of_head;
    const T *rows_first = OF_KEYS ? k + at_keys : q + at_queries, *rows_second = OF_KEYS ? v + at_keys : dy + at_queries;
    const T *past_first = OF_KEYS ? q + at_queries : k + at_keys, *past_second = OF_KEYS ? dy + at_queries : v + at_keys;
    const int rows = OF_KEYS ? s.keys : s.queries, passing = OF_KEYS ? s.queries : s.keys;
    log_sums += ((long)item * s.heads + head) * s.queries, dots += ((long)item * s.heads + head) * s.queries;

    auto block = [&](int stage, int of) { return R{shared + (2 * ROWS + (2 * stage + of) * BLOCK) * R::PITCH}; };
    const int blocks = (passing + BLOCK - 1) / BLOCK;
    auto load = [&](int i) {
        if (i < blocks) {
            block(i % 2, 0).template load<BLOCK>(past_first, stride, i * BLOCK, passing, s.width);
            block(i % 2, 1).template load<BLOCK>(past_second, stride, i * BLOCK, passing, s.width);
            if (OF_KEYS && threadIdx.x < BLOCK) { // an infinite sum makes the weight of a query beyond the last zero
                const int query = i * BLOCK + threadIdx.x;
                statistics[i % 2 * 2 * BLOCK + threadIdx.x] = query < passing ? log_sums[query] * LOG2_E : INFINITY;
                statistics[i % 2 * 2 * BLOCK + BLOCK + threadIdx.x] = query < passing ? dots[query] : 0;
            }
        }
        commit();
    };
    own_first.template load<ROWS>(rows_first, stride, first, rows, s.width);
    own_second.template load<ROWS>(rows_second, stride, first, rows, s.width);
    load(0);
    float row_log[2] = {INFINITY, INFINITY}, row_dot[2] = {0, 0};
    if (!OF_KEYS) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first + own + lane / 4 + 8 * half;
            float dot = 0;
            for (int i = lane % 4 * 8; row < rows && i < s.width; i += 32) {
                const Eight<T> a(y + at_queries + row * stride + i), b(dy + at_queries + row * stride + i);
#pragma unroll
                for (int j = 0; j < 8; j++) dot += a.v[j] * b.v[j];
            }
            dot += __shfl_xor_sync(~0u, dot, 1);
            dot += __shfl_xor_sync(~0u, dot, 2);
            if (row < rows) row_log[half] = log_sums[row] * LOG2_E, row_dot[half] = dot;
            if (row < rows && lane % 4 == 0) dots[row] = dot;
        }
    }

    float sums_first[COLUMNS][4] = {}, sums_second[OF_KEYS ? COLUMNS : 1][4] = {};
    const float scale = s.scale * LOG2_E;
    uint32_t held_first[HELD ? STEPS : 1][4], held_second[HELD ? STEPS : 1][4];
    for (int i = 0; i < blocks; i++) {
        wait_for_all_but<0>();
        __syncthreads(); // this block is there, and nobody reads the one before any more
        load(i + 1);
        if (HELD && i == 0)
#pragma unroll
            for (int step = 0; step < STEPS; step++)
                own_first.left(held_first[step], own, step), own_second.left(held_second[step], own, step);
        const R a = block(i % 2, 0), b = block(i % 2, 1);
        const float *column_log = statistics + i % 2 * 2 * BLOCK, *column_dot = column_log + BLOCK;
        float p[BLOCK / 8][4] = {}, ds[BLOCK / 8][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t right[4];
            uint32_t(&left_first)[4] = held_first[HELD ? step : 0], (&left_second)[4] = held_second[HELD ? step : 0];
            if (!HELD) own_first.left(left_first, own, step), own_second.left(left_second, own, step);
#pragma unroll
            for (int n = 0; n < BLOCK / 16; n++) {
                a.right_by_columns(right, 16 * n, step);
                mma<T>(p[2 * n], left_first, right[0], right[1]);
                mma<T>(p[2 * n + 1], left_first, right[2], right[3]);
            }
#pragma unroll
            for (int n = 0; n < BLOCK / 16; n++) {
                b.right_by_columns(right, 16 * n, step);
                mma<T>(ds[2 * n], left_second, right[0], right[1]);
                mma<T>(ds[2 * n + 1], left_second, right[2], right[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < BLOCK / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = 8 * n + lane % 4 * 2 + j % 2;
                const float log_sum = OF_KEYS ? column_log[column] : row_log[j / 2];
                const float dot = OF_KEYS ? column_dot[column] : row_dot[j / 2];
                const bool inside = OF_KEYS || i * BLOCK + column < passing;
                p[n][j] = inside ? exp2_fast(p[n][j] * scale - log_sum) : 0;
                ds[n][j] = p[n][j] * (ds[n][j] - dot) * s.scale;
            }
        }
#pragma unroll
        for (int n = 0; n < BLOCK / 16; n++) {
            uint32_t left[4], right[4];
            as_left<T>(left, ds[2 * n], ds[2 * n + 1]);
#pragma unroll
            for (int c = 0; c < COLUMNS / 2; c++) {
                a.right_by_rows(right, 16 * n, c);
                mma<T>(sums_first[2 * c], left, right[0], right[1]);
                mma<T>(sums_first[2 * c + 1], left, right[2], right[3]);
            }
            if (OF_KEYS) {
                as_left<T>(left, p[2 * n], p[2 * n + 1]);
#pragma unroll
                for (int c = 0; c < COLUMNS / 2; c++) {
                    b.right_by_rows(right, 16 * n, c);
                    mma<T>(sums_second[OF_KEYS ? 2 * c : 0], left, right[0], right[1]);
                    mma<T>(sums_second[OF_KEYS ? 2 * c + 1 : 0], left, right[2], right[3]);
                }
            }
        }
    }
    const long at = OF_KEYS ? at_keys : at_queries;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + own + lane / 4 + 8 * half;
        if (row >= rows) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int column = 8 * c + lane % 4 * 2;
            if (column >= s.width) continue;
            const long to = at + row * stride + column;
            *reinterpret_cast<uint32_t *>(d_first + to) = pack<T>(sums_first[c][2 * half], sums_first[c][2 * half + 1]);
            if (OF_KEYS) {
                const int second = OF_KEYS ? c : 0;
                *reinterpret_cast<uint32_t *>(d_second + to) =
                    pack<T>(sums_second[second][2 * half], sums_second[second][2 * half + 1]);
            }
        }
    }
}

#define OF_WIDTH(T, name, WIDTH, TILES, BLOCK)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_##WIDTH##_##name(                                           \
        const T *q, const T *k, const T *v, T *y, float *log_sums, Attention s) {                                            \
        attend<T, WIDTH, TILES, BLOCK>(q, k, v, y, log_sums, s);                                                             \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_vjp_queries_##WIDTH##_##name(                               \
        const T *q, const T *k, const T *v, const T *y, const T *dy, const float *log_sums, float *dots, T *dq,              \
        Attention s) {                                                                                                       \
        attend_vjp<T, WIDTH, BLOCK, false>(q, k, v, y, dy, log_sums, dots, dq, nullptr, s);                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_vjp_keys_##WIDTH##_##name(                                  \
        const T *q, const T *k, const T *v, const T *dy, const float *log_sums, float *dots, T *dk, T *dv, Attention s) {    \
        attend_vjp<T, WIDTH, BLOCK, true>(q, k, v, nullptr, dy, log_sums, dots, dk, dv, s);                                  \
    }
#define ONE(T, name)                                                                                                         \
    OF_WIDTH(T, name, 16, 2, 64)                                                                                             \
    OF_WIDTH(T, name, 48, 2, 64)                                                                                             \
    OF_WIDTH(T, name, 64, 2, 64)                                                                                             \
    OF_WIDTH(T, name, 80, 1, 64)                                                                                             \
    OF_WIDTH(T, name, 160, 1, 32)
BOTH_HALVES(ONE)
