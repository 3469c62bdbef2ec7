/* Transposes of matrices. */
#pragma once
#include "vec.h"

#ifdef __AVX512F__
static const int32_t from_two[4][VL] = { /* where the upper row's numbers are then, 16 and more: in the lower */
    {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
    {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
    {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
    {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
};
#endif

/* to[j, i] = from[i, j] of one square, or less at the edges. */
INLINE void transpose_square(const float *from, int64_t from_i, int rows, int columns, float *to, int64_t to_j) {
#ifdef __AVX512F__
    __m512 held[VL];
    UNROLL for (int i = 0; i < VL; i++)
        held[i] = i < rows ? (__m512)load_some(from + i * from_i, columns) : _mm512_setzero_ps();
    UNROLL for (int s = 0, half = VL / 2; half; s++, half /= 2) { /* swap squares of that size across the diagonal */
        __m512i low = _mm512_loadu_si512(from_two[s]), high = _mm512_add_epi32(low, _mm512_set1_epi32(half));
        UNROLL for (int i = 0; i < VL; i++)
            if (!(i & half)) {
                __m512 above = held[i], below = held[i + half];
                held[i] = _mm512_permutex2var_ps(above, low, below);
                held[i + half] = _mm512_permutex2var_ps(above, high, below);
            }
    }
    UNROLL for (int j = 0; j < VL; j++)
        if (j < columns) store_some(to + j * to_j, (vec)held[j], rows);
#else
    for (int j = 0; j < columns; j++)
        for (int i = 0; i < rows; i++) to[j * to_j + i] = from[i * from_i + j];
#endif
}

/* to[j, i] = from[i, j] */
static void transpose(const float *from, int64_t from_i, int64_t rows, int64_t columns, float *to, int64_t to_j) {
    for (int64_t i = 0; i < rows; i += VL)
        for (int64_t j = 0; j < columns; j += VL) {
            const float *mine = from + i * from_i + j;
            float *place = to + j * to_j + i;
            if (rows - i >= VL && columns - j >= VL) transpose_square(mine, from_i, VL, VL, place, to_j);
            else
                transpose_square(mine, from_i, (int)(rows - i < VL ? rows - i : VL),
                                 (int)(columns - j < VL ? columns - j : VL), place, to_j);
        }
}
