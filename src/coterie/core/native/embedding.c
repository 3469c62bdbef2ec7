/* Rows of a table for each client, and their gradients summed up in the order of the batch. */
#include "vec.h"

/* x [clients, many], with `apart` between two clients, w [clients, rows, size] -> y [clients, many, size].
   Returns how many numbers are of no row; theirs are zeros. */
int64_t embedding_forward(const int64_t *x, const float *w, float *y, int64_t apart, int64_t clients, int64_t many,
                          int64_t rows, int64_t size) {
    int64_t wrong = 0;
    for (int64_t c = 0; c < clients; c++, w += rows * size)
        for (int64_t i = 0; i < many; i++, y += size) {
            int64_t row = x[c * apart + i], fits = row >= 0 && row < rows;
            if (fits) memcpy(y, w + row * size, sizeof(float) * (size_t)size);
            else memset(y, 0, sizeof(float) * (size_t)size);
            wrong += !fits;
        }
    return wrong;
}

/* dy [clients, many, size] and x as above -> dw [clients, rows, size] */
void embedding_backward(const float *dy, const int64_t *x, float *dw, int64_t apart, int64_t clients, int64_t many,
                        int64_t rows, int64_t size) {
    memset(dw, 0, sizeof(float) * (size_t)(clients * rows * size));
    for (int64_t c = 0; c < clients; c++, dw += rows * size)
        for (int64_t i = 0; i < many; i++, dy += size) {
            int64_t row = x[c * apart + i];
            if (row < 0 || row >= rows) continue;
            for (int64_t j = 0; j < size; j++) dw[row * size + j] += dy[j];
        }
}
