/* Small matrix products in registers. */
#pragma once
#include "factors.h"

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
            vec each = spread(x + i * x_i);
            made[i][0] = dot(made[i][0], each, low);
            if (vecs == 2) made[i][1] = dot(made[i][1], each, high);
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
