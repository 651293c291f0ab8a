/* The fields of a row's body: one table of names, types, ranges and where the value goes; and the fields of OpenAI's that ask
 * for something we lack. Internal to openai_request.c. */
#pragma once

#include "launch/openai.h"

struct openai_reader { /* a row while it is read */
    const struct openai_context *context;
    struct openai_row *row;
    const char *code;             /* class of the error */
    const struct json_t *prompt, *messages; /* the body's, not yet looked into */
    int64_t max_tokens, max_completion_tokens, best_of, logprobs, top_logprobs; /* -1: not given */
    bool chat_logprobs, seeded;
    int64_t seed;
    const char *prefill;          /* NULL: not given */
};

/* Fills row and reader from `body`. null stands for a field's default. */
int openai_fields_read(struct openai_reader *reader, struct json_t *body);

/* "field: expected ..., got ...". `field` may be a path such as "messages[0].role". */
int openai_expected(const char *field, const char *expected, const struct json_t *got);
