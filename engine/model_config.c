/* What the two ways to a configuration share: the table of architectures, the checks, and RoPE's frequencies.
 *
 * inv_freq is computed in float32 in the order of transformers' operations, so that positions of 100k tokens turn by the
 * same angles as there; a power may differ by the last bit between mathematical libraries. */
#include "engine/model_config.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    MOST_LAYERS = 4096, /* a sane limit, so that a broken count is named before memory is asked for it */
};

static const struct {
    const char *name;
    const char *class_name;
    bool qkv_bias, qk_norm;
} archs[] = {
    [MODEL_ARCH_LLAMA] = {"llama", "LlamaForCausalLM", false, false},
    [MODEL_ARCH_QWEN2] = {"qwen2", "Qwen2ForCausalLM", true, false},
    [MODEL_ARCH_QWEN3] = {"qwen3", "Qwen3ForCausalLM", false, true},
};
enum { N_ARCHS = sizeof archs / sizeof *archs };

const char *model_config_arch_name(enum model_arch arch) { return archs[arch].name; }

const char *model_config_arch_class(enum model_arch arch) { return archs[arch].class_name; }

int model_config_set_arch(const char *name, struct model_config *config) {
    char known[256] = "";
    for (int i = 0; i < N_ARCHS; i++) {
        if (strcmp(archs[i].name, name) == 0) {
            config->arch = (enum model_arch)i;
            config->qkv_bias |= archs[i].qkv_bias; /* a shape file may ask for them too, before or after */
            config->qk_norm = archs[i].qk_norm;
            return STATUS_OK;
        }
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", archs[i].name);
    }
    FAIL(STATUS_INPUT, "architecture %.64s is not supported, expected one of: %s", name, known);
}

int model_config_set_count(int64_t value, const char *field, int *out) {
    if (value < 1 || value > INT_MAX)
        FAIL(STATUS_INPUT, "%s: %" PRId64 ", expected 1 to %d", field, value, INT_MAX);
    *out = (int)value;
    return STATUS_OK;
}

int model_config_add_stop(struct model_config *config, int64_t id, const char *field) {
    if (id < 0 || id >= config->vocab)
        FAIL(STATUS_INPUT, "%s: %" PRId64 ", expected a token id below the vocabulary's %d", field, id, config->vocab);
    for (int i = 0; i < config->n_stop; i++)
        if (config->stop_id[i] == (int)id)
            return STATUS_OK;
    if (config->n_stop == MODEL_MAX_STOP_IDS)
        FAIL(STATUS_INPUT, "%s: more than %d stop ids", field, MODEL_MAX_STOP_IDS);
    config->stop_id[config->n_stop++] = (int)id;
    return STATUS_OK;
}

static int check_positive(double value, const char *field) {
    if (!(value > 0.0) || !isfinite(value))
        FAIL(STATUS_INPUT, "%s: %g, expected a positive number", field, value);
    return STATUS_OK;
}

static int check_rope(const struct model_config *config) {
    TRY(check_positive(config->rope_theta, "rope_theta"));
    if (config->rope == ROPE_LLAMA3 || config->rope == ROPE_LINEAR)
        TRY(check_positive(config->rope_factor, "rope factor"));
    if (config->rope == ROPE_LLAMA3) {
        TRY(check_positive(config->rope_low_freq, "rope low_freq_factor"));
        if (!(config->rope_high_freq > config->rope_low_freq) || !isfinite(config->rope_high_freq))
            FAIL(STATUS_INPUT, "rope high_freq_factor: %g, expected more than low_freq_factor %g",
                 config->rope_high_freq, config->rope_low_freq);
        if (config->rope_original_context < 1)
            FAIL(STATUS_INPUT, "rope original_max_position_embeddings: %d, expected at least 1",
                 config->rope_original_context);
    }
    if (config->rope == ROPE_DIVISORS)
        for (int i = 0; i < config->head_dim / 2; i++)
            TRY(check_positive((double)config->rope_divisor[i], "rope_freqs.weight"));
    return STATUS_OK;
}

int model_config_check(const struct model_config *config) {
    if (config->head_dim != 64 && config->head_dim != 128)
        FAIL(STATUS_INPUT, "head_dim %d is not supported, expected 64 or 128", config->head_dim);
    if (config->n_heads % config->n_kv_heads != 0)
        FAIL(STATUS_INPUT, "%d query heads, expected a multiple of the %d key-value heads", config->n_heads,
             config->n_kv_heads);
    if (config->n_layers > MOST_LAYERS)
        FAIL(STATUS_INPUT, "%d layers, expected at most %d", config->n_layers, MOST_LAYERS);
    TRY(check_positive((double)config->rms_eps, "rms_norm_eps"));
    if (config->bos_id < -1 || config->bos_id >= config->vocab)
        FAIL(STATUS_INPUT, "bos_token_id: %d, expected a token id below the vocabulary's %d", config->bos_id,
             config->vocab);
    return check_rope(config);
}

/* Llama 3's scaling of one frequency: long wavelengths are divided by the factor, short ones kept, between them a blend. */
static float scale_llama3(const struct model_config *config, float freq) {
    const double pi = 3.14159265358979323846;
    float factor = (float)config->rope_factor;
    float context = (float)config->rope_original_context;
    float low = (float)config->rope_low_freq;
    float longest = (float)(config->rope_original_context / config->rope_low_freq);
    float shortest = (float)(config->rope_original_context / config->rope_high_freq);
    float wavelength = (1.0f / freq) * (float)(2.0 * pi);
    if (wavelength > longest)
        return freq / factor;
    if (wavelength < shortest)
        return freq;
    float smooth = ((1.0f / wavelength) * context - low) / (float)(config->rope_high_freq - config->rope_low_freq);
    return (1.0f - smooth) * freq / factor + smooth * freq;
}

void model_config_inv_freq(const struct model_config *config, float *inv_freq) {
    float theta = (float)config->rope_theta;
    for (int i = 0; i < config->head_dim / 2; i++) {
        float freq = 1.0f / powf(theta, (float)(2 * i) / (float)config->head_dim);
        switch (config->rope) {
        case ROPE_DEFAULT:
            break;
        case ROPE_LINEAR:
            freq /= (float)config->rope_factor;
            break;
        case ROPE_LLAMA3:
            freq = scale_llama3(config, freq);
            break;
        case ROPE_DIVISORS:
            freq /= config->rope_divisor[i];
        }
        inv_freq[i] = freq;
    }
}
