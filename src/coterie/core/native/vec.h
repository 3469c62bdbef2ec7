/* Vectors of floats by the compiler's own extension (GCC and Clang, any processor), and their loads. */
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16 /* floats in a vector */
#define TILE 10 /* rows in a tile of accumulators: TILE * 2 of them and what is loaded fit the registers */
#elif defined(__AVX__)
#define VL 8
#define TILE 5
#else
#define VL 4
#define TILE 10
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

typedef float vec __attribute__((vector_size(4 * VL)));
typedef int32_t ivec __attribute__((vector_size(4 * VL)));
typedef float vec_anywhere __attribute__((vector_size(4 * VL), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_anywhere *)p; }
INLINE void store(float *p, vec v) { *(vec_anywhere *)p = v; }
INLINE vec splat(float x) { return x - (vec){0}; } /* not 0 + x: -0 stays -0 */

/* The first n of a vector, 0 <= n <= VL; the rest reads as 0 and is not written. */
INLINE vec load_part(const float *p, int n) {
#ifdef __AVX512F__
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vec v = {0};
    memcpy(&v, p, 4 * (size_t)n);
    return v;
#endif
}
INLINE void store_part(float *p, vec v, int n) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    memcpy(p, &v, 4 * (size_t)n);
#endif
}

/* The same where n is mostly VL. */
INLINE vec load_some(const float *p, int n) { return n == VL ? load(p) : load_part(p, n); }
INLINE void store_some(float *p, vec v, int n) {
    if (n == VL) store(p, v);
    else store_part(p, v, n);
}

INLINE float sum(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < VL; i++) s += v[i];
    return s;
#endif
}

/* The smaller and the larger of two; the second where one is not a number. */
INLINE vec lesser(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
    ivec less = a < b;
    return (vec)((less & (ivec)a) | (~less & (ivec)b));
#endif
}
INLINE vec greater(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    ivec more = a > b;
    return (vec)((more & (ivec)a) | (~more & (ivec)b));
#endif
}

INLINE vec either(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }

/* e^x to 1.5 units in the last place; 0 becomes 1e-38 and infinity 2e38 or so, NaN stays NaN. */
INLINE vec expv(vec x) {
    const vec high = splat(88.37f), low = splat(-87.33f), magic = splat(12582912.0f); /* 1.5 * 2^23 */
    x = greater(low, lesser(high, x));
    vec shifted = x * 1.44269504f + magic, n = shifted - magic; /* x / ln 2, rounded */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    ivec power = ((ivec)shifted + 127) << 23; /* 2^n: the number stands in the lowest bits of `shifted` */
    return p * (vec)power;
}

/* In an unrolled loop: one pointer that moves from row to row, not an offset held for each. */
#define ONE_POINTER(p) __asm__("" : "+r"(p))
