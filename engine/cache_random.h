/* A cache that looks as if long prompts had passed: random but valid content in all that a rank holds, so that decoding at any length can
 * be measured without computing a prompt. Only for measurements: what is read means nothing. */
#pragma once

#include "dist/shard.h"
#include "engine/cache.h"

enum { CACHE_RANDOM_FEATURES = 256 }; /* D of made-up adapters: the paper's */

/* Adapters for the layers with correction, one phi_q per KV head, in backend memory: adapters [n_layers], freed by calibration_unload. */
int cache_random_adapters(const struct cache_spec *spec, struct range kv_heads, int head_dim, struct backend *backend,
                          struct stream *stream, struct cache_adapter *adapters);

/* Fills every page, 16-bit slot, sink and state. Waits for the stream. */
int cache_random_fill(struct cache *cache, struct stream *stream);
