/* Small tokenizers of every supported kind against the `tokenizers` library; files that must be refused. */
#include "engine/pretokenize.h"
#include "tokenizer_golden.h"

enum { VOCAB = 600 };

static struct tokenizer *open_json(const char *text) {
    struct tokenizer_source source = {.path = "test", .json = text, .json_bytes = strlen(text), .bos_id = -1, .eos_id = -1};
    struct tokenizer *t;
    REQUIRE(tokenizer_open(&source, VOCAB, &t));
    return t;
}

/* The GGUF form of a tokenizer.json. Texts are borrowed from `root`. */
struct gguf_form {
    struct tokenizer_source source;
    const char *token[VOCAB], *merge[VOCAB];
    size_t token_bytes[VOCAB], merge_bytes[VOCAB];
    int32_t type[VOCAB];
    char text[VOCAB][64];
};

static void make_gguf(struct gguf_form *form, json_t *root, const char *pre) {
    json_t *model = json_object_get(root, "model"), *item;
    const char *key;
    size_t i;
    *form = (struct gguf_form){0};
    json_object_foreach(json_object_get(model, "vocab"), key, item) {
        form->token[json_integer_value(item)] = key;
        form->token_bytes[json_integer_value(item)] = strlen(key);
        form->type[json_integer_value(item)] = 1;
        form->source.n_tokens++;
    }
    json_array_foreach(json_object_get(root, "added_tokens"), i, item) {
        json_int_t id = json_integer_value(json_object_get(item, "id"));
        form->source.n_tokens += !form->token[id];
        form->token[id] = json_string_value(json_object_get(item, "content"));
        form->token_bytes[id] = strlen(form->token[id]);
        form->type[id] = json_is_true(json_object_get(item, "special")) ? 3 : 4;
    }
    json_array_foreach(json_object_get(model, "merges"), i, item) {
        form->merge_bytes[i] = (size_t)snprintf(form->text[i], 64, "%s %s", json_string_value(json_array_get(item, 0)),
                                                json_string_value(json_array_get(item, 1)));
        form->merge[i] = form->text[i];
    }
    form->source.path = "test.gguf";
    form->source.tokens = form->token;
    form->source.token_bytes = form->token_bytes;
    form->source.token_types = form->type;
    form->source.merges = form->merge;
    form->source.merge_bytes = form->merge_bytes;
    form->source.n_merges = (int)json_array_size(json_object_get(model, "merges"));
    form->source.model = "gpt2";
    form->source.pre = pre;
    form->source.bos_id = form->source.eos_id = -1;
}

