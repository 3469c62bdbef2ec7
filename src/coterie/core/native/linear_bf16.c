/* linear.c with bfloat16: what is multiplied is rounded to it, everything else is float32.

   Few rows: w is read where it lies, and rounded in registers. On the way forward pairs are of neighbours in a
   row; back, they are of neighbours in a column: of two rows of the batch for the gradient of w, of two rows
   of w for that of x. Many rows: both factors are packed into pairs first. */
#ifdef __AVX512BF16__
#define BF16
#include "product.h"

#define MANY 48 /* rows from which packing pays */
#define WIDE (2 * VL) /* columns of a panel */
#define CHUNK 512 /* columns at a time, so that all rows of them stay in the first-level cache */
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10)

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t half(int64_t n) { return (n + 1) / 2; }
INLINE int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
INLINE int left(int64_t n) { return n >= VL ? VL : n > 0 ? (int)n : 0; }

/* Pairs of neighbours in a row: to[r][k] = (from[r][2 k], from[r][2 k + 1]), and zeros up to `stride`. */
static void narrow_rows(const float *from, int64_t rows, int64_t n, float *to, int64_t stride) {
    for (int64_t r = 0; r < rows; r++, from += n, to += stride) {
        narrow_row(from, n, to);
        memset(to + half(n), 0, 4 * (size_t)(stride - half(n)));
    }
}

/* Pairs of two rows, in panels of `wide` columns: to[panel][k][c] = (from[2 k][c], from[2 k + 1][c]). */
static void pair_rows(const float *from, int64_t rows, int64_t columns, float *to, int64_t wide) {
    for (int64_t k = 0; k < rows; k += 2)
        for (int64_t c = 0; c < whole(columns, wide); c += VL) {
            const float *p = from + k * columns + c;
            const int n = left(columns - c);
            store(to + c / wide * wide * half(rows) + k / 2 * wide + c % wide,
                  pair(load_part(p, n), load_part(p + columns, k + 1 < rows ? n : 0)));
        }
}

/* Pairs of neighbours in a row that become a column: to[panel][k][r] = (from[r][2 k], from[r][2 k + 1]). */
static void turn_rows(const float *from, int64_t rows, int64_t n, float *to, float *spare) {
    for (int64_t r = 0; r < rows; r += VL) {
        narrow_rows(from + r * n, left(rows - r), n, spare, half(n));
        transpose(spare, half(n), left(rows - r), half(n), to + r / WIDE * WIDE * half(n) + r % WIDE, WIDE);
    }
}

/* ---- few rows ---- */

