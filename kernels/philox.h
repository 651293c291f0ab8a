/* The sampler's randomness: Philox4x32-10, a counter-based generator (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
 * easy as 1, 2, 3", SC11), and the Gumbel noise made of it. A pure function of its arguments, the same on CPU and GPU, so a
 * token's noise depends neither on the batch, nor on the shard or thread that asks, nor on what was drawn before.
 *
 *   key     = (low 32 bits, high 32 bits) of the sequence's seed
 *   counter = (token id, position of the new token, choice, 0); the last word is free for other uses of the same seed
 *   u       = (top 52 bits of the 64-bit number word0 * 2^32 + word1, plus 1/2) * 2^-52, exact in a double and never 0 or 1
 *   g       = -log(-log(u)) in double
 *
 * C11, C++17 and CUDA compile this file. */
#pragma once

#include <math.h>

#include "kernels/base.h"

#define PHILOX_MUL_0 0xD2511F53u  /* multipliers and Weyl increments: SC11, section 4.3 and its published code */
#define PHILOX_MUL_1 0xCD9E8D57u
#define PHILOX_WEYL_0 0x9E3779B9u
#define PHILOX_WEYL_1 0xBB67AE85u
enum { PHILOX_ROUNDS = 10 };

/* No noise is larger: u <= 1 - 2^-53, so g < 53 log 2 = 36.7368... */
#define PHILOX_GUMBEL_MAX 36.75

struct philox_block {
    uint32_t w0, w1, w2, w3;
};

HOST_DEVICE static inline struct philox_block philox_block_of(struct philox_block c, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uint64_t p0 = (uint64_t)PHILOX_MUL_0 * c.w0;
        uint64_t p1 = (uint64_t)PHILOX_MUL_1 * c.w2;
        struct philox_block next;
        next.w0 = (uint32_t)(p1 >> 32) ^ c.w1 ^ k0;
        next.w1 = (uint32_t)p1;
        next.w2 = (uint32_t)(p0 >> 32) ^ c.w3 ^ k1;
        next.w3 = (uint32_t)p0;
        c = next;
        k0 += PHILOX_WEYL_0;
        k1 += PHILOX_WEYL_1;
    }
    return c;
}

/* 64 random bits of one token. */
HOST_DEVICE static inline uint64_t philox_bits(uint64_t seed, int32_t choice, int32_t position, int32_t id) {
    struct philox_block counter;
    counter.w0 = (uint32_t)id;
    counter.w1 = (uint32_t)position;
    counter.w2 = (uint32_t)choice;
    counter.w3 = 0;
    counter = philox_block_of(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return (uint64_t)counter.w0 << 32 | counter.w1;
}

/* The open interval (0, 1): from 2^-53 to 1 - 2^-53. */
HOST_DEVICE static inline double philox_uniform(uint64_t bits) {
    return ((double)(bits >> 12) + 0.5) * (1.0 / 4503599627370496.0); /* 2^-52 */
}

HOST_DEVICE static inline double philox_gumbel(uint64_t bits) { return -log(-log(philox_uniform(bits))); }

/* A cheap upper bound of philox_gumbel from the high 32 bits: -log(u) > 1 - u, so g < -log(1 - u), and 1 - u > ~high * 2^-32,
 * whose binary logarithm is at least its highest bit's. Most tokens need no logarithm to be found out of the race. */
HOST_DEVICE static inline double philox_gumbel_bound(uint32_t high) {
    const double log_2 = 0.69314718055994531;
    uint32_t rest = ~high;
#ifdef __CUDA_ARCH__
    int zeros = __clz((int)rest);
#else
    int zeros = rest ? __builtin_clz(rest) : 32;
#endif
    return rest ? (zeros + 1) * log_2 : PHILOX_GUMBEL_MAX;
}
