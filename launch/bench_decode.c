/* Decoding: sequences of a given length, all alive at once, one new token each in a step. Their prompts are read, or with random weights
 * taken as cached in pages of random content, so that any length costs nothing but memory. The least that a step has to read are the
 * weights once and each sequence's cache; that against the measured read bandwidth is the limit. */
#include <stdlib.h>

#include "launch/bench_predict.h"
#include "launch/signals.h"

enum {
    WARM_STEPS = 3,      /* the first ones record the step and touch memory */
    PROMPT_STEPS = 300,  /* steps that the first sequence of a batch may have made before the last one is through its prompt */
};

int64_t bench_decode_room(const struct bench *b) {
    bool several = false;
    for (int i = 0; i < b->batches.n; i++)
        several |= b->batches.value[i] > 1;
    return WARM_STEPS + b->options->steps + 1 + (several ? PROMPT_STEPS : 0);
}

struct decode {
    struct bench *bench;
    int batch;
    int64_t tokens;
    double *seconds;  /* of the steps measured */
    int n_seconds;
    struct bench_profile begin, end;
    int64_t id[STEP_MAX_ROWS];
};

static int submit(struct decode *d) {
    for (int i = 0; i < d->batch; i++)
        TRY(bench_submit(d->bench, d->tokens, i, (int)bench_decode_room(d->bench), ENGINE_PREFILL_EXACT, &d->id[i]));
    return STATUS_OK;
}

/* One step; *n counts the sequences that got a token in it. Returns engine_step's. */
static int step(struct decode *d, int *n, double *seconds) {
    struct engine_event event;
    double start = base_seconds();
    int more = run_step(d->bench->run);
    *seconds = base_seconds() - start;
    TRY(more);
    for (*n = 0; engine_next_event(d->bench->run->engine, &event);)
        *n += event.kind == ENGINE_TOKEN;
    if (signals_pending())
        FAIL(STATUS_INTERRUPTED, "stopped by signal %s", signals_name(signals_pending()));
    return more;
}

/* Steps until enough of them were whole: every sequence got a token. */
static int measure(struct decode *d) {
    int n, more = 1;
    double seconds;
    for (int whole = 0; more && d->n_seconds < d->bench->options->steps;) {
        more = step(d, &n, &seconds);
        TRY(more);
        if (n < d->batch)
            continue;
        if (++whole > WARM_STEPS)
            d->seconds[d->n_seconds++] = seconds;
        else if (whole == WARM_STEPS)
            bench_profile_read(d->bench, &d->begin);
    }
    bench_profile_read(d->bench, &d->end);
    if (d->n_seconds == 0)
        FAIL(STATUS_FAILED, "no step in which all %d sequences of %lld tokens decoded", d->batch, (long long)d->tokens);
    return STATUS_OK;
}

/* The engine is idle again. */
static int clear(struct decode *d) {
    int n, more = 1;
    double seconds;
    for (int i = 0; i < d->batch; i++)
        engine_cancel(d->bench->run->engine, d->id[i]);
    while (more) {
        more = step(d, &n, &seconds);
        TRY(more);
    }
    return STATUS_OK;
}

static void add_rows(struct decode *d) {
    struct bench *b = d->bench;
    const struct engine *engine = b->run->engine;
    int64_t weights, cache;
    char note[96];
    int n = d->n_seconds;
    double median = bench_median(d->seconds, n);
    engine_read_bytes(engine, d->tokens + WARM_STEPS + n / 2, &weights, &cache);
    double bytes = (double)weights + (double)cache * d->batch;
    snprintf(note, sizeof note, "weights %.1f MiB, cache %.2f MiB a sequence", (double)weights / 1048576, (double)cache / 1048576);
    struct bench_row row = {.section = "decode", .item = "step", .cache = engine_cache_name(engine), .batch = d->batch,
                            .tokens = d->tokens, .ms = median * 1e3, .best_ms = d->seconds[0] * 1e3, .rate = d->batch / median, .unit = "tokens/s", .bytes = bytes,
                            .share = b->read_rate > 0 ? bytes / median / b->read_rate : 0, .of = "read",
                            .predicted_ms = bench_predict_decode(b, d->batch, d->tokens + WARM_STEPS + n / 2), .note = note};
    bench_add(b, row);
    bench_profile_add(b, &d->begin, &d->end, &row, n, bench_sum(d->seconds, n));
}

/* Sequences that wait for each other never decode together. */
static bool fits(struct bench *b, int batch, int64_t tokens) {
    char note[96];
    const struct engine *engine = b->run->engine;
    int n = engine_fits(engine, tokens + bench_decode_room(b));
    snprintf(note, sizeof note, "left out: %d sequences fit into the cache at once", n);
    if (n < batch)
        bench_add(b, (struct bench_row){.section = "decode", .item = "step", .cache = engine_cache_name(engine), .batch = batch,
                                        .tokens = tokens, .note = note});
    return n >= batch;
}

static int decode(struct bench *b, int batch, int64_t tokens) {
    struct decode *d;
    int status = STATUS_OK;
    if (!fits(b, batch, tokens))
        return STATUS_OK;
    TRY(base_alloc(&d, 1, sizeof *d));
    d->bench = b;
    d->batch = batch;
    d->tokens = tokens;
    TRY_GOTO(base_alloc(&d->seconds, (size_t)b->options->steps, sizeof *d->seconds));
    TRY_GOTO(submit(d));
    TRY_GOTO(measure(d));
    add_rows(d);
    TRY_GOTO(clear(d));
fail:
    free(d->seconds);
    free(d);
    return status;
}

int bench_decode(struct bench *b) {
    for (int i = 0; i < b->batches.n; i++)
        for (int j = 0; j < b->contexts.n; j++)
            TRY(decode(b, (int)b->batches.value[i], b->contexts.value[j]));
    return STATUS_OK;
}
