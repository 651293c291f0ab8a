/* The decode path's launches. Shapes stand in forward.h and ops.h; the order of collectives is the same on every rank because it
 * depends on the plan alone. */
#include "engine/forward.h"

#include <string.h>

static int take(struct forward *f, int64_t n, size_t size, void *pointer) {
    return backend_alloc(f->rank->backend, MEMORY_WORKSPACE, (size_t)n * size, pointer);
}

static int take_shared(struct forward *f, int64_t n, size_t size, void *pointer) {
    return comm_alloc(f->rank->replica, f->rank->backend, (size_t)n * size, pointer);
}

static int init_layers(struct forward *f) {
    const struct rank *r = f->rank;
    int64_t n = f->max_rows, hidden = r->config->hidden, inner = range_size(r->weights.slices.inner);
    size_t width = dtype_bytes(r->spec->window_type, r->config->head_dim);
    TRY(take(f, 1, sizeof *f->input, &f->input));
    TRY(take(f, n, sizeof *f->tokens, &f->tokens));
    TRY(take(f, n, sizeof *f->positions, &f->positions));
    TRY(take_shared(f, n * hidden, sizeof(float), &f->x));
    TRY(take_shared(f, n * hidden, sizeof(float), &f->projected));
    TRY(take(f, n * hidden, sizeof(float), &f->norm));
    TRY(take(f, n * rank_qkv_width(r), sizeof(float), &f->qkv));
    TRY(take(f, n * rank_n_heads(r), width, &f->q));
    TRY(take(f, n * rank_n_kv_heads(r), width, &f->k));
    TRY(take(f, n * rank_n_kv_heads(r), width, &f->v));
    TRY(take(f, n * rank_heads_width(r), sizeof(float), &f->attention));
    TRY(take(f, n * 2 * inner, sizeof(float), &f->gate_up));
    return take(f, n * inner, sizeof(float), &f->act);
}

static int init_head(struct forward *f) {
    const struct rank *r = f->rank;
    int64_t n = f->max_rows, vocab = range_size(r->weights.slices.vocab);
    TRY(take(f, n * r->config->hidden, sizeof(float), &f->picked));
    TRY(take(f, n * vocab, sizeof(float), &f->logits));
    TRY(take(f, f->max_sample * vocab, sizeof(float), &f->processed));
    TRY(take_shared(f, f->max_sample, sizeof(float), &f->row_max));
    TRY(take(f, f->max_sample, sizeof *f->filter, &f->filter));
    TRY(take_shared(f, (int64_t)f->max_sample * (FILTER_BINS + 1), sizeof *f->bins, &f->bins));
    TRY(take_shared(f, n * comm_size(r->replica), sizeof *f->records, &f->records));
    return take(f, n, sizeof *f->results, &f->results);
}

int forward_init(struct forward *f, struct rank *rank, int max_rows, int max_sample) {
    *f = (struct forward){.rank = rank, .max_rows = max_rows, .max_sample = max_sample};
    int status = init_layers(f);
    if (status == STATUS_OK)
        status = init_head(f);
    if (status < 0)
        forward_deinit(f);
    return status;
}

void forward_deinit(struct forward *f) {
    if (!f->rank)
        return;
    struct backend *b = f->rank->backend;
    void *own[] = {f->input, f->tokens, f->positions, f->norm, f->qkv, f->q, f->k, f->v, f->attention, f->gate_up, f->act,
                   f->picked, f->logits, f->processed, f->filter, f->results};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        backend_free(b, own[i]);
    void *shared[] = {f->x, f->projected, f->row_max, f->bins, f->records};
    for (size_t i = 0; i < sizeof shared / sizeof *shared; i++)
        if (shared[i])
            comm_release(f->rank->replica, b, shared[i]);
    for (int i = 0; i < FORWARD_BUCKETS; i++)
        graph_close(f->body[i]);
    for (size_t i = 0; i < sizeof f->step / sizeof(struct graph *); i++)
        graph_close((&f->step[0][0][0])[i]);
    for (size_t i = 0; i < sizeof f->head / sizeof(struct graph *); i++)
        graph_close((&f->head[0][0][0][0])[i]);
    *f = (struct forward){0};
}

/* ---- body ---------------------------------------------------------------------------------------------------------- */