/* The GGUF form encodes alike and has the same hash; a padding token at its end changes neither. */
static void check_gguf_form(const struct tokenizer *json_form, const json_t *golden, const json_t *row) {
    struct gguf_form *form = malloc(sizeof *form);
    char hash[65], other[65];
    const char *name = json_string_value(json_object_get(row, "name"));
    json_t *root = json_loads(json_string_value(json_object_get(row, "tokenizer")), 0, NULL);
    struct tokenizer *t;
    make_gguf(form, root, json_string_value(json_object_get(row, "pre")));
    const char *begin = "<|begin|>";
    form->source.bos_id = tokenizer_find(json_form, begin, strlen(begin));
    form->source.add_bos = form->source.bos_id >= 0;
    REQUIRE(tokenizer_open(&form->source, VOCAB, &t));
    golden_check_row(t, name, golden, row);
    tokenizer_hash(json_form, hash);
    tokenizer_hash(t, other);
    CHECK(strlen(hash) == 64 && strcmp(hash, other) == 0, "%s: %s and %s", name, hash, other);
    tokenizer_close(t);

    int n = form->source.n_tokens++;
    form->token[n] = "[PAD]", form->token_bytes[n] = 5, form->type[n] = 5;
    REQUIRE(tokenizer_open(&form->source, VOCAB, &t));
    tokenizer_hash(t, other);
    CHECK(strcmp(hash, other) == 0, "%s: padded", name);
    CHECK(tokenizer_size(t) == n + 1 && tokenizer_size(json_form) == n, "%s: %d", name, n);
    tokenizer_close(t);
    form->token[n] = form->token[n - 1], form->token_bytes[n] = form->token_bytes[n - 1];
    CHECK_FAILS(tokenizer_open(&form->source, VOCAB, &t), STATUS_INPUT, "is there twice");
    form->source.n_tokens = n;
    CHECK_FAILS(tokenizer_open(&form->source, n - 1, &t), STATUS_INPUT, "embedding rows");
    form->source.pre = "deepseek-llm";
    CHECK_FAILS(tokenizer_open(&form->source, VOCAB, &t), STATUS_INPUT, "'deepseek-llm' is not known (known: smollm");
    form->source.model = "llama";
    CHECK_FAILS(tokenizer_open(&form->source, VOCAB, &t), STATUS_INPUT, "tokenizer.ggml.model 'llama' is not known");
    form->source.model = "gpt2", form->source.pre = "smollm";
    REQUIRE(tokenizer_open(&form->source, VOCAB, &t));
    tokenizer_hash(t, other);
    CHECK(strcmp(hash, other) != 0, "%s: the rules are not in the hash", name);
    tokenizer_close(t);
    form->merge[0] = "a b c", form->merge_bytes[0] = 5;
    CHECK_FAILS(tokenizer_open(&form->source, VOCAB, &t), STATUS_INPUT, "merge 0: 'a b c' is not two parts");
    form->type[0] = 6;
    CHECK_FAILS(tokenizer_open(&form->source, VOCAB, &t), STATUS_INPUT, "token_type of token 0 is 6");
    json_decref(root);
    free(form);
}

/* A change of the JSON that must be refused: the value at a path of keys. */
static const struct refusal {
    const char *path, *value, *words;
} refusals[] = {
    {"model/type", "\"Unigram\"", "model type 'Unigram' is not known"},
    {"model/byte_fallback", "true", "byte_fallback"},
    {"model/dropout", "0.1", "dropout"},
    {"model/end_of_word_suffix", "\"</w>\"", "end_of_word_suffix '</w>'"},
    {"model/unk_token", "\"nowhere\"", "unk_token"},
    {"model/vocab", "[]", "no vocab"},
    {"model/merges", "[[\"a\",\"nowhere\"]]", "merge 0: right part 'nowhere' is not in the vocabulary"},
    {"model/merges", "[[\"!\",\"~\"]]", "merge 0: result '!~'"},
    {"model/merges", "[7]", "merge 0 is neither"},
    {"model/merges", "[\"ab\"]", "not two parts"},
    {"model/vocab/new", "3", "token id 3 stands for"},
    {"model/vocab/new", "600", "token id 600 ('new') lies outside the model's 600 embedding rows"},
    {"model/vocab/new", "-1", "token id -1"},
    {"added_tokens", "[{\"id\": 5, \"content\": \"<s>\"}]", "added token '<s>' has id 5, in the vocabulary it has 0"},
    {"added_tokens", "[{\"id\": 600, \"content\": \"beyond\"}]", "'beyond') lies outside the model's 600 embedding rows"},
    {"normalizer", "{\"type\": \"Lowercase\"}", "normalizer 'Lowercase' is not known"},
    {"normalizer", "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFKC\"}]}", "normalizer 'NFKC'"},
    {"pre_tokenizer", "{\"type\": \"Metaspace\"}", "pre_tokenizer 'Metaspace' is not known"},
    {"pre_tokenizer", "{\"type\": \"Digits\"}", "no ByteLevel"},
    {"pre_tokenizer", "null", "pre_tokenizer ''"},
    {"pre_tokenizer", "{\"type\": \"ByteLevel\"}", "add_prefix_space"},
    {"pre_tokenizer", "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"x+\"}, \"behavior\": \"Isolated\"}", "regex 'x+' is not known"},
    {"pre_tokenizer", "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"x+\"}, \"behavior\": \"Removed\"}", "behavior 'Removed'"},
    {"pre_tokenizer", "{\"type\": \"Split\", \"pattern\": {\"String\": \"x\"}, \"behavior\": \"Isolated\"}", "only a Regex"},
    {"pre_tokenizer", "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"ByteLevel\", \"add_prefix_space\": false}, {\"type\": \"Digits\"}]}",
     "'Digits' comes after ByteLevel"},
    {"decoder", "{\"type\": \"WordPiece\"}", "decoder 'WordPiece' is not known"},
    {"post_processor", "{\"type\": \"BertProcessing\"}", "post_processor 'BertProcessing' is not known"},
    {"post_processor/single", "[]", "holds the text 0 times"},
    {"post_processor/special_tokens", "{}", "special token '<s>' has no ids"},
    {"post_processor/special_tokens", "{\"<s>\": {\"ids\": [599]}}", "id 599 of '<s>'"},
};

