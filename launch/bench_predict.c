/* Measuring the rates of struct cost_rates for one model, and asking engine/cost.h with them. Attention's time is taken as a straight line
 * between the shortest and the longest context, as a file of rates has it; prefill's attention at each prompt's length. */
#include "launch/bench_predict.h"

#include <math.h>
#include <string.h>

#include "engine/prefill.h"
#include "launch/bench_attention.h"
#include "launch/bench_step.h"

enum {
    LEAST_SPAN = 16,               /* of the longest context to the shortest that are measured: a line needs two points */
    LEAST_CONTEXT = 4096,          /* below, what a cache's bytes add is lost among the rest */
    MOST_PROMPT = 128 * 1024,      /* exact attention's rate hardly changes beyond; one call takes a quarter of a second on a GPU and, */
    MOST_PROMPT_CPU = 4096,        /* so long, a few seconds on a CPU */
};

struct prediction {
    struct bench *b;
    struct bench_prediction *out;
    struct step_shape shape;
    struct attention_data data;
    double read_rate; /* of one rank */
};

static void add_row(struct bench *b, const char *item, const char *cache, int64_t tokens, double seconds, double rate, const char *unit) {
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "rates", .item = item, .cache = cache, .tokens = tokens, .ms = seconds * 1e3,
                                        .best_ms = seconds * 1e3, .rate = rate, .unit = unit, .note = "of each rank, for predictions"});
}

/* ---- products ---------------------------------------------------------------------------------------------------------- */

/* Collective. */
static int measure_products(struct prediction *p, int n_rows, double *rate) {
    char item[64];
    TRY(bench_step_products(p->b, &p->shape, n_rows, p->out->rates.launch_s, rate));
    snprintf(item, sizeof item, "a layer's products, %d row%s", n_rows, n_rows == 1 ? "" : "s");
    add_row(p->b, item, NULL, 0, 0, *rate * 1e-9, "GB/s");
    return STATUS_OK;
}

/* Collective. */
static int measure_share(struct prediction *p, int n_rows) {
    struct bench_prediction *out = p->out;
    double rate;
    for (int i = 0; i < out->n_rows; i++)
        if (out->rows[i] == n_rows)
            return STATUS_OK;
    TRY(measure_products(p, n_rows, &rate));
    out->rows[out->n_rows] = n_rows;
    out->share[out->n_rows++] = rate / p->read_rate;
    return STATUS_OK;
}

/* Collective. With many rows the rate of weights is that of computing: two operations for two bytes and row. */
static int measure_dense(struct prediction *p) {
    const struct bench *b = p->b;
    double rate;
    TRY(measure_products(p, PREFILL_TILE, &rate));
    p->out->rates.gemm_rate = rate * PREFILL_TILE;
    for (int i = 0; i < b->batches.n && bench_wants(b, "decode"); i++)
        TRY(measure_share(p, plan_bucket((int)min_i64(b->batches.value[i], STEP_MAX_ROWS))));
    return bench_wants(b, "prefill") ? measure_share(p, KV_BLOCK) : STATUS_OK;
}

/* ---- attention --------------------------------------------------------------------------------------------------------- */

/* Collective. *fits on all ranks. */
static int time_cache(struct prediction *p, const struct attention_cache *cache, int rows, int64_t tokens, struct attention_times *t) {
    const struct attention_run run = {.n_seqs = 1, .rows = rows, .tokens = tokens, .repeats = p->b->options->repeats};
    struct comm *world = p->b->run->world;
    TRY(comm_agree(world, "bench", attention_cache_time(p->b, &p->data, cache, &run, t)));
    int64_t fits = t->fits;
    TRY(comm_reduce_host(world, "bench", &fits, 1, COMM_MIN));
    t->fits = fits;
    return STATUS_OK;
}

