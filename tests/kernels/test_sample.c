/* From logits to tokens: penalties against a scalar reference, sampled tokens and log-probabilities against doubles and against
 * one shard, draws against their distribution, and nothing written that is not owned. */
#include <omp.h>

#include "tests/kernels/sample_rig.h"

enum { ROWS = 9, SAMPLED = 6, SLOTS = 8, N_PROMPT = 200 };

static int32_t target_of(int row, int64_t vocab) { return row % 3 == 2 ? -1 : (int32_t)((int64_t)row * 7919 % vocab); }

/* Parameters of a slot: greedy, plain, and every filter and penalty somewhere. */
static struct seq_params params_of(int seq, int64_t vocab) {
    struct seq_params p = rig_params_off();
    p.seed = test_hash(50, (uint64_t)seq);
    p.choice = seq % 3;
    p.temperature = seq % 4 == 0 ? 0 : 0.6f + 0.3f * (float)seq;
    if (seq & 1)
        p.repetition_penalty = 1.0f + 0.1f * (float)seq, p.presence_penalty = 0.4f, p.frequency_penalty = 0.3f;
    if (seq & 2)
        p.top_k = 10 * seq, p.top_p = 0.93f, p.min_p = 0.01f;
    p.n_bias = seq % 4 == 3 ? STEP_MAX_BIAS : seq % 4;
    p.n_bias = (int32_t)min_i64(p.n_bias, vocab);
    for (int b = 0; b < p.n_bias; b++) {
        p.bias_id[b] = (int32_t)((vocab / STEP_MAX_BIAS + 1) * b % vocab);
        p.bias[b] = (float)(b % 20 - 10) * 0.5f;
    }
    return p;
}

static float *row_logits(int step, int row, int64_t vocab) {
    float *x = malloc((size_t)vocab * sizeof *x);
    if (!x)
        exit(1);
    for (int64_t i = 0; i < vocab; i++)
        x[i] = rig_logit((uint64_t)(1000 * step + row), (uint64_t)i);
    return x;
}

/* ROWS live rows of ROWS + 2, SAMPLED of SAMPLED + 1; rows of slots in an order of their own. */
static void open_step(struct rig *rig, int n_ranks, int64_t vocab) {
    int32_t prompt[N_PROMPT];
    for (int i = 0; i < N_PROMPT; i++)
        prompt[i] = (int32_t)(test_hash(4, (uint64_t)i) % (uint64_t)vocab);
    rig_open(rig, n_ranks, vocab, ROWS + 2, SAMPLED + 1, SLOTS);
    for (int seq = 0; seq < SLOTS; seq++) {
        struct seq_params p = params_of(seq, vocab);
        rig_seq_begin(rig, seq, &p, prompt, N_PROMPT / (seq + 1));
    }
    rig->in->n_logits = ROWS;
    rig->in->n_sample = SAMPLED;
}

/* The logits of entry i stand for another row of the step than i, as after a prefill. */
static void set_step(struct rig *rig, int step) {
    for (int i = 0; i < ROWS; i++) {
        float *x = row_logits(step, i, rig->vocab);
        rig_set_logits(rig, i, x);
        free(x);
        rig->in->row[2 * i + 1] = (struct step_row){(i * 3 + 1) % SLOTS, -1, 40 + step + i, 2 * i + 1};
        rig->in->logit[i] = (struct step_logit){2 * i + 1, target_of(i, rig->vocab)};
    }
}

/* ---- shards ------------------------------------------------------------------------------------------------------ */

/* Two roundings to float, of the sums and of the result. */
static double logprob_limit(double logprob) { return 1e-6 + 2 * 5.96e-8 * fabs(logprob); }

