/* Cuts text into the pieces that are merged apart: a sequence of rules, each a regex whose matches, and the text between
 * them, become pieces of their own for the next rule. Also the byte-level alphabet in which vocabularies are written. */
#pragma once

#include "kernels/base.h"

/* A new rule is a value here and a row in pretokenize.c. */
enum pretokenize_rule {
    PRETOKENIZE_DIGITS,     /* every numeric character by itself */
    PRETOKENIZE_DIGIT_RUNS, /* runs of numeric characters */
    PRETOKENIZE_GPT2,
    PRETOKENIZE_LLAMA3,
    PRETOKENIZE_QWEN2,
};

enum { PRETOKENIZE_MAX_RULES = 8 };

/* A name that stays the same from version to version: it enters the tokenizer's hash. */
const char *pretokenize_rule_name(enum pretokenize_rule rule);

/* The rule whose regex a tokenizer.json writes like this; -1 if it is not a known one. */
int pretokenize_find_regex(const char *regex);

struct pretokenizer;

int pretokenizer_new(const enum pretokenize_rule *rules, int n_rules, struct pretokenizer **out);
void pretokenizer_free(struct pretokenizer *pretokenizer);

/* Working memory of one caller. */
struct pretokenizer_work;
int pretokenizer_work_new(const struct pretokenizer *pretokenizer, struct pretokenizer_work **out);
void pretokenizer_work_free(struct pretokenizer_work *work);

/* Gets the pieces in order; a negative status ends the run and is returned. */
struct pretokenizer_sink {
    int (*add)(void *context, const char *piece, size_t bytes);
    void *context;
};

/* `text` is valid UTF-8. */
int pretokenizer_run(const struct pretokenizer *pretokenizer, struct pretokenizer_work *work, const char *text,
                     size_t bytes, const struct pretokenizer_sink *sink);

/* The character that stands for a byte: UTF-8, NUL-terminated, at most two bytes; returns its length. */
size_t pretokenize_byte_char(uint8_t byte, char character[3]);

/* Bytes that `text`, written in the byte-level alphabet, stands for: out has room for `bytes`. False when a character is
 * not of the alphabet. */
bool pretokenize_bytes(const char *text, size_t bytes, char *out, size_t *out_bytes);
