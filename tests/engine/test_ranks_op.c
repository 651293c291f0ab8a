/* Attention over a cache that is cut over cp ranks, op level (the first of DESIGN's three grades of equality): identical inputs, made
 * from hashes; every way of merging against the one-rank answer of the same run and against Algorithm 1 in double precision.
 *
 * A slot holds one sequence; its last token, or its last rows, is attended. Slots of even index are filled row by row (append and flush),
 * odd ones at once (flush_exact). Device memory is filled with NaN before, so whatever is read without being owned shows.
 *
 * Bounds. u = 2^-24 is the error of one rounding. A chain of n additions is off by SAFE sqrt(n) u of its largest partial sum: errors are
 * independent, below u each, and SAFE = 4 of their deviations are allowed. So a score is off by ds = SAFE u sqrt(d) (|s| + its terms' root of
 * squares), and its weight e^(s-m) by that share. A sum of weights times values moves by the root of squares of its terms' errors, which is
 * ds V neff with V the largest value and neff = sqrt(sum p^2)/sum p, and by the chain of its own additions. Numerator and denominator are
 * such sums, hence the factor 2. With a correction, the error of phi and that of the max move it against the softmax sums, which is
 * at most their share of |num/den|, |C_n/C_d|. A GPU rounds each weight to 11 bits before it multiplies V. Between layouts the scores are the same bits: only the sums differ. */
#include "engine/cache.h"
#include "dist/merge.h"
#include "device.h"

enum { N_KV_HEADS = 2, GROUP = 2, N_HEADS = N_KV_HEADS * GROUP, LONG_RUN = 40, MAX_TOKENS = 1200, MAX_BLOCKS = 10, MAX_D = 128, N_PADDING = 3 };
static const double U = 5.9604644775390625e-8, SAFE = 4;

static const int lengths[] = {1, 2, 128, 129, 130, 256, 257, 258, 384, 385, 386, 1067}; /* positions 0, 1, 127, 128, ... 385; 1066 */
enum { N_SLOTS = sizeof lengths / sizeof *lengths, LONG_SLOT = N_SLOTS - 1, N_ROWS = N_SLOTS - 1 + N_PADDING + LONG_RUN, BUCKET = 64 };
_Static_assert(N_ROWS <= BUCKET, "rows fit the bucket");

struct config {
    const char *name;
    int d, k_bits, v_bits;
    enum dtype window;
    int window_blocks, sink, features;
    bool per_head, gate, exact_v, grid_keys; /* grid_keys: a vector can be added without changing codes or errors (fill_tokens) */
    float shift;
};

static const struct config configs[] = {
    {"fp16", 64, 16, 16, DTYPE_F16, 1, 0, 0, false, false, false, false, 0},
    {"bf16, window 256", 64, 16, 16, DTYPE_BF16, 2, 16, 0, false, false, false, false, 0},
    {"f32, window 0", 128, 16, 16, DTYPE_F32, 0, 0, 0, false, false, false, false, 0},
    {"kivi", 64, 2, 2, DTYPE_F16, 1, 0, 0, false, false, false, false, 0},
    {"kivi, d 128, sink", 128, 2, 2, DTYPE_F16, 0, 16, 0, false, false, false, false, 0},
    {"kvlinc, random", 64, 2, 2, DTYPE_F16, 1, 0, 64, false, false, false, false, 0},
    {"kvlinc, trained-like, sink", 64, 2, 2, DTYPE_F16, 1, 16, 256, false, true, false, false, 0},
    {"kvlinc, per head, exact V, window 256", 64, 2, 4, DTYPE_F32, 2, 16, 32, true, true, true, false, 0},
    {"k4v2, correction, bf16", 128, 4, 2, DTYPE_BF16, 0, 0, 32, false, true, false, false, 0},
    {"k8v8", 64, 8, 8, DTYPE_F16, 1, 16, 0, false, false, false, false, 0},
    {"k2v16", 64, 2, 16, DTYPE_F16, 1, 0, 32, false, true, false, false, 0},
    {"k16v4", 64, 16, 4, DTYPE_F16, 1, 0, 0, false, false, false, false, 0},
    {"grid keys", 64, 2, 2, DTYPE_F32, 1, 0, 64, false, true, false, true, 0},
    {"grid keys + 20", 64, 2, 2, DTYPE_F32, 1, 0, 64, false, true, false, true, 2.5f},
    {"grid keys + 50", 64, 2, 2, DTYPE_F32, 1, 0, 64, false, true, false, true, 6.25f},
    {"grid keys, fp16", 64, 2, 2, DTYPE_F16, 1, 0, 64, false, true, false, true, 0},
    {"grid keys, fp16 + 50", 64, 2, 2, DTYPE_F16, 1, 0, 64, false, true, false, true, 6.25f},
};
enum { N_CONFIGS = sizeof configs / sizeof *configs };

/* ---- inputs ---------------------------------------------------------------------------------------------------------- */

struct inputs { /* what every rank knows; values are those of the window's type, widened */
    const struct config *config;
    float *k[N_SLOTS], *v[N_SLOTS]; /* [kv_head][tokens][d] */
    float *q;                       /* [N_ROWS][N_HEADS][d] */
    float *phi_k, *phi_q, gate[N_KV_HEADS];
    struct step_input step;         /* the rows that are attended */
};

static void round_to(enum dtype dtype, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        dtype_narrow(dtype, x + i, &bits, 1);
        dtype_widen(dtype, &bits, x + i, 1);
    }
}

