/* What an answer holds while it grows, shared by openai_answer.c (events in) and openai_response.c (JSON out). */
#pragma once

#include "engine/text_stream.h"
#include "launch/openai.h"

struct answer_token {
    int32_t id;
    float logprob;
    int n_top;
    size_t top; /* where its alternatives begin in the list's arrays */
};

struct answer_tokens { /* kept small: a prompt may have a million */
    struct answer_token *token;
    size_t n, capacity;
    int32_t *top_id;
    float *top_logprob;
    size_t n_top, top_capacity;
};

struct answer_choice {
    struct text_stream *stream; /* NULL: no tokenizer */
    struct answer_tokens tokens;
    bool cut;                   /* a stop string was met: tokens beyond the text are not listed */
    bool ended;                 /* by an end token */
    bool finished;              /* the engine has said its last word */
    enum engine_finish finish;
    double queued_s, prefill_s, decode_s;
};

struct openai_answer {
    const struct openai_row *row;
    const struct openai_context *context;
    int n_sequences, n_finished;
    struct answer_choice *choice; /* [n_sequences] */
    struct answer_tokens prompt;  /* scored */
    bool scored_cached;
};