static int embed(struct forward *f, int n) {
    const struct rank *r = f->rank;
    const struct weights *w = &r->weights;
    TRY(op_step_begin(r->stream, &(struct step_begin_args){f->input, n, r->cache.last_token, f->tokens, f->positions}));
    TRY(op_embed(r->stream, &(struct embed_args){.n_rows = n, .live = &f->input->n_rows, .tokens = f->tokens, .table = w->embed.data,
                                                 .dtype = w->dtype, .vocab_begin = w->slices.vocab.begin,
                                                 .vocab_count = range_size(w->slices.vocab), .hidden = r->config->hidden, .x = f->x}));
    return rank_sum(r->replica, r->stream, "sum of embeddings", f->x, (int64_t)n * r->config->hidden);
}

static int attention(struct forward *f, int layer, int n) {
    const struct rank *r = f->rank;
    const struct cache *c = &r->cache;
    const struct cache_layer *cl = &c->layers[layer];
    const struct layer_weights *w = &r->weights.layers[layer];
    const int32_t *live = &f->input->n_rows;
    bool correction = cl->features > 0;
    int stride = partial_stride(r->config->head_dim, correction);
    float *partial = merge_partial(&r->merge, n, correction);
    TRY(op_rope(r->stream, &(struct rope_args){.n_rows = n, .live = live, .qkv = f->qkv, .positions = f->positions,
                                               .inv_freq = r->weights.inv_freq, .q_norm = w->q_norm, .k_norm = w->k_norm,
                                               .norm_eps = r->config->rms_eps, .n_heads = rank_n_heads(r),
                                               .n_kv_heads = rank_n_kv_heads(r), .head_dim = r->config->head_dim,
                                               .dtype = r->spec->window_type, .q = f->q, .k = f->k, .v = f->v}));
    TRY(op_flush(r->stream, &(struct flush_args){.in = f->input, .params = c->params, .layout = c->layout, .layer = *cl,
                                                 .page_table = c->page_table, .table_stride = c->table_stride,
                                                 .write_table = layer == 0}));
    TRY(op_append(r->stream, &(struct append_args){.in = f->input, .params = c->params, .layout = c->layout, .layer = *cl,
                                                   .k = f->k, .v = f->v}));
    struct attend_args attend = {.in = f->input, .n_rows = n, .params = c->params, .layout = c->layout, .layer = *cl,
                                 .page_table = c->page_table, .table_stride = c->table_stride, .n_heads = rank_n_heads(r),
                                 .scale = rank_score_scale(r), .q = f->q, .partial = partial, .stride = stride};
    bool is_alone = comm_size(r->merge.comm) == 1;
    if (f->decodes) {
        TRY(op_attend_step(r->stream, &(struct attend_step_args){attend, is_alone ? f->attention : NULL}));
        return is_alone ? STATUS_OK : merge_run(&r->merge, r->stream, n, live, correction, f->attention);
    }
    TRY(op_attend(r->stream, &attend));
    if (correction)
        TRY(op_correct(r->stream, &(struct correct_args){.in = f->input, .n_rows = n, .layout = c->layout, .layer = *cl,
                                                         .n_heads = rank_n_heads(r), .q = f->q, .partial = partial, .stride = stride}));
    return merge_run(&r->merge, r->stream, n, live, correction, f->attention);
}

/* projected = sum over ranks of w (rows at `from`), for the residual stream. */
static int project_residual(struct forward *f, int n, const float *from, int64_t ldx, const struct matrix *w, const char *what) {
    const struct rank *r = f->rank;
    TRY(rank_project(r, r->stream, n, &f->input->n_rows, from, ldx, w, NULL, f->projected));
    return rank_sum(r->replica, r->stream, what, f->projected, (int64_t)n * r->config->hidden);
}

static int add_projected(struct forward *f, int n) {
    const struct rank *r = f->rank;
    return op_add(r->stream, &(struct add_args){n, &f->input->n_rows, r->config->hidden, f->x, f->projected});
}

/* Both, x += projected first. */
static int add_norm(struct forward *f, int n, const float *weight) {
    const struct rank *r = f->rank;
    return op_add_rmsnorm(r->stream, &(struct add_rmsnorm_args){.n_rows = n, .live = &f->input->n_rows, .x = f->x, .y = f->projected,
                                                                .weight = weight, .eps = r->config->rms_eps,
                                                                .hidden = r->config->hidden, .out = f->norm});
}

