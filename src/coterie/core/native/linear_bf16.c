/* linear.c with bfloat16: what is multiplied is rounded to it, everything else is float32.

   Few rows: w is read where it lies, rounded in registers. On the way forward pairs are of neighbours in a
   row; back, they are of neighbours in a column: of two rows of the batch for the gradient of w, of two rows
   of w for that of x. Many rows: both factors are packed into pairs first. */
#ifdef __AVX512BF16__
#define BF16
#include "factors.h"
#include "product.h"

#define MANY 48 /* rows from which packing pays */
#define CHUNK 512 /* columns at a time, so that all rows of them stay in the first-level cache */
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10)

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
    const int64_t step = 2 * CHUNK, x_row = round_up(places(in), VL);
    pack_rows(x, rows, in, VL, scratch);
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
            const vec by = spread(dy + r * places(out) + n / 2);
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
    for (int64_t r = 0; r < places(rows); r++) {
        vec row[2];
        UNROLL for (int v = 0; v < vecs; v++) row[v] = load(x + r * round_up(in, VL) + v * VL);
        UNROLL for (int n = 0; n < outs; n++) {
            const vec by = spread(dy + r * round_up(out, VL) + n);
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

/* Some columns of `outs` rows of w, all rows of the batch; dx is of w as it was. x: pairs of rows; dy: pairs
   of rows and pairs of outs. One vector of columns may be in part. */
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
            back_x(5, outs, vecs, some, dy_outs + r * places(out), pairs, dx + r * in, in, out);
        for (; r < rows; r++)
            back_x(1, outs, vecs, some, dy_outs + r * places(out), pairs, dx + r * in, in, out);
    }
    for (int n = 0; n < outs; n += 8)
        back_w(outs < 8 ? outs : 8, vecs, some, dy_rows + n, x, w + n * in, dw + n * in, factor, rows, in,
               out);
}

static void few_back(const float *dy, const float *x, const float *w, float *dw, float *dx, float factor,
                     float *scratch, int64_t rows, int64_t in, int64_t out) {
    float *x_rows = scratch, *dy_rows = x_rows + places(rows) * round_up(in, VL);
    float *dy_outs = dy_rows + places(rows) * round_up(out, VL);
    pack_panels(x, rows, in, round_up(in, VL), 0, x_rows);
    pack_panels(dy, rows, out, round_up(out, VL), 0, dy_rows);
    if (dx) pack_rows(dy, rows, out, 1, dy_outs);
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

/* c = start + factor * (a b), finished, of packed a[i * row + k * next] and panels b [panel][depth][WIDE];
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
    const int64_t wide_in = round_up(in, WIDE), wide_out = round_up(out, WIDE), pairs = places(rows);
    const int64_t forward = (rows + wide_out + VL) * wide_in / 2, by_w = (rows + wide_in) * wide_out / 2;
    const int64_t by_rows = pairs * (wide_in + wide_out) + (rows < MANY ? rows * wide_out : 0);
    const int64_t back = by_w > by_rows ? by_w : by_rows;
    return forward > back ? forward : back;
}

/* As linear_forward, with scratch of as many floats as linear_scratch_bf16 says. */
void linear_forward_bf16(const float *x, const float *w, const float *b, float *y, float *slope,
                         float *scratch, int64_t what, int64_t clients, int64_t rows, int64_t in, int64_t out) {
    float *panels = scratch + rows * places(in), *spare = panels + round_up(out, WIDE) * places(in);
    for (int64_t c = 0; c < clients; c++, x += rows * in, w += out * in, y += rows * out) {
        const float *start = b ? b + c * out : 0;
        float *to = slope ? slope + c * rows * out : 0;
        if (rows < MANY) {
            for (int64_t r = 0; r < rows; r++)
                for (int64_t n = 0; n < out; n++) y[r * out + n] = b ? start[n] : 0;
            few_forward(x, w, y, scratch, rows, in, out);
            finish(what, y, to, rows, out, out);
        } else {
            pack_rows(x, rows, in, 1, scratch);
            pack_turned(w, out, in, panels, spare);
            packed_product(scratch, places(in), 1, panels, 1, start, y, rows, places(in), out, what, to);
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
            float *panels = scratch + rows * places(out);
            pack_rows(dy, rows, out, 1, scratch);
            pack_panels(w, out, in, WIDE, places(out), panels);
            packed_product(scratch, places(out), 1, panels, 1, 0, to, rows, places(out), in, what, other);
        }
        float *panels = scratch + places(rows) * round_up(out, VL);
        pack_panels(dy, rows, out, round_up(out, VL), 0, scratch);
        pack_panels(x, rows, in, WIDE, places(rows), panels);
        packed_product(scratch, 1, round_up(out, VL), panels, by, dw == w ? w : 0, dw, out, places(rows), in,
                       NOTHING, 0);
    }
}
#endif
