/* From logits to tokens, the GPU against the CPU: every operation on the same inputs (the CPU's records go to both sides before they are
 * merged; all else is exact).
 *
 * Exact: processed logits, maxima, filter states, histograms, lists of the best, counts, last tokens. Two things are computed in another
 * order or by another logarithm:
 *  - The sum of exponentials: n positive terms in double, so both sides are within (n + 20) 2^-53 of the true sum, n < 2^19 here. Values
 *    that near to each other round to the same float or to neighbours.
 *  - The noise: both logarithms are within one unit in the last place, the noise below 37 differs by less than 2^-45, and so do keys before
 *    they are rounded to float. Hence the same float, neighbours, or (near 0) a difference of 2^-45. The token is the same, unless the
 *    CPU's key of the GPU's token is within two units of its best key. */
#include "kernels/sampling.h"
#include "tests/kernels/cuda_rig.h"

enum { MAX_SHARDS = 4, MAX_PROMPT = 500, SPARE_SLOTS = 3 };

struct shape {
    int n_shards;
    int64_t count[MAX_SHARDS];
    int n_logits, live_logits, n_sample, live_sample;
    int n_steps; /* every other one with filters, beginning with the first */
};

struct shard {
    int64_t begin, count;
    struct twin logits, processed, words, max, bins, state, records, last_token, results;
};

struct trial {
    struct rig rig;
    const struct shape *shape;
    int number, step; /* of the shape; for messages */
    int64_t vocab;
    int n_slots;
    struct step_input *in;
    struct twin input, params, gathered;
    struct shard shard[MAX_SHARDS];
};

static const char *label(const struct trial *t, int s, const char *op, int round) {
    static char text[160];
    snprintf(text, sizeof text, "shape %d, step %d, shard %d of %lld from %lld: %s %d", t->number, t->step, s, (long long)t->shard[s].count,
             (long long)t->shard[s].begin, op, round);
    return text;
}

static void *new_bytes(size_t bytes) {
    void *p = malloc(bytes + 1);
    if (!p)
        exit(1);
    memset(p, 0xff, bytes + 1);
    return p;
}

#define AGAIN(name)                                                                  \
    static int again_##name(struct stream *stream, const void *args) { return op_##name(stream, args); }
AGAIN(logits_process)
AGAIN(filter_begin)
AGAIN(filter_count)
AGAIN(filter_narrow)
AGAIN(sample)
AGAIN(sample_merge)
AGAIN(seq_begin)

