/* Linear layers, y = x w^T + b and what goes back, each client with its own w [out, in].

   Few rows: a general matrix product copies w into an order of its own first, which with ten rows costs more
   than the product; here w is read where it lies, once on the way forward and once back.
   Many rows: a general product with tiles of TILE rows by two vectors, in product.h. */
#include "product.h"

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

/* x [clients, rows, in], w [clients, out, in], b [clients, out] or NULL -> y [clients, rows, out], finished;
   slope: of GELU, like y. */
void linear_forward(const float *x, const float *w, const float *b, float *y, float *slope, int64_t what,
                    int64_t clients, int64_t rows, int64_t in, int64_t out) {
    for (int64_t c = 0; c < clients; c++, x += rows * in, w += out * in, y += rows * out) {
        const float *start = b ? b + c * out : 0;
        float *to = slope ? slope + c * rows * out : 0;
        if (rows < MANY) {
            for (int64_t r = 0; r < rows; r++)
                for (int64_t n = 0; n < out; n++) y[r * out + n] = b ? start[n] : 0;
            few_forward(x, w, y, rows, in, out);
            finish(what, y, to, rows, out, out);
        } else product(x, in, 1, w, 1, in, 1, start, y, rows, in, out, what, to);
    }
}

/* dy [clients, rows, out] -> dx [clients, rows, in], unless it is NULL, and dw = dy^T x, db = sum of dy unless
   NULL. With `factor` [clients] and w itself as dw, w += factor dw; dx is of w as it was. dx is finished, with
   the slope of what x comes from, like x; where that is NULL, with x. */
void linear_backward(const float *dy, float *x, float *w, float *slope, float *dw, float *db, float *dx,
                     const float *factor, int64_t what, int64_t clients, int64_t rows, int64_t in, int64_t out) {
    for (int64_t c = 0; c < clients; c++, dy += rows * out, x += rows * in, w += out * in, dw += out * in) {
        float by = factor ? factor[c] : 1, *to = dx ? dx + c * rows * in : 0;
        float *other = slope ? slope + c * rows * in : x;
        if (db) {
            float *sums = db + c * out;
            memset(sums, 0, sizeof(float) * (size_t)out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t n = 0; n < out; n++) sums[n] += dy[r * out + n];
        }
        if (rows < MANY) {
            if (to) memset(to, 0, sizeof(float) * (size_t)(rows * in));
            if (to) few_back(1, 4, dy, x, w, dw, to, by, rows, in, out);
            else few_back(0, 8, dy, x, w, dw, 0, by, rows, in, out);
            if (to) finish(what, to, other, rows, in, in);
        } else {
            if (to) product(dy, out, 1, w, in, 1, 1, 0, to, rows, out, in, what, other);
            product(dy, 1, out, x, in, 1, by, dw == w ? dw : 0, dw, out, rows, in, NOTHING, 0);
        }
    }
}
