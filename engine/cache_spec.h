/* Which cache runs: a preset, refined by options, resolved for every layer. Pure: knows no memory and no ranks. */
#pragma once

#include "kernels/page.h"

enum { CACHE_MAX_LAYERS = 256 };

struct cache_layer_spec {
    int k_bits, v_bits; /* 2, 4, 8 or 16 (the window's type as it is) */
    bool rotate_v;      /* V H in the cache: H folded into W_v and W_o at load */
    bool correction;    /* S, P and phi from the calibration's adapters */
};

struct cache_spec {
    const char *name;        /* what runs: the preset's name, "hadv" for kvlinc without adapters */
    enum dtype window_type;  /* of the 16-bit blocks */
    int window;              /* newest tokens in 16 bit beside the current block; a multiple of KV_BLOCK */
    int sink;                /* first tokens in 16 bit; a multiple of 16 up to KV_BLOCK */
    int n_layers;
    struct cache_layer_spec layer[CACHE_MAX_LAYERS];
};

/* What the user asked for. NULL or -1: the preset's. `correction`: "auto" (as the preset says), "off", "all", or layers "0-9,12". */
struct cache_request {
    const char *preset, *k_bits, *v_bits, *correction;
    int window, sink;
    bool has_adapters; /* a calibration with adapters is there */
};

/* Errors: STATUS_USAGE, naming option, value and what is allowed. */
int cache_spec_make(const struct cache_request *request, int n_layers, struct cache_spec *out);

/* The presets' names, comma-separated, for messages. */
const char *cache_spec_presets(void);

/* Parses "2" or "0-3:4,4-27:2" (every layer named once) into value[n_layers]. `what` names the option in errors. */
int cache_spec_parse_layers(const char *what, const char *text, int n_layers, int *value);

/* Parses "0-9,12" into on[n_layers] (0 or 1). */
int cache_spec_parse_set(const char *what, const char *text, int n_layers, bool *on);