static void check_same(const struct rig *a, const struct rig *b) {
    for (int i = 0; i < ROWS; i++) {
        const struct sample_result *x = rig_result(a, i), *y = rig_result(b, i);
        CHECK(x->token == y->token, "%d ranks, row %d: token %d, not %d", b->n_ranks, i, y->token, x->token);
        CHECK(fabs((double)x->logprob - (double)y->logprob) <= logprob_limit((double)x->logprob), "row %d: %g, %g", i,
              (double)x->logprob, (double)y->logprob);
        CHECK(fabs((double)x->target_logprob - (double)y->target_logprob) <= logprob_limit((double)x->target_logprob), "row %d", i);
        CHECK(x->n_top == y->n_top && memcmp(x->top_id, y->top_id, sizeof x->top_id) == 0, "row %d: top", i);
        if (i < SAMPLED)
            CHECK(memcmp(rig_state(a, i), rig_state(b, i), sizeof(struct filter_state)) == 0, "row %d: state", i);
    }
    for (int r = 1; r < b->n_ranks; r++)
        CHECK(memcmp(rig_data(b->rank[0].results), rig_data(b->rank[r].results), ROWS * sizeof(struct sample_result)) == 0,
              "ranks 0 and %d differ", r);
}

/* Guards, rows beyond the live counts, slots that were not sampled. */
static void check_untouched(const struct rig *rig, bool filtered) {
    for (int r = 0; r < rig->n_ranks; r++) {
        const struct rig_rank *k = &rig->rank[r];
        size_t n = (size_t)k->count;
        rig_check(k->logits, (size_t)ROWS * n * sizeof(float), "logits");
        rig_check(k->processed, SAMPLED * n * sizeof(float), "processed");
        rig_check(k->words, k->words.bytes, "counts");
        rig_check(k->params, k->params.bytes, "params");
        rig_check(k->max, filtered ? SAMPLED * sizeof(float) : 0, "max");
        rig_check(k->state, filtered ? SAMPLED * sizeof(struct filter_state) : 0, "state");
        rig_check(k->bins, filtered ? SAMPLED * (FILTER_BINS + 1) * sizeof(uint64_t) : 0, "bins");
        rig_check(k->records, ROWS * sizeof(struct sample_record), "records");
        rig_check(k->results, ROWS * sizeof(struct sample_result), "results");
        rig_check(k->last_token, k->last_token.bytes, "last_token");
        for (int i = SAMPLED; i < ROWS; i++)
            CHECK(rig->gathered[r * rig->n_logits + i].best_id == INT32_MAX, "row %d is only scored", i);
        for (int i = SAMPLED; i < SLOTS; i++) {
            int32_t poison;
            memset(&poison, RIG_POISON, sizeof poison);
            CHECK(((int32_t *)rig_data(k->last_token))[(i * 3 + 1) % SLOTS] == poison, "last_token of slot %d", (i * 3 + 1) % SLOTS);
        }
    }
}

static void test_shards(void) {
    static const int64_t vocabs[] = {3, 700, 20011};
    static const int ranks[] = {2, 3, 5};
    for (int v = 0; v < 3; v++) {
        for (int run = 0; run < 3; run++) {
            struct rig one, many;
            open_step(&one, 1, vocabs[v]);
            open_step(&many, ranks[run], vocabs[v]);
            for (int step = 0; step < 3; step++) {
                bool filtered = step > 0;
                set_step(&one, step);
                set_step(&many, step);
                rig_step(&one, filtered, true);
                rig_step(&many, filtered, true);
                check_untouched(&many, filtered);
                if (filtered)
                    check_same(&one, &many);
            }
            for (int seq = 0; seq < SLOTS; seq++)
                for (int64_t id = 0; id < vocabs[v]; id++)
                    CHECK(rig_word(&one, seq, id) == rig_word(&many, seq, id), "slot %d, token %lld", seq, (long long)id);
            rig_close(&one);
            rig_close(&many);
        }
    }
}

