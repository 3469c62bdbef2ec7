/* Convolution, bias, ReLU and max-pooling in one, for many clients that each have weights of their own.

   Forward: the channels of the output lie in the lanes of vectors; registers hold a tile of pixels of a row.
   Backward: only the winners of the pooling have a gradient (with ReLU, only the positive ones), so the sums
   run over lists of winners instead of over all pixels: a quarter of the work for a 2 x 2 pool.

   x [clients, batch, H, W, in], w [clients, out, kh, kw, in], b [clients, out] or NULL,
   y, at [clients, batch, PH, PW, out]. at: the pixel oh * OW + ow of the convolution's output that won; -1
   where the ReLU made it 0. The convolution pads with zeros, the pool not at all; there must be at least one
   window. Scratch: as many floats as conv_pool_scratch says, for either function. dx, db may be NULL. */
#include "factors.h"

#if defined(__AVX512F__)
#define PIXELS 14 /* in a tile of the forward: times two vectors of channels */
#define SUMS 25 /* accumulators in a tile of the backward */
#else
#define PIXELS 6
#define SUMS 12
#endif
#define TERMS (PIXELS - 1) /* in a tile of the backward of a first layer, times two vectors of channels */
#define MAX_DENSE 32 /* terms that it may have */
#define MAX_ROWS 5 /* a tile of the backward has at most so many rows of the kernel and */
#define MAX_VECS 10 /* vectors in each */
#define NEAR 6144 /* floats that should stay in the first cache */

#define SIZES                                                                                                \
    int64_t clients, int64_t batch, int64_t H, int64_t W, int64_t in, int64_t out, int64_t kh, int64_t kw,   \
        int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t pool_h, int64_t pool_w,    \
        int64_t pool_stride_h, int64_t pool_stride_w, int64_t relu
#define GIVEN                                                                                                \
    clients, batch, H, W, in, out, kh, kw, stride_h, stride_w, pad_h, pad_w, pool_h, pool_w, pool_stride_h,  \
        pool_stride_w, relu

typedef struct {
    int64_t clients, batch, H, W, in, out, kh, kw, stride_h, stride_w, pad_h, pad_w, pool_h, pool_w,
        pool_stride_h, pool_stride_w, relu;
    int64_t K; /* inputs of one output: kh * kw * in */
    int64_t height, width; /* of the padded image */
    int64_t OH, OW, PH, PW; /* of the convolution's output, of the pooled one */
    int64_t used; /* rows of the convolution's output that some window covers */
    int64_t lanes; /* out, rounded up to whole vectors */
} Shape;

/* A patch of a padded image as rows of contiguous floats. The image lies in blocks of `depth` channels. */
typedef struct {
    int64_t depth, blocks, block; /* channels in a block, blocks, floats from one block to the next */
    int64_t rows, length, vecs; /* rows of a patch; floats and vectors in one */
    int64_t pixel, stride; /* floats to the next pixel (patch), to the next row of the image */
} Patches;

INLINE int64_t whole(int64_t n) { return round_up(n, VL); }

static Shape shape_of(SIZES) {
    Shape s = {GIVEN, .K = 0};
    s.K = kh * kw * in;
    s.height = H + 2 * pad_h, s.width = W + 2 * pad_w;
    s.OH = (s.height - kh) / stride_h + 1, s.OW = (s.width - kw) / stride_w + 1;
    s.PH = (s.OH - pool_h) / pool_stride_h + 1, s.PW = (s.OW - pool_w) / pool_stride_w + 1;
    s.used = (s.PH - 1) * pool_stride_h + pool_h;
    s.lanes = whole(out);
    return s;
}

/* Patches as they lie in the padded image. */
static Patches patches_of(const Shape *s) {
    Patches p = {.rows = s->kh};
    p.depth = s->in % VL == 0 && s->height * s->width * s->in > NEAR ? VL : s->in;
    p.blocks = s->in / p.depth;
    p.length = s->kw * p.depth;
    p.vecs = whole(p.length) / VL;
    p.pixel = p.depth, p.stride = s->width * p.depth;
    p.block = whole(s->height * p.stride + VL);
    return p;
}

/* Patches copied out one by one, a single row each: short rows would leave most lanes of a vector empty. */
static Patches columns_of(const Shape *s) {
    Patches p = {.depth = s->in, .blocks = 1, .rows = 1, .length = s->K};
    p.vecs = whole(s->K) / VL;
    p.pixel = p.vecs * VL;
    p.stride = s->OW * p.pixel;
    p.block = s->OH * p.stride + VL;
    return p;
}
INLINE int short_rows(const Shape *s) { return s->kw * s->in < VL; }

/* The next n floats of the scratch, on a whole line of the cache. */
INLINE float *take(float **scratch, int64_t n) {
    float *p = (float *)(((uintptr_t)*scratch + 63) / 64 * 64);
    *scratch = p + n;
    return p;
}
static const ivec LANE = {
    0, 1, 2, 3,
#if VL >= 8
    4, 5, 6, 7,
#endif
#if VL >= 16
    8, 9, 10, 11, 12, 13, 14, 15,
#endif
};
#define LINE 16 /* floats that `take` may skip */

