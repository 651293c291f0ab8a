/* GGUF metadata to a configuration. Keys begin with the architecture's name; Llama 3's RoPE scaling comes as a tensor of
 * divisors, rope_freqs.weight. */
#include "engine/model_config.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

enum { KEY_BYTES = 128 };

#define DEFAULT_ROPE_THETA 10000.0 /* llama.cpp's, for files without rope.freq_base */

static const char *arch_key(const struct model_config *config, const char *name, char key[KEY_BYTES]) {
    snprintf(key, KEY_BYTES, "%s.%s", model_config_arch_name(config->arch), name);
    return key;
}

/* `absent` is taken when the key is not there; 0 says that it must be. */
static int read_count(const struct gguf *gguf, const struct model_config *config, const char *name, int absent,
                      int *out) {
    char key[KEY_BYTES];
    arch_key(config, name, key);
    int64_t value = absent;
    int found = gguf_get_int(gguf, key, &value);
    TRY(found);
    if (!found && absent == 0)
        FAIL(STATUS_INPUT, "%s is missing", key);
    return model_config_set_count(value, key, out);
}

static const struct file_tensor *find_tensor(const struct gguf *gguf, const char *name) {
    int n;
    const struct file_tensor *tensors = gguf_tensors(gguf, &n);
    return file_tensor_find(tensors, n, name);
}

static int read_vocab(const struct gguf *gguf, struct model_config *config) {
    const struct file_tensor *embedding = find_tensor(gguf, "token_embd.weight");
    if (!embedding || embedding->n_dims != 2)
        FAIL(STATUS_INPUT, "tensor token_embd.weight: %s, expected a matrix",
             embedding ? "not a matrix" : "missing");
    TRY(model_config_set_count(embedding->shape[0], "rows of token_embd.weight", &config->vocab));
    int stated;
    TRY(read_count(gguf, config, "vocab_size", config->vocab, &stated));
    if (stated != config->vocab)
        FAIL(STATUS_INPUT, "%s.vocab_size: %d, token_embd.weight has %d rows", model_config_arch_name(config->arch),
             stated, config->vocab);
    return STATUS_OK;
}

static int read_sizes(const struct gguf *gguf, struct model_config *config) {
    TRY(read_count(gguf, config, "embedding_length", 0, &config->hidden));
    TRY(read_count(gguf, config, "feed_forward_length", 0, &config->intermediate));
    TRY(read_count(gguf, config, "block_count", 0, &config->n_layers));
    TRY(read_count(gguf, config, "attention.head_count", 0, &config->n_heads));
    TRY(read_count(gguf, config, "attention.head_count_kv", config->n_heads, &config->n_kv_heads));
    TRY(read_count(gguf, config, "context_length", 0, &config->context));
    char key[KEY_BYTES];
    int64_t experts = 0;
    TRY(gguf_get_int(gguf, arch_key(config, "expert_count", key), &experts));
    if (experts != 0)
        FAIL(STATUS_INPUT, "%s: %" PRId64 ": mixtures of experts are not supported, expected 0", key, experts);
    return read_vocab(gguf, config);
}

static int read_head_dim(const struct gguf *gguf, struct model_config *config) {
    int64_t stated;
    char key[KEY_BYTES];
    int found = gguf_get_int(gguf, arch_key(config, "attention.key_length", key), &stated);
    TRY(found);
    if (!found && config->hidden % config->n_heads != 0)
        FAIL(STATUS_INPUT, "embedding_length %d, expected a multiple of head_count %d", config->hidden,
             config->n_heads);
    TRY(read_count(gguf, config, "attention.key_length", config->hidden / config->n_heads, &config->head_dim));
    static const char *const same[] = {"attention.value_length", "rope.dimension_count"};
    for (int i = 0; i < 2; i++) {
        int value;
        TRY(read_count(gguf, config, same[i], config->head_dim, &value));
        if (value != config->head_dim)
            FAIL(STATUS_INPUT, "%s: %d is not supported, expected the head dimension %d", arch_key(config, same[i], key),
                 value, config->head_dim);
    }
    return STATUS_OK;
}