/* Collective. A rank's part of the longest context, or of it what fits, and of the shortest. */
static int measure_line(struct prediction *p, const struct attention_cache *cache, int index) {
    const struct bench_list *contexts = &p->b->contexts;
    struct attention_times few, many = {0};
    int64_t least = INT64_MAX, most = LEAST_CONTEXT;
    for (int i = 0; i < contexts->n; i++) {
        least = min_i64(least, contexts->value[i] / p->shape.grid.cp);
        most = max_i64(most, contexts->value[i] / p->shape.grid.cp);
    }
    for (; !many.fits && most >= LEAST_CONTEXT; most /= many.fits ? 1 : 2)
        TRY(time_cache(p, cache, 1, most, &many));
    TRY(time_cache(p, cache, 1, max_i64(min_i64(least, most / LEAST_SPAN), 1), &few));
    if (!many.fits || !few.fits)
        return STATUS_OK;
    double rate = (double)(many.bytes - few.bytes) / (many.records.seconds - few.records.seconds);
    if (!(rate > 0))
        rate = (double)many.bytes / many.records.seconds;
    double adapters = cache->correction ? 4.0 * p->data.shape.n_kv_heads * p->data.shape.head_dim * ATTENTION_FEATURES : 0;
    double bytes = (double)few.bytes - adapters; /* which cost.h counts as weights */
    double fixed = few.records.seconds - bytes / rate - adapters / p->read_rate - (cache->correction ? 2 : 1) * p->out->rates.launch_s;
    p->out->cache[index].attention_share = rate / p->read_rate;
    p->out->cache[index].attention_s = fixed; /* negative where the first tokens cost less than later ones: it is a line */
    add_row(p->b, "attention, long contexts", cache->name, most, 0, rate * 1e-9, "GB/s");
    add_row(p->b, "attention, beside that", cache->name, 0, fmax(fixed, 0), 0, NULL);
    return STATUS_OK;
}

/* Collective. A block in the middle of the prompt sees what its blocks see on average. */
static int measure_cached(struct prediction *p, const struct attention_cache *cache, int index) {
    for (int i = 0; i < p->b->prompts.n; i++) {
        int64_t tokens = round_up(ceil_div(p->b->prompts.value[i], 2 * p->shape.grid.cp), KV_BLOCK);
        struct attention_times t;
        TRY(time_cache(p, cache, KV_BLOCK, tokens, &t));
        if (t.fits)
            p->out->cache[index].cached_rate[i] = attention_prefill_flop(&p->data.shape, tokens, KV_BLOCK) / t.records.seconds;
    }
    return STATUS_OK;
}

/* Collective. */
static int measure_exact(struct prediction *p, const struct attention_cache *cache) {
    const int64_t limit = bench_on_gpu(p->b) ? MOST_PROMPT : MOST_PROMPT_CPU;
    for (int i = 0; i < p->b->prompts.n; i++) {
        int64_t n = min_i64(p->b->prompts.value[i], limit);
        struct attention_time t = {0};
        bool fits;
        TRY(comm_agree(p->b->run->world, "bench", attention_exact_time(p->b, &p->data, cache->decoded, n, &fits, &t)));
        if (!fits)
            continue;
        p->out->prefill_rate[i] = attention_prefill_flop(&p->data.shape, n, n) / t.seconds;
        add_row(p->b, "attention, exact prefill", NULL, n, t.seconds, p->out->prefill_rate[i] * 1e-9, "GFLOP/s");
    }
    return STATUS_OK;
}

/* As the engine makes it; with a calibration a correction is taken for granted. */
static int cache_make(const struct prediction *p, const char *preset, struct attention_cache *out) {
    const struct options *o = p->b->options;
    const struct engine_options *e = &o->engine;
    struct cache_request request = {.preset = preset, .k_bits = e->k_bits, .v_bits = e->v_bits, .correction = e->correction,
                                    .window = e->window, .sink = e->sink, .has_adapters = o->random_weights || e->calibration};
    struct cache_spec spec;
    TRY(cache_spec_make(&request, p->shape.config.n_layers, &spec));
    attention_cache_of(spec.name, &spec, &p->data.shape, out);
    return attention_cache_fill(p->b, &p->data, out);
}

/* Collective. */
static int measure_cache(struct prediction *p, int index) {
    const struct bench *b = p->b;
    struct attention_cache cache = {0};
    int status = comm_agree(b->run->world, "bench", cache_make(p, b->caches[index], &cache));
    if (status == STATUS_OK && bench_wants(b, "decode") && b->contexts.n > 0)
        status = measure_line(p, &cache, index);
    if (status == STATUS_OK && bench_wants(b, "prefill"))
        status = measure_cached(p, &cache, index);
    attention_cache_free(b, &cache);
    return status;
}