/* ---- forward ---- */

/* The image lies channel by channel in rows, so that neighbours in the output are neighbours in memory; with
   bfloat16, pairs of channels, or of columns where there is one channel only. */
INLINE int beside(const Shape *s) { return DEEP == 2 && s->in == 1 && s->stride_w == 1; }
typedef struct {
    int64_t columns, places; /* in a row of a channel; numbers or pairs of a pixel */
    int64_t run, apart; /* weights, and numbers of the image, whose pairs follow each other */
    int64_t terms; /* what is summed up: numbers or pairs */
    int64_t image, weights, conv, spare;
    int beside; /* are pairs of columns? */
} Forward;
static Forward forward_of(const Shape *s) {
    Forward f = {.columns = (s->width + s->stride_w - 1) / s->stride_w};
    f.beside = beside(s);
    f.run = f.beside ? s->kw : s->in % DEEP ? s->in : s->K;
    f.places = places(s->in), f.terms = s->K / f.run * places(f.run);
    f.apart = s->in % DEEP ? s->in : s->H * s->W * s->in;
    f.image = s->height * f.places * s->stride_w * f.columns;
    f.weights = f.terms * s->lanes, f.conv = s->used * s->OW * s->lanes;
    f.spare = DEEP == 1 || f.beside ? 0 : s->H * s->W * f.places;
    return f;
}

/* offsets[term] = how far from a pixel's place what belongs to this term lies; every `step`th column */
static void offsets_of(const Shape *s, int64_t columns, int64_t channels, int64_t step, int32_t *offsets) {
    for (int64_t i = 0; i < s->kh; i++)
        for (int64_t j = 0; j < s->kw; j += step)
            for (int64_t c = 0; c < channels; c++)
                *offsets++ = (int32_t)(((i * channels + c) * s->stride_w + j % s->stride_w) * columns +
                                       j / s->stride_w);
}

/* Of each row the channels (or pairs of them), of each channel the columns in
   `stride_w` phases. The margins are zero already. */
static void lay_out(const Shape *s, const float *x, float *to, int64_t columns, int64_t channels) {
    const int64_t row = channels * s->stride_w * columns;
    for (int64_t h = 0; h < s->H; h++) {
        const float *from = x + h * s->W * channels;
        float *t = to + (h + s->pad_h) * row;
        if (channels * s->stride_w == 1) memcpy(t + s->pad_w, from, 4 * (size_t)s->W);
        else if (s->stride_w == 1) transpose(from, channels, s->W, channels, t + s->pad_w, columns);
        else for (int64_t i = 0; i < s->W; i++) {
            const int64_t at = i + s->pad_w;
            for (int64_t c = 0; c < channels; c++)
                t[(c * s->stride_w + at % s->stride_w) * columns + at / s->stride_w] = from[i * channels + c];
        }
    }
}

#ifdef BF16
/* Rows of an image of one channel as pairs of neighbours in the padded row. */
static void lay_out_beside(const Shape *s, const float *x, float *to, int64_t columns) {
    for (int64_t h = 0; h < s->H; h++, x += s->W) {
        float *row = to + (h + s->pad_h) * columns + s->pad_w;
        if (s->pad_w) store_part(row - 1, pair((vec){0}, load_part(x, 1)), 1);
        for (int64_t i = 0; i < s->W; i += VL) {
            const int some = (int)smaller(VL, s->W - i), more = (int)smaller(VL, s->W - i - 1);
            store_some(row + i, pair(load_some(x + i, some), load_some(x + i + 1, more)), some);
        }
    }
}
#endif

/* Lays out what the forward pass reads; `spare` is for pairs of a pixel. */
static void lay_out_terms(const Shape *s, const Forward *f, const float *x, float *spare, float *image) {
#ifdef BF16
    if (f->beside) {
        lay_out_beside(s, x, image, f->columns);
        return;
    }
    pack_rows(x, s->H * s->W * s->in / f->apart, f->apart, 1, spare);
    x = spare;
#endif
    lay_out(s, x, image, f->columns, f->places);
}

/* Packs weights of one client: two vectors of channels side by side, term by term. */
static void lay_out_weights(const Shape *s, const Forward *f, const float *w, float *spare, float *weights) {
    for (int64_t o = 0; o < s->out; o += VL, w += VL * s->K) {
        const int64_t panel = o / (2 * VL) * (2 * VL), width = smaller(2 * VL, s->lanes - panel);
        const int64_t some = smaller(VL, s->out - o);
        const float *from = w;
#ifdef BF16
        pack_rows(w, some * s->K / f->run, f->run, 1, spare);
        from = spare;
#endif
        transpose(from, f->terms, some, f->terms, weights + panel * f->terms + o - panel, width);
    }
}