/* The same bits from any number of threads. */
static void test_threads(void) {
    const int most = omp_get_max_threads();
    struct rig one, many;
    open_step(&one, 2, 40009);
    open_step(&many, 2, 40009);
    for (int step = 0; step < 2; step++) {
        set_step(&one, step);
        set_step(&many, step);
        omp_set_num_threads(1);
        rig_step(&one, true, true);
        omp_set_num_threads(3);
        rig_step(&many, true, true);
        for (int r = 0; r < 2; r++) {
            const struct rig_rank *a = &one.rank[r], *b = &many.rank[r];
            CHECK(memcmp(a->processed.base, b->processed.base, a->processed.bytes + 2 * RIG_GUARD) == 0, "step %d: processed", step);
            CHECK(memcmp(a->state.base, b->state.base, a->state.bytes + 2 * RIG_GUARD) == 0, "step %d: state", step);
            CHECK(memcmp(a->records.base, b->records.base, a->records.bytes + 2 * RIG_GUARD) == 0, "step %d: records", step);
            CHECK(memcmp(a->results.base, b->results.base, a->results.bytes + 2 * RIG_GUARD) == 0, "step %d: results", step);
        }
    }
    omp_set_num_threads(most);
    rig_close(&one);
    rig_close(&many);
}

/* ---- log-softmax and the best ------------------------------------------------------------------------------------- */

static void check_row(const struct rig *rig, int step, int row) {
    const struct sample_result *out = rig_result(rig, row);
    float *x = row_logits(step, row, rig->vocab);
    double max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < rig->vocab; i++)
        max = fmax(max, (double)x[i]);
    for (int64_t i = 0; i < rig->vocab; i++)
        sum += exp((double)x[i] - max);
    double total = max + log(sum);
    int32_t target = target_of(row, rig->vocab);
    double want = target < 0 ? 0 : (double)x[target] - total;
    CHECK(fabs((double)out->target_logprob - want) <= logprob_limit(want), "row %d: %g, not %g", row, (double)out->target_logprob, want);
    if (row < SAMPLED) {
        want = (double)x[out->token] - total;
        CHECK(fabs((double)out->logprob - want) <= logprob_limit(want), "row %d: %g, not %g", row, (double)out->logprob, want);
    } else {
        CHECK(out->token == -1 && out->logprob == 0, "row %d: token %d", row, out->token);
    }
    CHECK(out->n_top == min_i64(STEP_MAX_TOP, rig->vocab), "row %d: %d", row, out->n_top);
    for (int t = 0; t < STEP_MAX_TOP; t++) { /* each time the best of what is left, the lower id first */
        int64_t best = -1;
        for (int64_t i = 0; i < rig->vocab; i++)
            if (x[i] > -INFINITY && (best < 0 || x[i] > x[best]))
                best = i;
        want = best < 0 ? -INFINITY : (double)x[best] - total;
        CHECK(out->top_id[t] == best, "row %d, place %d: %d, not %lld", row, t, out->top_id[t], (long long)best);
        CHECK(best < 0 ? out->top_logprob[t] == -INFINITY : fabs((double)out->top_logprob[t] - want) <= logprob_limit(want),
              "row %d, place %d", row, t);
        if (best >= 0)
            x[best] = -INFINITY;
    }
    free(x);
}

static void test_logprobs(void) {
    static const int64_t vocabs[] = {1, 19, 20, 21, 255, 256, 257, 8191, 8193, 30000};
    for (size_t v = 0; v < sizeof vocabs / sizeof *vocabs; v++) {
        struct rig rig;
        open_step(&rig, 1 + (int)v % 5, vocabs[v]);
        set_step(&rig, 7);
        rig_step(&rig, false, true);
        for (int row = 0; row < ROWS; row++)
            check_row(&rig, 7, row);
        rig_sample(&rig, false, false);
        CHECK(rig_result(&rig, 0)->n_top == 0 && rig_result(&rig, 0)->top_id[0] == -1, "top though not wanted");
        rig_close(&rig);
    }
}

