/* A calibration file: what was learned from text for one model's cache. safetensors with its provenance in the metadata.
 *
 * Metadata (all strings): format "kvlinc-calibration", version "1", architecture, hidden, n_layers, n_heads, n_kv_heads, head_dim, rope (the
 * RoPE settings as text), tokenizer (tokenizer_hash) must fit the model exactly: a mismatch is an error that names field, expected and
 * got. weights (model_file_fingerprint) is a warning that names both. With adapters: features (D), phi_q ("kv_head" or "head"), v_in_s
 * ("dequantized" or "exact"), trained_length (tokens).
 *
 * Tensors, F32: layers.{i}.phi_k.weight [n_kv_heads][2][head_dim][D/2] (W1, W2 of KVLinC eq. 6), layers.{i}.phi_q.weight [n_kv_heads or
 * n_heads][2][head_dim][D/2], optional layers.{i}.gate [n_kv_heads] (factor on phi_k). A layer without tensors has no correction. Later
 * kinds of knowledge (mean keys, query moments, bases) are further tensors; a name that is not known is an error. */
#pragma once

#include "dist/grid.h"
#include "dist/shard.h"
#include "engine/cache.h"
#include "engine/model_file.h"

struct calibration;

/* Reads and checks `path` against the model. `tokenizer_hash`: 64 hex digits. Errors: STATUS_INPUT. */
int calibration_open(const char *path, const struct model_file *model, const char *tokenizer_hash, struct calibration **out);
void calibration_close(struct calibration *calibration);

bool calibration_has_adapters(const struct calibration *calibration);
bool calibration_has_layer(const struct calibration *calibration, int layer);
int calibration_features(const struct calibration *calibration);        /* D */
int64_t calibration_trained_length(const struct calibration *calibration); /* tokens; 0: not said */
const char *calibration_hash(const struct calibration *calibration);    /* SHA-256 of the file, hex */

/* Puts the adapters of this rank's heads into backend memory: adapters [n_layers], zero where a layer has none. Freed by
 * calibration_unload. */
int calibration_load(const struct calibration *calibration, struct range heads, struct range kv_heads, struct backend *backend,
                     struct stream *stream, struct cache_adapter *adapters);
void calibration_unload(struct backend *backend, struct cache_adapter *adapters, int n_layers);

/* The RoPE settings of a configuration as one line of text: what calibration files and messages compare. */
void calibration_rope_text(const struct model_config *config, char *text, size_t bytes);
