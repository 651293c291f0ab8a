/* Serving: requests in, plans out to all ranks, results back as events. Only rank 0 knows sequences; followers see plans. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cost.h"
#include "engine/engine_impl.h"

/* ---- what an engine says of itself --------------------------------------------------------------------------------- */

const struct model_config *engine_model(const struct engine *e) { return model_file_config(e->file); }
const char *engine_model_path(const struct engine *e) { return model_file_path(e->file); }
const struct tokenizer *engine_tokenizer(const struct engine *e) { return e->tokenizer; }
const struct grid *engine_grid(const struct engine *e) { return &e->worker.rank.grid; }
int64_t engine_context(const struct engine *e) { return e->context; }
int engine_max_batch(const struct engine *e) { return e->max_batch; }
const char *engine_cache_name(const struct engine *e) { return e->spec.name; }
const char *engine_device(const struct engine *e) { return e->device; }
const char *engine_merge_name(const struct engine *e) { return e->merge; }
const char *engine_settings(const struct engine *e) { return e->settings; }
void engine_memory(const struct engine *e, struct engine_memory *out) { *out = e->memory; }

const struct chat_template *engine_chat(const struct engine *e) {
    const struct chat_template *chat = NULL;
    return chat_find(model_file_tokenizer(e->file)->chat_template, engine_model_path(e), &chat) < 0 ? NULL : chat;
}

int64_t engine_sequence_bytes(const struct engine *e, int64_t n_tokens) {
    const struct rank *r = &e->worker.rank;
    const struct engine_memory *m = &e->memory;
    int64_t slots = m->window + m->sink + m->states + m->tables; /* of all slots on all ranks */
    int64_t blocks = n_tokens > 0 ? cache_n_flushed(&r->cache.layout, n_tokens - 1) : 0;
    int64_t pool = r->cache.shape.n_pages * r->grid.cp;          /* blocks that all pages of the tp ranks hold together */
    int64_t page = pool > 0 ? m->pages / pool : 0;
    return slots / e->max_batch + blocks * page;
}

int engine_fits(const struct engine *e, int64_t n_tokens) {
    const struct rank *r = &e->worker.rank;
    int64_t each = cache_pages_for(&e->spec, r->grid.cp, n_tokens); /* of the rank that has most */
    return each ? (int)min_i64(e->max_batch, r->cache.shape.n_pages / each) : e->max_batch;
}

void engine_cost_job(const struct engine *e, int batch, struct cost_job *out) {
    const struct rank *r = &e->worker.rank;
    *out = (struct cost_job){.config = r->config, .spec = &e->spec, .features = r->cache.shape.features, .context = e->context,
                             .batch = batch, .tp = r->grid.tp, .cp = r->grid.cp, .merge = r->merge.kind,
                             .prefill_gather = e->options.prefill_gather, .no_prefill = e->options.assume_prompts,
                             .gpu = strcmp(backend_name(r->backend), "cuda") == 0};
}

void engine_read_bytes(const struct engine *e, int64_t n_tokens, int64_t *weights, int64_t *cache) {
    const struct rank *r = &e->worker.rank;
    const struct engine_memory *m = &e->memory;
    int64_t blocks = n_tokens > 0 ? cache_n_flushed(&r->cache.layout, n_tokens - 1) : 0;
    int64_t exact = n_tokens - blocks * KV_BLOCK + (blocks > 0 ? e->spec.sink : 0);
    int64_t pages = engine_sequence_bytes(e, n_tokens) - engine_sequence_bytes(e, 0);
    *cache = pages + exact * (int64_t)dtype_bytes(e->spec.window_type, m->elements_per_token) + m->states / e->max_batch;
    *weights = m->weights;
    if (!r->config->tied)
        *weights -= (int64_t)dtype_bytes(r->weights.dtype, (int64_t)(r->config->vocab - 1) * r->config->hidden);
}

void engine_profile(const struct engine *e, struct backend_times *times, struct backend_time *launches, int n) {
    backend_profile(e->worker.rank.backend, times, launches, n);
}

