/* The engine run freely on n ranks against one rank of the same run (the third of DESIGN's grades of equality): every (tp, cp) split,
 * every way of merging, every preset, both kinds of prefill, owners drawn at random.
 *
 * Compared are the log-probabilities of prompts and of new tokens, up to the first token that differs. With everything in float the mean
 * difference is at most 1e-5 and the tokens are equal, drawn ones too; in 16 bit it is at most 0.002; with quantized keys or values, where a
 * rounding flips a code, at most twice what an error of 1e-6 in the weights of K and V does to one rank, found in the same run. A GPU does not
 * only add in another order than a CPU: softmax weights, and what many rows bring to a matrix of 16 bit, are rounded to 11 bits before they
 * are multiplied. So a GPU is held against what an error of 2^-11 does to the CPU. */
#include "engine/engine_impl.h"
#include "device.h"
#include "tiny_model.h"

enum { N_REQUESTS = 4, MAX_PROMPT = 420, MAX_NEW = 6, DEADLINE = 300 };
static const int prompt_lengths[N_REQUESTS] = {5, 130, 300, 411};
static const double float_mean = 1e-5, float_most = 1e-4, half_mean = 0.002;

enum serving { TOGETHER, JOINING, ALONE };

struct outcome { /* of one request */
    int n_scores, n_tokens;
    float score[MAX_PROMPT], logprob[MAX_NEW];
    int32_t token[MAX_NEW];
};

struct world {
    const char *device, *reference; /* of the ranks, and of the one rank that they are held against */
    struct comm *all, *alone;
    char model[256], twin[256], calibration[256], per_head[256];
};

/* ---- serving ---------------------------------------------------------------------------------------------------------- */

struct requests {
    struct engine_request request[N_REQUESTS];
    int32_t prompt[N_REQUESTS][MAX_PROMPT];
};

static void requests_make(struct requests *r, enum engine_prefill prefill) {
    for (int i = 0; i < N_REQUESTS; i++) {
        struct engine_request *q = &r->request[i];
        engine_request_init(q);
        q->n_prompt = prompt_lengths[i];
        for (int k = 0; k < q->n_prompt; k++)
            r->prompt[i][k] = (int32_t)(test_hash(40 + (uint64_t)i, (uint64_t)k) % TINY_WORDS);
        q->prompt = r->prompt[i];
        q->max_tokens = MAX_NEW - i;
        q->ignore_eos = true;
        q->logprobs = q->prompt_logprobs = 0;
        q->prefill = prefill;
        q->temperature = i % 2 ? 0.9f : 0; /* greedy and drawn */
        q->top_p = i == 1 ? 0.95f : 1;
        q->top_k = i == 3 ? 50 : 0;
        q->repetition_penalty = i == 1 ? 1.1f : 1;
        q->seed = 7 + (uint64_t)i;
    }
}

static void take_events(struct engine *e, const int64_t *ids, struct outcome *out) {
    struct engine_event event;
    while (engine_next_event(e, &event)) {
        int i = 0;
        while (i < N_REQUESTS && ids[i] != event.id)
            i++;
        if (i == N_REQUESTS) {
            CHECK(false, "an event of nobody");
            continue;
        }
        struct outcome *o = &out[i];
        if (event.kind == ENGINE_PROMPT) {
            o->n_scores = event.n_scored;
            for (int k = 0; k < event.n_scored; k++)
                o->score[k] = event.scored[k].logprob;
        } else if (event.kind == ENGINE_TOKEN && o->n_tokens < MAX_NEW) {
            o->token[o->n_tokens] = event.token.id;
            o->logprob[o->n_tokens++] = event.token.logprob;
        } else {
            CHECK(event.kind == ENGINE_FINISHED && event.finish == ENGINE_LENGTH, "kind %d, finish %d", (int)event.kind, (int)event.finish);
        }
    }
}

static void lead(struct engine *e, const struct requests *r, enum serving how, struct outcome *out) {
    int64_t ids[N_REQUESTS] = {-1, -1, -1, -1};
    for (int i = 0; i < N_REQUESTS; i++) {
        REQUIRE(engine_submit(e, &r->request[i], &ids[i]));
        for (int k = 0; how == JOINING && k < 3; k++)
            REQUIRE(engine_step(e));
        int more = how == ALONE;
        while (more)
            REQUIRE(more = engine_step(e));
        take_events(e, ids, out);
    }
    for (int more = 1; more;) {
        REQUIRE(more = engine_step(e));
        take_events(e, ids, out);
    }
    REQUIRE(engine_stop(e));
}

