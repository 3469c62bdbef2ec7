/* gru.c with bfloat16: products of pairs, where the processor has them. */
#ifdef __AVX512BF16__
#define BF16
#include "gru.c"
#endif
