/* Attention of a prompt, one layer of it: exact, all rows of the prompt over its own 16-bit K and V, beside the GPU's own library on the
 * same arrays; and cached, the last block of its rows over a cache. Rates count the two products of the scores that a causal prompt needs,
 * whatever is computed more. */
#include <math.h>

#include "kernels/rates.h"
#include "launch/bench_attention.h"
#include "launch/signals.h"

enum { CHECKED_ROWS = 3 }; /* the first, one in the middle, the last: all their heads */

struct prompt { /* everything is device memory */
    struct bench *b;
    const struct attention_data *data;
    int64_t n;
    uint16_t *kv, *q; /* [kv_head][K, V][n][d], [n][n_heads][d]: the contents again and again */
    void *out;        /* [n][n_heads * d]: float, or the library's 16 bit */
    bool done;        /* by the library */
};

double attention_prefill_flop(const struct attention_shape *s, int64_t tokens, int64_t rows) {
    double seen = (double)rows * ((double)(tokens - rows) + (double)(rows + 1) / 2);
    return 4.0 * seen * s->head_dim * s->n_heads;
}

/* ---- exact -------------------------------------------------------------------------------------------------------------- */

static int64_t row_values(const struct prompt *p) { return (int64_t)p->data->shape.n_heads * p->data->shape.head_dim; }

static int prompt_open(struct prompt *p) {
    const struct bench *b = p->b;
    const struct attention_shape *s = &p->data->shape;
    int64_t plane = p->n * s->head_dim, base = (int64_t)ATTENTION_TOKENS * s->head_dim, first = min_i64(plane, base);
    int64_t rows = min_i64(p->n, STEP_MAX_ROWS);
    TRY(backend_alloc(b->device.backend, MEMORY_CACHE, (size_t)(2 * plane * s->n_kv_heads) * 2, &p->kv));
    TRY(backend_alloc(b->device.backend, MEMORY_CACHE, (size_t)(p->n * row_values(p)) * 2, &p->q));
    TRY(backend_alloc(b->device.backend, MEMORY_CACHE, (size_t)(p->n * row_values(p)) * sizeof(float), &p->out));
    TRY(bench_upload(b, p->q, p->data->q, (size_t)(rows * row_values(p)) * 2));
    TRY(bench_replicate(b, p->q, (size_t)(rows * row_values(p)) * 2, (size_t)(p->n * row_values(p)) * 2));
    for (int64_t i = 0; i < 2 * (int64_t)s->n_kv_heads; i++) {
        TRY(stream_copy(b->device.stream, p->kv + i * plane, (const uint16_t *)p->data->kv_device + i * base, (size_t)first * 2));
        TRY(bench_replicate(b, p->kv + i * plane, (size_t)first * 2, (size_t)plane * 2));
    }
    return stream_sync(b->device.stream);
}

