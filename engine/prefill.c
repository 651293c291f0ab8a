/* Exact prefill. "Local rows" are this rank's two chunks (2 chunk rows, padding at the end of a chunk included) when weights are
 * gathered, all n tokens in position order otherwise. */
#include "engine/prefill.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static int64_t chunk_of(int64_t n, int cp) { return ceil_div(n, 2 * cp); }

static int64_t max_replicated(const struct prefill *p) {
    return min_i64(p->max_tokens, (int64_t)p->gather_from * p->rank->grid.cp);
}

static int64_t max_local_rows(const struct prefill *p) {
    return max_i64(2 * chunk_of(p->max_tokens, p->rank->grid.cp), round_up(max_replicated(p), 2));
}

static int take(struct prefill *p, int64_t n, size_t size, void *pointer) {
    return backend_alloc(p->rank->backend, MEMORY_WORKSPACE, (size_t)n * size, pointer);
}

static int init_rows(struct prefill *p) {
    const struct rank *r = p->rank;
    int64_t rows = max_local_rows(p), cp = r->grid.cp, chunk = chunk_of(p->max_tokens, r->grid.cp);
    int64_t heads = rank_heads_width(r), kv_heads = rank_n_kv_heads(r);
    size_t width = dtype_bytes(r->spec->window_type, r->config->head_dim);
    int64_t collected_rows = 2 * cp * chunk_of(max_replicated(p), (int)cp);
    TRY(take(p, p->max_tokens, sizeof(int32_t), &p->tokens));
    TRY(take(p, rows, sizeof(int32_t), &p->positions));
    TRY(take(p, rows * r->config->hidden, sizeof(float), &p->x));
    TRY(take(p, rows * rank_n_heads(r), width, &p->q));
    int64_t kv_rows = max_i64(2 * cp * chunk, round_up(max_replicated(p), 2));
    TRY(comm_alloc(r->cp, r->backend, (size_t)(2 * kv_rows * kv_heads) * width, &p->gathered));
    TRY(take(p, 2 * p->max_tokens * kv_heads, width, &p->kv));
    TRY(take(p, rows * heads, sizeof(float), &p->attention));
    TRY(comm_alloc(r->cp, r->backend, (size_t)(collected_rows * heads) * sizeof(float), &p->collected));
    return backend_alloc(r->backend, MEMORY_HOST, (size_t)(rows + p->max_tokens + p->max_tokens / KV_BLOCK + 1) * sizeof(int32_t), &p->host_tokens);
}

static int init_tile(struct prefill *p) {
    const struct rank *r = p->rank;
    int64_t hidden = r->config->hidden;
    TRY(take(p, PREFILL_TILE * hidden, sizeof(float), &p->norm));
    TRY(take(p, PREFILL_TILE * rank_qkv_width(r), sizeof(float), &p->qkv));
    TRY(comm_alloc(r->replica, r->backend, (size_t)(PREFILL_TILE * hidden) * sizeof(float), &p->projected));
    TRY(take(p, PREFILL_TILE * hidden, sizeof(float), &p->part));
    TRY(take(p, PREFILL_TILE * 2 * p->max_inner, sizeof(float), &p->gate_up));
    return take(p, PREFILL_TILE * p->max_inner, sizeof(float), &p->act);
}

/* Where each peer's slice of a gathered layer lies, and what it holds. */
static int init_arena(struct prefill *p) {
    const struct rank *r = p->rank;
    const struct model_config *c = r->config;
    int cp = r->grid.cp;
    int64_t total = 0;
    enum dtype dtype = r->weights.dtype;
    TRY(base_alloc(&p->arena_bytes, (size_t)cp, sizeof(int64_t)));
    TRY(base_alloc(&p->arena_offsets, (size_t)cp, sizeof(int64_t)));
    for (int i = 0; i < cp; i++) {
        struct weights_slices s;
        weights_slices_make(c, r->grid.tp, r->grid.tp_rank, cp, i, r->o_whole, &s);
        p->arena_offsets[i] = total;
        p->arena_bytes[i] = (int64_t)weights_sliced_bytes(c, &s, dtype, r->o_whole);
        total += round_up(p->arena_bytes[i], 64);
        p->max_inner = max_i64(p->max_inner, range_size(s.inner));
    }
    for (int b = 0; b < 2; b++) {
        TRY(base_alloc(&p->parts[b], (size_t)cp, sizeof *p->parts[b]));
        if (cp == 1)
            continue;
        TRY(comm_alloc(r->gather, r->backend, (size_t)total, &p->arena[b]));
        TRY(event_open(r->backend, &p->gathered_event[b]));
        TRY(event_open(r->backend, &p->used_event[b]));
        for (int i = 0; i < cp; i++) {
            struct weights_slices s;
            weights_slices_make(c, r->grid.tp, r->grid.tp_rank, cp, i, r->o_whole, &s);
            int64_t inner = range_size(s.inner), columns = range_size(s.o_columns);
            size_t o_bytes = r->o_whole ? 0 : dtype_bytes(dtype, c->hidden * columns);
            uint8_t *at = p->arena[b] + p->arena_offsets[i];
            p->parts[b][i] = (struct prefill_part){.o = {at, c->hidden, columns},
                                                   .gate_up = {at + o_bytes, 2 * inner, c->hidden},
                                                   .down = {at + o_bytes + dtype_bytes(dtype, 2 * inner * c->hidden), c->hidden, inner},
                                                   .o_first = s.o_columns.begin - s.heads.begin * c->head_dim};
        }
    }
    return STATUS_OK;
}

