// Products of few rows with large matrices, as in decoding: y = x W^T, at the speed at which W can be read.
//
// A BLAS is made for many rows: with one it reaches 0.6 to 0.8 of the memory's bandwidth here, with eight 0.2 to 0.4
// (benchmarks/few_rows.py). Here each row of W is read once for up to eight rows of x. What is read is two or four long
// streams, each going on from row to row: the processor fetches ahead in them by itself, faster than in one, and than
// in eight that begin anew with every row. Every number of y is summed in the same order whatever the number of rows: a
// request gets in a batch, to the last bit, what it gets alone.
//
// x (M, K) float32; w (E, N, K), float32 or bfloat16; y (M, N) float32. `group` names each row's matrix among the E, or
// is NULL where all have the first. No argument may overlap another. Returns 0, or 1 where memory is short.

#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define STEP (2 * LANES)
#define BLOCK 128  // rows of W that one thread takes at a time, or somewhat fewer

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef struct {
    vec a, b;
} pair;

// 2 * LANES numbers: of float32 the first half and the second, of bfloat16 those at even places and those at odd ones,
// which takes a shift and a mask where putting them in order would take shuffles. x is laid out to match (lay_out).
static inline pair load_float(const float *p) { return (pair){*(const vec *)p, *(const vec *)(p + LANES)}; }
static inline pair load_bfloat(const uint16_t *p) {
    bits both = *(const bits *)p;
    return (pair){(vec)(both << 16), (vec)(both & 0xffff0000u)};
}
// a * b + c: told, not left to the compiler, which fuses one product here and another there.
static inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
// In pairs: with rows of a few hundred numbers, adding one lane after the other takes as long as the products.
static inline float total(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__FMA__)
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

// A row of x as the tiles read it: filled up with zeros to a multiple of STEP, in bfloat16's order where W is that.
static void lay_out(const float *x, float *to, ptrdiff_t K, ptrdiff_t padded, int is_bfloat) {
    memset(to + padded - STEP, 0, STEP * sizeof *to);
    if (!is_bfloat)
        memcpy(to, x, (size_t)K * sizeof *to);
    else
        for (ptrdiff_t k = 0; k < K; k++) to[k / STEP * STEP + k % STEP / 2 + k % 2 * LANES] = x[k];
}

#define UNROLL _Pragma("GCC unroll 8")

// RN rows of W, `apart` rows from one to the next, with RM rows of x, which have `padded` numbers; row m of the result
// goes to y + row[m] * N.
#define TILE(NAME, TYPE, LOAD, RN, RM)                                                                                 \
    static inline void NAME(const float *x, const TYPE *w, float *y, const ptrdiff_t *row, ptrdiff_t N, ptrdiff_t K,   \
                            ptrdiff_t padded, ptrdiff_t apart) {                                                       \
        vec sum[RN][RM];                                                                                               \
        UNROLL for (int n = 0; n < RN; n++) UNROLL for (int m = 0; m < RM; m++) sum[n][m] = (vec){0};                  \
        ptrdiff_t k = 0;                                                                                               \
        for (; k + STEP <= K; k += STEP) {                                                                             \
            pair a[RN];                                                                                                \
            UNROLL for (int n = 0; n < RN; n++) a[n] = LOAD(w + n * apart * K + k);                                    \
            UNROLL for (int m = 0; m < RM; m++) {                                                                      \
                pair b = load_float(x + m * padded + k);                                                               \
                UNROLL for (int n = 0; n < RN; n++) sum[n][m] = fused(a[n].a, b.a, sum[n][m]);                         \
                UNROLL for (int n = 0; n < RN; n++) sum[n][m] = fused(a[n].b, b.b, sum[n][m]);                         \
            }                                                                                                          \
        }                                                                                                              \
        if (k < K)                                                                                                     \
            for (int n = 0; n < RN; n++) {                                                                             \
                TYPE rest[STEP] = {0};                                                                                 \
                memcpy(rest, w + n * apart * K + k, (size_t)(K - k) * sizeof *rest);                                   \
                pair a = LOAD(rest);                                                                                   \
                for (int m = 0; m < RM; m++) {                                                                         \
                    pair b = load_float(x + m * padded + k);                                                           \
                    sum[n][m] = fused(a.a, b.a, sum[n][m]);                                                            \
                    sum[n][m] = fused(a.b, b.b, sum[n][m]);                                                            \
                }                                                                                                      \
            }                                                                                                          \
        UNROLL for (int n = 0; n < RN; n++) UNROLL for (int m = 0; m < RM; m++)                                        \
            y[row[m] * N + n * apart] = total(sum[n][m]);                                                              \
    }