/* Keys of a 2-bit grid with exact bounds: min and scale 1/8 are powers of two apart, values lie on multiples of 1/64, so the quantizer
 * finds the same codes and errors whatever multiple of 1/8 is added (everything below 32: exact in fp16 and float). */
static float grid_key(uint64_t seed, int64_t t, int c, int d) {
    uint64_t h = test_hash(seed, (uint64_t)(t * d + c));
    int code = t % 128 == 0 ? 0 : t % 128 == 1 ? 3 : (int)(h % 4);
    int step = code == 0 || code == 3 ? 0 : (int)(h / 4 % 7) - 3; /* eighths of the scale, off the ties */
    float base = (float)((int)(test_hash(seed + 1, (uint64_t)c) % 17) - 8) / 8.0f;
    return base + ((float)code + (float)step / 8.0f) / 8.0f;
}

static void fill_tokens(struct inputs *in, int slot) {
    const struct config *c = in->config;
    int64_t n = (int64_t)N_KV_HEADS * lengths[slot] * c->d;
    in->k[slot] = malloc((size_t)n * sizeof(float));
    in->v[slot] = malloc((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        int64_t t = i / c->d % lengths[slot];
        uint64_t seed = 100 * (uint64_t)slot + 10 * (uint64_t)(i / c->d / lengths[slot]);
        int channel = (int)(i % c->d);
        in->k[slot][i] = c->grid_keys ? grid_key(seed, t, channel, c->d) + c->shift : test_normal(seed + 3, (uint64_t)(t * c->d + channel));
        in->v[slot][i] = test_normal(seed + 4, (uint64_t)(t * c->d + channel));
    }
    round_to(c->window, in->k[slot], n);
    round_to(c->window, in->v[slot], n);
}

static void fill_rows(struct inputs *in) {
    struct step_input *s = &in->step;
    int n = 0;
    for (int slot = 0; slot < LONG_SLOT; slot++) {
        s->row[n] = (struct step_row){slot, 0, lengths[slot] - 1, n};
        n++;
        if (slot % 4 == 1) /* padding among them */
            s->row[n] = (struct step_row){-1, -1, 0, n}, n++;
    }
    for (int i = 0; i < LONG_RUN; i++, n++)
        s->row[n] = (struct step_row){LONG_SLOT, 0, lengths[LONG_SLOT] - LONG_RUN + i, n - i};
    s->n_rows = n;
    for (; n < STEP_MAX_ROWS; n++)
        s->row[n] = (struct step_row){-1, -1, 0, n};
}

static void inputs_make(struct inputs *in, const struct config *c) {
    *in = (struct inputs){.config = c};
    for (int slot = 0; slot < N_SLOTS; slot++)
        fill_tokens(in, slot);
    fill_rows(in);
    int64_t n_q = (int64_t)N_ROWS * N_HEADS * c->d, n_w = (int64_t)c->d * c->features;
    in->q = malloc((size_t)n_q * sizeof(float));
    for (int64_t i = 0; i < n_q; i++)
        in->q[i] = test_normal(77, (uint64_t)i) * (c->grid_keys ? 0.5f : 1.0f) + (c->grid_keys ? 1.0f : 0.0f);
    round_to(c->window, in->q, n_q);
    in->phi_k = calloc((size_t)(N_KV_HEADS * n_w) + 1, sizeof(float));
    in->phi_q = calloc((size_t)(N_HEADS * n_w) + 1, sizeof(float));
    float scale = (c->gate ? 3.0f : 1.0f) / sqrtf((float)c->d); /* trained-like: peaked features, and a gate that keeps them small */
    for (int64_t i = 0; i < N_KV_HEADS * n_w; i++)
        in->phi_k[i] = scale * test_normal(78, (uint64_t)i);
    for (int64_t i = 0; i < (c->per_head ? N_HEADS : N_KV_HEADS) * n_w; i++)
        in->phi_q[i] = scale * test_normal(79, (uint64_t)i);
    for (int h = 0; h < N_KV_HEADS; h++)
        in->gate[h] = 0.25f + 0.25f * (float)h;
}

static void inputs_free(struct inputs *in) {
    for (int slot = 0; slot < N_SLOTS; slot++) {
        free(in->k[slot]);
        free(in->v[slot]);
    }
    free(in->q);
    free(in->phi_k);
    free(in->phi_q);
}

/* ---- a cache over the ranks of a communicator -------------------------------------------------------------------------- */

struct rig {
    struct backend *backend;
    struct stream *stream;
    struct comm *comm;
    struct cache_spec spec;
    struct cache cache;
    struct cache_adapter adapter;
    int offset[N_SLOTS];
    struct step_input *step; /* device */
    void *q, *k, *v;
    float *out;
};

static void *device_copy(struct rig *r, enum memory purpose, const void *from, size_t bytes) {
    void *to;
    REQUIRE(backend_alloc(r->backend, purpose, bytes, &to));
    if (from)
        REQUIRE(stream_copy_in(r->stream, to, from, bytes));
    REQUIRE(stream_sync(r->stream));
    return to;
}

static void *narrowed(enum dtype dtype, const float *x, int64_t n) {
    void *out = malloc(dtype_bytes(dtype, n) + 1);
    dtype_narrow(dtype, x, out, n);
    return out;
}

static void poison(struct rig *r, void *device, size_t bytes) {
    void *nan = malloc(bytes + 1);
    memset(nan, 0xff, bytes);
    REQUIRE(stream_copy_in(r->stream, device, nan, bytes));
    REQUIRE(stream_sync(r->stream));
    free(nan);
}

static void rig_open(struct rig *r, const char *device, struct comm *world, struct comm *comm, const struct inputs *in, int offset) {
    const struct config *c = in->config;
    *r = (struct rig){0};
    device_open(device, comm_rank(world), 5, &r->backend);
    r->comm = device_comm(comm, r->backend);
    REQUIRE(stream_open(r->backend, &r->stream));
    r->spec = (struct cache_spec){.name = c->name, .window_type = c->window, .window = c->window_blocks * KV_BLOCK, .sink = c->sink,
                                  .n_layers = 1, .layer = {{c->k_bits, c->v_bits, false, c->features > 0}}};
    struct cache_shape shape = {.n_kv_heads = N_KV_HEADS, .head_dim = c->d, .n_heads = N_HEADS, .cp_rank = comm_rank(comm),
                                .cp_size = comm_size(comm), .max_seqs = N_SLOTS, .context = MAX_TOKENS, .n_pages = 40,
                                .features = c->features};
    size_t w_bytes = (size_t)c->d * (size_t)c->features * sizeof(float);
    if (c->features) {
        r->adapter.phi_k = device_copy(r, MEMORY_WEIGHTS, in->phi_k, N_KV_HEADS * w_bytes);
        r->adapter.phi_q = device_copy(r, MEMORY_WEIGHTS, in->phi_q, (c->per_head ? N_HEADS : N_KV_HEADS) * w_bytes);
        r->adapter.gate = c->gate ? device_copy(r, MEMORY_WEIGHTS, in->gate, sizeof in->gate) : NULL;
        r->adapter.phi_q_per_head = c->per_head;
        r->adapter.exact_v = c->exact_v;
    }
    REQUIRE(cache_init(&r->cache, r->backend, &r->spec, &shape, &r->adapter));
    struct cache_layer *l = &r->cache.layers[0];
    poison(r, l->pages, (size_t)(shape.n_pages * l->page_stride));
    poison(r, l->window, (size_t)r->cache.bytes.window);
    if (l->sink)
        poison(r, l->sink, (size_t)r->cache.bytes.sink);
    struct seq_params params[N_SLOTS];
    memset(params, 0, sizeof params);
    for (int slot = 0; slot < N_SLOTS; slot++)
        params[slot].owner_offset = r->offset[slot] = (slot + offset) % comm_size(comm);
    REQUIRE(stream_copy_in(r->stream, r->cache.params, params, sizeof params));
    REQUIRE(stream_sync(r->stream));
    r->step = device_copy(r, MEMORY_WORKSPACE, NULL, sizeof *r->step);
    void *q = narrowed(c->window, in->q, (int64_t)N_ROWS * N_HEADS * c->d);
    r->q = device_copy(r, MEMORY_WORKSPACE, NULL, dtype_bytes(c->window, (int64_t)BUCKET * N_HEADS * c->d));
    poison(r, r->q, dtype_bytes(c->window, (int64_t)BUCKET * N_HEADS * c->d));
    REQUIRE(stream_copy_in(r->stream, r->q, q, dtype_bytes(c->window, (int64_t)N_ROWS * N_HEADS * c->d)));
    REQUIRE(stream_sync(r->stream));
    free(q);
    size_t kv_bytes = dtype_bytes(c->window, (int64_t)2 * N_KV_HEADS * MAX_TOKENS * c->d);
    r->k = device_copy(r, MEMORY_WORKSPACE, NULL, kv_bytes);
    r->v = device_copy(r, MEMORY_WORKSPACE, NULL, kv_bytes);
    REQUIRE(comm_alloc(comm, r->backend, BUCKET * N_HEADS * MAX_D * sizeof(float), &r->out));
}

static void rig_close(struct rig *r) {
    REQUIRE(stream_sync(r->stream));
    comm_release(r->comm, r->backend, r->out);
    cache_deinit(&r->cache);
    comm_free(r->comm);
    stream_close(r->stream);
    backend_close(r->backend);
}

/* Tokens of a slot one block at a time, as cached prefill feeds them. */
static void fill_by_rows(struct rig *r, const struct inputs *in, int slot) {
    const struct config *c = in->config;
    struct cache *cache = &r->cache;
    int n = lengths[slot], d = c->d;
    float *rows = malloc((size_t)KV_BLOCK * N_KV_HEADS * (size_t)d * sizeof(float));
    for (int first = 0; first < n; first += KV_BLOCK) {
        struct step_input s = {.n_rows = (int)min_i64(KV_BLOCK, n - first)};
        int block = first / KV_BLOCK - 1 - c->window_blocks;
        if (block >= 0) {
            struct step_flush f = {slot, block, -1, -1};
            if (cache_owns(&cache->layout, block, r->offset[slot]))
                REQUIRE(cache_take_page(cache, slot, block, &f.page, &f.local));
            s.flush[s.n_flush++] = f;
        }
        for (int i = 0; i < s.n_rows; i++)
            s.row[i] = (struct step_row){slot, 0, first + i, 0};
        for (int part = 0; part < 2; part++) {
            const float *from = part ? in->v[slot] : in->k[slot];
            for (int i = 0; i < s.n_rows; i++)
                for (int h = 0; h < N_KV_HEADS; h++)
                    memcpy(rows + (i * N_KV_HEADS + h) * d, from + ((int64_t)h * n + first + i) * d, (size_t)d * sizeof *rows);
            void *narrow = narrowed(c->window, rows, (int64_t)s.n_rows * N_KV_HEADS * d);
            REQUIRE(stream_copy_in(r->stream, part ? r->v : r->k, narrow, dtype_bytes(c->window, (int64_t)s.n_rows * N_KV_HEADS * d)));
            REQUIRE(stream_sync(r->stream));
            free(narrow);
        }
        REQUIRE(stream_copy_in(r->stream, r->step, &s, sizeof s));
        REQUIRE(op_flush(r->stream, &(struct flush_args){r->step, cache->params, cache->layout, cache->layers[0], cache->page_table,
                                                         cache->table_stride, true}));
        REQUIRE(op_append(r->stream, &(struct append_args){r->step, cache->params, cache->layout, cache->layers[0], r->k, r->v}));
        REQUIRE(stream_sync(r->stream));
    }
    free(rows);
}

static void fill_at_once(struct rig *r, const struct inputs *in, int slot) {
    const struct config *c = in->config;
    struct cache *cache = &r->cache;
    int64_t n = lengths[slot], d = c->d, n_flush = cache_n_flushed(&cache->layout, n - 1);
    int32_t table[MAX_BLOCKS];
    int n_pages = 0;
    for (int64_t block = 0; block < n_flush; block++) {
        int32_t page, local;
        if (!cache_owns(&cache->layout, block, r->offset[slot]))
            continue;
        REQUIRE(cache_take_page(cache, slot, block, &page, &local));
        CHECK(local == n_pages, "local %d", local);
        table[n_pages++] = page;
    }
    int32_t *row = cache->page_table + slot * cache->table_stride;
    REQUIRE(stream_copy_in(r->stream, row, table, (size_t)n_pages * sizeof *table));
    for (int h = 0; h < N_KV_HEADS; h++)
        for (int part = 0; part < 2; part++) {
            void *narrow = narrowed(c->window, (part ? in->v[slot] : in->k[slot]) + h * n * d, n * d);
            size_t bytes = dtype_bytes(c->window, n * d);
            REQUIRE(stream_copy_in(r->stream, (uint8_t *)r->k + (size_t)(2 * h + part) * bytes, narrow, bytes));
            REQUIRE(stream_sync(r->stream));
            free(narrow);
        }
    REQUIRE(op_flush_exact(r->stream, &(struct flush_exact_args){slot, n, n_flush, r->offset[slot], cache->layout, cache->layers[0], row,
                                                                 r->k}));
    REQUIRE(stream_sync(r->stream));
}

static void rig_fill(struct rig *r, const struct inputs *in) {
    for (int slot = 0; slot < N_SLOTS; slot++)
        (slot % 2 ? fill_at_once : fill_by_rows)(r, in, slot);
    REQUIRE(stream_copy_in(r->stream, r->step, &in->step, sizeof in->step));
    REQUIRE(stream_sync(r->stream));
}

/* attend and correct into `partial`, everything poisoned before. */
static void rig_attend(struct rig *r, const struct config *c, bool correction, float *partial) {
    struct cache *cache = &r->cache;
    int stride = partial_stride(c->d, correction);
    poison(r, partial, (size_t)BUCKET * N_HEADS * (size_t)stride * sizeof(float));
    REQUIRE(op_attend(r->stream, &(struct attend_args){.in = r->step, .n_rows = BUCKET, .params = cache->params, .layout = cache->layout,
                                                       .layer = cache->layers[0], .page_table = cache->page_table,
                                                       .table_stride = cache->table_stride, .n_heads = N_HEADS,
                                                       .scale = 1.0f / sqrtf((float)c->d), .q = r->q, .partial = partial, .stride = stride}));
    if (correction)
        REQUIRE(op_correct(r->stream, &(struct correct_args){.in = r->step, .n_rows = BUCKET, .layout = cache->layout,
                                                             .layer = cache->layers[0], .n_heads = N_HEADS, .q = r->q,
                                                             .partial = partial, .stride = stride}));
}

/* Collective: the merged output [N_ROWS][N_HEADS * d] on the host. */
static void rig_merge(struct rig *r, const struct config *c, enum merge_kind kind, bool correction, float *out) {
    struct merge m;
    size_t bytes = (size_t)N_ROWS * N_HEADS * (size_t)c->d * sizeof(float);
    REQUIRE(merge_init(&m, kind, r->comm, r->backend, BUCKET, N_HEADS, c->d));
    rig_attend(r, c, correction, merge_partial(&m, BUCKET, correction));
    poison(r, r->out, (size_t)BUCKET * N_HEADS * (size_t)c->d * sizeof(float));
    REQUIRE(merge_run(&m, r->stream, BUCKET, &r->step->n_rows, correction, r->out));
    if (kind == MERGE_FUSED && comm_size(r->comm) > 1) /* what o_proj's sum does */
        REQUIRE(comm_all_reduce(r->comm, r->stream, "sum of outputs", r->out, r->out, (int64_t)N_ROWS * N_HEADS * c->d, COMM_FLOAT, COMM_SUM));
    REQUIRE(stream_copy_out(r->stream, out, r->out, bytes));
    REQUIRE(stream_sync(r->stream));
    merge_deinit(&m);
}

/* ---- Algorithm 1 in double, from the one-rank cache's pages -------------------------------------------------------------- */

struct reference {
    double *out, *exact_bound, *layout_bound; /* [N_ROWS][N_HEADS][d], [N_ROWS][N_HEADS] */
    float *kq, *vq;                           /* of one slot and head: [blocks][KV_BLOCK][d] */
    double *s, *p;                            /* [features][d], [features] */
    double phi_error;                         /* relative, of the features of the flushed keys */
    double weight_error;                      /* relative, of a softmax weight before it meets V: a GPU rounds it to 11 bits */
};

static void unpack_slot(struct rig *one, const struct inputs *in, int slot, int head, struct reference *ref) {
    const struct cache_layer *l = &one->cache.layers[0];
    size_t part = KV_BLOCK * (size_t)in->config->d * sizeof(float);
    int64_t n = cache_n_flushed(&one->cache.layout, lengths[slot] - 1);
    float *k, *v;
    REQUIRE(backend_alloc(one->backend, MEMORY_WORKSPACE, part, &k));
    REQUIRE(backend_alloc(one->backend, MEMORY_WORKSPACE, part, &v));
    for (int64_t block = 0; block < n; block++) {
        int64_t page = one->cache.slot_pages[slot * one->cache.table_stride + block];
        const uint8_t *record = l->pages + page * l->page_stride + (size_t)head * page_record_bytes(&l->format);
        REQUIRE(op_unpack(one->stream, &(struct unpack_args){l->format, record, k, v}));
        REQUIRE(stream_copy_out(one->stream, ref->kq + block * KV_BLOCK * in->config->d, k, part));
        REQUIRE(stream_copy_out(one->stream, ref->vq + block * KV_BLOCK * in->config->d, v, part));
        REQUIRE(stream_sync(one->stream));
    }
    backend_free(one->backend, k);
    backend_free(one->backend, v);
}

/* phi(x) of KVLinC's eq. 6, w [2][d][features/2]; returns the bound of its relative error in float. */
static double features_of(const struct config *c, const float *w, const double *x, double *phi) {
    int half = c->features / 2;
    double largest = 0;
    for (int part = 0; part < 2; part++) {
        double max = -INFINITY, sum = 0, *at = phi + part * half;
        for (int f = 0; f < half; f++) {
            double dot = 0, squares = 0;
            for (int i = 0; i < c->d; i++) {
                double term = x[i] * (double)w[((int64_t)part * c->d + i) * half + f];
                dot += term;
                squares += term * term;
            }
            at[f] = dot;
            max = fmax(max, dot);
            largest = fmax(largest, fabs(dot) + sqrt(squares));
        }
        for (int f = 0; f < half; f++)
            sum += at[f] = exp(at[f] - max);
        for (int f = 0; f < half; f++)
            at[f] /= sum;
    }
    return SAFE * U * (2 * sqrt(c->d) * largest + 4 + sqrt(half));
}

static void states_of(const struct inputs *in, int slot, int head, int64_t n_flush, struct reference *ref) {
    const struct config *c = in->config;
    int n = lengths[slot], d = c->d;
    double phi[KV_MAX_FEATURES], error[MAX_D];
    ref->phi_error = 0;
    memset(ref->s, 0, (size_t)c->features * (size_t)d * sizeof *ref->s);
    memset(ref->p, 0, (size_t)c->features * sizeof *ref->p);
    for (int64_t t = c->sink; t < n_flush * KV_BLOCK; t++) {
        const float *k = in->k[slot] + ((int64_t)head * n + t) * d, *v = in->v[slot] + ((int64_t)head * n + t) * d;
        for (int i = 0; i < d; i++)
            error[i] = (double)k[i] - (double)ref->kq[t * d + i];
        double bound = features_of(c, in->phi_k + (int64_t)head * d * c->features, error, phi);
        ref->phi_error = fmax(ref->phi_error, bound);
        for (int f = 0; f < c->features; f++) {
            double weight = phi[f] * (c->gate ? (double)in->gate[head] : 1.0);
            ref->p[f] += weight;
            for (int i = 0; i < d; i++)
                ref->s[f * d + i] += weight * (double)(c->exact_v ? v[i] : ref->vq[t * d + i]);
        }
    }
}

/* What the sums of one row and head are made of, for the answer and its bounds. */
struct sums {
    double max, den, squares, num[MAX_D]; /* squares: of the weights */
    double v_max, score_size;             /* largest value and score met on the way */
};

static const float *token_of(const struct inputs *in, const struct reference *ref, bool keys, int slot, int kv_head, int t, int64_t n_flush) {
    const struct config *c = in->config;
    if (t < n_flush * KV_BLOCK && t >= c->sink)
        return (keys ? ref->kq : ref->vq) + (int64_t)t * c->d;
    return (keys ? in->k : in->v)[slot] + ((int64_t)kv_head * lengths[slot] + t) * c->d;
}

/* The softmax sums of the row, shifted by the global max. */
static void sum_double(const struct inputs *in, int row, int head, int64_t n_flush, const struct reference *ref, struct sums *sums) {
    const struct config *c = in->config;
    int slot = in->step.row[row].seq, position = in->step.row[row].position, d = c->d;
    const float *q = in->q + ((int64_t)row * N_HEADS + head) * d;
    static double score[MAX_TOKENS];
    double k_max[MAX_D] = {0}, scale = 1 / sqrt(d), squares = 0, largest = 0;
    *sums = (struct sums){.max = -INFINITY};
    for (int t = 0; t <= position; t++) {
        const float *k = token_of(in, ref, true, slot, head / GROUP, t, n_flush);
        score[t] = 0;
        for (int i = 0; i < d; i++) {
            score[t] += (double)q[i] * (double)k[i] * scale;
            k_max[i] = fmax(k_max[i], fabs((double)k[i]));
        }
        sums->max = fmax(sums->max, score[t]);
        largest = fmax(largest, fabs(score[t]));
    }
    for (int i = 0; i < d; i++) { /* |zero| + |code scale| is at most three times the channel's largest key */
        double term = (double)q[i] * scale * (c->k_bits < 16 ? 3 : 1) * k_max[i];
        squares += term * term;
    }
    sums->score_size = largest + sqrt(squares);
    for (int t = 0; t <= position; t++) {
        const float *v = token_of(in, ref, false, slot, head / GROUP, t, n_flush);
        double weight = exp(score[t] - sums->max);
        sums->den += weight;
        sums->squares += weight * weight;
        for (int i = 0; i < d; i++) {
            sums->num[i] += weight * (double)v[i];
            sums->v_max = fmax(sums->v_max, fabs((double)v[i]) * (c->v_bits < 16 ? 3 : 1));
        }
    }
}

/* One row and query head: scores, the global max, the sums, the correction once (Algorithm 1, lines 13-15); and the bounds. */
static void attend_double(const struct inputs *in, int row, int head, int64_t n_flush, struct reference *ref) {
    const struct config *c = in->config;
    int d = c->d, position = in->step.row[row].position;
    int64_t item = (int64_t)row * N_HEADS + head;
    double phi[KV_MAX_FEATURES], x[MAX_D], c_n[MAX_D] = {0}, c_d = 0, phi_error = 0, size = 0;
    struct sums sums;
    sum_double(in, row, head, n_flush, ref, &sums);
    for (int i = 0; i < d; i++)
        x[i] = (double)in->q[item * d + i];
    if (c->features)
        phi_error = ref->phi_error + features_of(c, in->phi_q + (int64_t)(c->per_head ? head : head / GROUP) * d * c->features, x, phi);
    for (int f = 0; f < c->features; f++) {
        c_d += phi[f] * ref->p[f];
        for (int i = 0; i < d; i++)
            c_n[i] += phi[f] * ref->s[f * d + i];
    }
    for (int i = 0; i < d; i++) {
        ref->out[item * d + i] = (sums.num[i] + c_n[i]) / (sums.den + c_d);
        size = fmax(size, fmax(fabs(sums.num[i] / sums.den), c_d > 0 ? fabs(c_n[i] / c_d) : 0));
    }
    double rounding = SAFE * ref->weight_error * sums.v_max * sqrt(sums.squares) / sums.den;
    size += sums.v_max * sqrt(sums.squares) / sums.den;
    int depth = KV_BLOCK + position / KV_BLOCK + 64 + c->features;
    double adding = 2 * SAFE * U * (sqrt(depth) + 4), scores = 2 * SAFE * U * sqrt(d) * sums.score_size;
    ref->layout_bound[item] = adding * size;
    ref->exact_bound[item] = (adding + scores + phi_error) * size + rounding;
}

/* Rank r works out the slots r, r + size, ...; then all have all. Collective. */
static void reference_make(struct reference *ref, struct rig *one, const struct inputs *in, struct comm *comm) {
    const struct config *c = in->config;
    int64_t n = (int64_t)N_ROWS * N_HEADS, floats = MAX_BLOCKS * KV_BLOCK * (int64_t)c->d;
    ref->out = calloc((size_t)(n * (c->d + 2)), sizeof *ref->out);
    ref->exact_bound = ref->out + n * c->d;
    ref->layout_bound = ref->exact_bound + n;
    ref->kq = malloc((size_t)floats * sizeof(float));
    ref->vq = malloc((size_t)floats * sizeof(float));
    ref->s = malloc(((size_t)c->features * (size_t)(c->d + 1) + 1) * sizeof(double));
    ref->p = ref->s + (int64_t)c->features * c->d;
    for (int item = comm_rank(comm); item < N_SLOTS * N_KV_HEADS; item += comm_size(comm)) {
        int slot = item / N_KV_HEADS, head = item % N_KV_HEADS;
        int64_t n_flush = cache_n_flushed(&one->cache.layout, lengths[slot] - 1);
        unpack_slot(one, in, slot, head, ref);
        if (c->features)
            states_of(in, slot, head, n_flush, ref);
        for (int row = 0; row < N_ROWS; row++)
            for (int g = 0; g < GROUP && in->step.row[row].seq == slot; g++)
                attend_double(in, row, head * GROUP + g, n_flush, ref);
    }
    free(ref->kq);
    free(ref->vq);
    free(ref->s);
    int64_t bytes = n * (c->d + 2) * (int64_t)sizeof(double);
    double *all = malloc((size_t)bytes * (size_t)comm_size(comm));
    REQUIRE(comm_gather_host(comm, "references", ref->out, all, bytes));
    for (int64_t i = 0; i < n * (c->d + 2); i++) {
        double sum = 0;
        for (int r = 0; r < comm_size(comm); r++)
            sum += all[r * n * (c->d + 2) + i]; /* each entry is one rank's, the others have 0 */
        ref->out[i] = sum;
    }
    free(all);
}

/* ---- checks ------------------------------------------------------------------------------------------------------------ */

/* Entries beyond their bound (a NaN is); padding rows must be 0. `worst`: largest difference as a share of its bound. */
static long count_beyond(const struct inputs *in, const float *out, const double *expected, const float *other, const double *bound,
                         double factor, double *worst) {
    int d = in->config->d;
    long n = 0;
    for (int64_t i = 0; i < (int64_t)N_ROWS * N_HEADS * d; i++) {
        int64_t item = i / d;
        double limit = in->step.row[item / N_HEADS].seq < 0 ? 0 : factor * bound[item];
        double difference = fabs((double)out[i] - (other ? (double)other[i] : expected[i]));
        n += !(difference <= limit);
        if (limit > 0)
            *worst = fmax(*worst, difference / limit);
    }
    return n;
}

/* The pages that this rank owns are those of the one-rank cache, bit for bit. */
static void check_pages(struct rig *cut, struct rig *one, int slot) {
    size_t bytes = (size_t)cut->cache.layers[0].page_stride;
    int64_t n = cache_n_flushed(&cut->cache.layout, lengths[slot] - 1), local = 0;
    uint8_t *a = malloc(2 * bytes + 1), *b = a + bytes;
    for (int64_t block = 0; block < n; block++) {
        if (!cache_owns(&cut->cache.layout, block, cut->offset[slot]))
            continue;
        int64_t page = cut->cache.slot_pages[slot * cut->cache.table_stride + local++];
        int64_t same = one->cache.slot_pages[slot * one->cache.table_stride + block];
        REQUIRE(stream_copy_out(cut->stream, a, cut->cache.layers[0].pages + page * (int64_t)bytes, bytes));
        REQUIRE(stream_copy_out(one->stream, b, one->cache.layers[0].pages + same * (int64_t)bytes, bytes));
        REQUIRE(stream_sync(cut->stream));
        REQUIRE(stream_sync(one->stream));
        int64_t record = (int64_t)page_record_bytes(&cut->cache.layers[0].format); /* its last bytes may be padding */
        size_t used = (size_t)record - 16;
        for (int h = 0; h < N_KV_HEADS; h++)
            CHECK(memcmp(a + h * record, b + h * record, used) == 0, "slot %d block %lld head %d", slot, (long long)block, h);
    }
    CHECK(local == cut->cache.slot_n_pages[slot], "slot %d: %lld pages", slot, (long long)local);
    free(a);
}

/* Merging as it must not be done. `each_split`: every split adds the whole correction; else it is added to sums that nobody shifted. */
static void merge_wrong(const struct config *c, const float *records, int n_ranks, bool each_split, float *out) {
    int d = c->d, stride = partial_stride(d, true), tail = partial_tail(d, true);
    int64_t items = (int64_t)BUCKET * N_HEADS;
    for (int64_t i = 0; i < (int64_t)N_ROWS * N_HEADS; i++) {
        double max = -INFINITY, num[MAX_D] = {0}, den = 0;
        for (int r = 0; r < n_ranks; r++)
            max = fmax(max, (double)records[(r * items + i) * stride + tail]);
        for (int r = 0; r < n_ranks; r++) {
            const float *x = records + (r * items + i) * stride;
            double m = (double)x[tail], weight = m == -INFINITY ? 0 : exp(m - (each_split ? max : 0));
            int times = each_split ? n_ranks : 1;
            den += weight * (double)x[tail + 1] + times * (double)x[tail + 2];
            for (int k = 0; k < d; k++)
                num[k] += weight * (double)x[k] + times * (double)x[d + k];
        }
        for (int k = 0; k < d; k++)
            out[i * d + k] = den != 0 ? (float)(num[k] / den) : 0.0f;
    }
}

/* The checks can fail: both mistakes are seen in most rows that have flushed blocks. Collective. */
static void check_wrong_merges(struct rig *r, const struct inputs *in, const struct reference *ref) {
    const struct config *c = in->config;
    int n = comm_size(r->comm);
    int64_t floats = (int64_t)BUCKET * N_HEADS * partial_stride(c->d, true), bytes = floats * (int64_t)sizeof(float);
    float *device, *host = malloc((size_t)bytes), *all = malloc((size_t)(bytes * n)), *out = malloc(N_ROWS * N_HEADS * MAX_D * sizeof(float));
    double worst = 0;
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, (size_t)bytes, &device));
    rig_attend(r, c, true, device);
    REQUIRE(stream_copy_out(r->stream, host, device, (size_t)bytes));
    REQUIRE(stream_sync(r->stream));
    REQUIRE(comm_gather_host(r->comm, "records", host, all, bytes));
    for (int each_split = 0; each_split < 2; each_split++) {
        if (each_split && n == 1)
            continue; /* one split adds it once */
        merge_wrong(c, all, n, each_split, out);
        long beyond = count_beyond(in, out, ref->out, NULL, ref->exact_bound, 1, &worst);
        /* wider bounds hide some of it on a GPU */
        CHECK(beyond > (long)LONG_RUN * N_HEADS * c->d / (ref->weight_error > 0 ? 4 : 2), "%s: the wrong merge %d is seen in %ld values only", c->name, each_split, beyond);
    }
    backend_free(r->backend, device);
    free(host);
    free(all);
    free(out);
}

