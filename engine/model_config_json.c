/* Hugging Face's config.json, as transformers 4 (rope_scaling, rope_theta) and 5 (rope_parameters) write it. A field that
 * would change the computation and is not supported is refused by name; fields that only concern training are ignored. */
#include "engine/model_config.h"

#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* transformers' defaults of LlamaConfig, for fields that old files leave out */
#define DEFAULT_RMS_EPS 1e-6
#define DEFAULT_ROPE_THETA 10000.0

/* A field that is null counts as absent. */
static json_t *get(const json_t *object, const char *field) {
    json_t *value = json_object_get(object, field);
    return json_is_null(value) ? NULL : value;
}

static int parse(const char *text, size_t bytes, json_t **root) {
    json_error_t error;
    *root = json_loadb(text ? text : "", bytes, JSON_REJECT_DUPLICATES, &error);
    if (!*root)
        FAIL(STATUS_INPUT, "line %d: %s", error.line, error.text);
    if (json_is_object(*root))
        return STATUS_OK;
    json_decref(*root);
    *root = NULL;
    FAIL(STATUS_INPUT, "expected a JSON object");
}

/* `absent` is taken when the field is not there; 0 says that it must be. */
static int read_count(const json_t *object, const char *field, int absent, int *out) {
    json_t *value = get(object, field);
    if (!value) {
        if (absent == 0)
            FAIL(STATUS_INPUT, "%s is missing", field);
        *out = absent;
        return STATUS_OK;
    }
    if (!json_is_integer(value))
        FAIL(STATUS_INPUT, "%s: expected an integer", field);
    return model_config_set_count(json_integer_value(value), field, out);
}

static int read_real(const json_t *object, const char *field, double *out) {
    json_t *value = get(object, field);
    if (!value)
        return STATUS_OK;
    if (!json_is_number(value))
        FAIL(STATUS_INPUT, "%s: expected a number", field);
    *out = json_number_value(value);
    return STATUS_OK;
}

static int read_bool(const json_t *object, const char *field, bool *out) {
    json_t *value = get(object, field);
    if (!value)
        return STATUS_OK;
    if (!json_is_boolean(value))
        FAIL(STATUS_INPUT, "%s: expected true or false", field);
    *out = json_is_true(value);
    return STATUS_OK;
}

static int read_text(const json_t *object, const char *field, const char **out) {
    json_t *value = get(object, field);
    if (!value)
        return STATUS_OK;
    if (!json_is_string(value))
        FAIL(STATUS_INPUT, "%s: expected a text", field);
    *out = json_string_value(value);
    return STATUS_OK;
}

static int read_arch(const json_t *root, struct model_config *config) {
    const char *type = NULL;
    TRY(read_text(root, "model_type", &type));
    if (!type)
        FAIL(STATUS_INPUT, "model_type is missing");
    TRY(model_config_set_arch(type, config));
    json_t *classes = get(root, "architectures");
    const char *wanted = model_config_arch_class(config->arch);
    const char *found = json_string_value(json_array_get(classes, 0));
    if (classes && (!found || strcmp(found, wanted) != 0))
        FAIL(STATUS_INPUT, "architectures: %.64s, expected %s", found ? found : "(not a list of names)", wanted);
    return STATUS_OK;
}

/* Kinds of attention by layer: one that sees a part of the context is another computation. */
static int refuse_other_layers(const json_t *root) {
    json_t *types = get(root, "layer_types");
    for (size_t i = 0; i < json_array_size(types); i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (!type || strcmp(type, "full_attention") != 0)
            FAIL(STATUS_INPUT, "layer_types: entry %zu is %.64s, expected full_attention", i, type ? type : "no text");
    }
    return STATUS_OK;
}

/* Fields that transformers' Llama, Qwen2 and Qwen3 know and this program does not. */
static int refuse_unsupported(const json_t *root) {
    static const char *const refused[] = {"attention_bias", "mlp_bias", "use_sliding_window"};
    for (int i = 0; i < 3; i++) {
        bool set = false;
        TRY(read_bool(root, refused[i], &set));
        if (set)
            FAIL(STATUS_INPUT, "%s: true is not supported, expected false", refused[i]);
    }
    TRY(refuse_other_layers(root));
    const char *act = "silu";
    TRY(read_text(root, "hidden_act", &act));
    if (strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0)
        FAIL(STATUS_INPUT, "hidden_act: %.64s is not supported, expected silu", act);
    if (get(root, "quantization_config"))
        FAIL(STATUS_INPUT, "quantization_config: quantized safetensors are not supported, expected F32, F16 or BF16");
    return STATUS_OK;
}