/* Launches on both sides: args is an array of RIG_SIDES. */
#define LAUNCH(name, args)                                                           \
    for (int side_ = 0; side_ < RIG_SIDES; side_++)                                  \
        REQUIRE(op_##name(t->rig.stream[side_], &(args)[side_]))

/* ---- inputs ------------------------------------------------------------------------------------------------------ */

enum { N_KINDS = 10, N_PARAMS = 16 };

/* Logit `id` of a row of this kind. */
static float logit_of(int kind, uint64_t seed, int64_t id) {
    const float u = test_uniform(seed, (uint64_t)id);
    switch (kind) {
    case 0: return u * u * u * 16;
    case 1: return test_normal(seed, (uint64_t)id) * 3 - 12; /* one octave holds most tokens */
    case 2: return id % 50 == 33 ? 2 : (float)(id % 2);     /* ties */
    case 3: return 1.5f;
    case 4: return id % 2 ? NAN : -INFINITY;
    case 5: return id == 700 ? -1e38f : -INFINITY;
    case 6: return id % 331 == 31 ? INFINITY : id % 5 == 3 ? NAN : u;
    case 7: return (float)id * 0.001f; /* ascending */
    case 8: return u * 3.4e38f;
    default: return id % 3 == 0 ? -0.0f : id % 3 == 1 ? u * 1e-40f : -INFINITY; /* zeros and subnormals */
    }
}

static struct seq_params params_of(int slot, int64_t vocab) {
    static const struct seq_params sets[N_PARAMS] = {
        {.temperature = 0, .top_p = 1, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1},
        {.temperature = 0.7f, .top_p = 1, .repetition_penalty = 1, .top_k = 1},
        {.temperature = 1.3f, .top_p = 0.9f, .repetition_penalty = 1, .top_k = 50},
        {.temperature = 1, .top_p = 0.5f, .repetition_penalty = 1, .top_k = INT32_MAX},
        {.temperature = 2, .top_p = 0, .repetition_penalty = 1},
        {.temperature = 0.3f, .top_p = 0.999999f, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .min_p = 0.1f},
        {.temperature = 1, .top_p = 1e-7f, .repetition_penalty = 1, .min_p = 1},
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .min_p = 1e-30f, .top_k = 1000},
        {.temperature = 0, .top_p = 0.5f, .repetition_penalty = 1.3f, .frequency_penalty = 0.5f, .n_bias = 3},
        {.temperature = 1, .top_p = 0.95f, .repetition_penalty = 1.1f, .presence_penalty = 0.4f, .n_bias = STEP_MAX_BIAS},
        {.temperature = 1e-5f, .top_p = 1, .repetition_penalty = 1, .n_bias = STEP_MAX_BIAS},
        {.temperature = 0.9f, .top_p = 0.8f, .repetition_penalty = 0.8f, .frequency_penalty = -1, .presence_penalty = -2, .min_p = 0.01f},
        {.temperature = 100, .top_p = 1, .repetition_penalty = 1, .frequency_penalty = 2},
        {.temperature = NAN, .top_p = NAN, .repetition_penalty = 1, .top_k = 7, .n_bias = 1},
    };
    struct seq_params p = sets[slot % N_PARAMS];
    p.owner_offset = slot;
    p.seed = test_hash(50, (uint64_t)slot);
    p.choice = slot % 3;
    p.n_bias = (int32_t)min_i64(p.n_bias, vocab);
    for (int b = 0; b < STEP_MAX_BIAS; b++) { /* -1: what lies beyond n_bias must not be read */
        p.bias_id[b] = b < p.n_bias ? (int32_t)(b * (vocab / max_i64(p.n_bias, 1))) : -1;
        p.bias[b] = b < p.n_bias ? (float)(b % 20 - 10) * 0.7f : NAN;
    }
    return p;
}

/* Rows that are only scored have a spare slot, whose parameters and counts are poison. */
static int slot_of(const struct trial *t, int i) { return i < t->shape->live_sample ? t->shape->live_sample - 1 - i : t->n_slots - 1; }

/* The step's rows stand in the reverse order of its logits; what no row owns stays poison. */
static void set_step(struct trial *t) {
    const struct shape *shape = t->shape;
    memset(t->in, 0xff, sizeof *t->in);
    t->in->step = t->step;
    t->in->n_rows = t->in->n_logits = shape->live_logits;
    t->in->n_sample = shape->live_sample;
    t->in->n_flush = 0;
    for (int i = 0; i < shape->live_logits; i++) {
        const int row = shape->live_logits - 1 - i;
        const int64_t id = (int64_t)(test_hash(9, (uint64_t)(i + t->step)) % (uint64_t)t->vocab);
        t->in->row[row] = (struct step_row){slot_of(t, i), -1, 40 + t->step + i, row};
        t->in->logit[i] = (struct step_logit){row, (int32_t)(i % 3 == 2 ? -1 : i % 7 == 3 ? t->vocab : id)};
    }
    rig_fill(&t->rig, &t->input, t->in);
    for (int s = 0; s < shape->n_shards; s++) {
        struct shard *k = &t->shard[s];
        float *x = new_bytes(k->logits.bytes);
        for (int64_t i = 0; i < shape->live_logits; i++)
            for (int64_t j = 0; j < k->count; j++)
                x[i * k->count + j] = logit_of((int)(i + 3 * t->step) % N_KINDS, (uint64_t)(100 * t->step + i), k->begin + j);
        rig_fill(&t->rig, &k->logits, x);
        free(x);
    }
}

static struct seq_counts counts_of(const struct shard *k, int side) {
    return (struct seq_counts){k->words.at[side], k->begin, k->count};
}

