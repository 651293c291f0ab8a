/* Costs as arithmetic: a model of 8 billion parameters by hand, sums that equal their parts, what must grow and what must shrink, times of
 * collectives, files of rates. What the engine itself allocates and reads is test_cost_ranks.c's. */
#include "engine/cost.h"

#include "engine/prefill.h"
#include "file_maker.h"

/* Llama 3.1 8B's shape. By hand, in values: Q, K, V 4096 x (4096 + 2 x 1024) = 25,165,824; o_proj 16,777,216; MLP 3 x 4096 x 14336 =
 * 176,160,768: a layer 218,103,808, 32 of them 6,979,321,856. Embedding and LM head 128256 x 4096 = 525,336,576 each. Norms (65 x 4096) and
 * RoPE's 64 frequencies are in 32 bit. */
static const struct model_config llama = {.hidden = 4096, .n_layers = 32, .n_heads = 32, .n_kv_heads = 8, .head_dim = 128,
                                          .intermediate = 14336,
                                          .vocab = 128256, .context = 131072};
static const int64_t layers_bytes = 2 * 6979321856, table_bytes = 2 * 525336576, floats_bytes = (65 * 4096 + 64) * 4;

/* Round numbers, nothing but bytes and operations costs. */
static struct cost_rates plain_rates(void) {
    struct cost_rates r = {.gpus = 64, .gpus_per_node = 8, .memory_bytes = (int64_t)80 << 30, .reserved_bytes = 1 << 30, .read_rate = 1e12,
                           .weights_share = 1, .gemm_rate = 1e15, .attention_share = 0.5, .prefill_rate = 5e14, .node_latency_s = 10e-6,
                           .node_bandwidth = 1e10};
    for (int kind = 0; kind < COST_N_COLLECTIVES; kind++) {
        r.n_curves[kind] = 2;
        r.curves[kind][0] = (struct cost_curve){.ranks = 2, .n = 2, .bytes = {1000, 3000}, .seconds = {4e-6, 8e-6}};
        r.curves[kind][1] = (struct cost_curve){.ranks = 8, .n = 2, .bytes = {1000, 3000}, .seconds = {10e-6, 20e-6}};
    }
    return r;
}

static struct cache_spec spec_of(const char *preset, bool adapters) {
    struct cache_spec spec;
    struct cache_request r = {.preset = preset, .window = -1, .sink = -1, .has_adapters = adapters};
    REQUIRE(cache_spec_make(&r, llama.n_layers, &spec));
    return spec;
}

static struct cost_job job_of(const struct cache_spec *spec, int64_t context, int tp, int cp, enum merge_kind merge) {
    return (struct cost_job){.config = &llama, .spec = spec, .features = 256, .context = context, .batch = 1, .tp = tp, .cp = cp,
                             .merge = merge,
                             .gpu = true};
}

static bool near(double a, double b) { return fabs(a - b) <= 1e-12 * (fabs(a) + fabs(b)); }

/* ---- by hand ----------------------------------------------------------------------------------------------------------- */