/* P pixels, V vectors of channels each: y[p] = b + sum over k of x[offsets[k] + p] * w[k] */
INLINE void conv_tile(int P, int V, const float *x, const int32_t *offsets, int64_t K, const float *w,
                      const float *b, float *y, int64_t lanes) {
    vec acc[PIXELS][2];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) acc[p][v] = load(b + v * VL);
    for (int64_t k = 0; k < K; k++, w += V * VL) {
        const float *xk = x + offsets[k];
        vec wk[2];
        UNROLL for (int v = 0; v < V; v++) wk[v] = load(w + v * VL);
        UNROLL for (int p = 0; p < P; p++) {
            const vec xp = spread(xk + p);
            UNROLL for (int v = 0; v < V; v++) acc[p][v] = dot(acc[p][v], xp, wk[v]);
        }
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) store(y + p * lanes + v * VL, acc[p][v]);
}

static void conv_tiles(int P, int V, const float *x, const int32_t *offsets, int64_t K, const float *w,
                       const float *b, float *y, int64_t lanes) {
#define CASE(p) case p:                                                                                      \
    if (p > PIXELS) break;                                                                                   \
    if (V == 2) conv_tile(p, 2, x, offsets, K, w, b, y, lanes);                                              \
    else conv_tile(p, 1, x, offsets, K, w, b, y, lanes);                                                     \
    break;
    switch (P) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if PIXELS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
    }
#undef CASE
}

/* A row of windows. As torch: the first of equal ones wins, and a NaN wins always. */
INLINE void pool(const Shape *s, int64_t pool_h, int64_t pool_w, int64_t h, const float *conv, float *y,
                 int32_t *at) {
    for (int64_t w = 0; w < s->PW; w++, y += s->out, at += s->out)
        for (int64_t o = 0; o < s->out; o += VL) {
            const int64_t first = h * s->pool_stride_h * s->OW + w * s->pool_stride_w;
            vec best = load(conv + first * s->lanes + o);
            ivec where = (int32_t)first - (ivec){0};
            UNROLL for (int64_t i = 0; i < pool_h; i++)
                UNROLL for (int64_t j = 0; j < pool_w; j++) {
                    const int64_t pixel = first + i * s->OW + j;
                    if (pixel == first) continue;
                    const vec v = load(conv + pixel * s->lanes + o);
                    const ivec wins = (v > best) | (v != v);
                    best = either(wins, v, best);
                    where = (ivec)either(wins, (vec)((int32_t)pixel - (ivec){0}), (vec)where);
                }
            if (s->relu) {
                const ivec off = best <= (vec){0};
                best = (vec)((ivec)best & ~off);
                where |= off;
            }
            const int64_t n = s->out - o;
            if (n >= VL) store(y + o, best), store((float *)at + o, (vec)where);
            else store_part(y + o, best, (int)n), store_part((float *)at + o, (vec)where, (int)n);
        }
}

void NAME(conv_pool_forward)(const float *x, const float *w, const float *b, float *y, int32_t *at,
                             float *scratch, SIZES) {
    const Shape s = shape_of(GIVEN);
    const Forward f = forward_of(&s);
    float *image = take(&scratch, f.image), *weights = take(&scratch, f.weights);
    float *bias = take(&scratch, s.lanes), *conv = take(&scratch, f.conv);
    int32_t *offsets = (int32_t *)take(&scratch, f.terms);
    float *spare = take(&scratch, f.spare), *narrowed = take(&scratch, VL * f.terms);
    offsets_of(&s, f.columns, f.places, f.beside ? 2 : 1, offsets);
    memset(image, 0, 4 * (size_t)f.image);
    memset(weights, 0, 4 * (size_t)f.weights);
    memset(bias, 0, 4 * (size_t)s.lanes);
    const int64_t tiles = (s.OW + PIXELS - 1) / PIXELS, P = (s.OW + tiles - 1) / tiles;
    for (int64_t client = 0; client < clients; client++, w += out * s.K) {
        if (b) memcpy(bias, b + client * out, 4 * (size_t)out);
        lay_out_weights(&s, &f, w, narrowed, weights);
        for (int64_t sample = 0; sample < batch; sample++, x += H * W * in) {
            lay_out_terms(&s, &f, x, spare, image);
            for (int64_t h = 0, row = 0; h < s.PH; h++, y += s.PW * out, at += s.PW * out) {
                for (; row < h * pool_stride_h + pool_h; row++) /* the rows that a row of windows needs */
                    for (int64_t o = 0; o < s.lanes; o += 2 * VL)
                        for (int64_t t = 0; t < tiles; t++) {
                            const int64_t col = smaller(t * P, s.OW - P); /* the last may overlap another */
                            conv_tiles((int)P, s.lanes - o > VL ? 2 : 1,
                                       image + row * stride_h * f.places * stride_w * f.columns + col,
                                       offsets, f.terms, weights + o * f.terms, bias + o,
                                       conv + (row * s.OW + col) * s.lanes + o, s.lanes);
                        }
                if (pool_h == 2 && pool_w == 2) pool(&s, 2, 2, h, conv, y, at);
                else pool(&s, pool_h, pool_w, h, conv, y, at);
            }
        }
    }
}

