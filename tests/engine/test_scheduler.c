/* The scheduler's promises, checked by a model of what the ranks do with its plans: no slot and no page is promised twice, every sequence
 * ends, blocks are flushed exactly when a new one is needed, rows follow on each other, results belong to who asked. All small cases of two
 * sequences, then random crowds that arrive, stop and are cancelled at any moment, with results that come back late. */
#include "engine/scheduler.h"
#include "test.h"

enum { MOST_SEQS = 6, MOST_CP = 3, LAYERS = 3, CROWD = 24, VOCAB = 50, MOST_PROMPT = 700, PLANS = 200000 };

struct request { /* one sequence, from outside */
    int n_prompt, max_tokens, prompt_logprobs;
    enum engine_prefill prefill;
    int stop_after; /* ends after so many tokens; -1: at max_tokens */
    /* what came of it */
    int n_tokens, n_scores;
    bool cancelled, over;
    int64_t id;
};

struct slot { /* what the ranks know of one */
    bool used;
    struct sequence *sequence;
    int64_t length;       /* tokens stored */
    int64_t n_pages[MOST_CP];
    int next_layer;
    int64_t next_flush;   /* block */
};

struct model {
    struct scheduler s;
    struct request *requests;
    int n_requests;
    struct slot slot[MOST_SEQS];
    int64_t free_pages[MOST_CP];
    struct step_plan plan;
    struct scheduler_flight flights[2];
    bool flying[2];
    int turn;
    int admitted; /* slot whose exact prefill must come next; -1 */
};

static int32_t prompt_token(int request, int64_t i) { return (int32_t)(test_hash(8 + (uint64_t)request, (uint64_t)i) % VOCAB); }

static void add(struct model *m, int index) {
    struct request *r = &m->requests[index];
    struct sequence *q;
    int32_t *prompt;
    REQUIRE(base_alloc(&q, 1, sizeof *q));
    REQUIRE(base_alloc(&prompt, (size_t)r->n_prompt, sizeof *prompt));
    for (int i = 0; i < r->n_prompt; i++)
        prompt[i] = prompt_token(index, i);
    engine_request_init(&q->request);
    q->request.prompt = prompt;
    q->request.n_prompt = r->n_prompt;
    q->request.max_tokens = r->max_tokens;
    q->request.prompt_logprobs = r->prompt_logprobs;
    q->request.prefill = r->prefill;
    q->request.user = r;
    scheduler_add(&m->s, q);
    r->id = q->id;
    CHECK(scheduler_find(&m->s, q->id) == q, "sequence %lld", (long long)q->id);
}

/* ---- what plans must say --------------------------------------------------------------------------------------------------- */

static void take_page(struct model *m, struct slot *slot, int64_t block) {
    int cp = m->s.limits.cp_size, owner = (int)((block + slot->sequence->owner_offset) % cp);
    CHECK(block == slot->next_flush, "block %lld is flushed, %lld is the next", (long long)block, (long long)slot->next_flush);
    slot->next_flush++;
    slot->n_pages[owner]++;
    m->free_pages[owner]--;
    CHECK(m->free_pages[owner] >= 0, "rank %d has no page", owner);
}

static void check_release(struct model *m) {
    for (int i = 0; i < m->plan.n_release; i++) {
        struct slot *slot = &m->slot[m->plan.release[i]];
        CHECK(slot->used, "slot %d is released and free", m->plan.release[i]);
        for (int r = 0; r < m->s.limits.cp_size; r++)
            m->free_pages[r] += slot->n_pages[r];
        *slot = (struct slot){0};
    }
}