static void test_by_hand(void) {
    enum { N = 131072 };
    struct cache_spec spec = spec_of("hadv", false);
    struct cost_job job = job_of(&spec, N, 1, 1, MERGE_GATHER);
    struct cost_rates rates = plain_rates();
    struct cost_memory m;
    struct cost_reads reads;
    struct cost_step step;
    struct cost_prefill prefill;
    cost_memory(&job, 0, 0, &m);
    CHECK(m.weights == layers_bytes + 2 * table_bytes + floats_bytes, "%lld bytes of weights", (long long)m.weights);
    CHECK(m.weights / 10000000 == 1606, "16.06e9 bytes, not %lld", (long long)m.weights);
    struct model_config of_heads = llama; /* norms of the heads of q and k */
    struct cost_job normed_job = job;
    struct cost_memory normed;
    of_heads.qk_norm = true;
    normed_job.config = &of_heads;
    cost_memory(&normed_job, 0, 0, &normed);
    CHECK(normed.weights == m.weights + 32 * 2 * 128 * 4, "%lld bytes of weights with norms of heads", (long long)normed.weights);
    /* a page holds 8 heads x 32 layers x (2 x 128 x 128 / 4 codes + 2 x 128 scales and zeros of 4 bytes) = 9216 x 256; of 1,024 blocks
     * the last two are in 16 bit */
    CHECK(m.cache.pages == 1022LL * 9216 * 256, "%lld bytes of pages", (long long)m.cache.pages);
    /* the window: 256 tokens, K and V, 2 bytes a value */
    CHECK(m.cache.window == 256LL * 2 * 128 * 2 * 256, "%lld bytes of window", (long long)m.cache.window);
    CHECK(m.cache.states == 0 && m.cache.sink == 0, "states, sink");
    cost_reads(&job, 0, 0, N, &reads);
    CHECK(reads.weights == layers_bytes + table_bytes + 4096 * 2 + floats_bytes, "%lld bytes of weights are read",
          (long long)reads.weights);
    CHECK(reads.cache == m.cache.pages + m.cache.window, "%lld bytes of cache are read", (long long)reads.cache);
    cost_decode(&job, &rates, N, &step);
    CHECK(near(step.weights, (double)reads.weights / 1e12) && near(step.attention, (double)reads.cache / 0.5e12), "%g s, %g s",
          step.weights, step.attention);
    CHECK(step.merge + step.sums + step.ends + step.launches == 0, "one rank has no collectives");
    cost_prefill(&job, &rates, N, &prefill);
    double dense = 2.0 * N * 6979321856.0, attention = 2.0 * N * N * 4096 * 32; /* half the square of scores, two products */
    CHECK(near(prefill.dense, dense / 1e15) && near(prefill.attention, attention / 5e14), "%g s, %g s", prefill.dense, prefill.attention);
    CHECK(near(prefill.flop, dense + attention), "%g FLOP", prefill.flop);
    spec = spec_of("kvlinc", true); /* S: 256 x 128, P: 256, in float, of 8 heads and 32 layers */
    cost_memory(&job, 0, 0, &m);
    CHECK(m.cache.states == 4LL * (256 * 128 + 256) * 256, "%lld bytes of states", (long long)m.cache.states);
    spec = spec_of("fp16", false);
    cost_memory(&job, 0, 0, &m);
    CHECK(m.cache.pages + m.cache.window == 131072LL * 131072, "128 KiB a token: %lld", (long long)m.cache.pages);
}

/* A layer's collectives in bytes: 33 KB of records a rank, 16 KB of the residual stream. */
static void test_collectives_by_hand(void) {
    struct cost_rates r = plain_rates();
    struct cache_spec spec = spec_of("kvlinc", true);
    struct cost_step step;
    struct cost_group cp = {2, 1, 2};
    struct cost_job job = job_of(&spec, 131072, 1, 2, MERGE_GATHER);
    cost_decode(&job, &r, 131072, &step);
    CHECK(near(step.merge, 32 * cost_collective(&r, COST_ALL_GATHER, &cp, 2 * 32 * (2 * 128 + 4) * 4)), "gather: %g s", step.merge);
    CHECK(near(step.sums, 64 * cost_collective(&r, COST_ALL_REDUCE, &cp, 4096 * 4)), "sums: %g s", step.sums);
    job.merge = MERGE_ALLREDUCE;
    cost_decode(&job, &r, 131072, &step);
    CHECK(near(step.merge, 32 * (cost_collective(&r, COST_ALL_MAX, &cp, 32 * 4) + cost_collective(&r, COST_ALL_REDUCE, &cp, 32 * 129 * 4))),
          "allreduce: %g s", step.merge);
    job.merge = MERGE_FUSED;
    cost_decode(&job, &r, 131072, &step);
    CHECK(near(step.merge, 32 * cost_collective(&r, COST_ALL_GATHER, &cp, 2 * 32 * 3 * 4)), "fused: %g s", step.merge);
}

/* ---- sums, and what grows ---------------------------------------------------------------------------------------------- */

