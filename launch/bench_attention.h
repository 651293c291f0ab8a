/* What the files of `kvlinc bench attention` share: contents that are known on the host, so that any result can be checked there. */
#pragma once

#include "launch/bench.h"

enum {
    ATTENTION_PAGES = 64,                              /* pages of different content, which all caches repeat */
    ATTENTION_TOKENS = ATTENTION_PAGES * KV_BLOCK,
    ATTENTION_WINDOW = 1,                              /* blocks beside the current one in 16 bit: window = 128 */
    ATTENTION_SLOTS = ATTENTION_WINDOW + 1,
    ATTENTION_FEATURES = 256,                          /* D of the correction */
};

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
/* Encodes the contents, and decodes them for the check. */
int attention_cache_fill(const struct bench *b, const struct attention_data *data, struct attention_cache *cache);
void attention_cache_free(const struct bench *b, struct attention_cache *cache);

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
