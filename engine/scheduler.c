/* The scheduler's choices. Page accounts are exact: admission reserves what the longest outcome needs on every cp rank. */
#include "engine/scheduler.h"

#include <stdlib.h>
#include <string.h>

int scheduler_init(struct scheduler *s, const struct scheduler_limits *limits) {
    *s = (struct scheduler){.limits = *limits, .next_id = 1};
    int status = base_alloc(&s->slots, (size_t)limits->max_seqs, sizeof *s->slots);
    if (status == STATUS_OK)
        status = base_alloc(&s->reserved, (size_t)limits->cp_size, sizeof *s->reserved);
    if (status < 0)
        scheduler_deinit(s);
    return status;
}

static void free_sequence(struct sequence *q) {
    free((void *)(uintptr_t)q->request.prompt);
    free((void *)(uintptr_t)q->request.bias_id);
    free((void *)(uintptr_t)q->request.bias);
    free(q->scored_logprob);
    free(q->scored_n_top);
    free(q->scored_top_id);
    free(q->scored_top_logprob);
    free(q);
}

void scheduler_deinit(struct scheduler *s) {
    while (s->first) {
        struct sequence *q = s->first;
        s->first = q->next;
        free_sequence(q);
    }
    free(s->slots);
    free(s->reserved);
    *s = (struct scheduler){0};
}

void scheduler_add(struct scheduler *s, struct sequence *q) {
    struct sequence **at = &s->first;
    while (*at)
        at = &(*at)->next;
    q->next = NULL;
    q->id = s->next_id++;
    q->slot = -1;
    q->state = SEQUENCE_WAITING;
    *at = q;
}

struct sequence *scheduler_find(struct scheduler *s, int64_t id) {
    struct sequence *q = s->first;
    while (q && q->id != id)
        q = q->next;
    return q;
}

int scheduler_n_active(const struct scheduler *s) {
    int n = 0;
    for (const struct sequence *q = s->first; q; q = q->next)
        n += q->state != SEQUENCE_OVER;
    return n;
}

/* Tokens in the cache when the last new token has been sampled: that one is never stored. */
static int64_t most_tokens(const struct sequence *q) {
    return q->request.n_prompt + max_i64(0, (int64_t)q->request.max_tokens - 1);
}

/* Pages on cp rank `rank` of a sequence of n tokens with this owner offset. */
static int64_t pages_on(const struct scheduler *s, int rank, int64_t n_tokens, int offset) {
    struct cache_layout layout = s->limits.layout;
    layout.cp_rank = rank;
    return cache_pages_for_offset(&layout, n_tokens, offset);
}

bool scheduler_could_hold(const struct scheduler *s, int64_t n_tokens) {
    return pages_on(s, 0, n_tokens, 0) <= s->limits.n_pages; /* the owner of block 0 has the most */
}

static bool offset_fits(const struct scheduler *s, const struct sequence *q, int offset) {
    for (int rank = 0; rank < s->limits.cp_size; rank++)
        if (s->reserved[rank] + pages_on(s, rank, most_tokens(q), offset) > s->limits.n_pages)
            return false;
    return true;
}

/* The owner offset follows from the prompt alone, so that a request's sums are added in the same order in every run, whatever runs beside
 * it. Blocks go round the ranks: between two offsets no rank's load differs by more than a block. Where the pages do not allow it, the
 * first offset that fits; -1 when none does. */
static int choose_offset(const struct scheduler *s, const struct sequence *q) {
    uint64_t hash = BASE_HASH;
    for (int i = 0; i < q->request.n_prompt; i++)
        hash = base_hash(hash, (uint32_t)q->request.prompt[i]);
    if (s->limits.random_offsets)
        hash = base_hash(hash, s->limits.seed);
    int cp = s->limits.cp_size, wanted = (int)((hash >> 32) % (uint64_t)cp);
    for (int i = 0; i < cp; i++)
        if (offset_fits(s, q, (wanted + i) % cp))
            return (wanted + i) % cp;
    return -1;
}

