/* Prompts: exact and cached, until the first new token is there. Floating-point operations are those of the matrix products that a prompt
 * needs, whatever is computed more: projections and MLP of every token, the LM head once, and both products of causal attention. */
#include "launch/bench_predict.h"
#include "launch/signals.h"

static double prompt_flop(const struct model_config *c, int64_t n) {
    double d = c->head_dim, hidden = c->hidden, heads = c->n_heads * d, kv = c->n_kv_heads * d;
    double layer = hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * c->intermediate;
    double attention = 2 * heads * (double)n * (double)(n + 1) / 2; /* q.k and p.v over all earlier tokens */
    return 2 * (c->n_layers * (layer * (double)n + attention) + hidden * c->vocab);
}

/* One prompt; *seconds from its admission to its first token. */
static int run_prompt(struct bench *b, int64_t n, enum engine_prefill kind, double *seconds) {
    struct engine_event event;
    int64_t id;
    int more = 1;
    TRY(bench_submit(b, n, 0, 1, kind, &id));
    while (more) {
        more = run_step(b->run);
        TRY(more);
        while (engine_next_event(b->run->engine, &event))
            if (event.kind == ENGINE_FINISHED)
                *seconds = event.prefill_s;
        if (signals_pending())
            FAIL(STATUS_INTERRUPTED, "stopped by signal %s", signals_name(signals_pending()));
    }
    return STATUS_OK;
}

static int prefill(struct bench *b, int index, enum engine_prefill kind) {
    const int64_t n = b->prompts.value[index];
    double times[BENCH_MAX_REPEATS], first = 0;
    struct bench_profile begin, end;
    int repeats = b->options->repeats;
    TRY(run_prompt(b, n, kind, &first)); /* touches memory */
    bench_profile_read(b, &begin);
    for (int i = 0; i < repeats; i++)
        TRY(run_prompt(b, n, kind, &times[i]));
    bench_profile_read(b, &end);
    double seconds = bench_median(times, repeats), flop = prompt_flop(engine_model(b->run->engine), n);
    struct bench_row row = {.section = "prefill", .item = kind == ENGINE_PREFILL_EXACT ? "exact" : "cached",
                            .cache = engine_cache_name(b->run->engine), .batch = 1, .tokens = n, .ms = seconds * 1e3, .best_ms = times[0] * 1e3,
                            .rate = (double)n / seconds, .unit = "tokens/s", .flop = flop, .share = flop / seconds / b->gemm_rate,
                            .of = b->gemm_name, .predicted_ms = bench_predict_prefill(b, index, kind)};
    bench_add(b, row);
    bench_profile_add(b, &begin, &end, &row, repeats, bench_sum(times, repeats));
    return STATUS_OK;
}

int bench_prefill(struct bench *b) {
    for (int i = 0; i < b->prompts.n; i++) {
        TRY(prefill(b, i, ENGINE_PREFILL_EXACT));
        TRY(prefill(b, i, ENGINE_PREFILL_CACHED));
    }
    return STATUS_OK;
}
