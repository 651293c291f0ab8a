/* Attention of one decode step of one layer, by itself: each cache, and the GPU's own library in 16 bit beside them, on caches of random
 * content. Caches of the processor stay cold: launches go round over copies that no cache holds together, all of them in one graph. What
 * was timed is checked against the same attention in double on the host. */
#include "launch/bench_attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/rates.h"
#include "launch/signals.h"

enum { LEAST_LAUNCHES = 8, MOST_COPIES = 256 };
#define COLD_BYTES ((int64_t)256 << 20) /* more than four times the last-level cache of an H100 or H200 (50 MB) */
#define MEMORY_SHARE 0.9                /* of the free memory: beyond it a row is left out */

/* A probability is a number of 2^-11 relative error, and so is its score's size, which is below 10 here: products are of 16-bit numbers. */
#define LIMIT 5e-3

struct load { /* one batch of sequences of one length in one cache; everything but what is said is device memory */
    struct bench *b;
    const struct attention_data *data;
    const struct attention_cache *cache;
    int n_seqs, batch;             /* batch: rows of all sequences together, as many of each */
    int64_t tokens, n_pages;       /* of a sequence; its rows are the last of its tokens */
    int64_t bytes;                 /* read by one launch, at least */
    int n_copies, n_launches, repeats;
    bool merge;                    /* up to the output, not only to records */
    uint8_t *pages, *window;       /* [copy][n_seqs * n_pages][page_bytes], [copy][n_seqs][slot][kv_head][K, V][KV_BLOCK][d] */
    float *states, *phi;           /* [copy][n_seqs][..], [copy][..] */
    uint16_t *q;
    int32_t *table;                /* [n_seqs][n_pages] */
    struct step_input *in;
    struct seq_params *params;
    int stride;
    float *partial, *out;          /* [launch][batch][n_heads][stride], [launch][batch][n_heads * d] */
};

/* ---- sizes -------------------------------------------------------------------------------------------------------------- */

static int64_t window_halves(const struct attention_shape *s) {
    return ATTENTION_SLOTS * 2 * (int64_t)s->n_kv_heads * KV_BLOCK * s->head_dim;
}
static int64_t states_floats(const struct attention_shape *s) {
    return s->n_kv_heads * (int64_t)(ATTENTION_FEATURES * s->head_dim + ATTENTION_FEATURES);
}
static int64_t phi_floats(const struct attention_shape *s) { return s->n_kv_heads * (int64_t)s->head_dim * ATTENTION_FEATURES; }

/* Bytes of one copy; of one launch's results. */
static int64_t copy_bytes(const struct load *l) {
    const struct attention_shape *s = &l->data->shape;
    int64_t states = l->cache->correction ? (l->n_seqs * states_floats(s) + phi_floats(s)) * 4 : 0;
    return l->n_seqs * (l->n_pages * l->cache->page_bytes + 2 * window_halves(s)) + states;
}
static int64_t result_bytes(const struct load *l) {
    return l->batch * (int64_t)l->data->shape.n_heads * (l->stride + l->data->shape.head_dim) * 4;
}

/* Tokens that the row sees in 16 bit are read once, not whole slots. */
static void set_sizes(struct load *l) {
    const struct attention_shape *s = &l->data->shape;
    int64_t seen = (l->tokens - 1) / KV_BLOCK - ATTENTION_WINDOW;
    l->n_pages = max_i64(seen, 0);
    l->stride = partial_stride(s->head_dim, l->cache->correction);
    l->bytes = copy_bytes(l) - l->n_seqs * (2 * window_halves(s) - (l->tokens - l->n_pages * KV_BLOCK) * 4 * s->n_kv_heads * s->head_dim);
    l->n_copies = (int)min_i64(MOST_COPIES, ceil_div(COLD_BYTES, l->bytes));
    l->n_launches = (int)max_i64(LEAST_LAUNCHES, l->n_copies);
}

static int64_t free_bytes(const struct bench *b) {
    int64_t bytes = backend_free_bytes(b->device.backend);
    return (int64_t)(MEMORY_SHARE * (double)(bytes >= 0 ? bytes : b->run->place.memory_bytes));
}

bool attention_fits(const struct bench *b, int64_t bytes, const char *what, int batch, int64_t tokens) {
    if (bytes <= free_bytes(b))
        return true;
    if (b->run->root)
        log_info("bench attention: %s, batch %d of %lld tokens does not fit: %lld bytes, %lld are free", what, batch, (long long)tokens,
                 (long long)bytes, (long long)free_bytes(b));
    return false;
}

