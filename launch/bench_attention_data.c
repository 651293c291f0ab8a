/* The contents that bench attention works on, and what attention of them is, in double. Pages are made by the operation that makes them in
 * a prompt, so nothing here knows what a page looks like. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "launch/bench_attention.h"

enum { SEED_KV = 11, SEED_WINDOW, SEED_Q, SEED_STATES, SEED_PHI };
#define PHI_SCALE 0.1f   /* weights of an adapter: features far from one-hot, and far from uniform */
#define STATES_SCALE 5.0f /* S, and P in [0, 20): a correction about as large as the rest of a denominator */

/* ---- contents ---------------------------------------------------------------------------------------------------------- */

static int take_host(const struct bench *b, void *out, int64_t n, size_t size) {
    return backend_alloc(b->device.backend, MEMORY_HOST, (size_t)n * size, out);
}

/* n uniform values in fp16, a piece at a time. */
static void fill_halves(uint64_t seed, uint16_t *to, int64_t n) {
    enum { PIECE = 4096 };
    float x[PIECE];
    for (int64_t i = 0; i < n; i += PIECE) {
        int64_t count = min_i64(PIECE, n - i);
        bench_random(seed + (uint64_t)i * 31, x, count);
        dtype_narrow(DTYPE_F16, x, to + i, count);
    }
}

static void fill_states(const struct attention_shape *s, float *states) {
    int64_t features = ATTENTION_FEATURES, each = features * s->head_dim + features;
    bench_random(SEED_STATES, states, s->n_kv_heads * each);
    for (int64_t i = 0; i < s->n_kv_heads * each; i++)
        states[i] = STATES_SCALE * (states[i] + (i % each < features * s->head_dim ? 0.0f : 2.0f));
}

int attention_data_make(const struct bench *b, const struct attention_shape *shape, struct attention_data *data) {
    int64_t d = shape->head_dim, kv_heads = shape->n_kv_heads, features = ATTENTION_FEATURES;
    int64_t n_kv = kv_heads * 2 * ATTENTION_TOKENS * d, n_window = ATTENTION_SLOTS * kv_heads * 2 * KV_BLOCK * d;
    int64_t n_q = STEP_MAX_ROWS * (int64_t)shape->n_heads * d, n_phi = kv_heads * d * features;
    *data = (struct attention_data){.shape = *shape};
    TRY(take_host(b, &data->kv, n_kv, sizeof *data->kv));
    TRY(take_host(b, &data->window, n_window, sizeof *data->window));
    TRY(take_host(b, &data->q, n_q, sizeof *data->q));
    TRY(take_host(b, &data->states, kv_heads * (features * d + features), sizeof *data->states));
    TRY(take_host(b, &data->phi, n_phi, sizeof *data->phi));
    fill_halves(SEED_KV, data->kv, n_kv);
    fill_halves(SEED_WINDOW, data->window, n_window);
    fill_halves(SEED_Q, data->q, n_q);
    fill_states(shape, data->states);
    bench_random(SEED_PHI, data->phi, n_phi);
    for (int64_t i = 0; i < n_phi; i++)
        data->phi[i] *= PHI_SCALE;
    TRY(backend_alloc(b->device.backend, MEMORY_WORKSPACE, (size_t)n_kv * sizeof *data->kv, &data->kv_device));
    return bench_upload(b, data->kv_device, data->kv, (size_t)n_kv * sizeof *data->kv);
}

void attention_data_free(const struct bench *b, struct attention_data *data) {
    void *all[] = {data->kv, data->window, data->q, data->states, data->phi, data->kv_device};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(b->device.backend, all[i]);
    *data = (struct attention_data){0};
}

/* ---- pages ------------------------------------------------------------------------------------------------------------- */

void attention_cache_of(const char *name, const struct cache_spec *spec, const struct attention_shape *shape, struct attention_cache *out) {
    const struct cache_layer_spec *layer = &spec->layer[0];
    *out = (struct attention_cache){.format = {.head_dim = shape->head_dim, .k_bits = layer->k_bits, .v_bits = layer->v_bits,
                                               .window = DTYPE_F16},
                                    .correction = layer->correction};
    out->page_bytes = shape->n_kv_heads * (int64_t)page_record_bytes(&out->format);
    snprintf(out->name, sizeof out->name, "%s", name);
}