/* Logits from a few values only: the best and greedy tokens are the lower ids. */
static void test_ties(void) {
    for (int n_ranks = 1; n_ranks <= 5; n_ranks++) {
        struct seq_params p = rig_params_off();
        struct rig rig;
        float x[500];
        for (int i = 0; i < 500; i++)
            x[i] = i % 50 == 33 ? 2 : (float)(i % 2);
        p.temperature = 0;
        rig_open(&rig, n_ranks, 500, 1, 1, 1);
        rig.in->n_logits = rig.in->n_sample = 1;
        rig_set_row(&rig, 0, 0, 0, -1);
        rig_set_logits(&rig, 0, x);
        rig_seq_begin(&rig, 0, &p, NULL, 0);
        rig_step(&rig, true, true);
        const struct sample_result *out = rig_result(&rig, 0);
        CHECK(out->token == 33, "%d ranks: token %d", n_ranks, out->token);
        for (int t = 0; t < STEP_MAX_TOP; t++)
            CHECK(out->top_id[t] == (t < 10 ? 33 + 50 * t : 2 * t - 19), "%d ranks, place %d: %d", n_ranks, t, out->top_id[t]);
        rig_close(&rig);
    }
}

/* ---- penalties ---------------------------------------------------------------------------------------------------- */

static double penalized(double x, const struct seq_params *p, bool in_prompt, int generated, int64_t id) {
    double r = (double)p->repetition_penalty;
    if (in_prompt || generated)
        x = x > 0 ? x / r : x * r;
    x -= (double)p->frequency_penalty * generated;
    if (generated)
        x -= (double)p->presence_penalty;
    for (int b = 0; b < p->n_bias; b++)
        if (p->bias_id[b] == id)
            x += (double)p->bias[b];
    return p->temperature > 0 ? x / (double)p->temperature : x;
}

static void test_penalties(void) {
    const int64_t vocab = 500;
    static int generated[SLOTS][500];
    struct rig rig;
    memset(generated, 0, sizeof generated);
    open_step(&rig, 3, vocab);
    for (int step = 0; step < 12; step++) {
        set_step(&rig, step % 2);
        rig_step(&rig, true, false);
        for (int i = 0; i < SAMPLED; i++) {
            int seq = (i * 3 + 1) % SLOTS;
            struct seq_params p = params_of(seq, vocab);
            float *x = row_logits(step % 2, i, vocab);
            for (int64_t id = 0; id < vocab; id++) {
                bool in_prompt = false;
                for (int j = 0; j < N_PROMPT / (seq + 1); j++)
                    in_prompt |= (int64_t)(test_hash(4, (uint64_t)j) % (uint64_t)vocab) == id;
                double want = penalized((double)x[id], &p, in_prompt, generated[seq][id], id);
                double got = (double)rig_processed(&rig, i, id);
                /* five roundings of values below 30, then the division */
                CHECK(fabs(got - want) <= 6 * 30 * 5.96e-8 / fmin(1, p.temperature > 0 ? (double)p.temperature : 1),
                      "step %d, slot %d, token %lld: %g, not %g", step, seq, (long long)id, got, want);
                uint32_t word = (in_prompt ? SAMPLING_IN_PROMPT : 0) + (uint32_t)generated[seq][id];
                word += id == rig_result(&rig, i)->token;
                CHECK(rig_word(&rig, seq, id) == word, "slot %d, token %lld: %08x", seq, (long long)id, rig_word(&rig, seq, id));
            }
            free(x);
            generated[seq][rig_result(&rig, i)->token]++;
            for (int r = 0; r < rig.n_ranks; r++)
                CHECK(((int32_t *)rig_data(rig.rank[r].last_token))[seq] == rig_result(&rig, i)->token, "slot %d", seq);
        }
    }
    rig_close(&rig);
}

/* ---- odd rows ----------------------------------------------------------------------------------------------------- */