static int read_sizes(const json_t *root, struct model_config *config) {
    TRY(read_count(root, "hidden_size", 0, &config->hidden));
    TRY(read_count(root, "intermediate_size", 0, &config->intermediate));
    TRY(read_count(root, "num_hidden_layers", 0, &config->n_layers));
    TRY(read_count(root, "num_attention_heads", 0, &config->n_heads));
    TRY(read_count(root, "num_key_value_heads", config->n_heads, &config->n_kv_heads));
    TRY(read_count(root, "vocab_size", 0, &config->vocab));
    TRY(read_count(root, "max_position_embeddings", 0, &config->context));
    if (!get(root, "head_dim") && config->hidden % config->n_heads != 0)
        FAIL(STATUS_INPUT, "hidden_size %d, expected a multiple of num_attention_heads %d", config->hidden,
             config->n_heads);
    return read_count(root, "head_dim", config->hidden / config->n_heads, &config->head_dim);
}

static int read_rope_kind(const json_t *rope, struct model_config *config) {
    const char *type = "default"; /* the newer name of the field goes first */
    TRY(read_text(rope, "type", &type));
    TRY(read_text(rope, "rope_type", &type));
    config->rope = ROPE_DEFAULT;
    if (strcmp(type, "llama3") == 0)
        config->rope = ROPE_LLAMA3;
    else if (strcmp(type, "linear") == 0)
        config->rope = ROPE_LINEAR;
    else if (strcmp(type, "default") != 0)
        FAIL(STATUS_INPUT, "rope_type: %.64s is not supported, expected default, linear or llama3", type);
    return STATUS_OK;
}

static int require_real(const json_t *rope, const char *field, double *out) {
    if (!get(rope, field))
        FAIL(STATUS_INPUT, "rope parameters: %s is missing", field);
    return read_real(rope, field, out);
}

static int read_rope(const json_t *root, struct model_config *config) {
    json_t *rope = get(root, "rope_scaling"); /* transformers lets the old form win where both are there */
    if (!rope || (json_is_object(rope) && json_object_size(rope) == 0))
        rope = get(root, "rope_parameters");
    if (rope && !json_is_object(rope))
        FAIL(STATUS_INPUT, "rope_scaling or rope_parameters: expected an object");
    config->rope_theta = DEFAULT_ROPE_THETA;
    double partial = 1.0;
    TRY(read_real(root, "rope_theta", &config->rope_theta));
    TRY(read_real(root, "partial_rotary_factor", &partial));
    if (rope) {
        TRY(read_rope_kind(rope, config));
        TRY(read_real(rope, "rope_theta", &config->rope_theta));
        TRY(read_real(rope, "partial_rotary_factor", &partial));
    }
    if (partial != 1.0)
        FAIL(STATUS_INPUT, "partial_rotary_factor: %g is not supported, expected 1", partial);
    if (config->rope != ROPE_DEFAULT)
        TRY(require_real(rope, "factor", &config->rope_factor));
    if (config->rope != ROPE_LLAMA3)
        return STATUS_OK;
    TRY(require_real(rope, "low_freq_factor", &config->rope_low_freq));
    TRY(require_real(rope, "high_freq_factor", &config->rope_high_freq));
    const char *field = "original_max_position_embeddings";
    return read_count(get(root, field) ? root : rope, field, config->context, &config->rope_original_context);
}

/* eos_token_id: absent, one id, or a list of ids. */
static int read_stops(const json_t *root, struct model_config *config) {
    static const char field[] = "eos_token_id";
    json_t *value = get(root, field);
    if (!value)
        return STATUS_OK;
    if (json_is_integer(value))
        return model_config_add_stop(config, json_integer_value(value), field);
    if (!json_is_array(value))
        FAIL(STATUS_INPUT, "%s: expected an id or a list of ids", field);
    for (size_t i = 0; i < json_array_size(value); i++) {
        json_t *id = json_array_get(value, i);
        if (!json_is_integer(id))
            FAIL(STATUS_INPUT, "%s: entry %zu is not an integer", field, i);
        TRY(model_config_add_stop(config, json_integer_value(id), field));
    }
    return STATUS_OK;
}

static int read_bos(const json_t *root, struct model_config *config) {
    config->bos_id = -1;
    json_t *value = get(root, "bos_token_id");
    if (!value)
        return STATUS_OK;
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) > INT_MAX)
        FAIL(STATUS_INPUT, "bos_token_id: expected a token id");
    config->bos_id = (int)json_integer_value(value);
    return STATUS_OK;
}

static int read_root(const json_t *root, struct model_config *config) {
    TRY(read_arch(root, config));
    TRY(refuse_unsupported(root));
    TRY(read_sizes(root, config));
    double eps = DEFAULT_RMS_EPS;
    TRY(read_real(root, "rms_norm_eps", &eps));
    config->rms_eps = (float)eps;
    TRY(read_bool(root, "tie_word_embeddings", &config->tied));
    TRY(read_rope(root, config));
    TRY(read_bos(root, config));
    TRY(read_stops(root, config));
    return model_config_check(config);
}

int model_config_json_read(const char *text, size_t bytes, struct model_config *config) {
    *config = (struct model_config){0};
    json_t *root;
    TRY(parse(text, bytes, &root));
    int status = read_root(root, config);
    json_decref(root);
    return status;
}

int model_config_json_add_generation(const char *text, size_t bytes, struct model_config *config) {
    json_t *root;
    TRY(parse(text, bytes, &root));
    int status = read_stops(root, config);
    json_decref(root);
    return status;
}