static int norm(struct forward *f, int n, const float *weight) {
    const struct rank *r = f->rank;
    return op_rmsnorm(r->stream, &(struct rmsnorm_args){.n_rows = n, .live = &f->input->n_rows, .x = f->x, .weight = weight,
                                                        .eps = r->config->rms_eps, .hidden = r->config->hidden, .out = f->norm});
}

/* From the rows' norm to what the layer adds to x last, which is left in `projected`. */
static int layer_body(struct forward *f, int layer, int n) {
    const struct rank *r = f->rank;
    const struct layer_weights *w = &r->weights.layers[layer];
    const struct weights_slices *s = &r->weights.slices;
    const int32_t *live = &f->input->n_rows;
    int64_t hidden = r->config->hidden, inner = range_size(s->inner);
    TRY(rank_project(r, r->stream, n, live, f->norm, hidden, &w->qkv, w->qkv_bias, f->qkv));
    TRY(attention(f, layer, n));
    int64_t first_column = s->o_columns.begin - s->heads.begin * r->config->head_dim;
    TRY(project_residual(f, n, f->attention + first_column, rank_heads_width(r), &w->o, "sum of o_proj"));
    TRY(add_norm(f, n, w->mlp_norm));
    TRY(rank_project(r, r->stream, n, live, f->norm, hidden, &w->gate_up, NULL, f->gate_up));
    TRY(op_silu_mul(r->stream, &(struct silu_mul_args){n, live, f->gate_up, inner, f->act}));
    return project_residual(f, n, f->act, inner, &w->down, "sum of down_proj");
}

int forward_layer(struct forward *f, int layer, int n) {
    TRY(norm(f, n, f->rank->weights.layers[layer].attn_norm));
    TRY(layer_body(f, layer, n));
    return add_projected(f, n);
}

/* The same layers in a row: what one adds goes into x together with the norm of the next. The head's norm takes other rows (its pick), so
 * the last layer's stands alone. */
static int launch_body(struct forward *f, int n) {
    const struct layer_weights *layers = f->rank->weights.layers;
    TRY(embed(f, n));
    TRY(norm(f, n, layers[0].attn_norm));
    for (int i = 0; i < f->rank->config->n_layers; i++) {
        if (i > 0)
            TRY(add_norm(f, n, layers[i].attn_norm));
        TRY(layer_body(f, i, n));
    }
    return add_projected(f, n);
}

static int bucket_index(int bucket) {
    int index = 0;
    for (int size = 1; size <= bucket; size *= 2)
        index++;
    return index;
}

static int upload(struct forward *f, const struct step_input *input) {
    return stream_copy_in(f->rank->stream, f->input, input, sizeof *input);
}

int forward_begin(struct forward *f, const struct step_input *input, int n) {
    f->decodes = false;
    TRY(upload(f, input));
    return embed(f, n);
}

/* ---- head ---------------------------------------------------------------------------------------------------------- */

/* The first three rounds search for top-k, the last three for top-p; the last one applies min-p too. */
static int launch_filter(struct forward *f, int n_sample, int64_t vocab, enum plan_filters filters) {
    const struct rank *r = f->rank;
    struct filter_begin_args begin = {.in = f->input, .n_sample = n_sample, .params = r->cache.params, .vocab_count = vocab,
                                      .processed = f->processed, .find_max = true, .max = f->row_max, .state = f->filter};
    TRY(op_filter_begin(r->stream, &begin));
    if (comm_size(r->replica) > 1)
        TRY(comm_all_reduce(r->replica, r->stream, "max of logits", f->row_max, f->row_max, n_sample, COMM_FLOAT, COMM_MAX));
    begin.find_max = false;
    TRY(op_filter_begin(r->stream, &begin));
    for (int round = filters == PLAN_FILTERS_COUNT ? 0 : FILTER_ROUNDS / 2; round < FILTER_ROUNDS; round++) {
        TRY(op_filter_count(r->stream, &(struct filter_count_args){f->input, n_sample, round, vocab, f->processed, f->filter, f->bins}));
        if (comm_size(r->replica) > 1)
            TRY(comm_all_reduce(r->replica, r->stream, "sum of filter counts", f->bins, f->bins, (int64_t)n_sample * (FILTER_BINS + 1),
                                COMM_UINT64, COMM_SUM));
        TRY(op_filter_narrow(r->stream, &(struct filter_narrow_args){f->input, n_sample, round, r->cache.params, f->bins, f->filter}));
    }
    return STATUS_OK;
}

