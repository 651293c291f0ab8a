/* SmolLM2's own tokenizer and chat template, from the real file (KVLINC_TEST_MODEL): ids of the `tokenizers` library, invalid
 * input, the tokenizer.json form of the same tokenizer, texts of megabytes. */
#include "engine/chat.h"
#include "tokenizer_golden.h"

/* The file's tokenizer as a tokenizer.json with the settings of SmolLM2's own. Malloced. */
static char *make_json(const struct tokenizer_source *source) {
    json_t *vocab = json_object(), *added = json_array(), *merges = json_array();
    for (int i = 0; i < source->n_tokens; i++) {
        char *key = strndup(source->tokens[i], source->token_bytes[i]);
        json_object_set_new(vocab, key, json_integer(i));
        if (source->token_types[i] == 3)
            json_array_append_new(added, json_pack("{s:i,s:s,s:b,s:b,s:b,s:b,s:b}", "id", i, "content", key, "single_word", 0, "lstrip", 0,
                                                   "rstrip", 0, "normalized", 0, "special", 1));
        free(key);
    }
    for (int i = 0; i < source->n_merges; i++)
        json_array_append_new(merges, json_stringn(source->merges[i], source->merge_bytes[i]));
    json_t *root = json_pack("{s:o,s:n,s:{s:s,s:[{s:s,s:b},{s:s,s:b,s:b,s:b}]},s:n,s:{s:s},s:{s:s,s:n,s:b,s:o,s:o}}", "added_tokens", added,
                             "normalizer", "pre_tokenizer", "type", "Sequence", "pretokenizers", "type", "Digits", "individual_digits", 1,
                             "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 1, "post_processor", "decoder",
                             "type", "ByteLevel", "model", "type", "BPE", "unk_token", "fuse_unk", 0, "vocab", vocab, "merges", merges);
    char *text = json_dumps(root, 0);
    json_decref(root);
    return text;
}

/* Bytes that no token stands for are lost (21 of them in this vocabulary, six of which occur in UTF-8 as control
 * characters, two as lead bytes of planes without characters); everything else comes back. */
static void check_round_trip(const struct tokenizer *t, const char *text, size_t bytes) {
    int32_t *ids;
    int n;
    char *back, *kept = malloc(bytes + 1);
    size_t n_kept = 0, n_back;
    for (size_t i = 0; i < bytes; i++)
        if (tokenizer_find(t, text + i, 1) >= 0)
            kept[n_kept++] = text[i];
    REQUIRE(tokenizer_encode(t, text, bytes, true, false, &ids, &n));
    REQUIRE(tokenizer_decode(t, ids, n, false, &back, &n_back));
    CHECK(n_back == n_kept && memcmp(back, kept, n_kept) == 0, "'%.60s'", text);
    free(back);
    free(kept);
    free(ids);
}

static size_t read_hex(const char *hex, char *out) {
    size_t n = strlen(hex) / 2;
    for (size_t i = 0; i < n; i++) {
        unsigned value;
        sscanf(hex + 2 * i, "%2x", &value);
        out[i] = (char)value;
    }
    return n;
}

/* Texts joined until there is a million bytes and more: in one piece or per text (here no piece spans two texts that
 * end in a line end and begin with a letter) the ids are the same. */