/* Without a correction the records are those of a layer that has none, whatever lies in the pointers; with one, the plain part is. */
static void check_off(struct rig *r, const struct config *c, float *out, float *again) {
    struct cache_layer *l = &r->cache.layers[0], kept = *l;
    size_t bytes = (size_t)N_ROWS * N_HEADS * (size_t)c->d * sizeof *out;
    l->features = 0; /* adapters and states are there, the correction is off */
    rig_merge(r, c, MERGE_GATHER, false, out);
    *l = (struct cache_layer){.format = kept.format, .pages = kept.pages, .page_stride = kept.page_stride, .window = kept.window, .sink = kept.sink};
    rig_merge(r, c, MERGE_GATHER, false, again);
    *l = kept;
    CHECK(memcmp(out, again, bytes) == 0, "%s: off is not the plain path", c->name);
    int plain = partial_stride(c->d, false), full = partial_stride(c->d, true);
    size_t n = (size_t)BUCKET * N_HEADS * (size_t)full;
    float *device, *a = malloc(2 * n * sizeof *a), *b = a + n;
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, n * sizeof *a, &device));
    rig_attend(r, c, true, device);
    REQUIRE(stream_copy_out(r->stream, a, device, n * sizeof *a));
    rig_attend(r, c, false, device);
    REQUIRE(stream_copy_out(r->stream, b, device, n / (size_t)full * (size_t)plain * sizeof *a));
    REQUIRE(stream_sync(r->stream));
    for (int64_t i = 0; i < (int64_t)BUCKET * N_HEADS; i++) {
        CHECK(memcmp(a + i * full, b + i * plain, (size_t)c->d * sizeof *a) == 0, "%s: Y of item %lld", c->name, (long long)i);
        CHECK(memcmp(a + i * full + 2 * c->d, b + i * plain + c->d, 2 * sizeof *a) == 0, "%s: m, l of item %lld", c->name, (long long)i);
    }
    backend_free(r->backend, device);
    free(a);
}

