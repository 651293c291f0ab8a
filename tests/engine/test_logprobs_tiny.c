/* Tiny random Llama, Qwen2 and Qwen3 models that transformers made and saved (golden/tiny_models.py) against its log-probabilities and greedy
 * continuations: head dims, groups, rope, tied heads, dtypes, sharded files and norms of heads that the real model does not have.
 * One rank. */
#include "device.h"
#include "logprob_check.h"

/* About ten times (float32) and three times (16 bit) what was measured; bfloat16 has three bits less than fp16. */
static const struct logprob_bounds exact = {.mean = 3e-5, .most = 3e-4, .tie = 6e-4};
static const struct logprob_bounds half = {.mean = 0.01, .most = 0.1, .tie = 0.02};
static const struct logprob_bounds brief = {.mean = 0.05, .most = 0.5, .tie = 0.1};

enum { CONTEXT = 1024, BATCH = 4, LONGEST = 700 };

static void check_model(struct comm *world, const struct place *place, const char *device, const char *folder, const struct logprob_golden *golden) {
    static const struct {
        const char *weights, *cache;
        const struct logprob_bounds *bounds;
    } rows[] = {{"f32", "f32", &exact}, {"auto", "fp16", &half}, {"auto", "bf16", &brief}};
    char path[512], what[128];
    snprintf(path, sizeof path, "%s/%s", KVLINC_TESTS, folder);
    for (int i = device_is_gpu(device) ? 1 : 0; i < 3; i++) { /* float caches are the CPU's */
        struct engine_options options = {.model = path, .device = device, .merge = "auto", .cache = rows[i].cache, .weights = rows[i].weights,
                                         .window = -1, .sink = -1, .context = CONTEXT, .max_batch = BATCH, .threads = 1};
        struct engine *engine;
        REQUIRE(engine_open(world, &options, place, &engine));
        snprintf(what, sizeof what, "%s %s/%s", strrchr(folder, '/') + 1, rows[i].weights, rows[i].cache);
        /* A GPU rounds what many rows bring to bfloat16 weights to their type. */
        const struct logprob_bounds *bounds = device_is_gpu(device) && strstr(folder, "bf16") ? &brief : rows[i].bounds;
        logprob_check(engine, what, golden, 1, LONGEST, ENGINE_PREFILL_EXACT, bounds);
        logprob_check(engine, what, golden, 1, LONGEST, ENGINE_PREFILL_CACHED, bounds);
        engine_close(engine);
    }
}

int main(int argc, char **argv) { /* DEVICE */
    struct comm *world;
    struct place place;
    const char *device = argc > 1 ? argv[1] : "cpu";
    REQUIRE(comm_start("self", 60, &argc, &argv, &world));
    device_require(world, device);
    REQUIRE(place_bind(world, &place));
    json_t *root = logprob_load(TEST_FILE("golden/tiny_models.json")), *models = json_object_get(root, "models");
    CHECK(json_array_size(models) >= 7, "%zu models", json_array_size(models));
    for (size_t i = 0; i < json_array_size(models); i++) {
        json_t *row = json_array_get(models, i);
        struct logprob_golden golden = logprob_golden_read(root, json_object_get(row, "prompts"));
        const char *gguf = json_string_value(json_object_get(row, "gguf"));
        check_model(world, &place, device, json_string_value(json_object_get(row, "folder")), &golden);
        if (gguf)
            check_model(world, &place, device, gguf, &golden);
        logprob_golden_free(&golden);
    }
    json_decref(root);
    comm_finish(world);
    return test_report();
}
