/* GELU element by element. */
#include "gelu.h"

/* x -> y and slope = dy / dx, of n numbers; tanh: by the approximation with a hyperbolic tangent. */
void gelu_forward(const float *x, float *y, float *slope, int64_t tanh, int64_t n) { gelu(x, y, slope, tanh, n); }