void engine_prefill_progress(const struct engine *e, int64_t *done, int64_t *total) {
    *done = *total = 0;
    for (const struct sequence *q = e->scheduler.first; q; q = q->next) {
        int64_t n = q->request.n_prompt;
        if (q->state == SEQUENCE_DECODE || q->state == SEQUENCE_OVER)
            continue;
        *total += n;
        if (q->state == SEQUENCE_ROWS)
            *done += q->n_done;
        else if (q->state == SEQUENCE_LAYERS)
            *done += n * q->layer / e->spec.n_layers;
        else if (q->state == SEQUENCE_SCORING)
            *done += n;
    }
}

/* ---- requests ------------------------------------------------------------------------------------------------------ */

void engine_request_init(struct engine_request *r) {
    *r = (struct engine_request){.max_tokens = 16, .temperature = 1, .top_p = 1, .repetition_penalty = 1, .logprobs = -1,
                                 .prompt_logprobs = -1};
}

static int check_range(const char *name, double value, double least, double most) {
    if (!(value >= least && value <= most))
        FAIL(STATUS_INPUT, "%s is %g, allowed are %g to %g", name, value, least, most);
    return STATUS_OK;
}

static int check_sampling(const struct engine *e, const struct engine_request *r) {
    TRY(check_range("temperature", (double)r->temperature, 0, 100));
    TRY(check_range("top_p", (double)r->top_p, 0, 1));
    TRY(check_range("min_p", (double)r->min_p, 0, 1));
    TRY(check_range("top_k", r->top_k, 0, INT32_MAX));
    TRY(check_range("presence_penalty", (double)r->presence_penalty, -2, 2));
    TRY(check_range("frequency_penalty", (double)r->frequency_penalty, -2, 2));
    TRY(check_range("repetition_penalty", (double)r->repetition_penalty, 1e-3, 1e3));
    TRY(check_range("logprobs", r->logprobs, -1, STEP_MAX_TOP));
    TRY(check_range("prompt logprobs", r->prompt_logprobs, -1, STEP_MAX_TOP));
    TRY(check_range("logit_bias entries", r->n_bias, 0, STEP_MAX_BIAS));
    for (int i = 0; i < r->n_bias; i++) {
        TRY(check_range("logit_bias token", r->bias_id[i], 0, engine_model(e)->vocab - 1));
        TRY(check_range("logit_bias", (double)r->bias[i], -100, 100));
    }
    return STATUS_OK;
}

static int check_request(const struct engine *e, const struct engine_request *r) {
    int vocab = engine_model(e)->vocab;
    if (r->n_prompt < 1)
        FAIL(STATUS_INPUT, "the prompt is empty: at least one token is needed");
    if (r->n_prompt > e->context)
        FAIL(STATUS_INPUT, "the prompt has %d tokens, the context is %lld", r->n_prompt, (long long)e->context);
    if (r->max_tokens < 0 || (int64_t)r->n_prompt + r->max_tokens > e->context)
        FAIL(STATUS_INPUT, "the prompt has %d tokens and max_tokens is %d: together they exceed the context of %lld", r->n_prompt,
             r->max_tokens, (long long)e->context);
    for (int i = 0; i < r->n_prompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= vocab)
            FAIL(STATUS_INPUT, "prompt token %d is %d, the model has ids 0 to %d", i, r->prompt[i], vocab - 1);
    if (e->options.assume_prompts && r->prompt_logprobs >= 0)
        FAIL(STATUS_INPUT, "a prompt that is taken as cached cannot be scored");
    if (!scheduler_could_hold(&e->scheduler, (int64_t)r->n_prompt + r->max_tokens))
        FAIL(STATUS_INPUT, "%d tokens do not fit into the cache", r->n_prompt + r->max_tokens);
    return check_sampling(e, r);
}

static int copy_of(const void *from, size_t n, size_t size, const void **out) {
    void *copy;
    TRY(base_alloc(&copy, n, size));
    if (n)
        memcpy(copy, from, n * size);
    *out = copy;
    return STATUS_OK;
}

static int alloc_scored(struct sequence *q) {
    size_t n = (size_t)q->request.n_prompt, top = (size_t)max_i64(q->request.prompt_logprobs, 0);
    if (q->request.prompt_logprobs < 0)
        return STATUS_OK;
    TRY(base_alloc(&q->scored_logprob, n, sizeof *q->scored_logprob));
    TRY(base_alloc(&q->scored_n_top, n, sizeof *q->scored_n_top));
    TRY(base_alloc(&q->scored_top_id, n * top, sizeof *q->scored_top_id));
    return base_alloc(&q->scored_top_logprob, n * top, sizeof *q->scored_top_logprob);
}