/* ---- filling ------------------------------------------------------------------------------------------------------------ */

static int take(struct load *l, void *out, int64_t bytes) { return backend_alloc(l->b->device.backend, MEMORY_CACHE, (size_t)bytes, out); }

/* `memory` is n_copies times `n` times what the host has. */
static int fill(struct load *l, void *memory, const void *host, int64_t bytes, int64_t n) {
    TRY(bench_upload(l->b, memory, host, (size_t)bytes));
    return bench_replicate(l->b, memory, (size_t)bytes, (size_t)(bytes * n));
}

/* Page `id` of every copy has content id % ATTENTION_PAGES. */
static int fill_pages(struct load *l) {
    int64_t n = l->n_seqs * l->n_pages, each = l->cache->page_bytes, first = min_i64(n, ATTENTION_PAGES);
    TRY(take(l, &l->pages, n * each * l->n_copies));
    if (n == 0)
        return STATUS_OK;
    TRY(stream_copy(l->b->device.stream, l->pages, l->cache->pages, (size_t)(first * each)));
    TRY(bench_replicate(l->b, l->pages, (size_t)(first * each), (size_t)(n * each)));
    return bench_replicate(l->b, l->pages, (size_t)(n * each), (size_t)(n * each * l->n_copies));
}

static int fill_stores(struct load *l) {
    const struct attention_shape *s = &l->data->shape;
    TRY(take(l, &l->window, 2 * window_halves(s) * l->n_seqs * l->n_copies));
    TRY(fill(l, l->window, l->data->window, 2 * window_halves(s), (int64_t)l->n_seqs * l->n_copies));
    if (!l->cache->correction)
        return STATUS_OK;
    TRY(take(l, &l->states, 4 * states_floats(s) * l->n_seqs * l->n_copies));
    TRY(fill(l, l->states, l->data->states, 4 * states_floats(s), (int64_t)l->n_seqs * l->n_copies));
    TRY(take(l, &l->phi, 4 * phi_floats(s) * l->n_copies));
    return fill(l, l->phi, l->data->phi, 4 * phi_floats(s), l->n_copies);
}

/* Sequences that grew together: their blocks got pages in turn. */
static int64_t page_of(const struct load *l, int64_t seq, int64_t block) { return block * l->n_seqs + seq; }

static int rows_each(const struct load *l) { return l->batch / l->n_seqs; }
static int64_t position_of(const struct load *l, int64_t row) { return l->tokens - rows_each(l) + row % rows_each(l); }

static int fill_table(struct load *l) {
    int64_t n = max_i64(l->n_seqs * l->n_pages, 1);
    int32_t *host;
    TRY(take(l, &l->table, n * 4));
    TRY(base_alloc(&host, (size_t)n, sizeof *host));
    for (int64_t i = 0; i < l->n_seqs; i++)
        for (int64_t j = 0; j < l->n_pages; j++)
            host[i * l->n_pages + j] = (int32_t)page_of(l, i, j);
    int status = bench_upload(l->b, l->table, host, (size_t)n * 4);
    free(host);
    return status;
}

static int fill_step(struct load *l) {
    struct step_input *in;
    TRY(base_alloc(&in, 1, sizeof *in));
    in->n_rows = l->batch;
    for (int i = 0; i < l->batch; i++)
        in->row[i] = (struct step_row){.seq = i / rows_each(l), .position = (int32_t)position_of(l, i), .first = i - i % rows_each(l)};
    int status = take(l, &l->in, sizeof *in);
    if (status == STATUS_OK)
        status = bench_upload(l->b, l->in, in, sizeof *in);
    free(in);
    TRY(status);
    return take(l, &l->params, l->n_seqs * (int64_t)sizeof *l->params); /* zeroed: offset 0 */
}

static int load_open(struct load *l) {
    const struct attention_shape *s = &l->data->shape;
    int64_t q_bytes = l->batch * (int64_t)s->n_heads * s->head_dim * 2, records = (int64_t)l->n_launches * l->batch * s->n_heads;
    TRY(fill_pages(l));
    TRY(fill_stores(l));
    TRY(fill_table(l));
    TRY(fill_step(l));
    TRY(take(l, &l->q, q_bytes));
    TRY(bench_upload(l->b, l->q, l->data->q, (size_t)q_bytes));
    TRY(take(l, &l->partial, records * l->stride * 4));
    TRY(take(l, &l->out, records * s->head_dim * 4));
    return stream_sync(l->b->device.stream);
}

