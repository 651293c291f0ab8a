/* One layer at a time on n ranks against one rank (the second of DESIGN's grades of equality): both get the one-rank residual rows as the
 * input of every layer of every step, and each keeps its own cache. Every (tp, cp) split, by hand-made plans.
 *
 * Bounds, relative to the root mean square r of what the layer adds to x. u = 2^-24 is a rounding of float, w one of the window's type.
 * The keys, values and queries that enter the cache differ by one unit in the last place at most, where a value lies at a tie. If
 * all of them did, a score of a few units (SCORE) would move by 2 w SCORE, a value by w, and the MLP behind carries that on by
 * a factor of about 3 (its inputs are normalized): STAGES = 3 (2 SCORE + 1) roundings in all, times SAFE deviations: the bound of one element, for
 * elements up to PEAK r. Rounding to w moves a value by w with a probability that makes the mean error that of u, so the mean difference is
 * bounded by u in place of w. A flipped code moves one value of one of at least KV_BLOCK tokens by a step, which is below 2 r: 2 / 64 r in
 * what is seen, for every flip. A GPU against a CPU also differs in how softmax weights are rounded: then the mean's unit is that of fp16. */
#include "engine/engine_impl.h"
#include "device.h"
#include "tiny_model.h"

enum { DEADLINE = 300, N_SEQS = 2, N_STEPS = 9, MOST_ROWS = 128, SCORE = 3, STAGES = 3 * (2 * SCORE + 1), SAFE = 4, PEAK = 4, BLOCKS = 4 };
static const double U = 5.9604644775390625e-8;
static const double codes_share = 2e-6; /* DESIGN, 3: codes that may differ */

struct world {
    const char *device, *reference; /* of the ranks, and of the one rank that they are held against */
    struct comm *all, *alone;
    char model[256], calibration[256];
};

struct side { /* one engine and what its cache was fed with */
    struct engine *e;
    struct worker *worker;
    float *k[TINY_LAYERS][N_SEQS], *v[TINY_LAYERS][N_SEQS]; /* [position][kv heads of this rank][d], after rounding */
    float *x; /* [rows][hidden] */
    int offset[N_SEQS];
};
enum { MOST_TOKENS = 520 };

struct config {
    const char *name, *cache, *k_bits, *v_bits;
    int window, sink;
    bool correction;
    double w;
};
static const struct config configs[] = {
    {"f32", "f32", NULL, NULL, -1, -1, false, 5.9604644775390625e-8},
    {"fp16", "fp16", NULL, NULL, 0, 16, false, 1.0 / 2048},
    {"kivi", "kivi", NULL, NULL, -1, -1, false, 1.0 / 2048},
    {"kvlinc, sink", "kvlinc", NULL, NULL, 0, 16, true, 1.0 / 2048},
    {"bf16, k4v2", "bf16", "4", "2", -1, -1, false, 1.0 / 256},
    {"f32, k2v2", "f32", "2", "2", -1, -1, false, 5.9604644775390625e-8},
};
enum { N_CONFIGS = sizeof configs / sizeof *configs };

/* Rows of each sequence in each step: blocks, single tokens around the borders, one that joins late. */
static const int rows_of_step[N_STEPS][N_SEQS] = {{128, 0}, {108, 20}, {20, 107}, {127, 1}, {1, 127}, {1, 1}, {1, 1}, {126, 1}, {1, 1}};