/* rows x outs dot products over the columns given; y[r][n] += them. */
INLINE void dots(int rows, int outs, const float *x, int64_t x_row, const float *w, float *y, int64_t columns,
                 int64_t in, int64_t out) {
    vec sums[TILE][2] = {0};
    for (int64_t k = 0; k < columns; k += 2 * VL) {
        vec right[2];
        UNROLL for (int n = 0; n < outs; n++) {
            const float *from = w + n * in + k;
            right[n] = columns - k >= 2 * VL ? narrow(load(from), load(from + VL))
                                             : narrow(load_part(from, left(columns - k)),
                                                      load_part(from + VL, left(columns - k - VL)));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const vec row = load(x + r * x_row + k / 2);
            UNROLL for (int n = 0; n < outs; n++) sums[r][n] = dot(sums[r][n], row, right[n]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < outs; n++) y[r * out + n] += sum(sums[r][n]);
}

INLINE void forward(int rows, const float *x, int64_t x_row, const float *w, float *y, int64_t columns,
                    int64_t in, int64_t out) {
    int64_t n = 0;
    for (; n + 2 <= out; n += 2) dots(rows, 2, x, x_row, w + n * in, y + n, columns, in, out);
    if (n < out) dots(rows, 1, x, x_row, w + n * in, y + n, columns, in, out);
}

/* y += x w^T */
static void few_forward(const float *x, const float *w, float *y, float *scratch, int64_t rows, int64_t in,
                        int64_t out) {
    const int64_t step = 2 * CHUNK, x_row = whole(in, 2 * VL) / 2;
    narrow_rows(x, rows, in, scratch, x_row);
    for (int64_t k = 0; k < in; k += step)
        for (int64_t r = 0; r < rows; r += TILE) {
            const float *from = scratch + r * x_row + k / 2;
            float *to = y + r * out;
            const int64_t columns = smaller(step, in - k);
#define CASE(n) case n: forward(n, from, x_row, w + k, to, columns, in, out); break;
            switch (smaller(TILE, rows - r)) { CASES }
#undef CASE
        }
}

/* dx += dy w for some rows at once, so that none has to wait for its sum. */
INLINE void back_x(int rows, int outs, int vecs, int some, const float *dy, vec pairs[8][2], float *dx,
                   int64_t in, int64_t out) {
    vec sums[5][2];
    float *to = dx;
    UNROLL for (int r = 0; r < rows; r++, to += in) {
        ONE_POINTER(to);
        UNROLL for (int v = 0; v < vecs; v++) sums[r][v] = load_some(to + v * VL, some);
    }
    UNROLL for (int n = 0; n < outs; n += 2)
        UNROLL for (int r = 0; r < rows; r++) {
            const vec by = spread(dy + r * half(out) + n / 2);
            UNROLL for (int v = 0; v < vecs; v++) sums[r][v] = dot(sums[r][v], by, pairs[n / 2][v]);
        }
    UNROLL for (int r = 0; r < rows; r++, dx += in) {
        ONE_POINTER(dx);
        UNROLL for (int v = 0; v < vecs; v++) store_some(dx + v * VL, sums[r][v], some);
    }
}

/* w += factor dy^T x, or dw = dy^T x where dw is another matrix. */
INLINE void back_w(int outs, int vecs, int some, const float *dy, const float *x, const float *w, float *dw,
                   float factor, int64_t rows, int64_t in, int64_t out) {
    vec sums[8][2] = {0};
    for (int64_t r = 0; r < half(rows); r++) {
        vec row[2];
        UNROLL for (int v = 0; v < vecs; v++) row[v] = load(x + r * whole(in, VL) + v * VL);
        UNROLL for (int n = 0; n < outs; n++) {
            const vec by = spread(dy + r * whole(out, VL) + n);
            UNROLL for (int v = 0; v < vecs; v++) sums[n][v] = dot(sums[n][v], by, row[v]);
        }
    }
    const int steps = dw == w;
    UNROLL for (int n = 0; n < outs; n++, dw += in) {
        ONE_POINTER(dw);
        UNROLL for (int v = 0; v < vecs; v++) {
            vec made = sums[n][v];
            if (steps) made = load_some(dw + v * VL, some) + factor * made;
            store_some(dw + v * VL, made, some);
        }
    }
}

/* Some columns of `outs` rows of w, all rows of the batch; dx is of w as it was. x: pairs of rows; dy: pairs of
   rows and pairs of outs. One vector of columns may be in part. */
INLINE void back(int outs, int vecs, int some, const float *dy_rows, const float *dy_outs, const float *x,
                 const float *w, float *dw, float *dx, float factor, int64_t rows, int64_t in, int64_t out) {
    if (dx) {
        vec pairs[8][2];
        const float *row = w;
        UNROLL for (int n = 0; n < outs; n += 2, row += 2 * in) {
            ONE_POINTER(row);
            UNROLL for (int v = 0; v < vecs; v++) {
                vec second = {0};
                if (n + 1 < outs) second = load_some(row + in + v * VL, some);
                pairs[n / 2][v] = pair(load_some(row + v * VL, some), second);
            }
        }
        int64_t r = 0;
        for (; r + 5 <= rows; r += 5)
            back_x(5, outs, vecs, some, dy_outs + r * half(out), pairs, dx + r * in, in, out);
        for (; r < rows; r++)
            back_x(1, outs, vecs, some, dy_outs + r * half(out), pairs, dx + r * in, in, out);
    }
    for (int n = 0; n < outs; n += 8)
        back_w(outs < 8 ? outs : 8, vecs, some, dy_rows + n, x, w + n * in, dw + n * in, factor, rows, in, out);
}

static void few_back(const float *dy, const float *x, const float *w, float *dw, float *dx, float factor,
                     float *scratch, int64_t rows, int64_t in, int64_t out) {
    float *x_rows = scratch, *dy_rows = x_rows + half(rows) * whole(in, VL);
    float *dy_outs = dy_rows + half(rows) * whole(out, VL);
    pair_rows(x, rows, in, x_rows, whole(in, VL));
    pair_rows(dy, rows, out, dy_rows, whole(out, VL));
    if (dx) narrow_rows(dy, rows, out, dy_outs, half(out));
    for (int64_t k = 0; k < in; k += CHUNK)
        for (int64_t n = 0, outs; n < out; n += outs) {
            const int64_t end = smaller(in, k + CHUNK);
            outs = out - n >= 16 ? 16 : out - n >= 8 ? 8 : out - n >= 2 ? 2 : 1;
#define BACK(outs, vecs, some)                                                                               \
    back(outs, vecs, some, dy_rows + n, dy_outs + n / 2, x_rows + i, w + n * in + i, dw + n * in + i,        \
         dx ? dx + i : 0, factor, rows, in, out)
#define ACROSS(outs)                                                                                         \
    for (; i + 2 * VL <= end; i += 2 * VL) BACK(outs, 2, VL);                                                \
    for (; i < end; i += VL) BACK(outs, 1, left(end - i));
            int64_t i = k;
            switch (outs) {
            case 16: ACROSS(16) break;
            case 8: ACROSS(8) break;
            case 2: ACROSS(2) break;
            default: ACROSS(1)
            }
        }
}

/* ---- many rows ---- */

#define DEEP_AT_ONCE 128 /* pairs of a panel that stay in the first-level cache */

/* c = start + factor * (a b), finished, for packed a[i * row + k * next] and panels of b [panel][depth][WIDE];
   start: c itself, or a row, or NULL for zeros. */
static void packed_product(const float *a, int64_t row, int64_t next, const float *b, float factor,
                           const float *start, float *c, int64_t rows, int64_t depth, int64_t columns,
                           int64_t what, float *other) {
    for (int64_t top = 0; top < depth; top += DEEP_AT_ONCE) {
        const int64_t deep = smaller(DEEP_AT_ONCE, depth - top), own = top || start == c ? columns : 0;
        const float *from = own ? c : start;
        for (int64_t j = 0; j < columns; j += WIDE)
            for (int64_t r = 0; r < rows; r += TILE) {
                const int some = (int)smaller(TILE, rows - r), n = (int)smaller(WIDE, columns - j);
                const int64_t place = r * columns + j;
                tiles[some](a + top * next + r * row, row, next, b + j * depth + top * WIDE, deep, factor,
                            from ? from + r * own + j : zeros, own, c + place, columns, n);
                if (top + deep == depth) finish(what, c + place, other ? other + place : 0, some, n, columns);
            }
    }
}

int64_t linear_scratch_bf16(int64_t rows, int64_t in, int64_t out) {
    const int64_t wide_in = whole(in, WIDE), wide_out = whole(out, WIDE), pairs = half(rows);
    const int64_t forward = (rows + wide_out + VL) * wide_in / 2, by_w = (rows + wide_in) * wide_out / 2;
    const int64_t by_rows = pairs * (wide_in + wide_out) + (rows < MANY ? rows * wide_out : 0);
    const int64_t back = by_w > by_rows ? by_w : by_rows;
    return forward > back ? forward : back;
}

/* As linear_forward, with scratch of as many floats as linear_scratch_bf16 says. */
void linear_forward_bf16(const float *x, const float *w, const float *b, float *y, float *slope, float *scratch,
                         int64_t what, int64_t clients, int64_t rows, int64_t in, int64_t out) {
    float *panels = scratch + rows * half(in), *spare = panels + whole(out, WIDE) * half(in);
    for (int64_t c = 0; c < clients; c++, x += rows * in, w += out * in, y += rows * out) {
        const float *start = b ? b + c * out : 0;
        float *to = slope ? slope + c * rows * out : 0;
        if (rows < MANY) {
            for (int64_t r = 0; r < rows; r++)
                for (int64_t n = 0; n < out; n++) y[r * out + n] = b ? start[n] : 0;
            few_forward(x, w, y, scratch, rows, in, out);
            finish(what, y, to, rows, out, out);
        } else {
            narrow_rows(x, rows, in, scratch, half(in));
            turn_rows(w, out, in, panels, spare);
            packed_product(scratch, half(in), 1, panels, 1, start, y, rows, half(in), out, what, to);
        }
    }
}

/* As linear_backward, likewise. */
void linear_backward_bf16(const float *dy, float *x, float *w, float *slope, float *dw, float *db, float *dx,
                          const float *factor, float *scratch, int64_t what, int64_t clients, int64_t rows,
                          int64_t in, int64_t out) {
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
            few_back(dy, x, w, dw, to, by, scratch, rows, in, out);
            if (to) finish(what, to, other, rows, in, in);
            continue;
        }
        if (to) {
            float *panels = scratch + rows * half(out);
            narrow_rows(dy, rows, out, scratch, half(out));
            pair_rows(w, out, in, panels, WIDE);
            packed_product(scratch, half(out), 1, panels, 1, 0, to, rows, half(out), in, what, other);
        }
        float *panels = scratch + half(rows) * whole(out, VL);
        pair_rows(dy, rows, out, scratch, whole(out, VL));
        pair_rows(x, rows, in, panels, WIDE);
        packed_product(scratch, 1, whole(out, VL), panels, by, dw == w ? w : 0, dw, out, half(rows), in, NOTHING, 0);
    }
}
#endif