static void check_admit(struct model *m) {
    const struct step_plan *p = &m->plan;
    CHECK(p->seq >= 0 && p->seq < m->s.limits.max_seqs && !m->slot[p->seq].used, "slot %d is taken", p->seq);
    struct slot *slot = &m->slot[p->seq];
    *slot = (struct slot){.used = true, .sequence = m->s.slots[p->seq]};
    CHECK(slot->sequence->slot == p->seq && p->n_prompt == slot->sequence->request.n_prompt, "admission of slot %d", p->seq);
    if (m->s.limits.assume_prompts) { /* the last prompt token's row is still to come */
        slot->length = p->n_prompt - 1;
        for (int64_t block = 0; slot->length > 0 && block < cache_n_flushed(&m->s.limits.layout, slot->length - 1); block++)
            take_page(m, slot, block);
    }
    int offset = slot->sequence->owner_offset;
    CHECK(offset >= 0 && offset < m->s.limits.cp_size, "offset %d", offset);
    m->admitted = slot->sequence->state == SEQUENCE_LAYERS ? p->seq : -1;
}

static void check_layer(struct model *m) {
    const struct step_plan *p = &m->plan;
    struct slot *slot = &m->slot[p->seq];
    CHECK(slot->used && p->layer == slot->next_layer && p->n_prompt == slot->sequence->request.n_prompt, "layer %d of slot %d", p->layer, p->seq);
    slot->next_layer++;
    if (p->layer == 0) {
        for (int64_t block = 0; block < cache_n_flushed(&m->s.limits.layout, p->n_prompt - 1); block++)
            take_page(m, slot, block);
    }
    if (slot->next_layer == LAYERS)
        slot->length = p->n_prompt;
}

/* Rows that the workers' buffers hold. */
static int max_rows(const struct scheduler_limits *l) {
    return plan_bucket(l->chunk_rows > l->max_seqs ? l->chunk_rows : l->max_seqs);
}

/* Rows of one sequence from *i on: ascending, one block, with the flush that its first token brings. */
static void check_sequence_rows(struct model *m, int *i, int *n_flush) {
    const struct step_input *in = &m->plan.input;
    int first = *i;
    struct slot *slot = &m->slot[in->row[first].seq];
    CHECK(slot->used && slot->length == in->row[first].position, "row %d at position %d, %lld are stored", first, in->row[first].position,
          (long long)slot->length);
    const struct request *r = slot->sequence->request.user;
    int64_t block = in->row[first].position / KV_BLOCK, flush = block - 1 - m->s.limits.layout.window_blocks;
    if (in->row[first].position % KV_BLOCK == 0 && flush >= 0) {
        CHECK(*n_flush < in->n_flush && in->flush[*n_flush].seq == in->row[first].seq && in->flush[*n_flush].block == flush &&
                  m->plan.flush_offset[*n_flush] == slot->sequence->owner_offset, "position %d lacks its flush", in->row[first].position);
        (*n_flush)++;
        take_page(m, slot, flush);
    }
    for (; *i < in->n_rows && in->row[*i].seq == in->row[first].seq; (*i)++) {
        const struct step_row *row = &in->row[*i];
        CHECK(row->position == slot->length && row->position / KV_BLOCK == block && row->first == first, "row %d", *i);
        int32_t expected = slot->length < r->n_prompt ? prompt_token((int)(r - m->requests), slot->length) : -1;
        CHECK(row->token == expected, "row %d: token %d, expected %d", *i, row->token, expected);
        slot->length++;
    }
}

static void check_step(struct model *m) {
    const struct step_input *in = &m->plan.input;
    int n_flush = 0;
    bool seen[MOST_SEQS] = {false};
    CHECK(in->n_rows > 0 && in->n_rows <= max_rows(&m->s.limits) && m->plan.rows_bucket == plan_bucket(in->n_rows), "%d rows", in->n_rows);
    for (int i = 0; i < in->n_rows;) {
        CHECK(!seen[in->row[i].seq], "sequence %d comes twice", in->row[i].seq);
        seen[in->row[i].seq] = true;
        check_sequence_rows(m, &i, &n_flush);
    }
    CHECK(n_flush == in->n_flush, "%d flushes, expected %d", in->n_flush, n_flush);
    for (int i = in->n_rows; i < STEP_MAX_ROWS; i++)
        CHECK(in->row[i].seq == -1, "row %d is not padding", i);
}