static void side_open(struct side *s, const struct world *w, struct comm *comm, const char *device, const struct config *c, int tp,
                      const char *merge) {
    struct place place = {.n_cores = 1, .memory_bytes = (int64_t)1 << 30};
    struct engine_options o = {.model = w->model, .device = device, .dp = 1, .tp = tp, .cp = comm_size(comm) / tp, .merge = merge,
                               .cache = c->cache, .k_bits = c->k_bits, .v_bits = c->v_bits, .window = c->window, .sink = c->sink,
                               .calibration = c->correction ? w->calibration : NULL, .context = 1024, .max_batch = N_SEQS,
                               .cache_memory = 64 << 20, .threads = 1, .weights = "f32"};
    *s = (struct side){0};
    REQUIRE(engine_open(comm, &o, &place, &s->e));
    s->worker = &s->e->worker;
    struct rank *r = &s->worker->rank;
    struct seq_params params[N_SEQS];
    memset(params, 0, sizeof params);
    for (int q = 0; q < N_SEQS; q++)
        params[q].owner_offset = s->offset[q] = (q + tp) % r->grid.cp;
    REQUIRE(stream_copy_in(r->stream, r->cache.params, params, sizeof params));
    REQUIRE(stream_sync(r->stream));
    size_t bytes = MOST_TOKENS * (size_t)rank_n_kv_heads(r) * TINY_D * sizeof(float);
    for (int i = 0; i < TINY_LAYERS; i++)
        for (int q = 0; q < N_SEQS; q++) {
            s->k[i][q] = calloc(1, bytes);
            s->v[i][q] = calloc(1, bytes);
        }
    s->x = calloc(MOST_ROWS * TINY_HIDDEN, sizeof(float));
}

static void side_close(struct side *s) {
    for (int i = 0; i < TINY_LAYERS; i++)
        for (int q = 0; q < N_SEQS; q++) {
            free(s->k[i][q]);
            free(s->v[i][q]);
        }
    free(s->x);
    engine_close(s->e);
}

static void make_step(int step, int *done, const struct cache_layout *layout, struct step_input *in) {
    *in = (struct step_input){.step = step};
    for (int q = 0; q < N_SEQS; q++) {
        int first = in->n_rows, n = rows_of_step[step][q];
        int block = done[q] / KV_BLOCK - 1 - layout->window_blocks;
        if (n > 0 && done[q] % KV_BLOCK == 0 && block >= 0)
            in->flush[in->n_flush++] = (struct step_flush){q, block, -1, -1};
        for (int i = 0; i < n; i++, done[q]++) {
            int32_t token = (int32_t)(test_hash(90 + (uint64_t)q, (uint64_t)done[q]) % TINY_WORDS);
            in->row[in->n_rows++] = (struct step_row){q, token, done[q], first};
        }
    }
    for (int i = in->n_rows; i < STEP_MAX_ROWS; i++)
        in->row[i] = (struct step_row){-1, -1, 0, i};
}

static void begin(struct side *s, const struct step_input *plan, struct step_input *host, int bucket) {
    struct rank *r = &s->worker->rank;
    *host = *plan;
    for (int i = 0; i < host->n_flush; i++) {
        struct step_flush *f = &host->flush[i];
        if (cache_owns(&r->cache.layout, f->block, s->offset[f->seq]))
            REQUIRE(cache_take_page(&r->cache, f->seq, f->block, &f->page, &f->local));
    }
    REQUIRE(forward_begin(&s->worker->forward, host, bucket));
    REQUIRE(stream_copy_out(r->stream, s->x, s->worker->forward.x, (size_t)plan->n_rows * TINY_HIDDEN * sizeof(float)));
    REQUIRE(stream_sync(r->stream));
}

/* Keeps the rows' rounded keys or values. */
static void keep_rows(struct side *s, const struct step_input *in, const void *device, float *const *to) {
    struct rank *r = &s->worker->rank;
    int64_t width = (int64_t)rank_n_kv_heads(r) * TINY_D;
    enum dtype dtype = r->spec->window_type;
    uint8_t *raw = malloc(dtype_bytes(dtype, in->n_rows * width));
    REQUIRE(stream_copy_out(r->stream, raw, device, dtype_bytes(dtype, in->n_rows * width)));
    REQUIRE(stream_sync(r->stream));
    for (int i = 0; i < in->n_rows; i++)
        dtype_widen(dtype, raw + dtype_bytes(dtype, i * width), to[in->row[i].seq] + in->row[i].position * width, width);
    free(raw);
}

/* One layer from the rows in x_in; leaves its output in s->x. */
static void run_layer(struct side *s, const struct step_input *in, int layer, int bucket, const float *x_in) {
    struct rank *r = &s->worker->rank;
    struct forward *f = &s->worker->forward;
    size_t bytes = (size_t)in->n_rows * TINY_HIDDEN * sizeof(float);
    REQUIRE(stream_copy_in(r->stream, f->x, x_in, bytes));
    REQUIRE(forward_layer(f, layer, bucket));
    REQUIRE(stream_copy_out(r->stream, s->x, f->x, bytes));
    REQUIRE(stream_sync(r->stream));
    keep_rows(s, in, f->k, s->k[layer]);
    keep_rows(s, in, f->v, s->v[layer]);
}

