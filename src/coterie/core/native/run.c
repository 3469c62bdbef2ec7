/* Takes one client's steps: the kernels of a step one after the other, again and again, with nobody between. */
#include "vec.h"

#define MOST 26 /* arguments of a kernel */

typedef struct {
    void *kernel;
    int64_t checked; /* stop when it returns something else than 0 */
    int64_t slots[MOST]; /* an argument is values[i], or, where slots[i] >= 0, that many bytes into that slot */
    int64_t values[MOST];
} Call;

typedef int64_t (*Kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

/* slots: addresses, of which slot i grows by moves[i] bytes with each step; losses [steps]: what stands at the
   address of slot `loss` after each. Pointers and whole numbers travel alike in a call, and arguments that a
   kernel does not have are passed for nothing. Returns 0, or what a kernel returned that stopped it. */
int64_t run_steps(const Call *calls, int64_t count, char **slots, const int64_t *moves, int64_t many,
                  int64_t steps, int64_t loss, float *losses) {
    for (int64_t step = 0; step < steps; step++) {
        for (int64_t c = 0; c < count; c++) {
            const Call *call = calls + c;
            int64_t a[MOST];
            for (int i = 0; i < MOST; i++)
                a[i] = call->values[i] + (call->slots[i] >= 0 ? (int64_t)slots[call->slots[i]] : 0);
            int64_t said = ((Kernel)call->kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9],
                                                  a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18],
                                                  a[19], a[20], a[21], a[22], a[23], a[24], a[25]);
            if (call->checked && said) return said;
        }
        losses[step] = *(const float *)slots[loss];
        for (int64_t i = 0; i < many; i++) slots[i] += moves[i];
    }
    return 0;
}

/* out [rows] = from[index], each so many bytes */
void gather(const char *from, const int64_t *index, char *out, int64_t rows, int64_t bytes) {
    for (int64_t r = 0; r < rows; r++) memcpy(out + r * bytes, from + index[r] * bytes, (size_t)bytes);
}
