/* The decode path: rows of any sequences through all layers and out as tokens. Prompts go this way too under cached prefill, and short
 * ones always. Dense layers are sliced over all ranks of the replica; every rank holds every row's residual stream.
 *
 * All buffers are allocated here once. The work of a step is recorded the first time a bucket is met and replayed from then on: a step in
 * which every row is sampled (decoding) is one recording, others are two, `body` by rows and `head` by logits rows and what sampling
 * needs. */
#pragma once

#include "engine/rank.h"

enum { FORWARD_BUCKETS = 10 }; /* 0, 1, 2, 4, ..., 256 */

struct forward {
    struct rank *rank;
    int max_rows, max_sample;
    bool decodes; /* what is launched now: a step of which (nearly) every row is a sequence of its own */
    /* device */
    struct step_input *input;
    int32_t *tokens, *positions;
    float *x, *norm, *qkv, *attention, *projected, *gate_up, *act;
    void *q, *k, *v;
    float *picked, *logits, *processed, *row_max;
    struct filter_state *filter;
    uint64_t *bins;
    struct sample_record *records; /* [replica ranks][rows] */
    struct sample_result *results;
    struct graph *step[FORWARD_BUCKETS][PLAN_N_FILTERS][2]; /* rows, filters, top */
    struct graph *body[FORWARD_BUCKETS];
    struct graph *head[FORWARD_BUCKETS][FORWARD_BUCKETS][PLAN_N_FILTERS][2]; /* logits, samples, filters, top */
};

int forward_init(struct forward *forward, struct rank *rank, int max_rows, int max_sample);
void forward_deinit(struct forward *forward);

/* Uploads `input` (MEMORY_HOST, left alone until the stream has passed), runs the step's rows through all layers, and what
 * forward_head does. Collective. */
int forward_step(struct forward *forward, const struct step_plan *plan, const struct step_input *input);

/* Uploads `input`; logits, samples and log-probabilities of plan->input.logit from the residual rows in forward->x. Results are in
 * forward->results. Collective. */
int forward_head(struct forward *forward, const struct step_plan *plan, const struct step_input *input);

/* The same body piece by piece, launched and not recorded: the step's input and embeddings into forward->x, then one layer after the other,
 * between which a caller may put other rows into forward->x. n_rows: as rows_bucket. Collective. */
int forward_begin(struct forward *forward, const struct step_input *input, int n_rows);
int forward_layer(struct forward *forward, int layer, int n_rows);