static void check_refusals(const char *text) {
    struct tokenizer *t;
    for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++) {
        json_t *root = json_loads(text, 0, NULL), *node = root;
        char path[64];
        snprintf(path, sizeof path, "%s", refusals[i].path);
        char *key = strtok(path, "/"), *next;
        while ((next = strtok(NULL, "/"))) {
            node = json_object_get(node, key);
            key = next;
        }
        json_object_set_new(node, key, json_loads(refusals[i].value, JSON_DECODE_ANY, NULL));
        char *changed = json_dumps(root, 0);
        struct tokenizer_source source = {.path = "dir/tokenizer.json", .json = changed, .json_bytes = strlen(changed)};
        int status = tokenizer_open(&source, VOCAB, &t);
        CHECK(status == STATUS_INPUT && strstr(base_error(), refusals[i].words) && strstr(base_error(), "dir/tokenizer.json: "),
              "%s = %s: status %d, '%s'", refusals[i].path, refusals[i].value, status, base_error());
        base_clear_error();
        if (status == 0)
            tokenizer_close(t);
        free(changed);
        json_decref(root);
    }
    for (size_t cut = 0; cut < strlen(text); cut += 997) { /* a truncated file */
        struct tokenizer_source source = {.path = "x", .json = text, .json_bytes = cut};
        CHECK_FAILS(tokenizer_open(&source, VOCAB, &t), STATUS_INPUT, "tokenizer.json, line");
    }
    struct tokenizer_source none = {.path = "x"};
    CHECK_FAILS(tokenizer_open(&none, VOCAB, &t), STATUS_INPUT, "no tokenizer");
}

/* What the interface promises beside ids, on the tokenizer "flags". */
static void check_interface(const struct tokenizer *t) {
    const char *word = "word", *text;
    int32_t *ids, id = tokenizer_find(t, word, 4);
    size_t bytes;
    char *back;
    int n;
    text = tokenizer_token(t, id, &bytes);
    CHECK(id >= 0 && bytes == 4 && memcmp(text, word, 4) == 0 && !tokenizer_is_special(t, id), "id %d", id);
    CHECK(tokenizer_find(t, "<s>", 3) == 0 && tokenizer_is_special(t, 0), "begin");
    CHECK(tokenizer_find(t, "nowhere at all", 14) == -1, "find");
    CHECK(tokenizer_token(t, -1, &bytes) == NULL && tokenizer_token(t, tokenizer_size(t), &bytes) == NULL, "range");
    CHECK(!tokenizer_is_special(t, -1) && !tokenizer_is_special(t, tokenizer_size(t)), "range");
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        text = tokenizer_token(t, tokenizer_find(t, &c, 1), &bytes);
        CHECK(text && bytes == 1 && *text == c, "byte %d", byte);
    }
    REQUIRE(tokenizer_encode(t, "x<|a|>", 6, true, true, &ids, &n));
    REQUIRE(tokenizer_decode(t, ids, n, false, &back, &bytes));
    CHECK(strcmp(back, "<s>x<|a|></s>") == 0 && bytes == 13, "'%s'", back);
    free(back);
    REQUIRE(tokenizer_decode(t, ids, n, true, &back, &bytes));
    CHECK(strcmp(back, "x") == 0 && bytes == 1, "'%s'", back);
    free(back);
    free(ids);
    int32_t beyond[] = {-1, id, 1 << 30, id};
    REQUIRE(tokenizer_decode(t, beyond, 4, false, &back, &bytes));
    CHECK(strcmp(back, "wordword") == 0, "'%s'", back);
    free(back);
    REQUIRE(tokenizer_decode(t, NULL, 0, false, &back, &bytes));
    CHECK(bytes == 0 && *back == 0, "'%s'", back);
    free(back);
}

