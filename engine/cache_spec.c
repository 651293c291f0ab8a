/* Presets of the cache and the per-layer settings that refine them. */
#include "engine/cache_spec.h"

#include <stdlib.h>
#include <string.h>

enum { DEFAULT_WINDOW = 128 };

static const struct preset {
    const char *name;
    enum dtype window_type;
    int bits;
    bool rotate_v, correction;
} presets[] = {
    {"fp16", DTYPE_F16, 16, false, false},  {"bf16", DTYPE_BF16, 16, false, false},
    {"f32", DTYPE_F32, 16, false, false},   {"kivi", DTYPE_F16, 2, false, false},
    {"hadv", DTYPE_F16, 2, true, false},    {"kvlinc", DTYPE_F16, 2, true, true},
};

const char *cache_spec_presets(void) { return "fp16, bf16, f32, kivi, hadv, kvlinc"; }

static int find_preset(const char *name, const struct preset **out) {
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++)
        if (strcmp(name, presets[i].name) == 0) {
            *out = &presets[i];
            return STATUS_OK;
        }
    FAIL(STATUS_USAGE, "cache '%s' is not known; presets: %s", name, cache_spec_presets());
}

/* A number at *text, which moves on; -1 when there is none. */
static int take_number(const char **text) {
    if (**text < '0' || **text > '9')
        return -1;
    char *end;
    long n = strtol(*text, &end, 10);
    *text = end;
    return n > 1000000 ? -1 : (int)n;
}

/* "a" or "a-b" at *text, checked against the layers. */
static int take_range(const char *what, const char *whole, const char **text, int n_layers, int *first, int *last) {
    *first = *last = take_number(text);
    if (*first >= 0 && **text == '-') {
        (*text)++;
        *last = take_number(text);
    }
    if (*first < 0 || *last < *first)
        FAIL(STATUS_USAGE, "%s '%s': expected layers such as 0-3", what, whole);
    if (*last >= n_layers)
        FAIL(STATUS_USAGE, "%s '%s': layer %d, the model has layers 0 to %d", what, whole, *last, n_layers - 1);
    return STATUS_OK;
}

int cache_spec_parse_layers(const char *what, const char *text, int n_layers, int *value) {
    const char *at = text;
    if (!strchr(text, ':')) {
        int n = take_number(&at);
        if (n < 0 || *at)
            FAIL(STATUS_USAGE, "%s '%s': expected a number, or numbers by layer such as 0-3:4,4-27:2", what, text);
        for (int i = 0; i < n_layers; i++)
            value[i] = n;
        return STATUS_OK;
    }
    for (int i = 0; i < n_layers; i++)
        value[i] = -1;
    while (*at) {
        int first, last;
        TRY(take_range(what, text, &at, n_layers, &first, &last));
        int n = *at == ':' ? (at++, take_number(&at)) : -1;
        if (n < 0 || (*at && *at != ','))
            FAIL(STATUS_USAGE, "%s '%s': expected numbers by layer such as 0-3:4,4-27:2", what, text);
        for (int i = first; i <= last; i++) {
            if (value[i] >= 0)
                FAIL(STATUS_USAGE, "%s '%s': layer %d is named twice", what, text, i);
            value[i] = n;
        }
        at += *at == ',';
    }
    for (int i = 0; i < n_layers; i++)
        if (value[i] < 0)
            FAIL(STATUS_USAGE, "%s '%s': layer %d is not named; the model has layers 0 to %d", what, text, i, n_layers - 1);
    return STATUS_OK;
}

int cache_spec_parse_set(const char *what, const char *text, int n_layers, bool *on) {
    for (int i = 0; i < n_layers; i++)
        on[i] = false;
    for (const char *at = text; *at;) {
        int first, last;
        TRY(take_range(what, text, &at, n_layers, &first, &last));
        if (*at && *at != ',')
            FAIL(STATUS_USAGE, "%s '%s': expected layers such as 0-9,12", what, text);
        at += *at == ',';
        for (int i = first; i <= last; i++)
            on[i] = true;
    }
    return STATUS_OK;
}

static int apply_bits(const char *what, const char *text, struct cache_spec *spec, bool is_k) {
    int bits[CACHE_MAX_LAYERS];
    if (!text)
        return STATUS_OK;
    TRY(cache_spec_parse_layers(what, text, spec->n_layers, bits));
    for (int i = 0; i < spec->n_layers; i++) {
        if (bits[i] != 2 && bits[i] != 4 && bits[i] != 8 && bits[i] != 16)
            FAIL(STATUS_USAGE, "%s '%s': %d bits; allowed: 2, 4, 8, 16", what, text, bits[i]);
        *(is_k ? &spec->layer[i].k_bits : &spec->layer[i].v_bits) = bits[i];
    }
    return STATUS_OK;
}

static int apply_correction(const struct cache_request *r, const struct preset *preset, struct cache_spec *spec) {
    const char *text = r->correction ? r->correction : "auto";
    bool on[CACHE_MAX_LAYERS] = {false};
    bool wanted = strcmp(text, "auto") != 0 && strcmp(text, "off") != 0;
    if (wanted && !r->has_adapters)
        FAIL(STATUS_USAGE, "correction '%s' needs a calibration file with adapters", text);
    if (strcmp(text, "all") == 0 || (strcmp(text, "auto") == 0 && preset->correction && r->has_adapters)) {
        for (int i = 0; i < spec->n_layers; i++)
            on[i] = true;
    } else if (wanted) {
        TRY(cache_spec_parse_set("correction", text, spec->n_layers, on));
    }
    bool any = false;
    for (int i = 0; i < spec->n_layers; i++) {
        /* only quantized keys have an error to correct */
        spec->layer[i].correction = on[i] && spec->layer[i].k_bits < 16;
        any |= spec->layer[i].correction;
    }
    if (preset->correction && !any)
        spec->name = "hadv";
    return STATUS_OK;
}

int cache_spec_make(const struct cache_request *r, int n_layers, struct cache_spec *out) {
    const struct preset *preset = NULL;
    TRY(find_preset(r->preset ? r->preset : "kvlinc", &preset));
    if (n_layers > CACHE_MAX_LAYERS)
        FAIL(STATUS_INPUT, "the model has %d layers, at most %d are supported", n_layers, CACHE_MAX_LAYERS);
    *out = (struct cache_spec){.name = preset->name,
                               .window_type = preset->window_type,
                               .window = r->window >= 0 ? r->window : DEFAULT_WINDOW,
                               .sink = r->sink >= 0 ? r->sink : 0,
                               .n_layers = n_layers};
    for (int i = 0; i < n_layers; i++)
        out->layer[i] = (struct cache_layer_spec){preset->bits, preset->bits, preset->rotate_v, false};
    if (out->window % KV_BLOCK != 0)
        FAIL(STATUS_USAGE, "window %d: must be a multiple of %d", out->window, KV_BLOCK);
    if (out->sink % 16 != 0 || out->sink > KV_BLOCK)
        FAIL(STATUS_USAGE, "sink %d: must be a multiple of 16 up to %d", out->sink, KV_BLOCK);
    TRY(apply_bits("k-bits", r->k_bits, out, true));
    TRY(apply_bits("v-bits", r->v_bits, out, false));
    return apply_correction(r, preset, out);
}
