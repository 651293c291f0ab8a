/* The fingerprint of a model's weights: SHA-256 (OpenSSL's) over the norm weights, which every format keeps unquantized. */
#include <openssl/evp.h>
#include <stdlib.h>

#include "engine/digest.h"
#include "engine/model_file.h"

static int add_norm(EVP_MD_CTX *sha, const struct model_file *file, const char *name, float *values) {
    const struct model_tensor *norm = model_file_find(file, name);
    if (!norm)
        FAIL(STATUS_INPUT, "%s: tensor %s is missing", model_file_path(file), name);
    dtype_widen(norm->dtype, norm->data, values, norm->shape[0]);
    if (EVP_DigestUpdate(sha, values, (size_t)norm->shape[0] * sizeof *values) != 1)
        FAIL(STATUS_FAILED, "SHA-256: OpenSSL cannot add data");
    return STATUS_OK;
}

static int add_norms(EVP_MD_CTX *sha, const struct model_file *file, float *values) {
    static const char *const norms[] = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"};
    const struct model_config *c = model_file_config(file);
    int n = c->qk_norm ? 4 : 2;
    for (int i = 0; i < c->n_layers * n; i++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", i / n, norms[i % n]);
        TRY(add_norm(sha, file, name, values));
    }
    return add_norm(sha, file, "model.norm.weight", values);
}

int model_file_fingerprint(const struct model_file *file, char hex[65]) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    float *values = NULL;
    int status = STATUS_OK;
    EVP_MD_CTX *sha = EVP_MD_CTX_new();
    if (!sha || EVP_DigestInit_ex(sha, EVP_sha256(), NULL) != 1)
        FAIL_GOTO(STATUS_FAILED, "SHA-256: OpenSSL cannot start");
    TRY_GOTO(base_alloc(&values, (size_t)max_i64(model_file_config(file)->hidden, MODEL_MAX_HEAD_DIM), sizeof *values));
    TRY_GOTO(add_norms(sha, file, values));
    if (EVP_DigestFinal_ex(sha, digest, NULL) != 1)
        FAIL_GOTO(STATUS_FAILED, "SHA-256: OpenSSL cannot finish");
    digest_hex(digest, hex);
fail:
    free(values);
    EVP_MD_CTX_free(sha);
    return status;
}
