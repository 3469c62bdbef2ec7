/* Linear layers, y = x w^T + b and what goes back, each client with its own w [out, in].

   Few rows: a general matrix product copies w into an order of its own first, which with ten rows costs more
   than the product; here w is read where it lies, once on the way forward and once back.
   Many rows: a general product with tiles of TILE rows by two vectors, at the end of this file. */
#include "vec.h"

#define MANY 48 /* rows from which the general product is faster */
#if TILE > 5
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9)
#else
#define CASES CASE(1) CASE(2) CASE(3) CASE(4)
#endif
#define CHUNK 512 /* columns of x at a time, so that all rows of them stay in the first-level cache */

static int64_t chunk_of(int64_t columns) {
    int64_t parts = (columns + CHUNK - 1) / CHUNK, each = (columns + parts - 1) / parts;
    return (each + VL - 1) / VL * VL;
}

/* rows x outs dot products over the columns given; y[r][n] += them. */
INLINE void dots(int rows, int outs, const float *x, const float *w, float *y, int64_t columns,
                 int64_t in, int64_t out) {
    vec sums[TILE][2] = {0};
    int64_t k = 0;
    for (; k + VL <= columns; k += VL) {
        vec left[2];
        UNROLL for (int n = 0; n < outs; n++) left[n] = load(w + n * in + k);
        UNROLL for (int r = 0; r < rows; r++) {
            vec row = load(x + r * in + k);
            UNROLL for (int n = 0; n < outs; n++) sums[r][n] += row * left[n];
        }
    }
    if (k < columns)
        UNROLL for (int n = 0; n < outs; n++) {
            vec left = load_part(w + n * in + k, (int)(columns - k));
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][n] += load_part(x + r * in + k, (int)(columns - k)) * left;
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < outs; n++) y[r * out + n] += sum(sums[r][n]);
}

INLINE void forward(int rows, const float *x, const float *w, float *y, int64_t columns, int64_t in,
                    int64_t out) {
    int64_t n = 0;
    for (; n + 2 <= out; n += 2) dots(rows, 2, x, w + n * in, y + n, columns, in, out);
    if (n < out) dots(rows, 1, x, w + n * in, y + n, columns, in, out);
}

/* y += x w^T for few rows */
static void few_forward(const float *x, const float *w, float *y, int64_t rows, int64_t in, int64_t out) {
    int64_t step = chunk_of(in);
    for (int64_t k = 0; k < in; k += step) {
        int64_t columns = in - k < step ? in - k : step, r = 0;
        for (; r + TILE <= rows; r += TILE) forward(TILE, x + r * in + k, w + k, y + r * out, columns, in, out);
        const float *rest = x + r * in + k;
        float *to = y + r * out;
#define CASE(n) case n: forward(n, rest, w + k, to, columns, in, out); break;
        switch (rows - r) { CASES }
#undef CASE
    }
}

/* One vector of columns of `outs` rows of w, all rows of the batch: dx += dy w with w as it was; then
   w += factor dy^T x, or dw = dy^T x where dw is another matrix. */
INLINE void back(int outs, int wants_dx, int n_in, const float *dy, const float *x, const float *w, float *dw,
                 float *dx, float factor, int64_t rows, int64_t in, int64_t out) {
    vec old[8] = {0}, sums[8] = {0};
    UNROLL for (int n = 0; n < outs; n++)
        if (wants_dx || dw == w) old[n] = load_some(w + n * in, n_in);
    for (int64_t r = 0; r < rows; r++) {
        vec row = load_some(x + r * in, n_in), to = {0};
        if (wants_dx) to = load_some(dx + r * in, n_in);
        UNROLL for (int n = 0; n < outs; n++) {
            vec slope = splat(dy[r * out + n]);
            sums[n] += slope * row;
            if (wants_dx) to += slope * old[n];
        }
        if (wants_dx) store_some(dx + r * in, to, n_in);
    }
    UNROLL for (int n = 0; n < outs; n++) {
        vec made = dw == w ? old[n] + factor * sums[n] : sums[n];
        store_some(dw + n * in, made, n_in);
    }
}

