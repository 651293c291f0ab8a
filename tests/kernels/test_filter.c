/* Top-k, top-p and min-p: the tokens left equal those of transformers' processors, whatever the number of shards, and ties,
 * limits and odd logits do what ops.h says. */
#include "tests/kernels/sample_rig.h"

static float *new_logits(uint64_t seed, int64_t vocab) {
    float *x = malloc((size_t)vocab * sizeof *x);
    if (!x)
        exit(1);
    for (int64_t i = 0; i < vocab; i++)
        x[i] = rig_logit(seed, (uint64_t)i);
    return x;
}

/* One row of one slot, processed and filtered. */
static void open_filtered(struct rig *rig, int n_ranks, const float *x, int64_t vocab, const struct seq_params *p,
                          const int32_t *prompt, int64_t n_prompt) {
    rig_open(rig, n_ranks, vocab, 1, 1, 1);
    rig->in->n_logits = rig->in->n_sample = 1;
    rig_set_row(rig, 0, 0, 5, -1);
    rig_set_logits(rig, 0, x);
    rig_seq_begin(rig, 0, p, prompt, n_prompt);
    rig_process(rig);
    rig_filter(rig);
}

static int64_t count_allowed(const struct rig *rig) {
    int64_t n = 0;
    for (int64_t id = 0; id < rig->vocab; id++)
        n += rig_allowed(rig, 0, id);
    return n;
}

/* ---- transformers ------------------------------------------------------------------------------------------------ */

static void check_case(FILE *file, unsigned long long seed, const struct seq_params *p, int64_t vocab, int64_t n_prompt, int64_t n_left) {
    static const int ranks[] = {1, 2, 3, 5};
    float *x = new_logits(seed, vocab);
    bool *left = calloc((size_t)vocab, sizeof *left);
    int32_t *prompt = calloc((size_t)n_prompt + 1, sizeof *prompt);
    for (int64_t i = 0; i < n_left; i++) {
        int id;
        if (fscanf(file, "%d", &id) != 1 || id < 0 || id >= vocab)
            exit(1);
        left[id] = true;
    }
    for (int64_t i = 0; i < n_prompt; i++)
        prompt[i] = (int32_t)(test_hash(seed + 1000000, (uint64_t)i) % (uint64_t)vocab);
    struct filter_state one;
    for (int run = 0; run < 4; run++) {
        struct rig rig;
        open_filtered(&rig, ranks[run], x, vocab, p, prompt, n_prompt);
        for (int64_t id = 0; id < vocab; id++)
            CHECK(rig_allowed(&rig, 0, id) == left[id], "seed %llu, %d ranks: token %lld", seed, ranks[run], (long long)id);
        if (run == 0)
            one = *rig_state(&rig, 0);
        CHECK(memcmp(&one, rig_state(&rig, 0), sizeof one) == 0, "seed %llu, %d ranks: another state", seed, ranks[run]);
        rig_close(&rig);
    }
    free(prompt);
    free(left);
    free(x);
}

static void test_golden(void) {
    FILE *file = fopen(TEST_FILE("golden/sampling.golden"), "r");
    char line[512];
    if (!file || !fgets(line, sizeof line, file) || !fgets(line, sizeof line, file)) {
        fprintf(stderr, "golden/sampling.golden cannot be read\n");
        exit(1);
    }
    unsigned long long seed;
    long long vocab, n_prompt, n_left;
    struct seq_params p = rig_params_off();
    int n_cases = 0;
    for (; fscanf(file, "%llu %lld %f %d %f %f %f %lld %lld", &seed, &vocab, &p.temperature, &p.top_k, &p.top_p, &p.min_p,
                  &p.repetition_penalty, &n_prompt, &n_left) == 9; n_cases++)
        check_case(file, seed, &p, vocab, n_prompt, n_left);
    CHECK(n_cases == 20, "%d cases", n_cases);
    fclose(file);
}

/* ---- by hand ----------------------------------------------------------------------------------------------------- */

struct hand {
    int top_k;
    float top_p, min_p;
    int n_left; /* the first so many of HAND are left */
};

/* Masses relative to the first: 1, 1, 1/2, 1/2, 1/4, 1/4, 1/4, 1/8; their sum is 31/8. */
static const float HAND[] = {1, 1, 2, 2, 4, 4, 4, 8};
static const struct hand HANDS[] = {
    {1, 1, 0, 2}, {2, 1, 0, 2}, {3, 1, 0, 4}, {4, 1, 0, 4}, {5, 1, 0, 7}, {7, 1, 0, 7}, {8, 1, 0, 8}, {100, 1, 0, 8}, {0, 1, 0, 8},
    {0, 0, 0, 2}, {0, 0.2f, 0, 2}, {0, 0.25f, 0, 2}, {0, 0.5f, 0, 2}, {0, 0.52f, 0, 4}, {0, 0.77f, 0, 4}, {0, 0.78f, 0, 7},
    {0, 0.96f, 0, 7}, {0, 0.97f, 0, 8}, {0, 0.9999f, 0, 8}, {0, 1, 0.6f, 2}, {0, 1, 0.4f, 4}, {0, 1, 0.2f, 7}, {0, 1, 0.1f, 8},
    {0, 1, 1, 2}, {0, 1, 7, 2},
    {3, 0.6f, 0, 2},     /* of the 3 left by top-k (4 with the tie), 2/3 lie in the first two */
    {3, 0.7f, 0, 4},
    {5, 0.86f, 0.3f, 4}, /* the mass of top-p counts what min-p takes later: 3/3.75 = 0.8 < 0.86 */
};