int attention_cache_parse(const char *name, const struct attention_shape *shape, struct attention_cache *out) {
    char k_bits[2], v_bits[2];
    int length = 0;
    struct cache_spec spec;
    struct cache_request request = {.preset = name, .window = -1, .sink = -1, .has_adapters = true};
    if (sscanf(name, "k%1[248]v%1[248]%n", k_bits, v_bits, &length) == 2 && !name[length]) {
        request.preset = "hadv";
        request.k_bits = k_bits;
        request.v_bits = v_bits;
    }
    TRY(cache_spec_make(&request, 1, &spec));
    if (spec.window_type != DTYPE_F16)
        FAIL(STATUS_USAGE, "cache '%s': bench attention takes those with 16-bit blocks in fp16, and bits such as k4v4", name);
    attention_cache_of(name, &spec, shape, out);
    return STATUS_OK;
}

static int encode(const struct bench *b, const struct attention_data *data, const struct attention_cache *cache) {
    const struct attention_shape *s = &data->shape;
    int32_t table[ATTENTION_PAGES], *device;
    for (int i = 0; i < ATTENTION_PAGES; i++)
        table[i] = i;
    TRY(backend_alloc(b->device.backend, MEMORY_WORKSPACE, sizeof table, &device));
    int status = bench_upload(b, device, table, sizeof table);
    struct flush_exact_args args = {
        .n = ATTENTION_TOKENS, .n_flush = ATTENTION_PAGES, .page_table = device, .kv = data->kv_device,
        .layout = {.cp_size = 1, .window_blocks = ATTENTION_WINDOW, .n_slots = ATTENTION_SLOTS, .n_kv_heads = s->n_kv_heads,
                   .head_dim = s->head_dim},
        .layer = {.format = cache->format, .pages = cache->pages, .page_stride = cache->page_bytes}};
    if (status == STATUS_OK)
        status = op_flush_exact(b->device.stream, &args);
    if (status == STATUS_OK)
        status = stream_sync(b->device.stream);
    backend_free(b->device.backend, device);
    return status;
}

static int decode(const struct bench *b, const struct attention_data *data, const struct attention_cache *cache, float *device) {
    int64_t part = KV_BLOCK * (int64_t)data->shape.head_dim, n = ATTENTION_PAGES * (int64_t)data->shape.n_kv_heads;
    int64_t record = (int64_t)page_record_bytes(&cache->format);
    for (int64_t i = 0; i < n; i++)
        TRY(op_unpack(b->device.stream, &(struct unpack_args){.format = cache->format, .record = cache->pages + i * record,
                                                              .k = device + 2 * i * part, .v = device + (2 * i + 1) * part}));
    TRY(stream_copy_out(b->device.stream, cache->decoded, device, (size_t)(2 * n * part) * sizeof *device));
    return stream_sync(b->device.stream);
}

int attention_cache_fill(const struct bench *b, const struct attention_data *data, struct attention_cache *cache) {
    int64_t n = ATTENTION_TOKENS * 2 * (int64_t)data->shape.n_kv_heads * data->shape.head_dim;
    float *device;
    TRY(backend_alloc(b->device.backend, MEMORY_CACHE, (size_t)(ATTENTION_PAGES * cache->page_bytes), &cache->pages));
    TRY(take_host(b, &cache->decoded, n, sizeof *cache->decoded));
    TRY(encode(b, data, cache));
    TRY(backend_alloc(b->device.backend, MEMORY_WORKSPACE, (size_t)n * sizeof *device, &device));
    int status = decode(b, data, cache, device);
    backend_free(b->device.backend, device);
    return status;
}

void attention_cache_free(const struct bench *b, struct attention_cache *cache) {
    backend_free(b->device.backend, cache->pages);
    backend_free(b->device.backend, cache->decoded);
    cache->pages = NULL;
    cache->decoded = NULL;
}

/* ---- the answer in double ------------------------------------------------------------------------------------------------ */

/* Sums that follow a running max. */
struct tally {
    double max, sum;
    double y[KV_MAX_HEAD_DIM];
};