static int free_slot(const struct scheduler *s) {
    for (int i = 0; i < s->limits.max_seqs; i++)
        if (!s->slots[i])
            return i;
    return -1;
}

static void reserve(struct scheduler *s, const struct sequence *q, int sign) {
    for (int rank = 0; rank < s->limits.cp_size; rank++)
        s->reserved[rank] += sign * pages_on(s, rank, most_tokens(q), q->owner_offset);
}

void scheduler_end(struct scheduler *s, struct sequence *q, double now) {
    if (q->state == SEQUENCE_OVER)
        return;
    if (q->slot >= 0) {
        s->release[s->n_release++] = q->slot;
        s->slots[q->slot] = NULL;
        reserve(s, q, -1);
    }
    if (s->prefilling == q)
        s->prefilling = NULL;
    q->state = SEQUENCE_OVER;
    q->finished_at = now;
}

bool scheduler_forget(struct scheduler *s, struct sequence *q) {
    if (q->state != SEQUENCE_OVER || q->n_in_flight > 0)
        return false;
    struct sequence **at = &s->first;
    while (*at != q)
        at = &(*at)->next;
    *at = q->next;
    free_sequence(q);
    return true;
}

/* ---- plans --------------------------------------------------------------------------------------------------------- */

static bool is_exact_by_layers(const struct scheduler *s, const struct sequence *q) {
    return !s->limits.assume_prompts && q->request.prefill == ENGINE_PREFILL_EXACT && q->request.n_prompt > s->limits.exact_from;
}

static bool plan_admit(struct scheduler *s, double now, struct step_plan *plan) {
    struct sequence *q = s->first;
    while (q && q->state != SEQUENCE_WAITING)
        q = q->next;
    if (!q || (is_exact_by_layers(s, q) && s->prefilling))
        return false;
    int slot = free_slot(s), offset = choose_offset(s, q);
    if (slot < 0 || offset < 0)
        return false;
    q->slot = slot;
    q->owner_offset = offset;
    q->admitted_at = now;
    s->slots[slot] = q;
    reserve(s, q, 1);
    if (is_exact_by_layers(s, q)) {
        q->state = SEQUENCE_LAYERS;
        s->prefilling = q;
    } else {
        q->state = SEQUENCE_ROWS;
        q->n_done = s->limits.assume_prompts ? q->request.n_prompt - 1 : 0;
    }
    plan->kind = PLAN_ADMIT;
    plan->seq = slot;
    plan->n_prompt = q->request.n_prompt;
    return true;
}

static void add_flush(struct step_plan *plan, const struct sequence *q, int64_t block) {
    struct step_input *in = &plan->input;
    plan->flush_offset[in->n_flush] = q->owner_offset;
    in->flush[in->n_flush++] = (struct step_flush){q->slot, (int32_t)block, -1, -1};
}

/* Rows for the tokens at q->n_done .. +n-1, with the flush that their block's first token brings. */
static int add_rows(struct scheduler *s, struct step_plan *plan, struct sequence *q, int n, bool sampled_token) {
    struct step_input *in = &plan->input;
    int first = in->n_rows;
    int64_t block = q->n_done / KV_BLOCK - 1 - s->limits.layout.window_blocks;
    if (q->n_done % KV_BLOCK == 0 && block >= 0)
        add_flush(plan, q, block);
    for (int i = 0; i < n; i++)
        in->row[in->n_rows++] = (struct step_row){.seq = q->slot,
                                                  .token = sampled_token ? -1 : q->request.prompt[q->n_done + i],
                                                  .position = (int32_t)(q->n_done + i),
                                                  .first = first};
    return first;
}

/* Logits of the step are collected in two lists, since sampled rows come first. */
struct wanted {
    int n_sample, n_target;
    struct {
        struct sequence *sequence;
        int32_t row, position, target;
    } sample[STEP_MAX_ROWS], score[STEP_MAX_ROWS];
};

