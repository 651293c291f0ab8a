/* Allocation and accounts of the cache. The device arrays' shapes are those of struct cache_layer in kernels/ops.h. */
#include "engine/cache.h"

#include <stdlib.h>
#include <string.h>

static int n_slots(const struct cache_spec *spec, int cp_size) {
    /* the blocks p/G - W .. p/G are alive at once, W = window / KV_BLOCK: on one rank every cp-th of them */
    return (int)ceil_div(spec->window / KV_BLOCK + 1, cp_size);
}

static struct page_format layer_format(const struct cache_spec *spec, const struct cache_shape *shape, int layer) {
    return (struct page_format){.head_dim = shape->head_dim,
                                .k_bits = spec->layer[layer].k_bits,
                                .v_bits = spec->layer[layer].v_bits,
                                .window = spec->window_type};
}

static int64_t layer_page_bytes(const struct cache_spec *spec, const struct cache_shape *shape, int layer) {
    struct page_format format = layer_format(spec, shape, layer);
    return shape->n_kv_heads * (int64_t)page_record_bytes(&format);
}

int64_t cache_page_bytes(const struct cache_spec *spec, const struct cache_shape *shape) {
    int64_t bytes = 0;
    for (int i = 0; i < spec->n_layers; i++)
        bytes += layer_page_bytes(spec, shape, i);
    return bytes;
}

/* One 16-bit store of one layer: K and V of n tokens for all slots. */
static int64_t store_bytes(const struct cache_spec *spec, const struct cache_shape *s, int64_t n_tokens) {
    return s->max_seqs * (int64_t)dtype_bytes(spec->window_type, 2 * n_tokens * s->n_kv_heads * s->head_dim);
}

static int64_t window_bytes(const struct cache_spec *spec, const struct cache_shape *s) {
    return store_bytes(spec, s, (int64_t)n_slots(spec, s->cp_size) * KV_BLOCK);
}

static int64_t state_floats(const struct cache_shape *s) {
    return (int64_t)s->n_kv_heads * ((int64_t)s->features * s->head_dim + s->features);
}

static int64_t blocks_for(const struct cache_spec *spec, int64_t n_tokens) {
    int64_t n = n_tokens > 0 ? (n_tokens - 1) / KV_BLOCK - spec->window / KV_BLOCK : 0;
    return n > 0 ? n : 0;
}

int64_t cache_pages_for(const struct cache_spec *spec, int cp_size, int64_t n_tokens) {
    return ceil_div(blocks_for(spec, n_tokens), cp_size);
}

int64_t cache_pages_for_offset(const struct cache_layout *layout, int64_t n_tokens, int owner_offset) {
    return n_tokens > 0 ? cache_n_owned(layout, cache_n_flushed(layout, n_tokens - 1), owner_offset) : 0;
}

static int64_t table_stride(const struct cache_spec *spec, const struct cache_shape *s) {
    return max_i64(1, cache_pages_for(spec, s->cp_size, s->context));
}

struct cache_bytes cache_plan_bytes(const struct cache_spec *spec, const struct cache_shape *s) {
    struct cache_bytes b = {.pages = s->n_pages * cache_page_bytes(spec, s)};
    b.window = spec->n_layers * window_bytes(spec, s);
    b.sink = spec->n_layers * store_bytes(spec, s, spec->sink);
    for (int i = 0; i < spec->n_layers; i++)
        if (spec->layer[i].correction)
            b.states += s->max_seqs * state_floats(s) * (int64_t)sizeof(float);
    b.tables = s->max_seqs * (int64_t)(sizeof(struct seq_params) + sizeof(int32_t)) +
               s->max_seqs * (table_stride(spec, s) + s->vocab_count) * (int64_t)sizeof(int32_t);
    return b;
}

int64_t cache_bytes_sum(const struct cache_bytes *b) { return b->pages + b->window + b->sink + b->states + b->tables; }

static int alloc(struct cache *c, int64_t bytes, void *pointer) {
    return backend_alloc(c->backend, MEMORY_CACHE, (size_t)bytes, pointer);
}

static int init_layer(struct cache *c, const struct cache_spec *spec, int layer, const struct cache_adapter *adapter) {
    const struct cache_shape *s = &c->shape;
    struct cache_layer *l = &c->layers[layer];
    l->format = layer_format(spec, s, layer);
    l->page_stride = layer_page_bytes(spec, s, layer);
    TRY(alloc(c, s->n_pages * l->page_stride, &l->pages));
    TRY(alloc(c, window_bytes(spec, s), &l->window));
    if (spec->sink)
        TRY(alloc(c, store_bytes(spec, s, spec->sink), &l->sink));
    if (!spec->layer[layer].correction)
        return STATUS_OK;
    l->features = s->features;
    l->phi_k = adapter->phi_k;
    l->phi_q = adapter->phi_q;
    l->phi_q_per_head = adapter->phi_q_per_head;
    l->gate = adapter->gate;
    l->states_exact_v = adapter->exact_v;
    return alloc(c, s->max_seqs * state_floats(s) * (int64_t)sizeof(float), &l->states);
}