/* ---- backward ---- */

/* Rows of the padded image between its margins, block by block, from or to the plain image. */
INLINE void cut(const Shape *s, const Patches *p, float *plain, float *padded, int into) {
    for (int64_t n = 0; n < p->blocks; n++)
        for (int64_t h = 0; h < s->H; h++) {
            float *row = padded + n * p->block + (h + s->pad_h) * p->stride + s->pad_w * p->pixel;
            float *flat = plain + h * s->W * s->in + n * p->depth;
            const size_t bytes = 4 * (size_t)p->depth;
            if (p->blocks == 1) {
                memcpy(into ? row : flat, into ? flat : row, bytes * (size_t)s->W);
                continue;
            }
            for (int64_t i = 0; i < s->W; i++, row += VL, flat += s->in) { /* a block is one vector */
                if (into) store(row, load(flat));
                else store(flat, load(row));
            }
        }
}

/* Every patch of a padded image as one row. Each row of the kernel is loaded so that it lies where it belongs
   in the vector (from up to a vector before the image), over what the one before it had too much. */
static void unfold(const Shape *s, const Patches *image, const Patches *columns, const float *x, float *to) {
    for (int64_t v = 0; v < columns->vecs; v++) {
        const int64_t first = v * VL / image->length;
        const int64_t end = smaller((v * VL + VL - 1) / image->length + 1, s->kh);
        for (int64_t h = 0; h < s->used; h++)
            for (int64_t w = 0; w < s->OW; w++) {
                const float *patch =
                    x + h * s->stride_h * image->stride + w * s->stride_w * image->pixel + v * VL;
                vec row = load(patch + first * (image->stride - image->length));
                for (int64_t i = first + 1; i < end; i++) {
                    const vec next = load(patch + i * (image->stride - image->length));
                    row = either(LANE >= (int32_t)(i * image->length - v * VL), next, row);
                }
                store(to + (h * s->OW + w) * columns->pixel + v * VL, row);
            }
    }
}

/* dw += sum over winners of g * patch, for R rows of V vectors */
INLINE void add_patch(int R, int V, vec *acc, const float *patch, int64_t stride, float g) {
    const vec gs = splat(g);
    UNROLL for (int r = 0; r < R; r++, patch += stride) {
        ONE_POINTER(patch);
        UNROLL for (int v = 0; v < V; v++) acc[r * V + v] += gs * load(patch + v * VL);
    }
}
INLINE void weigh_tile(int R, int V, const float *x, int64_t stride, const int32_t *places,
                       const int32_t *where, const float *g, int64_t n, float *dw) {
    const int ways = R * V >= 4 ? 1 : 4 / (R * V); /* enough sums to hide the latency of an addition */
    vec acc[SUMS];
    UNROLL for (int i = 0; i < ways * R * V; i++) acc[i] = i < R * V ? load(dw + i * VL) : (vec){0};
    int64_t l = 0;
    for (; l + ways <= n; l += ways)
        UNROLL for (int u = 0; u < ways; u++)
            add_patch(R, V, acc + u * R * V, x + places[where[l + u]], stride, g[l + u]);
    for (; l < n; l++) add_patch(R, V, acc, x + places[where[l]], stride, g[l]);
    UNROLL for (int i = R * V; i < ways * R * V; i++) acc[i % (R * V)] += acc[i];
    UNROLL for (int i = 0; i < R * V; i++) store(dw + i * VL, acc[i]);
}

/* patch of dx += sum over winners of g * w, for R rows of V vectors, in the last the lanes of `mask` only */
INLINE void scatter_tile(int R, int V, float *dx, int64_t stride, const int32_t *channel, const float *g,
                         int64_t n, const float *w, ivec mask) {
    vec acc[SUMS];
    UNROLL for (int i = 0; i < R * V; i++) acc[i] = (vec){0};
    for (int64_t l = 0; l < n; l++) {
        const float *wl = w + (int64_t)channel[l] * (R * V * VL);
        const vec gl = splat(g[l]);
        UNROLL for (int i = 0; i < R * V; i++) acc[i] += gl * load(wl + i * VL);
    }
    UNROLL for (int r = 0; r < R; r++) {
        /* 0 * infinity must not reach the next pixel */
        acc[r * V + V - 1] = (vec)((ivec)acc[r * V + V - 1] & mask);
        UNROLL for (int v = 0; v < V; v++) {
            float *to = dx + r * stride + v * VL;
            store(to, load(to) + acc[r * V + v]);
        }
    }
}

/* Winners of one sample in lists, with their gradients: of a channel the pixels where it won, or of a pixel
   the channels that won there. */
typedef struct {
    float *g;
    int32_t *where;
    int32_t *ends, *places; /* of each list: its end; of a pixel's: where its patch is */
    int64_t lists;
} Winners;