static void want(struct wanted *w, struct sequence *q, int row, int64_t position, bool sample) {
    int64_t next = position + 1;
    bool scores = q->request.prompt_logprobs >= 0 && next < q->request.n_prompt;
    if (sample) {
        w->sample[w->n_sample].sequence = q;
        w->sample[w->n_sample].row = row;
        w->sample[w->n_sample].target = -1;
        w->sample[w->n_sample++].position = (int32_t)position;
        q->n_sampled++;
    } else if (scores) {
        w->score[w->n_target].sequence = q;
        w->score[w->n_target].row = row;
        w->score[w->n_target].target = q->request.prompt[next];
        w->score[w->n_target++].position = (int32_t)position;
    }
}

static enum plan_filters filters_of(const struct engine_request *r) {
    if (!(r->temperature > 0))
        return PLAN_FILTERS_NONE;
    return r->top_k > 0 ? PLAN_FILTERS_COUNT : r->top_p < 1 || r->min_p > 0 ? PLAN_FILTERS_MASS : PLAN_FILTERS_NONE;
}

static void put_logit(struct step_plan *plan, struct scheduler_flight *flight, struct sequence *q, int32_t row, int32_t position,
                      int32_t target) {
    int i = plan->input.n_logits++;
    const struct engine_request *r = &q->request;
    plan->input.logit[i] = (struct step_logit){row, target};
    plan->top |= target >= 0 ? r->prompt_logprobs > 0 : r->logprobs > 0;
    flight->logit[i].sequence = q;
    flight->logit[i].position = position;
    flight->logit[i].target = target >= 0;
    q->n_in_flight++;
}

static void finish_logits(struct step_plan *plan, struct scheduler_flight *flight, const struct wanted *w) {
    struct step_input *in = &plan->input;
    for (int i = 0; i < w->n_sample; i++) {
        put_logit(plan, flight, w->sample[i].sequence, w->sample[i].row, w->sample[i].position, w->sample[i].target);
        plan->filters = (int32_t)max_i64(plan->filters, filters_of(&w->sample[i].sequence->request));
    }
    for (int i = 0; i < w->n_target; i++)
        put_logit(plan, flight, w->score[i].sequence, w->score[i].row, w->score[i].position, w->score[i].target);
    in->n_sample = flight->n_sample = w->n_sample;
    flight->n_logits = in->n_logits;
    plan->logits_bucket = plan_bucket(in->n_logits);
    plan->sample_bucket = plan_bucket(in->n_sample);
    for (int i = in->n_rows; i < STEP_MAX_ROWS; i++)
        in->row[i] = (struct step_row){-1, -1, 0, i};
    for (int i = in->n_logits; i < STEP_MAX_ROWS; i++)
        in->logit[i] = (struct step_logit){0, -1};
}

static void finish_step(struct step_plan *plan, struct scheduler_flight *flight, const struct wanted *w) {
    plan->kind = PLAN_STEP;
    plan->rows_bucket = plan_bucket(plan->input.n_rows);
    finish_logits(plan, flight, w);
}

static bool samples_after_prompt(const struct sequence *q) { return q->request.max_tokens > 0; }

/* One row of every sequence that decodes. */
static bool plan_decode(struct scheduler *s, struct step_plan *plan, struct scheduler_flight *flight) {
    struct wanted w;
    w.n_sample = w.n_target = 0;
    for (struct sequence *q = s->first; q; q = q->next)
        if (q->state == SEQUENCE_DECODE && q->n_sampled < q->request.max_tokens) {
            int row = add_rows(s, plan, q, 1, true);
            want(&w, q, row, q->n_done, true);
            q->n_done++;
        }
    if (plan->input.n_rows == 0)
        return false;
    finish_step(plan, flight, &w);
    return true;
}

