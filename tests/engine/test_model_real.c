/* SmolLM2-135M-Instruct as GGUF against transformers' reading of the same file: rows in Hugging Face's order, dequantized,
 * bit for bit; fingerprint, configuration, tokenizer metadata. Path in KVLINC_TEST_MODEL; skipped without. */
#include "model_golden.h"

static void test_rows(const struct model_file *file, const json_t *rows) {
    size_t i;
    json_t *row;
    json_array_foreach(rows, i, row) {
        const char *name = json_string_value(json_object_get(row, "name"));
        const struct model_tensor *t = model_file_find(file, name);
        CHECK(t != NULL, "%s", name);
        if (!t)
            continue;
        const json_t *bits = json_object_get(row, "bits");
        CHECK((int64_t)json_array_size(bits) == t->shape[t->n_dims - 1], "%s", name);
        float *values = golden_row(file, t, (int64_t)json_integer_value(json_object_get(row, "row")));
        golden_check(name, values, bits);
        free(values);
    }
    CHECK(i == 22, "%zu rows", i);
}

static void test_config(const struct model_config *c) {
    CHECK(c->hidden == 576 && c->n_layers == 30 && c->n_heads == 9 && c->n_kv_heads == 3 && c->head_dim == 64,
          "hidden %d", c->hidden);
    CHECK(c->intermediate == 1536 && c->vocab == 49152 && c->context == 8192 && c->tied && c->rms_eps == 1e-5f,
          "vocabulary %d", c->vocab);
    CHECK(c->rope == ROPE_DEFAULT && c->rope_theta == 100000.0 && c->bos_id == 1 && c->n_stop == 1 && c->stop_id[0] == 2,
          "theta %g", c->rope_theta);
}

static void test_tokenizer(const struct tokenizer_source *s) {
    CHECK(s->n_tokens == 49152 && s->n_merges == 48900 && s->json == NULL, "%d tokens", s->n_tokens);
    CHECK(strcmp(s->tokens[1], "<|im_start|>") == 0 && s->token_bytes[1] == 12 && s->token_types[1] == 3, "token 1");
    CHECK(strcmp(s->model, "gpt2") == 0 && strcmp(s->pre, "smollm") == 0 && !s->add_bos, "model %s", s->model);
    CHECK(s->chat_template && strstr(s->chat_template, "<|im_start|>system"), "chat template");
    CHECK(s->bos_id == 1 && s->eos_id == 2, "bos %d, eos %d", s->bos_id, s->eos_id);
}

int main(void) {
    const char *path = getenv("KVLINC_TEST_MODEL");
    if (!path || !path[0]) {
        fprintf(stderr, "skipped: KVLINC_TEST_MODEL is not set\n");
        return TEST_SKIP;
    }
    json_t *golden = golden_load();
    const json_t *real = json_object_get(golden, "real");
    struct model_file *file;
    REQUIRE(model_file_open(path, &file));
    test_config(model_file_config(file));
    test_tokenizer(model_file_tokenizer(file));
    test_rows(file, json_object_get(real, "rows"));
    char hex[65];
    REQUIRE(model_file_fingerprint(file, hex));
    CHECK(strcmp(hex, json_string_value(json_object_get(real, "fingerprint"))) == 0, "%s", hex);
    float inv_freq[MODEL_MAX_HEAD_DIM / 2];
    model_config_inv_freq(model_file_config(file), inv_freq);
    golden_check_close("inv_freq", inv_freq, json_object_get(real, "inv_freq"), 32, 3.0);
    CHECK(model_file_n_tensors(file) == 272, "%d tensors", model_file_n_tensors(file));
    model_file_close(file);
    json_decref(golden);
    return test_report();
}