INLINE void weigh(int R, int V, const Winners *all, const float *x, int64_t stride, const int32_t *places,
                  float *dw) {
    for (int64_t o = 0, start = 0; o < all->lists; start = all->ends[o++])
        weigh_tile(R, V, x, stride, places, all->where + start, all->g + start, all->ends[o] - start,
                   dw + o * R * V * VL);
}
INLINE void scatter(int R, int V, const Winners *all, float *dx, int64_t stride, const float *w, ivec mask) {
    for (int64_t i = 0, start = 0; i < all->lists; start = all->ends[i++])
        scatter_tile(R, V, dx + all->places[i], stride, all->where + start, all->g + start,
                     all->ends[i] - start, w, mask);
}

/* One function with constant R and V for each tile that fits the registers. */
#define ROWS_OF(v, what)                                                                                     \
    switch (rows) {                                                                                          \
    case 1: if (1 * v <= SUMS) what(1, v); break;                                                            \
    case 2: if (2 * v <= SUMS) what(2, v); break;                                                            \
    case 3: if (3 * v <= SUMS) what(3, v); break;                                                            \
    case 4: if (4 * v <= SUMS) what(4, v); break;                                                            \
    case 5: if (5 * v <= SUMS) what(5, v); break;                                                            \
    }                                                                                                        \
    break;
#define EACH_TILE(what)                                                                                      \
    switch (vecs) {                                                                                          \
    case 1: ROWS_OF(1, what)                                                                                 \
    case 2: ROWS_OF(2, what)                                                                                 \
    case 3: ROWS_OF(3, what)                                                                                 \
    case 4: ROWS_OF(4, what)                                                                                 \
    case 5: ROWS_OF(5, what)                                                                                 \
    case 6: ROWS_OF(6, what)                                                                                 \
    case 7: ROWS_OF(7, what)                                                                                 \
    case 8: ROWS_OF(8, what)                                                                                 \
    case 9: ROWS_OF(9, what)                                                                                 \
    case 10: ROWS_OF(10, what)                                                                               \
    }
static void weigh_all(int64_t rows, int64_t vecs, const Winners *all, const float *x, int64_t stride,
                      const int32_t *places, float *dw) {
#define WEIGH(r, v) weigh(r, v, all, x, stride, places, dw)
    EACH_TILE(WEIGH)
}
static void scatter_all(int64_t rows, int64_t vecs, const Winners *all, float *dx, int64_t stride,
                        const float *w, ivec mask) {
#define SCATTER(r, v) scatter(r, v, all, dx, stride, w, mask)
    EACH_TILE(SCATTER)
}

/* A patch in tiles: block by block, rows, vectors of a row. Tiles follow each other in packed weights, each
   with all its channels. */
typedef struct {
    int64_t block, row, rows, vec, vecs;
    int64_t packed; /* where it starts there */
} Tile;
static int next_tile(const Patches *p, int64_t out, int64_t most, Tile *t) {
    t->packed += out * t->rows * t->vecs * VL;
    t->vec += t->vecs;
    if (t->vec == p->vecs || !t->rows) {
        t->vec = 0, t->row += t->rows;
        if (t->row == p->rows) t->row = 0, t->block++;
    }
    const int64_t widest = smaller(smaller(p->vecs, MAX_VECS), most);
    t->vecs = smaller(widest, p->vecs - t->vec);
    int64_t rows = smaller(MAX_ROWS, most / widest);
    t->rows = smaller(rows, p->rows - t->row);
    return t->block < p->blocks;
}

/* Plain weights [out, kh, kw, in] to or from packed ones [tile, out, row, vector]; empty lanes stay as they
   are. */
INLINE void repack(const Patches *p, int64_t K, int64_t in, int64_t out, int64_t most, float *plain,
                   float *packed, int into) {
    for (Tile t = {0}; next_tile(p, out, most, &t);)
        for (int64_t o = 0; o < out; o++)
            for (int64_t r = 0; r < t.rows; r++) {
                float *row = packed + t.packed + (o * t.rows + r) * t.vecs * VL;
                const int64_t start = t.vec * VL, n = smaller(t.vecs * VL, p->length - start);
                float *flat = plain + o * K + (t.row + r) * (K / p->rows) + t.block * p->depth;
                if (p->blocks == 1)
                    memcpy(into ? row : flat + start, into ? flat + start : row, 4 * (size_t)n);
                else
                    for (int64_t i = 0; i < n; i += VL) { /* a block is one vector */
                        float *one = flat + (start + i) / VL * in;
                        if (into) store(row + i, load(one));
                        else store(one, load(row + i));
                    }
            }
}

/* Adds to a list those of a vector (of its first `some` lanes) that won; returns how many. */
INLINE int64_t keep(ivec won, ivec where, vec g, int some, int32_t *wheres, float *gs) {
#ifdef __AVX512F__
    const __mmask16 these = _mm512_movepi32_mask((__m512i)won) & (__mmask16)((1u << some) - 1);
    _mm512_storeu_si512(wheres, _mm512_maskz_compress_epi32(these, (__m512i)where));
    _mm512_storeu_ps(gs, _mm512_maskz_compress_ps(these, (__m512)g));
    return __builtin_popcount(these);
#else
    int64_t n = 0;
    for (int i = 0; i < some; i++) { /* written anyway, kept only if it won: no branch */
        wheres[n] = where[i], gs[n] = g[i];
        n -= won[i];
    }
    return n;
#endif
}

