/* Calibration files: a good one is read and cut by heads; whatever does not fit the model is refused by name. */
#include "engine/calibration.h"
#include "tiny_model.h"

static struct model_file *model;
static char hash[65];
static char last_log[1024];

static void keep_log(enum log_level level, const char *line, void *context) {
    (void)level, (void)context;
    snprintf(last_log, sizeof last_log, "%s", line);
}

static const struct tiny_calibration right = {.only_layer = -1, .gate = true};

static void check_good(bool per_head, int only_layer) {
    struct calibration *cal;
    struct tiny_calibration c = right;
    c.per_head = per_head;
    c.only_layer = only_layer;
    const char *path = tiny_save_calibration("good.safetensors", model, &c);
    last_log[0] = '\0';
    REQUIRE(calibration_open(path, model, hash, &cal));
    CHECK(last_log[0] == '\0', "said '%s'", last_log);
    CHECK(calibration_has_adapters(cal) && calibration_features(cal) == TINY_FEATURES && calibration_trained_length(cal) == 4096, "contents");
    CHECK(strlen(calibration_hash(cal)) == 64, "hash %s", calibration_hash(cal));
    for (int i = 0; i < TINY_LAYERS; i++)
        CHECK(calibration_has_layer(cal, i) == (only_layer < 0 || only_layer == i), "layer %d", i);
    struct backend *b;
    struct stream *s;
    struct cache_adapter adapters[TINY_LAYERS];
    memset(adapters, 0, sizeof adapters);
    REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, &b));
    REQUIRE(stream_open(b, &s));
    struct range heads = {4, 8}, kv_heads = {2, 4};
    REQUIRE(calibration_load(cal, heads, kv_heads, b, s, adapters));
    int64_t each = (int64_t)TINY_D * TINY_FEATURES;
    struct range phi_q = per_head ? heads : kv_heads;
    size_t bytes = 0;
    for (int l = 0; l < TINY_LAYERS; l++) {
        if (only_layer >= 0 && only_layer != l) {
            CHECK(!adapters[l].phi_k && !adapters[l].phi_q && !adapters[l].gate, "layer %d has adapters", l);
            continue;
        }
        CHECK(adapters[l].phi_q_per_head == per_head && !adapters[l].exact_v, "flags");
        for (int64_t i = 0; i < 2 * each; i++)
            CHECK(adapters[l].phi_k[i] == 0.3f * test_normal(300 + (uint64_t)l, (uint64_t)(2 * each + i)), "phi_k %lld", (long long)i);
        for (int64_t i = 0; i < range_size(phi_q) * each; i++)
            CHECK(adapters[l].phi_q[i] == 0.3f * test_normal(400 + (uint64_t)l, (uint64_t)(phi_q.begin * each + i)), "phi_q %lld", (long long)i);
        CHECK(adapters[l].gate[0] == 0.25f && adapters[l].gate[1] == 0.25f, "gate");
        bytes += (size_t)((2 + range_size(phi_q)) * each + 2) * sizeof(float);
    }
    CHECK(backend_used(b, MEMORY_WEIGHTS) == bytes, "%zu bytes, expected %zu", backend_used(b, MEMORY_WEIGHTS), bytes);
    calibration_unload(b, adapters, TINY_LAYERS);
    CHECK(backend_used(b, MEMORY_WEIGHTS) == 0, "bytes stay");
    stream_close(s);
    backend_close(b);
    calibration_close(cal);
}

static void refuse(struct tiny_calibration c, const char *words) {
    struct calibration *cal;
    const char *path = tiny_save_calibration("wrong.safetensors", model, &c);
    CHECK_FAILS(calibration_open(path, model, hash, &cal), STATUS_INPUT, words);
    CHECK_FAILS(calibration_open(path, model, hash, &cal), STATUS_INPUT, "wrong.safetensors"); /* every message names the file */
}

#define REFUSE(field, value, words)           \
    do {                                      \
        struct tiny_calibration c_ = right;   \
        c_.field = (value);                   \
        refuse(c_, words);                    \
    } while (0)

static void check_wrong(void) {
    REFUSE(format, "something", "format is something");
    REFUSE(hidden, "97", "hidden is 97, the model's is 96");
    REFUSE(rope, "theta 1", "rope is theta 1, the model's is theta 10000");
    REFUSE(tokenizer, "0123", "tokenizer is 0123");
    REFUSE(features, "544", "features is '544', expected a number from 2 to 512");
    REFUSE(features, "48", "expected a multiple of 32");
    REFUSE(features, "64", "shape");
    REFUSE(features, "many", "'many'");
    REFUSE(trained_length, "-1", "trained_length");
    REFUSE(phi_q, "layer", "phi_q is 'layer', expected kv_head or head");
    REFUSE(phi_q, "head", "layers.0.phi_q.weight: shape");
    REFUSE(leave_out, "layers.1.phi_k.weight", "layer 1: phi_k.weight and phi_q.weight come together");
    REFUSE(leave_out, "layers.0.phi_q.weight", "layer 0");
    REFUSE(reshape, "layers.1.phi_k.weight", "layers.1.phi_k.weight: shape [5,2,64,16], expected [6,2,64,16]");
    REFUSE(reshape, "layers.0.gate", "layers.0.gate: shape");
    REFUSE(extra, "layers.0.phi_x", "tensor layers.0.phi_x is not known");
    REFUSE(extra, "mean_key", "tensor mean_key is not known");
    REFUSE(extra, "layers.2.gate", "the model has layers 0 to 1");
    struct tiny_calibration other = right; /* other weights: a warning that names both */
    other.weights = "abcd";
    struct calibration *cal;
    last_log[0] = '\0';
    REQUIRE(calibration_open(tiny_save_calibration("other.safetensors", model, &other), model, hash, &cal));
    CHECK(strstr(last_log, "made for weights abcd") != NULL, "said '%s'", last_log);
    calibration_close(cal);
}

/* Cut off anywhere: an error, never a crash. */
static void check_truncated(void) {
    struct calibration *cal;
    char path[256];
    snprintf(path, sizeof path, "%s", tiny_save_calibration("whole.safetensors", model, &right));
    FILE *in = fopen(path, "rb");
    fseek(in, 0, SEEK_END);
    size_t n = (size_t)ftell(in);
    unsigned char *data = malloc(n);
    rewind(in);
    CHECK(fread(data, 1, n, in) == n, "reading back");
    fclose(in);
    for (size_t cut = 0; cut < n; cut += cut < 4000 ? 97 : n / 9) {
        int status = calibration_open(maker_write("cut.safetensors", data, cut), model, hash, &cal);
        CHECK(status == STATUS_INPUT && strstr(base_error(), "cut.safetensors"), "%zu bytes: status %d, '%s'", cut, status, base_error());
        base_clear_error();
    }
    CHECK_FAILS(calibration_open(maker_path("nowhere"), model, hash, &cal), STATUS_INPUT, "nowhere");
    free(data);
}

int main(void) {
    char *folder = tiny_model("model", 0);
    REQUIRE(model_file_open(folder, &model));
    tiny_hash(model, hash);
    base_set_log_sink(keep_log, NULL);
    check_good(false, -1);
    check_good(true, -1);
    check_good(false, 1);
    check_wrong();
    check_truncated();
    base_set_log_sink(NULL, NULL);
    model_file_close(model);
    free(folder);
    return test_report();
}
