/* The model readers against torch, transformers and the gguf package: dequantized blocks, sizes of ggml's types, inverse
 * frequencies, and one tiny model that they wrote in both forms (golden/model_files.py). */
#include <openssl/evp.h>

#include "engine/model_config.h"
#include "model_golden.h"

#include "file_maker.h"

/* A power and a division, each within one unit of the last place here and in torch, and llama3's blend of a few roundings. */
static const double plain_ulps = 3.0, llama3_ulps = 8.0;

/* rope_freqs.weight is rounded to float32 once more, and so is the frequency it divides. */
static const double divisor_ulps = 10.0;

static void test_blocks(const json_t *golden) {
    static const enum dtype dtypes[] = {DTYPE_Q8_0, DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1, DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
    enum { N_BLOCKS = 6, MOST = N_BLOCKS * DTYPE_MOST_BLOCK };
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        const char *name = dtype_name(dtypes[i]);
        const json_t *entry = json_object_get(json_object_get(golden, "blocks"), name);
        const char *hex = json_string_value(json_object_get(entry, "bytes"));
        const json_t *bits = json_object_get(entry, "bits");
        int64_t n = (int64_t)json_array_size(bits);
        CHECK(hex && n == N_BLOCKS * dtype_block(dtypes[i]) && strlen(hex) == 2 * dtype_bytes(dtypes[i], n), "%s", name);
        uint8_t raw[2 * MOST];
        float values[MOST];
        for (size_t b = 0; b < strlen(hex) / 2; b++) {
            unsigned byte;
            sscanf(hex + 2 * b, "%2x", &byte);
            raw[b] = (uint8_t)byte;
        }
        dtype_widen(dtypes[i], raw, values, n);
        golden_check(name, values, bits);
    }
}

static int open_one_block(int type, int block, size_t bytes) {
    struct maker m = {0};
    maker_gguf_head(&m, 3, 1, 0);
    maker_gguf_info(&m, "x", (uint64_t)block, 0, (uint32_t)type, 0);
    maker_align(&m, 32);
    maker_zeros(&m, bytes);
    struct gguf *file;
    int status = gguf_open(maker_save(&m, "x.gguf"), &file);
    if (status == STATUS_OK) {
        int n;
        const struct file_tensor *t = gguf_tensors(file, &n);
        CHECK(t->bytes == bytes && (t->dtype == -1 || strcmp(t->type, dtype_name((enum dtype)t->dtype)) == 0),
              "type %d", type);
        CHECK(t->dtype == -1 || (dtype_block((enum dtype)t->dtype) == block &&
                                 dtype_bytes((enum dtype)t->dtype, block) == bytes), "type %d", type);
        gguf_close(file);
    }
    return status;
}

/* Each type of the gguf package has its size here; other numbers are unknown. */
static void test_type_sizes(const json_t *golden) {
    bool known[64] = {false};
    size_t i;
    json_t *row;
    json_array_foreach(json_object_get(golden, "type_sizes"), i, row) {
        int type = (int)json_integer_value(json_array_get(row, 0));
        int block = (int)json_integer_value(json_array_get(row, 2));
        size_t bytes = (size_t)json_integer_value(json_array_get(row, 3));
        known[type] = true;
        CHECK(open_one_block(type, block, bytes) == STATUS_OK, "type %d: %s", type, base_error());
        CHECK_FAILS(open_one_block(type, block, bytes - 1), STATUS_INPUT, "the file ends at");
        if (block > 1)
            CHECK_FAILS(open_one_block(type, block - 1, bytes), STATUS_INPUT, "are multiples of");
    }
    for (int type = 0; type < 64; type++)
        if (!known[type])
            CHECK_FAILS(open_one_block(type, 256, 1024), STATUS_INPUT, "is unknown");
}