static void check_logits(struct model *m, const struct scheduler_flight *f) {
    const struct step_input *in = &m->plan.input;
    bool sampled[MOST_SEQS] = {false};
    CHECK(in->n_logits == f->n_logits && in->n_sample == f->n_sample && in->n_sample <= in->n_logits && in->n_logits <= in->n_rows, "%d logits",
          in->n_logits);
    CHECK(m->plan.logits_bucket == plan_bucket(in->n_logits) && m->plan.sample_bucket == plan_bucket(in->n_sample), "buckets");
    for (int i = 0; i < in->n_logits; i++) {
        const struct step_row *row = &in->row[in->logit[i].row];
        const struct sequence *q = f->logit[i].sequence;
        const struct request *r = q->request.user;
        CHECK(q->slot == row->seq && f->logit[i].position == row->position, "logit %d is of another row", i);
        CHECK((i < in->n_sample) == (in->logit[i].target < 0) && f->logit[i].target == (in->logit[i].target >= 0), "logit %d: sampled rows come first", i);
        if (i < in->n_sample) {
            CHECK(!sampled[row->seq] && row->position >= r->n_prompt - 1, "slot %d is sampled at %d", row->seq, row->position);
            sampled[row->seq] = true;
        } else {
            CHECK(r->prompt_logprobs >= 0 && row->position + 1 < r->n_prompt &&
                      in->logit[i].target == prompt_token((int)(r - m->requests), row->position + 1), "target of logit %d", i);
        }
    }
}

/* ---- what the engine does with results --------------------------------------------------------------------------------------- */

static void end(struct model *m, struct sequence *q) {
    struct request *r = q->request.user;
    r->over = true;
    scheduler_end(&m->s, q, 1);
    scheduler_end(&m->s, q, 2); /* twice is once */
}

static void collect(struct model *m, int flight) {
    struct scheduler_flight *f = &m->flights[flight];
    if (!m->flying[flight])
        return;
    m->flying[flight] = false;
    for (int pass = 0; pass < 2; pass++) /* scores, then samples */
        for (int i = pass ? 0 : f->n_sample; i < (pass ? f->n_sample : f->n_logits); i++) {
            struct sequence *q = f->logit[i].sequence;
            struct request *r = q->request.user;
            q->n_in_flight--;
            if (q->state != SEQUENCE_OVER && !pass) {
                r->n_scores++;
            } else if (q->state != SEQUENCE_OVER) {
                r->n_tokens++;
                if (r->n_tokens == r->stop_after || r->n_tokens == r->max_tokens)
                    end(m, q);
            }
            scheduler_forget(&m->s, q);
        }
}

static void finish_scored(struct model *m) {
    struct sequence *next;
    for (struct sequence *q = m->s.first; q; q = next) {
        next = q->next;
        if (q->state == SEQUENCE_DECODE && q->request.max_tokens == 0 && q->n_in_flight == 0) {
            end(m, q);
            CHECK(scheduler_forget(&m->s, q), "a finished sequence stays");
        }
    }
}

static void cancel(struct model *m, struct request *r) {
    struct sequence *q = scheduler_find(&m->s, r->id);
    if (!q || q->state == SEQUENCE_OVER)
        return;
    r->cancelled = true;
    end(m, q);
    scheduler_forget(&m->s, q);
}

