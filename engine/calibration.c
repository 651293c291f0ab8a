/* Reading calibration files. All checks happen before anything is loaded. */
#include "engine/calibration.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/digest.h"
#include "engine/map_file.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

enum { TEXT_BYTES = 160 };

struct layer_tensors {
    const struct file_tensor *phi_k, *phi_q, *gate;
};

struct calibration {
    char *path;
    struct safetensors *file;
    const struct model_config *config;
    int features;
    bool phi_q_per_head, exact_v;
    int64_t trained_length;
    char hash[DIGEST_HEX];
    struct layer_tensors *layers;
};

void calibration_rope_text(const struct model_config *c, char *text, size_t bytes) {
    int n = snprintf(text, bytes, "theta %.9g", c->rope_theta);
    if (n < 0 || (size_t)n >= bytes)
        return;
    if (c->rope == ROPE_LLAMA3)
        snprintf(text + n, bytes - (size_t)n, " llama3 %.9g %.9g %.9g %d", c->rope_factor, c->rope_low_freq, c->rope_high_freq,
                 c->rope_original_context);
    else if (c->rope == ROPE_LINEAR)
        snprintf(text + n, bytes - (size_t)n, " linear %.9g", c->rope_factor);
}

/* ---- metadata ------------------------------------------------------------------------------------------------------ */

static int require(const struct calibration *cal, const char *key, const char **value) {
    *value = safetensors_metadata(cal->file, key);
    if (!*value)
        FAIL(STATUS_INPUT, "%s: metadata %s is missing: not a calibration of kvlinc", cal->path, key);
    return STATUS_OK;
}

static int check_text(const struct calibration *cal, const char *key, const char *expected) {
    const char *value;
    TRY(require(cal, key, &value));
    if (strcmp(value, expected) != 0)
        FAIL(STATUS_INPUT, "%s: calibration of another model: %s is %s, the model's is %s", cal->path, key, value, expected);
    return STATUS_OK;
}

static int check_number(const struct calibration *cal, const char *key, int64_t expected) {
    char text[TEXT_BYTES];
    snprintf(text, sizeof text, "%lld", (long long)expected);
    return check_text(cal, key, text);
}

static int check_model(const struct calibration *cal, const struct model_file *model, const char *tokenizer_hash) {
    const struct model_config *c = cal->config;
    char rope[TEXT_BYTES], fingerprint[DIGEST_HEX];
    const char *weights;
    TRY(check_text(cal, "format", "kvlinc-calibration"));
    TRY(check_text(cal, "version", "1"));
    TRY(check_text(cal, "architecture", model_config_arch_name(c->arch)));
    TRY(check_number(cal, "hidden", c->hidden));
    TRY(check_number(cal, "n_layers", c->n_layers));
    TRY(check_number(cal, "n_heads", c->n_heads));
    TRY(check_number(cal, "n_kv_heads", c->n_kv_heads));
    TRY(check_number(cal, "head_dim", c->head_dim));
    calibration_rope_text(c, rope, sizeof rope);
    TRY(check_text(cal, "rope", rope));
    TRY(check_text(cal, "tokenizer", tokenizer_hash));
    TRY(require(cal, "weights", &weights));
    TRY(model_file_fingerprint(model, fingerprint));
    if (strcmp(weights, fingerprint) != 0)
        log_warn("%s: made for weights %s, %s has %s", cal->path, weights, model_file_path(model), fingerprint);
    return STATUS_OK;
}

/* A whole number in the metadata; `fallback` when it may be missing. */
static int read_number(const struct calibration *cal, const char *key, int64_t least, int64_t most, int64_t *out) {
    const char *value;
    char *end;
    TRY(require(cal, key, &value));
    long long n = strtoll(value, &end, 10);
    if (end == value || *end || n < least || n > most)
        FAIL(STATUS_INPUT, "%s: metadata %s is '%s', expected a number from %lld to %lld", cal->path, key, value, (long long)least,
             (long long)most);
    *out = n;
    return STATUS_OK;
}