/* One configuration, one owner offset, on one device. `kept`: the outputs without a shift of the keys, which a shift must not change. */
static void run_config(const char *device, struct comm *world, struct comm *alone, const struct config *c, int offset, float *kept) {
    struct inputs in;
    struct rig cut, one;
    struct reference ref = {.weight_error = device_is_gpu(device) ? 1.0 / 2048 : 0};
    size_t bytes = (size_t)N_ROWS * N_HEADS * (size_t)c->d * sizeof(float);
    float *expected = malloc(bytes), *out = malloc(bytes);
    double exact = 0, layout = 0, shifted = 0;
    inputs_make(&in, c);
    rig_open(&one, device, world, alone, &in, 0);
    rig_open(&cut, device, world, world, &in, offset);
    rig_fill(&one, &in);
    rig_fill(&cut, &in);
    reference_make(&ref, &one, &in, world);
    rig_merge(&one, c, MERGE_GATHER, c->features > 0, expected);
    CHECK(count_beyond(&in, expected, ref.out, NULL, ref.exact_bound, 1, &exact) == 0, "%s: one rank against double: %g", c->name, exact);
    for (int slot = 0; slot < N_SLOTS; slot++)
        check_pages(&cut, &one, slot);
    for (int kind = MERGE_ALLREDUCE; kind <= MERGE_GATHER; kind++) {
        rig_merge(&cut, c, (enum merge_kind)kind, c->features > 0, out);
        long a = count_beyond(&in, out, ref.out, NULL, ref.exact_bound, 1, &exact);
        long b = count_beyond(&in, out, NULL, expected, ref.layout_bound, 2, &layout);
        CHECK(a == 0 && b == 0, "%s, offset %d, %s: %ld values against double (%g of the bound), %ld against one rank (%g)", c->name, offset,
              merge_name((enum merge_kind)kind), a, exact, b, layout);
        if (c->grid_keys && c->shift > 0) {
            long n = count_beyond(&in, out, NULL, kept, ref.exact_bound, 2, &shifted);
            CHECK(n == 0, "%s, %s: %ld values changed (%g of the bound)", c->name, merge_name((enum merge_kind)kind), n, shifted);
        }
    }
    if (c->grid_keys && c->shift == 0)
        memcpy(kept, out, bytes);
    if (c->features) {
        check_off(&cut, c, out, expected);
        check_wrong_merges(&cut, &in, &ref);
    }
    if (comm_rank(world) == 0)
        printf("%-9s %-38s offset %d: %.3f of the bound against double, %.3f against one rank\n", device, c->name, offset, exact, layout);
    rig_close(&cut);
    rig_close(&one);
    inputs_free(&in);
    free(ref.out);
    free(expected);
    free(out);
}

int main(int argc, char **argv) { /* DEVICE */
    struct comm *world, *alone;
    const char *device = argc > 1 ? argv[1] : "cpu";
    float *kept = malloc(N_ROWS * N_HEADS * MAX_D * sizeof *kept);
    REQUIRE(comm_start("auto", 60, &argc, &argv, &world));
    device_require(world, device);
    REQUIRE(comm_split(world, comm_rank(world), 0, "alone", &alone));
    for (int i = 0; i < N_CONFIGS; i++)
        if (!device_is_gpu(device) || configs[i].window != DTYPE_F32) /* float caches are the CPU's */
            run_config(device, world, alone, &configs[i], i % comm_size(world), kept);
    for (int offset = 0; offset < comm_size(world); offset++) /* every first owner, with sink and correction */
        run_config(device, world, alone, &configs[6], offset, kept);
    free(kept);
    int64_t failed = test_n_failed;
    REQUIRE(comm_reduce_host(world, "result", &failed, 1, COMM_SUM));
    comm_free(alone);
    comm_finish(world);
    return failed ? 1 : test_report();
}
