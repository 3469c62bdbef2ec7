/* Layer norm (Ba et al. 2016, arXiv:1607.06450): each row to mean 0 and variance 1, then w times it plus b. */
#include <math.h>

#include "vec.h"

INLINE int some(int64_t size, int64_t j) { return size - j < VL ? (int)(size - j) : VL; }

/* x [clients, rows, size], w and b [clients, size] or NULL -> y, and each row's mean and 1 / deviation:
   stats [clients, rows, 2]. */
void layer_norm_forward(const float *x, const float *w, const float *b, float *y, float *stats, const float *eps,
                        int64_t clients, int64_t rows, int64_t size) {
    for (int64_t c = 0; c < clients; c++)
        for (int64_t r = 0; r < rows; r++, x += size, y += size, stats += 2) {
            vec sums = {0}, squares = {0};
            for (int64_t j = 0; j < size; j += VL) sums += load_some(x + j, some(size, j));
            float mean = sum(sums) / (float)size;
            for (int64_t j = 0; j < size; j += VL) {
                vec apart = load_some(x + j, some(size, j)) - mean;
                if (size - j < VL) {
                    for (int64_t l = size - j; l < VL; l++) apart[l] = 0;
                }
                squares += apart * apart;
            }
            float by = 1 / sqrtf(sum(squares) / (float)size + *eps);
            for (int64_t j = 0; j < size; j += VL) {
                int n = some(size, j);
                vec made = (load_some(x + j, n) - mean) * by;
                if (w) made *= load_some(w + c * size + j, n);
                if (b) made += load_some(b + c * size + j, n);
                store_some(y + j, made, n);
            }
            stats[0] = mean, stats[1] = by;
        }
}

/* dy and what the way forward took and made -> dx, and dw and db unless NULL. */
void layer_norm_backward(const float *dy, const float *x, const float *w, const float *stats, float *dx, float *dw,
                         float *db, int64_t clients, int64_t rows, int64_t size) {
    if (dw) memset(dw, 0, sizeof(float) * (size_t)(clients * size));
    if (db) memset(db, 0, sizeof(float) * (size_t)(clients * size));
    for (int64_t c = 0; c < clients; c++)
        for (int64_t r = 0; r < rows; r++, dy += size, x += size, dx += size, stats += 2) {
            float mean = stats[0], by = stats[1];
            vec sums = {0}, products = {0};
            for (int64_t j = 0; j < size; j += VL) { /* what stands beyond the row's end has slope 0 */
                int n = some(size, j);
                vec slope = load_some(dy + j, n), normal = (load_some(x + j, n) - mean) * by;
                if (dw) store_some(dw + c * size + j, load_some(dw + c * size + j, n) + slope * normal, n);
                if (db) store_some(db + c * size + j, load_some(db + c * size + j, n) + slope, n);
                if (w) slope *= load_some(w + c * size + j, n);
                sums += slope;
                products += slope * normal;
            }
            float first = sum(sums) / (float)size, second = sum(products) / (float)size;
            for (int64_t j = 0; j < size; j += VL) {
                int n = some(size, j);
                vec slope = load_some(dy + j, n), normal = (load_some(x + j, n) - mean) * by;
                if (w) slope *= load_some(w + c * size + j, n);
                store_some(dx + j, by * (slope - first - normal * second), n);
            }
        }
}
