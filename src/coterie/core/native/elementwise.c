/* Element by element, with any strides, so also broadcast. layout: dimensions, sizes, then the strides of out,
   of x and of y in elements; the last dimension is the inner loop. */
#include "vec.h"

#define RUN(result)                                                                                          \
    if (so == 1 && sx == 1 && sy == 1)                                                                       \
        for (int64_t i = 0; i < n; i++) { float a = x[i], b = y[i]; (void)b; o[i] = result; }                \
    else if (so == 1 && sx == 1 && !sy) {                                                                    \
        float b = *y;                                                                                        \
        for (int64_t i = 0; i < n; i++) { float a = x[i]; (void)b; o[i] = result; }                          \
    } else                                                                                                   \
        for (int64_t i = 0; i < n; i++) { float a = x[i * sx], b = y[i * sy]; (void)b; o[i * so] = result; } \
    break;

enum { ADD, SUBTRACT, MULTIPLY, DIVIDE, ADD_PRODUCT, ADD_TO, WHERE_POSITIVE, COPY, NEGATE, RELU };

/* out = x (what) y; the last few look at x alone, but y must be given. */
void elementwise(int64_t what, float *out, const float *x, const float *y, const int64_t *layout) {
    int64_t dims = layout[0], at[8] = {0};
    const int64_t *sizes = layout + 1, *of_o = sizes + dims, *of_x = of_o + dims, *of_y = of_x + dims;
    const int64_t n = sizes[dims - 1], so = of_o[dims - 1], sx = of_x[dims - 1], sy = of_y[dims - 1];
    for (;;) {
        float *o = out;
        switch (what) {
        case ADD: RUN(a + b)
        case SUBTRACT: RUN(a - b)
        case MULTIPLY: RUN(a * b)
        case DIVIDE: RUN(a / b)
        case ADD_PRODUCT: RUN(o[i * so] + a * b)
        case ADD_TO: RUN(o[i * so] + a)
        case WHERE_POSITIVE: RUN(b <= 0 ? 0 : a)
        case COPY: RUN(a)
        case NEGATE: RUN(-a)
        case RELU: RUN(a <= 0 ? 0 : a)
        }
        int64_t d = dims - 2;
        for (; d >= 0; d--) {
            out += of_o[d], x += of_x[d], y += of_y[d];
            if (++at[d] < sizes[d]) break;
            out -= sizes[d] * of_o[d], x -= sizes[d] * of_x[d], y -= sizes[d] * of_y[d];
            at[d] = 0;
        }
        if (d < 0) return;
    }
}