int prefill_init(struct prefill *p, struct rank *rank, int64_t max_tokens, int gather_from) {
    *p = (struct prefill){.rank = rank, .max_tokens = max_tokens, .seq = -1,
                          .gather_from = gather_from > 0 ? gather_from : PREFILL_GATHER_FROM};
    int status = init_arena(p);
    if (status == STATUS_OK)
        status = init_rows(p);
    if (status == STATUS_OK)
        status = init_tile(p);
    if (status < 0)
        prefill_deinit(p);
    return status;
}

void prefill_deinit(struct prefill *p) {
    if (!p->rank)
        return;
    struct rank *r = p->rank;
    void *own[] = {p->tokens, p->positions, p->x, p->q, p->kv, p->attention, p->norm, p->qkv, p->part, p->gate_up, p->act, p->host_tokens};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        backend_free(r->backend, own[i]);
    if (p->gathered)
        comm_release(r->cp, r->backend, p->gathered);
    if (p->collected)
        comm_release(r->cp, r->backend, p->collected);
    if (p->projected)
        comm_release(r->replica, r->backend, p->projected);
    for (int b = 0; b < 2; b++) {
        if (p->arena[b])
            comm_release(r->gather, r->backend, p->arena[b]);
        event_close(p->gathered_event[b]);
        event_close(p->used_event[b]);
        free(p->parts[b]);
    }
    free(p->arena_bytes);
    free(p->arena_offsets);
    *p = (struct prefill){0};
}

/* ---- beginning ----------------------------------------------------------------------------------------------------- */

static int64_t n_local_rows(const struct prefill *p) { return p->gathers ? 2 * p->chunk : p->n; }

static int64_t row_position(const struct prefill *p, int64_t row) {
    return p->gathers ? prefill_position(row, p->rank->grid.cp_rank, p->rank->grid.cp, p->chunk) : row;
}

/* Tokens in position order, positions of the local rows; a row beyond the prompt is computed for nobody. */
static int upload_rows(struct prefill *p, const int32_t *prompt) {
    struct rank *r = p->rank;
    int64_t rows = n_local_rows(p);
    int32_t *tokens = p->host_tokens, *positions = p->host_tokens + p->n;
    memcpy(tokens, prompt, (size_t)p->n * sizeof *tokens);
    for (int64_t i = 0; i < rows; i++) {
        int64_t position = row_position(p, i);
        positions[i] = position < p->n ? (int32_t)position : 0;
    }
    TRY(stream_copy_in(r->stream, p->tokens, tokens, (size_t)p->n * sizeof *tokens));
    return stream_copy_in(r->stream, p->positions, positions, (size_t)rows * sizeof *positions);
}

/* The table is sliced over all ranks, so every rank looks up every token, a tile at a time, and keeps the rows that it works on. */
static int embed(struct prefill *p) {
    const struct rank *r = p->rank;
    const struct weights *w = &r->weights;
    int64_t hidden = r->config->hidden;
    for (int64_t first = 0; first < p->n; first += PREFILL_TILE) {
        int count = (int)min_i64(PREFILL_TILE, p->n - first);
        TRY(op_embed(r->stream, &(struct embed_args){.n_rows = count, .tokens = p->tokens + first, .table = w->embed.data,
                                                     .dtype = w->dtype, .vocab_begin = w->slices.vocab.begin,
                                                     .vocab_count = range_size(w->slices.vocab), .hidden = (int)hidden,
                                                     .x = p->projected}));
        TRY(rank_sum(r->replica, r->stream, "sum of prompt embeddings", p->projected, count * hidden));
        if (p->gathers)
            TRY(op_rows_put(r->stream, &(struct rows_put_args){p->projected, r->grid.cp_rank, r->grid.cp, p->chunk, first, count, hidden,
                                                               p->x}));
        else
            TRY(stream_copy(r->stream, p->x + first * hidden, p->projected, (size_t)(count * hidden) * sizeof(float)));
    }
    return STATUS_OK;
}

