/* A tiny Llama model as a Hugging Face folder, and a calibration for it, both made from hashes. Sizes are awkward on purpose: the MLP's
 * width and the vocabulary are no multiples of what slices are cut at, and 6 KV heads go to 1, 2, 3 or 6 tp ranks. */
#pragma once

#include "engine/calibration.h"
#include "engine/tokenizer.h"
#include "engine/pretokenize.h"
#include "file_maker.h"

enum {
    TINY_LAYERS = 2, TINY_HIDDEN = 96, TINY_HEADS = 12, TINY_KV_HEADS = 6, TINY_D = 64, TINY_INNER = 150, TINY_WORDS = 277,
    TINY_FEATURES = 32, TINY_CONTEXT = 1024,
};

struct tiny_tensor {
    char name[80];
    int64_t rows, columns; /* columns 0: a vector */
    float gain, mean;      /* values: mean + gain * normal */
    bool is_kv;
};

static inline int tiny_tensors(struct tiny_tensor *t) {
    static const struct {
        const char *name;
        int rows, columns;
        float gain, mean;
        bool is_kv;
    } parts[] = {
        {"input_layernorm", TINY_HIDDEN, 0, 0.1f, 1, false},
        {"post_attention_layernorm", TINY_HIDDEN, 0, 0.1f, 1, false},
        {"self_attn.q_proj", TINY_HEADS * TINY_D, TINY_HIDDEN, 0.12f, 0, false},
        {"self_attn.k_proj", TINY_KV_HEADS * TINY_D, TINY_HIDDEN, 0.12f, 0, true},
        {"self_attn.v_proj", TINY_KV_HEADS * TINY_D, TINY_HIDDEN, 0.1f, 0, true},
        {"self_attn.o_proj", TINY_HIDDEN, TINY_HEADS * TINY_D, 0.06f, 0, false},
        {"mlp.gate_proj", TINY_INNER, TINY_HIDDEN, 0.1f, 0, false},
        {"mlp.up_proj", TINY_INNER, TINY_HIDDEN, 0.1f, 0, false},
        {"mlp.down_proj", TINY_HIDDEN, TINY_INNER, 0.08f, 0, false},
    };
    int n = 0;
    t[n++] = (struct tiny_tensor){"model.embed_tokens.weight", TINY_WORDS, TINY_HIDDEN, 1, 0, false};
    t[n++] = (struct tiny_tensor){"lm_head.weight", TINY_WORDS, TINY_HIDDEN, 0.15f, 0, false};
    t[n++] = (struct tiny_tensor){"model.norm.weight", TINY_HIDDEN, 0, 0.1f, 1, false};
    for (int layer = 0; layer < TINY_LAYERS; layer++)
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            t[n] = (struct tiny_tensor){"", parts[i].rows, parts[i].columns, parts[i].gain, parts[i].mean, parts[i].is_kv};
            snprintf(t[n].name, sizeof t[n].name, "model.layers.%d.%s.weight", layer, parts[i].name);
            n++;
        }
    return n;
}
enum { TINY_TENSORS = 3 + 9 * TINY_LAYERS };

static inline int64_t tiny_count(const struct tiny_tensor *t) { return t->rows * (t->columns ? t->columns : 1); }

/* Value i of tensor `index`. */
static inline float tiny_value(const struct tiny_tensor *t, int index, int64_t i) {
    return t->mean + t->gain * test_normal(1000 + (uint64_t)index, (uint64_t)i);
}

