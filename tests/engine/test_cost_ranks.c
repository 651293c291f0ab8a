/* Costs against the engine: what cost.h says of each rank is, summed, what the engine has allocated and what it says that a step reads.
 * Every (tp, cp) split of the ranks, every way of merging, caches with and without correction, prompts within the window and beyond it. */
#include "engine/cost.h"

#include "engine/engine_impl.h"
#include "tiny_model.h"

enum { DEADLINE = 300 };

static const struct config {
    const char *cache, *k_bits;
    int window, sink, batch;
    int64_t context;
    bool calibration;
    int prefill_gather;
} configs[] = {
    {"fp16", NULL, -1, -1, 4, 512, false, 0},    {"kvlinc", NULL, -1, -1, 4, 1000, true, 16}, {"kvlinc", "0:4,1:2", 256, 16, 3, 777, true,
                                                                                               0},
    {"kivi", NULL, -1, -1, 1, 200, false, 0},    {"hadv", NULL, 256, 32, 16, 1024, false, 64},
};

struct world {
    struct comm *all;
    char model[256], calibration[256];
};

static struct cost_job job_of(struct engine *e, const struct config *c) {
    const struct rank *r = &e->worker.rank;
    return (struct cost_job){.config = engine_model(e), .spec = r->spec, .features = r->cache.shape.features, .context = c->context,
                             .batch = c->batch, .tp = r->grid.tp, .cp = r->grid.cp, .merge = r->merge.kind,
                             .prefill_gather = c->prefill_gather};
}

static void check_memory(struct engine *e, const struct cost_job *job, const char *name) {
    struct engine_memory m;
    struct cost_memory sum = {0};
    engine_memory(e, &m);
    for (int t = 0; t < job->tp; t++)
        for (int c = 0; c < job->cp; c++) {
            struct cost_memory own;
            cost_memory(job, t, c, &own);
            sum.weights += own.weights;
            sum.workspace += own.workspace + own.prefill + own.host;
            sum.cache_total += own.cache_total;
        }
    CHECK(sum.weights == m.weights, "%s, tp %d cp %d %s: %lld bytes of weights, the engine has %lld", name, job->tp, job->cp,
          merge_name(job->merge), (long long)sum.weights, (long long)m.weights);
    CHECK(sum.workspace == m.workspace, "%s, tp %d cp %d %s: %lld bytes of workspace, the engine has %lld", name, job->tp, job->cp,
          merge_name(job->merge), (long long)sum.workspace, (long long)m.workspace);
    CHECK(sum.cache_total == m.cache, "%s, tp %d cp %d %s: %lld bytes of cache, the engine has %lld", name, job->tp, job->cp,
          merge_name(job->merge), (long long)sum.cache_total, (long long)m.cache);
}

static void check_reads(struct engine *e, const struct cost_job *job, const char *name) {
    for (int64_t n = 0; n <= job->context; n += n < 10 ? 1 : n == 10 ? 117 : n % 128 == 0 || n % 128 == 127 ? 1 : 127 - n % 128) {
        int64_t weights, cache;
        struct cost_reads sum = {0};
        engine_read_bytes(e, n, &weights, &cache);
        for (int t = 0; t < job->tp; t++)
            for (int c = 0; c < job->cp; c++) {
                struct cost_reads own;
                cost_reads(job, t, c, n, &own);
                sum.weights += own.weights;
                sum.cache += own.cache;
            }
        CHECK(sum.weights == weights, "%s, tp %d cp %d: %lld bytes of weights are read, the engine says %lld", name, job->tp, job->cp,
              (long long)sum.weights, (long long)weights);
        CHECK(sum.cache == cache * job->batch, "%s, tp %d cp %d, %lld tokens: %lld bytes of cache are read, the engine says %lld", name,
              job->tp,
              job->cp, (long long)n, (long long)sum.cache, (long long)(cache * job->batch));
    }
}

/* Collective. */
static void check(const struct world *w, const struct config *c, int tp, int cp, const char *merge) {
    struct engine *e;
    struct place place = {.n_cores = 1, .memory_bytes = (int64_t)4 << 30};
    struct engine_options o = {.model = w->model, .device = "cpu", .dp = 1, .tp = tp, .cp = cp, .merge = merge, .cache = c->cache,
                               .k_bits = c->k_bits, .window = c->window, .sink = c->sink, .context = c->context, .max_batch = c->batch,
                               .calibration = c->calibration ? w->calibration : NULL, .threads = 1, .cache_memory = 256 << 20,
                               .prefill_gather = c->prefill_gather};
    REQUIRE(engine_open(w->all, &o, &place, &e));
    if (comm_rank(w->all) == 0) {
        struct cost_job job = job_of(e, c);
        check_memory(e, &job, c->cache);
        check_reads(e, &job, c->cache);
    }
    engine_close(e);
}

static void make_files(struct world *w) {
    struct model_file *file;
    char *model = tiny_model("model", 0);
    snprintf(w->model, sizeof w->model, "%s", model);
    free(model);
    REQUIRE(model_file_open(w->model, &file));
    snprintf(w->calibration, sizeof w->calibration, "%s",
             tiny_save_calibration("calibration.safetensors", file, &(struct tiny_calibration){.only_layer = -1}));
    model_file_close(file);
}

int main(int argc, char **argv) {
    struct world w = {0};
    REQUIRE(comm_start("auto", DEADLINE, &argc, &argv, &w.all));
    base_set_log(LOG_ERROR, "");
    if (comm_rank(w.all) == 0)
        make_files(&w);
    REQUIRE(comm_broadcast(w.all, "paths", w.model, (int64_t)(sizeof w - offsetof(struct world, model)), 0));
    int size = comm_size(w.all);
    for (int tp = 1; tp <= size; tp++)
        for (int merge = MERGE_ALLREDUCE; merge <= MERGE_GATHER && size % tp == 0 && TINY_KV_HEADS % tp == 0; merge++)
            for (size_t i = 0; i < sizeof configs / sizeof *configs; i++)
                check(&w, &configs[i], tp, size / tp, merge_name((enum merge_kind)merge));
    test_n_checks++; /* followers check nothing but what they require */
    int64_t failed = test_n_failed;
    REQUIRE(comm_reduce_host(w.all, "result", &failed, 1, COMM_SUM));
    comm_finish(w.all);
    return failed ? 1 : test_report();
}