static void tally_add(struct tally *t, int d, double score, double times, const float *v) {
    if (score > t->max) {
        double factor = exp(t->max - score);
        t->sum *= factor;
        for (int c = 0; c < d; c++)
            t->y[c] *= factor;
        t->max = score;
    }
    double weight = times * exp(score - t->max);
    t->sum += weight;
    for (int c = 0; c < d; c++)
        t->y[c] += weight * (double)v[c];
}

static double dot(const float *x, const float *y, int d) {
    double sum = 0;
    for (int c = 0; c < d; c++)
        sum += (double)x[c] * (double)y[c];
    return sum;
}

static void tally_window(const struct attention_data *data, const struct attention_seen *seen, int kv_head, const float *q,
                         struct tally *tally) {
    const struct attention_shape *s = &data->shape;
    int64_t d = s->head_dim, part = KV_BLOCK * d;
    float k[KV_MAX_HEAD_DIM], v[KV_MAX_HEAD_DIM];
    for (int64_t p = seen->window_begin; p < seen->window_end; p++) {
        int64_t slot = p / KV_BLOCK % ATTENTION_SLOTS;
        const uint16_t *row = data->window + (slot * s->n_kv_heads + kv_head) * 2 * part + p % KV_BLOCK * d;
        dtype_widen(DTYPE_F16, row, k, d);
        dtype_widen(DTYPE_F16, row + part, v, d);
        tally_add(tally, (int)d, (double)s->scale * dot(q, k, (int)d), 1, v);
    }
}

static void read_query(const struct attention_data *data, int64_t row, int head, float *q) {
    dtype_widen(DTYPE_F16, data->q + (row * data->shape.n_heads + head) * data->shape.head_dim, q, data->shape.head_dim);
}

void attention_answer(const struct attention_data *data, const float *decoded, const struct attention_seen *seen, int64_t row, int head,
                      struct attention_answer *out) {
    const struct attention_shape *s = &data->shape;
    int d = s->head_dim, kv_head = head / (s->n_heads / s->n_kv_heads);
    int64_t part = KV_BLOCK * (int64_t)d;
    struct tally tally = {.max = -INFINITY};
    float q[KV_MAX_HEAD_DIM];
    read_query(data, row, head, q);
    for (int t = 0; t < ATTENTION_TOKENS; t++)
        if (seen->times[t] > 0) {
            const float *k = decoded + ((int64_t)(t / KV_BLOCK) * s->n_kv_heads + kv_head) * 2 * part + t % KV_BLOCK * d;
            tally_add(&tally, d, (double)s->scale * dot(q, k, d), seen->times[t], k + part);
        }
    tally_window(data, seen, kv_head, q, &tally);
    for (int c = 0; c < d; c++)
        out->out[c] = tally.y[c] / tally.sum;
    out->max = tally.max;
    out->log_sum = tally.max + log(tally.sum);
}

/* phi[0 .. D/2-1] = softmax(q W). */
static void features_of(const float *q, const float *w, int d, double *phi) {
    enum { N = ATTENTION_FEATURES / 2 };
    double max = -INFINITY, sum = 0;
    for (int f = 0; f < N; f++) {
        phi[f] = 0;
        for (int c = 0; c < d; c++)
            phi[f] += (double)q[c] * (double)w[c * N + f];
        max = fmax(max, phi[f]);
    }
    for (int f = 0; f < N; f++)
        sum += phi[f] = exp(phi[f] - max);
    for (int f = 0; f < N; f++)
        phi[f] /= sum;
}

void attention_correction(const struct attention_data *data, int64_t row, int head, double *c_n, double *c_d) {
    const struct attention_shape *s = &data->shape;
    int d = s->head_dim, kv_head = head / (s->n_heads / s->n_kv_heads), features = ATTENTION_FEATURES;
    const float *states = data->states + (int64_t)kv_head * (features * d + features);
    const float *w = data->phi + (int64_t)kv_head * d * features;
    float q[KV_MAX_HEAD_DIM];
    double phi[ATTENTION_FEATURES];
    read_query(data, row, head, q);
    features_of(q, w, d, phi);
    features_of(q, w + d * features / 2, d, phi + features / 2);
    memset(c_n, 0, (size_t)d * sizeof *c_n);
    *c_d = 0;
    for (int f = 0; f < features; f++) {
        *c_d += phi[f] * (double)states[features * d + f];
        for (int c = 0; c < d; c++)
            c_n[c] += phi[f] * (double)states[f * d + c];
    }
}