static void check_sums(const struct cost_job *job, const struct cost_rates *rates) {
    struct cost_memory m;
    struct cost_step s;
    struct cost_prefill p;
    cost_memory(job, 0, 0, &m);
    cost_decode(job, rates, job->context, &s);
    cost_prefill(job, rates, job->context, &p);
    CHECK(m.cache_total == cache_bytes_sum(&m.cache) && m.total == m.weights + m.workspace + m.prefill + m.cache_total,
          "memory of tp %d cp %d",
          job->tp, job->cp);
    CHECK(near(s.total, s.weights + s.attention + s.merge + s.sums + s.ends + s.launches), "a step of tp %d cp %d", job->tp, job->cp);
    CHECK(near(p.total, p.dense + p.attention + p.activations + p.collectives + p.launches + p.gather), "a prompt, tp %d cp %d", job->tp,
          job->cp);
    CHECK(s.total > 0 && p.total > 0 && m.total > 0 && p.flop > 0, "nothing is free");
    CHECK(job->tp * job->cp == 1 || (s.sums > 0 && s.ends > 0), "several ranks talk");
    CHECK((job->cp == 1) == (s.merge == 0), "merge of cp %d: %g s", job->cp, s.merge);
}

static void test_growth(void) {
    static const char *const presets[] = {"fp16", "kivi", "kvlinc"};
    static const int layouts[][2] = {{1, 1}, {1, 8}, {2, 4}, {8, 1}, {8, 8}, {1, 3}};
    struct cost_rates rates = plain_rates();
    rates.launch_s = 1e-6;
    rates.attention_s = 3e-6;
    for (int c = 0; c < 3; c++)
        for (size_t l = 0; l < sizeof layouts / sizeof *layouts; l++)
            for (enum merge_kind merge = MERGE_ALLREDUCE; merge <= MERGE_GATHER; merge++) {
                struct cache_spec spec = spec_of(presets[c], true);
                struct cost_step before = {0}, now;
                struct cost_prefill prompt_before = {0}, prompt;
                struct cost_memory memory_before = {0}, memory;
                int64_t left_before = INT64_MAX, left;
                for (int64_t n = 1; n < 20000000; n = 3 * n + 1) {
                    struct cost_job job = job_of(&spec, n, layouts[l][0], layouts[l][1], merge);
                    check_sums(&job, &rates);
                    cost_decode(&job, &rates, n, &now);
                    cost_prefill(&job, &rates, n, &prompt);
                    cost_memory(&job, 0, 0, &memory);
                    bool fits = cost_fits(&job, &rates, &left);
                    CHECK(now.total >= before.total, "%lld tokens: a step of %g s after %g", (long long)n, now.total, before.total);
                    bool same_way = job.cp == 1 || n / 3 >= (int64_t)PREFILL_GATHER_FROM * job.cp; /* else the faster way may begin here */
                    CHECK(!same_way || n < 1000 || prompt.total >= prompt_before.total * (1 - 1e-12),
                          "%lld tokens: a prompt of %.17g s after %.17g",
                          (long long)n, prompt.total, prompt_before.total);
                    CHECK(memory.total >= memory_before.total && left <= left_before, "%lld tokens: bytes shrink", (long long)n);
                    CHECK(fits == (left >= 0), "fits, left %lld", (long long)left);
                    job.batch = 16;
                    struct cost_step many;
                    cost_decode(&job, &rates, n, &many);
                    CHECK(many.total >= now.total && many.total <= 16 * now.total, "batch 16: %g s, 1: %g s", many.total, now.total);
                    before = now;
                    prompt_before = prompt;
                    memory_before = memory;
                    left_before = left;
                }
            }
}

