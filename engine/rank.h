/* What one rank of a replica computes with, put together by engine.c and used by forward.c and prefill.c: nothing here is owned twice. */
#pragma once

#include "dist/merge.h"
#include "engine/cache.h"
#include "engine/weights.h"

#include <math.h>

struct rank {
    struct backend *backend;
    struct stream *stream; /* everything but weight gathers */
    struct stream *side;   /* weight gathers of exact prefill */
    struct comm *replica, *tp, *cp;
    struct comm *gather;   /* the cp ranks once more, for the side stream */
    struct grid grid;
    const struct model_config *config;
    const struct cache_spec *spec;
    struct weights weights;
    struct cache cache;
    struct merge merge;
    bool o_whole;          /* merge = fused over several cp ranks: every one holds W_o of its tp slice */
};

static inline int rank_n_heads(const struct rank *r) { return (int)range_size(r->weights.slices.heads); }
static inline int rank_n_kv_heads(const struct rank *r) { return (int)range_size(r->weights.slices.kv_heads); }
static inline int64_t rank_qkv_width(const struct rank *r) {
    return (int64_t)(rank_n_heads(r) + 2 * rank_n_kv_heads(r)) * r->config->head_dim;
}
static inline int64_t rank_heads_width(const struct rank *r) { return (int64_t)rank_n_heads(r) * r->config->head_dim; }

static inline float rank_score_scale(const struct rank *r) { return 1.0f / sqrtf((float)r->config->head_dim); }

/* One projection of n_rows rows (buffers); see struct matmul_args. */
static inline int rank_project(const struct rank *r, struct stream *stream, int n_rows, const int32_t *live, const float *x, int64_t ldx,
                               const struct matrix *w, const float *bias, float *y) {
    struct matmul_args args = {.n_rows = n_rows, .live = live, .x = x, .ldx = ldx, .w = w->data, .dtype = r->weights.dtype,
                               .bias = bias, .n_in = w->n_in, .n_out = w->n_out, .y = y, .ldy = w->n_out};
    return op_matmul(stream, &args);
}

/* Sum over the ranks of `comm` in place; nothing to do for one rank. */
static inline int rank_sum(struct comm *comm, struct stream *stream, const char *what, float *x, int64_t count) {
    return comm_size(comm) > 1 ? comm_all_reduce(comm, stream, what, x, x, count, COMM_FLOAT, COMM_SUM) : STATUS_OK;
}