/* All slots but the spare ones are taken; slot 0 twice, so that the first prompt's marks must go. */
static void begin_sequences(struct trial *t) {
    int32_t prompt[MAX_PROMPT];
    const int n_twins = t->rig.n_twins;
    struct twin from = rig_make(&t->rig, sizeof(struct seq_params), NULL), ids = rig_make(&t->rig, sizeof prompt, NULL);
    for (int i = -1; i < t->n_slots - SPARE_SLOTS; i++) {
        const int slot = i < 0 ? 0 : i;
        const struct seq_params p = params_of(slot, t->vocab);
        for (int j = 0; j < MAX_PROMPT; j++)
            prompt[j] = (int32_t)(test_hash((uint64_t)(i + 2), (uint64_t)j) % (uint64_t)t->vocab);
        rig_fill(&t->rig, &from, &p);
        rig_fill(&t->rig, &ids, prompt);
        for (int s = 0; s < t->shape->n_shards; s++) {
            struct seq_begin_args args[RIG_SIDES];
            for (int side = 0; side < RIG_SIDES; side++)
                args[side] = (struct seq_begin_args){slot, from.at[side], t->params.at[side], ids.at[side],
                                                     i < 0 ? MAX_PROMPT : i * 97 % MAX_PROMPT, counts_of(&t->shard[s], side)};
            LAUNCH(seq_begin, args);
            if (i == 0)
                rig_expect_repeat(&t->rig, &t->shard[s].words, again_seq_begin, &args[RIG_CUDA], label(t, s, "seq_begin, slot", i));
        }
    }
    for (int s = 0; s < t->shape->n_shards; s++)
        rig_expect_equal(&t->rig, &t->shard[s].words, label(t, s, "counts after seq_begin", 0));
    rig_expect_equal(&t->rig, &t->params, label(t, 0, "params after seq_begin", 0));
    rig_drop(&t->rig, n_twins);
}

/* ---- filters ----------------------------------------------------------------------------------------------------- */

static void process(struct trial *t, int s) {
    struct shard *k = &t->shard[s];
    struct logits_process_args args[RIG_SIDES];
    for (int side = 0; side < RIG_SIDES; side++)
        args[side] = (struct logits_process_args){t->input.at[side], t->shape->n_sample, t->params.at[side], counts_of(k, side),
                                                  k->logits.at[side], k->processed.at[side]};
    LAUNCH(logits_process, args);
    rig_expect_equal(&t->rig, &k->processed, label(t, s, "processed", 0));
    rig_expect_repeat(&t->rig, &k->processed, again_logits_process, &args[RIG_CUDA], label(t, s, "processed", 0));
}

static void begin_filter(struct trial *t, int s, bool find_max) {
    struct shard *k = &t->shard[s];
    struct twin *out = find_max ? &k->max : &k->state;
    struct filter_begin_args args[RIG_SIDES];
    for (int side = 0; side < RIG_SIDES; side++)
        args[side] = (struct filter_begin_args){t->input.at[side], t->shape->n_sample, t->params.at[side], k->count,
                                                k->processed.at[side], find_max, k->max.at[side], k->state.at[side]};
    LAUNCH(filter_begin, args);
    rig_expect_equal(&t->rig, out, label(t, s, "filter_begin, find_max", find_max));
    rig_expect_repeat(&t->rig, out, again_filter_begin, &args[RIG_CUDA], label(t, s, "filter_begin, find_max", find_max));
}

/* The all-reduce of the maxima, to both sides of all shards; rows beyond the live ones stay poison. */
static void reduce_max(struct trial *t) {
    float *all = rig_fetch(&t->rig, RIG_CPU, t->shard[0].max.at[RIG_CPU], t->shard[0].max.bytes);
    for (int s = 1; s < t->shape->n_shards; s++) {
        float *own = rig_fetch(&t->rig, RIG_CPU, t->shard[s].max.at[RIG_CPU], t->shard[s].max.bytes);
        for (int i = 0; i < t->shape->live_sample; i++)
            all[i] = own[i] > all[i] ? own[i] : all[i];
        free(own);
    }
    for (int s = 0; s < t->shape->n_shards; s++)
        rig_fill(&t->rig, &t->shard[s].max, all);
    free(all);
}