/* ---- comparing ----------------------------------------------------------------------------------------------------------- */

struct counts {
    int64_t codes, flips, values, moved; /* moved: window values one unit apart */
    double most, mean;                   /* largest shares of their bounds */
};

/* Rows' keys and values as they enter the cache: one unit in the last place apart at most. */
static void compare_rows(const struct side *cut, const struct side *one, const struct config *c, struct counts *n) {
    const struct rank *r = &cut->worker->rank;
    int heads = rank_n_kv_heads(r), first = (int)r->weights.slices.kv_heads.begin;
    for (int layer = 0; layer < TINY_LAYERS; layer++)
        for (int q = 0; q < N_SEQS; q++)
            for (int64_t i = 0; i < (int64_t)MOST_TOKENS * heads * TINY_D; i++) {
                int64_t token = i / (heads * TINY_D), in_token = i % (heads * TINY_D);
                int64_t at = (token * TINY_KV_HEADS + first) * TINY_D + in_token;
                for (int part = 0; part < 2; part++) {
                    double a = (double)(part ? cut->v : cut->k)[layer][q][i], b = (double)(part ? one->v : one->k)[layer][q][at];
                    /* near 0 float sums of terms of about 1 are what differs, not units of the value */
                    double unit = c->w > 1e-6 ? fmax(2 * c->w * fmax(fabs(a), fabs(b)), 64 * U) : SAFE * 64 * U * fmax(1, fabs(b));
                    n->values++;
                    n->moved += a != b;
                    CHECK(fabs(a - b) <= unit, "%s: layer %d, sequence %d, token %lld: %g and %g", c->name, layer, q, (long long)token, a, b);
                }
            }
}

static void unpack(const struct side *s, int layer, int seq, int64_t local, int head, float *kv) {
    const struct rank *r = &s->worker->rank;
    const struct cache *cache = &r->cache;
    const struct cache_layer *l = &cache->layers[layer];
    size_t part = KV_BLOCK * TINY_D * sizeof(float);
    float *device;
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, 2 * part, &device));
    const uint8_t *record = l->pages + cache->slot_pages[seq * cache->table_stride + local] * l->page_stride +
                            head * (int64_t)page_record_bytes(&l->format);
    REQUIRE(op_unpack(r->stream, &(struct unpack_args){l->format, record, device, device + KV_BLOCK * TINY_D}));
    REQUIRE(stream_copy_out(r->stream, kv, device, 2 * part));
    REQUIRE(stream_sync(r->stream));
    backend_free(r->backend, device);
}

/* Range of every group of one matrix of a page: channels of K (tokens from `sink` on), tokens of V. */
static void group_ranges(const float *x, bool keys, int sink, double *range) {
    double low[KV_BLOCK], high[KV_BLOCK];
    for (int g = 0; g < KV_BLOCK; g++) {
        low[g] = INFINITY;
        high[g] = -INFINITY;
    }
    for (int i = sink * TINY_D; i < KV_BLOCK * TINY_D; i++) {
        int g = keys ? i % TINY_D : i / TINY_D;
        low[g] = fmin(low[g], (double)x[i]);
        high[g] = fmax(high[g], (double)x[i]);
    }
    for (int g = 0; g < KV_BLOCK; g++)
        range[g] = high[g] - low[g];
}

/* One matrix of one page on both sides. A code differs where the decoded values are half a step apart or more; then the value that
 * was encoded lies between the two codes, a few roundings from the middle. */
static void compare_matrix(const struct config *c, const float *a, const float *b, const float *original, int64_t stride, int bits, bool keys,
                           int sink, struct counts *n) {
    double range[KV_BLOCK];
    group_ranges(b, keys, sink, range);
    for (int64_t i = sink * TINY_D; i < KV_BLOCK * TINY_D; i++) {
        double step = range[keys ? i % TINY_D : i / TINY_D] / ((1 << bits) - 1), apart = fabs((double)a[i] - (double)b[i]);
        double x = (double)original[i / TINY_D * stride + i % TINY_D];
        double units = 4 * fmax(c->w, 1.0 / 2048) * (fabs(x) + step * (1 << bits)); /* of the value, and of the group's fp16 scale and zero */
        n->codes++;
        if (apart > step / 2) {
            n->flips++;
            CHECK(fabs(x - ((double)a[i] + (double)b[i]) / 2) <= units, "%s: %g became %g and %g, a step is %g: no tie", c->name, x,
                  (double)a[i], (double)b[i], step);
        } else {
            CHECK(apart <= units, "%s: %g became %g and %g", c->name, x, (double)a[i], (double)b[i]);
        }
    }
}