/* What only a measurement knows: how fast products of few rows read, and attention of a block of rows over a cache. */
static void test_measured(void) {
    enum { N = 4096, SLOWER = 4 };
    struct cache_spec spec = spec_of("hadv", false);
    struct cost_job job = job_of(&spec, N, 1, 1, MERGE_GATHER);
    struct cost_rates rates = plain_rates(), slow = rates;
    struct cost_step step, slow_step;
    struct cost_prefill cached, slow_cached, within, exact;
    slow.weights_share = rates.weights_share / SLOWER;
    slow.cached_rate = 1e12;
    cost_decode(&job, &rates, N, &step);
    cost_decode(&job, &slow, N, &slow_step);
    CHECK(near(slow_step.weights, SLOWER * step.weights) && near(slow_step.attention, step.attention), "%g s of weights, %g at full rate",
          slow_step.weights, step.weights);
    cost_prefill_cached(&job, &rates, N, &cached);
    cost_prefill_cached(&job, &slow, N, &slow_cached);
    CHECK(near(cached.attention, N / KV_BLOCK * step.attention), "%g s of attention in steps of %g", cached.attention, step.attention);
    CHECK(near(slow_cached.attention, 32 * 2.0 * N * N * 4096 / 1e12), "%g s of attention by its rate", slow_cached.attention);
    CHECK(slow_cached.dense > cached.dense && near(cached.total, cached.dense + cached.attention + cached.launches), "a cached prompt");
    cost_prefill_cached(&job, &slow, spec.window, &within);
    cost_prefill(&job, &slow, spec.window, &exact);
    CHECK(near(within.total, exact.total) && within.total > 0, "within the window: %g s exact, %g cached", exact.total, within.total);
}

/* More ranks hold and read less each, never less together. */
static void test_ranks(void) {
    struct cache_spec spec = spec_of("kvlinc", true);
    struct cost_memory one, other;
    for (int tp = 1; tp <= 8; tp *= 2)
        for (int cp = 1; cp <= 5; cp++) {
            struct cost_job alone = job_of(&spec, 1000000, 1, 1, MERGE_GATHER), job = job_of(&spec, 1000000, tp, cp, MERGE_GATHER);
            int64_t weights = 0, pages = 0;
            cost_memory(&alone, 0, 0, &one);
            for (int t = 0; t < tp; t++)
                for (int c = 0; c < cp; c++) {
                    struct cost_memory most;
                    cost_memory(&job, 0, 0, &most);
                    cost_memory(&job, t, c, &other);
                    CHECK(other.weights <= most.weights && other.total <= most.total, "rank %d, %d holds more than the first", t, c);
                    weights += other.weights;
                    pages += other.cache.pages;
                }
            CHECK(weights >= one.weights && pages >= one.cache.pages, "tp %d cp %d hold less than one", tp, cp);
        }
}

/* ---- collectives ------------------------------------------------------------------------------------------------------- */

static void test_curves(void) {
    struct cost_rates r = plain_rates();
    static const struct {
        struct cost_group group;
        double bytes, us;
    } rows[] = {
        {{1, 1, 1}, 1e6, 0},     {{2, 1, 2}, 1, 4},      {{2, 1, 2}, 1000, 4},   {{2, 1, 2}, 2000, 6},  {{2, 1, 2}, 3000, 8},
        {{2, 1, 2}, 5000, 12},   {{8, 1, 8}, 2000, 15},  {{5, 1, 5}, 2000, 10.5}, /* half way from 2 to 8 */
        {{16, 2, 8}, 2000, 15 + 2 * (10 + 1e6 * (2000 / 8.0 / 2) / 1e10)},        /* a message, half of each GPU's eighth, there and back */
        {{64, 8, 8}, 2000, 15 + 2 * (30 + 1e6 * (2000 / 8.0 * 7 / 8) / 1e10)},    /* three rounds */
        {{4, 4, 1}, 2000, 0 + 2 * (20 + 1e6 * (2000 * 0.75) / 1e10)},             /* one GPU on each node */
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double s = cost_collective(&r, COST_ALL_REDUCE, &rows[i].group, rows[i].bytes);
        CHECK(fabs(s * 1e6 - rows[i].us) < 1e-9, "row %zu: %g us, expected %g", i, s * 1e6, rows[i].us);
    }
    struct cost_group nodes = {16, 2, 8};
    double gather = cost_collective(&r, COST_ALL_GATHER, &nodes, 2000), sum = cost_collective(&r, COST_ALL_REDUCE, &nodes, 2000);
    CHECK(near(sum - 15e-6, 2 * (gather - 15e-6)), "a gather goes one way: %g, %g", gather, sum);
    static const struct {
        int first, stride, ranks;
        struct cost_group group;
    } groups[] = {{0, 1, 1, {1, 1, 1}},   {0, 1, 8, {8, 1, 8}},   {0, 1, 9, {9, 2, 8}},  {6, 1, 4, {4, 2, 2}},
                  {0, 8, 8, {8, 8, 1}},   {0, 4, 4, {4, 2, 2}},   {0, 1, 64, {64, 8, 8}}, {3, 3, 3, {3, 2, 2}}};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        struct cost_group g = cost_group_make(&r, groups[i].first, groups[i].stride, groups[i].ranks), e = groups[i].group;
        CHECK(g.ranks == e.ranks && g.nodes == e.nodes && g.each == e.each, "group %zu: %d ranks, %d nodes, %d each", i, g.ranks, g.nodes,
              g.each);
    }
}

