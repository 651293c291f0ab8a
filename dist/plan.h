/* The step plan: what rank 0 of a replica decides and every rank of it carries out. Flat and of one size, so that it is one
 * broadcast; what operations read of it (struct step_input) is uploaded as it stands. Page ids are not in it: each rank gives its own
 * pages to the blocks it owns. */
#pragma once

#include "kernels/ops.h"

enum plan_kind {
    PLAN_STEP,    /* rows through all layers, then logits and samples of some of them */
    PLAN_ADMIT,   /* a sequence takes slot `seq`; its prompt and parameters follow in a second broadcast */
    PLAN_PREFILL, /* one layer of the exact prefill of slot `seq`; layer 0 begins it */
    PLAN_SCORE,   /* logits of rows of the exact prefill that has passed all layers */
    PLAN_STOP,    /* the followers go home */
};

enum plan_filters { /* each includes the ones before */
    PLAN_FILTERS_NONE,
    PLAN_FILTERS_MASS,  /* top-p or min-p */
    PLAN_FILTERS_COUNT, /* top-k */
    PLAN_N_FILTERS,
};

struct step_plan {
    int32_t kind;
    int32_t seq;          /* PLAN_ADMIT, PLAN_PREFILL, PLAN_SCORE */
    int32_t layer;        /* PLAN_PREFILL */
    int32_t first;        /* PLAN_SCORE: position of row 0 */
    int64_t n_prompt;     /* PLAN_ADMIT, PLAN_PREFILL: tokens */
    int32_t rows_bucket;  /* PLAN_STEP: buffers are used as for so many rows */
    int32_t logits_bucket;
    int32_t sample_bucket;
    int32_t filters;      /* what some sampled row has: enum plan_filters */
    bool top;             /* some row wants alternatives */
    int32_t n_release;
    int32_t release[STEP_MAX_ROWS]; /* slots whose sequences are over: their pages are free before anything else happens */
    int32_t flush_offset[STEP_MAX_ROWS]; /* owner offset of each input.flush's sequence */
    struct step_input input;
};

/* Smallest of the sizes 0, 1, 2, 4, 8, ... that holds n: buffers and recordings are made for these. */
static inline int plan_bucket(int n) {
    int bucket = n > 0 ? 1 : 0;
    while (bucket < n)
        bucket *= 2;
    return bucket;
}