static struct engine_options options_of(const struct world *w) {
    return (struct engine_options){.model = w->model, .device = w->device, .dp = 1, .window = -1, .sink = -1, .context = 512, .max_batch = 4,
                                   .cache_memory = 64 << 20, .threads = 1, .weights = "f32"};
}

/* Collective over `comm`: outcomes on its rank 0. chunk_rows 0: as the engine decides. */
static void serve(struct comm *comm, const struct engine_options *o, const struct requests *r, enum serving how, int chunk_rows,
                  struct outcome *out) {
    struct engine *e;
    struct place place = {.n_cores = 1, .memory_bytes = (int64_t)1 << 30};
    memset(out, 0, N_REQUESTS * sizeof *out);
    REQUIRE(engine_open(comm, o, &place, &e));
    if (comm_rank(comm) == 0) {
        if (chunk_rows)
            e->scheduler.limits.chunk_rows = chunk_rows;
        lead(e, r, how, out);
        for (int i = 0; i < N_REQUESTS; i++)
            CHECK(out[i].n_scores == prompt_lengths[i] && out[i].n_tokens == MAX_NEW - i, "request %d: %d scores, %d tokens", i,
                  out[i].n_scores, out[i].n_tokens);
    } else {
        REQUIRE(engine_follow(e));
    }
    engine_close(e);
}

/* ---- comparing ---------------------------------------------------------------------------------------------------------- */

struct difference {
    double mean, most;
    bool same_tokens, same_bits;
};

static struct difference compare(const struct outcome *a, const struct outcome *b) {
    struct difference d = {.same_tokens = true, .same_bits = true};
    long n = 0;
    for (int i = 0; i < N_REQUESTS; i++) {
        for (int k = 1; k < prompt_lengths[i]; k++, n++) {
            double x = fabs((double)a[i].score[k] - (double)b[i].score[k]);
            d.same_bits &= a[i].score[k] == b[i].score[k];
            d.mean += x;
            d.most = x <= d.most ? d.most : x; /* a NaN stays */
        }
        for (int k = 0; k < a[i].n_tokens; k++, n++) {
            if (a[i].token[k] != b[i].token[k]) {
                d.same_tokens = d.same_bits = false;
                break;
            }
            d.same_bits &= a[i].logprob[k] == b[i].logprob[k];
            d.mean += fabs((double)a[i].logprob[k] - (double)b[i].logprob[k]);
        }
    }
    d.mean /= (double)n;
    return d;
}

enum grade { FLOAT, HALF, CODES };

static void check_grade(enum grade grade, const struct outcome *got, const struct outcome *expected, double twin, const char *what) {
    struct difference d = compare(got, expected);
    double limit = grade == FLOAT ? float_mean : grade == HALF ? half_mean : fmax(2 * twin, float_mean);
    CHECK(d.mean <= limit, "%s: mean |dlogp| %g, allowed %g (most %g)", what, d.mean, limit, d.most);
    if (grade == FLOAT)
        CHECK(d.most <= float_most && d.same_tokens, "%s: most %g, same tokens %d", what, d.most, d.same_tokens);
    printf("%-64s mean |dlogp| %.2e of %.1e, most %.2e%s%s\n", what, d.mean, limit, d.most, d.same_tokens ? "" : ", tokens differ",
           d.same_bits ? ", same bits" : "");
}

/* ---- one rank against all splits ------------------------------------------------------------------------------------------ */

struct config {
    const char *name, *cache, *k_bits, *v_bits, *weights;
    int window, sink;
    enum engine_prefill prefill;
    int gather; /* exact prefill: 1 gathers weights, huge keeps them */
    int calibration; /* 1: one phi_q a KV head, 2: one a query head */
    bool all_merges;
    enum grade grade;
};