static void check_large(const struct tokenizer *t, const json_t *cases) {
    enum { LARGE = 4 << 20 };
    char *text = malloc(LARGE + 4096);
    size_t bytes = 0;
    int32_t *ids, *part;
    int n, n_part, at = 0;
    bool same = true;
    size_t *start = malloc((LARGE / 4) * sizeof *start), n_parts = 0;
    for (size_t i = 0; bytes < LARGE; i = (i + 1) % 30) {
        const json_t *item = json_object_get(json_array_get(cases, i), "text");
        start[n_parts++] = bytes;
        bytes += (size_t)sprintf(text + bytes, "Text %s.\n", json_string_value(item));
    }
    start[n_parts] = bytes;
    double seconds = base_seconds();
    REQUIRE(tokenizer_encode(t, text, bytes, true, false, &ids, &n));
    seconds = base_seconds() - seconds;
    fprintf(stderr, "mixed text: %.1f MB, %d tokens, %.1f MB/s\n", (double)bytes / 1e6, n, (double)bytes / 1e6 / seconds);
    for (size_t i = 0; i < n_parts; i++) {
        REQUIRE(tokenizer_encode(t, text + start[i], start[i + 1] - start[i], true, false, &part, &n_part));
        same = same && at + n_part <= n && memcmp(ids + at, part, (size_t)n_part * sizeof *part) == 0;
        at += n_part;
        free(part);
    }
    CHECK(same && at == n, "%d ids in parts, %d in one", at, n);
    free(start);
    free(ids);

    static const char *const units[] = {"a", " ", "!", "\n", "\xE4\xB8\xAD", "7", "x "};
    for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) { /* pieces of megabytes: neither quadratic nor out of stack */
        for (bytes = 0; bytes < LARGE; bytes += strlen(units[u]))
            memcpy(text + bytes, units[u], strlen(units[u]));
        seconds = base_seconds();
        REQUIRE(tokenizer_encode(t, text, bytes, true, false, &ids, &n));
        seconds = base_seconds() - seconds;
        fprintf(stderr, "'%s' again and again: %.1f MB, %d tokens, %.1f MB/s\n", *units[u] == '\n' ? "\\n" : units[u],
                (double)bytes / 1e6, n, (double)bytes / 1e6 / seconds);
        char *back;
        size_t n_back;
        REQUIRE(tokenizer_decode(t, ids, n, false, &back, &n_back));
        CHECK(n_back == bytes && memcmp(back, text, bytes) == 0, "'%s'", units[u]);
        free(back);
        free(ids);
    }
    free(text);
}

static void check_invalid(const struct tokenizer *t, const json_t *invalid) {
    char raw[64];
    for (size_t i = 0; i < json_array_size(invalid); i++) {
        const json_t *item = json_array_get(invalid, i);
        size_t bytes = read_hex(json_string_value(json_object_get(item, "bytes")), raw);
        int32_t *ids;
        int n;
        REQUIRE(tokenizer_encode(t, raw, bytes, true, false, &ids, &n));
        CHECK(golden_ids_are(item, "ids", ids, n), "bytes %s", json_string_value(json_object_get(item, "bytes")));
        free(ids);
    }
    CHECK(json_array_size(invalid) > 100, "%zu", json_array_size(invalid));
}

int main(void) {
    const char *path = getenv("KVLINC_TEST_MODEL");
    if (!path)
        return TEST_SKIP;
    struct model_file *file;
    struct tokenizer *t, *from_json;
    const struct chat_template *chat;
    json_t *golden = golden_load(TEST_FILE("golden/tokenizer.json")), *row = json_object_get(golden, "smollm2");
    json_t *cases = json_object_get(row, "cases");
    REQUIRE(model_file_open(path, &file));
    const struct tokenizer_source *source = model_file_tokenizer(file);
    int vocab = model_file_config(file)->vocab;
    double seconds = base_seconds();
    REQUIRE(tokenizer_open(source, vocab, &t));
    fprintf(stderr, "opened in %.0f ms\n", (base_seconds() - seconds) * 1e3);
    CHECK(tokenizer_size(t) == 49152, "%d", tokenizer_size(t));
    CHECK(tokenizer_find(t, "<|im_end|>", 10) == 2 && tokenizer_is_special(t, 2), "end of turn");
    golden_check_row(t, "SmolLM2", golden, row);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        size_t bytes;
        char *text = golden_text(json_array_get(cases, i), cases, &bytes);
        if (bytes < 4096)
            check_round_trip(t, text, bytes);
        free(text);
    }
    check_invalid(t, json_object_get(golden, "invalid"));
    check_large(t, cases);

    char *json = make_json(source), hash[65], json_hash[65];
    struct tokenizer_source json_source = {.path = "tokenizer.json", .json = json, .json_bytes = strlen(json), .bos_id = -1, .eos_id = -1};
    REQUIRE(tokenizer_open(&json_source, vocab, &from_json));
    tokenizer_hash(t, hash);
    tokenizer_hash(from_json, json_hash);
    CHECK(strcmp(hash, json_hash) == 0, "%s and %s", hash, json_hash);
    for (size_t i = 0; i < json_array_size(cases); i++)
        golden_check_case(from_json, "SmolLM2's tokenizer.json", json_array_get(cases, i), cases);
    tokenizer_close(from_json);
    free(json);
    CHECK_FAILS(tokenizer_open(source, vocab - 1, &from_json), STATUS_INPUT, "has 49152 tokens, the model 49151 embedding rows");
    REQUIRE(chat_find(source->chat_template, path, &chat));
    CHECK(strcmp(chat_name(chat), "smollm2") == 0, "%s", chat_name(chat));
    tokenizer_close(t);
    model_file_close(file);
    json_decref(golden);
    return test_report();
}
