/* The sums of coterie.core.exact: products cut on two grids, to the same bits as there. */
#include <math.h>

#include "threads.h"
#include "vec.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off") /* a product is rounded before it is cut */
#endif

#define HI (1.5 * 0x1p52 * 0x1p-16)
#define LO (1.5 * 0x1p52 * 0x1p-56)
#define COLUMNS 1024 /* of all replies at a time: hi and lo of them stay in the first-level cache */

typedef struct {
    const float *u;
    const double *weights;
    double *hi, *lo, *largest;
    int64_t replies, size, next;
} Sums;

static void *add(void *given) {
    Sums *all = given;
    const float *u = all->u;
    double *hi = all->hi, *lo = all->lo;
    int64_t size = all->size, start;
    while ((start = next_of(&all->next) * COLUMNS) < size) {
        int64_t end = size - start < COLUMNS ? size : start + COLUMNS;
        for (int64_t i = 0; i < all->replies; i++) {
            double weight = all->weights[i];
            for (int64_t k = start; k < end; k++) {
                double x = (double)u[i * size + k] * weight;
                double cut = (x + HI) - HI;
                hi[k] += cut;
                lo[k] += ((x - cut) + LO) - LO;
            }
        }
    }
    return 0;
}

/* hi, lo [size] += weights[i] * u[i] on the two grids, u [replies, size] */
void exact_add(const float *u, const double *weights, double *hi, double *lo, int64_t replies, int64_t size,
               int64_t threads) {
    Sums all = {.u = u, .weights = weights, .hi = hi, .lo = lo, .replies = replies, .size = size};
    together(add, &all, threads);
}

static void *largest(void *given) {
    Sums *all = given;
    int64_t i;
    while ((i = next_of(&all->next)) < all->replies) {
        const float *u = all->u + i * all->size;
        int32_t most = 0; /* without their signs, floats are in the order of their bits, NaN above infinity */
        for (int64_t k = 0; k < all->size; k++) {
            int32_t bits;
            memcpy(&bits, u + k, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float x;
        memcpy(&x, &most, 4);
        all->largest[i] = x <= 3.4028235e38f ? x : INFINITY;
    }
    return 0;
}

/* largest [replies] = the largest |u[i]|, u [replies, size]; infinite where one is not a number. */
void exact_largest(const float *u, double *most, int64_t replies, int64_t size, int64_t threads) {
    Sums all = {.u = u, .largest = most, .replies = replies, .size = size};
    together(largest, &all, threads);
}

/* mean [size] = (hi + lo) / weight */
void exact_mean(const double *hi, const double *lo, const double *weight, float *mean, int64_t size) {
    for (int64_t k = 0; k < size; k++) mean[k] = (float)((hi[k] + lo[k]) / *weight);
}
