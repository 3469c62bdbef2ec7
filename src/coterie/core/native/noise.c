/* The two loops of coterie.privacy.noise: a ChaCha20 stream, and draws from alias tables. */
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef uint32_t Lanes __attribute__((vector_size(4 * LANES)));

#define TURN(x, by) ((x << by) | (x >> (32 - by)))
#define QUARTER(a, b, c, d) \
    a += b, d ^= a, d = TURN(d, 16), c += d, b ^= c, b = TURN(b, 12), \
    a += b, d ^= a, d = TURN(d, 8), c += d, b ^= c, b = TURN(b, 7)

/* out [groups, 16, LANES]: word i of block counter + l of ChaCha20 (RFC 8439, section 2.3) at [i, l] of its
   group of LANES blocks, so that no lanes need to be exchanged. key [8], nonce 0, a counter of 64 bits. */
void noise_stream(const uint32_t *key, uint32_t *out, int64_t counter, int64_t groups) {
    static const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    for (int64_t g = 0; g < groups; g++, counter += LANES) {
        Lanes start[16], x[16];
        for (int i = 0; i < 16; i++)
            for (int l = 0; l < LANES; l++) {
                uint64_t block = (uint64_t)counter + l;
                start[i][l] = i < 4    ? constants[i]
                              : i < 12 ? key[i - 4]
                              : i < 14 ? (uint32_t)(block >> (32 * (i - 12)))
                                       : 0;
            }
        memcpy(x, start, sizeof x);
        for (int round = 0; round < 10; round++) {
            QUARTER(x[0], x[4], x[8], x[12]);
            QUARTER(x[1], x[5], x[9], x[13]);
            QUARTER(x[2], x[6], x[10], x[14]);
            QUARTER(x[3], x[7], x[11], x[15]);
            QUARTER(x[0], x[5], x[10], x[15]);
            QUARTER(x[1], x[6], x[11], x[12]);
            QUARTER(x[2], x[7], x[8], x[13]);
            QUARTER(x[3], x[4], x[9], x[14]);
        }
        for (int i = 0; i < 16; i++) x[i] += start[i];
        memcpy(out + g * 16 * LANES, x, sizeof x);
    }
}

/* out [n] += factor * (first + a cell or its alias); how many words fell on the edge of a cell, and were
   given to the alias for now. An entry is 48 bits of threshold above 16 of alias. */
int64_t noise_pick(const uint64_t *words, const uint64_t *entries, int64_t *out, int64_t n, int64_t mask,
                   int64_t first, int64_t factor) {
    int64_t edges = 0;
    for (int64_t i = 0; i < n; i++) {
        uint64_t cell = words[i] & (uint64_t)mask, entry = entries[cell];
        uint64_t low = words[i] >> 16, edge = entry >> 16;
        uint64_t picked = low < edge ? cell : entry & 0xffff;
        edges += low == edge;
        out[i] += factor * (first + (int64_t)picked);
    }
    return edges;
}