INLINE void back_chunk(int outs, int wants_dx, int64_t columns, const float *dy, const float *x, const float *w,
                       float *dw, float *dx, float factor, int64_t rows, int64_t in, int64_t out) {
    int64_t k = 0;
    for (; k + VL <= columns; k += VL)
        back(outs, wants_dx, VL, dy, x + k, w + k, dw + k, dx + k, factor, rows, in, out);
    if (k < columns)
        back(outs, wants_dx, (int)(columns - k), dy, x + k, w + k, dw + k, dx + k, factor, rows, in, out);
}

INLINE void few_back(int wants_dx, int outs, const float *dy, const float *x, const float *w, float *dw,
                        float *dx, float factor, int64_t rows, int64_t in, int64_t out) {
    int64_t step = chunk_of(in) / 2 + VL;
    step -= step % VL;
    for (int64_t k = 0; k < in; k += step) {
        int64_t columns = in - k < step ? in - k : step, n = 0;
        for (; n + outs <= out; n += outs)
            back_chunk(outs, wants_dx, columns, dy + n, x + k, w + n * in + k, dw + n * in + k, dx + k, factor,
                       rows, in, out);
        for (; n < out; n++)
            back_chunk(1, wants_dx, columns, dy + n, x + k, w + n * in + k, dw + n * in + k, dx + k, factor,
                       rows, in, out);
    }
}

/* Sums over k of a[i * row + k * next] * panel[k][...] for `rows` <= TILE rows i and two vectors. */
INLINE void tile(int rows, const float *a, int64_t row, int64_t next, const float *panel, int64_t depth,
                 vec sums[TILE][2]) {
    UNROLL for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vec){0};
    for (int64_t k = 0; k < depth; k++, a += next, panel += 2 * VL) {
        vec left = load(panel), right = load(panel + VL);
        UNROLL for (int i = 0; i < rows; i++) {
            vec by = splat(a[i * row]);
            sums[i][0] += by * left;
            sums[i][1] += by * right;
        }
    }
}

INLINE void tile_to(int rows, const float *a, int64_t row, int64_t next, const float *panel, int64_t depth,
                    float factor, float *c, int64_t stride, int n) {
    vec sums[TILE][2];
    tile(rows, a, row, next, panel, depth, sums);
    UNROLL for (int i = 0; i < rows; i++, c += stride) {
        if (n == 2 * VL) {
            store(c, load(c) + factor * sums[i][0]);
            store(c + VL, load(c + VL) + factor * sums[i][1]);
        } else {
            int first = n < VL ? n : VL, second = n - first;
            store_part(c, load_part(c, first) + factor * sums[i][0], first);
            store_part(c + VL, load_part(c + VL, second) + factor * sums[i][1], second);
        }
    }
}

/* A function for each number of rows, so that the compiler gives each its own registers. */
#define TILE_OF(m)                                                                                              \
    static __attribute__((noinline)) void tile_##m(const float *a, int64_t row, int64_t next,                 \
                                                   const float *panel, int64_t depth, float factor, float *c, \
                                                   int64_t stride, int n) {                                     \
        tile_to(m, a, row, next, panel, depth, factor, c, stride, n);                                           \
    }
TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5)
#if TILE > 5
TILE_OF(6) TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10)
#endif
static void (*const tiles[])(const float *, int64_t, int64_t, const float *, int64_t, float, float *, int64_t,
                             int) = {
    0, tile_1, tile_2, tile_3, tile_4, tile_5,
#if TILE > 5
    tile_6, tile_7, tile_8, tile_9, tile_10,
#endif
};

#define DEPTH 256 /* of a panel: it stays in the first-level cache */

