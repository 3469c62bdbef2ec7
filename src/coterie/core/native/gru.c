/* A GRU for clients with weights of their own, forward and back through time; the input's part included.

   Row (t, b) of a client's sequence is number t * step + b * row of it: time or batch comes first, as the
   caller likes. Weights are packed into panels of WIDE columns, [k][WIDE], and a panel times some rows is
   done in registers; what stands beyond the last column, and what comes of it, nobody looks at. `scratch` has
   12 * S * (P + rows + 80) floats, where P is `size` rounded up to 32, and S is P + `in` rounded up to 32. */
#include "tile.h"

#define HELD 80 /* rows whose share of the gradient of the weights is summed up at once */

typedef uint32_t bits __attribute__((vector_size(4 * VL)));

/* e^x - 1 within about 1 ulp: 2^k (e^r - 1) + (2^k - 1), |r| <= ln(2) / 2, e^r by its polynomial of degree 6
 * (Chebyshev). x is kept within +-88, where a sigmoid has long been 0 or 1; NaN stays NaN. */
INLINE vec exp_less_1(vec x) {
    x = greater(splat(-88), lesser(splat(88), x));
    vec shifted = x * 0x1.715476p+0f + 0x1.8p+23f; /* k is in the low bits of its fraction */
    vec k = shifted - 0x1.8p+23f, r = x - k * 0x1.63p-1f + k * 0x1.bd0106p-13f; /* ln(2) in two parts */
    vec scale = (vec)(((bits)shifted << 23) + 0x3f800000u);
    vec p = splat(0x1.6d4328p-10f);
    p = p * r + 0x1.120b74p-7f;
    p = p * r + 0x1.5554eap-5f;
    p = p * r + 0x1.5554dcp-3f;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    return scale * p + (scale - 1);
}
INLINE vec sigmoid(vec x) { return 1 / (2 + exp_less_1(-x)); }
INLINE vec hyperbolic(vec x) {
    vec e = exp_less_1(2 * x);
    return e / (2 + e);
}

/* Ask for memory that the next step will need: it is in no near cache, and this step still has much to do. */
INLINE void fetch(const float *p, int64_t apart, int lines) {
    UNROLL for (int g = 0; g < lines; g++) __builtin_prefetch(p + g * apart, 0, 2);
}

/* x and w of the input, h and u of the state; a step's row of what is multiplied is [h, x]. */
static void forward(const float *x, const float *h, const float *w, const float *u, const float *w_bias,
                    const float *u_bias, float *hidden, float *gates, float *scratch, int64_t steps,
                    int64_t rows, int64_t in, int64_t size, int64_t step, int64_t row) {
    int64_t padded = round_up(size, WIDE), both = places(size) + places(in), one = padded * both;
    float *start = scratch + 3 * one, *made = start + 4 * padded; /* r, z, b_n, a_n; made [rows, 4, WIDE] */
    float *now = made + rows * 4 * WIDE, *spare = now + rows * both; /* [rows, both] */
    for (int64_t g = 0; g < 3; g++)
        for (int64_t p = 0; p < size; p += WIDE) {
            float *panel = scratch + g * one + p * both;
            int64_t columns = smaller(WIDE, size - p);
            pack_turned(u + (g * size + p) * size, columns, size, panel, spare);
            pack_turned(w + (g * size + p) * in, columns, in, panel + places(size) * WIDE, spare);
        }
    for (int64_t j = 0; j < size; j++) {
        start[j] = w_bias[j] + u_bias[j];
        start[padded + j] = w_bias[size + j] + u_bias[size + j];
        start[2 * padded + j] = u_bias[2 * size + j];
        start[3 * padded + j] = w_bias[2 * size + j];
    }
    for (int64_t t = 0; t < steps; t++) {
        const float *before = t ? hidden + (t - 1) * step * size : h;
        const int64_t apart = (t ? row : 1) * size;
        for (int64_t b = 0; b < rows; b++) {
            pack_row(before + b * apart, size, now + b * both);
            pack_row(x + (t * step + b * row) * in, in, now + b * both + places(size));
        }
        for (int64_t p = 0; p < padded; p += WIDE) {
            for (int64_t g = 0; g < 4; g++) {
                /* what part of [h, x] it is of */
                int64_t from = g < 3 ? 0 : places(size), to = g == 2 ? places(size) : both;
                const float *panel = scratch + (g < 3 ? g : 2) * one + p * both + from * WIDE;
                product(rows, 2, to - from, now + from, both, 1, panel, WIDE, start + g * padded + p, 0,
                        made + g * WIDE, 4 * WIDE);
            }
            for (int64_t j = p; j < p + WIDE && j < size; j += VL) {
                int n = left(size - j);
                for (int64_t b = 0; b < rows; b++) {
                    const float *mine = made + b * 4 * WIDE + (j - p);
                    float *to = gates + (t * rows + b) * 4 * size + j;
                    if (t + 1 < steps) fetch(to + rows * 4 * size, size, 4);
                    vec r = sigmoid(load(mine)), z = sigmoid(load(mine + WIDE)), bn = load(mine + 2 * WIDE);
                    vec new = hyperbolic(load(mine + 3 * WIDE) + r * bn);
                    vec after = new + z * (load_some(before + b * apart + j, n) - new);
                    store_some(to, r, n), store_some(to + size, z, n);
                    store_some(to + 2 * size, new, n), store_some(to + 3 * size, bn, n);
                    store_some(hidden + (t * step + b * row) * size + j, after, n);
                }
            }
        }
    }
}