/* The next prompt tokens of one sequence, a block at most. */
static void plan_chunk(struct scheduler *s, struct step_plan *plan, struct scheduler_flight *flight, struct sequence *q) {
    struct wanted w;
    w.n_sample = w.n_target = 0;
    int64_t left = q->request.n_prompt - q->n_done;
    int n = (int)min_i64(min_i64(left, KV_BLOCK - q->n_done % KV_BLOCK), s->limits.chunk_rows);
    int first = add_rows(s, plan, q, n, false);
    for (int i = 0; i < n; i++) {
        bool last = q->n_done + i == q->request.n_prompt - 1;
        want(&w, q, first + i, q->n_done + i, last && samples_after_prompt(q));
    }
    q->n_done += n;
    if (q->n_done == q->request.n_prompt)
        q->state = SEQUENCE_DECODE;
    finish_step(plan, flight, &w);
}

/* Logits after exact prefill: all rows when the prompt is scored, else the last. */
static void plan_score(struct scheduler *s, struct step_plan *plan, struct scheduler_flight *flight, struct sequence *q) {
    struct wanted w;
    w.n_sample = w.n_target = 0;
    int64_t n = q->request.n_prompt;
    if (q->request.prompt_logprobs < 0)
        q->n_score = n - 1;
    int count = (int)min_i64(n - q->n_score, s->limits.chunk_rows);
    plan->kind = PLAN_SCORE;
    plan->seq = q->slot;
    plan->first = (int32_t)q->n_score;
    for (int i = 0; i < count; i++) {
        int64_t position = q->n_score + i;
        plan->input.row[i] = (struct step_row){q->slot, q->request.prompt[position], (int32_t)position, 0};
        want(&w, q, i, position, position == n - 1 && samples_after_prompt(q));
    }
    plan->input.n_rows = count;
    finish_logits(plan, flight, &w);
    q->n_score += count;
    if (q->n_score == n) {
        q->n_done = n;
        q->state = SEQUENCE_DECODE;
        s->prefilling = NULL;
    }
}

static void plan_layer(struct scheduler *s, struct step_plan *plan, struct sequence *q) {
    plan->kind = PLAN_PREFILL;
    plan->seq = q->slot;
    plan->n_prompt = q->request.n_prompt;
    plan->layer = q->layer++;
    if (q->layer == s->limits.n_layers)
        q->state = SEQUENCE_SCORING;
}

/* The next piece of the first prompt in line. */
static bool plan_prompt(struct scheduler *s, struct step_plan *plan, struct scheduler_flight *flight) {
    struct sequence *q = s->first;
    while (q && q->state != SEQUENCE_ROWS && q != s->prefilling)
        q = q->next;
    if (!q)
        return false;
    if (q->state == SEQUENCE_ROWS)
        plan_chunk(s, plan, flight, q);
    else if (q->state == SEQUENCE_LAYERS)
        plan_layer(s, plan, q);
    else
        plan_score(s, plan, flight, q);
    return true;
}

/* Prompts and decoding take turns. They are never mixed in one step: the rows that a request's numbers are computed with are then the same
 * whatever else is running, and so are its results (up to the batch from which matmul takes another way). */
bool scheduler_plan(struct scheduler *s, double now, struct step_plan *plan, struct scheduler_flight *flight) {
    memset(plan, 0, sizeof *plan);
    flight->n_logits = flight->n_sample = 0;
    /* A prompt that was just admitted is still in the workers' buffers: its exact prefill begins before another admission. */
    bool begins = s->prefilling && s->prefilling->state == SEQUENCE_LAYERS && s->prefilling->layer == 0;
    bool found = begins;
    if (begins)
        plan_layer(s, plan, s->prefilling);
    if (!found)
        found = plan_admit(s, now, plan);
    if (!found && s->prompt_turn) {
        found = plan_prompt(s, plan, flight);
        s->prompt_turn = false;
    }
    if (!found && plan_decode(s, plan, flight)) {
        found = true;
        s->prompt_turn = true;
    }
    if (!found)
        found = plan_prompt(s, plan, flight);
    if (!found)
        return false;
    plan->input.step = s->step++;
    plan->n_release = s->n_release;
    memcpy(plan->release, s->release, (size_t)s->n_release * sizeof *s->release);
    s->n_release = 0;
    return true;
}
