// What the kernels beside this file share: vectors of the processor's widest kind, of float32 and of bfloat16, products
// of a few rows with a few others, and how their lanes are added up.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr ptrdiff_t LANES = 16;
#else
constexpr ptrdiff_t LANES = 8;
#endif
constexpr ptrdiff_t STEP = 2 * LANES;

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t bfloat;  // the upper half of a float

struct Pair {
    Lanes a, b;
};

// STEP numbers: of float32 the first half and the second, of bfloat16 those at even places and those at odd ones, which
// takes a shift and a mask where putting them in order would take shuffles.
inline Pair widen(const float *p) { return {*(const Lanes *)p, *(const Lanes *)(p + LANES)}; }
inline Pair widen(const bfloat *p) {
    Bits both = *(const Bits *)p;
    return {(Lanes)(both << 16), (Lanes)(both & 0xffff0000u)};
}
// Where among the STEP a number stands then.
inline ptrdiff_t place(ptrdiff_t k, float) { return k; }
inline ptrdiff_t place(ptrdiff_t k, bfloat) { return k / STEP * STEP + k % STEP / 2 + k % 2 * LANES; }

// The same as products take them. x is laid out to match.
inline Pair load(const float *p) { return widen(p); }
#ifdef __AVX512BF16__
// Products of bfloat16 pairs, added in float32, are an instruction of their own: x then stays as it is.
struct Whole {
    __m512bh v;
};
inline Whole load(const bfloat *p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
#else
inline Pair load(const bfloat *p) { return widen(p); }
#endif

// A row of x, filled up with zeros to a multiple of STEP: in `load`'s order and in float32, or where bfloat16 has
// instructions in bfloat16, in the first half of a row's place.
inline void lay_out(const float *x, float *to, ptrdiff_t K) { memcpy(to, x, (size_t)K * sizeof *to); }
inline Pair load_x(const float *row, ptrdiff_t k, float) { return load(row + k); }
#ifdef __AVX512BF16__
inline void lay_out(const bfloat *x, float *to, ptrdiff_t K) { memcpy(to, x, (size_t)K * sizeof *x); }
inline Whole load_x(const float *row, ptrdiff_t k, bfloat) { return load((const bfloat *)row + k); }
#else
inline void lay_out(const bfloat *x, float *to, ptrdiff_t K) {
    for (ptrdiff_t k = 0; k < K; k++) {
        uint32_t bits = (uint32_t)x[k] << 16;
        memcpy(to + place(k, bfloat()), &bits, sizeof bits);
    }
}
inline Pair load_x(const float *row, ptrdiff_t k, bfloat) { return load(row + k); }
#endif

inline void store(float *to, float value) { *to = value; }
inline void store(bfloat *to, float value) {  // the nearest, of two as near the even one; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    *to = value != value ? 0x7fc0 : (bfloat)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// a * b + c: told, not left to the compiler, which fuses one product here and another there.
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline Lanes add(Pair a, Pair b, Lanes c) { return fused(a.b, b.b, fused(a.a, b.a, c)); }
#ifdef __AVX512BF16__
inline Lanes add(Whole a, Whole b, Lanes c) { return (Lanes)_mm512_dpbf16_ps((__m512)c, a.v, b.v); }
#endif

// Of COUNT vectors each one's lanes, added together: in every one those 8 apart, then 4, 2 and 1. With rows of a few
// hundred numbers that takes as long as the products, if it is done for one vector after the other.
#if defined(__AVX512F__) || defined(__FMA__)
#ifdef __AVX512F__
typedef __m512 Wide;
#else
typedef __m256 Wide;
#endif
#define FOLD(name, half, low, high)                                                                     \
    inline Lanes name(Lanes a, Lanes b) {                                                               \
        return (Lanes)half((Wide)a, (Wide)b, low) + (Lanes)half((Wide)a, (Wide)b, high);                \
    }
#ifdef __AVX512F__
FOLD(eights, _mm512_shuffle_f32x4, 0x44, 0xee)
FOLD(fours, _mm512_shuffle_f32x4, 0x88, 0xdd)
FOLD(twos, _mm512_shuffle_ps, 0x44, 0xee)
FOLD(ones, _mm512_shuffle_ps, 0x88, 0xdd)
#else
FOLD(fours, _mm256_permute2f128_ps, 0x20, 0x31)
FOLD(twos, _mm256_shuffle_ps, 0x44, 0xee)
FOLD(ones, _mm256_shuffle_ps, 0x88, 0xdd)
#endif
template <int COUNT>
inline void totals(const Lanes *v, float *to) {
    constexpr int PARTS = LANES / 4;  // a vector of four lanes each
    for (int set = 0; set < COUNT; set += LANES) {
        auto part = [&](int from) {
            auto at = [&](int i) { return v[set + (from * PARTS + i) % (COUNT < LANES ? COUNT : LANES)]; };
#ifdef __AVX512F__
            return fours(eights(at(0), at(1)), eights(at(2), at(3)));
#else
            return fours(at(0), at(1));
#endif
        };
        float found[LANES];
        *(Lanes *)found = ones(twos(part(0), part(1)), twos(part(2), part(3)));
        for (int i = 0; i < LANES && set + i < COUNT; i++) to[set + i] = found[i % PARTS * 4 + i / PARTS];
    }
}
#else
template <int COUNT>
inline void totals(const Lanes *v, float *to) {
    for (int i = 0; i < COUNT; i++) {
        to[i] = 0;
        for (int lane = 0; lane < LANES; lane++) to[i] += v[i][lane];
    }
}
#endif

#define UNROLL _Pragma("GCC unroll 8")

// In registers from here on: a compiler else reads them anew for each product, which takes longer than the product.
#if defined(__AVX512F__) || defined(__FMA__)
inline void hold(Pair &p) { asm("" : "+v"(p.a), "+v"(p.b)); }
#else
inline void hold(Pair &) {}
#endif
#ifdef __AVX512BF16__
inline void hold(Whole &p) { asm("" : "+v"(p.v)); }
#endif

// STEP numbers into the first cache or the second, which has more places for what is on its way.
enum Cache { NONE, SECOND = 2, FIRST = 3 };
template <Cache INTO, typename T>
inline void fetch(const T *p) {
    for (size_t line = 0; line < STEP * sizeof(T); line += 64) __builtin_prefetch((const char *)p + line, 0, INTO);
}

// Of RM rows of x, laid out `padded` apart, with RN rows row(n) of K numbers each: the products of the numbers
// begin..end, added lane by lane to `sum`. Meanwhile what stands `ahead` numbers after each is fetched.
template <int RM, int RN, Cache INTO, typename T, typename Row>
__attribute__((always_inline)) inline void dots(const float *x, ptrdiff_t padded, Row row, ptrdiff_t begin,
                                                ptrdiff_t end, ptrdiff_t K, ptrdiff_t ahead, Lanes (&sum)[RN][RM]) {
    using Numbers = decltype(load((const T *)nullptr));
    auto add_step = [&](const Numbers *a, ptrdiff_t k) {
        UNROLL for (int m = 0; m < RM; m++) {
            Numbers b = load_x(x + m * padded, k, T());
            hold(b);
            UNROLL for (int n = 0; n < RN; n++) sum[n][m] = add(a[n], b, sum[n][m]);
        }
    };
    Numbers a[RN];
    ptrdiff_t k = begin;
    for (; k + STEP <= end; k += STEP) {
        UNROLL for (int n = 0; n < RN; n++) {
            a[n] = load(row(n) + k);
            if constexpr (INTO != NONE) fetch<INTO>(row(n) + ahead + k);
        }
        add_step(a, k);
    }
    if (end == K && k < K) {
        for (int n = 0; n < RN; n++) {
            T rest[STEP] = {};
            memcpy(rest, row(n) + k, (size_t)(K - k) * sizeof *rest);
            a[n] = load(rest);
        }
        add_step(a, k);
    }
}

// What the rows of x are kept in: of numbers that lie across two of the cache's lines both are read.
struct alignas(64) Line {
    float x[16];
};

}  // namespace
