/* The sampling operations run as the ranks of a job run them: the vocabulary cut into shards, the all-reduces and the gather done
 * here. Every buffer has guard bands and starts as poison, so what an operation writes beyond its rows or columns shows. */
#pragma once

#include <float.h>

#include "kernels/cpu/cpu.h"
#include "kernels/sampling.h"
#include "test.h"

enum {
    RIG_MAX_RANKS = 5,
    RIG_GUARD = 64, /* bytes on each side of a buffer */
    RIG_POISON = 0xa5,
};

struct rig_buffer {
    uint8_t *base;
    size_t bytes;
};

struct rig_rank {
    int64_t begin, count; /* of the vocabulary */
    struct rig_buffer logits, processed, words, max, state, bins, records, last_token, results, params;
};

struct rig {
    int n_ranks, n_logits, n_sample, n_seqs; /* sizes of the buffers */
    int64_t vocab;
    struct step_input *in;
    struct rig_rank rank[RIG_MAX_RANKS];
    struct sample_record *gathered;
};

static inline struct rig_buffer rig_buffer_new(size_t bytes) {
    struct rig_buffer b = {malloc(bytes + 2 * RIG_GUARD), bytes};
    if (!b.base)
        exit(1);
    memset(b.base, RIG_POISON, bytes + 2 * RIG_GUARD);
    return b;
}

static inline void *rig_data(struct rig_buffer b) { return b.base + RIG_GUARD; }

/* Checks the guards, and that nothing was written from byte `from` on. */
static inline void rig_check(struct rig_buffer b, size_t from, const char *what) {
    size_t bad = 0;
    for (size_t i = 0; i < RIG_GUARD; i++)
        bad += b.base[i] != RIG_POISON;
    for (size_t i = RIG_GUARD + from; i < b.bytes + 2 * RIG_GUARD; i++)
        bad += b.base[i] != RIG_POISON;
    CHECK(bad == 0, "%s: %zu bytes overwritten", what, bad);
}

/* Sizes of the buffers; the live counts in->n_logits and in->n_sample may be smaller. Bounds of shards are uneven on purpose. */
static inline void rig_open(struct rig *rig, int n_ranks, int64_t vocab, int n_logits, int n_sample, int n_seqs) {
    memset(rig, 0, sizeof *rig);
    rig->n_ranks = n_ranks, rig->vocab = vocab, rig->n_logits = n_logits, rig->n_sample = n_sample, rig->n_seqs = n_seqs;
    rig->in = calloc(1, sizeof *rig->in);
    rig->gathered = calloc((size_t)n_ranks * (size_t)n_logits, sizeof *rig->gathered);
    if (!rig->in || !rig->gathered)
        exit(1);
    int64_t begin = 0;
    for (int r = 0; r < n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        int64_t end = r == n_ranks - 1 ? vocab : vocab * (r + 1) / n_ranks + (r % 2 ? 3 : -2);
        end = max_i64(begin, min_i64(end, vocab));
        k->begin = begin, k->count = end - begin, begin = end;
        k->logits = rig_buffer_new((size_t)(n_logits * k->count) * sizeof(float));
        k->processed = rig_buffer_new((size_t)(n_sample * k->count) * sizeof(float));
        k->words = rig_buffer_new((size_t)(n_seqs * k->count) * sizeof(uint32_t));
        k->max = rig_buffer_new((size_t)n_sample * sizeof(float));
        k->state = rig_buffer_new((size_t)n_sample * sizeof(struct filter_state));
        k->bins = rig_buffer_new((size_t)n_sample * (FILTER_BINS + 1) * sizeof(uint64_t));
        k->records = rig_buffer_new((size_t)n_logits * sizeof(struct sample_record));
        k->last_token = rig_buffer_new((size_t)n_seqs * sizeof(int32_t));
        k->results = rig_buffer_new((size_t)n_logits * sizeof(struct sample_result));
        k->params = rig_buffer_new((size_t)n_seqs * sizeof(struct seq_params));
    }
}

static inline void rig_close(struct rig *rig) {
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        struct rig_buffer *all[] = {&k->logits, &k->processed, &k->words, &k->max, &k->state, &k->bins,
                                    &k->records, &k->last_token, &k->results, &k->params};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            free(all[i]->base);
    }
    free(rig->gathered);
    free(rig->in);
}

/* Row `row` of the logits, cut among the ranks. */
static inline void rig_set_logits(struct rig *rig, int row, const float *x) {
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        if (k->count)
            memcpy((float *)rig_data(k->logits) + row * k->count, x + k->begin, (size_t)k->count * sizeof *x);
    }
}

static inline struct seq_counts rig_counts(const struct rig_rank *k) {
    return (struct seq_counts){rig_data(k->words), k->begin, k->count};
}

static inline void rig_seq_begin(struct rig *rig, int seq, const struct seq_params *p, const int32_t *prompt, int64_t n_prompt) {
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        struct seq_begin_args args = {seq, p, rig_data(k->params), prompt, n_prompt, rig_counts(k)};
        cpu_seq_begin(&args);
    }
}