struct piece_counts {
    uint64_t h;
    int64_t n;
};

static int count_piece(void *context, const char *piece, size_t bytes) {
    struct piece_counts *counts = context;
    int32_t characters = 0;
    for (size_t i = 0; i < bytes; i++)
        characters += ((uint8_t)piece[i] & 0xC0) != 0x80;
    counts->h = golden_fnv(counts->h, &characters, 1);
    counts->n++;
    return 0;
}

/* Each rule by itself over every assigned character: a difference shows even where no merge would tell. */
static void check_pieces(const json_t *golden) {
    const json_t *ranges = json_object_get(golden, "ranges"), *rows = json_object_get(golden, "pieces");
    CHECK(json_array_size(rows) == PRETOKENIZE_QWEN2 + 1, "%zu rules", json_array_size(rows));
    for (int rule = 0; rule <= PRETOKENIZE_QWEN2; rule++) {
        enum pretokenize_rule one = (enum pretokenize_rule)rule;
        struct piece_counts counts = {GOLDEN_FNV_START, 0};
        const struct pretokenizer_sink sink = {count_piece, &counts};
        const json_t *row = json_array_get(rows, (size_t)rule);
        struct pretokenizer *p;
        struct pretokenizer_work *work;
        REQUIRE(pretokenizer_new(&one, 1, &p));
        REQUIRE(pretokenizer_work_new(p, &work));
        for (size_t r = 0; r < json_array_size(ranges); r++) {
            const json_t *range = json_array_get(ranges, r);
            uint32_t last = (uint32_t)json_integer_value(json_array_get(range, 1));
            for (uint32_t code = (uint32_t)json_integer_value(json_array_get(range, 0)); code <= last; code++) {
                char text[80] = "!";
                size_t bytes = 1 + golden_put_code(text + 1, code);
                text[bytes++] = '!', text[bytes++] = ' ';
                bytes += golden_character_text(text + bytes, code);
                REQUIRE(pretokenizer_run(p, work, text, bytes, &sink));
            }
        }
        CHECK(counts.n == json_integer_value(json_object_get(row, "counts_n")) && golden_hash_is(json_object_get(row, "counts_fnv"), counts.h),
              "%s: %lld pieces", pretokenize_rule_name(one), (long long)counts.n);
        pretokenizer_work_free(work);
        pretokenizer_free(p);
    }
}

int main(void) {
    json_t *golden = golden_load(TEST_FILE("golden/tokenizer.json")), *row;
    size_t i;
    char first_hash[65] = "", hash[65];
    json_array_foreach(json_object_get(golden, "small"), i, row) {
        const char *name = json_string_value(json_object_get(row, "name"));
        struct tokenizer *t = open_json(json_string_value(json_object_get(row, "tokenizer")));
        golden_check_row(t, name, golden, row);
        tokenizer_hash(t, hash);
        if (i == 0) {
            check_interface(t);
            check_refusals(json_string_value(json_object_get(row, "tokenizer")));
            strcpy(first_hash, hash);
        } else {
            CHECK((strcmp(first_hash, hash) == 0) == (i == 1), "%s: hash %s", name, hash); /* 1 is 0 with merges as strings */
        }
        if (json_is_string(json_object_get(row, "pre")))
            check_gguf_form(t, golden, row);
        tokenizer_close(t);
    }
    check_pieces(golden);
    json_decref(golden);
    return test_report();
}
