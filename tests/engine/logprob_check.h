/* Checking the engine's log-probabilities and greedy continuations against golden ones (tests/golden/scores.py).
 *
 * On rank 0 of an open engine: logprob_check submits prompts, serves them together and compares every prompt position, every greedy
 * token and its log-probability. A continuation may differ from the golden one only at a near-tie, where the golden margin (best logit
 * less the second) is below a stated bound; from there on that continuation is not compared. */
#pragma once

#include <jansson.h>

#include "engine/engine.h"
#include "test.h"

struct logprob_prompt {
    const char *name;
    int n;
    int32_t *ids;
    double *logprob;        /* [n]; entry 0 unused */
    int n_greedy;           /* 0: not continued */
    int32_t *greedy_id;
    double *greedy_logprob, *margin;
};

struct logprob_golden {
    json_t *root;
    int n;
    struct logprob_prompt *prompt;
};

struct logprob_bounds {
    double mean, most; /* of |difference| over positions */
    double tie;        /* margin below which two tokens count as equally likely */
};

struct logprob_figures { /* of |difference|, and where it is largest */
    int64_t n;
    double sum, most;
    const char *where;
    int at;
};

struct logprob_run {
    const struct logprob_prompt *prompt;
    struct logprob_figures *scored, *decoded;
    double tie;
    int n_new, n_finished, parted_at; /* parted_at: token of the first difference, -1 */
    bool told;                        /* prompt scores came */
    enum engine_prefill prefill;
};

/* ---- golden files -------------------------------------------------------------------------------------------------- */

static inline json_t *logprob_load(const char *path) {
    json_error_t error;
    json_t *root = json_load_file(path, 0, &error);
    if (!root) {
        fprintf(stderr, "%s: line %d: %s\n", path, error.line, error.text);
        exit(1);
    }
    return root;
}

/* Numbers of a JSON list, `skip` unused entries before them; malloced. */
static inline double *logprob_numbers(const json_t *list, int skip) {
    int n = (int)json_array_size(list);
    double *out = calloc((size_t)(n + skip) + 1, sizeof *out);
    if (!out)
        exit(1);
    for (int i = 0; i < n; i++)
        out[i + skip] = json_number_value(json_array_get(list, (size_t)i));
    return out;
}

