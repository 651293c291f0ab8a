/* The losses of compressed caches on real text against an independent emulation (golden/handbook.py): windows of 2048 tokens scored
 * with cached prefill and float32 weights. One rank.
 *
 * 16 bit is compared token by token. With fewer bits a difference of 1e-6 flips codes, and single tokens then differ by tenths: what must
 * agree is the mean loss over 16 bit, the price of the cache, up to a share of it or to its own scatter; and single tokens may not
 * differ by much more than such flips explain. */
#include "launch/environment.h"
#include "device.h"
#include "logprob_check.h"

/* Golden losses are given in thousandths. */
#define GOLDEN_UNIT 1e-3

static const double sixteen_bit_mean = 0.002; /* of |difference| over a window's tokens */
static const double price_share = 0.05, price_least = 0.003;
static const double most_errors = 4; /* standard errors by which a mean may be off: the chaos of free runs */

enum { WINDOW_TOKENS = 2048, FIRST_FLUSHED = 256, N_WINDOWS = 3 };

struct method {
    const char *name, *cache, *k_bits, *v_bits;
    int sink, n_windows;
    double apart;       /* most mean |difference| of tokens: some 1.5 times what was measured */
    bool may_be_better;
};

/* The emulation's ranges of block 0 include the sink tokens, this project's do not: with a sink the loss may only be lower. */
static const struct method methods[] = {
    {"fp16", "fp16", NULL, NULL, -1, 1, 0.002, false},         {"kivi", "kivi", NULL, NULL, -1, N_WINDOWS, 0.28, false},
    {"hadv", "hadv", NULL, NULL, -1, N_WINDOWS, 0.24, false},  {"hadv sink16", "hadv", NULL, NULL, 16, 1, 0.4, true},
    {"kivi k4v4", "kivi", "4", "4", -1, 1, 0.02, false},       {"kivi k2v4", "kivi", "2", "4", -1, 1, 0.15, false},
};

struct window { /* one window of one method: golden losses, the engine's, and sums over them */
    int n;
    int32_t *ids;
    double *golden, *fp16;
    double sum, golden_sum, fp16_sum, apart, apart_exact, square;
    bool told;
};

static void take_scores(struct window *w, const struct engine_event *event) {
    CHECK(event->scored_cached && event->n_scored == w->n, "%d positions scored, expected %d", event->n_scored, w->n);
    w->told = true;
    for (int i = 1; i < event->n_scored && i < w->n; i++) {
        double loss = -(double)event->scored[i].logprob, golden = w->golden[i - 1] * GOLDEN_UNIT;
        w->sum += loss;
        w->golden_sum += golden;
        w->fp16_sum += w->fp16[i - 1] * GOLDEN_UNIT;
        w->apart += fabs(loss - golden);
        w->square += (loss - golden) * (loss - golden);
        if (i <= FIRST_FLUSHED) /* scored by tokens that see 16 bit only */
            w->apart_exact += fabs(loss - golden);
    }
}

static void score(struct engine *engine, struct window *windows, int n) {
    for (int i = 0; i < n; i++) {
        struct engine_request request;
        int64_t id;
        engine_request_init(&request);
        request.prompt = windows[i].ids;
        request.n_prompt = windows[i].n;
        request.max_tokens = 0;
        request.prompt_logprobs = 0;
        request.prefill = ENGINE_PREFILL_CACHED;
        request.user = &windows[i];
        REQUIRE(engine_submit(engine, &request, &id));
    }
    for (int more = 1; more;) {
        struct engine_event event;
        more = engine_step(engine);
        REQUIRE(more);
        while (engine_next_event(engine, &event))
            if (event.kind == ENGINE_PROMPT)
                take_scores(event.user, &event);
    }
}