/* ---- files of rates ---------------------------------------------------------------------------------------------------- */

static const char good[] = "about = a machine # and a comment\ngpus = 2\ngpus_per_node = 2\nmemory_bytes = 80G\nreserved_bytes = 1.5G\n"
                           "read_rate = 3e12\ngemm_rate = 6e14\nattention_share = 0.9\nattention_us = 4\nprefill_rate = 5e14\n"
                           "launch_us = 1.5\n"
                           "all_reduce_2 = 1K:3.7  16K:4.2\nall_max_2 = 1K:6\nall_gather_2 = 1K:3.5\n";

static void check_bad(const char *from, const char *to, const char *words) {
    char text[2048];
    struct cost_rates r;
    const char *at = strstr(good, from);
    REQUIRE(at ? 0 : -1);
    int n = snprintf(text, sizeof text, "%.*s%s%s", (int)(at - good), good, to, at + strlen(from));
    CHECK_FAILS(cost_rates_read(maker_write("bad.conf", text, (size_t)n), &r), STATUS_INPUT, words);
}

static void test_rates(void) {
    struct cost_rates r;
    REQUIRE(cost_rates_read(maker_write("good.conf", good, strlen(good)), &r));
    CHECK(strcmp(r.about, "a machine") == 0 && r.gpus == 2 && r.memory_bytes == (int64_t)80 << 30 && r.reserved_bytes == (int64_t)3 << 29,
          "'%s'",
          r.about);
    CHECK(near(r.launch_s, 1.5e-6) && near(r.attention_s, 4e-6) && near(r.read_rate, 3e12), "numbers");
    CHECK(r.n_curves[0] == 1 && r.curves[0][0].n == 2 && near(r.curves[0][0].bytes[1], 16384) && near(r.curves[0][0].seconds[1], 4.2e-6),
          "a curve");
    check_bad("gpus = 2", "gpu = 2", "bad.conf: 2: gpu: no rate is called that");
    check_bad("gpus = 2", "gpus = 2.5", "not a whole number");
    check_bad("gpus = 2", "gpus = 16", "node_latency_us");
    check_bad("gpus = 2", "gpus 2", "not of the form name = value");
    check_bad("read_rate = 3e12\n", "", "read_rate is missing");
    check_bad("read_rate = 3e12", "read_rate = 3e12\nread_rate = 3e12", "7: read_rate: stands there twice");
    check_bad("3e12", "fast", "'fast' is not a positive number");
    check_bad("3e12", "-3e12", "not a positive number");
    check_bad("3e12", "3e12 bytes", "not a positive number");
    check_bad("0.9", "1.5", "attention_share");
    check_bad("1K:3.7  16K:4.2", "16K:3.7 1K:4.2", "bytes have to ascend");
    check_bad("1K:3.7  16K:4.2", "1K 3.7", "not a list of bytes:microseconds");
    check_bad("1K:3.7  16K:4.2", "", "no points");
    check_bad("all_gather_2", "all_gather_", "number of GPUs");
    check_bad("all_gather_2 = 1K:3.5\n", "", "all_gather_2 is missing");
    check_bad("gpus_per_node = 2", "gpus_per_node = 8", "all_reduce_8 is missing");
    check_bad("gpus = 2", "assumed = read_rate lunch_us\ngpus = 2", "no rate is called 'lunch_us'");
    CHECK_FAILS(cost_rates_read("/nowhere/x.conf", &r), STATUS_INPUT, "/nowhere/x.conf: No such file");
}

int main(void) {
    test_by_hand();
    test_collectives_by_hand();
    test_growth();
    test_measured();
    test_ranks();
    test_curves();
    test_rates();
    return test_report();
}