static void count(struct trial *t, int s, int round) {
    struct shard *k = &t->shard[s];
    struct filter_count_args args[RIG_SIDES];
    for (int side = 0; side < RIG_SIDES; side++)
        args[side] = (struct filter_count_args){t->input.at[side], t->shape->n_sample, round, k->count, k->processed.at[side],
                                                k->state.at[side], k->bins.at[side]};
    LAUNCH(filter_count, args);
    rig_expect_equal(&t->rig, &k->bins, label(t, s, "filter_count, round", round));
    rig_expect_repeat(&t->rig, &k->bins, again_filter_count, &args[RIG_CUDA], label(t, s, "filter_count, round", round));
}

static void reduce_bins(struct trial *t) {
    uint64_t *all = rig_fetch(&t->rig, RIG_CPU, t->shard[0].bins.at[RIG_CPU], t->shard[0].bins.bytes);
    for (int s = 1; s < t->shape->n_shards; s++) {
        uint64_t *own = rig_fetch(&t->rig, RIG_CPU, t->shard[s].bins.at[RIG_CPU], t->shard[s].bins.bytes);
        for (int64_t i = 0; i < (int64_t)t->shape->live_sample * (FILTER_BINS + 1); i++)
            all[i] += own[i];
        free(own);
    }
    for (int s = 0; s < t->shape->n_shards; s++)
        rig_fill(&t->rig, &t->shard[s].bins, all);
    free(all);
}

/* Changes the state it reads, so the old one is sent back before it runs again. */
static void narrow(struct trial *t, int s, int round) {
    struct shard *k = &t->shard[s];
    struct filter_narrow_args args[RIG_SIDES];
    void *before = rig_fetch(&t->rig, RIG_CUDA, k->state.at[RIG_CUDA], k->state.bytes);
    for (int side = 0; side < RIG_SIDES; side++)
        args[side] = (struct filter_narrow_args){t->input.at[side], t->shape->n_sample, round, t->params.at[side], k->bins.at[side],
                                                 k->state.at[side]};
    LAUNCH(filter_narrow, args);
    rig_expect_equal(&t->rig, &k->state, label(t, s, "filter_narrow, round", round));
    rig_send(&t->rig, RIG_CUDA, k->state.at[RIG_CUDA], before, k->state.bytes);
    REQUIRE(again_filter_narrow(t->rig.stream[RIG_CUDA], &args[RIG_CUDA]));
    rig_expect_equal(&t->rig, &k->state, label(t, s, "filter_narrow again, round", round));
    free(before);
}

static void filter(struct trial *t) {
    for (int s = 0; s < t->shape->n_shards; s++)
        begin_filter(t, s, true);
    reduce_max(t);
    for (int s = 0; s < t->shape->n_shards; s++)
        begin_filter(t, s, false);
    for (int round = 0; round < FILTER_ROUNDS; round++) {
        for (int s = 0; s < t->shape->n_shards; s++)
            count(t, s, round);
        reduce_bins(t);
        for (int s = 0; s < t->shape->n_shards; s++)
            narrow(t, s, round);
    }
}

/* ---- sample ------------------------------------------------------------------------------------------------------ */

/* Floats between two clean values. */
static int64_t steps_between(float a, float b) { return llabs((int64_t)sampling_image(a) - (int64_t)sampling_image(b)); }

/* The CPU's key of a token of this shard. */
static float key_of(struct trial *t, int s, int i, int32_t id) {
    const struct shard *k = &t->shard[s];
    const struct step_row *row = sampling_row(t->in, i);
    const struct seq_params p = params_of(row->seq, t->vocab);
    if (id < k->begin || id >= k->begin + k->count || sampling_is_greedy(&p))
        return -INFINITY;
    float *x = rig_fetch(&t->rig, RIG_CPU, (float *)k->processed.at[RIG_CPU] + i * k->count + (id - k->begin), sizeof *x);
    float key = (float)((double)*x + philox_gumbel(philox_bits(p.seed, p.choice, row->position + 1, id)));
    free(x);
    return key;
}