static int read_choice(const struct calibration *cal, const char *key, const char *no, const char *yes, bool *out) {
    const char *value;
    TRY(require(cal, key, &value));
    *out = strcmp(value, yes) == 0;
    if (!*out && strcmp(value, no) != 0)
        FAIL(STATUS_INPUT, "%s: metadata %s is '%s', expected %s or %s", cal->path, key, value, no, yes);
    return STATUS_OK;
}

/* ---- tensors ------------------------------------------------------------------------------------------------------- */

static int check_tensor(const struct calibration *cal, const struct file_tensor *t, const int64_t *shape, int n_dims) {
    char expected[FILE_TENSOR_SHAPE_TEXT], got[FILE_TENSOR_SHAPE_TEXT];
    bool same = t->n_dims == n_dims;
    for (int i = 0; same && i < n_dims; i++)
        same = t->shape[i] == shape[i];
    if (t->dtype != DTYPE_F32)
        FAIL(STATUS_INPUT, "%s: tensor %s: dtype %s, expected F32", cal->path, t->name, t->type);
    if (!same)
        FAIL(STATUS_INPUT, "%s: tensor %s: shape %s, expected %s", cal->path, t->name,
             file_tensor_shape_text(t->shape, t->n_dims, got), file_tensor_shape_text(shape, n_dims, expected));
    return STATUS_OK;
}

/* Binds one tensor by its name. */
static int bind(struct calibration *cal, const struct file_tensor *t) {
    const struct model_config *c = cal->config;
    int layer = -1, end = 0;
    if (sscanf(t->name, "layers.%d.%n", &layer, &end) != 1 || end == 0)
        FAIL(STATUS_INPUT, "%s: tensor %s is not known", cal->path, t->name);
    if (layer < 0 || layer >= c->n_layers)
        FAIL(STATUS_INPUT, "%s: tensor %s: the model has layers 0 to %d", cal->path, t->name, c->n_layers - 1);
    struct layer_tensors *l = &cal->layers[layer];
    const char *rest = t->name + end;
    int64_t shape[4] = {c->n_kv_heads, 2, c->head_dim, cal->features / 2};
    if (strcmp(rest, "gate") == 0) {
        l->gate = t;
        return check_tensor(cal, t, shape, 1);
    }
    if (strcmp(rest, "phi_k.weight") == 0) {
        l->phi_k = t;
    } else if (strcmp(rest, "phi_q.weight") == 0) {
        l->phi_q = t;
        shape[0] = cal->phi_q_per_head ? c->n_heads : c->n_kv_heads;
    } else {
        FAIL(STATUS_INPUT, "%s: tensor %s is not known", cal->path, t->name);
    }
    return check_tensor(cal, t, shape, 4);
}

static int read_adapters(struct calibration *cal) {
    int n = 0;
    int64_t features = 0;
    const struct file_tensor *tensors = safetensors_tensors(cal->file, &n);
    if (n == 0)
        return STATUS_OK;
    TRY(read_number(cal, "features", 2, KV_MAX_FEATURES, &features));
    if (features % 32 != 0)
        FAIL(STATUS_INPUT, "%s: features %lld, expected a multiple of 32", cal->path, (long long)features);
    cal->features = (int)features;
    TRY(read_number(cal, "trained_length", 0, INT64_MAX, &cal->trained_length));
    TRY(read_choice(cal, "phi_q", "kv_head", "head", &cal->phi_q_per_head));
    TRY(read_choice(cal, "v_in_s", "dequantized", "exact", &cal->exact_v));
    for (int i = 0; i < n; i++)
        TRY(bind(cal, &tensors[i]));
    for (int i = 0; i < cal->config->n_layers; i++) {
        const struct layer_tensors *l = &cal->layers[i];
        if (!l->phi_k != !l->phi_q || (l->gate && !l->phi_k))
            FAIL(STATUS_INPUT, "%s: layer %d: phi_k.weight and phi_q.weight come together", cal->path, i);
    }
    return STATUS_OK;
}

