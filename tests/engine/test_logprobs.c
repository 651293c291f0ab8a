/* A real model against transformers (golden/logprobs.py): log-probabilities of prompts of 1 to 4000 tokens and greedy continuations, in
 * float32 with both ways of prefill, then with 16-bit weights and cache. One rank. KVLINC_TEST_MODEL names SmolLM2-135M or
 * Qwen2.5-Coder-0.5B. */
#include "launch/environment.h"
#include "device.h"
#include "logprob_check.h"

/* Some ten times (float32) what was measured; a near-tie is a margin that two logits with the largest allowed error can close. */
static const struct logprob_bounds exact = {.mean = 3e-5, .most = 4e-4, .tie = 8e-4};
static const struct logprob_bounds half = {.mean = 0.01, .most = 0.3, .tie = 0.05};

enum {
    CONTEXT = 4096, /* longest golden prompt with room to continue */
    BATCH = 6,
    LONG = 1600,    /* prompts beyond are run once */
    MIDDLE = 700,   /* of the 16-bit run */
};

static struct engine *open_engine(struct comm *world, const struct place *place, const char *device, const char *path, const char *weights,
                                  const char *cache) {
    struct engine_options options = {.model = path, .device = device, .merge = "auto", .cache = cache, .weights = weights, .window = -1,
                                     .sink = -1, .context = CONTEXT, .max_batch = BATCH};
    struct engine *engine;
    REQUIRE(engine_open(world, &options, place, &engine));
    return engine;
}

static const char *find_golden(const char *path) {
    struct model_file *file;
    REQUIRE(model_file_open(path, &file));
    bool qwen2 = model_file_config(file)->arch == MODEL_ARCH_QWEN2;
    model_file_close(file);
    return qwen2 ? TEST_FILE("golden/logprobs_qwen2.json") : TEST_FILE("golden/logprobs.json");
}

int main(int argc, char **argv) { /* DEVICE */
    const char *device = argc > 1 ? argv[1] : "cpu";
    const char *path = getenv("KVLINC_TEST_MODEL");
    struct comm *world;
    struct place place;
    if (!path)
        return TEST_SKIP;
    environment_prepare(argv);
    REQUIRE(comm_start("self", 60, &argc, &argv, &world));
    device_require(world, device);
    REQUIRE(place_bind(world, &place));
    json_t *root = logprob_load(find_golden(path));
    struct logprob_golden golden = logprob_golden_read(root, json_object_get(root, "prompts"));

    struct engine *engine;
    if (!device_is_gpu(device)) { /* float caches are the CPU's */
        engine = open_engine(world, &place, device, path, "f32", "f32");
        logprob_check(engine, "f32", &golden, 1, CONTEXT, ENGINE_PREFILL_EXACT, &exact);
        logprob_check(engine, "f32", &golden, 1, LONG, ENGINE_PREFILL_CACHED, &exact);
        engine_close(engine);
    }
    engine = open_engine(world, &place, device, path, "auto", "fp16");
    logprob_check(engine, "16 bit", &golden, 1, device_is_gpu(device) ? CONTEXT : MIDDLE, ENGINE_PREFILL_EXACT, &half);
    if (device_is_gpu(device))
        logprob_check(engine, "16 bit", &golden, 1, CONTEXT, ENGINE_PREFILL_CACHED, &half);
    engine_close(engine);

    logprob_golden_free(&golden);
    json_decref(root);
    comm_finish(world);
    return test_report();
}
