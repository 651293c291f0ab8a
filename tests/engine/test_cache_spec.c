/* The cache's settings: what the presets are, what options change of them, and every error by name. */
#include "engine/cache_spec.h"
#include "test.h"

enum { LAYERS = 6 };

static struct cache_request request_of(const char *preset) { return (struct cache_request){.preset = preset, .window = -1, .sink = -1}; }

static void check_presets(void) {
    static const struct {
        const char *name;
        enum dtype window;
        int bits;
        bool rotate;
    } presets[] = {{"fp16", DTYPE_F16, 16, false}, {"bf16", DTYPE_BF16, 16, false}, {"f32", DTYPE_F32, 16, false},
                   {"kivi", DTYPE_F16, 2, false},  {"hadv", DTYPE_F16, 2, true},    {"kvlinc", DTYPE_F16, 2, true}};
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++) {
        struct cache_spec spec;
        struct cache_request r = request_of(presets[i].name);
        REQUIRE(cache_spec_make(&r, LAYERS, &spec));
        CHECK(strstr(cache_spec_presets(), presets[i].name) != NULL, "%s is not listed", presets[i].name);
        CHECK(strcmp(spec.name, i == 5 ? "hadv" : presets[i].name) == 0, "%s runs as %s", presets[i].name, spec.name);
        CHECK(spec.window_type == presets[i].window && spec.window == KV_BLOCK && spec.sink == 0 && spec.n_layers == LAYERS, "%s", spec.name);
        for (int l = 0; l < LAYERS; l++)
            CHECK(spec.layer[l].k_bits == presets[i].bits && spec.layer[l].v_bits == presets[i].bits && !spec.layer[l].correction &&
                      spec.layer[l].rotate_v == presets[i].rotate, "%s, layer %d", presets[i].name, l);
    }
    struct cache_spec by_default;
    struct cache_request r = request_of(NULL);
    r.has_adapters = true;
    REQUIRE(cache_spec_make(&r, LAYERS, &by_default));
    CHECK(strcmp(by_default.name, "kvlinc") == 0 && by_default.layer[3].correction, "the default is %s", by_default.name);
}

static void check_refinements(void) {
    static const int k[LAYERS] = {4, 4, 2, 8, 8, 16};
    struct cache_spec spec;
    struct cache_request r = request_of("kvlinc");
    r.k_bits = "0-1:4,2:2,3-4:8,5:16";
    r.v_bits = "8";
    r.window = 256;
    r.sink = 112;
    r.has_adapters = true;
    r.correction = "1-2,5";
    REQUIRE(cache_spec_make(&r, LAYERS, &spec));
    for (int l = 0; l < LAYERS; l++) {
        CHECK(spec.layer[l].k_bits == k[l] && spec.layer[l].v_bits == 8, "layer %d: %d, %d", l, spec.layer[l].k_bits, spec.layer[l].v_bits);
        CHECK(spec.layer[l].correction == (l == 1 || l == 2), "correction of layer %d", l); /* keys of layer 5 have no error */
    }
    CHECK(spec.window == 256 && spec.sink == 112, "window %d, sink %d", spec.window, spec.sink);
    r.correction = "off";
    REQUIRE(cache_spec_make(&r, LAYERS, &spec));
    CHECK(!spec.layer[1].correction && strcmp(spec.name, "hadv") == 0, "off: %s", spec.name);
    r = request_of("kivi");
    r.has_adapters = true;
    REQUIRE(cache_spec_make(&r, LAYERS, &spec));
    CHECK(!spec.layer[0].correction, "kivi corrects without being told to");
    r.correction = "all";
    r.window = 0;
    REQUIRE(cache_spec_make(&r, LAYERS, &spec));
    CHECK(spec.layer[0].correction && spec.layer[5].correction && spec.window == 0 && strcmp(spec.name, "kivi") == 0, "all: %s", spec.name);
}

static void check_errors(void) {
    static const struct {
        const char *k_bits, *v_bits, *correction;
        int window, sink;
        const char *words;
    } wrong[] = {
        {"3", NULL, NULL, -1, -1, "k-bits '3': 3 bits; allowed: 2, 4, 8, 16"},
        {NULL, "two", NULL, -1, -1, "v-bits 'two'"},
        {"", NULL, NULL, -1, -1, "k-bits ''"},
        {"2,4", NULL, NULL, -1, -1, "expected a number"},
        {"0-2:4", NULL, NULL, -1, -1, "layer 3 is not named"},
        {"0-5:4,5:2", NULL, NULL, -1, -1, "layer 5 is named twice"},
        {"0-6:4", NULL, NULL, -1, -1, "layer 6, the model has layers 0 to 5"},
        {"3-1:4", NULL, NULL, -1, -1, "expected layers"},
        {"0-5:", NULL, NULL, -1, -1, "expected numbers by layer"},
        {"0-5:4 ", NULL, NULL, -1, -1, "expected numbers by layer"},
        {"99999999999:4", NULL, NULL, -1, -1, "expected layers"},
        {NULL, NULL, NULL, 100, -1, "window 100: must be a multiple of 128"},
        {NULL, NULL, NULL, -1, 8, "sink 8: must be a multiple of 16"},
        {NULL, NULL, NULL, -1, 144, "sink 144"},
        {NULL, NULL, "0-1;2", -1, -1, "correction '0-1;2'"},
        {NULL, NULL, "6", -1, -1, "layer 6"},
    };
    struct cache_spec spec;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct cache_request r = {"kivi", wrong[i].k_bits, wrong[i].v_bits, wrong[i].correction, wrong[i].window, wrong[i].sink, true};
        CHECK_FAILS(cache_spec_make(&r, LAYERS, &spec), STATUS_USAGE, wrong[i].words);
    }
    struct cache_request r = request_of("fp8");
    CHECK_FAILS(cache_spec_make(&r, LAYERS, &spec), STATUS_USAGE, "cache 'fp8' is not known; presets: fp16");
    r = request_of("kvlinc");
    r.correction = "all";
    CHECK_FAILS(cache_spec_make(&r, LAYERS, &spec), STATUS_USAGE, "needs a calibration file");
    r = request_of("kivi");
    CHECK_FAILS(cache_spec_make(&r, CACHE_MAX_LAYERS + 1, &spec), STATUS_INPUT, "257 layers");
}

int main(void) {
    check_presets();
    check_refinements();
    check_errors();
    return test_report();
}