/* A mean loss against the golden one, which is `price` above 16 bit; `error`: standard error of their difference. */
static void judge_loss(const struct method *m, const char *what, double loss, double golden, double price, double error) {
    double allowed = fmax(fmax(price_share * price, price_least), most_errors * error);
    printf("%-12s %s: loss %.4f, golden %.4f (%+.4f, at most %.4f), over 16 bit %.4f\n", m->name, what, loss, golden, loss - golden,
           allowed, price);
    CHECK(loss - golden <= allowed, "%s, %s: loss %g, golden %g, at most %g more", m->name, what, loss, golden, allowed);
    CHECK(m->may_be_better || golden - loss <= allowed, "%s, %s: loss %g, golden %g, at most %g less", m->name, what, loss, golden, allowed);
}

static void judge(const struct method *m, const struct window *windows) {
    double loss = 0, golden = 0, price = 0, variance = 0, n = WINDOW_TOKENS - 1, n_windows = m->n_windows;
    for (int i = 0; i < m->n_windows; i++) {
        const struct window *w = &windows[i];
        double exact = w->apart_exact / FIRST_FLUSHED;
        char what[32];
        snprintf(what, sizeof what, "window %d", i);
        printf("%-12s %s: |difference| of a token: mean %.4f, before any flush %.5f\n", m->name, what, w->apart / n, exact);
        CHECK(w->told, "%s, %s: no scores", m->name, what);
        CHECK(exact <= sixteen_bit_mean, "%s, %s: before any flush mean %g, at most %g", m->name, what, exact, sixteen_bit_mean);
        CHECK(w->apart / n <= m->apart, "%s, %s: mean %g, at most %g", m->name, what, w->apart / n, m->apart);
        judge_loss(m, what, w->sum / n, w->golden_sum / n, (w->golden_sum - w->fp16_sum) / n, sqrt(w->square) / n);
        loss += w->sum / n / n_windows;
        golden += w->golden_sum / n / n_windows;
        price += (w->golden_sum - w->fp16_sum) / n / n_windows;
        variance += w->square / (n * n) / (n_windows * n_windows);
    }
    if (m->n_windows > 1)
        judge_loss(m, "all windows", loss, golden, price, sqrt(variance));
}

static void check_method(struct comm *world, const struct place *place, const char *device, const char *path, const json_t *root, const struct method *m) {
    struct engine_options options = {.model = path, .device = device, .merge = "auto", .cache = m->cache, .k_bits = m->k_bits,
                                     .v_bits = m->v_bits, .window = -1, .sink = m->sink, .correction = "off", .weights = "f32",
                                     .context = WINDOW_TOKENS, .max_batch = N_WINDOWS};
    const json_t *nll = json_object_get(root, "nll");
    struct window windows[N_WINDOWS] = {0};
    struct engine *engine;
    REQUIRE(engine_open(world, &options, place, &engine));
    for (int i = 0; i < m->n_windows; i++) {
        json_t *ids = json_array_get(json_object_get(root, "ids"), (size_t)i);
        windows[i].n = (int)json_array_size(ids);
        windows[i].ids = logprob_ids(ids);
        windows[i].golden = logprob_numbers(json_array_get(json_object_get(nll, m->name), (size_t)i), 0);
        windows[i].fp16 = logprob_numbers(json_array_get(json_object_get(nll, "fp16"), (size_t)i), 0);
        CHECK(windows[i].n == WINDOW_TOKENS, "window %d: %d tokens", i, windows[i].n);
    }
    score(engine, windows, m->n_windows);
    judge(m, windows);
    for (int i = 0; i < m->n_windows; i++) {
        free(windows[i].ids);
        free(windows[i].golden);
        free(windows[i].fp16);
    }
    fflush(stdout);
    engine_close(engine);
}

int main(int argc, char **argv) { /* DEVICE */
    const char *device = argc > 1 ? argv[1] : "cpu";
    const char *path = getenv("KVLINC_TEST_MODEL");
    struct comm *world;
    struct place place;
    if (!path)
        return TEST_SKIP;
    environment_prepare(argv);
    REQUIRE(comm_start("self", 60, &argc, &argv, &world));
    device_require(world, device);
    REQUIRE(place_bind(world, &place));
    json_t *root = logprob_load(TEST_FILE("golden/handbook.json"));
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        check_method(world, &place, device, path, root, &methods[i]);
    json_decref(root);
    comm_finish(world);
    return test_report();
}