static const struct config configs[] = {
    {"f32, cached", "f32", NULL, NULL, "f32", -1, -1, ENGINE_PREFILL_CACHED, 0, 0, true, FLOAT},
    {"f32, exact, weights gathered", "f32", NULL, NULL, "f32", -1, -1, ENGINE_PREFILL_EXACT, 1, 0, false, FLOAT},
    {"f32, exact, rows replicated", "f32", NULL, NULL, "f32", 256, -1, ENGINE_PREFILL_EXACT, 1 << 20, 0, false, FLOAT},
    {"fp16, exact, weights gathered", "fp16", NULL, NULL, "auto", -1, -1, ENGINE_PREFILL_EXACT, 1, 0, false, HALF},
    {"bf16, cached, sink", "bf16", NULL, NULL, "auto", -1, 16, ENGINE_PREFILL_CACHED, 0, 0, false, CODES},
    {"kivi, cached", "kivi", NULL, NULL, "f32", -1, -1, ENGINE_PREFILL_CACHED, 0, 0, false, CODES},
    {"hadv, cached, sink, window 0", "hadv", NULL, NULL, "f32", 0, 16, ENGINE_PREFILL_CACHED, 0, 0, false, CODES},
    {"kvlinc, cached", "kvlinc", NULL, NULL, "f32", -1, -1, ENGINE_PREFILL_CACHED, 0, 1, true, CODES},
    {"kvlinc, exact, weights gathered, phi_q per head", "kvlinc", NULL, NULL, "f32", -1, 16, ENGINE_PREFILL_EXACT, 1, 2, false, CODES},
    {"kvlinc, exact, rows replicated", "kvlinc", NULL, NULL, "auto", 0, -1, ENGINE_PREFILL_EXACT, 1 << 20, 1, false, CODES},
    {"mixed bits, cached", "kivi", "0:2,1:16", "0:8,1:4", "f32", -1, -1, ENGINE_PREFILL_CACHED, 0, 0, false, CODES},
};
enum { N_CONFIGS = sizeof configs / sizeof *configs };
static const char *const merges[] = {"allreduce", "fused", "gather"};

static struct engine_options options_for(const struct world *w, const struct config *c) {
    struct engine_options o = options_of(w);
    o.cache = c->cache;
    o.k_bits = c->k_bits;
    o.v_bits = c->v_bits;
    o.weights = c->weights;
    o.window = c->window;
    o.sink = c->sink;
    o.prefill_gather = c->gather;
    o.calibration = c->calibration == 2 ? w->per_head : c->calibration ? w->calibration : NULL;
    return o;
}

/* Rank 0 only: one rank's answer, and what an error of 1e-6 does to it. */
static double one_rank(const struct world *w, const struct config *c, const struct requests *r, struct outcome *out) {
    struct engine_options o = options_for(w, c);
    struct outcome twin[N_REQUESTS];
    o.device = w->reference;
    serve(w->alone, &o, r, TOGETHER, 0, out);
    if (c->grade != CODES)
        return 0;
    o.model = w->twin;
    serve(w->alone, &o, r, TOGETHER, 0, twin);
    return compare(twin, out).mean;
}

static void check_config(const struct world *w, int index) {
    const struct config *c = &configs[index];
    struct outcome expected[N_REQUESTS], out[N_REQUESTS];
    struct requests r;
    double twin = 0;
    int n = comm_size(w->all), turn = index;
    requests_make(&r, c->prefill);
    if (comm_rank(w->all) == 0)
        twin = one_rank(w, c, &r, expected);
    REQUIRE(comm_barrier(w->all, "one rank's answer"));
    for (int tp = 1; tp <= n; tp++) {
        if (n % tp || TINY_KV_HEADS % tp)
            continue;
        for (int m = 0; m < (c->all_merges && n / tp > 1 ? 3 : 1); m++) {
            struct engine_options o = options_for(w, c);
            char what[128];
            o.tp = tp;
            o.cp = n / tp;
            o.merge = merges[turn++ % 3];
            o.test_offsets = true;
            o.test_seed = (uint64_t)turn;
            serve(w->all, &o, &r, TOGETHER, 0, out);
            snprintf(what, sizeof what, "%s, tp %d, cp %d, %s", c->name, tp, o.cp, o.merge);
            if (comm_rank(w->all) == 0)
                check_grade(c->grade, out, expected, twin, what);
        }
    }
}

/* ---- cached prefill is token-by-token decode; batches change nothing -------------------------------------------------------- */

static void check_chunks(const struct world *w, int index) {
    const struct config *c = &configs[index];
    struct outcome rows[N_REQUESTS], single[N_REQUESTS], unused[N_REQUESTS];
    struct engine_options o = options_for(w, c);
    struct requests r;
    double twin = 0;
    char what[128];
    requests_make(&r, c->prefill);
    if (comm_rank(w->all) == 0)
        twin = one_rank(w, c, &r, unused);
    REQUIRE(comm_barrier(w->all, "one rank's answer"));
    serve(w->all, &o, &r, TOGETHER, 0, rows);
    serve(w->all, &o, &r, TOGETHER, 1, single);
    snprintf(what, sizeof what, "%s: blocks against single tokens", c->name);
    if (comm_rank(w->all) == 0)
        check_grade(c->grade, rows, single, twin, what);
}