/* `kv_error`: relative error put on the weights that K and V come from. */
static inline void tiny_save_weights(const char *name, float kv_error) {
    struct tiny_tensor t[TINY_TENSORS];
    struct maker data = {0}, file = {0};
    char header[8192] = "{", *at = header + 1;
    int n = tiny_tensors(t);
    for (int k = 0; k < n; k++) {
        size_t begin = data.n;
        for (int64_t i = 0; i < tiny_count(&t[k]); i++) {
            float x = tiny_value(&t[k], k, i);
            if (t[k].is_kv && kv_error > 0)
                x *= 1 + kv_error * test_normal(5, (uint64_t)(k * 1000000 + i));
            maker_put(&data, &x, sizeof x);
        }
        at += sprintf(at, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%lld", k ? "," : "", t[k].name, (long long)t[k].rows);
        if (t[k].columns)
            at += sprintf(at, ",%lld", (long long)t[k].columns);
        at += sprintf(at, "],\"data_offsets\":[%zu,%zu]}", begin, data.n);
    }
    strcpy(at, "}");
    maker_text(&file, header);
    maker_put(&file, data.data, data.n);
    maker_free(&data);
    maker_save(&file, name);
}

static inline void tiny_save_tokenizer(const char *name) {
    struct maker m = {0};
    char text[16];
    const char *head = "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[],\"normalizer\":null,"
                       "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
                       "\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,"
                       "\"use_regex\":true},\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,"
                       "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,\"vocab\":{";
    maker_put(&m, head, strlen(head));
    for (int i = 0; i < 256; i++) {
        char entry[64];
        pretokenize_byte_char((uint8_t)i, text);
        bool escape = strcmp(text, "\"") == 0 || strcmp(text, "\\") == 0;
        maker_put(&m, entry, (size_t)snprintf(entry, sizeof entry, "%s\"%s%s\":%d", i ? "," : "", escape ? "\\" : "", text, i));
    }
    maker_put(&m, "},\"merges\":[]}}", 15);
    maker_save(&m, name);
}

static inline void tiny_save_config(const char *name) {
    char text[1024];
    int n = snprintf(text, sizeof text,
                     "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":%d,\"num_hidden_layers\":%d,"
                     "\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,\"intermediate_size\":%d,\"vocab_size\":%d,"
                     "\"max_position_embeddings\":%d,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":false,"
                     "\"hidden_act\":\"silu\",\"eos_token_id\":%d}",
                     TINY_HIDDEN, TINY_LAYERS, TINY_HEADS, TINY_KV_HEADS, TINY_D, TINY_INNER, TINY_WORDS, TINY_CONTEXT, TINY_WORDS - 1);
    maker_write(name, text, (size_t)n);
}

/* A folder below the test's temporary one; returns its path (malloced). */
static inline char *tiny_model(const char *name, float kv_error) {
    char file[64];
    char *folder = strdup(maker_path(name));
    if (mkdir(folder, 0700) != 0)
        exit(1);
    snprintf(file, sizeof file, "%s/config.json", name);
    tiny_save_config(file);
    snprintf(file, sizeof file, "%s/tokenizer.json", name);
    tiny_save_tokenizer(file);
    snprintf(file, sizeof file, "%s/model.safetensors", name);
    tiny_save_weights(file, kv_error);
    return folder;
}

/* ---- calibration ------------------------------------------------------------------------------------------------------- */

struct tiny_calibration { /* what may be said wrongly */
    const char *format, *hidden, *rope, *tokenizer, *weights, *features, *phi_q, *trained_length; /* NULL: right */
    const char *leave_out;   /* a tensor that is missing */
    const char *extra;       /* the name of one that nobody knows */
    const char *reshape;     /* a tensor with one row less */
    bool per_head, gate;
    int only_layer;          /* -1: all */
};

static inline void tiny_meta(struct maker *m, const char *key, const char *value) {
    char text[256];
    maker_put(m, text, (size_t)snprintf(text, sizeof text, "%s\"%s\":\"%s\"", m->n > 20 ? "," : "", key, value));
}

static inline const char *or_else(const char *text, const char *otherwise) { return text ? text : otherwise; }

static inline void tiny_hash(const struct model_file *file, char hash[65]) {
    struct tokenizer *tokenizer;
    REQUIRE(tokenizer_open(model_file_tokenizer(file), model_file_config(file)->vocab, &tokenizer));
    tokenizer_hash(tokenizer, hash);
    tokenizer_close(tokenizer);
}

static inline void tiny_meta_all(struct maker *header, const struct model_file *file, const struct tiny_calibration *c) {
    char rope[160], hash[65], fingerprint[65], number[32];
    const struct model_config *config = model_file_config(file);
    calibration_rope_text(config, rope, sizeof rope);
    tiny_hash(file, hash);
    REQUIRE(model_file_fingerprint(file, fingerprint));
    maker_put(header, "{\"__metadata__\":{", 17);
    tiny_meta(header, "format", or_else(c->format, "kvlinc-calibration"));
    tiny_meta(header, "version", "1");
    tiny_meta(header, "architecture", "llama");
    snprintf(number, sizeof number, "%d", config->hidden);
    tiny_meta(header, "hidden", or_else(c->hidden, number));
    snprintf(number, sizeof number, "%d", config->n_layers);
    tiny_meta(header, "n_layers", number);
    snprintf(number, sizeof number, "%d", config->n_heads);
    tiny_meta(header, "n_heads", number);
    snprintf(number, sizeof number, "%d", config->n_kv_heads);
    tiny_meta(header, "n_kv_heads", number);
    snprintf(number, sizeof number, "%d", config->head_dim);
    tiny_meta(header, "head_dim", number);
    tiny_meta(header, "rope", or_else(c->rope, rope));
    tiny_meta(header, "tokenizer", or_else(c->tokenizer, hash));
    tiny_meta(header, "weights", or_else(c->weights, fingerprint));
    snprintf(number, sizeof number, "%d", TINY_FEATURES);
    tiny_meta(header, "features", or_else(c->features, number));
    tiny_meta(header, "phi_q", or_else(c->phi_q, c->per_head ? "head" : "kv_head"));
    tiny_meta(header, "v_in_s", "dequantized");
    tiny_meta(header, "trained_length", or_else(c->trained_length, "4096"));
    maker_put(header, "}", 1);
}

static inline void tiny_adapter(struct maker *header, struct maker *data, const struct tiny_calibration *c, const char *name, int rows,
                                int64_t each, uint64_t seed) {
    char text[256];
    if (c->leave_out && strcmp(c->leave_out, name) == 0)
        return;
    rows -= c->reshape && strcmp(c->reshape, name) == 0;
    size_t begin = data->n;
    for (int64_t i = 0; i < rows * each; i++) {
        float x = each == 1 ? 0.25f : 0.3f * test_normal(seed, (uint64_t)i);
        maker_put(data, &x, sizeof x);
    }
    int n = each == 1 ? snprintf(text, sizeof text, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%d],\"data_offsets\":[%zu,%zu]}", name, rows, begin, data->n)
                      : snprintf(text, sizeof text, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%d,2,%d,%d],\"data_offsets\":[%zu,%zu]}", name, rows,
                                 TINY_D, TINY_FEATURES / 2, begin, data->n);
    maker_put(header, text, (size_t)n);
}