/* One turn of the engine; `late`: results are taken in a step later. Returns whether there was something to do. */
static bool turn(struct model *m, bool late) {
    collect(m, m->turn);
    struct scheduler_flight *f = &m->flights[m->turn];
    int begins = m->admitted;
    m->admitted = -1;
    bool led = scheduler_plan(&m->s, 0, &m->plan, f);
    if (led) {
        check_release(m);
        struct sequence *waits = begins >= 0 ? m->slot[begins].sequence : NULL;
        if (begins >= 0 && m->slot[begins].used && waits)
            CHECK(m->plan.kind == PLAN_PREFILL && m->plan.seq == begins, "an admitted prompt waits: kind %d", m->plan.kind);
        switch (m->plan.kind) {
        case PLAN_ADMIT:
            check_admit(m);
            break;
        case PLAN_PREFILL:
            check_layer(m);
            break;
        case PLAN_STEP:
            check_step(m);
            break;
        default:
            CHECK(m->plan.kind == PLAN_SCORE && m->slot[m->plan.seq].next_layer == LAYERS, "kind %d", m->plan.kind);
        }
        check_logits(m, f);
        if (f->n_logits) {
            m->flying[m->turn] = true;
            m->turn = !m->turn;
        }
    }
    collect(m, m->turn);
    if (!late || !led)
        collect(m, !m->turn);
    finish_scored(m);
    return led || scheduler_n_active(&m->s) > 0;
}

static void check_end(struct model *m) {
    memset(&m->plan, 0, sizeof m->plan);
    for (int i = 0; i < m->n_requests; i++) {
        const struct request *r = &m->requests[i];
        int expected = r->stop_after > 0 && r->stop_after < r->max_tokens ? r->stop_after : r->max_tokens;
        CHECK(r->over, "sequence %d did not end", i);
        if (r->cancelled)
            continue;
        CHECK(r->n_tokens == expected, "sequence %d: %d tokens, expected %d", i, r->n_tokens, expected);
        CHECK(r->n_scores == (r->prompt_logprobs >= 0 ? r->n_prompt - 1 : 0), "sequence %d: %d scores", i, r->n_scores);
    }
    CHECK(m->s.first == NULL && scheduler_n_active(&m->s) == 0, "sequences stay");
    for (int r = 0; r < m->s.limits.cp_size; r++)
        CHECK(m->s.reserved[r] == 0, "rank %d: %lld pages stay reserved", r, (long long)m->s.reserved[r]);
    for (int i = 0; i < m->s.limits.max_seqs; i++)
        CHECK(m->s.slots[i] == NULL, "slot %d stays", i);
}

static void model_init(struct model *m, struct scheduler_limits limits, struct request *requests, int n) {
    memset(m, 0, sizeof *m);
    limits.layout.cp_size = limits.cp_size;
    limits.n_layers = LAYERS;
    limits.exact_from = (limits.layout.window_blocks + 1) * KV_BLOCK;
    REQUIRE(scheduler_init(&m->s, &limits));
    m->requests = requests;
    m->n_requests = n;
    m->admitted = -1;
    for (int r = 0; r < limits.cp_size; r++)
        m->free_pages[r] = limits.n_pages;
}

/* ---- cases ------------------------------------------------------------------------------------------------------------------- */

/* Two sequences, everything around block borders, pools from too small on. */
static void check_pairs(void) {
    static const int prompts[] = {1, 127, 128, 129, 255, 256, 257, 384, 385}, tokens[] = {0, 1, 3};
    enum { KINDS = 9 * 3 * 2 };
    static struct model m;
    for (int cp = 1; cp <= MOST_CP; cp++)
        for (int n_pages = 0; n_pages <= 3; n_pages++)
            for (int pair = 0; pair < KINDS * KINDS; pair++) {
                struct request r[2];
                int kinds[] = {pair / KINDS, pair % KINDS}, n = 0;
                struct scheduler_limits limits = {.max_seqs = 2, .chunk_rows = 128, .cp_size = cp, .n_pages = n_pages,
                                                  .layout = {.window_blocks = pair % 3 % 2}};
                model_init(&m, limits, r, 2);
                for (int i = 0; i < 2; i++) {
                    struct request *q = &r[n];
                    *q = (struct request){.n_prompt = prompts[kinds[i] / 6], .max_tokens = tokens[kinds[i] % 3], .prompt_logprobs = i - 1,
                                          .prefill = (enum engine_prefill)(kinds[i] / 3 % 2), .stop_after = -1};
                    if (scheduler_could_hold(&m.s, q->n_prompt + q->max_tokens))
                        add(&m, n++);
                }
                m.n_requests = n;
                for (int i = 0; i < 1000 && turn(&m, pair & 1); i++)
                    ;
                check_end(&m);
                scheduler_deinit(&m.s);
            }
}