static int launch_head(struct forward *f, int n, int n_sample, enum plan_filters filters, bool top) {
    const struct rank *r = f->rank;
    const struct weights *w = &r->weights;
    const int32_t *live = &f->input->n_logits;
    int n_ranks = comm_size(r->replica);
    int64_t vocab = range_size(w->slices.vocab), hidden = r->config->hidden;
    TRY(op_rmsnorm(r->stream, &(struct rmsnorm_args){.n_rows = n, .live = live, .pick = f->input->logit, .x = f->x,
                                                     .weight = w->final_norm, .eps = r->config->rms_eps, .hidden = (int)hidden,
                                                     .out = f->picked}));
    TRY(rank_project(r, r->stream, n, live, f->picked, hidden, &w->head, NULL, f->logits));
    if (n_sample) {
        TRY(op_logits_process(r->stream, &(struct logits_process_args){f->input, n_sample, r->cache.params, r->cache.counts, f->logits,
                                                                       f->processed}));
        if (filters)
            TRY(launch_filter(f, n_sample, vocab, filters));
    }
    struct sample_record *own = f->records + (int64_t)comm_rank(r->replica) * n;
    TRY(op_sample(r->stream, &(struct sample_args){.in = f->input, .n_logits = n, .n_sample = n_sample, .filtered = filters != PLAN_FILTERS_NONE,
                                                   .top = top, .params = r->cache.params, .vocab_begin = w->slices.vocab.begin,
                                                   .vocab_count = vocab, .logits = f->logits, .processed = f->processed,
                                                   .state = f->filter, .records = own}));
    if (n_ranks > 1)
        TRY(comm_all_gather(r->replica, r->stream, "gather of samples", own, f->records, n * (int64_t)sizeof *own));
    return op_sample_merge(r->stream, &(struct sample_merge_args){.in = f->input, .n_logits = n, .n_sample = n_sample, .top = top,
                                                                  .n_ranks = n_ranks, .records = f->records,
                                                                  .last_token = r->cache.last_token, .counts = r->cache.counts,
                                                                  .results = f->results});
}

/* ---- recordings ---------------------------------------------------------------------------------------------------- */

/* Rows through all layers if there is a body, then logits and samples if there is a head. */
struct part {
    bool body, head;
};

static int launch_part(struct forward *f, const struct step_plan *plan, struct part part) {
    f->decodes = part.body && part.head;
    if (part.body)
        TRY(launch_body(f, plan->rows_bucket));
    return part.head ? launch_head(f, plan->logits_bucket, plan->sample_bucket, plan->filters, plan->top) : STATUS_OK;
}

static int replay(struct forward *f, struct graph **graph, const struct step_plan *plan, struct part part) {
    if (!*graph) {
        TRY(backend_record_begin(f->rank->backend));
        int status = launch_part(f, plan, part);
        int ended = backend_record_end(f->rank->backend, graph);
        TRY(status);
        TRY(ended);
    }
    return graph_replay(*graph);
}

static int replay_head(struct forward *f, const struct step_plan *plan) {
    struct graph **graph =
        &f->head[bucket_index(plan->logits_bucket)][bucket_index(plan->sample_bucket)][plan->filters][plan->top];
    return plan->logits_bucket ? replay(f, graph, plan, (struct part){.head = true}) : STATUS_OK;
}

int forward_step(struct forward *f, const struct step_plan *plan, const struct step_input *input) {
    int rows = plan->rows_bucket;
    TRY(upload(f, input));
    if (rows == plan->logits_bucket && rows == plan->sample_bucket)
        return replay(f, &f->step[bucket_index(rows)][plan->filters][plan->top], plan, (struct part){true, true});
    TRY(replay(f, &f->body[bucket_index(rows)], plan, (struct part){.body = true}));
    return replay_head(f, plan);
}

int forward_head(struct forward *f, const struct step_plan *plan, const struct step_input *input) {
    if (plan->logits_bucket)
        TRY(upload(f, input));
    return replay_head(f, plan);
}
