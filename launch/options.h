/* The options of every command: one table (option_table.c) that parses the command line and config files, checks values,
 * and prints --help. Owns struct options; what a layer list or a layout means is the engine's to check.
 *
 * A value on the command line wins over the same name in the config file, which wins over the default. A file may hold
 * options of other commands (one file for a site or for a cache setting); on the command line they are an error. */
#pragma once

#include "engine/engine.h"

enum options_command { /* a bit for each command that takes options */
    OPTIONS_GENERATE = 1,
    OPTIONS_BATCH = 2,
    OPTIONS_INSPECT = 4,
    OPTIONS_BENCH = 8,
    OPTIONS_PLAN = 16,
};

enum { OPTIONS_MAX_STOP = 16, OPTIONS_MAX_TABLE = 80 };

/* Fields beyond engine_options, as the user gave them. `given` tells a value from a default where that matters. */
struct options {
    struct engine_options engine;
    double deadline;
    const char *config;
    bool help, verbose, quiet, json;

    /* generate: what a row's body says for batch */
    const char *prompt, *prompt_file, *system;
    bool chat;
    const char *prefill; /* "exact", "cached"; NULL: exact, cached where prompt tokens are scored */
    int max_tokens, n, top_k, logprobs, n_stop;
    float temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
    uint64_t seed;
    const char *stop[OPTIONS_MAX_STOP];
    const char *logit_bias; /* "id:bias,..." */
    bool ignore_eos, return_token_ids, echo;

    /* batch */
    const char *input, *output;
    bool retry_errors;

    /* inspect */
    int ranks;
    bool tensors;

    /* bench */
    const char *what, *contexts, *prompts, *batches, *caches, *csv;
    int repeats, steps, heads, kv_heads, head_dim;
    bool profile, random_weights;

    /* plan */
    const char *rates, *cluster;
    int gpus, features;

    bool given[OPTIONS_MAX_TABLE]; /* by row of the table: options_given() */
    char *file_text;               /* the config file's text; values point into it */
};

/* Parses what follows the command's name. With `help` set nothing else was checked. Values point into `argv` and into
 * memory of `out`, which options_free releases (also after an error). Errors: STATUS_USAGE (command line), STATUS_INPUT (config
 * file: path and line). */
int options_parse(enum options_command command, int argc, char **argv, struct options *out);
void options_free(struct options *options);

/* Whether the user gave the option of this name, on the command line or in the config file. */
bool options_given(const struct options *options, const char *name);

/* "8G" to bytes: digits, at most one decimal fraction, then nothing, K, M, G or T (powers of 1024). STATUS_USAGE. */
int options_parse_size(const char *text, int64_t *bytes);

const char *options_command_name(enum options_command command);

/* The text of `kvlinc COMMAND --help`; malloced, NULL without memory. */
char *options_help(enum options_command command, const char *about);