int engine_submit(struct engine *e, const struct engine_request *request, int64_t *id) {
    struct sequence *q;
    TRY(check_request(e, request));
    TRY(base_alloc(&q, 1, sizeof *q));
    struct engine_request *r = &q->request;
    *r = *request;
    const void *prompt = NULL, *ids = NULL, *biases = NULL;
    int status = copy_of(request->prompt, (size_t)r->n_prompt, sizeof *r->prompt, &prompt);
    if (status == STATUS_OK)
        status = copy_of(request->bias_id, (size_t)r->n_bias, sizeof *r->bias_id, &ids);
    if (status == STATUS_OK)
        status = copy_of(request->bias, (size_t)r->n_bias, sizeof *r->bias, &biases);
    r->prompt = prompt;
    r->bias_id = ids;
    r->bias = biases;
    if (status == STATUS_OK)
        status = alloc_scored(q);
    q->queued_at = base_seconds();
    scheduler_add(&e->scheduler, q);
    if (status < 0) {
        scheduler_end(&e->scheduler, q, q->queued_at);
        scheduler_forget(&e->scheduler, q);
        return status;
    }
    *id = q->id;
    return STATUS_OK;
}

int engine_n_active(const struct engine *e) { return scheduler_n_active(&e->scheduler); }

/* ---- events -------------------------------------------------------------------------------------------------------- */

static int push_event(struct engine *e, const struct sequence *q, enum engine_event_kind kind, struct queued_event **out) {
    if (e->n_events == e->events_size) {
        int size = 2 * e->events_size + 64;
        struct queued_event *grown;
        TRY(base_alloc(&grown, (size_t)size, sizeof *grown));
        for (int i = 0; i < e->n_events; i++)
            grown[i] = e->events[(e->first_event + i) % e->events_size];
        free(e->events);
        e->events = grown;
        e->events_size = size;
        e->first_event = 0;
    }
    struct queued_event *event = &e->events[(e->first_event + e->n_events++) % e->events_size];
    *event = (struct queued_event){.event = {.kind = kind, .id = q->id, .user = q->request.user}};
    *out = event;
    return STATUS_OK;
}

bool engine_next_event(struct engine *e, struct engine_event *event) {
    free(e->current.scored);
    e->current = (struct queued_event){0};
    if (e->n_events == 0)
        return false;
    e->current = e->events[e->first_event];
    e->first_event = (e->first_event + 1) % e->events_size;
    e->n_events--;
    struct engine_event *v = &e->current.event;
    if (v->kind == ENGINE_TOKEN) {
        v->token.top_id = e->current.top_id;
        v->token.top_logprob = e->current.top_logprob;
    }
    v->scored = e->current.scored;
    *event = *v;
    return true;
}

/* The prompt's scores as one block: the entries, then the alternatives that they point to. */
static int tell_prompt(struct engine *e, struct sequence *q) {
    struct queued_event *event;
    size_t n = (size_t)q->request.n_prompt, top = (size_t)q->request.prompt_logprobs, alternatives = n * top;
    struct engine_scored *scored;
    TRY(base_alloc(&scored, 1, n * sizeof *scored + alternatives * (sizeof(int32_t) + sizeof(float))));
    int32_t *ids = (int32_t *)(void *)(scored + n);
    float *logprobs = (float *)(void *)(ids + alternatives);
    memcpy(ids, q->scored_top_id, alternatives * sizeof *ids);
    memcpy(logprobs, q->scored_top_logprob, alternatives * sizeof *logprobs);
    for (size_t i = 0; i < n; i++)
        scored[i] = (struct engine_scored){q->request.prompt[i], i ? q->scored_logprob[i] : __builtin_nanf(""),
                                           i ? q->scored_n_top[i] : 0, ids + i * top, logprobs + i * top};
    int status = push_event(e, q, ENGINE_PROMPT, &event);
    if (status < 0) {
        free(scored);
        return status;
    }
    event->event.n_scored = (int)n;
    event->event.scored_cached = q->request.prefill == ENGINE_PREFILL_CACHED;
    event->scored = scored;
    return STATUS_OK;
}