static void compare_pages(const struct side *cut, const struct side *one, const struct config *c, const int *done, struct counts *n) {
    static float a[2 * KV_BLOCK * TINY_D], b[2 * KV_BLOCK * TINY_D];
    const struct rank *r = &cut->worker->rank;
    int first = (int)r->weights.slices.kv_heads.begin;
    for (int layer = 0; layer < TINY_LAYERS; layer++)
        for (int q = 0; q < N_SEQS; q++) {
            int64_t local = 0, n_flushed = cache_n_flushed(&r->cache.layout, done[q] - 1);
            for (int64_t block = 0; block < n_flushed; block++) {
                if (!cache_owns(&r->cache.layout, block, cut->offset[q]))
                    continue;
                for (int head = 0; head < rank_n_kv_heads(r); head++) {
                    const struct page_format *format = &r->cache.layers[layer].format;
                    int64_t stride = TINY_KV_HEADS * TINY_D, at = block * KV_BLOCK * stride + (first + head) * TINY_D;
                    int sink = block == 0 ? r->cache.layout.sink : 0;
                    unpack(cut, layer, q, local, head, a);
                    unpack(one, layer, q, block, first + head, b);
                    if (format->k_bits < 16)
                        compare_matrix(c, a, b, one->k[layer][q] + at, stride, format->k_bits, true, sink, n);
                    if (format->v_bits < 16)
                        compare_matrix(c, a + KV_BLOCK * TINY_D, b + KV_BLOCK * TINY_D, one->v[layer][q] + at, stride, format->v_bits, false,
                                       sink, n);
                }
                local++;
            }
            CHECK(local == r->cache.slot_n_pages[q], "%lld pages, expected %lld", (long long)r->cache.slot_n_pages[q], (long long)local);
        }
}

static void compare_outputs(const struct config *c, const float *x_in, const struct side *cut, const struct side *one, int n_rows, double unit,
                            const struct counts *n, const char *what, double *most, double *mean) {
    double squares = 0, sum = 0, worst = 0;
    int64_t count = (int64_t)n_rows * TINY_HIDDEN;
    for (int64_t i = 0; i < count; i++) {
        double added = (double)one->x[i] - (double)x_in[i], apart = fabs((double)cut->x[i] - (double)one->x[i]);
        squares += added * added;
        sum += apart;
        worst = apart <= worst ? worst : apart; /* a NaN stays */
    }
    double r = sqrt(squares / (double)count), flips = (double)n->flips * 2 / 64;
    double limit = r * (SAFE * STAGES * PEAK * c->w + flips), mean_limit = r * (SAFE * STAGES * unit + flips);
    CHECK(worst <= limit && sum / (double)count <= mean_limit, "%s: most %g of %g, mean %g of %g", what, worst, limit, sum / (double)count,
          mean_limit);
    *most = fmax(*most, worst / limit);
    *mean = fmax(*mean, sum / (double)count / mean_limit);
}

/* ---- the run ---------------------------------------------------------------------------------------------------------------- */

/* Flips on any rank are seen on all. Collective. */
static void share_counts(const struct world *w, struct counts *n) {
    int64_t sums[2] = {n->codes, n->flips};
    REQUIRE(comm_reduce_host(w->all, "codes", sums, 2, COMM_SUM));
    n->codes = sums[0];
    n->flips = sums[1];
}