static void test_odd_logits(void) {
    for (int n_ranks = 1; n_ranks <= 3; n_ranks++) {
        for (int greedy = 0; greedy < 2; greedy++) {
            struct seq_params p = rig_params_off();
            struct rig rig;
            float none[40], one[40], infinite[40];
            for (int i = 0; i < 40; i++) {
                none[i] = i % 2 ? NAN : -INFINITY;
                one[i] = i == 29 ? -1e38f : none[i];
                infinite[i] = i == 31 ? INFINITY : i == 3 ? NAN : 1;
            }
            p.temperature = greedy ? 0 : 0.5f, p.top_k = 4, p.top_p = 0.5f, p.min_p = 0.1f;
            rig_open(&rig, n_ranks, 40, 3, 3, 3);
            rig.in->n_logits = rig.in->n_sample = 3;
            rig_set_logits(&rig, 0, none);
            rig_set_logits(&rig, 1, one);
            rig_set_logits(&rig, 2, infinite);
            for (int i = 0; i < 3; i++) {
                rig_set_row(&rig, i, i, 0, 5);
                rig_seq_begin(&rig, i, &p, NULL, 0);
            }
            rig_step(&rig, true, true);
            const struct sample_result *out = rig_result(&rig, 0);
            CHECK(out->token == 0 && out->logprob == -INFINITY && out->target_logprob == -INFINITY && out->n_top == 0,
                  "no token: %d, %g", out->token, (double)out->logprob);
            out = rig_result(&rig, 1);
            CHECK(out->token == 29 && out->logprob == 0 && out->target_logprob == -INFINITY && out->n_top == 1, "one token: %d, %g",
                  out->token, (double)out->logprob);
            out = rig_result(&rig, 2);
            CHECK(out->token == 31 && out->logprob == 0 && out->n_top == STEP_MAX_TOP, "infinite: %d", out->token);
            rig_close(&rig);
        }
    }
}

/* ---- the distribution ---------------------------------------------------------------------------------------------- */

enum { SMALL = 12, BATCH = 250, N_BATCHES = 800 };
static const float SMALL_LOGITS[SMALL] = {1.0f, -2.0f, 0.3f, 2.2f, 1.9f, -0.7f, 0.0f, 1.2f, -5.0f, 0.8f, 1.7f, -1.1f};

static void open_small(struct rig *rig, float temperature, float top_p) {
    struct seq_params p = rig_params_off();
    p.temperature = temperature, p.top_p = top_p;
    rig_open(rig, 3, SMALL, BATCH, BATCH, BATCH);
    rig->in->n_logits = rig->in->n_sample = BATCH;
    for (int i = 0; i < BATCH; i++) {
        p.seed = test_hash(67, (uint64_t)i / 25);
        p.choice = i % 25;
        rig_set_logits(rig, i, SMALL_LOGITS);
        rig_seq_begin(rig, i, &p, NULL, 0);
    }
}

