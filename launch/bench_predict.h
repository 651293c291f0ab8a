/* What kvlinc plan would say of a row of decode or prefill, had it the rates of this very run: engine/cost.h with rates measured here, part
 * by part, before the first engine opens. */
#pragma once

#include "engine/cost.h"
#include "launch/bench.h"

enum { PREDICT_MAX_ROWS = BENCH_MAX_LIST + 2 };

struct bench_prediction {
    struct cost_rates rates;              /* read_rate 0: nothing was measured */
    int n_rows;
    int rows[PREDICT_MAX_ROWS];           /* of a step: products were measured with so many */
    double share[PREDICT_MAX_ROWS];       /* weights_share with them */
    double prefill_rate[BENCH_MAX_LIST];  /* by prompt */
    struct {                              /* by cache */
        double attention_share, attention_s;
        double cached_rate[BENCH_MAX_LIST]; /* by prompt */
    } cache[BENCH_MAX_LIST];
};

/* Collective, device open, rates measured. Only with 16-bit weights, which the prediction is about. */
int bench_predict_measure(struct bench *b);

/* Rank 0, engine open. Milliseconds of a step of `batch` sequences whose newest token is the n_tokens-th; of b's prompt number `prompt`.
 * 0: no prediction. */
double bench_predict_decode(const struct bench *b, int batch, int64_t n_tokens);
double bench_predict_prefill(const struct bench *b, int prompt, enum engine_prefill kind);
