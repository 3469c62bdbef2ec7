/* x times the normal distribution's function of x (Hendrycks and Gimpel 2016, arXiv:1606.08415), and its slope,
   which needs the same exponential. */
#pragma once
#include "vec.h"

/* By the error function, of Abramowitz and Stegun 1964, 7.1.26: within 1.5e-7. */
INLINE vec gelu_exact(vec x, vec *slope) {
    const float root = 0.70710678f; /* of 1/2 */
    vec size = either(x < 0, -x, x), t = 1 / (1 + 0.3275911f * root * size), e = expv(-0.5f * x * x);
    vec p = splat(1.061405429f / 2);
    p = p * t - 1.453152027f / 2;
    p = p * t + 1.421413741f / 2;
    p = p * t - 0.284496736f / 2;
    p = p * t + 0.254829592f / 2;
    vec tail = p * t * e, below = either(x < 0, tail, 1 - tail);
    *slope = below + 0.39894228f * x * e; /* x times the density */
    return x * below;
}

/* By the hyperbolic tangent of u: half of 1 + tanh(u) is the sigmoid of 2 u. */
INLINE vec gelu_tanh(vec x, vec *slope) {
    const float root = 0.79788456f; /* of 2 / pi */
    vec square = x * x, twice = 2 * root * x * (1 + 0.044715f * square);
    vec below = 1 / (1 + expv(-twice));
    *slope = below + x * below * (1 - below) * (2 * root * (1 + 3 * 0.044715f * square));
    return x * below;
}

/* x -> y, which may be x, and slope = dy / dx, of n numbers. */
INLINE void gelu(const float *x, float *y, float *slope, int64_t tanh, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        int some = n - i < VL ? (int)(n - i) : VL;
        vec by, given = load_some(x + i, some), made = tanh ? gelu_tanh(given, &by) : gelu_exact(given, &by);
        store_some(y + i, made, some);
        store_some(slope + i, by, some);
    }
}