static inline int32_t *logprob_ids(const json_t *list) {
    int n = (int)json_array_size(list);
    int32_t *out = calloc((size_t)n + 1, sizeof *out);
    if (!out)
        exit(1);
    for (int i = 0; i < n; i++)
        out[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    return out;
}

static inline struct logprob_prompt logprob_prompt_read(const json_t *row) {
    json_t *ids = json_object_get(row, "ids"), *greedy = json_object_get(row, "greedy");
    json_t *logprobs = json_object_get(row, "logprobs"), *margins = json_object_get(greedy, "margins");
    struct logprob_prompt p = {
        .name = json_string_value(json_object_get(row, "name")), .n = (int)json_array_size(ids), .ids = logprob_ids(ids),
        .logprob = logprob_numbers(logprobs, 1), .n_greedy = (int)json_array_size(margins),
        .greedy_id = logprob_ids(json_object_get(greedy, "ids")), .greedy_logprob = logprob_numbers(json_object_get(greedy, "logprobs"), 0),
        .margin = logprob_numbers(margins, 0),
    };
    CHECK(p.n > 0 && (int)json_array_size(logprobs) == p.n - 1, "%s: %d ids", p.name, p.n);
    return p;
}

/* `rows`: the list "prompts" of a golden file; `root` keeps the names. */
static inline struct logprob_golden logprob_golden_read(json_t *root, const json_t *rows) {
    struct logprob_golden g = {.root = root, .n = (int)json_array_size(rows)};
    g.prompt = calloc((size_t)g.n + 1, sizeof *g.prompt);
    if (!g.prompt)
        exit(1);
    for (int i = 0; i < g.n; i++)
        g.prompt[i] = logprob_prompt_read(json_array_get(rows, (size_t)i));
    CHECK(g.n > 0, "no golden prompts");
    return g;
}

static inline void logprob_golden_free(struct logprob_golden *g) {
    for (int i = 0; i < g->n; i++) {
        free(g->prompt[i].ids);
        free(g->prompt[i].logprob);
        free(g->prompt[i].greedy_id);
        free(g->prompt[i].greedy_logprob);
        free(g->prompt[i].margin);
    }
    free(g->prompt);
}

/* ---- comparing ----------------------------------------------------------------------------------------------------- */

static inline void logprob_add(struct logprob_figures *f, const char *where, int at, double got, double expected) {
    double difference = fabs(got - expected);
    f->n++;
    f->sum += difference;
    if (!(difference <= f->most)) { /* a NaN is the largest of all */
        f->most = difference;
        f->where = where;
        f->at = at;
    }
}

static inline double logprob_mean(const struct logprob_figures *f) { return f->n ? f->sum / (double)f->n : 0; }

static inline void logprob_take_prompt(struct logprob_run *r, const struct engine_event *event) {
    const struct logprob_prompt *p = r->prompt;
    r->told = true;
    CHECK(event->n_scored == p->n, "%s: %d positions scored, expected %d", p->name, event->n_scored, p->n);
    CHECK(event->scored_cached == (r->prefill == ENGINE_PREFILL_CACHED), "%s: scored with the other prefill", p->name);
    for (int i = 0; i < event->n_scored && i < p->n; i++) {
        CHECK(event->scored[i].id == p->ids[i], "%s: position %d is token %d", p->name, i, event->scored[i].id);
        if (i > 0)
            logprob_add(r->scored, p->name, i, (double)event->scored[i].logprob, p->logprob[i]);
    }
}

static inline void logprob_take_token(struct logprob_run *r, const struct engine_scored *token) {
    const struct logprob_prompt *p = r->prompt;
    int i = r->n_new++;
    if (r->parted_at >= 0 || i >= p->n_greedy)
        return;
    if (token->id == p->greedy_id[i]) {
        logprob_add(r->decoded, p->name, p->n + i, (double)token->logprob, p->greedy_logprob[i]);
        return;
    }
    r->parted_at = i;
    CHECK(p->margin[i] < r->tie, "%s: new token %d is %d, expected %d, which leads by %g", p->name, i, token->id, p->greedy_id[i],
          p->margin[i]);
    printf("  %s: continuation parts at token %d, a near-tie of %.2g\n", p->name, i, p->margin[i]);
}

static inline void logprob_submit(struct engine *engine, struct logprob_run *r) {
    struct engine_request request;
    int64_t id;
    engine_request_init(&request);
    request.prompt = r->prompt->ids;
    request.n_prompt = r->prompt->n;
    request.max_tokens = r->prompt->n_greedy;
    request.temperature = 0;
    request.ignore_eos = true;
    request.logprobs = 0;
    request.prompt_logprobs = 0;
    request.prefill = r->prefill;
    request.user = r;
    REQUIRE(engine_submit(engine, &request, &id));
}

/* Serves until idle; what was submitted must have a struct logprob_run as `user`. */
static inline void logprob_serve(struct engine *engine) {
    for (int more = 1; more;) {
        struct engine_event event;
        more = engine_step(engine);
        REQUIRE(more);
        while (engine_next_event(engine, &event)) {
            struct logprob_run *r = event.user;
            if (event.kind == ENGINE_PROMPT)
                logprob_take_prompt(r, &event);
            else if (event.kind == ENGINE_TOKEN)
                logprob_take_token(r, &event.token);
            else
                r->n_finished++;
        }
    }
}

static inline void logprob_judge(const char *what, const struct logprob_figures *f, const struct logprob_bounds *bounds) {
    if (f->n == 0)
        return;
    printf("%s: %lld positions, |difference| mean %.3g, most %.3g (%s, %d)\n", what, (long long)f->n, logprob_mean(f), f->most,
           f->where ? f->where : "none", f->at);
    CHECK(logprob_mean(f) <= bounds->mean, "%s: mean difference %g, at most %g", what, logprob_mean(f), bounds->mean);
    CHECK(f->most <= bounds->most, "%s: difference %g at %s, %d, at most %g", what, f->most, f->where, f->at, bounds->most);
}

/* All golden prompts of `least` to `most_tokens` tokens, served together. */
static inline void logprob_check(struct engine *engine, const char *what, const struct logprob_golden *golden, int least, int most_tokens,
                                 enum engine_prefill prefill, const struct logprob_bounds *bounds) {
    struct logprob_figures scored = {0}, decoded = {0};
    struct logprob_run *runs = calloc((size_t)golden->n, sizeof *runs);
    char name[256];
    int n = 0;
    if (!runs)
        exit(1);
    for (int i = 0; i < golden->n; i++) {
        const struct logprob_prompt *p = &golden->prompt[i];
        if (p->n < least || p->n > most_tokens)
            continue;
        runs[n] = (struct logprob_run){.prompt = p, .scored = &scored, .decoded = &decoded, .tie = bounds->tie, .prefill = prefill,
                                       .parted_at = -1};
        logprob_submit(engine, &runs[n++]);
    }
    logprob_serve(engine);
    for (int i = 0; i < n; i++)
        CHECK(runs[i].told && runs[i].n_finished == 1 && runs[i].n_new == runs[i].prompt->n_greedy, "%s: told %d, finished %d, %d new",
              runs[i].prompt->name, runs[i].told, runs[i].n_finished, runs[i].n_new);
    CHECK(n > 0, "%s: no prompt of %d to %d tokens", what, least, most_tokens);
    snprintf(name, sizeof name, "%.200s, %s prefill", what, prefill == ENGINE_PREFILL_CACHED ? "cached" : "exact");
    logprob_judge(name, &scored, bounds);
    snprintf(name, sizeof name, "%.200s, decode", what);
    logprob_judge(name, &decoded, bounds);
    fflush(stdout);
    free(runs);
}