static void check_record(struct trial *t, int s, int i, const struct sample_record *cpu, const struct sample_record *cuda) {
    const char *what = label(t, s, "record", i);
    CHECK(cpu->max == cuda->max && cpu->target == cuda->target, "%s: max %g, not %g; target %g, not %g", what, (double)cuda->max,
          (double)cpu->max, (double)cuda->target, (double)cpu->target);
    CHECK(steps_between(cpu->sum, cuda->sum) <= 1, "%s: sum %.9g, not %.9g", what, (double)cuda->sum, (double)cpu->sum);
    CHECK(steps_between(cpu->best_key, cuda->best_key) <= 1 || fabs((double)cpu->best_key - (double)cuda->best_key) <= 0x1p-45,
          "%s: key %.9g of %d, not %.9g of %d", what, (double)cuda->best_key, cuda->best_id, (double)cpu->best_key, cpu->best_id);
    if (cpu->best_id == cuda->best_id)
        CHECK(memcmp(&cpu->best_logit, &cuda->best_logit, sizeof cpu->best_logit) == 0, "%s: logit %g, not %g", what,
              (double)cuda->best_logit, (double)cpu->best_logit);
    else
        CHECK(steps_between(key_of(t, s, i, cuda->best_id), cpu->best_key) <= 2, "%s: token %d of key %.9g, not %d of key %.9g", what,
              cuda->best_id, (double)key_of(t, s, i, cuda->best_id), cpu->best_id, (double)cpu->best_key);
    for (int j = 0; j < STEP_MAX_TOP; j++)
        CHECK(cpu->top_id[j] == cuda->top_id[j] && memcmp(&cpu->top_logit[j], &cuda->top_logit[j], sizeof(float)) == 0,
              "%s: place %d: %d of %g, not %d of %g", what, j, cuda->top_id[j], (double)cuda->top_logit[j], cpu->top_id[j],
              (double)cpu->top_logit[j]);
    CHECK(memcmp(cpu->pad, cuda->pad, sizeof cpu->pad) == 0, "%s: pad", what);
}

static void sample(struct trial *t, int s, bool filtered, bool top) {
    struct shard *k = &t->shard[s];
    struct sample_args args[RIG_SIDES];
    for (int side = 0; side < RIG_SIDES; side++)
        args[side] = (struct sample_args){t->input.at[side], t->shape->n_logits, t->shape->n_sample, filtered, top, t->params.at[side],
                                          k->begin, k->count, k->logits.at[side], k->processed.at[side], k->state.at[side],
                                          k->records.at[side]};
    LAUNCH(sample, args);
    rig_expect_repeat(&t->rig, &k->records, again_sample, &args[RIG_CUDA], label(t, s, "records, top", top));
    struct sample_record *cpu = rig_fetch(&t->rig, RIG_CPU, k->records.at[RIG_CPU], k->records.bytes);
    struct sample_record *cuda = rig_fetch(&t->rig, RIG_CUDA, k->records.at[RIG_CUDA], k->records.bytes);
    for (int i = 0; i < t->shape->live_logits; i++)
        check_record(t, s, i, &cpu[i], &cuda[i]);
    const size_t live = (size_t)t->shape->live_logits * sizeof *cpu;
    CHECK(memcmp(cpu + t->shape->live_logits, cuda + t->shape->live_logits, k->records.bytes - live) == 0, "%s: rows that are not live",
          label(t, s, "records", 0));
    free(cpu);
    free(cuda);
}

/* ---- sample_merge ------------------------------------------------------------------------------------------------ */

/* The sums have the same bits on both sides; log sum (below 14) differs by two units in the last place of a double, max + log sum and
 * the difference by one each, which scale with max; then two roundings to float. */
static bool logprob_near(float a, float b, float max) {
    return a == b || fabs((double)a - (double)b) <= 0x1p-23 * fabs((double)a) + 0x1p-50 * (fabs((double)max) + 20);
}