static void check_batches(const struct world *w) {
    struct outcome together[N_REQUESTS], other[N_REQUESTS];
    for (int i = 0; i < N_CONFIGS; i++) {
        const struct config *c = &configs[i];
        if (c->grade != (device_is_gpu(w->device) ? HALF : FLOAT) || c->window > 0)
            continue;
        struct engine_options o = options_for(w, c);
        struct requests r;
        requests_make(&r, c->prefill);
        serve(w->all, &o, &r, TOGETHER, 0, together);
        for (int how = JOINING; how <= ALONE; how++) {
            char what[128];
            serve(w->all, &o, &r, (enum serving)how, 0, other);
            snprintf(what, sizeof what, "%s: %s against together", c->name, how == JOINING ? "joining" : "alone");
            if (comm_rank(w->all) == 0)
                check_grade(c->grade, other, together, 0, what);
        }
    }
}

/* The same launches with delays, closed memory and a step of lag: the same bits. */
static void check_async(const struct world *w) {
    struct outcome expected[N_REQUESTS], out[N_REQUESTS];
    static const int which[] = {7, 8};
    for (int i = 0; i < 2; i++)
        for (int tp = 1; tp <= 2; tp++) {
            const struct config *c = &configs[which[i]];
            struct engine_options o = options_for(w, c);
            struct requests r;
            requests_make(&r, c->prefill);
            if (comm_size(w->all) % tp)
                continue;
            o.tp = tp;
            o.merge = merges[(i + tp) % 3];
            o.device = "cpu";
            serve(w->all, &o, &r, TOGETHER, 0, expected);
            o.device = "cpu-async";
            for (int seed = 0; seed < 2; seed++) {
                o.test_seed = 31 * (uint64_t)seed + (uint64_t)tp;
                serve(w->all, &o, &r, TOGETHER, 0, out);
                if (comm_rank(w->all) == 0) {
                    struct difference d = compare(out, expected);
                    CHECK(d.same_bits, "%s, tp %d, seed %d: mean %g, most %g", c->name, tp, seed, d.mean, d.most);
                }
            }
        }
}

/* ---- files ------------------------------------------------------------------------------------------------------------------ */

static void make_files(struct world *w) {
    struct model_file *file;
    bool same = strcmp(w->device, w->reference) == 0;
    char *model = tiny_model("model", 0), *twin = tiny_model("twin", same ? 1e-6f : 1.0f / 2048);
    snprintf(w->model, sizeof w->model, "%s", model);
    snprintf(w->twin, sizeof w->twin, "%s", twin);
    REQUIRE(model_file_open(model, &file));
    struct tiny_calibration c = {.only_layer = -1, .gate = true};
    snprintf(w->calibration, sizeof w->calibration, "%s", tiny_save_calibration("a.safetensors", file, &c));
    c.per_head = true;
    snprintf(w->per_head, sizeof w->per_head, "%s", tiny_save_calibration("b.safetensors", file, &c));
    model_file_close(file);
    free(model);
    free(twin);
}

int main(int argc, char **argv) { /* DEVICE, REFERENCE */
    struct world w = {.device = argc > 1 ? argv[1] : "cpu"};
    w.reference = argc > 2 ? argv[2] : w.device;
    REQUIRE(comm_start("auto", DEADLINE, &argc, &argv, &w.all));
    device_require(w.all, w.device);
    REQUIRE(comm_split(w.all, comm_rank(w.all), 0, "alone", &w.alone));
    base_set_log(LOG_ERROR, "");
    if (comm_rank(w.all) == 0)
        make_files(&w);
    REQUIRE(comm_broadcast(w.all, "paths", w.model, (int64_t)(sizeof w - offsetof(struct world, model)), 0));
    for (int i = 0; i < N_CONFIGS; i++)
        if (!device_is_gpu(w.device) || configs[i].grade != FLOAT) /* float caches are the CPU's */
            check_config(&w, i);
    if (!device_is_gpu(w.device))
        check_chunks(&w, 0);
    check_chunks(&w, 7);
    check_batches(&w);
    if (strcmp(w.device, "cpu") == 0)
        check_async(&w);
    test_n_checks++; /* followers check nothing but what they require */
    int64_t failed = test_n_failed;
    REQUIRE(comm_reduce_host(w.all, "result", &failed, 1, COMM_SUM));
    comm_free(w.alone);
    comm_finish(w.all);
    return failed ? 1 : test_report();
}