static int hash_file(struct calibration *cal) {
    struct map_file map = {0};
    unsigned char digest[EVP_MAX_MD_SIZE];
    TRY(map_file_open(cal->path, &map));
    int ok = EVP_Digest(map.data, map.bytes, digest, NULL, EVP_sha256(), NULL);
    map_file_close(&map);
    if (!ok)
        FAIL(STATUS_FAILED, "%s: SHA-256 failed", cal->path);
    digest_hex(digest, cal->hash);
    return STATUS_OK;
}

int calibration_open(const char *path, const struct model_file *model, const char *tokenizer_hash, struct calibration **out) {
    int status = STATUS_OK;
    struct calibration *cal = NULL;
    TRY(base_alloc(&cal, 1, sizeof *cal));
    cal->config = model_file_config(model);
    cal->path = strdup(path);
    if (!cal->path)
        FAIL_GOTO(STATUS_MEMORY, "out of memory");
    TRY_GOTO(base_alloc(&cal->layers, (size_t)cal->config->n_layers, sizeof *cal->layers));
    TRY_GOTO(safetensors_open(path, &cal->file));
    TRY_GOTO(hash_file(cal));
    TRY_GOTO(check_model(cal, model, tokenizer_hash));
    TRY_GOTO(read_adapters(cal));
    *out = cal;
    return STATUS_OK;
fail:
    calibration_close(cal);
    return status;
}

void calibration_close(struct calibration *cal) {
    if (!cal)
        return;
    safetensors_close(cal->file);
    free(cal->layers);
    free(cal->path);
    free(cal);
}

bool calibration_has_layer(const struct calibration *cal, int layer) { return cal->layers[layer].phi_k != NULL; }

bool calibration_has_adapters(const struct calibration *cal) {
    for (int i = 0; i < cal->config->n_layers; i++)
        if (calibration_has_layer(cal, i))
            return true;
    return false;
}

int calibration_features(const struct calibration *cal) { return cal->features; }
int64_t calibration_trained_length(const struct calibration *cal) { return cal->trained_length; }
const char *calibration_hash(const struct calibration *cal) { return cal->hash; }

/* ---- loading ------------------------------------------------------------------------------------------------------- */

static int upload(const struct file_tensor *t, struct range heads, struct backend *backend, struct stream *stream, float **out) {
    int64_t each = 1;
    for (int i = 1; i < t->n_dims; i++)
        each *= t->shape[i];
    size_t bytes = (size_t)(range_size(heads) * each) * sizeof(float);
    TRY(backend_alloc(backend, MEMORY_WEIGHTS, bytes, out));
    TRY(stream_copy_in(stream, *out, (const float *)t->data + heads.begin * each, bytes));
    return stream_sync(stream);
}

int calibration_load(const struct calibration *cal, struct range heads, struct range kv_heads, struct backend *backend,
                     struct stream *stream, struct cache_adapter *adapters) {
    for (int i = 0; i < cal->config->n_layers; i++) {
        const struct layer_tensors *l = &cal->layers[i];
        struct cache_adapter *a = &adapters[i];
        if (!l->phi_k)
            continue;
        a->phi_q_per_head = cal->phi_q_per_head;
        a->exact_v = cal->exact_v;
        TRY(upload(l->phi_k, kv_heads, backend, stream, &a->phi_k));
        TRY(upload(l->phi_q, cal->phi_q_per_head ? heads : kv_heads, backend, stream, &a->phi_q));
        if (l->gate)
            TRY(upload(l->gate, kv_heads, backend, stream, &a->gate));
    }
    return STATUS_OK;
}

void calibration_unload(struct backend *backend, struct cache_adapter *adapters, int n_layers) {
    for (int i = 0; adapters && i < n_layers; i++) {
        backend_free(backend, adapters[i].phi_k);
        backend_free(backend, adapters[i].phi_q);
        backend_free(backend, adapters[i].gate);
    }
}