static void load_close(struct load *l) {
    void *all[] = {l->pages, l->window, l->states, l->phi, l->q, l->table, l->in, l->params, l->partial, l->out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(l->b->device.backend, all[i]);
}

/* ---- launches ----------------------------------------------------------------------------------------------------------- */

static struct cache_layer layer_of(const struct load *l, int copy) {
    const struct attention_shape *s = &l->data->shape;
    struct cache_layer layer = {.format = l->cache->format, .page_stride = l->cache->page_bytes};
    layer.pages = l->pages + copy * l->n_seqs * l->n_pages * l->cache->page_bytes;
    layer.window = l->window + copy * l->n_seqs * 2 * window_halves(s);
    if (l->cache->correction) {
        layer.states = l->states + copy * l->n_seqs * states_floats(s);
        layer.phi_q = layer.phi_k = l->phi + copy * phi_floats(s);
        layer.features = ATTENTION_FEATURES;
    }
    return layer;
}

static int launch(const struct load *l, int index) {
    const struct attention_shape *s = &l->data->shape;
    struct stream *stream = l->b->device.stream;
    struct cache_layout layout = {.cp_size = 1, .window_blocks = ATTENTION_WINDOW, .n_slots = ATTENTION_SLOTS,
                                  .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim};
    struct cache_layer layer = layer_of(l, index % l->n_copies);
    float *partial = l->partial + (int64_t)index * l->batch * s->n_heads * l->stride;
    float *out = l->out + (int64_t)index * l->batch * s->n_heads * s->head_dim;
    struct attend_args args = {l->in, l->batch, l->params, layout, layer, l->table, l->n_pages, s->n_heads, s->scale, l->q, partial, l->stride};
    if (rows_each(l) == 1)
        return op_attend_step(stream, &(struct attend_step_args){args, l->merge ? out : NULL});
    TRY(op_attend(stream, &args));
    if (l->cache->correction)
        TRY(op_correct(stream, &(struct correct_args){l->in, l->batch, layout, layer, s->n_heads, l->q, partial, l->stride}));
    if (l->merge)
        TRY(op_merge_gather(stream, &(struct merge_gather_args){l->batch, NULL, s->n_heads, s->head_dim, l->cache->correction, partial, 1,
                                                                out}));
    return STATUS_OK;
}

static int enqueue(void *context) {
    const struct load *l = context;
    for (int i = 0; i < l->n_launches; i++)
        TRY(launch(l, i));
    return STATUS_OK;
}

int attention_time_graph(const struct bench *b, int (*what)(void *), void *context, int n_launches, int n, struct attention_time *out) {
    double times[BENCH_MAX_REPEATS];
    n = (int)min_i64(BENCH_MAX_REPEATS, n);
    struct graph *graph;
    TRY(bench_record(b, what, context, &graph));
    int status = graph_time(graph, b->device.stream, n, times);
    graph_close(graph);
    TRY(status);
    out->seconds = bench_median(times, n) / n_launches;
    out->best = times[0] / n_launches;
    return STATUS_OK;
}

/* ---- the check ---------------------------------------------------------------------------------------------------------- */

/* The larger; a NaN is the largest. */
static double worse(double a, double b) { return a != a || a > b ? a : b; }

/* |got - expected| / |expected|, vectors of d. */
double attention_difference(const float *got, const double *expected, int d) {
    double error = 0, size = 0;
    for (int c = 0; c < d; c++) {
        error += ((double)got[c] - expected[c]) * ((double)got[c] - expected[c]);
        size += expected[c] * expected[c];
    }
    return sqrt(error / size);
}

int attention_judge(const char *name, double error, int64_t row, int head) {
    if (!(error <= LIMIT))
        FAIL(STATUS_FAILED, "bench attention: %s: row %lld, head %d is off by %.3g of its size, at most %g can be", name,
             (long long)row, head, error, LIMIT);
    return STATUS_OK;
}

static void see(const struct load *l, int64_t row, struct attention_seen *seen) {
    memset(seen->times, 0, sizeof seen->times);
    for (int64_t j = 0; j < l->n_pages; j++)
        seen->times[page_of(l, row / rows_each(l), j) % ATTENTION_PAGES * KV_BLOCK] += 1;
    for (int t = 0; t < ATTENTION_TOKENS; t++)
        seen->times[t] = seen->times[t / KV_BLOCK * KV_BLOCK];
    seen->window_begin = l->n_pages * KV_BLOCK;
    seen->window_end = position_of(l, row) + 1;
}

/* One head: sums, maximum and correction of its record. */
static double record_error(const struct load *l, int64_t row, int head, const struct attention_answer *answer, const float *record) {
    const int d = l->data->shape.head_dim, tail = partial_tail(d, l->cache->correction);
    const float m = record[tail], sum = record[tail + 1];
    float y[KV_MAX_HEAD_DIM];
    double c_n[KV_MAX_HEAD_DIM], c_d;
    for (int c = 0; c < d; c++)
        y[c] = record[c] / sum;
    double error = worse(attention_difference(y, answer->out, d), fabs((double)m + log((double)sum) - answer->log_sum));
    if (!l->cache->correction)
        return error;
    attention_correction(l->data, row, head, c_n, &c_d);
    return worse(error, worse(attention_difference(record + d, c_n, d), fabs((double)record[tail + 2] - c_d) / c_d));
}

/* One head's output. */
static double output_error(const struct load *l, int64_t row, int head, const struct attention_answer *answer, const float *out) {
    const int d = l->data->shape.head_dim;
    double c_n[KV_MAX_HEAD_DIM] = {0}, c_d = 0, whole = exp(answer->log_sum - answer->max), expected[KV_MAX_HEAD_DIM];
    if (l->cache->correction)
        attention_correction(l->data, row, head, c_n, &c_d);
    for (int c = 0; c < d; c++)
        expected[c] = (answer->out[c] * whole + c_n[c]) / (whole + c_d);
    return attention_difference(out, expected, d);
}

/* Every head of the first and the last row against the host. */
static int check_rows(const struct load *l, const float *got, struct attention_time *result) {
    const struct attention_shape *s = &l->data->shape;
    struct attention_seen seen;
    struct attention_answer answer;
    for (int64_t row = 0; row < l->batch; row += max_i64(1, l->batch - 1)) {
        see(l, row, &seen);
        for (int head = 0; head < s->n_heads; head++) {
            int64_t at = row * s->n_heads + head;
            attention_answer(l->data, l->cache->decoded, &seen, row, head, &answer);
            double error = l->merge ? output_error(l, row, head, &answer, got + at * s->head_dim)
                                    : record_error(l, row, head, &answer, got + at * l->stride);
            TRY(attention_judge(l->cache->name, error, row, head));
            result->error = fmax(result->error, error);
        }
    }
    return STATUS_OK;
}

/* What all launches of the last replay left: the same bits from every copy, and the right ones. */
static int check(const struct load *l, struct attention_time *result) {
    const struct attention_shape *s = &l->data->shape;
    int64_t each = (int64_t)l->batch * s->n_heads * (l->merge ? s->head_dim : l->stride);
    float *got;
    TRY(backend_alloc(l->b->device.backend, MEMORY_HOST, (size_t)(each * l->n_launches) * sizeof *got, &got));
    int status = stream_copy_out(l->b->device.stream, got, l->merge ? l->out : l->partial, (size_t)(each * l->n_launches) * sizeof *got);
    if (status == STATUS_OK)
        status = stream_sync(l->b->device.stream);
    for (int i = 1; i < l->n_launches && status == STATUS_OK; i++)
        if (memcmp(got, got + i * each, (size_t)each * sizeof *got) != 0)
            status = base_fail(STATUS_FAILED, __FILE__, __LINE__, "bench attention: %s, batch %d of %lld tokens: launch %d has other bits",
                               l->cache->name, l->batch, (long long)l->tokens, i);
    if (status == STATUS_OK)
        status = check_rows(l, got, result);
    backend_free(l->b->device.backend, got);
    return status;
}

/* ---- rows --------------------------------------------------------------------------------------------------------------- */

struct run_state { /* over all caches */
    struct bench *b;
    struct attention_data data;
    double best16[BENCH_MAX_LIST][BENCH_MAX_LIST]; /* [batch][context] seconds of the best kernel in 16 bit; 0: none yet */
    double exact[BENCH_MAX_LIST];                  /* [prompt] FLOP/s of exact prefill; 0: none */
};

static void add_row(struct run_state *st, const char *item, const char *cache, int batch, int64_t tokens, int64_t bytes, double best16,
                    const struct attention_time *r) {
    struct bench *b = st->b;
    char note[96], ratio[40] = "";
    if (!b->run->root)
        return;
    if (best16 > 0)
        snprintf(ratio, sizeof ratio, ", %.2f x the best in 16 bit", best16 / r->seconds);
    snprintf(note, sizeof note, "%.2f us%s, error %.1e", r->seconds * 1e6, ratio, r->error);
    bench_add(b, (struct bench_row){.section = "attention", .item = item, .cache = cache, .batch = batch, .tokens = tokens,
                                    .ms = r->seconds * 1e3, .best_ms = r->best * 1e3, .rate = (double)bytes / r->seconds * 1e-9,
                                    .unit = "GB/s", .bytes = (double)bytes,
                                    .share = (double)bytes / r->seconds / (b->read_rate / comm_size(b->run->world)), .of = "read",
                                    .note = note});
}

static bool is_16_bit(const struct attention_cache *cache) { return cache->format.k_bits == 16 && cache->format.v_bits == 16; }

static int time_and_check(struct load *l, struct attention_time *out) {
    TRY(attention_time_graph(l->b, enqueue, l, l->n_launches, l->repeats, out));
    return check(l, out);
}

int attention_cache_time(struct bench *b, const struct attention_data *data, const struct attention_cache *cache,
                         const struct attention_run *run, struct attention_times *out) {
    struct load l = {.b = b, .data = data, .cache = cache, .n_seqs = run->n_seqs, .batch = run->n_seqs * run->rows, .tokens = run->tokens,
                     .repeats = run->repeats, .merge = true};
    *out = (struct attention_times){0};
    set_sizes(&l);
    out->bytes = l.bytes;
    out->fits = attention_fits(b, l.n_copies * copy_bytes(&l) + l.n_launches * result_bytes(&l), cache->name, l.batch, l.tokens);
    if (!out->fits)
        return STATUS_OK;
    int status = load_open(&l);
    if (status == STATUS_OK)
        status = time_and_check(&l, &out->whole);
    l.merge = false;
    if (status == STATUS_OK)
        status = time_and_check(&l, &out->records);
    load_close(&l);
    return status;
}

static int measure(struct run_state *st, const struct attention_cache *cache, int batch, int64_t tokens, double *best16) {
    const struct attention_run run = {.n_seqs = batch, .rows = 1, .tokens = tokens, .repeats = st->b->options->steps};
    struct attention_times t;
    TRY(attention_cache_time(st->b, &st->data, cache, &run, &t));
    if (!t.fits)
        return STATUS_OK;
    if (is_16_bit(cache) && (*best16 == 0 || t.whole.seconds < *best16))
        *best16 = t.whole.seconds;
    double against = is_16_bit(cache) ? 0 : *best16;
    add_row(st, "to the output", cache->name, batch, tokens, t.bytes, against, &t.whole);
    add_row(st, cache->correction ? "attend, correct" : "attend", cache->name, batch, tokens, t.bytes, against, &t.records);
    return STATUS_OK;
}

/* ---- the library beside it ---------------------------------------------------------------------------------------------- */

struct peer {
    struct bench *b;
    const struct attention_data *data;
    struct peer_attention args; /* of copy 0 and launch 0 */
    int64_t copy_halves;        /* of K and V of one copy */
    int64_t out_halves;         /* of one launch */
    int n_copies, n_launches;
    bool done;
    uint16_t *kv, *q, *out;     /* kv: [copy][K, V][batch][kv_head][tokens][d] */
};

static int peer_launch(struct peer *p, int index) {
    struct peer_attention args = p->args;
    args.k = p->kv + index % p->n_copies * p->copy_halves;
    args.v = (const uint16_t *)args.k + p->copy_halves / 2;
    args.out = p->out + index * p->out_halves;
    return stream_peer_attend(p->b->device.stream, &args, &p->done);
}

static int peer_enqueue(void *context) {
    struct peer *p = context;
    for (int i = 0; i < p->n_launches; i++)
        TRY(peer_launch(p, i));
    return STATUS_OK;
}

static int peer_fill(struct peer *p) {
    const struct bench *b = p->b;
    const struct peer_attention *a = &p->args;
    int64_t plane = a->n * a->head_dim, base = (int64_t)ATTENTION_TOKENS * a->head_dim, first = min_i64(plane, base);
    int64_t n_q = (int64_t)a->batch * a->n_heads * a->head_dim;
    TRY(backend_alloc(b->device.backend, MEMORY_CACHE, (size_t)(p->copy_halves * p->n_copies) * 2, &p->kv));
    TRY(backend_alloc(b->device.backend, MEMORY_CACHE, (size_t)n_q * 2, &p->q));
    TRY(backend_alloc(b->device.backend, MEMORY_CACHE, (size_t)(p->out_halves * p->n_launches) * 2, &p->out));
    TRY(bench_upload(b, p->q, p->data->q, (size_t)n_q * 2));
    for (int part = 0; part < 2; part++)
        for (int64_t i = 0; i < (int64_t)a->batch * a->n_kv_heads; i++) {
            uint16_t *to = p->kv + part * p->copy_halves / 2 + i * plane;
            const uint16_t *from = (const uint16_t *)p->data->kv_device + (i % a->n_kv_heads * 2 + part) * base;
            TRY(stream_copy(b->device.stream, to, from, (size_t)first * 2));
            TRY(bench_replicate(b, to, (size_t)first * 2, (size_t)plane * 2));
        }
    return bench_replicate(b, p->kv, (size_t)p->copy_halves * 2, (size_t)(p->copy_halves * p->n_copies) * 2);
}

/* decoded: of a cache in 16 bit, which holds the contents as they are. */
static int peer_check(const struct peer *p, const float *decoded, struct attention_time *result) {
    const struct peer_attention *a = &p->args;
    struct attention_seen seen = {.window_begin = 0};
    struct attention_answer answer;
    float got[KV_MAX_HEAD_DIM];
    uint16_t *out;
    for (int64_t t = 0; t < ATTENTION_TOKENS; t++)
        seen.times[t] = (double)(a->n / ATTENTION_TOKENS + (a->n % ATTENTION_TOKENS > t));
    TRY(backend_alloc(p->b->device.backend, MEMORY_HOST, (size_t)p->out_halves * 2, &out));
    int status = stream_copy_out(p->b->device.stream, out, p->out + (p->n_launches - 1) * p->out_halves, (size_t)p->out_halves * 2);
    if (status == STATUS_OK)
        status = stream_sync(p->b->device.stream);
    for (int64_t row = 0; row < a->batch && status == STATUS_OK; row += max_i64(1, a->batch - 1))
        for (int head = 0; head < a->n_heads && status == STATUS_OK; head++) {
            attention_answer(p->data, decoded, &seen, row, head, &answer);
            dtype_widen(DTYPE_F16, out + (row * a->n_heads + head) * a->head_dim, got, a->head_dim);
            double error = attention_difference(got, answer.out, a->head_dim);
            result->error = fmax(result->error, error);
            status = attention_judge("the library", error, row, head);
        }
    backend_free(p->b->device.backend, out);
    return status;
}

static int peer_time(struct peer *p, const float *decoded, struct attention_time *result) {
    TRY(peer_fill(p));
    p->args.q = p->q;
    TRY(peer_launch(p, 0)); /* prepares the shape */
    TRY(stream_sync(p->b->device.stream));
    if (!p->done)
        return STATUS_OK;
    TRY(attention_time_graph(p->b, peer_enqueue, p, p->n_launches, p->b->options->steps, result));
    return peer_check(p, decoded, result);
}

static int measure_peer(struct run_state *st, const struct attention_cache *cache, int batch, int64_t tokens, bool grouped,
                        double *best16) {
    const struct attention_shape *s = &st->data.shape;
    struct peer p = {.b = st->b, .data = &st->data,
                     .args = {.batch = batch, .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim, .n = tokens,
                              .dtype = DTYPE_F16, .scale = s->scale, .grouped = grouped}};
    struct attention_time result = {0};
    p.copy_halves = 2 * tokens * s->head_dim * s->n_kv_heads * batch;
    p.out_halves = (int64_t)batch * s->n_heads * s->head_dim;
    p.n_copies = (int)min_i64(MOST_COPIES, ceil_div(COLD_BYTES, 2 * p.copy_halves));
    p.n_launches = (int)max_i64(LEAST_LAUNCHES, p.n_copies);
    if (!attention_fits(st->b, 2 * (p.copy_halves * p.n_copies + p.out_halves * p.n_launches), "the library", batch, tokens))
        return STATUS_OK;
    int status = peer_time(&p, cache->decoded, &result);
    void *all[] = {p.kv, p.q, p.out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(st->b->device.backend, all[i]);
    TRY(status);
    if (!p.done)
        return STATUS_OK;
    if (*best16 == 0 || result.seconds < *best16)
        *best16 = result.seconds;
    add_row(st, grouped ? "cuDNN, heads as rows" : "cuDNN", cache->name, batch, tokens, 2 * p.copy_halves, 0, &result);
    return STATUS_OK;
}

/* ---- the order ---------------------------------------------------------------------------------------------------------- */

static int run_one(struct run_state *st, const struct attention_cache *cache, int i, int j) {
    struct bench *b = st->b;
    int batch = (int)b->batches.value[i];
    int64_t tokens = b->contexts.value[j];
    double *best16 = &st->best16[i][j];
    if (is_16_bit(cache) && bench_on_gpu(b)) {
        TRY(measure_peer(st, cache, batch, tokens, false, best16));
        if (st->data.shape.n_heads > st->data.shape.n_kv_heads)
            TRY(measure_peer(st, cache, batch, tokens, true, best16));
    }
    TRY(measure(st, cache, batch, tokens, best16));
    if (signals_pending())
        FAIL(STATUS_INTERRUPTED, "stopped by signal %s", signals_name(signals_pending()));
    return STATUS_OK;
}

/* Prefill is measured on a GPU, or where prompts are asked for. */
static int run_prompts(struct run_state *st, const struct attention_cache *cache) {
    if (!bench_on_gpu(st->b) && !options_given(st->b->options, "prompts"))
        return STATUS_OK;
    if (strcmp(cache->name, ATTENTION_EXACT_CACHE) == 0)
        TRY(attention_prefill_exact(st->b, &st->data, cache, st->exact));
    return attention_prefill_cached(st->b, &st->data, cache, st->exact);
}

/* Collective. */
static int run_cache(struct run_state *st, const char *name) {
    struct bench *b = st->b;
    struct comm *world = b->run->world;
    struct attention_cache cache = {0};
    int status = comm_agree(world, "bench attention", attention_cache_parse(name, &st->data.shape, &cache));
    if (status == STATUS_OK)
        status = comm_agree(world, "bench attention", attention_cache_fill(b, &st->data, &cache));
    for (int i = 0; i < b->batches.n && status == STATUS_OK; i++)
        for (int j = 0; j < b->contexts.n && status == STATUS_OK; j++)
            status = comm_agree(world, "bench attention", run_one(st, &cache, i, j));
    if (status == STATUS_OK)
        status = comm_agree(world, "bench attention", run_prompts(st, &cache));
    attention_cache_free(b, &cache);
    return status;
}

static int check_options(const struct bench *b, struct attention_shape *shape) {
    const struct bench_heads *h = &b->heads;
    *shape = (struct attention_shape){h->n_heads, h->n_kv_heads, h->head_dim, 1.0f / sqrtf((float)h->head_dim)};
    if (shape->n_heads % shape->n_kv_heads)
        FAIL(STATUS_USAGE, "option --heads: %d is no multiple of --kv-heads, %d", shape->n_heads, shape->n_kv_heads);
    for (int i = 0; i < b->batches.n; i++)
        if (b->batches.value[i] > STEP_MAX_ROWS)
            FAIL(STATUS_USAGE, "option --batches: %lld, at most %d sequences are in a step", (long long)b->batches.value[i], STEP_MAX_ROWS);
    return STATUS_OK;
}

/* Collective. 16 bit comes first, asked for or not: the others are held against it. */
static int run_all(struct run_state *st) {
    struct bench *b = st->b;
    TRY(run_cache(st, ATTENTION_EXACT_CACHE));
    for (int i = 0; i < b->n_caches; i++)
        if (strcmp(b->caches[i], ATTENTION_EXACT_CACHE) != 0)
            TRY(run_cache(st, b->caches[i]));
    return STATUS_OK;
}

int bench_attention(struct bench *b) {
    struct comm *world = b->run->world;
    struct attention_shape shape;
    struct run_state st = {.b = b};
    TRY(comm_agree(world, "bench attention", check_options(b, &shape)));
    int status = comm_agree(world, "bench attention", attention_data_make(b, &shape, &st.data));
    if (status == STATUS_OK)
        status = run_all(&st);
    attention_data_free(b, &st.data);
    return status;
}
