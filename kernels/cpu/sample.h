/* How the sampler's CPU operations (sample.c, filter.c) cut a row of the vocabulary: chunks whose bounds depend on the row's length
 * alone, so that sums come out the same for every number of threads. */
#pragma once

#include <math.h>

#include "kernels/base.h"

enum {
    SAMPLE_CHUNK = 8192,     /* logits of a chunk: 32 KiB, one core's first cache */
    SAMPLE_MAX_CHUNKS = 256, /* partial results held at once on the stack */
    SAMPLE_BLOCK = 256,      /* tokens that a vector loop prepares for a scalar one */
    SAMPLE_LANES = 16,       /* sums or maxima side by side, which a compiler may then keep in vectors */
};

struct sample_split {
    int64_t n, chunk; /* tokens, tokens of a chunk */
    int64_t n_chunks; /* at least 1, so that an empty shard writes its results too */
    int64_t n_group;  /* rows whose chunks fit SAMPLE_MAX_CHUNKS */
};

static inline struct sample_split sample_split_of(int64_t n) {
    struct sample_split s;
    s.n = n;
    s.chunk = max_i64(SAMPLE_CHUNK, round_up(ceil_div(n, SAMPLE_MAX_CHUNKS), SAMPLE_BLOCK));
    s.n_chunks = max_i64(1, ceil_div(n, s.chunk));
    s.n_group = SAMPLE_MAX_CHUNKS / s.n_chunks;
    return s;
}

/* Largest of n logits, NaN left out; -inf if there is none. */
static inline float sample_max(const float *x, int64_t n) {
    float lanes[SAMPLE_LANES], max = -INFINITY;
    const int64_t whole = n - n % SAMPLE_LANES;
    for (int lane = 0; lane < SAMPLE_LANES; lane++)
        lanes[lane] = -INFINITY;
    for (int64_t j = 0; j < whole; j += SAMPLE_LANES)
        for (int lane = 0; lane < SAMPLE_LANES; lane++)
            lanes[lane] = x[j + lane] > lanes[lane] ? x[j + lane] : lanes[lane];
    for (int64_t j = whole; j < n; j++)
        max = x[j] > max ? x[j] : max;
    for (int lane = 0; lane < SAMPLE_LANES; lane++)
        max = lanes[lane] > max ? lanes[lane] : max;
    return max;
}