/* Slopes of a row are kept as [b_n, r, z, n]: the first three are of U h, the last three of W x. */
static void backward(const float *dhidden, const float *hidden, const float *gates, const float *x,
                     const float *h, const float *w, const float *u, float *dx, float *dh, float *dw,
                     float *du, float *dw_bias, float *du_bias, float *scratch, int64_t steps, int64_t rows,
                     int64_t in, int64_t size, int64_t step, int64_t row) {
    int64_t padded = round_up(size, WIDE), padded_in = round_up(in, WIDE), next = 3 * padded;
    int64_t both = size + in, one = places(size), all = 3 * one;
    int64_t wide = 4 * size + 16; /* no power of 2, which would crowd a few sets of the cache */
    int64_t most = rows < HELD ? HELD / rows * rows : rows, held = 0;
    float *us = scratch, *ws = us + all * padded, *grown = ws + all * padded_in; /* grown [both, 3, padded] */
    float *carried = grown + both * next, *slopes = carried + rows * padded; /* [rows, padded] */
    float *states = slopes + most * wide, *made = states + most * both; /* [h, x] of each row; of dx */
    /* what is multiplied of them: with weights [rows, 4, one], with each other */
    float *across = DEEP == 1 ? slopes : made + most * WIDE, *slopes_down = slopes, *states_down = states;
    const int64_t far = DEEP == 1 ? wide : 4 * one;
    if (DEEP == 2) slopes_down = across + most * far, states_down = slopes_down + places(most) * wide + VL;
    for (int64_t g = 0; g < 3; g++) {
        pack_panels(u + (g + 2) % 3 * size * size, size, size, WIDE, all, us + g * one * WIDE);
        pack_panels(w + g * size * in, size, in, WIDE, all, ws + g * one * WIDE);
    }
    memset(grown, 0, 4 * (size_t)(both * next + rows * padded));
    memset(du_bias, 0, 12 * (size_t)size);
    memset(dw_bias, 0, 12 * (size_t)size);
    for (int64_t t = steps - 1; t >= 0; t--) {
        float *mine = slopes + held * wide, *state = states + held * both, *packed = across + held * far;
        for (int64_t b = 0; b < rows; b++)
            memcpy(state + b * both + size, x + (t * step + b * row) * in, 4 * (size_t)in);
        for (int64_t j = 0; j < size; j += VL) {
            int n = left(size - j);
            vec sums[4] = {};
            for (int64_t b = 0; b < rows; b++) {
                int64_t at = t * step + b * row;
                const float *from = gates + (t * rows + b) * 4 * size + j;
                if (t) fetch(from - rows * 4 * size, size, 4), fetch(dhidden + (at - step) * size + j, 0, 1);
                vec r = load_some(from, n), z = load_some(from + size, n);
                vec new = load_some(from + 2 * size, n), bn = load_some(from + 3 * size, n);
                vec before = load_some((t ? hidden + (at - step) * size : h + b * size) + j, n);
                vec d = load(carried + b * padded + j) + load_some(dhidden + at * size + j, n);
                vec dn = d * (1 - z) * (1 - new * new), dz = d * (before - new) * z * (1 - z);
                vec dr = dn * bn * r * (1 - r), dbn = dn * r;
                float *to = mine + b * wide + j;
                store_some(to, dbn, n), store_some(to + size, dr, n);
                store_some(to + 2 * size, dz, n), store_some(to + 3 * size, dn, n);
                store_some(state + b * both + j, before, n);
                store(carried + b * padded + j, d * z);
                sums[0] += dbn, sums[1] += dr, sums[2] += dz, sums[3] += dn;
            }
            UNROLL for (int g = 0; g < 3; g++) {
                float *of_u = du_bias + (g + 2) % 3 * size + j, *of_w = dw_bias + g * size + j;
                store_some(of_u, load_some(of_u, n) + sums[g], n);
                store_some(of_w, load_some(of_w, n) + sums[g + 1], n);
            }
        }
        for (int64_t b = 0; DEEP == 2 && b < rows; b++)
            for (int64_t g = 0; g < 4; g++)
                pack_row(mine + b * wide + g * size, size, packed + b * far + g * one);
        for (int64_t p = 0; p < padded; p += WIDE)
            product(rows, 2, all, packed, far, 1, us + p * all, WIDE, carried + p, padded, carried + p,
                    padded);
        held += rows;
        if (held < most && t) continue;
        if (DEEP == 2) {
            pack_panels(slopes, held, wide, wide, 0, slopes_down);
            pack_panels(states, held, both, both, 0, states_down);
        }
        for (int64_t g = 0; g < 4; g++)
            for (int64_t p = 0; p < padded; p += WIDE) {
                const float *panel = slopes_down + g * size + p;
                float *of_u = grown + g * padded + p, *of_w = grown + size * next + (g - 1) * padded + p;
                const int64_t deep = places(held);
                if (g < 3) product(size, 2, deep, states_down, 1, both, panel, wide, of_u, next, of_u, next);
                if (g > 0)
                    product(in, 2, deep, states_down + size, 1, both, panel, wide, of_w, next, of_w, next);
            }
        for (int64_t p = 0; dx && p < in; p += WIDE) {
            int vecs = in - p > VL ? 2 : 1;
            product(held, vecs, all, across + one, far, 1, ws + p * all, WIDE, 0, 0, made, WIDE);
            for (int64_t k = 0; k < held; k++) {
                int64_t at = (t + (held - rows) / rows - k / rows) * step + k % rows * row;
                memcpy(dx + at * in + p, made + k * WIDE, 4 * (size_t)(in - p < WIDE ? in - p : WIDE));
            }
        }
        held = 0;
    }
    for (int64_t b = 0; b < rows; b++) memcpy(dh + b * size, carried + b * padded, 4 * (size_t)size);
    for (int64_t g = 0; g < 3; g++) {
        transpose(grown + g * padded, next, size, size, du + (g + 2) % 3 * size * size, size);
        transpose(grown + size * next + g * padded, next, in, size, dw + g * size * in, in);
    }
}