/* Writes a calibration of the model in `file`; returns its path (valid until the fourth next call of maker_path). */
static inline const char *tiny_save_calibration(const char *name, const struct model_file *file, const struct tiny_calibration *c) {
    struct maker header = {0}, data = {0}, out = {0};
    char tensor[64];
    int64_t each = (int64_t)TINY_D * TINY_FEATURES;
    tiny_meta_all(&header, file, c);
    for (int layer = 0; layer < TINY_LAYERS; layer++) {
        if (c->only_layer >= 0 && layer != c->only_layer)
            continue;
        snprintf(tensor, sizeof tensor, "layers.%d.phi_k.weight", layer);
        tiny_adapter(&header, &data, c, tensor, TINY_KV_HEADS, each, 300 + (uint64_t)layer);
        snprintf(tensor, sizeof tensor, "layers.%d.phi_q.weight", layer);
        tiny_adapter(&header, &data, c, tensor, c->per_head ? TINY_HEADS : TINY_KV_HEADS, each, 400 + (uint64_t)layer);
        snprintf(tensor, sizeof tensor, "layers.%d.gate", layer);
        if (c->gate)
            tiny_adapter(&header, &data, c, tensor, TINY_KV_HEADS, 1, 0);
    }
    if (c->extra)
        tiny_adapter(&header, &data, c, c->extra, 1, 1, 0);
    maker_put(&header, "}", 2);
    maker_text(&out, (const char *)header.data);
    maker_put(&out, data.data, data.n);
    maker_free(&header);
    maker_free(&data);
    return maker_save(&out, name);
}