/* Divisors of the frequencies, as a tensor. Together with another scaling they are refused. */
static int read_divisors(const struct gguf *gguf, struct model_config *config) {
    const struct file_tensor *freqs = find_tensor(gguf, "rope_freqs.weight");
    if (!freqs)
        return STATUS_OK;
    if (config->rope != ROPE_DEFAULT)
        FAIL(STATUS_INPUT, "rope_freqs.weight beside rope.scaling is not supported");
    if (config->head_dim < 2 || config->head_dim > MODEL_MAX_HEAD_DIM)
        return STATUS_OK; /* refused by name in model_config_check */
    char text[FILE_TENSOR_SHAPE_TEXT];
    if (freqs->dtype != DTYPE_F32 || freqs->n_dims != 1 || freqs->shape[0] != config->head_dim / 2)
        FAIL(STATUS_INPUT, "tensor rope_freqs.weight: %s %s, expected F32 [%d]", freqs->type,
             file_tensor_shape_text(freqs->shape, freqs->n_dims, text), config->head_dim / 2);
    memcpy(config->rope_divisor, freqs->data, freqs->bytes);
    config->rope = ROPE_DIVISORS;
    return STATUS_OK;
}

static int read_rope(const struct gguf *gguf, struct model_config *config) {
    char key[KEY_BYTES];
    config->rope_theta = DEFAULT_ROPE_THETA;
    TRY(gguf_get_real(gguf, arch_key(config, "rope.freq_base", key), &config->rope_theta));
    double factor = 1.0; /* the newer key goes first, as in llama.cpp */
    TRY(gguf_get_real(gguf, arch_key(config, "rope.scale_linear", key), &factor));
    TRY(gguf_get_real(gguf, arch_key(config, "rope.scaling.factor", key), &factor));
    const char *type = "linear"; /* llama.cpp's meaning of a factor without a type */
    TRY(gguf_get_text(gguf, arch_key(config, "rope.scaling.type", key), &type));
    if (strcmp(type, "linear") != 0 && strcmp(type, "none") != 0)
        FAIL(STATUS_INPUT, "%s: %.64s is not supported, expected none or linear", key, type);
    if (strcmp(type, "linear") == 0 && factor != 1.0 && factor != 0.0) { /* 0: converters' word for none */
        config->rope = ROPE_LINEAR;
        config->rope_factor = factor;
    }
    return read_divisors(gguf, config);
}

static int read_ids(const struct gguf *gguf, struct model_config *config) {
    int64_t id;
    config->bos_id = -1;
    int found = gguf_get_int(gguf, "tokenizer.ggml.bos_token_id", &id);
    TRY(found);
    if (found) {
        if (id < 0 || id > INT_MAX)
            FAIL(STATUS_INPUT, "tokenizer.ggml.bos_token_id: %" PRId64 ", expected a token id", id);
        config->bos_id = (int)id;
    }
    /* end of sequence, of turn, of message */
    static const char *const stops[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                        "tokenizer.ggml.eom_token_id"};
    for (int i = 0; i < 3; i++) {
        found = gguf_get_int(gguf, stops[i], &id);
        TRY(found);
        if (found)
            TRY(model_config_add_stop(config, id, stops[i]));
    }
    return STATUS_OK;
}

int model_config_gguf_read(const struct gguf *gguf, struct model_config *config) {
    *config = (struct model_config){0};
    const char *arch = NULL;
    TRY(gguf_get_text(gguf, "general.architecture", &arch));
    if (!arch)
        FAIL(STATUS_INPUT, "general.architecture is missing");
    TRY(model_config_set_arch(arch, config));
    TRY(read_sizes(gguf, config));
    TRY(read_head_dim(gguf, config));
    char key[KEY_BYTES];
    double eps;
    int found = gguf_get_real(gguf, arch_key(config, "attention.layer_norm_rms_epsilon", key), &eps);
    TRY(found);
    if (!found)
        FAIL(STATUS_INPUT, "%s is missing", key);
    config->rms_eps = (float)eps;
    TRY(read_rope(gguf, config));
    TRY(read_ids(gguf, config));
    config->tied = !find_tensor(gguf, "output.weight");
    return model_config_check(config);
}