/* x [clients, sequence, in], h [clients, rows, size], w [clients, 3 size, in], u [clients, 3 size, size] and
   their biases [clients, 3 size] -> hidden [clients, sequence, size]; and, of each step and row, r, z, n and
   b_n: gates [clients, steps, rows, 4 size]. */
void NAME(gru_forward)(const float *x, const float *h, const float *w, const float *u, const float *w_bias,
                 const float *u_bias, float *hidden, float *gates, float *scratch, int64_t clients,
                 int64_t steps, int64_t rows, int64_t in, int64_t size, int64_t step, int64_t row) {
    int64_t all = steps * rows, three = 3 * size;
    for (int64_t c = 0; c < clients; c++)
        forward(x + c * all * in, h + c * rows * size, w + c * three * in, u + c * three * size,
                w_bias + c * three, u_bias + c * three, hidden + c * all * size, gates + c * all * 4 * size,
                scratch, steps, rows, in, size, step, row);
}

/* dhidden [clients, sequence, size] and what gru_forward took and made -> the gradients of its inputs; that
   of x only where dx is not NULL. */
void NAME(gru_backward)(const float *dhidden, const float *hidden, const float *gates, const float *x,
                  const float *h, const float *w, const float *u, float *dx, float *dh, float *dw, float *du,
                  float *dw_bias, float *du_bias, float *scratch, int64_t clients, int64_t steps,
                  int64_t rows, int64_t in, int64_t size, int64_t step, int64_t row) {
    int64_t all = steps * rows, three = 3 * size;
    for (int64_t c = 0; c < clients; c++) {
        int64_t seen = c * all * size, given = c * all * in, first = c * rows * size;
        int64_t of_w = c * three * in, of_u = c * three * size, bias = c * three;
        backward(dhidden + seen, hidden + seen, gates + 4 * seen, x + given, h + first, w + of_w, u + of_u,
                 dx ? dx + given : 0, dh + first, dw + of_w, du + of_u, dw_bias + bias, du_bias + bias,
                 scratch, steps, rows, in, size, step, row);
    }
}