/* Starts collecting layer `layer`'s slices from the cp peers, once what was computed with that buffer before is done. */
static int gather_weights(struct prefill *p, int layer) {
    struct rank *r = p->rank;
    int b = layer & 1;
    if (!p->gathers || layer >= r->config->n_layers)
        return STATUS_OK;
    TRY(stream_wait(r->side, p->used_event[b]));
    TRY(comm_all_gatherv(r->gather, r->side, "gather of weights", r->weights.layers[layer].sliced, p->arena[b], p->arena_bytes,
                         p->arena_offsets));
    return event_record(p->gathered_event[b], r->side);
}

static int begin(struct prefill *p, int seq, int32_t owner_offset, const int32_t *prompt, int64_t n) {
    struct rank *r = p->rank;
    p->seq = seq;
    p->owner_offset = owner_offset;
    p->n = n;
    p->chunk = chunk_of(n, r->grid.cp);
    p->gathers = r->grid.cp > 1 && n >= (int64_t)p->gather_from * r->grid.cp;
    TRY(stream_sync(r->stream)); /* the host buffer of an earlier prompt may still be read */
    TRY(upload_rows(p, prompt));
    TRY(cache_take_prompt(&r->cache, r->stream, seq, n, owner_offset, p->host_tokens + n + n_local_rows(p)));
    TRY(embed(p));
    return gather_weights(p, 0);
}

/* ---- one layer ----------------------------------------------------------------------------------------------------- */

static int norm(struct prefill *p, int n_rows, const float *x, const float *weight) {
    const struct rank *r = p->rank;
    return op_rmsnorm(r->stream, &(struct rmsnorm_args){.n_rows = n_rows, .x = x, .weight = weight, .eps = r->config->rms_eps,
                                                        .hidden = r->config->hidden, .out = p->norm});
}

/* Q, K, V of the local rows: q stays, k and v go where the gather starts from. */
static int project_qkv(struct prefill *p, const struct layer_weights *w, uint8_t *k, uint8_t *v) {
    const struct rank *r = p->rank;
    int64_t hidden = r->config->hidden, rows = n_local_rows(p);
    size_t q_row = dtype_bytes(r->spec->window_type, rank_heads_width(r));
    size_t kv_row = dtype_bytes(r->spec->window_type, (int64_t)rank_n_kv_heads(r) * r->config->head_dim);
    for (int64_t first = 0; first < rows; first += PREFILL_TILE) {
        int n = (int)min_i64(PREFILL_TILE, rows - first);
        TRY(norm(p, n, p->x + first * hidden, w->attn_norm));
        TRY(rank_project(r, r->stream, n, NULL, p->norm, hidden, &w->qkv, w->qkv_bias, p->qkv));
        TRY(op_rope(r->stream, &(struct rope_args){.n_rows = n, .qkv = p->qkv, .positions = p->positions + first,
                                                   .inv_freq = r->weights.inv_freq, .q_norm = w->q_norm, .k_norm = w->k_norm,
                                                   .norm_eps = r->config->rms_eps, .n_heads = rank_n_heads(r),
                                                   .n_kv_heads = rank_n_kv_heads(r), .head_dim = r->config->head_dim,
                                                   .dtype = r->spec->window_type, .q = (uint8_t *)p->q + (size_t)first * q_row,
                                                   .k = k + (size_t)first * kv_row, .v = v + (size_t)first * kv_row}));
    }
    return STATUS_OK;
}

/* K and V of the whole prompt in position order, on every cp rank. */
static int collect_kv(struct prefill *p, const struct layer_weights *w) {
    const struct rank *r = p->rank;
    int cp = p->gathers ? r->grid.cp : 1;
    int64_t chunk = chunk_of(p->n, cp);
    size_t half = (size_t)(2 * chunk) * dtype_bytes(r->spec->window_type, (int64_t)rank_n_kv_heads(r) * r->config->head_dim);
    uint8_t *own = p->gathered + (p->gathers ? (size_t)r->grid.cp_rank * 2 * half : 0);
    TRY(project_qkv(p, w, own, own + half));
    if (p->gathers)
        TRY(comm_all_gather(r->cp, r->stream, "gather of prompt keys and values", own, p->gathered, (int64_t)(2 * half)));
    return op_kv_place(r->stream, &(struct kv_place_args){p->gathered, cp, chunk, p->n, rank_n_kv_heads(r), r->config->head_dim,
                                                          r->spec->window_type, p->kv});
}

