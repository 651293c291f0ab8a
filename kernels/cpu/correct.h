/* The correction's shared part (KVLinC, 2510.05373, eq. 6 and Algorithm 1): what a flushed block adds to S and P. */
#pragma once

#include "kernels/ops.h"

static inline bool cpu_correct_is_on(const struct cache_layer *layer) {
    return layer->features > 0 && layer->states && layer->phi_k && layer->phi_q;
}

/* Floats of one sequence's and KV head's states: S [features][head_dim], then P [features]. */
static inline int64_t cpu_correct_n_states(const struct cache_layer *layer) {
    return (int64_t)layer->features * layer->format.head_dim + layer->features;
}

/* phi(x) of n rows: x [n][d], w [2][d][features / 2] -> phi [n][features]. */
void cpu_correct_features(const float *w, int d, int features, const float *x, int n, float *phi);

/* The sums over the tokens first .. KV_BLOCK-1 of one block of KV head `head`, laid out as its states: phi_k(K - K^q)^T V and column
 * sums of phi_k. k, v: rows of the window's type; record: the same block encoded. */
void cpu_correct_block(const struct cache_layer *layer, int head, const void *k, const void *v, int first, const uint8_t *record,
                       float *sums);

/* states += sums. Blocks are added in ascending order: that makes S and P the same bits whoever flushed. */
void cpu_correct_add(const struct cache_layer *layer, const float *sums, float *states);