static int finish(struct engine *e, struct sequence *q, enum engine_finish reason) {
    struct queued_event *event;
    double now = base_seconds();
    TRY(push_event(e, q, ENGINE_FINISHED, &event));
    event->event.finish = reason;
    event->event.n_tokens = q->n_reported;
    double admitted = q->admitted_at > 0 ? q->admitted_at : now;
    double prefilled = q->prefilled_at > 0 ? q->prefilled_at : now;
    event->event.queued_s = admitted - q->queued_at;
    event->event.prefill_s = prefilled - admitted;
    event->event.decode_s = now - prefilled;
    scheduler_end(&e->scheduler, q, now);
    return STATUS_OK;
}

void engine_cancel(struct engine *e, int64_t id) {
    struct sequence *q = scheduler_find(&e->scheduler, id);
    if (!q || q->state == SEQUENCE_OVER)
        return;
    if (finish(e, q, ENGINE_CANCELLED) < 0) /* no memory for an event: the sequence still has to end */
        scheduler_end(&e->scheduler, q, base_seconds());
    scheduler_forget(&e->scheduler, q);
}

static bool is_stop(const struct engine *e, int32_t token) {
    const struct model_config *c = engine_model(e);
    for (int i = 0; i < c->n_stop; i++)
        if (c->stop_id[i] == token)
            return true;
    return false;
}

static int tell_token(struct engine *e, struct sequence *q, const struct sample_result *result) {
    struct queued_event *event;
    int n_top = (int)min_i64(result->n_top, max_i64(q->request.logprobs, 0));
    if (!q->request.ignore_eos && is_stop(e, result->token))
        return finish(e, q, ENGINE_STOP);
    TRY(push_event(e, q, ENGINE_TOKEN, &event));
    event->event.token = (struct engine_scored){.id = result->token, .logprob = result->logprob, .n_top = n_top};
    memcpy(event->top_id, result->top_id, sizeof event->top_id);
    memcpy(event->top_logprob, result->top_logprob, sizeof event->top_logprob);
    q->n_reported++;
    return q->n_reported == q->request.max_tokens ? finish(e, q, ENGINE_LENGTH) : STATUS_OK;
}

static void keep_score(struct sequence *q, int64_t position, const struct sample_result *result) {
    int64_t top = max_i64(q->request.prompt_logprobs, 0), n = min_i64(top, result->n_top);
    q->scored_logprob[position] = result->target_logprob;
    q->scored_n_top[position] = (int)n;
    memcpy(q->scored_top_id + position * top, result->top_id, (size_t)n * sizeof *result->top_id);
    memcpy(q->scored_top_logprob + position * top, result->top_logprob, (size_t)n * sizeof *result->top_logprob);
}

/* The whole prompt is in the cache: its scores are told before its first token. */
static int tell_prefilled(struct engine *e, struct sequence *q) {
    if (q->prompt_told)
        return STATUS_OK;
    q->prompt_told = true;
    q->prefilled_at = base_seconds();
    return q->request.prompt_logprobs >= 0 ? tell_prompt(e, q) : STATUS_OK;
}

static int collect_row(struct engine *e, const struct scheduler_flight *f, int i, const struct sample_result *result) {
    struct sequence *q = f->logit[i].sequence;
    q->n_in_flight--;
    if (q->state != SEQUENCE_OVER) {
        if (f->logit[i].target) {
            keep_score(q, f->logit[i].position + 1, result);
        } else {
            TRY(tell_prefilled(e, q));
            TRY(tell_token(e, q, result));
        }
    }
    scheduler_forget(&e->scheduler, q);
    return STATUS_OK;
}

/* Takes in the results of one flight: scores first, so that they are complete when the sampled row tells them. */
static int collect(struct engine *e, int flight) {
    const struct scheduler_flight *f = &e->flights[flight];
    const struct sample_result *results;
    e->flying[flight] = false;
    TRY(worker_wait(&e->worker, flight, &results));
    for (int i = f->n_sample; i < f->n_logits; i++)
        TRY(collect_row(e, f, i, &results[i]));
    for (int i = 0; i < f->n_sample; i++)
        TRY(collect_row(e, f, i, &results[i]));
    return STATUS_OK;
}

