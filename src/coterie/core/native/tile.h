/* Small matrix products in registers, and transposes. */
#pragma once
#include "vec.h"

/* out[i] = start[i] + sum over k of x[i, k] panel[k], each of `vecs` vectors; no start is zeros. */
INLINE void tile(int rows, int vecs, int64_t depth, const float *x, int64_t x_i, int64_t x_k,
                 const float *panel, int64_t panel_k, const float *start, int64_t start_i, float *out,
                 int64_t out_i) {
    vec made[TILE][2];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vecs; v++)
            made[i][v] = start ? load(start + i * start_i + v * VL) : (vec){0};
    for (int64_t k = 0; k < depth; k++, x += x_k, panel += panel_k) {
        vec low = load(panel), high = load(panel + (vecs - 1) * VL);
        UNROLL for (int i = 0; i < rows; i++) {
            vec each = splat(x[i * x_i]);
            made[i][0] += each * low;
            if (vecs == 2) made[i][1] += each * high;
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vecs; v++) store(out + i * out_i + v * VL, made[i][v]);
}

/* The same for any number of rows, in tiles of about the same height. */
static void product(int64_t rows, int vecs, int64_t depth, const float *x, int64_t x_i, int64_t x_k,
                    const float *panel, int64_t panel_k, const float *start, int64_t start_i, float *out,
                    int64_t out_i) {
    for (int64_t tiles = (rows + TILE - 1) / TILE; tiles; tiles--) {
        int high = (int)((rows + tiles - 1) / tiles);
        switch (2 * high + vecs) {
#define CASE(n, v) \
    case 2 * n + v: \
        if (n <= TILE) tile(n, v, depth, x, x_i, x_k, panel, panel_k, start, start_i, out, out_i); \
        break;
#define CASES(n) CASE(n, 1) CASE(n, 2)
            CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) CASES(7) CASES(8) CASES(9) CASES(10)
#undef CASES
#undef CASE
        }
        rows -= high, x += high * x_i, start += high * start_i, out += high * out_i;
    }
}

/* to[j, i] = from[i, j] of one square, or less at the edges. */
#ifdef __AVX512F__
INLINE void transpose_square(const float *from, int64_t from_i, int rows, int columns, float *to, int64_t to_j) {
    __m512 held[VL];
    UNROLL for (int i = 0; i < VL; i++)
        held[i] = i < rows ? (__m512)load_some(from + i * from_i, columns) : _mm512_setzero_ps();
    UNROLL for (int half = VL / 2; half; half /= 2) { /* swap squares of that size across the diagonal */
        ivec low, high;
        UNROLL for (int l = 0; l < VL; l++) {
            low[l] = l & half ? VL + l - half : l;
            high[l] = l & half ? VL + l : l + half;
        }
        UNROLL for (int i = 0; i < VL; i++)
            if (!(i & half)) {
                __m512 above = held[i], below = held[i + half];
                held[i] = _mm512_permutex2var_ps(above, (__m512i)low, below);
                held[i + half] = _mm512_permutex2var_ps(above, (__m512i)high, below);
            }
    }
    UNROLL for (int j = 0; j < VL; j++)
        if (j < columns) store_some(to + j * to_j, (vec)held[j], rows);
}
#else
INLINE void transpose_square(const float *from, int64_t from_i, int rows, int columns, float *to, int64_t to_j) {
    for (int j = 0; j < columns; j++)
        for (int i = 0; i < rows; i++) to[j * to_j + i] = from[i * from_i + j];
}
#endif

/* to[j, i] = from[i, j] */
static void transpose(const float *from, int64_t from_i, int64_t rows, int64_t columns, float *to, int64_t to_j) {
    for (int64_t i = 0; i < rows; i += VL)
        for (int64_t j = 0; j < columns; j += VL)
            transpose_square(from + i * from_i + j, from_i, (int)(rows - i < VL ? rows - i : VL),
                             (int)(columns - j < VL ? columns - j : VL), to + j * to_j + i, to_j);
}
