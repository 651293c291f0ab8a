/* Rank 0's brain: which sequence is served next, and what the next plan says. Pure logic: no memory of the backend, no ranks, no clock but
 * the one it is given; tested by itself.
 *
 * Sequences wait in order. One is admitted when a slot is free and every cp rank has the pages that it can ever need, so nothing that runs
 * is ever pushed out. A decode step takes one row of every sequence that decodes; between two of them goes one piece of a prompt: a block of
 * tokens through the decode path, or one layer of an exact prefill. */
#pragma once

#include "engine/cache.h"
#include "engine/engine.h"

enum sequence_state {
    SEQUENCE_WAITING,
    SEQUENCE_ROWS,    /* prompt tokens go through the decode path, a block at most at a time */
    SEQUENCE_LAYERS,  /* exact prefill, layer by layer */
    SEQUENCE_SCORING, /* logits after exact prefill */
    SEQUENCE_DECODE,
    SEQUENCE_OVER,    /* finished or cancelled; kept until no step in flight names it */
};

struct sequence {
    struct sequence *next;
    int64_t id;
    struct engine_request request;   /* prompt and biases are owned copies */
    enum sequence_state state;
    int slot, owner_offset;
    int64_t n_done;                  /* tokens in the cache, planned steps included */
    int n_sampled, n_reported;       /* new tokens planned, and told to the user */
    int layer;                       /* next of exact prefill */
    int64_t n_score;                 /* rows already scored of exact prefill */
    int n_in_flight;                 /* steps with results not yet collected */
    bool prompt_told;
    float *scored_logprob;           /* [n_prompt], when the prompt is scored */
    int *scored_n_top;
    int32_t *scored_top_id;          /* [n_prompt][prompt_logprobs] */
    float *scored_top_logprob;
    double queued_at, admitted_at, prefilled_at, finished_at;
};

struct scheduler_limits {
    int max_seqs;                    /* slots */
    int chunk_rows;                  /* prompt tokens of a step at most */
    int n_layers, cp_size;
    struct cache_layout layout;      /* of any rank: window and cp */
    int64_t n_pages;                 /* of each rank */
    int64_t exact_from;              /* prompts of fewer tokens are exact on the decode path: nothing of them is flushed yet */
    bool assume_prompts;             /* all of a prompt but its last token counts as cached from the admission on */
    bool random_offsets;             /* tests: owner offsets also depend on `seed` */
    uint64_t seed;
};

struct scheduler {
    struct scheduler_limits limits;
    struct sequence *first;          /* in order of arrival */
    struct sequence **slots;         /* [max_seqs] */
    int64_t *reserved;               /* [cp_size] pages promised */
    int n_release;
    int32_t release[STEP_MAX_ROWS];
    int64_t next_id, step;
    bool prompt_turn;                /* a piece of a prompt comes before the next decode step */
    struct sequence *prefilling;     /* SEQUENCE_LAYERS or SEQUENCE_SCORING; one at a time */
};

/* What each logits row of a plan was for, kept until its results are there. */
struct scheduler_flight {
    int n_logits, n_sample;
    struct {
        struct sequence *sequence;
        int32_t position;            /* of the row */
        bool target;                 /* scores prompt token position + 1 */
    } logit[STEP_MAX_ROWS];
};

int scheduler_init(struct scheduler *scheduler, const struct scheduler_limits *limits);
void scheduler_deinit(struct scheduler *scheduler);

/* Takes over `sequence` (made by the caller, request checked) as the last in line. */
void scheduler_add(struct scheduler *scheduler, struct sequence *sequence);
struct sequence *scheduler_find(struct scheduler *scheduler, int64_t id);
/* Whether pages and slots could ever hold it. */
bool scheduler_could_hold(const struct scheduler *scheduler, int64_t n_tokens);
int scheduler_n_active(const struct scheduler *scheduler);

/* The next plan, or false when nothing can be done now. Fills `flight` for plans with logits. For PLAN_ADMIT the plan's seq is the slot. */
bool scheduler_plan(struct scheduler *scheduler, double now, struct step_plan *plan, struct scheduler_flight *flight);

/* The sequence is over: its slot is released with the next plan. */
void scheduler_end(struct scheduler *scheduler, struct sequence *sequence, double now);
/* Frees a sequence that is over and has nothing in flight; returns whether it did. */
bool scheduler_forget(struct scheduler *scheduler, struct sequence *sequence);