static void prompt_close(struct prompt *p) {
    void *all[] = {p->kv, p->q, p->out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(p->b->device.backend, all[i]);
}

static int enqueue_exact(void *context) {
    const struct prompt *p = context;
    const struct attention_shape *s = &p->data->shape;
    return op_attend_exact(p->b->device.stream, &(struct attend_exact_args){
        .n_rows = p->n, .first = 0, .n = p->n, .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim,
        .scale = s->scale, .dtype = DTYPE_F16, .q = p->q, .kv = p->kv, .out = p->out});
}

static int enqueue_peer(void *context) {
    struct prompt *p = context;
    const struct attention_shape *s = &p->data->shape;
    struct peer_attention args = {.batch = 1, .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim, .n = p->n,
                                  .n_rows = p->n, .dtype = DTYPE_F16, .scale = s->scale, .q = p->q, .k = p->kv,
                                  .v = p->kv + p->n * s->head_dim, .out = p->out};
    return stream_peer_attend(p->b->device.stream, &args, &p->done);
}

/* decoded: of a cache in 16 bit. `out`: host, one row, float or (halves) 16 bit. */
static int check_row(const struct prompt *p, const float *decoded, int64_t row, const void *out, bool halves, double *error) {
    const struct attention_shape *s = &p->data->shape;
    struct attention_seen seen = {.window_begin = 0};
    struct attention_answer answer;
    float got[KV_MAX_HEAD_DIM];
    for (int64_t t = 0; t < ATTENTION_TOKENS; t++)
        seen.times[t] = (double)((row + 1) / ATTENTION_TOKENS + ((row + 1) % ATTENTION_TOKENS > t));
    for (int head = 0; head < s->n_heads; head++) {
        const int64_t at = (int64_t)head * s->head_dim;
        dtype_widen(halves ? DTYPE_F16 : DTYPE_F32, (const uint8_t *)out + at * (halves ? 2 : 4), got, s->head_dim);
        attention_answer(p->data, decoded, &seen, row % STEP_MAX_ROWS, head, &answer);
        double e = attention_difference(got, answer.out, s->head_dim);
        *error = fmax(*error, e);
        TRY(attention_judge(halves ? "prefill by the library" : "exact prefill", e, row, head));
    }
    return STATUS_OK;
}

static int check(const struct prompt *p, const float *decoded, bool halves, double *error) {
    const int64_t rows[CHECKED_ROWS] = {0, p->n / 2, p->n - 1};
    size_t bytes = (size_t)row_values(p) * (halves ? 2 : 4);
    void *out;
    int status = STATUS_OK;
    TRY(backend_alloc(p->b->device.backend, MEMORY_HOST, bytes, &out));
    for (int i = 0; i < CHECKED_ROWS && status == STATUS_OK; i++) {
        status = stream_copy_out(p->b->device.stream, out, (const uint8_t *)p->out + (size_t)rows[i] * bytes, bytes);
        if (status == STATUS_OK)
            status = stream_sync(p->b->device.stream);
        if (status == STATUS_OK)
            status = check_row(p, decoded, rows[i], out, halves, error);
    }
    backend_free(p->b->device.backend, out);
    return status;
}

static int time_exact(struct prompt *p, const float *decoded, struct attention_time *out) {
    TRY(attention_time_graph(p->b, enqueue_exact, p, 1, p->b->options->repeats, out));
    return check(p, decoded, false, &out->error);
}

/* out->seconds stays 0 where there is no library, or it refuses. */
static int time_peer(struct prompt *p, const float *decoded, struct attention_time *out) {
    TRY(enqueue_peer(p)); /* prepares the shape */
    TRY(stream_sync(p->b->device.stream));
    if (!p->done)
        return STATUS_OK;
    TRY(attention_time_graph(p->b, enqueue_peer, p, 1, p->b->options->repeats, out));
    return check(p, decoded, true, &out->error);
}

static bool prompt_fits(const struct prompt *p) {
    const struct attention_shape *s = &p->data->shape;
    return attention_fits(p->b, p->n * (4 * (int64_t)s->n_kv_heads * s->head_dim + 6 * row_values(p)), "exact prefill", 1, p->n);
}

int attention_exact_time(struct bench *b, const struct attention_data *data, const float *decoded, int64_t tokens, bool *fits,
                         struct attention_time *out) {
    struct prompt p = {.b = b, .data = data, .n = tokens};
    *fits = prompt_fits(&p);
    if (!*fits)
        return STATUS_OK;
    int status = prompt_open(&p);
    if (status == STATUS_OK)
        status = time_exact(&p, decoded, out);
    prompt_close(&p);
    return status;
}

/* ---- rows --------------------------------------------------------------------------------------------------------------- */

/* `against`: FLOP/s of what the row is held against; 0: nothing. */
static void add_row(struct bench *b, const char *item, const char *cache, int64_t tokens, double flop, double against, const char *of,
                    const struct attention_time *t) {
    char note[64];
    if (!b->run->root)
        return;
    snprintf(note, sizeof note, "%.2f us, error %.1e", t->seconds * 1e6, t->error);
    bench_add(b, (struct bench_row){.section = "attention", .item = item, .cache = cache, .batch = 1, .tokens = tokens,
                                    .ms = t->seconds * 1e3, .best_ms = t->best * 1e3, .rate = flop / t->seconds * 1e-12, .unit = "TFLOP/s",
                                    .flop = flop, .share = against > 0 ? flop / t->seconds / against : 0, .of = against > 0 ? of : NULL,
                                    .note = note});
}

static int exact_rows(struct prompt *p, const struct attention_cache *cache, double *rate) {
    struct attention_time own = {0}, peer = {0};
    double flop = attention_prefill_flop(&p->data->shape, p->n, p->n);
    TRY(prompt_open(p));
    TRY(time_peer(p, cache->decoded, &peer));
    TRY(time_exact(p, cache->decoded, &own));
    *rate = flop / own.seconds;
    if (peer.seconds > 0)
        add_row(p->b, "prefill, cuDNN", cache->name, p->n, flop, 0, NULL, &peer);
    add_row(p->b, "prefill, exact", cache->name, p->n, flop, peer.seconds > 0 ? flop / peer.seconds : 0, "cuDNN", &own);
    return STATUS_OK;
}

int attention_prefill_exact(struct bench *b, const struct attention_data *data, const struct attention_cache *cache, double *rate) {
    for (int i = 0; i < b->prompts.n; i++) {
        struct prompt p = {.b = b, .data = data, .n = b->prompts.value[i]};
        rate[i] = 0;
        if (!prompt_fits(&p))
            continue;
        int status = exact_rows(&p, cache, &rate[i]);
        prompt_close(&p);
        TRY(status);
        if (signals_pending())
            FAIL(STATUS_INTERRUPTED, "stopped by signal %s", signals_name(signals_pending()));
    }
    return STATUS_OK;
}

int attention_prefill_cached(struct bench *b, const struct attention_data *data, const struct attention_cache *cache, const double *rate) {
    for (int i = 0; i < b->prompts.n; i++) {
        const struct attention_run run = {.n_seqs = 1, .rows = KV_BLOCK, .tokens = round_up(b->prompts.value[i], KV_BLOCK),
                                          .repeats = b->options->repeats};
        struct attention_times t;
        TRY(attention_cache_time(b, data, cache, &run, &t));
        if (t.fits)
            add_row(b, cache->correction ? "prefill, cached, correct" : "prefill, cached", cache->name, run.tokens,
                    attention_prefill_flop(&data->shape, run.tokens, run.rows), rate[i], "exact", &t.records);
        if (signals_pending())
            FAIL(STATUS_INTERRUPTED, "stopped by signal %s", signals_name(signals_pending()));
    }
    return STATUS_OK;
}
