/* OpenAI's completions and chat completions: a JSON row in, engine requests, events in, a response object out. Knows no
 * files and no sockets: batch, generate --json and an HTTP server share it. INTERFACE.md, "Batch rows", is the contract.
 *
 *   struct openai_item   the JSON of one row and its name      openai_item_read
 *   struct openai_row    what it asks for, checked             openai_row_parse
 *   struct openai_answer what the engine says, choice by choice   openai_answer_new, _request, _add, _write
 *
 * A row that is wrong fails with STATUS_INPUT and a text that names the field, what was expected and what was given; any other
 * status is a failure of this process. */
#pragma once

#include "engine/engine.h"
#include "launch/json_text.h"

struct json_t;

enum openai_kind { OPENAI_COMPLETION, OPENAI_CHAT };

enum {
    OPENAI_MAX_TOP = 20,      /* alternatives beside a log-probability: OpenAI's limit for chat, here for both */
    OPENAI_MAX_BIAS = 300,    /* entries of logit_bias: OpenAI's limit */
    OPENAI_MAX_CHOICES = 128, /* n: OpenAI's limit */
    OPENAI_DIGEST_BYTES = 32,
    OPENAI_ID_BYTES = 20,     /* "kv-", 16 hex digits, NUL */
};

/* What rows are served with. Pointers are borrowed and outlive every row and answer. */
struct openai_context {
    const struct tokenizer *tokenizer; /* NULL: token ids only, and answers without text */
    const struct chat_template *chat;  /* NULL: chat rows are errors, for this reason: */
    char chat_error[512];
    const char *model;                 /* answered to a row that names none */
    int vocab;
    int64_t context;
    int n_stop;                        /* the model's end tokens */
    const int32_t *stop_id;
    const char *prefill;               /* default of rows that do not say: "exact", "cached"; NULL: by what they ask for */
    uint64_t seed;                     /* enters the seeds of rows that give none */
};
/* `prefill` and `seed`: the run's options. */
void openai_context_init(struct openai_context *context, const struct engine *engine, const char *prefill, uint64_t seed);

/* ---- rows ------------------------------------------------------------------------------------------------------------ */

struct openai_item {
    struct json_t *json; /* the row's object; NULL: the text is no JSON object, and `problem` says why */
    char *problem;
    char *custom_id;     /* the row's, or the name given by the caller: always there */
    uint8_t digest[OPENAI_DIGEST_BYTES]; /* SHA-256 of the row in canonical form (keys sorted, no spaces), custom_id included */
};
/* Reads one row. A wrong row is no error here: openai_row_parse tells. `name` is its custom_id if it has no usable one. */
int openai_item_read(const char *text, size_t bytes, const char *name, struct openai_item *out);
/* The same of a body that is at hand as a JSON object (whose reference count grows). */
int openai_item_wrap(struct json_t *body, const char *name, struct openai_item *out);
void openai_item_deinit(struct openai_item *item);
/* "kv-" and 16 hex digits of SHA-256(digest, settings): the same for one row under the same settings. */
void openai_id(const uint8_t digest[OPENAI_DIGEST_BYTES], const char *settings, char id[OPENAI_ID_BYTES]);

struct openai_row {
    enum openai_kind kind;
    char *model; /* NULL: not given */
    int32_t *prompt;
    int n_prompt;
    int n_added; /* leading tokens that the tokenizer added to a text prompt: not part of the echoed text */
    int n, max_tokens;
    float temperature, top_p, min_p;
    int top_k;
    float presence_penalty, frequency_penalty, repetition_penalty;
    /* A row without `seed` gets one from its digest and the run's seed: rows differ, a second run is equal to the first, and
     * another cache format sees the same random numbers. */
    uint64_t seed;
    int n_stop;
    char **stop;
    int n_stop_id; /* tokens that end a choice: the model's unless ignore_eos, and stop strings that are one special token */
    int32_t *stop_id;
    int n_bias;
    int32_t *bias_id;
    float *bias;
    int logprobs; /* alternatives; -1: no log-probabilities */
    bool echo, ignore_eos, return_token_ids;
    enum engine_prefill prefill;
};
/* On failure the row is empty and *code names the class of the error ("invalid_json", "invalid_request", "unknown_field",
 * "unsupported"); the text is base_error(). */
int openai_row_parse(const struct openai_item *item, const struct openai_context *context, struct openai_row *out,
                     const char **code);
void openai_row_deinit(struct openai_row *row);
/* Whether the prompt's tokens get log-probabilities. */
bool openai_row_scores_prompt(const struct openai_row *row);

/* ---- answers --------------------------------------------------------------------------------------------------------- */

struct openai_answer;

/* `row` and `context` outlive the answer. */
int openai_answer_new(const struct openai_row *row, const struct openai_context *context, struct openai_answer **out);
void openai_answer_free(struct openai_answer *answer);

/* Sequences to submit: one for each choice, but a single one when no token is to be generated. */
int openai_answer_n_sequences(const struct openai_answer *answer);
/* The request of sequence `choice`; pointers in it are the row's. The prompt is scored once, with choice 0. End tokens are left
 * to the answer (ignore_eos is always set): OpenAI lists and counts them, so arrays have one entry for each generated token. */
void openai_answer_request(const struct openai_answer *answer, int choice, struct engine_request *request);

struct openai_news {   /* what an event brought */
    const char *text;  /* text that is now final, `bytes` long; lives until the next event of the choice */
    size_t bytes;
    bool cancel;       /* the choice is complete: engine_cancel the sequence */
};
/* Takes an event of sequence `choice`. Events after the choice is complete are ignored, but for ENGINE_FINISHED's times. A
 * sequence that someone else cancelled is STATUS_INTERRUPTED. */
int openai_answer_add(struct openai_answer *answer, int choice, const struct engine_event *event, struct openai_news *news);

/* Whether every sequence has finished. */
bool openai_answer_done(const struct openai_answer *answer);
int64_t openai_answer_n_generated(const struct openai_answer *answer); /* over all choices so far, end tokens included */

/* Appends the completion or chat completion object of an answer that is done. `id`: "kv-...", made "cmpl-..." or "chatcmpl-...";
 * `created`: seconds since 1970. text_offset counts characters from the start of the choice's `text`. A token that is not UTF-8
 * by itself is written "bytes:\xe2\x80", as OpenAI does. */
int openai_answer_write(const struct openai_answer *answer, const char *id, int64_t created, struct json_text *out);