/* Per channel: which pixels of the convolution's output won. db += the sum of their gradients */
static void by_channel(const Shape *s, const float *dy, const int32_t *at, float *turned_dy, float *turned_at,
                       Winners *all, float *db) {
    const int64_t pixels = s->PH * s->PW, room = whole(pixels);
    int64_t n = 0;
    transpose(dy, s->out, pixels, s->out, turned_dy, room);
    transpose((const float *)at, s->out, pixels, s->out, turned_at, room);
    for (int64_t o = 0; o < s->out; o++, turned_dy += room, turned_at += room) {
        vec total = {0};
        for (int64_t i = 0; i < pixels; i += VL) {
            const int some = (int)smaller(VL, pixels - i);
            const ivec where = (ivec)load(turned_at + i), won = where >= 0;
            const vec g = load(turned_dy + i);
            n += keep(won, where, g, some, all->where + n, all->g + n);
            if (some == VL) total += (vec)((ivec)g & won);
            else for (int l = 0; l < some; l++) total[l] += won[l] ? g[l] : 0;
        }
        if (db) db[o] += sum(total);
        all->ends[o] = (int32_t)n;
    }
    all->lists = s->out;
}

/* Per pixel of the convolution's output, window by window: which channels won there. */
static void by_pixel(const Shape *s, const float *dy, const int32_t *at, const int32_t *patch, Winners *all) {
    int64_t n = 0, lists = 0;
    for (int64_t h = 0; h < s->PH; h++)
        for (int64_t w = 0; w < s->PW; w++, dy += s->out, at += s->out)
            for (int64_t i = 0; i < s->pool_h * s->pool_w; i++) {
                const int64_t row = h * s->pool_stride_h + i / s->pool_w;
                const int64_t col = w * s->pool_stride_w + i % s->pool_w;
                const int32_t pixel = (int32_t)(row * s->OW + col);
                const int64_t start = n;
                for (int64_t o = 0; o < s->out; o += VL) {
                    const int some = (int)smaller(VL, s->out - o);
                    const ivec where = some == VL ? (ivec)load((const float *)at + o)
                                                  : (ivec)load_part((const float *)at + o, some);
                    const vec g = some == VL ? load(dy + o) : load_part(dy + o, some);
                    n += keep(where == pixel, LANE + (int32_t)o, g, some, all->where + n, all->g + n);
                }
                if (n == start) continue;
                all->places[lists] = patch[pixel];
                all->ends[lists++] = (int32_t)n;
            }
    all->lists = lists;
}

static Winners take_winners(const Shape *s, float **scratch) {
    const int64_t won = s->PH * s->PW * s->out + VL, lists = s->PH * s->PW * s->pool_h * s->pool_w + s->out;
    Winners all = {.g = take(scratch, won)};
    all.where = (int32_t *)take(scratch, won);
    all.ends = (int32_t *)take(scratch, lists);
    all.places = (int32_t *)take(scratch, lists);
    return all;
}

/* places[pixel of the convolution's output] = where its patch starts */
static void places_of(const Shape *s, const Patches *p, int unfolded, int32_t *places) {
    for (int64_t h = 0; h < s->OH; h++)
        for (int64_t w = 0; w < s->OW; w++)
            places[h * s->OW + w] =
                (int32_t)(unfolded ? (h * s->OW + w) * p->pixel
                                   : h * s->stride_h * p->stride + w * s->stride_w * p->pixel);
}

INLINE int64_t packed_size(const Patches *p, int64_t out) { return p->blocks * out * p->rows * p->vecs * VL; }
/* Accumulators of a tile of dx: its weights of all channels should stay in the first cache. */
INLINE int64_t near_sums(int64_t out) { return smaller(SUMS, NEAR / (out * VL) > 3 ? NEAR / (out * VL) : 3); }

/* ---- backward of a first layer: few terms, and no gradient of the image ---- */

/* There all pixels of the convolution's output are summed up over, winners or not: it needs no lists. With
   bfloat16 pairs of pixels, which are those of a row of a window. */
INLINE int dense(const Shape *s) {
    const int apart = s->pool_stride_h >= s->pool_h && s->pool_stride_w >= s->pool_w;
    if (DEEP == 2 && !(beside(s) && s->pool_w == 2 && s->pool_stride_w == 2)) return 0;
    return apart && short_rows(s) && s->K <= MAX_DENSE;
}
INLINE int64_t across(const Shape *s) { return places(s->OW); }

