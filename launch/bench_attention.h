/* What the files of `kvlinc bench attention` share: contents that are known on the host, so that any result can be checked there. */
#pragma once

#include "engine/cache_spec.h"
#include "launch/bench.h"

enum {
    ATTENTION_PAGES = 64,                              /* pages of different content, which all caches repeat */
    ATTENTION_TOKENS = ATTENTION_PAGES * KV_BLOCK,
    ATTENTION_WINDOW = 1,                              /* blocks beside the current one in 16 bit: window = 128 */
    ATTENTION_SLOTS = ATTENTION_WINDOW + 1,
    ATTENTION_FEATURES = 256,                          /* D of the correction */
};

#define ATTENTION_EXACT_CACHE "fp16" /* holds the contents as they are; always measured, and first */

struct attention_shape {
    int n_heads, n_kv_heads, head_dim;
    float scale;
};

/* Contents on the host (memory that the device copies from), the same for all caches. */
struct attention_data {
    struct attention_shape shape;
    uint16_t *kv;     /* [kv_head][K, V][ATTENTION_TOKENS][d], fp16 */
    uint16_t *window; /* [slot][kv_head][K, V][KV_BLOCK][d], fp16 */
    uint16_t *q;      /* [STEP_MAX_ROWS][n_heads][d], fp16 */
    float *states;    /* [kv_head][D * d + D] */
    float *phi;       /* [kv_head][2][d][D/2] */
    void *kv_device;  /* kv */
};

int attention_data_make(const struct bench *b, const struct attention_shape *shape, struct attention_data *out);
void attention_data_free(const struct bench *b, struct attention_data *data);

/* One cache's pages of these contents. */
struct attention_cache {
    char name[BENCH_CACHE_BYTES];
    struct page_format format;
    bool correction;
    int64_t page_bytes;
    uint8_t *pages;   /* device [ATTENTION_PAGES][page_bytes] */
    float *decoded;   /* host [ATTENTION_PAGES][kv_head][K, V][KV_BLOCK][d] */
};

/* `name`: a preset of caches in fp16, or bits such as k4v4. Errors: STATUS_USAGE. */
int attention_cache_parse(const char *name, const struct attention_shape *shape, struct attention_cache *out);
/* The first layer of a cache, its 16-bit blocks in fp16 whatever they are. */
void attention_cache_of(const char *name, const struct cache_spec *spec, const struct attention_shape *shape, struct attention_cache *out);
/* Encodes the contents, and decodes them for the check. */
int attention_cache_fill(const struct bench *b, const struct attention_data *data, struct attention_cache *cache);
void attention_cache_free(const struct bench *b, struct attention_cache *cache);

/* Timing of one cache: the last `rows` tokens (1, or a whole block of them, which ends at `tokens`) of each of n_seqs sequences, in one
 * launch; caches of the processor stay cold. What was timed is checked. */
struct attention_run {
    int n_seqs, rows;
    int64_t tokens;
    int repeats;   /* of a graph of launches, of which the median counts */
};
struct attention_time {
    double seconds, best; /* of one launch */
    double error;         /* of outputs, relative; the largest */
};
struct attention_times {
    bool fits;            /* false: nothing was run */
    int64_t bytes;        /* read by one launch, at least */
    struct attention_time whole, records; /* up to the output; only to the records of a rank */
};
int attention_cache_time(struct bench *b, const struct attention_data *data, const struct attention_cache *cache,
                         const struct attention_run *run, struct attention_times *out);

/* The parts of it. A graph of what `what` enqueues, replayed n times; whether so many bytes are free, else said; |got - expected| /
 * |expected| of vectors of d; an error if that is more than rounding. */
int attention_time_graph(const struct bench *b, int (*what)(void *), void *context, int n_launches, int n, struct attention_time *out);
bool attention_fits(const struct bench *b, int64_t bytes, const char *what, int batch, int64_t tokens);
double attention_difference(const float *got, const double *expected, int d);
int attention_judge(const char *name, double error, int64_t row, int head);

/* Prefill of each of b->prompts, rows of section `attention`. exact: in 16 bit, beside the library's; rate[i]: FLOP/s, 0 where it did not
 * fit. `cache` holds the contents in 16 bit. cached: the last block of a prompt in this cache, as a share of these rates. */
int attention_prefill_exact(struct bench *b, const struct attention_data *data, const struct attention_cache *cache, double *rate);
int attention_prefill_cached(struct bench *b, const struct attention_data *data, const struct attention_cache *cache, const double *rate);
/* One prompt, without rows; *fits as above. */
int attention_exact_time(struct bench *b, const struct attention_data *data, const float *decoded, int64_t tokens, bool *fits,
                         struct attention_time *out);
/* Floating-point operations of the prompt's attention: of all of it, or of its last `rows` rows. */
double attention_prefill_flop(const struct attention_shape *shape, int64_t tokens, int64_t rows);

/* What one row attends: how often each token of the contents, and which tokens of the window. */
struct attention_seen {
    double times[ATTENTION_TOKENS];
    int64_t window_begin, window_end; /* positions; empty without a window */
};

/* In double: out = sum of weights times V / sum of weights, the largest score, and the log of the sum of e^score. */
struct attention_answer {
    double out[KV_MAX_HEAD_DIM];
    double max, log_sum;
};
void attention_answer(const struct attention_data *data, const float *decoded, const struct attention_seen *seen, int64_t row, int head,
                      struct attention_answer *out);

/* The same for the correction: c_n[d] = phi(q) S, *c_d = phi(q) . P. */
void attention_correction(const struct attention_data *data, int64_t row, int head, double *c_n, double *c_d);