/* Sequences that want no token end when their prompt has passed. */
static int finish_scored(struct engine *e) {
    struct sequence *next;
    for (struct sequence *q = e->scheduler.first; q; q = next) {
        next = q->next;
        if (q->state != SEQUENCE_DECODE || q->request.max_tokens > 0 || q->n_in_flight > 0)
            continue;
        TRY(tell_prefilled(e, q));
        TRY(finish(e, q, ENGINE_LENGTH));
        scheduler_forget(&e->scheduler, q);
    }
    return STATUS_OK;
}

/* ---- steps --------------------------------------------------------------------------------------------------------- */

static void fill_params(const struct sequence *q, struct seq_params *p) {
    const struct engine_request *r = &q->request;
    *p = (struct seq_params){.owner_offset = q->owner_offset, .top_k = r->top_k, .seed = r->seed, .choice = r->choice,
                             .temperature = r->temperature, .top_p = r->top_p, .min_p = r->min_p,
                             .presence_penalty = r->presence_penalty, .frequency_penalty = r->frequency_penalty,
                             .repetition_penalty = r->repetition_penalty, .n_bias = r->n_bias};
    memcpy(p->bias_id, r->bias_id, (size_t)r->n_bias * sizeof *r->bias_id);
    memcpy(p->bias, r->bias, (size_t)r->n_bias * sizeof *r->bias);
}

/* The second broadcast of an admission. */
static int broadcast_admission(struct engine *e, const struct step_plan *plan) {
    struct worker *w = &e->worker;
    TRY(comm_broadcast(w->rank.replica, "admission", w->host_params, sizeof *w->host_params, 0));
    return comm_broadcast(w->rank.replica, "prompt", w->host_prompt, plan->n_prompt * (int64_t)sizeof *w->host_prompt, 0);
}

static int execute(struct engine *e, const struct step_plan *plan, int *flight) {
    comm_set_step(e->world, plan->input.step);
    if (plan->kind == PLAN_ADMIT)
        TRY(broadcast_admission(e, plan));
    return worker_execute(&e->worker, plan, flight);
}

/* Which flight the next plan with rows will use; its results must have been collected. */
static int lead(struct engine *e) {
    struct worker *w = &e->worker;
    struct scheduler_flight *f = &e->flights[w->flight];
    int flight = -1;
    if (e->flying[w->flight])
        TRY(collect(e, w->flight));
    if (!scheduler_plan(&e->scheduler, base_seconds(), &e->plan, f))
        return 0;
    if (e->plan.kind == PLAN_ADMIT) {
        const struct sequence *q = e->scheduler.slots[e->plan.seq];
        fill_params(q, w->host_params);
        memcpy(w->host_prompt, q->request.prompt, (size_t)q->request.n_prompt * sizeof *w->host_prompt);
    }
    TRY(comm_broadcast_idle(w->rank.replica, "plan", &e->plan, sizeof e->plan, 0));
    TRY(execute(e, &e->plan, &flight));
    if (flight >= 0)
        e->flying[flight] = true;
    return 1;
}

int engine_step(struct engine *e) {
    int led = lead(e);
    TRY(led);
    /* An asynchronous device computes the newest step while the next is planned; otherwise, or with nothing more to plan, take it in. */
    bool all = !backend_is_async(e->worker.rank.backend) || !led;
    for (int i = 0; i < WORKER_FLIGHTS; i++) {
        int flight = (e->worker.flight + i) % WORKER_FLIGHTS; /* oldest first */
        bool newest = i == WORKER_FLIGHTS - 1;
        if (e->flying[flight] && (all || !newest))
            TRY(collect(e, flight));
    }
    TRY(finish_scored(e));
    return scheduler_n_active(&e->scheduler) > 0;
}

int engine_follow(struct engine *e) {
    for (;;) {
        int flight;
        TRY(comm_broadcast_idle(e->worker.rank.replica, "plan", &e->plan, sizeof e->plan, 0));
        if (e->plan.kind == PLAN_STOP)
            return STATUS_OK;
        TRY(execute(e, &e->plan, &flight));
    }
}

int engine_stop(struct engine *e) {
    memset(&e->plan, 0, sizeof e->plan);
    e->plan.kind = PLAN_STOP;
    return comm_broadcast_idle(e->worker.rank.replica, "plan", &e->plan, sizeof e->plan, 0);
}