/* Logits entry i is row i, of slot `seq`, at this position. */
static inline void rig_set_row(struct rig *rig, int i, int seq, int32_t position, int32_t target) {
    rig->in->row[i] = (struct step_row){seq, -1, position, i};
    rig->in->logit[i] = (struct step_logit){i, target};
}

static inline struct seq_params rig_params_off(void) {
    struct seq_params p;
    memset(&p, 0, sizeof p);
    p.temperature = p.top_p = p.repetition_penalty = 1;
    return p;
}

static inline void rig_process(struct rig *rig) {
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        struct logits_process_args args = {rig->in, rig->n_sample, rig_data(k->params), rig_counts(k), rig_data(k->logits),
                                           rig_data(k->processed)};
        cpu_logits_process(&args);
    }
}

static inline void rig_filter_begin(struct rig *rig, bool find_max) {
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        struct filter_begin_args args = {rig->in, rig->n_sample, rig_data(k->params), k->count, rig_data(k->processed), find_max,
                                         rig_data(k->max), rig_data(k->state)};
        cpu_filter_begin(&args);
    }
}

static inline void rig_filter_round(struct rig *rig, int round) {
    size_t n_bins = (size_t)rig->in->n_sample * (FILTER_BINS + 1);
    uint64_t *sum = calloc(n_bins ? n_bins : 1, sizeof *sum);
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        struct filter_count_args args = {rig->in, rig->n_sample, round, k->count, rig_data(k->processed), rig_data(k->state),
                                         rig_data(k->bins)};
        cpu_filter_count(&args);
        for (size_t b = 0; b < n_bins; b++)
            sum[b] += ((uint64_t *)rig_data(k->bins))[b];
    }
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        memcpy(rig_data(k->bins), sum, n_bins * sizeof *sum);
        struct filter_narrow_args args = {rig->in, rig->n_sample, round, rig_data(k->params), rig_data(k->bins), rig_data(k->state)};
        cpu_filter_narrow(&args);
    }
    free(sum);
}

static inline void rig_filter(struct rig *rig) {
    rig_filter_begin(rig, true);
    for (int i = 0; i < rig->in->n_sample; i++) {
        float max = -INFINITY;
        for (int r = 0; r < rig->n_ranks; r++)
            max = fmaxf(max, ((float *)rig_data(rig->rank[r].max))[i]);
        for (int r = 0; r < rig->n_ranks; r++)
            ((float *)rig_data(rig->rank[r].max))[i] = max;
    }
    rig_filter_begin(rig, false);
    for (int round = 0; round < FILTER_ROUNDS; round++)
        rig_filter_round(rig, round);
}

static inline void rig_sample(struct rig *rig, bool filtered, bool top) {
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        struct sample_args args = {rig->in, rig->n_logits, rig->n_sample, filtered, top, rig_data(k->params), k->begin, k->count,
                                   rig_data(k->logits), rig_data(k->processed), rig_data(k->state), rig_data(k->records)};
        cpu_sample(&args);
        memcpy(rig->gathered + (int64_t)r * rig->n_logits, rig_data(k->records), k->records.bytes);
    }
    for (int r = 0; r < rig->n_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        struct sample_merge_args args = {rig->in, rig->n_logits, rig->n_sample, top, rig->n_ranks, rig->gathered,
                                         rig_data(k->last_token), rig_counts(k), rig_data(k->results)};
        cpu_sample_merge(&args);
    }
}

/* A step as the engine runs it. */
static inline void rig_step(struct rig *rig, bool filtered, bool top) {
    rig_process(rig);
    if (filtered)
        rig_filter(rig);
    rig_sample(rig, filtered, top);
}

static inline const struct sample_result *rig_result(const struct rig *rig, int row) {
    return (const struct sample_result *)rig_data(rig->rank[0].results) + row;
}

static inline const struct filter_state *rig_state(const struct rig *rig, int row) {
    return (const struct filter_state *)rig_data(rig->rank[0].state) + row;
}

/* The processed logit and the count word of one token, wherever it lies. */
static inline const struct rig_rank *rig_owner(const struct rig *rig, int64_t id) {
    int r = 0;
    while (id >= rig->rank[r].begin + rig->rank[r].count)
        r++;
    return &rig->rank[r];
}
static inline float rig_processed(const struct rig *rig, int row, int64_t id) {
    const struct rig_rank *k = rig_owner(rig, id);
    return ((const float *)rig_data(k->processed))[row * k->count + id - k->begin];
}
static inline uint32_t rig_word(const struct rig *rig, int seq, int64_t id) {
    const struct rig_rank *k = rig_owner(rig, id);
    return ((const uint32_t *)rig_data(k->words))[seq * k->count + id - k->begin];
}
static inline bool rig_allowed(const struct rig *rig, int row, int64_t id) {
    return sampling_image(rig_processed(rig, row, id)) >= rig_state(rig, row)->floor;
}

/* Logits like a model's, the same in tests/golden/sampling.py: most near 0, few up to 16; products of floats, left to right. */
static inline float rig_logit(uint64_t seed, uint64_t index) {
    float u = test_uniform(seed, index);
    return u * u * u * 16.0f;
}