static int init_tables(struct cache *c) {
    const struct cache_shape *s = &c->shape;
    TRY(alloc(c, s->max_seqs * (int64_t)sizeof *c->params, &c->params));
    TRY(alloc(c, s->max_seqs * (int64_t)sizeof *c->last_token, &c->last_token));
    TRY(alloc(c, s->max_seqs * c->table_stride * (int64_t)sizeof *c->page_table, &c->page_table));
    c->counts = (struct seq_counts){.vocab_begin = s->vocab_begin, .vocab_count = s->vocab_count};
    TRY(alloc(c, s->max_seqs * s->vocab_count * (int64_t)sizeof(uint32_t), &c->counts.words));
    TRY(base_alloc(&c->free_pages, (size_t)s->n_pages, sizeof *c->free_pages));
    TRY(base_alloc(&c->slot_pages, (size_t)(s->max_seqs * c->table_stride), sizeof *c->slot_pages));
    TRY(base_alloc(&c->slot_n_pages, (size_t)s->max_seqs, sizeof *c->slot_n_pages));
    c->n_free = s->n_pages;
    for (int64_t i = 0; i < s->n_pages; i++)
        c->free_pages[i] = (int32_t)(s->n_pages - 1 - i); /* the lowest is taken first */
    return STATUS_OK;
}

int cache_init(struct cache *c, struct backend *backend, const struct cache_spec *spec, const struct cache_shape *shape,
               const struct cache_adapter *adapters) {
    int status = STATUS_OK;
    *c = (struct cache){.backend = backend, .shape = *shape, .n_layers = spec->n_layers};
    c->layout = (struct cache_layout){.cp_rank = shape->cp_rank,
                                      .cp_size = shape->cp_size,
                                      .window_blocks = spec->window / KV_BLOCK,
                                      .n_slots = n_slots(spec, shape->cp_size),
                                      .sink = spec->sink,
                                      .n_kv_heads = shape->n_kv_heads,
                                      .head_dim = shape->head_dim};
    c->bytes = cache_plan_bytes(spec, shape);
    c->table_stride = table_stride(spec, shape);
    TRY_GOTO(base_alloc(&c->layers, (size_t)spec->n_layers, sizeof *c->layers));
    TRY_GOTO(init_tables(c));
    for (int i = 0; i < spec->n_layers; i++)
        TRY_GOTO(init_layer(c, spec, i, adapters ? &adapters[i] : NULL));
    return STATUS_OK;
fail:
    cache_deinit(c);
    return status;
}

void cache_deinit(struct cache *c) {
    for (int i = 0; c->layers && i < c->n_layers; i++) {
        struct cache_layer *l = &c->layers[i];
        backend_free(c->backend, l->pages);
        backend_free(c->backend, l->window);
        backend_free(c->backend, l->sink);
        backend_free(c->backend, l->states);
    }
    if (c->backend) {
        backend_free(c->backend, c->params);
        backend_free(c->backend, c->last_token);
        backend_free(c->backend, c->page_table);
        backend_free(c->backend, c->counts.words);
    }
    free(c->layers);
    free(c->free_pages);
    free(c->slot_pages);
    free(c->slot_n_pages);
    *c = (struct cache){0};
}

int cache_take_page(struct cache *c, int seq, int64_t block, int32_t *page, int32_t *local) {
    int64_t index = block / c->layout.cp_size, next = c->slot_n_pages[seq];
    if (index != next || index >= c->table_stride)
        FAIL(STATUS_FAILED, "slot %d: block %lld would be page %lld of this rank, which has %lld", seq, (long long)block,
             (long long)index, (long long)next);
    if (c->n_free == 0)
        FAIL(STATUS_FAILED, "slot %d: no page is free for block %lld of %lld pages", seq, (long long)block,
             (long long)c->shape.n_pages);
    *page = c->free_pages[--c->n_free];
    *local = (int32_t)index;
    c->slot_pages[seq * c->table_stride + index] = *page;
    c->slot_n_pages[seq]++;
    return STATUS_OK;
}

int cache_take_prompt(struct cache *c, struct stream *stream, int seq, int64_t n_tokens, int32_t owner_offset, int32_t *table) {
    int64_t n = 0, n_flush = n_tokens > 0 ? cache_n_flushed(&c->layout, n_tokens - 1) : 0;
    for (int64_t block = 0; block < n_flush; block++) {
        int32_t page = -1, local = -1;
        if (!cache_owns(&c->layout, block, owner_offset))
            continue;
        TRY(cache_take_page(c, seq, block, &page, &local));
        table[local] = page;
        n++;
    }
    return stream_copy_in(stream, c->page_table + seq * c->table_stride, table, (size_t)n * sizeof *table);
}

void cache_release(struct cache *c, int seq) {
    while (c->slot_n_pages[seq] > 0)
        c->free_pages[c->n_free++] = c->slot_pages[seq * c->table_stride + --c->slot_n_pages[seq]];
}

int cache_reset_states(struct cache *c, struct stream *stream, int seq) {
    int64_t n = state_floats(&c->shape);
    for (int i = 0; i < c->n_layers; i++)
        if (c->layers[i].states)
            TRY(stream_zero(stream, c->layers[i].states + seq * n, (size_t)n * sizeof(float)));
    return STATUS_OK;
}
