/* See rates.h. Threads take equal pieces in whole cache lines; a matrix product runs on one thread as everywhere else here. */
#include "kernels/rates.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/gemm.h"

enum {
    LINE = 64,
    WORDS = LINE / 8,
    STREAMS = 8,  /* places that a thread reads from in turn, and */
    AHEAD = 4096, /* bytes that it asks for in advance: what reads fastest of those tried on a Xeon (Sapphire Rapids) */
};

static size_t piece_begin(size_t bytes, int n_threads, int thread) {
    size_t lines = bytes / LINE;
    return lines * (size_t)thread / (size_t)n_threads * LINE;
}

static uint64_t read_piece(const uint64_t *words, size_t n) {
    uint64_t lanes[WORDS] = {0}, sum = 0;
    size_t stream = n / WORDS / STREAMS * WORDS;
    for (size_t i = 0; i < stream; i += WORDS)
        for (size_t s = 0; s < STREAMS; s++) {
            const uint64_t *line = words + s * stream + i;
            __builtin_prefetch((const char *)line + AHEAD);
            for (int j = 0; j < WORDS; j++)
                lanes[j] ^= line[j];
        }
    for (size_t i = STREAMS * stream; i < n; i += WORDS)
        for (int j = 0; j < WORDS; j++)
            lanes[j] ^= words[i + (size_t)j];
    for (int j = 0; j < WORDS; j++)
        sum += lanes[j];
    return sum;
}

uint64_t rates_read(const void *data, size_t bytes, int n_threads) {
    uint64_t sum = 0;
#pragma omp parallel for num_threads(n_threads) schedule(static) reduction(+ : sum)
    for (int t = 0; t < n_threads; t++) {
        size_t begin = piece_begin(bytes, n_threads, t), end = piece_begin(bytes, n_threads, t + 1);
        sum += read_piece((const uint64_t *)data + begin / 8, (end - begin) / 8);
    }
    return sum;
}

void rates_copy(void *to, const void *from, size_t bytes, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int t = 0; t < n_threads; t++) {
        size_t begin = piece_begin(bytes, n_threads, t), end = piece_begin(bytes, n_threads, t + 1);
        memcpy((char *)to + begin, (const char *)from + begin, end - begin);
    }
}

void rates_fill(void *data, size_t bytes, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int t = 0; t < n_threads; t++) {
        size_t begin = piece_begin(bytes, n_threads, t), end = piece_begin(bytes, n_threads, t + 1);
        memset((char *)data + begin, 0x5a, end - begin);
    }
}

/* ---- matrix products ------------------------------------------------------------------------------------------------ */

struct rates_gemm {
    int n_threads;
    int64_t m, n, k, stride; /* floats of one thread: a, b, c, each on a cache line of its own */
    float *memory;
};

static int64_t padded(int64_t n) { return round_up(n, LINE / (int64_t)sizeof(float)); }

int rates_gemm_open(int n_threads, int64_t m, int64_t n, int64_t k, struct rates_gemm **out) {
    struct rates_gemm *g;
    *out = NULL;
    TRY(base_alloc(&g, 1, sizeof *g));
    *g = (struct rates_gemm){n_threads, m, n, k, padded(m * k) + padded(n * k) + padded(m * n), NULL};
    int64_t count = g->stride * n_threads;
    void *memory = NULL;
    if (posix_memalign(&memory, LINE, (size_t)count * sizeof(float)) != 0) {
        free(g);
        FAIL(STATUS_MEMORY, "out of memory: matrices of %lld floats", (long long)count);
    }
    g->memory = memory;
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int t = 0; t < n_threads; t++)
        for (int64_t i = 0; i < g->stride; i++)
            g->memory[t * g->stride + i] = (float)(i % 17) * 0.0625f - 0.5f;
    *out = g;
    return STATUS_OK;
}

void rates_gemm_run(struct rates_gemm *g) {
#pragma omp parallel for num_threads(g->n_threads) schedule(static)
    for (int t = 0; t < g->n_threads; t++) {
        float *a = g->memory + t * g->stride, *b = a + padded(g->m * g->k), *c = b + padded(g->n * g->k);
        gemm(g->m, g->n, g->k, (struct gemm_matrix){a, g->k, false}, (struct gemm_matrix){b, g->k, true}, 0.0f, c, g->n);
    }
}

void rates_gemm_close(struct rates_gemm *g) {
    if (g)
        free(g->memory);
    free(g);
}

const char *rates_blas(void) { return openblas_get_config(); }