/* c [rows, columns] += factor * a b, where a[i, k] = a[i * row + k * next], b[k, j] = b[k * down + j * across];
   one of `down` and `across` is 1. */
static void product(const float *a, int64_t row, int64_t next, const float *b, int64_t down, int64_t across,
                    float factor, float *c, int64_t rows, int64_t depth, int64_t columns) {
    float panel[DEPTH * 2 * VL];
    for (int64_t top = 0; top < depth; top += DEPTH) {
        int64_t deep = depth - top < DEPTH ? depth - top : DEPTH;
        for (int64_t j = 0; j < columns; j += 2 * VL) {
            int n = (int)(columns - j < 2 * VL ? columns - j : 2 * VL);
            const float *from = b + top * down + j * across;
            if (n < 2 * VL) memset(panel, 0, sizeof panel);
            if (across == 1)
                for (int64_t k = 0; k < deep; k++) memcpy(panel + k * 2 * VL, from + k * down, 4 * (size_t)n);
            else
                for (int64_t l = 0; l < n; l++)
                    for (int64_t k = 0; k < deep; k++) panel[k * 2 * VL + l] = from[k + l * across];
            for (int64_t r = 0; r < rows; r += TILE)
                tiles[rows - r < TILE ? rows - r : TILE](a + top * next + r * row, row, next, panel, deep, factor,
                                                         c + r * columns + j, columns, n);
        }
    }
}

/* x [clients, rows, in], w [clients, out, in], b [clients, out] or NULL -> y [clients, rows, out], through a
   ReLU if wanted. */
void linear_forward(const float *x, const float *w, const float *b, float *y, int64_t relu, int64_t clients,
                    int64_t rows, int64_t in, int64_t out) {
    for (int64_t c = 0; c < clients; c++, x += rows * in, w += out * in, y += rows * out) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t n = 0; n < out; n++) y[r * out + n] = b ? b[c * out + n] : 0;
        if (rows < MANY) few_forward(x, w, y, rows, in, out);
        else product(x, in, 1, w, 1, in, 1, y, rows, in, out);
        if (relu)
            for (int64_t i = 0; i < rows * out; i++) y[i] = y[i] <= 0 ? 0 : y[i]; /* NaN stays */
    }
}

/* dy [clients, rows, out] -> dx [clients, rows, in], unless it is NULL, and dw = dy^T x, db = sum of dy unless
   NULL. With `factor` [clients] and w itself as dw, w += factor dw; dx is of w as it was. relu: x comes from a
   ReLU, so dx is 0 where x is. */
void linear_backward(const float *dy, const float *x, float *w, float *dw, float *db, float *dx,
                     const float *factor, int64_t relu, int64_t clients, int64_t rows, int64_t in, int64_t out) {
    for (int64_t c = 0; c < clients; c++, dy += rows * out, x += rows * in, w += out * in, dw += out * in) {
        float by = factor ? factor[c] : 1, *to = dx ? dx + c * rows * in : 0;
        if (to) memset(to, 0, sizeof(float) * (size_t)(rows * in));
        if (db) {
            float *sums = db + c * out;
            memset(sums, 0, sizeof(float) * (size_t)out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t n = 0; n < out; n++) sums[n] += dy[r * out + n];
        }
        if (rows < MANY) {
            if (to) few_back(1, 4, dy, x, w, dw, to, by, rows, in, out);
            else few_back(0, 8, dy, x, w, dw, 0, by, rows, in, out);
        } else {
            if (to) product(dy, out, 1, w, in, 1, 1, to, rows, out, in);
            if (dw != w) memset(dw, 0, sizeof(float) * (size_t)(out * in));
            product(dy, 1, out, x, in, 1, by, dw, out, rows, in);
        }
        for (int64_t i = 0; to && relu && i < rows * in; i++) to[i] = x[i] <= 0 ? 0 : to[i];
    }
}