/* 200,000 draws with top-p: chi-square below its 99.9 % point (Wilson-Hilferty), and nothing outside of the set. */
static void test_distribution(void) {
    const float temperature = 0.7f, top_p = 0.9f;
    double weight[SMALL], total = 0, kept = 0, chi = 0;
    bool in_set[SMALL];
    int degrees = -1;
    long n[SMALL] = {0};
    struct rig rig;
    open_small(&rig, temperature, top_p);
    for (int batch = 0; batch < N_BATCHES; batch++) {
        for (int i = 0; i < BATCH; i++)
            rig_set_row(&rig, i, i, batch, -1);
        if (batch == 0)
            rig_step(&rig, true, false);
        else /* the logits, so what the filters found, stay the same */
            rig_sample(&rig, true, false);
        for (int i = 0; i < BATCH; i++)
            n[rig_result(&rig, i)->token]++;
    }
    for (int i = 0; i < SMALL; i++)
        total += weight[i] = exp((double)SMALL_LOGITS[i] / (double)temperature);
    for (int i = 0; i < SMALL; i++) { /* in the set while less than top_p lies above */
        double above = 0;
        for (int j = 0; j < SMALL; j++)
            above += weight[j] > weight[i] ? weight[j] : 0;
        in_set[i] = above < (double)top_p * total;
        kept += in_set[i] ? weight[i] : 0;
    }
    for (int i = 0; i < SMALL; i++) {
        double want = weight[i] / kept * BATCH * N_BATCHES;
        CHECK(in_set[i] || n[i] == 0, "token %d was drawn %ld times", i, n[i]);
        degrees += in_set[i];
        chi += in_set[i] ? (n[i] - want) * (n[i] - want) / want : 0;
    }
    double k = 2.0 / (9 * degrees), limit = degrees * pow(1 - k + 3.0902 * sqrt(k), 3);
    CHECK(degrees == 4 && chi < limit, "%d degrees: chi-square %g, limit %g", degrees, chi, limit);
    rig_close(&rig);
}

/* Pairs of draws that differ by one position, one choice or the seed: equal as often as independent ones are. */
static void test_independence(void) {
    struct rig rig;
    int32_t before[BATCH] = {0};
    double equal[3] = {0}, pairs[3] = {0}, p = 0, total = 0;
    open_small(&rig, 1, 1);
    for (int batch = 0; batch < 100; batch++) {
        for (int i = 0; i < BATCH; i++)
            rig_set_row(&rig, i, i, batch, -1);
        rig_process(&rig);
        rig_sample(&rig, false, false);
        for (int i = 0; i < BATCH; i++) {
            int32_t token = rig_result(&rig, i)->token;
            if (batch)
                pairs[0]++, equal[0] += token == before[i];
            if (i % 25)
                pairs[1]++, equal[1] += token == rig_result(&rig, i - 1)->token;
            if (i >= 25)
                pairs[2]++, equal[2] += token == rig_result(&rig, i - 25)->token;
            before[i] = token;
        }
    }
    for (int i = 0; i < SMALL; i++)
        total += exp((double)SMALL_LOGITS[i]);
    for (int i = 0; i < SMALL; i++)
        p += exp(2 * (double)SMALL_LOGITS[i]) / (total * total);
    for (int way = 0; way < 3; way++)
        CHECK(fabs(equal[way] / pairs[way] - p) < 4 * sqrt(p / pairs[way]), "way %d: %g, not %g", way, equal[way] / pairs[way], p);
    rig_close(&rig);
}

/* The shortcuts change nothing: every token is the arg-max of processed + noise, computed for all; position is the row's + 1. */
static void test_argmax(void) {
    const int64_t vocab = 9001;
    struct rig rig;
    open_step(&rig, 2, vocab);
    for (int step = 0; step < 10; step++) {
        set_step(&rig, step);
        rig_step(&rig, true, false);
        for (int i = 0; i < SAMPLED; i++) {
            struct seq_params p = params_of((i * 3 + 1) % SLOTS, vocab);
            float best = -INFINITY;
            int32_t token = -1;
            for (int32_t id = 0; id < vocab; id++) {
                double g = p.temperature > 0 ? philox_gumbel(philox_bits(p.seed, p.choice, 41 + step + i, id)) : 0;
                float key = (float)((double)rig_processed(&rig, i, id) + g);
                if (rig_allowed(&rig, i, id) && key > best)
                    best = key, token = id;
            }
            CHECK(rig_result(&rig, i)->token == token, "step %d, row %d: %d, not %d", step, i, rig_result(&rig, i)->token, token);
        }
    }
    rig_close(&rig);
}

int main(void) {
    test_shards();
    test_threads();
    test_logprobs();
    test_ties();
    test_penalties();
    test_odd_logits();
    test_argmax();
    test_distribution();
    test_independence();
    return test_report();
}
