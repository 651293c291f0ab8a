/* The short table at the end of `kvlinc generate`. */
#pragma once

#include <stdio.h>

#include "launch/run.h"

struct generate_times {
    double submitted, first, last; /* clock: requests in, first and last token out */
    double prefill_s;              /* summed over choices */
    int64_t n_tokens;              /* new tokens of all choices */
};
/* A token came out now. */
void generate_times_token(struct generate_times *times);

/* Ranks and layout, tokens and speed, and the cache as it is allocated, beside 16 bit. */
void generate_report(const struct run *run, int n_prompt, int n_choices, const struct generate_times *times, FILE *stream);