/* slopes[pixel or pair of them] = what comes back there; db += all of it. What no window covers is 0. */
static void unpool(const Shape *s, const float *dy, const int32_t *at, float *slopes, float *db) {
    for (int64_t h = 0; h < s->PH; h++)
        for (int64_t w = 0; w < s->PW; w++, dy += s->out, at += s->out)
            for (int64_t o = 0; o < s->out; o += VL) {
                const int some = (int)smaller(VL, s->out - o);
                const vec g = load_some(dy + o, some);
                const ivec where = (ivec)load_some((const float *)at + o, some);
                store(db + o, load(db + o) + (vec)((ivec)g & (where >= 0)));
#ifdef BF16
                const vec left = pair(g, (vec){0}), right = pair((vec){0}, g);
#endif
                for (int64_t i = 0; i < s->pool_h; i++) {
                    const int64_t row = h * s->pool_stride_h + i, col = w * s->pool_stride_w;
                    const int32_t pixel = (int32_t)(row * s->OW + col);
                    float *to = slopes + (row * across(s) + col / DEEP) * s->lanes + o;
#ifdef BF16
                    store(to, either(where == pixel, left, (vec)((ivec)right & (where == pixel + 1))));
#else
                    for (int64_t j = 0; j < s->pool_w; j++)
                        store(to + j * s->lanes, (vec)((ivec)g & (where == pixel + (int32_t)j)));
#endif
                }
            }
}

/* T terms, V vectors of channels: dw[t] += sum over pixels of x[offsets[t] + pixel] * slopes[pixel] */
INLINE void dense_tile(int T, int V, const Shape *s, const float *x, int64_t stride, const int32_t *offsets,
                       const float *slopes, float *dw) {
    vec acc[TERMS][2];
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int v = 0; v < V; v++) acc[t][v] = load(dw + t * s->lanes + v * VL);
    for (int64_t row = 0; row < s->used; row++, x += stride)
        for (int64_t col = 0; col < s->OW; col += DEEP, slopes += s->lanes) {
            vec slope[2];
            UNROLL for (int v = 0; v < V; v++) slope[v] = load(slopes + v * VL);
            UNROLL for (int t = 0; t < T; t++) {
                const vec xt = spread(x + offsets[t] + col);
                UNROLL for (int v = 0; v < V; v++) acc[t][v] = dot(acc[t][v], xt, slope[v]);
            }
        }
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int v = 0; v < V; v++) store(dw + t * s->lanes + v * VL, acc[t][v]);
}
static void dense_tiles(int T, int V, const Shape *s, const float *x, int64_t stride, const int32_t *offsets,
                        const float *slopes, float *dw) {
#define CASE(t) case t:                                                                                      \
    if (t > TERMS) break;                                                                                    \
    if (V == 2) dense_tile(t, 2, s, x, stride, offsets, slopes, dw);                                         \
    else dense_tile(t, 1, s, x, stride, offsets, slopes, dw);                                                \
    break;
    switch (T) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#if TERMS > 5
        CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13)
#endif
    }
#undef CASE
}

static int64_t dense_scratch(const Shape *s) {
    return forward_of(s).image + s->used * across(s) * s->lanes + (s->K + 1) * s->lanes + s->K + 5 * LINE;
}

static void dense_backward(const Shape *s, const float *dy, const int32_t *at, const float *x, float *dw,
                           float *db, float *scratch) {
    const Forward f = forward_of(s);
    const int64_t some = s->used * across(s) * s->lanes;
    float *image = take(&scratch, f.image), *slopes = take(&scratch, some);
    float *made = take(&scratch, s->K * s->lanes), *bias = take(&scratch, s->lanes);
    int32_t *offsets = (int32_t *)take(&scratch, s->K);
    const int64_t stride = s->stride_h * s->in * s->stride_w * f.columns, outs = s->PH * s->PW * s->out;
    const int64_t tiles = (s->K + TERMS - 1) / TERMS, T = (s->K + tiles - 1) / tiles;
    offsets_of(s, f.columns, s->in, 1, offsets);
    memset(image, 0, 4 * (size_t)f.image);
    memset(slopes, 0, 4 * (size_t)some);
    for (int64_t client = 0; client < s->clients; client++, dw += s->out * s->K) {
        memset(made, 0, 4 * (size_t)(s->K * s->lanes));
        memset(bias, 0, 4 * (size_t)s->lanes);
        for (int64_t sample = 0; sample < s->batch; sample++, dy += outs, at += outs) {
            lay_out_terms(s, &f, x, 0, image);
            x += s->H * s->W * s->in;
            unpool(s, dy, at, slopes, bias);
            for (int64_t o = 0; o < s->lanes; o += 2 * VL)
                for (int64_t t = 0; t < s->K; t += T)
                    dense_tiles((int)smaller(T, s->K - t), s->lanes - o > VL ? 2 : 1, s, image, stride,
                                offsets + t, slopes + o, made + t * s->lanes + o);
        }
        transpose(made, s->lanes, s->K, s->out, dw, s->K);
        if (db) memcpy(db + client * s->out, bias, 4 * (size_t)s->out);
    }
}