static void check_result(struct trial *t, int s, int i, float max, const struct sample_result *cpu, const struct sample_result *cuda) {
    const char *what = label(t, s, "result", i);
    CHECK(cpu->token == cuda->token && cpu->n_top == cuda->n_top, "%s: token %d, not %d; n_top %d, not %d", what, cuda->token, cpu->token,
          cuda->n_top, cpu->n_top);
    CHECK(logprob_near(cpu->logprob, cuda->logprob, max) && logprob_near(cpu->target_logprob, cuda->target_logprob, max),
          "%s: logprob %.9g, not %.9g; target's %.9g, not %.9g", what, (double)cuda->logprob, (double)cpu->logprob,
          (double)cuda->target_logprob, (double)cpu->target_logprob);
    for (int j = 0; j < STEP_MAX_TOP; j++)
        CHECK(cpu->top_id[j] == cuda->top_id[j] && logprob_near(cpu->top_logprob[j], cuda->top_logprob[j], max),
              "%s: place %d: %d of %.9g, not %d of %.9g", what, j, cuda->top_id[j], (double)cuda->top_logprob[j], cpu->top_id[j],
              (double)cpu->top_logprob[j]);
}

/* The all-gather, from the CPU's records. */
static struct sample_record *gather(struct trial *t) {
    struct sample_record *all = new_bytes(t->gathered.bytes);
    for (int s = 0; s < t->shape->n_shards; s++) {
        const struct twin *own = &t->shard[s].records;
        void *records = rig_fetch(&t->rig, RIG_CPU, own->at[RIG_CPU], own->bytes);
        memcpy(all + (size_t)s * (size_t)t->shape->n_logits, records, own->bytes);
        free(records);
    }
    rig_fill(&t->rig, &t->gathered, all);
    return all;
}

/* Counts the tokens, so the old counts are sent back before it runs again. */
static void merge(struct trial *t, int s, bool top, const struct sample_record *gathered) {
    struct shard *k = &t->shard[s];
    struct sample_merge_args args[RIG_SIDES];
    void *words = rig_fetch(&t->rig, RIG_CUDA, k->words.at[RIG_CUDA], k->words.bytes);
    for (int side = 0; side < RIG_SIDES; side++)
        args[side] = (struct sample_merge_args){t->input.at[side], t->shape->n_logits, t->shape->n_sample, top, t->shape->n_shards,
                                                t->gathered.at[side], k->last_token.at[side], counts_of(k, side), k->results.at[side]};
    LAUNCH(sample_merge, args);
    rig_expect_equal(&t->rig, &k->words, label(t, s, "counts after sample_merge", 0));
    rig_expect_equal(&t->rig, &k->last_token, label(t, s, "last_token", 0));
    rig_send(&t->rig, RIG_CUDA, k->words.at[RIG_CUDA], words, k->words.bytes);
    struct sample_result *cpu = rig_fetch(&t->rig, RIG_CPU, k->results.at[RIG_CPU], k->results.bytes);
    struct sample_result *cuda = rig_fetch(&t->rig, RIG_CUDA, k->results.at[RIG_CUDA], k->results.bytes);
    for (int i = 0; i < t->shape->live_logits; i++) {
        float max = -INFINITY;
        for (int r = 0; r < t->shape->n_shards; r++)
            max = fmaxf(max, gathered[r * t->shape->n_logits + i].max);
        check_result(t, s, i, max, &cpu[i], &cuda[i]);
    }
    REQUIRE(again_sample_merge(t->rig.stream[RIG_CUDA], &args[RIG_CUDA]));
    rig_expect_equal(&t->rig, &k->words, label(t, s, "counts after sample_merge again", 0));
    struct sample_result *again = rig_fetch(&t->rig, RIG_CUDA, k->results.at[RIG_CUDA], k->results.bytes);
    CHECK(memcmp(cuda, again, k->results.bytes) == 0, "%s: other bits", label(t, s, "sample_merge again", 0));
    const size_t live = (size_t)t->shape->live_logits * sizeof *cpu;
    CHECK(memcmp(cpu + t->shape->live_logits, cuda + t->shape->live_logits, k->results.bytes - live) == 0, "%s: rows that are not live",
          label(t, s, "results", 0));
    free(words);
    free(cpu);
    free(cuda);
    free(again);
}