static void check_split(const struct world *w, const struct config *c, int tp, const char *merge) {
    struct side cut, one;
    struct counts n = {0};
    int done[N_SEQS] = {0};
    struct step_input plan, in_cut, in_one;
    static float x_in[MOST_ROWS * TINY_HIDDEN];
    char what[128];
    /* A GPU rounds the weights of V's products to 11 bits, a CPU does not. */
    double unit = strcmp(w->device, w->reference) == 0 ? U : 1.0 / 2048;
    side_open(&one, w, w->alone, w->reference, c, 1, merge);
    side_open(&cut, w, w->all, w->device, c, tp, merge);
    for (int step = 0; step < N_STEPS; step++) {
        make_step(step, done, &one.worker->rank.cache.layout, &plan);
        int bucket = plan_bucket(plan.n_rows);
        begin(&one, &plan, &in_one, bucket);
        begin(&cut, &plan, &in_cut, bucket);
        for (int i = 0; i < plan.n_rows * TINY_HIDDEN; i++)
            CHECK(one.x[i] == cut.x[i], "embedding %d: %g, %g", i, (double)one.x[i], (double)cut.x[i]); /* one rank has the row, the others add 0 */
        for (int layer = 0; layer < TINY_LAYERS; layer++) {
            memcpy(x_in, one.x, (size_t)plan.n_rows * TINY_HIDDEN * sizeof *x_in);
            run_layer(&one, &plan, layer, bucket, x_in);
            run_layer(&cut, &plan, layer, bucket, x_in);
            struct counts now = {0};
            compare_pages(&cut, &one, c, done, &now);
            share_counts(w, &now);
            snprintf(what, sizeof what, "%s, tp %d, %s, step %d, layer %d", c->name, tp, merge, step, layer);
            compare_outputs(c, x_in, &cut, &one, plan.n_rows, unit, &now, what, &n.most, &n.mean);
            n.codes = now.codes;
            n.flips = now.flips;
        }
    }
    compare_rows(&cut, &one, c, &n);
    double allowed = ceil(codes_share * (double)n.codes) + 1;
    CHECK((double)n.flips <= allowed, "%s, tp %d: %lld of %lld codes differ", c->name, tp, (long long)n.flips, (long long)n.codes);
    if (comm_rank(w->all) == 0)
        printf("%-14s tp %d, cp %d, %-9s: %lld of %lld codes, %lld of %lld values differ; %.3f, mean %.3f of the bounds\n", c->name, tp,
               comm_size(w->all) / tp, merge, (long long)n.flips, (long long)n.codes, (long long)n.moved, (long long)n.values, n.most, n.mean);
    side_close(&cut);
    side_close(&one);
}

static void make_files(struct world *w) {
    struct model_file *file;
    char *model = tiny_model("model", 0);
    snprintf(w->model, sizeof w->model, "%s", model);
    REQUIRE(model_file_open(model, &file));
    struct tiny_calibration c = {.only_layer = -1, .gate = true};
    snprintf(w->calibration, sizeof w->calibration, "%s", tiny_save_calibration("a.safetensors", file, &c));
    model_file_close(file);
    free(model);
}

int main(int argc, char **argv) { /* DEVICE, REFERENCE */
    static const char *const merges[] = {"allreduce", "fused", "gather"};
    struct world w = {.device = argc > 1 ? argv[1] : "cpu"};
    w.reference = argc > 2 ? argv[2] : w.device;
    REQUIRE(comm_start("auto", DEADLINE, &argc, &argv, &w.all));
    device_require(w.all, w.device);
    REQUIRE(comm_split(w.all, comm_rank(w.all), 0, "alone", &w.alone));
    base_set_log(LOG_ERROR, "");
    if (comm_rank(w.all) == 0)
        make_files(&w);
    REQUIRE(comm_broadcast(w.all, "paths", w.model, (int64_t)(sizeof w - offsetof(struct world, model)), 0));
    int n = comm_size(w.all), turn = 0;
    for (int i = 0; i < N_CONFIGS; i++)
        for (int tp = 1; tp <= n; tp++)
            if (n % tp == 0 && TINY_KV_HEADS % tp == 0 && !(device_is_gpu(w.device) && strcmp(configs[i].cache, "f32") == 0))
                check_split(&w, &configs[i], tp, merges[turn++ % 3]);
    int64_t failed = test_n_failed;
    REQUIRE(comm_reduce_host(w.all, "result", &failed, 1, COMM_SUM));
    comm_free(w.alone);
    comm_finish(w.all);
    return failed ? 1 : test_report();
}