#ifdef BF16
void conv_pool_backward(const float *dy, const int32_t *at, const float *x, const float *w, float *dx,
                        float *dw, float *db, float *scratch, SIZES);
void NAME(conv_pool_backward)(const float *dy, const int32_t *at, const float *x, const float *w, float *dx,
                              float *dw, float *db, float *scratch, SIZES) {
    const Shape s = shape_of(GIVEN);
    if (!dx && dense(&s)) dense_backward(&s, dy, at, x, dw, db, scratch);
    else conv_pool_backward(dy, at, x, w, dx, dw, db, scratch, GIVEN);
}
#else
void conv_pool_backward(const float *dy, const int32_t *at, const float *x, const float *w, float *dx,
                        float *dw, float *db, float *scratch, SIZES) {
    const Shape s = shape_of(GIVEN);
    if (!dx && dense(&s)) {
        dense_backward(&s, dy, at, x, dw, db, scratch);
        return;
    }
    const Patches image = patches_of(&s), columns = columns_of(&s);
    const Patches patches = short_rows(&s) ? columns : image;
    const int64_t pixels = s.PH * s.PW, padded = image.blocks * image.block, near = near_sums(out);
    float *packed_dw = take(&scratch, packed_size(&patches, out));
    float *packed_w = take(&scratch, packed_size(&image, out));
    float *padded_x = take(&scratch, VL + padded) + VL, *padded_dx = take(&scratch, padded);
    float *unfolded = take(&scratch, short_rows(&s) ? columns.block : 0);
    int32_t *x_places = (int32_t *)take(&scratch, s.OH * s.OW);
    int32_t *dx_places = (int32_t *)take(&scratch, s.OH * s.OW);
    float *turned_dy = take(&scratch, whole(pixels) * out), *turned_at = take(&scratch, whole(pixels) * out);
    Winners all = take_winners(&s, &scratch);
    places_of(&s, &patches, short_rows(&s), x_places);
    places_of(&s, &image, 0, dx_places);
    memset(padded_x - VL, 0, 4 * (size_t)(VL + padded));
    memset(packed_w, 0, 4 * (size_t)packed_size(&image, out));
    const ivec mask = LANE + (int32_t)((image.vecs - 1) * VL) < (int32_t)image.length;
    for (int64_t client = 0; client < clients; client++, w += out * s.K, dw += out * s.K) {
        if (dx) repack(&image, s.K, in, out, near, (float *)w, packed_w, 1);
        memset(packed_dw, 0, 4 * (size_t)packed_size(&patches, out));
        if (db) memset(db + client * out, 0, 4 * (size_t)out);
        for (int64_t sample = 0; sample < batch; sample++) {
            cut(&s, &image, (float *)x, padded_x, 1);
            if (short_rows(&s)) unfold(&s, &image, &columns, padded_x, unfolded);
            by_channel(&s, dy, at, turned_dy, turned_at, &all, db ? db + client * out : db);
            for (Tile t = {0}; next_tile(&patches, out, SUMS, &t);)
                weigh_all(t.rows, t.vecs, &all,
                          (short_rows(&s) ? unfolded : padded_x) + t.block * patches.block +
                              t.row * patches.stride + t.vec * VL,
                          patches.stride, x_places, packed_dw + t.packed);
            if (dx) {
                memset(padded_dx, 0, 4 * (size_t)padded);
                by_pixel(&s, dy, at, dx_places, &all);
                for (Tile t = {0}; next_tile(&image, out, near, &t);)
                    scatter_all(t.rows, t.vecs, &all,
                                padded_dx + t.block * image.block + t.row * image.stride + t.vec * VL,
                                image.stride, packed_w + t.packed,
                                t.vec + t.vecs == image.vecs ? mask : ~(ivec){0});
                cut(&s, &image, dx, padded_dx, 0);
                dx += H * W * in;
            }
            x += H * W * in, dy += pixels * out, at += pixels * out;
        }
        repack(&patches, s.K, in, out, SUMS, dw, packed_dw, 0);
    }
}
#endif

int64_t NAME(conv_pool_scratch)(SIZES) {
    const Shape s = shape_of(GIVEN);
    const Forward f = forward_of(&s);
    const Patches image = patches_of(&s), columns = columns_of(&s);
    const Patches patches = short_rows(&s) ? columns : image;
    const int64_t forward = f.image + f.weights + s.lanes + f.conv + (1 + VL) * f.terms + f.spare + 8 * LINE;
    const int64_t backward = packed_size(&patches, out) + packed_size(&image, out) + VL +
                             2 * image.blocks * image.block + (short_rows(&s) ? columns.block : 0) +
                             2 * s.OH * s.OW + 2 * whole(s.PH * s.PW) * out + 2 * (s.PH * s.PW * out + VL) +
                             2 * (s.PH * s.PW * pool_h * pool_w + out) + 16 * LINE;
    const int64_t most = forward > backward ? forward : backward, first = dense_scratch(&s);
    return dense(&s) && first > most ? first : most;
}