/* Collective. */
static int measure_prompts(struct prediction *p) {
    struct attention_cache cache = {0};
    int status = attention_cache_parse(ATTENTION_EXACT_CACHE, &p->data.shape, &cache);
    if (status == STATUS_OK)
        status = attention_cache_fill(p->b, &p->data, &cache);
    status = comm_agree(p->b->run->world, "bench", status);
    if (status == STATUS_OK)
        status = measure_exact(p, &cache);
    attention_cache_free(p->b, &cache);
    return status;
}

/* Collective. */
static int measure_attention(struct prediction *p) {
    const struct weights_slices *s = &p->shape.slices;
    const int d = p->shape.config.head_dim;
    const struct attention_shape shape = {(int)range_size(s->heads), (int)range_size(s->kv_heads), d, 1.0f / sqrtf((float)d)};
    int status = comm_agree(p->b->run->world, "bench", attention_data_make(p->b, &shape, &p->data));
    for (int i = 0; i < p->b->n_caches && status == STATUS_OK; i++)
        status = measure_cache(p, i);
    if (status == STATUS_OK && bench_wants(p->b, "prefill"))
        status = measure_prompts(p);
    attention_data_free(p->b, &p->data);
    return status;
}

/* ---- the rates, and what they say -------------------------------------------------------------------------------------- */

int bench_predict_measure(struct bench *b) {
    struct prediction p = {.b = b, .out = b->prediction};
    struct cost_rates *rates = &b->prediction->rates;
    const int ranks = comm_size(b->run->world);
    if (strcmp(b->options->engine.weights, "auto") != 0)
        return STATUS_OK;
    TRY(comm_agree(b->run->world, "reading the model", bench_step_shape(b, &p.shape)));
    p.read_rate = b->read_rate / ranks;
    *rates = (struct cost_rates){.gpus = ranks, .gpus_per_node = ranks};
    TRY(bench_step_launch(b, &p.shape, &rates->launch_s));
    add_row(b, "a small operation", NULL, 0, rates->launch_s, 0, NULL);
    TRY(measure_dense(&p));
    TRY(bench_step_collectives(b, &p.shape, rates));
    TRY(measure_attention(&p));
    rates->read_rate = p.read_rate;
    return STATUS_OK;
}

static double share_of(const struct bench_prediction *p, int n_rows) {
    for (int i = 0; i < p->n_rows; i++)
        if (p->rows[i] == n_rows)
            return p->share[i];
    return 0;
}

double bench_predict_decode(const struct bench *b, int batch, int64_t n_tokens) {
    const struct bench_prediction *p = b->prediction;
    struct cost_rates rates = p->rates;
    struct cost_job job;
    struct cost_step step;
    rates.weights_share = share_of(p, plan_bucket(batch));
    rates.attention_share = p->cache[b->cache].attention_share;
    rates.attention_s = p->cache[b->cache].attention_s;
    if (rates.read_rate <= 0 || rates.weights_share <= 0 || rates.attention_share <= 0)
        return 0;
    engine_cost_job(b->run->engine, batch, &job);
    cost_decode(&job, &rates, n_tokens, &step);
    return 1e3 * step.total;
}

double bench_predict_prefill(const struct bench *b, int prompt, enum engine_prefill kind) {
    const struct bench_prediction *p = b->prediction;
    struct cost_rates rates = p->rates;
    struct cost_job job;
    struct cost_prefill prefill;
    rates.weights_share = share_of(p, KV_BLOCK);
    rates.prefill_rate = p->prefill_rate[prompt];
    rates.cached_rate = p->cache[b->cache].cached_rate[prompt];
    rates.attention_share = 1; /* attention goes by cached_rate */
    if (rates.read_rate <= 0 || rates.weights_share <= 0 || rates.prefill_rate <= 0 || rates.cached_rate <= 0)
        return 0;
    engine_cost_job(b->run->engine, 1, &job);
    if (kind == ENGINE_PREFILL_EXACT)
        cost_prefill(&job, &rates, b->prompts.value[prompt], &prefill);
    else
        cost_prefill_cached(&job, &rates, b->prompts.value[prompt], &prefill);
    return 1e3 * prefill.total;
}