/* Attention of `n` rows from local q row `row` on, at positions `first` on. */
static int attend(struct prefill *p, int64_t row, int64_t first, int64_t n, float *out) {
    const struct rank *r = p->rank;
    size_t q_row = dtype_bytes(r->spec->window_type, rank_heads_width(r));
    if (n <= 0)
        return STATUS_OK;
    return op_attend_exact(r->stream, &(struct attend_exact_args){.n_rows = n, .first = first, .n = p->n, .n_heads = rank_n_heads(r),
                                                                  .n_kv_heads = rank_n_kv_heads(r), .head_dim = r->config->head_dim,
                                                                  .scale = rank_score_scale(r), .dtype = r->spec->window_type,
                                                                  .q = (const uint8_t *)p->q + (size_t)row * q_row, .kv = p->kv,
                                                                  .out = out});
}

/* First position and rows of this rank's chunk 0 or 1. */
static int64_t chunk_first(const struct prefill *p, int which) {
    return (which ? 2 * p->rank->grid.cp - 1 - p->rank->grid.cp_rank : p->rank->grid.cp_rank) * p->chunk;
}
static int64_t chunk_rows(const struct prefill *p, int which) {
    return max_i64(0, min_i64(p->chunk, p->n - chunk_first(p, which)));
}

/* Attention of all rows into p->attention: each cp rank its own chunks, then everybody's. */
static int attend_replicated(struct prefill *p) {
    const struct rank *r = p->rank;
    int64_t width = rank_heads_width(r);
    if (r->grid.cp == 1)
        return attend(p, 0, 0, p->n, p->attention);
    float *own = p->collected + r->grid.cp_rank * 2 * p->chunk * width;
    for (int c = 0; c < 2; c++)
        TRY(attend(p, chunk_first(p, c), chunk_first(p, c), chunk_rows(p, c), own + c * p->chunk * width));
    TRY(comm_all_gather(r->cp, r->stream, "gather of prompt attention", own, p->collected,
                        2 * p->chunk * width * (int64_t)sizeof(float)));
    return op_rows_place(r->stream, &(struct rows_place_args){p->collected, r->grid.cp, p->chunk, p->n, width, p->attention});
}

/* x += o_proj(attention); x += MLP(norm(x)), for one tile. The parts are this rank's slices, summed over the replica, or those of all cp
 * peers, summed here and over tp. */
struct tile {
    int n;
    float *x;
    const float *attention;
    const struct prefill_part *parts;
    int n_parts;
    struct comm *comm;    /* sums the MLP */
    struct comm *o_comm;  /* sums o_proj */
};

static int add_into(struct prefill *p, const struct tile *t, float *x, const float *y) {
    return op_add(p->rank->stream, &(struct add_args){t->n, NULL, p->rank->config->hidden, x, y});
}

static int sum_into_x(struct prefill *p, const struct tile *t, struct comm *comm, const char *what) {
    TRY(rank_sum(comm, p->rank->stream, what, p->projected, (int64_t)t->n * p->rank->config->hidden));
    return add_into(p, t, t->x, p->projected);
}

static int tile_o(struct prefill *p, const struct tile *t) {
    const struct rank *r = p->rank;
    for (int i = 0; i < t->n_parts; i++) {
        TRY(rank_project(r, r->stream, t->n, NULL, t->attention + t->parts[i].o_first, rank_heads_width(r), &t->parts[i].o, NULL,
                         i ? p->part : p->projected));
        if (i)
            TRY(add_into(p, t, p->projected, p->part));
    }
    return sum_into_x(p, t, t->o_comm, "sum of prompt o_proj");
}

static int tile_mlp(struct prefill *p, const struct tile *t, const float *norm_weight) {
    const struct rank *r = p->rank;
    TRY(norm(p, t->n, t->x, norm_weight));
    for (int i = 0; i < t->n_parts; i++) {
        const struct prefill_part *part = &t->parts[i];
        TRY(rank_project(r, r->stream, t->n, NULL, p->norm, r->config->hidden, &part->gate_up, NULL, p->gate_up));
        TRY(op_silu_mul(r->stream, &(struct silu_mul_args){t->n, NULL, p->gate_up, part->down.n_in, p->act}));
        TRY(rank_project(r, r->stream, t->n, NULL, p->act, part->down.n_in, &part->down, NULL, i ? p->part : p->projected));
        if (i)
            TRY(add_into(p, t, p->projected, p->part));
    }
    return sum_into_x(p, t, t->comm, "sum of prompt down_proj");
}