// Rows begin..end of W in WIDE parts, a row of each at a time; then what is left over.
#define SWEEP(NAME, ROWS, WIDE)                                                                                        \
    for (; m + ROWS <= rows; m += ROWS) {                                                                              \
        ptrdiff_t n = begin, part = (end - begin) / WIDE;                                                              \
        for (; n < begin + part; n++) NAME##_##ROWS(x + m * padded, w + n * K, y + n, row + m, N, K, padded, part);    \
        for (n += (WIDE - 1) * part; n < end; n++)                                                                     \
            NAME##_##ROWS##_last(x + m * padded, w + n * K, y + n, row + m, N, K, padded, 0);                          \
    }

// Rows begin..end of one matrix with all the rows of x that go with it, eight, four, two or one at a time.
#define BLOCKS(NAME, TYPE, LOAD)                                                                                       \
    TILE(NAME##_8, TYPE, LOAD, 2, 8)                                                                                   \
    TILE(NAME##_8_last, TYPE, LOAD, 1, 8)                                                                              \
    TILE(NAME##_4, TYPE, LOAD, 2, 4)                                                                                   \
    TILE(NAME##_4_last, TYPE, LOAD, 1, 4)                                                                              \
    TILE(NAME##_2, TYPE, LOAD, 4, 2)                                                                                   \
    TILE(NAME##_2_last, TYPE, LOAD, 1, 2)                                                                              \
    TILE(NAME##_1, TYPE, LOAD, 4, 1)                                                                                   \
    TILE(NAME##_1_last, TYPE, LOAD, 1, 1)                                                                              \
    static void NAME(const float *x, const TYPE *w, float *y, const ptrdiff_t *row, ptrdiff_t rows,                    \
                     ptrdiff_t begin, ptrdiff_t end, ptrdiff_t N, ptrdiff_t K, ptrdiff_t padded) {                     \
        ptrdiff_t m = 0;                                                                                               \
        SWEEP(NAME, 8, 2)                                                                                              \
        SWEEP(NAME, 4, 2)                                                                                              \
        SWEEP(NAME, 2, 4)                                                                                              \
        SWEEP(NAME, 1, 4)                                                                                              \
    }

BLOCKS(multiply_float, float, load_float)
BLOCKS(multiply_bfloat, uint16_t, load_bfloat)

int few_rows(const float *x, const void *w, float *y, const int64_t *group, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K,
             ptrdiff_t E, int is_bfloat) {
    // Rows in the order of their matrices: `row[i]` is where the i-th stands in x, first[e] where those of e begin.
    ptrdiff_t *row = malloc((size_t)(M + 2 * E + 2) * sizeof *row), *first = row + M, *used = first + E + 1;
    ptrdiff_t padded = (K + STEP - 1) / STEP * STEP;
    float *rows = malloc((size_t)(M * padded) * sizeof *rows);
    if (!row || !rows) {
        free(row);
        free(rows);
        return 1;
    }
    ptrdiff_t present = 0, place = 0;
    for (ptrdiff_t e = 0; e < E; e++) {
        ptrdiff_t begin = place;
        for (ptrdiff_t m = 0; m < M; m++)
            if (!group || group[m] == e) {
                row[place] = m;
                lay_out(x + m * K, rows + place++ * padded, K, padded, is_bfloat);
            }
        first[e] = begin;
        if (place > begin) used[present++] = e;
    }
    first[E] = place;
    ptrdiff_t threads = omp_get_max_threads(), blocks = (N + BLOCK * threads - 1) / (BLOCK * threads) * threads;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t task = 0; task < present * blocks; task++) {
        ptrdiff_t e = used[task / blocks], b = task % blocks, begin = N * b / blocks, end = N * (b + 1) / blocks;
        ptrdiff_t from = first[e], count = first[e + 1] - from;
        if (is_bfloat)
            multiply_bfloat(rows + from * padded, (const uint16_t *)w + e * N * K, y, row + from, count, begin, end, N,
                            K, padded);
        else
            multiply_float(rows + from * padded, (const float *)w + e * N * K, y, row + from, count, begin, end, N, K,
                           padded);
    }
    free(row);
    free(rows);
    return 0;
}