/* ---- trials ------------------------------------------------------------------------------------------------------ */

static void open_shard(struct trial *t, struct shard *k) {
    const size_t n = (size_t)k->count, n_logits = (size_t)t->shape->n_logits, n_sample = (size_t)t->shape->n_sample;
    k->logits = rig_make(&t->rig, n_logits * n * sizeof(float), NULL);
    k->processed = rig_make(&t->rig, n_sample * n * sizeof(float), NULL);
    k->words = rig_make(&t->rig, (size_t)t->n_slots * n * sizeof(uint32_t), NULL);
    k->max = rig_make(&t->rig, n_sample * sizeof(float), NULL);
    k->bins = rig_make(&t->rig, n_sample * (FILTER_BINS + 1) * sizeof(uint64_t), NULL);
    k->state = rig_make(&t->rig, n_sample * sizeof(struct filter_state), NULL);
    k->records = rig_make(&t->rig, n_logits * sizeof(struct sample_record), NULL);
    k->last_token = rig_make(&t->rig, (size_t)t->n_slots * sizeof(int32_t), NULL);
    k->results = rig_make(&t->rig, n_logits * sizeof(struct sample_result), NULL);
}

static void run_shape(struct trial *t, const struct shape *shape, int number) {
    const int n_twins = t->rig.n_twins;
    t->shape = shape;
    t->number = number;
    t->step = 0;
    t->vocab = 0;
    t->n_slots = (int)max_i64(shape->live_sample, 1) + SPARE_SLOTS;
    t->input = rig_make(&t->rig, sizeof *t->in, NULL);
    t->params = rig_make(&t->rig, (size_t)t->n_slots * sizeof(struct seq_params), NULL);
    t->gathered = rig_make(&t->rig, (size_t)(shape->n_shards * shape->n_logits) * sizeof(struct sample_record), NULL);
    for (int s = 0; s < shape->n_shards; s++) {
        t->shard[s].begin = t->vocab;
        t->shard[s].count = shape->count[s];
        t->vocab += shape->count[s];
        open_shard(t, &t->shard[s]);
    }
    begin_sequences(t);
    for (t->step = 0; t->step < shape->n_steps; t->step++) {
        const bool filtered = t->step % 2 == 0, top = t->step % 3 != 1;
        set_step(t);
        for (int s = 0; s < shape->n_shards; s++)
            process(t, s);
        if (filtered)
            filter(t);
        for (int s = 0; s < shape->n_shards; s++)
            sample(t, s, filtered, top);
        struct sample_record *gathered = gather(t);
        for (int s = 0; s < shape->n_shards; s++)
            merge(t, s, top, gathered);
        free(gathered);
    }
    rig_drop(&t->rig, n_twins);
}

int main(void) {
    /* 2048 tokens are a CTA's; from 90 chunks on (183K tokens) the best of a row are joined in several rounds; 256 rows are the most. */
    static const struct shape shapes[] = {
        {1, {1}, 20, 18, 16, 16, 4},
        {3, {0, 1, 0}, 5, 4, 3, 3, 2},
        {2, {1000, 19}, 20, 20, 20, 17, 6},
        {3, {2047, 2048, 2049}, 20, 19, 18, 17, 6},
        {4, {0, 49152, 1, 1000}, 20, 18, 16, 16, 3},
        {1, {151936}, 18, 17, 16, 16, 3},
        {2, {75968, 75968}, 17, 17, 16, 16, 2},
        {1, {262145}, 11, 11, 9, 9, 2},
        {1, {1000}, 256, 256, 256, 256, 2},
        {1, {1000}, 1, 1, 1, 1, 3},
        {1, {1000}, 4, 3, 0, 0, 2},  /* scored only */
        {1, {1000}, 4, 0, 4, 0, 2},  /* nothing live */
        {1, {1000}, 0, 0, 0, 0, 2},  /* nothing at all */
    };
    struct trial t = {.in = new_bytes(sizeof *t.in)};
    rig_open(&t.rig);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        run_shape(&t, &shapes[i], (int)i);
    rig_close(&t.rig);
    free(t.in);
    return test_report();
}