static void test_hand(void) {
    float x[8];
    for (int i = 0; i < 8; i++)
        x[(i * 3 + 1) % 8] = -logf(HAND[i]);
    for (size_t c = 0; c < sizeof HANDS / sizeof *HANDS; c++) {
        for (int n_ranks = 1; n_ranks <= 5; n_ranks++) {
            struct seq_params p = rig_params_off();
            struct rig rig;
            p.top_k = HANDS[c].top_k, p.top_p = HANDS[c].top_p, p.min_p = HANDS[c].min_p;
            open_filtered(&rig, n_ranks, x, 8, &p, NULL, 0);
            for (int i = 0; i < 8; i++)
                CHECK(rig_allowed(&rig, 0, (i * 3 + 1) % 8) == (i < HANDS[c].n_left), "case %zu, %d ranks: rank %d in order of mass",
                      c, n_ranks, i);
            rig_close(&rig);
        }
    }
}

/* A greedy row has no filters; nor has a row with all of them off. */
static void test_off(void) {
    float *x = new_logits(9, 100);
    x[17] = -INFINITY;
    for (int greedy = 0; greedy < 2; greedy++) {
        struct seq_params p = rig_params_off();
        struct rig rig;
        if (greedy)
            p.temperature = 0, p.top_k = 3, p.top_p = 0.5f, p.min_p = 0.5f;
        open_filtered(&rig, 3, x, 100, &p, NULL, 0);
        CHECK(count_allowed(&rig) == 99 && !rig_allowed(&rig, 0, 17), "%lld left", (long long)count_allowed(&rig));
        rig_close(&rig);
    }
    free(x);
}

/* 2^20 tokens at the maximum: the masses sum to 2^60 without overflow, all tie, all stay. With one above by log 2^20 and a bit,
 * half the mass is that one token. */
static void test_large(void) {
    const int64_t vocab = 1 << 20;
    float *x = calloc((size_t)vocab, sizeof *x);
    struct seq_params p = rig_params_off();
    struct rig rig;
    p.top_p = 0.5f;
    open_filtered(&rig, 3, x, vocab, &p, NULL, 0);
    CHECK(count_allowed(&rig) == vocab, "%lld left", (long long)count_allowed(&rig));
    CHECK(rig_state(&rig, 0)->remaining == UINT64_C(1) << 59, "%llu", (unsigned long long)rig_state(&rig, 0)->remaining);
    rig_close(&rig);
    x[vocab / 3] = 13.8630f; /* log 2^20 = 13.86294 */
    open_filtered(&rig, 3, x, vocab, &p, NULL, 0);
    CHECK(count_allowed(&rig) == 1 && rig_allowed(&rig, 0, vocab / 3), "%lld left", (long long)count_allowed(&rig));
    rig_close(&rig);
    free(x);
}

/* Extremes of the image: signs, zeros, denormals, the ends of the range, NaN and infinities. Descending, -0 and 0 being one. */
static void test_image(void) {
    const float order[] = {FLT_MAX, 3, 1.5f, 1e-30f, 1e-42f, 0, -1e-42f, -1, -FLT_MAX};
    enum { N = sizeof order / sizeof *order };
    for (int i = 0; i + 1 < N; i++)
        CHECK(sampling_image(order[i]) > sampling_image(order[i + 1]), "%g and %g", (double)order[i], (double)order[i + 1]);
    CHECK(sampling_image(-FLT_MAX) == SAMPLING_LOWEST, "lowest");
    CHECK(sampling_image(-INFINITY) == SAMPLING_LOWEST - 1, "infinity");
    CHECK(sampling_image(sampling_clean(-0.0f)) == sampling_image(0), "zeros");
    CHECK(sampling_clean(NAN) == -INFINITY && sampling_clean(INFINITY) == FLT_MAX && sampling_clean(-INFINITY) == -INFINITY, "clean");
    for (int k = 1; k <= N; k++) {
        struct seq_params p = rig_params_off();
        struct rig rig;
        float x[N + 3];
        for (int i = 0; i < N; i++)
            x[(i * 5) % N] = order[i];
        x[N] = NAN, x[N + 1] = -INFINITY, x[N + 2] = -INFINITY;
        p.top_k = k;
        open_filtered(&rig, 2, x, N + 3, &p, NULL, 0);
        for (int i = 0; i < N + 3; i++)
            CHECK(rig_allowed(&rig, 0, i < N ? (i * 5) % N : i) == (i < k), "k %d, place %d", k, i);
        rig_close(&rig);
    }
}

/* The exponential against the C library's: two units in the last place. */
static void test_exp(void) {
    for (uint64_t i = 0; i < 100000; i++) {
        double x = -700 * pow((double)(test_hash(3, i) >> 11) / 9007199254740992.0, 4);
        double want = exp(x), got = sampling_exp(x);
        CHECK(fabs(got - want) <= 2 * 2.220446049250313e-16 * want, "e^%.17g: %.17g, not %.17g", x, got, want);
    }
    CHECK(sampling_exp(0) == 1 && sampling_exp(-701) == 0 && sampling_exp(-(double)INFINITY) == 0, "ends");
}

int main(void) {
    test_exp();
    test_image();
    test_hand();
    test_off();
    test_golden();
    test_large();
    return test_report();
}
