/* What products multiply: numbers, or, in a file that defines BF16, pairs of numbers rounded to bfloat16. A
   pair lies in the place of one number, and its two products are added up in float32. */
#pragma once
#include "transpose.h"

#define WIDE (2 * VL) /* columns of a panel */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
/* How many of a vector's floats there are, if n are left. */
INLINE int left(int64_t n) { return n >= VL ? VL : n > 0 ? (int)n : 0; }

#ifdef BF16
#define NAME(f) f##_bf16
#define DEEP 2 /* numbers in a place */
INLINE vec dot(vec sum, vec a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE vec spread(const float *p) { return (vec)_mm512_set1_ps(*p); }

/* Of 32 numbers the pairs. */
INLINE vec narrow(vec low, vec high) { return (vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
/* Pairs of one number of each. */
INLINE vec pair(vec first, vec second) {
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16);
    return (vec)_mm512_permutexvar_epi16(_mm512_or_si512(low, high), (__m512i)narrow(first, second));
}
#else
#define NAME(f) f
#define DEEP 1
INLINE vec dot(vec sum, vec a, vec b) { return sum + a * b; }
INLINE vec spread(const float *p) { return splat(*p); }
#endif
INLINE int64_t places(int64_t n) { return (n + DEEP - 1) / DEEP; }

/* Numbers that follow each other; an odd last one is paired with 0. */
INLINE void pack_row(const float *from, int64_t n, float *to) {
#ifdef BF16
    for (; n >= 2 * VL; n -= 2 * VL, from += 2 * VL, to += VL)
        store(to, narrow(load(from), load(from + VL)));
    if (!n) return;
    store_part(to, narrow(load_part(from, left(n)), load_part(from + VL, left(n - VL))), (int)places(n));
#else
    memcpy(to, from, 4 * (size_t)n);
#endif
}

/* Rows, in places whose number is a multiple of `of`; what is beyond the last is 0. */
static inline void pack_rows(const float *from, int64_t rows, int64_t n, int64_t of, float *to) {
    const int64_t stride = round_up(places(n), of);
    for (int64_t r = 0; r < rows; r++, from += n, to += stride) {
        pack_row(from, n, to);
        memset(to + places(n), 0, 4 * (size_t)(stride - places(n)));
    }
}

/* Rows that are multiplied with what stands below each other in them: to[panel][place][column], in panels of
   `wide` columns and `depth` places. */
static inline void pack_panels(const float *from, int64_t rows, int64_t columns, int64_t wide, int64_t depth,
                               float *to) {
    for (int64_t k = 0; k < rows; k += DEEP)
        for (int64_t c = 0; c < round_up(columns, wide); c += VL) {
            const float *p = from + k * columns + c;
            const int n = left(columns - c);
            vec made = load_part(p, n);
#ifdef BF16
            made = pair(made, k + 1 < rows ? load_part(p + columns, n) : (vec){0});
#endif
            store(to + c / wide * wide * depth + k / DEEP * wide + c % wide, made);
        }
}

/* Rows that become columns of panels: to[panel][place][row], WIDE of them in a panel. spare: VL rows. */
static inline void pack_turned(const float *from, int64_t rows, int64_t n, float *to, float *spare) {
    for (int64_t r = 0; r < rows; r += VL, from += VL * n) {
        const float *packed = from;
        if (DEEP == 2) pack_rows(from, left(rows - r), n, 1, spare), packed = spare;
        float *panel = to + r / WIDE * WIDE * places(n) + r % WIDE;
        transpose(packed, places(n), left(rows - r), places(n), panel, WIDE);
    }
}
