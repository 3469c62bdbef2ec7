/* The cross-entropy of scores and its gradient, a row at a time. */
#include <math.h>

#include "vec.h"

/* z [rows, classes], y [rows] -> losses [rows], p [rows, classes] = softmax(z); a row with y == ignored costs
   0. Returns how many rows have a y that is no class; their loss is NaN. */
int64_t cross_entropy_forward(const float *z, const int64_t *y, float *losses, float *p, int64_t ignored,
                              int64_t rows, int64_t classes) {
    int64_t wrong = 0;
    for (int64_t r = 0; r < rows; r++, z += classes, p += classes) {
        float most = -INFINITY;
        for (int64_t k = 0; k < classes; k++) most = z[k] > most ? z[k] : most;
        vec sums = {0};
        int64_t k = 0;
        for (; k + VL <= classes; k += VL) {
            vec e = expv(load(z + k) - most);
            sums += e;
            store(p + k, e);
        }
        float total = sum(sums);
        if (k < classes) {
            vec e = expv(load_part(z + k, (int)(classes - k)) - most);
            store_part(p + k, e, (int)(classes - k));
            for (; k < classes; k++) total += p[k];
        }
        for (k = 0; k < classes; k++) p[k] /= total;
        int fits = y[r] >= 0 && y[r] < classes;
        wrong += !fits && y[r] != ignored;
        losses[r] = y[r] == ignored ? 0 : fits ? logf(total) + (most - z[y[r]]) : NAN;
    }
    return wrong;
}

/* dl [rows], p and y as above -> dz = dl (p - onehot(y)) */
void cross_entropy_backward(const float *dl, const float *p, const int64_t *y, float *dz, int64_t ignored,
                            int64_t rows, int64_t classes) {
    for (int64_t r = 0; r < rows; r++, p += classes, dz += classes) {
        float by = y[r] == ignored ? 0 : dl[r];
        for (int64_t k = 0; k < classes; k++) dz[k] = by * p[k];
        if (y[r] >= 0 && y[r] < classes) dz[y[r]] -= by;
    }
}
