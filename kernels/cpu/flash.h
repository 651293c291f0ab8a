/* Attention of many query vectors at once over pieces of up to FLASH_KEYS keys that are given as float: two matrix products and an
 * exponential in place (the online softmax of FlashAttention, 2205.14135). Queries lie side by side, so maxima and sums
 * run down columns and need no shuffles. For attend_block.c (pages) and attend_exact.c (prompts). */
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/page.h"

enum {
    FLASH_KEYS = 128,
    FLASH_MAX_VECTORS = 192,
};

/* Query vectors of one tile: with 96 x 64 OpenBLAS multiplies without packing first; measured. */
static inline int flash_vectors(int d) { return d <= 64 ? 96 : FLASH_MAX_VECTORS; }

struct flash { /* about 0.4 MiB, for the stack of the thread that uses it */
    int d, n;      /* n: a multiple of 16 */
    int n_pieces;  /* in m, l, y; added to the totals now and then, so that small terms do not vanish one by one */
    _Alignas(64) float q[KV_MAX_HEAD_DIM * FLASH_MAX_VECTORS]; /* [d][n], scaled */
    float s[FLASH_KEYS * FLASH_MAX_VECTORS];                   /* [keys][n] */
    float m[FLASH_MAX_VECTORS], l[FLASH_MAX_VECTORS], y[FLASH_MAX_VECTORS * KV_MAX_HEAD_DIM]; /* y: [n][d] */
    float total_m[FLASH_MAX_VECTORS], total_l[FLASH_MAX_VECTORS], total_y[FLASH_MAX_VECTORS * KV_MAX_HEAD_DIM];
};

/* Starts `n_vectors` queries (at most flash_vectors(d)), to be set one by one from index i of `q`, an array of type `dtype`. */
void flash_begin(struct flash *f, int d, int n_vectors);
void flash_set_query(struct flash *f, int vector, enum dtype dtype, const void *q, int64_t i, float scale);

/* Adds n_keys keys (used as [n_keys][d]) and their values [n_keys][d]. `visible`: query i sees the first visible[i] keys of this
 * piece (any number, also below 0), n floats; NULL: all. */
void flash_add(struct flash *f, struct gemm_matrix keys, const float *values, int n_keys, const float *visible);

/* Completes total_m, total_l, total_y: -inf, 0, 0 for a query that saw no key. */
void flash_end(struct flash *f);
