/* Attention, softmax(scale Q K^T + mask) V in each head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), and
   the way back, which makes the scores again from the logarithms of their sums instead of keeping them (Dao et
   al. 2022, arXiv:2205.14135). A head's scores never leave the cache, nor is what the causal mask hides done. */
#include <math.h>

#include "tile.h"
#include "transpose.h"

#define HELD (4 * TILE) /* queries whose scores are held at once on the way back */

/* As ops.py lays it out: sizes, then the steps of client, batch, head and position in floats. */
typedef struct {
    int64_t clients, batch, heads, queries, keys, depth, values;
    int64_t q[4], k[4], v[4], out[4], mask[4], dout[4], dq[4], dk[4], dv[4];
} Layout;

INLINE int64_t padded(int64_t n) { return (n + VL - 1) / VL * VL; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at(const int64_t *steps, int64_t c, int64_t b, int64_t h) {
    return c * steps[0] + b * steps[1] + h * steps[2];
}

/* out [rows, padded(columns)] = by * from, dense. */
static void pack(const float *from, int64_t step, int64_t rows, int64_t columns, float by, float *out) {
    for (int64_t i = 0; i < rows; i++, from += step)
        for (int64_t j = 0; j < columns; j += VL, out += VL)
            store(out, by * load_some(from + j, (int)least(columns - j, VL)));
}
static void unpack(const float *from, int64_t rows, int64_t columns, float by, float *out, int64_t step) {
    for (int64_t i = 0; i < rows; i++, out += step)
        for (int64_t j = 0; j < columns; j += VL, from += VL)
            store_some(out + j, by * load(from), (int)least(columns - j, VL));
}

/* out [rows, columns] = (start +) x panel, all columns; x[i, k] as in `product`. */
static void wide(int64_t rows, int64_t depth, const float *x, int64_t x_i, int64_t x_k, const float *panel,
                 int64_t panel_k, const float *start, float *out, int64_t step, int64_t columns) {
    for (int64_t j = 0; j < columns; j += 2 * VL)
        product(rows, columns - j > VL ? 2 : 1, depth, x, x_i, x_k, panel + j, panel_k, start ? start + j : 0,
                start ? step : 0, out + j, step);
}

/* Ask for `rows` positions from i on, of which there are `all`, of the head after this one. */
INLINE void fetch(const float *x, const int64_t *steps, const Layout *the, int64_t c, int64_t b, int64_t h, int64_t i,
                  int64_t rows, int64_t all, int64_t columns) {
    if (++h == the->heads) h = 0, b++;
    if (b == the->batch) return;
    const float *from = x + at(steps, c, b, h) + i * steps[3];
    for (; rows > 0 && i < all; rows--, i++, from += steps[3])
        for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(from + j);
}

/* A vector of a query's scores from key j on: the mask added, and nothing seen from the n-th key on. */
INLINE vec counted(const float *scores, const float *more, int64_t j, int64_t n) {
    ivec lanes;
    UNROLL for (int l = 0; l < VL; l++) lanes[l] = l;
    vec made = load(scores + j);
    if (more && j < n) made += load_some(more + j, (int)least(n - j, VL));
    return j + VL <= n ? made : either(lanes < (int)(n - j), made, splat(-INFINITY));
}

/* How many keys a query sees. */
INLINE int64_t seen(int64_t query, int64_t keys, int64_t causal) {
    return causal ? least(query + 1, keys) : keys;
}

/* q, k, v [clients, batch, heads, positions, ...] by the layout; mask, added to the scores, or NULL -> out
   likewise, and the logarithms of the sums of exponentials [clients, batch, heads, queries]. A query that may
   see nothing gets zeros. */
void attention_forward(const float *q, const float *k, const float *v, const float *mask, float *out,
                       float *logs, const float *scale, float *scratch, int64_t causal, const Layout *the) {
    int64_t keys = the->keys, wide_keys = padded(keys), depth = the->depth, values = padded(the->values);
    float *turned = scratch, *packed = turned + depth * wide_keys, *scaled = packed + keys * values;
    float *scores = scaled + TILE * padded(depth), *mixed = scores + TILE * wide_keys;
    memset(turned, 0, sizeof(float) * (size_t)(depth * wide_keys)); /* beyond the last key, too */
    for (int64_t c = 0; c < the->clients; c++)
    for (int64_t b = 0; b < the->batch; b++)
    for (int64_t h = 0; h < the->heads; h++) {
        transpose(k + at(the->k, c, b, h), the->k[3], keys, depth, turned, wide_keys);
        pack(v + at(the->v, c, b, h), the->v[3], keys, the->values, 1, packed);
        for (int64_t i = 0; i < the->queries; i += TILE) {
            int64_t rows = least(TILE, the->queries - i), last = seen(i + rows - 1, keys, causal);
            pack(q + at(the->q, c, b, h) + i * the->q[3], the->q[3], rows, depth, *scale, scaled);
            wide(rows, depth, scaled, padded(depth), 1, turned, wide_keys, 0, scores, wide_keys, last);
            fetch(q, the->q, the, c, b, h, i, rows, the->queries, depth);
            fetch(k, the->k, the, c, b, h, i, rows, keys, depth);
            fetch(v, the->v, the, c, b, h, i, rows, keys, the->values);
            for (int64_t r = 0; r < rows; r++) {
                float *mine = scores + r * wide_keys, most = -INFINITY;
                const float *more = mask ? mask + at(the->mask, c, b, h) + (i + r) * the->mask[3] : 0;
                int64_t n = seen(i + r, keys, causal), j;
                vec top = splat(-INFINITY), sums = {0};
                for (j = 0; j < padded(last); j += VL) {
                    vec each = counted(mine, more, j, n);
                    store(mine + j, each);
                    top = greater(each, top);
                }
                for (int l = 0; l < VL; l++) most = top[l] > most ? top[l] : most;
                float base = most == -INFINITY ? 0 : most;
                for (j = 0; j < padded(last); j += VL) {
                    vec e = expv(load(mine + j) - base);
                    sums += e;
                    store(mine + j, e);
                }
                float total = sum(sums);
                int blind = most == -INFINITY && total == total; /* NaN is not hidden */
                logs[r] = blind ? INFINITY : base + logf(total);
                mixed[TILE * values + r] = blind ? 0 : 1 / total;
            }
            logs += rows;
            wide(rows, last, scores, wide_keys, 1, packed, values, 0, mixed, values, values);
            for (int64_t r = 0; r < rows; r++)
                unpack(mixed + r * values, 1, the->values, mixed[TILE * values + r],
                       out + at(the->out, c, b, h) + (i + r) * the->out[3], 0);
        }
    }
}

/* The gradients of q, k and v by the layout, from dout and what the way forward took and made. */
void attention_backward(const float *dout, const float *q, const float *k, const float *v, const float *mask,
                        const float *out, const float *logs, float *dq, float *dk, float *dv, const float *scale,
                        float *scratch, int64_t causal, const Layout *the) {
    int64_t keys = the->keys, wide_keys = padded(keys), depth = padded(the->depth), values = padded(the->values);
    float *turned_k = scratch, *turned_v = turned_k + depth * wide_keys, *packed = turned_v + values * wide_keys;
    float *grown_k = packed + keys * depth, *grown_v = grown_k + keys * depth;
    float *scaled = grown_v + keys * values, *slopes = scaled + HELD * depth, *made = slopes + HELD * values;
    float *p = made + HELD * depth, *ds = p + HELD * wide_keys;
    memset(turned_k, 0, sizeof(float) * (size_t)((depth + values) * wide_keys)); /* beyond the last key, too */
    for (int64_t c = 0; c < the->clients; c++)
    for (int64_t b = 0; b < the->batch; b++)
    for (int64_t h = 0; h < the->heads; h++, logs += the->queries) {
        transpose(k + at(the->k, c, b, h), the->k[3], keys, the->depth, turned_k, wide_keys);
        transpose(v + at(the->v, c, b, h), the->v[3], keys, the->values, turned_v, wide_keys);
        pack(k + at(the->k, c, b, h), the->k[3], keys, the->depth, 1, packed);
        memset(grown_k, 0, sizeof(float) * (size_t)(keys * (depth + values)));
        for (int64_t top = 0; top < the->queries; top += HELD) {
            int64_t held = least(HELD, the->queries - top), widest = seen(top + held - 1, keys, causal);
            pack(q + at(the->q, c, b, h) + top * the->q[3], the->q[3], held, the->depth, *scale, scaled);
            pack(dout + at(the->dout, c, b, h) + top * the->dout[3], the->dout[3], held, the->values, 1, slopes);
            for (int64_t i = 0; i < held; i += TILE) {
                int64_t rows = least(TILE, held - i), last = seen(top + i + rows - 1, keys, causal);
                wide(rows, the->depth, scaled + i * depth, depth, 1, turned_k, wide_keys, 0, p + i * wide_keys,
                     wide_keys, last);
                wide(rows, the->values, slopes + i * values, values, 1, turned_v, wide_keys, 0,
                     ds + i * wide_keys, wide_keys, last);
                fetch(q, the->q, the, c, b, h, top + i, rows, the->queries, the->depth);
                fetch(k, the->k, the, c, b, h, top + i, rows, keys, the->depth);
                fetch(v, the->v, the, c, b, h, top + i, rows, keys, the->values);
                fetch(out, the->out, the, c, b, h, top + i, rows, the->queries, the->values);
                fetch(dout, the->dout, the, c, b, h, top + i, rows, the->queries, the->values);
                for (int64_t r = i; r < i + rows; r++) {
                    int64_t n = seen(top + r, keys, causal), j;
                    float *mine = p + r * wide_keys, *to = ds + r * wide_keys;
                    const float *more = mask ? mask + at(the->mask, c, b, h) + (top + r) * the->mask[3] : 0;
                    const float *of = out + at(the->out, c, b, h) + (top + r) * the->out[3];
                    vec both = {0};
                    for (j = 0; j < the->values; j += VL)
                        both += load(slopes + r * values + j) * load_some(of + j, (int)least(the->values - j, VL));
                    float mean = sum(both);
                    for (j = 0; j < padded(last); j += VL) {
                        vec e = expv(counted(mine, more, j, n) - logs[top + r]);
                        store(mine + j, e);
                        store(to + j, e * (load(to + j) - mean));
                    }
                    for (; j < padded(widest); j += VL) store(mine + j, (vec){0}), store(to + j, (vec){0});
                }
                wide(rows, last, ds + i * wide_keys, wide_keys, 1, packed, depth, 0, made + i * depth, depth,
                     depth);
            }
            unpack(made, held, the->depth, *scale, dq + at(the->dq, c, b, h) + top * the->dq[3], the->dq[3]);
            for (int64_t j = 0; j < widest; j += TILE) {
                int64_t some = least(TILE, widest - j), first = causal && j > top ? j - top : 0;
                const float *of = p + first * wide_keys + j, *slope = ds + first * wide_keys + j;
                wide(some, held - first, slope, 1, wide_keys, scaled + first * depth, depth, grown_k + j * depth,
                     grown_k + j * depth, depth, depth);
                wide(some, held - first, of, 1, wide_keys, slopes + first * values, values, grown_v + j * values,
                     grown_v + j * values, values, values);
            }
        }
        unpack(grown_k, keys, the->depth, 1, dk + at(the->dk, c, b, h), the->dk[3]);
        unpack(grown_v, keys, the->values, 1, dv + at(the->dv, c, b, h), the->dv[3]);
    }
}

/* Floats of scratch that either needs. */
int64_t attention_scratch(const Layout *the) {
    int64_t keys = padded(the->keys), each = padded(the->depth) + padded(the->values);
    return (3 * keys + 2 * HELD) * each + 2 * HELD * keys + TILE + VL;
}