static void test_frequencies(const json_t *golden) {
    static const char *const forms[] = {"new", "old"};
    size_t i;
    json_t *row;
    json_array_foreach(json_object_get(golden, "frequencies"), i, row) {
        for (int form = 0; form < 2; form++) {
            char *text = json_dumps(json_object_get(row, forms[form]), 0);
            struct model_config config;
            REQUIRE(model_config_json_read(text, strlen(text), &config));
            float inv_freq[MODEL_MAX_HEAD_DIM / 2];
            model_config_inv_freq(&config, inv_freq);
            golden_check_close(text, inv_freq, json_object_get(row, "bits"), (size_t)config.head_dim / 2,
                               config.rope == ROPE_LLAMA3 ? llama3_ulps : plain_ulps);
            free(text);
        }
    }
    CHECK(i == 32, "%zu configurations", i);
}

static void sha_hex(EVP_MD_CTX *sha, char hex[65]) {
    unsigned char digest[32];
    EVP_DigestFinal_ex(sha, digest, NULL);
    for (int i = 0; i < 32; i++)
        sprintf(hex + 2 * i, "%02x", digest[i]);
}

/* Every value of every tensor, in Hugging Face's order. */
static void check_tiny_tensor(const struct model_file *file, const char *name, const json_t *entry) {
    const struct model_tensor *t = model_file_find(file, name);
    CHECK(t != NULL, "%s", name);
    if (!t)
        return;
    const json_t *shape = json_object_get(entry, "shape");
    CHECK((int)json_array_size(shape) == t->n_dims, "%s", name);
    for (int i = 0; i < t->n_dims; i++)
        CHECK(json_integer_value(json_array_get(shape, (size_t)i)) == t->shape[i], "%s", name);
    EVP_MD_CTX *sha = EVP_MD_CTX_new();
    EVP_DigestInit_ex(sha, EVP_sha256(), NULL);
    for (int64_t r = 0; r < (t->n_dims == 2 ? t->shape[0] : 1); r++) {
        float *values = golden_row(file, t, r);
        if (r == 0)
            golden_check(name, values, json_object_get(entry, "bits"));
        EVP_DigestUpdate(sha, values, (size_t)t->shape[t->n_dims - 1] * sizeof *values);
        free(values);
    }
    char hex[65];
    sha_hex(sha, hex);
    EVP_MD_CTX_free(sha);
    CHECK(strcmp(hex, json_string_value(json_object_get(entry, "sha256"))) == 0, "%s", name);
}

static void test_tiny(const json_t *tiny, const char *path, bool gguf) {
    struct model_file *file;
    REQUIRE(model_file_open(path, &file));
    const struct model_config *c = model_file_config(file);
    const char *name;
    json_t *entry;
    json_object_foreach(json_object_get(tiny, "tensors"), name, entry)
        check_tiny_tensor(file, name, entry);
    CHECK((size_t)model_file_n_tensors(file) == json_object_size(json_object_get(tiny, "tensors")), "%s", path);
    char hex[65];
    REQUIRE(model_file_fingerprint(file, hex));
    CHECK(strcmp(hex, json_string_value(json_object_get(tiny, "fingerprint"))) == 0, "%s: %s", path, hex);
    CHECK(c->hidden == 64 && c->head_dim == 64 && c->n_heads == 2 && c->n_kv_heads == 1 && !c->tied && c->vocab == 40,
          "%s", path);
    CHECK(c->rope == (gguf ? ROPE_DIVISORS : ROPE_LLAMA3) && c->rope_theta == 500000.0, "%s", path);
    float inv_freq[MODEL_MAX_HEAD_DIM / 2];
    model_config_inv_freq(c, inv_freq);
    golden_check_close(path, inv_freq, json_object_get(tiny, "inv_freq"), 32, gguf ? divisor_ulps : llama3_ulps);
    if (!gguf)
        CHECK(c->bos_id == 1 && c->n_stop == 3 && c->stop_id[0] == 2 && c->stop_id[1] == 5 && c->stop_id[2] == 7,
              "%d stop ids", c->n_stop);
    model_file_close(file);
}

int main(void) {
    json_t *golden = golden_load();
    test_blocks(golden);
    test_type_sizes(golden);
    test_frequencies(golden);
    test_tiny(json_object_get(golden, "tiny"), TEST_FILE("golden/model_files"), false);
    test_tiny(json_object_get(golden, "tiny"), TEST_FILE("golden/model_files/tiny.gguf"), true);
    json_decref(golden);
    return test_report();
}
