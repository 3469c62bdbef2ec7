/* The general matrix product. */
#pragma once
#include "gelu.h"
#include "factors.h"

/* Sums over k of a[i * row + k * next] * panel[k][...] for `rows` <= TILE rows i and two vectors. */
INLINE void tile(int rows, const float *a, int64_t row, int64_t next, const float *panel, int64_t depth,
                 vec sums[TILE][2]) {
    UNROLL for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vec){0};
    for (int64_t k = 0; k < depth; k++, a += next, panel += 2 * VL) {
        vec left = load(panel), right = load(panel + VL);
        UNROLL for (int i = 0; i < rows; i++) {
            vec by = spread(a + i * row);
            sums[i][0] = dot(sums[i][0], by, left);
            sums[i][1] = dot(sums[i][1], by, right);
        }
    }
}

INLINE void tile_to(int rows, const float *a, int64_t row, int64_t next, const float *panel, int64_t depth,
                    float factor, const float *start, int64_t start_i, float *c, int64_t stride, int n) {
    vec sums[TILE][2];
    tile(rows, a, row, next, panel, depth, sums);
    UNROLL for (int i = 0; i < rows; i++, c += stride, start += start_i) {
        if (n == 2 * VL) {
            store(c, load(start) + factor * sums[i][0]);
            store(c + VL, load(start + VL) + factor * sums[i][1]);
        } else {
            int first = n < VL ? n : VL, second = n - first;
            store_part(c, load_part(start, first) + factor * sums[i][0], first);
            store_part(c + VL, load_part(start + VL, second) + factor * sums[i][1], second);
        }
    }
}

/* A function for each number of rows, so that the compiler gives each its own registers. */
#define TILE_OF(m)                                                                                             \
    static __attribute__((noinline)) void tile_##m(const float *a, int64_t row, int64_t next,                  \
                                                   const float *panel, int64_t depth, float factor,            \
                                                   const float *start, int64_t start_i, float *c,              \
                                                   int64_t stride, int n) {                                    \
        tile_to(m, a, row, next, panel, depth, factor, start, start_i, c, stride, n);                          \
    }
TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5)
#if TILE > 5
TILE_OF(6) TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10)
#endif
static void (*const tiles[])(const float *, int64_t, int64_t, const float *, int64_t, float, const float *,
                             int64_t, float *, int64_t, int) = {
    0, tile_1, tile_2, tile_3, tile_4, tile_5,
#if TILE > 5
    tile_6, tile_7, tile_8, tile_9, tile_10,
#endif
};

/* What is done with a result as soon as it is whole; `other` lies like it. */
enum { NOTHING, RELU, GELU, GELU_TANH, TIMES, WHERE_POSITIVE };
INLINE void finish_row(int what, float *c, float *other, int64_t columns) {
    if (what == GELU || what == GELU_TANH) gelu(c, c, other, what == GELU_TANH, columns);
    for (int64_t j = 0; j < columns; j++) {
        if (what == RELU) c[j] = c[j] <= 0 ? 0 : c[j]; /* NaN stays */
        if (what == TIMES) c[j] *= other[j];
        if (what == WHERE_POSITIVE) c[j] = other[j] <= 0 ? 0 : c[j];
    }
}
static void finish(int64_t what, float *c, float *other, int64_t rows, int64_t columns, int64_t stride) {
#define CASE(kind) case kind: finish_row(kind, c, other, columns); break;
    for (; what && rows; rows--, c += stride, other += other ? stride : 0)
        switch (what) { CASE(RELU) CASE(GELU) CASE(GELU_TANH) CASE(TIMES) CASE(WHERE_POSITIVE) }
#undef CASE
}

/* panel[k][l] = b[k * down + l * across] for k < depth and l < n, and 0 for the other l. */
static void pack(const float *b, int64_t down, int64_t across, int64_t depth, int n, float *panel) {
    if (n < 2 * VL) memset(panel, 0, sizeof(float) * 2 * VL * (size_t)depth);
    if (across > 1) transpose(b, across, n, depth, panel, 2 * VL);
    else if (n < 2 * VL)
        for (int64_t k = 0; k < depth; k++) memcpy(panel + k * 2 * VL, b + k * down, 4 * (size_t)n);
    else
        for (int64_t k = 0; k < depth; k++, b += down, panel += 2 * VL) {
            __builtin_prefetch(b + 16 * down), __builtin_prefetch(b + 16 * down + VL);
            store(panel, load(b));
            store(panel + VL, load(b + VL));
        }
}

#define DEPTH 256 /* of a panel: it stays in the first-level cache */
static const float zeros[2 * VL];

/* c [rows, columns] = start + factor * a b, finished, where a[i, k] = a[i * row + k * next] and
   b[k, j] = b[k * down + j * across]; one of `down` and `across` is 1. start: c itself, or a row [columns], or
   NULL for zeros. */
static void product(const float *a, int64_t row, int64_t next, const float *b, int64_t down, int64_t across,
                    float factor, const float *start, float *c, int64_t rows, int64_t depth, int64_t columns,
                    int64_t what, float *other) {
    float panel[DEPTH * 2 * VL];
    for (int64_t top = 0; top < depth; top += DEPTH) {
        int64_t deep = depth - top < DEPTH ? depth - top : DEPTH, own = top || start == c ? columns : 0;
        const float *from = own ? c : start;
        for (int64_t j = 0; j < columns; j += 2 * VL) {
            int n = (int)(columns - j < 2 * VL ? columns - j : 2 * VL);
            pack(b + top * down + j * across, down, across, deep, n, panel);
            for (int64_t r = 0; r < rows; r += TILE) {
                int some = (int)(rows - r < TILE ? rows - r : TILE);
                int64_t place = r * columns + j;
                for (int i = 0; i < some; i++) { /* it will be there when the sums are */
                    __builtin_prefetch(c + place + i * columns, 1), __builtin_prefetch(c + place + i * columns + VL, 1);
                    if (!other) continue;
                    __builtin_prefetch(other + place + i * columns), __builtin_prefetch(other + place + i * columns + VL);
                }
                tiles[some](a + top * next + r * row, row, next, panel, deep, factor,
                            from ? from + r * own + j : zeros, own, c + place, columns, n);
                if (top + deep == depth) finish(what, c + place, other ? other + place : 0, some, n, columns);
            }
        }
    }
}
