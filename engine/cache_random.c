/* Random bytes are no valid page, so some blocks of random K and V are encoded by the operation that encodes prompts, and their pages
 * copied over the pool. */
#include "engine/cache_random.h"

enum {
    DISTINCT_PAGES = 16, /* encoded for each layer; the rest of the pool are copies */
    SEED_KV = 1 << 20,   /* apart from each other and, being no hash of a name, from the weights' seeds */
    SEED_WINDOW = 2 << 20,
    SEED_SINK = 3 << 20,
    SEED_STATES = 4 << 20,
    SEED_PHI_K = 5 << 20,
    SEED_PHI_Q = 6 << 20,
};

static const float KV_RANGE = 1.732f;  /* uniform with standard deviation 1, about a model's */
static const float PHI_RANGE = 0.15f;  /* phi's logits are then about 1 */

static int fill(struct stream *stream, void *data, enum dtype dtype, int64_t n_rows, int64_t n_columns, uint64_t seed, float low,
                float high) {
    return op_fill_random(stream, &(struct fill_random_args){.data = data, .dtype = dtype, .n_rows = n_rows, .n_columns = n_columns,
                                                             .stride = n_columns, .seed = seed, .low = low, .high = high});
}

static int make_phi(struct backend *backend, struct stream *stream, int64_t rows, int columns, uint64_t seed, float **out) {
    TRY(backend_alloc(backend, MEMORY_WEIGHTS, (size_t)(rows * columns) * sizeof **out, out));
    return fill(stream, *out, DTYPE_F32, rows, columns, seed, -PHI_RANGE, PHI_RANGE);
}

int cache_random_adapters(const struct cache_spec *spec, struct range kv_heads, int head_dim, struct backend *backend,
                          struct stream *stream, struct cache_adapter *adapters) {
    int64_t rows = range_size(kv_heads) * 2 * head_dim; /* [kv_head][W1, W2][head_dim][D/2] */
    int columns = CACHE_RANDOM_FEATURES / 2;
    for (int i = 0; i < spec->n_layers; i++) {
        if (!spec->layer[i].correction)
            continue;
        TRY(make_phi(backend, stream, rows, columns, SEED_PHI_K + (uint64_t)i, &adapters[i].phi_k));
        TRY(make_phi(backend, stream, rows, columns, SEED_PHI_Q + (uint64_t)i, &adapters[i].phi_q));
    }
    return stream_sync(stream);
}

/* 16-bit rows of the stores: K and V of n tokens for every slot. */
static int fill_rows(const struct cache *c, struct stream *stream, void *store, enum dtype dtype, int64_t n_tokens, uint64_t seed) {
    int64_t rows = (int64_t)c->shape.max_seqs * c->shape.n_kv_heads * 2 * n_tokens;
    return fill(stream, store, dtype, rows, c->shape.head_dim, seed, -KV_RANGE, KV_RANGE);
}

/* What sums over flushed tokens leave: S of either sign, P positive; of a size that the softmax sum of a long context still outweighs. */
static int fill_states(const struct cache *c, struct stream *stream, const struct cache_layer *l, uint64_t seed) {
    int64_t head = (int64_t)l->features * c->shape.head_dim, n = head + l->features;
    for (int64_t i = 0; i < (int64_t)c->shape.max_seqs * c->shape.n_kv_heads; i++) {
        float *s = l->states + i * n;
        TRY(fill(stream, s, DTYPE_F32, l->features, c->shape.head_dim, seed, -1, 1));
        TRY(fill(stream, s + head, DTYPE_F32, 1, l->features, seed + 1, 0, 1));
    }
    return STATUS_OK;
}

/* How many pages are encoded: their blocks fit a row of the page table, which lends its first entries. */
static int64_t n_distinct(const struct cache *c) {
    return min_i64(min_i64(DISTINCT_PAGES, c->table_stride), c->shape.n_pages);
}

/* `kv`: room for K and V of n_distinct blocks of every rank. Sink and correction are left out: they have their own content. */
static int fill_pages(const struct cache *c, struct stream *stream, const struct cache_layer *l, uint64_t seed, void *kv) {
    int64_t n = n_distinct(c), n_pages = c->shape.n_pages, n_tokens = n * c->layout.cp_size * KV_BLOCK;
    struct flush_exact_args args = {.n = n_tokens, .n_flush = n * c->layout.cp_size, .layout = c->layout, .layer = *l,
                                    .page_table = c->page_table, .kv = kv};
    args.layout.sink = 0;
    args.layer.sink = NULL;
    args.layer.states = NULL;
    args.layer.features = 0;
    args.layer.phi_k = args.layer.phi_q = NULL;
    TRY(fill(stream, kv, l->format.window, (int64_t)c->shape.n_kv_heads * 2 * n_tokens, c->shape.head_dim, seed, -KV_RANGE, KV_RANGE));
    TRY(op_flush_exact(stream, &args));
    for (int64_t done = n; done < n_pages; done += min_i64(done, n_pages - done))
        TRY(stream_copy(stream, l->pages + done * l->page_stride, l->pages, (size_t)(min_i64(done, n_pages - done) * l->page_stride)));
    return STATUS_OK;
}

static int fill_layer(const struct cache *c, struct stream *stream, int layer, void *kv) {
    const struct cache_layer *l = &c->layers[layer];
    uint64_t i = (uint64_t)layer;
    enum dtype dtype = l->format.window;
    TRY(fill_rows(c, stream, l->window, dtype, (int64_t)c->layout.n_slots * KV_BLOCK, SEED_WINDOW + i));
    if (l->sink)
        TRY(fill_rows(c, stream, l->sink, dtype, c->layout.sink, SEED_SINK + i));
    if (l->states)
        TRY(fill_states(c, stream, l, SEED_STATES + 2 * i));
    return c->shape.n_pages ? fill_pages(c, stream, l, SEED_KV + i, kv) : STATUS_OK;
}

int cache_random_fill(struct cache *c, struct stream *stream) {
    int status = STATUS_OK;
    void *kv = NULL;
    int32_t *table = NULL;
    int64_t n = n_distinct(c), values = 2 * n * c->layout.cp_size * KV_BLOCK * c->shape.n_kv_heads * c->shape.head_dim;
    TRY_GOTO(backend_alloc(c->backend, MEMORY_WORKSPACE, dtype_bytes(c->layers[0].format.window, values), &kv));
    TRY_GOTO(backend_alloc(c->backend, MEMORY_HOST, (size_t)n * sizeof *table, &table));
    for (int64_t i = 0; i < n; i++)
        table[i] = (int32_t)i;
    TRY_GOTO(stream_copy_in(stream, c->page_table, table, (size_t)n * sizeof *table));
    for (int i = 0; i < c->n_layers; i++)
        TRY_GOTO(fill_layer(c, stream, i, kv));
    TRY_GOTO(stream_sync(stream));
fail:
    (void)stream_sync(stream); /* nothing writes into what is freed */
    backend_free(c->backend, table);
    backend_free(c->backend, kv);
    return status;
}
