/* JSON written straight into one growing buffer: an answer with a million log-probabilities takes its own length in memory,
 * not a tree of values. Values only: commas, brackets and names are the caller's (json_text_raw). Reading JSON is jansson's. */
#pragma once

#include "kernels/base.h"

struct json_text { /* zero it before use */
    char *text;    /* NUL-terminated once something was written */
    size_t bytes, capacity;
    int status;    /* the first failure (no memory): later calls do nothing */
};

void json_text_deinit(struct json_text *json);

void json_text_raw(struct json_text *json, const char *text);
/* Quoted and escaped; bytes that are not UTF-8 become U+FFFD. */
void json_text_string(struct json_text *json, const char *text, size_t bytes);
void json_text_escaped(struct json_text *json, const char *text, size_t bytes); /* without the quotes */
void json_text_int(struct json_text *json, int64_t value);
/* Nine digits: reads back as the same float, and equal floats are equal text. JSON has no infinity: -inf and NaN, which only a
 * token of probability 0 can have, become -9999. */
void json_text_logprob(struct json_text *json, float value);
void json_text_seconds(struct json_text *json, double value);