/* Dense layers with weights where they are, all rows. */
static int dense_replicated(struct prefill *p, const struct layer_weights *w) {
    const struct rank *r = p->rank;
    const struct weights_slices *s = &r->weights.slices;
    struct prefill_part own = {w->o, w->gate_up, w->down, s->o_columns.begin - s->heads.begin * r->config->head_dim};
    for (int64_t first = 0; first < p->n; first += PREFILL_TILE) {
        struct tile t = {.n = (int)min_i64(PREFILL_TILE, p->n - first), .x = p->x + first * r->config->hidden,
                         .attention = p->attention + first * rank_heads_width(r), .parts = &own, .n_parts = 1,
                         .comm = r->replica, .o_comm = r->o_whole ? r->tp : r->replica};
        TRY(tile_o(p, &t));
        TRY(tile_mlp(p, &t, w->mlp_norm));
    }
    return STATUS_OK;
}

/* Attention and dense layers with gathered weights, own rows. */
static int dense_gathered(struct prefill *p, const struct layer_weights *w, int layer) {
    const struct rank *r = p->rank;
    int b = layer & 1;
    struct prefill_part *parts = p->parts[b];
    TRY(stream_wait(r->stream, p->gathered_event[b]));
    struct prefill_part whole = {.o = w->o};
    for (int c = 0; c < 2; c++)
        for (int64_t first = 0; first < chunk_rows(p, c); first += PREFILL_TILE) {
            int64_t row = c * p->chunk + first;
            struct tile t = {.n = (int)min_i64(PREFILL_TILE, chunk_rows(p, c) - first), .x = p->x + row * r->config->hidden,
                             .attention = p->attention, .parts = parts, .n_parts = r->grid.cp, .comm = r->tp, .o_comm = r->tp};
            TRY(attend(p, row, chunk_first(p, c) + first, t.n, p->attention));
            struct tile o = t;
            if (r->o_whole) {
                o.parts = &whole;
                o.n_parts = 1;
            }
            TRY(tile_o(p, &o));
            TRY(tile_mlp(p, &t, w->mlp_norm));
        }
    return event_record(p->used_event[b], r->stream);
}

static int flush(struct prefill *p, int layer) {
    const struct cache *c = &p->rank->cache;
    return op_flush_exact(p->rank->stream,
                          &(struct flush_exact_args){.seq = p->seq, .n = p->n, .n_flush = cache_n_flushed(&c->layout, p->n - 1),
                                                     .owner_offset = p->owner_offset, .layout = c->layout, .layer = c->layers[layer],
                                                     .page_table = c->page_table + p->seq * c->table_stride, .kv = p->kv});
}

int prefill_layer(struct prefill *p, int seq, int32_t owner_offset, const int32_t *prompt, int64_t n, int layer) {
    const struct layer_weights *w = &p->rank->weights.layers[layer];
    if (layer == 0)
        TRY(begin(p, seq, owner_offset, prompt, n));
    TRY(gather_weights(p, layer + 1));
    TRY(collect_kv(p, w));
    if (p->gathers) {
        TRY(dense_gathered(p, w, layer));
    } else {
        TRY(attend_replicated(p));
        TRY(dense_replicated(p, w));
    }
    return flush(p, layer);
}

int prefill_rows(struct prefill *p, int64_t first, int count, float *to) {
    const struct rank *r = p->rank;
    int64_t hidden = r->config->hidden;
    if (!p->gathers)
        return stream_copy(r->stream, to, p->x + first * hidden, (size_t)(count * hidden) * sizeof(float));
    for (int64_t done = 0; done < count; done += PREFILL_TILE) {
        int64_t n = min_i64(PREFILL_TILE, count - done);
        TRY(op_rows_pick(r->stream, &(struct rows_pick_args){p->x, r->grid.cp_rank, r->grid.cp, p->chunk, first + done, n, hidden,
                                                             p->projected}));
        TRY(rank_sum(r->cp, r->stream, "sum of prompt rows", p->projected, n * hidden));
        TRY(stream_copy(r->stream, to + done * hidden, p->projected, (size_t)(n * hidden) * sizeof(float)));
    }
    return STATUS_OK;
}