static int pick(uint64_t *state, int n) { return (int)(test_hash(99, (*state)++) % (uint64_t)n); }

static void check_crowd(uint64_t seed) {
    static struct model m;
    static struct request r[CROWD];
    static const int chunks[] = {1, 7, 128};
    uint64_t state = seed << 32;
    struct scheduler_limits limits = {.max_seqs = 1 + pick(&state, MOST_SEQS), .chunk_rows = chunks[pick(&state, 3)],
                                      .cp_size = 1 + pick(&state, MOST_CP), .n_pages = 3 + pick(&state, 5),
                                      .layout = {.window_blocks = pick(&state, 3)}, .random_offsets = pick(&state, 2), .seed = seed,
                                      .assume_prompts = pick(&state, 4) == 0};
    int added = 0, left = PLANS;
    bool busy = true;
    model_init(&m, limits, r, CROWD);
    while ((busy || added < CROWD) && left-- > 0) {
        if (added < CROWD && (!busy || pick(&state, 12) == 0)) {
            struct request *q = &r[added];
            *q = (struct request){.n_prompt = 1 + pick(&state, MOST_PROMPT), .max_tokens = pick(&state, 4) ? pick(&state, 200) : 0,
                                  .prompt_logprobs = limits.assume_prompts ? -1 : pick(&state, 3) - 1, .prefill = (enum engine_prefill)pick(&state, 2), .stop_after = -1};
            if (q->max_tokens > 1 && pick(&state, 2))
                q->stop_after = 1 + pick(&state, q->max_tokens);
            if (!scheduler_could_hold(&m.s, q->n_prompt + q->max_tokens))
                q->n_prompt = q->max_tokens = 1, q->stop_after = -1;
            add(&m, added++);
        }
        if (added > 0 && pick(&state, 60) == 0)
            cancel(&m, &r[pick(&state, added)]);
        busy = turn(&m, seed & 1);
    }
    CHECK(left > 0, "the crowd of seed %llu does not end", (unsigned long long)seed);
    check_end(&m);
    scheduler_deinit(&m.s);
}

/* Cancelled before every single turn of the same run, whatever it was doing. */
static void check_cancel(void) {
    static struct model m;
    for (int when = 0; when < 40; when++)
        for (int which = 0; which < 2; which++) {
            struct request r[] = {{.n_prompt = 300, .max_tokens = 5, .prompt_logprobs = 0, .stop_after = -1},
                                  {.n_prompt = 290, .max_tokens = 4, .prompt_logprobs = -1, .prefill = ENGINE_PREFILL_CACHED, .stop_after = -1}};
            struct scheduler_limits limits = {.max_seqs = 2, .chunk_rows = 128, .cp_size = 2, .n_pages = 2, .layout = {.window_blocks = 0}};
            model_init(&m, limits, r, 2);
            add(&m, 0);
            add(&m, 1);
            bool busy = true;
            for (int i = 0; i < 1000 && busy; i++) {
                if (i == when)
                    cancel(&m, &r[which]);
                busy = turn(&m, true);
            }
            check_end(&m);
            scheduler_deinit(&m.s);
        }
}

int main(void) {
    check_pairs();
    check_cancel();
    for (uint64_t seed = 1; seed <= 300; seed++)
        check_crowd(seed);
    return test_report();
}
