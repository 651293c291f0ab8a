/* Whole models made here, as a folder and as GGUF: what opens, and what each thing that is wrong is called. The weights
 * are zeros; values are the business of test_model_golden.c. */
#include "engine/map_file.h"
#include "engine/model_config.h"

#include "file_maker.h"

enum { HIDDEN = 64, QUERY = 128, KEY = 64, INNER = 32, VOCAB = 8, N_MUTATIONS = 1500 };

struct entry {
    const char *name;
    int rows, columns; /* columns 0: a vector */
};

static const struct entry folder_entries[] = {
    {"model.embed_tokens.weight", VOCAB, HIDDEN},
    {"model.layers.0.input_layernorm.weight", HIDDEN, 0},
    {"model.layers.0.self_attn.q_proj.weight", QUERY, HIDDEN},
    {"model.layers.0.self_attn.k_proj.weight", KEY, HIDDEN},
    {"model.layers.0.self_attn.v_proj.weight", KEY, HIDDEN},
    {"model.layers.0.self_attn.o_proj.weight", HIDDEN, QUERY},
    {"model.layers.0.post_attention_layernorm.weight", HIDDEN, 0},
    {"model.layers.0.mlp.gate_proj.weight", INNER, HIDDEN},
    {"model.layers.0.mlp.up_proj.weight", INNER, HIDDEN},
    {"model.layers.0.mlp.down_proj.weight", HIDDEN, INNER},
    {"model.norm.weight", HIDDEN, 0},
    {"lm_head.weight", VOCAB, HIDDEN},
};
static const char *const gguf_names[] = {
    "token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight",
    "blk.0.attn_output.weight", "blk.0.ffn_norm.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight",
    "blk.0.ffn_down.weight", "output_norm.weight", "output.weight",
};
enum { N_ENTRIES = sizeof folder_entries / sizeof *folder_entries, HEAD = N_ENTRIES - 1 };

/* What a test changes. Indices are of folder_entries, -1 for none. */
struct variant {
    int drop, drop2, widen, retype; /* left out, one column more (a vector: one value more), of another type */
    const char *dtype;              /* safetensors: of `retype` */
    int type, block, block_bytes;   /* GGUF: of `retype` */
    const char *extra;              /* name of one tensor more */
    float embedding;                /* safetensors: first value of the embedding */
    const char *arch;
    int n_heads, n_tokens, vocab, eos;
    float divisor; /* GGUF: of rope_freqs.weight where not 0 */
};
static const struct variant plain = {.drop = -1, .drop2 = -1, .widen = -1, .retype = -1, .arch = "llama", .n_heads = 2,
                                     .n_tokens = VOCAB, .vocab = VOCAB, .eos = 3};

static const char config_json[] =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64,\"intermediate_size\":32,"
    "\"num_hidden_layers\":1,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":64,\"vocab_size\":8,"
    "\"max_position_embeddings\":256,\"eos_token_id\":3,\"bos_token_id\":null,\"tie_word_embeddings\":%s}";

static void write_text(const char *name, const char *text) { maker_write(name, text, strlen(text)); }

static void write_config(bool tied) {
    char text[1024];
    snprintf(text, sizeof text, config_json, tied ? "true" : "false");
    write_text("config.json", text);
}

/* Entries `first` to `end` (exclusive) of the folder's tensors as one safetensors file. */
static void write_shard(const char *name, const struct variant *v, int first, int end) {
    char header[8192] = "{", *at = header + 1;
    size_t offset = 0;
    for (int i = first; i < end; i++) {
        const struct entry *e = &folder_entries[i];
        if (i == v->drop || i == v->drop2)
            continue;
        bool other = i == v->retype;
        int more = i == v->widen;
        size_t n = e->columns ? (size_t)e->rows * (size_t)(e->columns + more) : (size_t)(e->rows + more);
        size_t bytes = n * (other ? 2 : 4);
        char shape[32];
        if (e->columns)
            snprintf(shape, sizeof shape, "[%d,%d]", e->rows, e->columns + more);
        else
            snprintf(shape, sizeof shape, "[%d]", e->rows + more);
        at += sprintf(at, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", offset ? "," : "",
                      e->name, other ? v->dtype : "F32", shape, offset, offset + bytes);
        offset += bytes;
    }
    if (v->extra && first == 0)
        at += sprintf(at, ",\"%s\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[%zu,%zu]}", v->extra, offset,
                      offset + 8);
    offset += v->extra && first == 0 ? 8 : 0;
    strcpy(at, "}");
    struct maker m = {0};
    maker_safetensors(&m, header, offset);
    memcpy(m.data + 8 + strlen(header), &v->embedding, sizeof v->embedding);
    maker_save(&m, name);
}

static void put_arch_count(struct maker *m, const char *arch, const char *name, int value) {
    char key[64];
    snprintf(key, sizeof key, "%s.%s", arch, name);
    maker_gguf_u32(m, key, (uint32_t)value);
}

static void make_gguf_pairs(struct maker *m, const struct variant *v) {
    char key[64];
    maker_gguf_text(m, "general.architecture", v->arch);
    put_arch_count(m, v->arch, "embedding_length", HIDDEN);
    put_arch_count(m, v->arch, "feed_forward_length", INNER);
    put_arch_count(m, v->arch, "block_count", 1);
    put_arch_count(m, v->arch, "attention.head_count", v->n_heads);
    put_arch_count(m, v->arch, "attention.head_count_kv", 1);
    put_arch_count(m, v->arch, "attention.key_length", 64);
    put_arch_count(m, v->arch, "context_length", 256);
    snprintf(key, sizeof key, "%s.attention.layer_norm_rms_epsilon", v->arch);
    maker_gguf_f32(m, key, 1e-5f);
    put_arch_count(m, v->arch, "vocab_size", v->vocab);
    maker_gguf_u32(m, "tokenizer.ggml.eos_token_id", (uint32_t)v->eos);
    maker_gguf_u32(m, "tokenizer.ggml.eot_token_id", 5);
    maker_gguf_text(m, "tokenizer.ggml.model", "gpt2");
    maker_gguf_text(m, "tokenizer.chat_template", "{{ x }}");
    maker_gguf_array(m, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)v->n_tokens);
    for (int i = 0; i < v->n_tokens; i++)
        maker_text(m, (const char[]){(char)('a' + i), '\0'});
    maker_gguf_array(m, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)v->n_tokens);
    for (int i = 0; i < v->n_tokens; i++)
        maker_u32(m, 1);
    maker_gguf_array(m, "tokenizer.ggml.merges", GGUF_STRING, 1);
    maker_text(m, "a b");
}

static size_t gguf_bytes(const struct variant *v, int i) {
    const struct entry *e = &folder_entries[i];
    int more = i == v->widen;
    size_t n = e->columns ? (size_t)e->rows * (size_t)(e->columns + more) : (size_t)(e->rows + more);
    return i == v->retype ? n / (size_t)v->block * (size_t)v->block_bytes : n * 4;
}

/* Returns the bytes before the data. */
static size_t make_gguf(struct maker *m, const struct variant *v) {
    int n = N_ENTRIES - (v->drop >= 0) - (v->drop2 >= 0) + (v->extra != NULL) + (v->divisor > 0);
    maker_gguf_head(m, 3, (uint64_t)n, 17);
    make_gguf_pairs(m, v);
    size_t offset = 0;
    for (int i = 0; i < N_ENTRIES; i++) {
        const struct entry *e = &folder_entries[i];
        if (i == v->drop || i == v->drop2)
            continue;
        int more = i == v->widen;
        maker_gguf_info(m, gguf_names[i], (uint64_t)(e->rows + (e->columns ? 0 : more)),
                        e->columns ? (uint64_t)(e->columns + more) : 0, i == v->retype ? (uint32_t)v->type : 0, offset);
        offset += (size_t)round_up((int64_t)gguf_bytes(v, i), 32);
    }
    if (v->extra)
        maker_gguf_info(m, v->extra, 8, 0, 0, offset);
    offset += v->extra ? 32 : 0;
    if (v->divisor > 0)
        maker_gguf_info(m, "rope_freqs.weight", 32, 0, 0, offset);
    maker_align(m, 32);
    size_t head_bytes = m->n;
    maker_zeros(m, offset);
    for (int i = 0; i < 32 && v->divisor > 0; i++)
        maker_put(m, &v->divisor, sizeof v->divisor);
    return head_bytes;
}

static const char *save_gguf(const struct variant *v) {
    struct maker m = {0};
    make_gguf(&m, v);
    return maker_save(&m, "x.gguf");
}

static int n_warnings;

static void count_warning(enum log_level level, const char *line, void *context) {
    (void)line, (void)context;
    n_warnings += level == LOG_WARN;
}

static int try_open(const char *path) {
    struct model_file *file;
    n_warnings = 0;
    int status = model_file_open(path, &file);
    if (status == STATUS_OK) {
        char hex[65];
        REQUIRE(model_file_fingerprint(file, hex));
        CHECK(strlen(hex) == 64);
        model_file_close(file);
    }
    return status;
}

static int try_folder(const struct variant *v) {
    write_shard("model.safetensors", v, 0, N_ENTRIES);
    return try_open(maker_temp());
}

static int try_gguf(const struct variant *v) { return try_open(save_gguf(v)); }

/* `plain` with some fields changed: VARIANT(now.drop = 3, now.eos = 8). */
static struct variant now;
#define VARIANT(...) (now = plain, __VA_ARGS__, &now)

static void check_tensors(const struct model_file *file, bool tied, bool gguf) {
    CHECK(model_file_n_tensors(file) == N_ENTRIES - tied, "%d, tied %d", model_file_n_tensors(file), tied);
    for (int i = 0; i < N_ENTRIES - tied; i++) {
        const struct entry *e = &folder_entries[i];
        const struct model_tensor *t = model_file_tensor_at(file, i);
        CHECK(strcmp(t->name, e->name) == 0 && model_file_find(file, e->name) == t, "%s", t->name);
        CHECK(t->dtype == DTYPE_F32 && t->n_dims == (e->columns ? 2 : 1) && t->shape[0] == e->rows);
        CHECK(e->columns == 0 || t->shape[1] == e->columns, "%s", t->name);
        CHECK(t->permuted == (gguf && (i == 2 || i == 3)), "%s", t->name);
        CHECK(model_file_row_bytes(t) == 4u * (size_t)(e->columns ? e->columns : e->rows), "%s", t->name);
    }
    CHECK(model_file_find(file, "lm_head.weigh") == NULL && model_file_find(file, "") == NULL);
}

static void test_good_folder(void) {
    for (int tied = 0; tied < 2; tied++) {
        write_config(tied);
        write_shard("model.safetensors", VARIANT(now.drop = tied ? HEAD : -1), 0, N_ENTRIES);
        struct model_file *file;
        REQUIRE(model_file_open(maker_temp(), &file));
        check_tensors(file, tied, false);
        CHECK(strcmp(model_file_format(file), "safetensors") == 0);
        const struct model_config *c = model_file_config(file);
        CHECK(c->tied == tied && c->hidden == 64 && c->intermediate == 32 && c->n_layers == 1 && c->n_heads == 2 &&
              c->n_kv_heads == 1 && c->head_dim == 64 && c->vocab == 8 && c->context == 256 && c->bos_id == -1);
        CHECK(c->n_stop == 1 && c->stop_id[0] == 3 && c->rope == ROPE_DEFAULT && c->rope_theta == 10000.0);
        const struct tokenizer_source *s = model_file_tokenizer(file);
        CHECK(!s->json && !s->tokens && !s->chat_template && s->eos_id == 3);
        model_file_close(file);
    }
}

static void test_good_gguf(void) {
    for (int tied = 0; tied < 2; tied++) {
        struct model_file *file;
        REQUIRE(model_file_open(save_gguf(VARIANT(now.drop = tied ? HEAD : -1)), &file));
        check_tensors(file, tied, true);
        CHECK(strcmp(model_file_format(file), "gguf") == 0);
        const struct model_config *c = model_file_config(file);
        CHECK(c->tied == tied && c->hidden == 64 && c->head_dim == 64 && c->vocab == 8 && c->rms_eps == 1e-5f);
        CHECK(c->n_stop == 2 && c->stop_id[0] == 3 && c->stop_id[1] == 5 && c->bos_id == -1);
        const struct tokenizer_source *s = model_file_tokenizer(file);
        CHECK(!s->json && s->n_tokens == 8 && strcmp(s->tokens[7], "h") == 0 && s->token_bytes[7] == 1);
        CHECK(s->token_types[7] == 1 && s->n_merges == 1 && strcmp(s->merges[0], "a b") == 0);
        CHECK(strcmp(s->model, "gpt2") == 0 && s->pre == NULL && strcmp(s->chat_template, "{{ x }}") == 0);
        CHECK(s->eos_id == 3 && s->bos_id == -1 && !s->add_bos);
        model_file_close(file);
    }
}

static void test_bad_tensors(void) {
    write_config(false);
    for (int i = 0; i < N_ENTRIES; i++) {
        char words[128];
        snprintf(words, sizeof words, "tensor %s is missing", folder_entries[i].name);
        CHECK_FAILS(try_folder(VARIANT(now.drop = i)), STATUS_INPUT, words);
        snprintf(words, sizeof words, "tensor %s: shape [", folder_entries[i].name);
        CHECK_FAILS(try_folder(VARIANT(now.widen = i)), STATUS_INPUT, words);
        snprintf(words, sizeof words, "tensor %s: type I16 is not supported", folder_entries[i].name);
        CHECK_FAILS(try_folder(VARIANT(now.retype = i, now.dtype = "I16")), STATUS_INPUT, words);
        CHECK(try_folder(VARIANT(now.retype = i, now.dtype = "BF16")) == STATUS_OK, "%s", base_error());
        snprintf(words, sizeof words, i ? "tensor %s: shape [" : "%s", gguf_names[i]);
        CHECK_FAILS(try_gguf(VARIANT(now.widen = i)), STATUS_INPUT, words);
        if (i == HEAD)
            continue; /* absent: tied */
        snprintf(words, sizeof words, i ? "tensor %s is missing" : "tensor %s: missing", gguf_names[i]);
        CHECK_FAILS(try_gguf(VARIANT(now.drop = i)), STATUS_INPUT, words);
    }
    CHECK_FAILS(try_folder(VARIANT(now.widen = 2)), STATUS_INPUT, "shape [128,65], the configuration wants [128,64]");
}

static void test_gguf_fields(void) {
    CHECK_FAILS(try_gguf(VARIANT(now.arch = "qwen9")),
                STATUS_INPUT, "architecture qwen9 is not supported, expected one of: llama, qwen2, qwen3");
    CHECK_FAILS(try_gguf(VARIANT(now.n_heads = 3)),
                STATUS_INPUT, "blk.0.attn_q.weight: shape [128,64], the configuration wants [192,64]");
    CHECK_FAILS(try_gguf(VARIANT(now.n_heads = 0)), STATUS_INPUT, "llama.attention.head_count: 0");
    CHECK_FAILS(try_gguf(VARIANT(now.n_tokens = 7)),
                STATUS_INPUT, "tokenizer.ggml.tokens: 7 tokens, token_embd.weight has 8 rows");
    CHECK_FAILS(try_gguf(VARIANT(now.vocab = 9)), STATUS_INPUT, "llama.vocab_size: 9, token_embd.weight has 8 rows");
    CHECK_FAILS(try_gguf(VARIANT(now.eos = 8)),
                STATUS_INPUT, "tokenizer.ggml.eos_token_id: 8, expected a token id below");
    CHECK_FAILS(try_gguf(VARIANT(now.extra = "blk.0.attn_q.bias")),
                STATUS_INPUT, "blk.0.attn_q.bias: biases are not supported");
    CHECK(try_gguf(VARIANT(now.extra = "surplus")) == STATUS_OK && n_warnings == 1, "%s", base_error());
    CHECK(try_gguf(VARIANT(now.divisor = 2)) == STATUS_OK && n_warnings == 0, "%s", base_error());
    CHECK_FAILS(try_open(maker_path("absent.gguf")), STATUS_INPUT, "absent.gguf: no such file");
}

/* A matrix may be in blocks, a norm may not; what cannot be used is refused by its name. */
static void test_gguf_types(void) {
    static const struct {
        int type, block, bytes;
    } good[] = {{2, 32, 18}, {3, 32, 20}, {6, 32, 22}, {7, 32, 24}, {8, 32, 34}, {1, 1, 2}, {30, 1, 2}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        now = plain;
        now.retype = 4;
        now.type = good[i].type;
        now.block = good[i].block;
        now.block_bytes = good[i].bytes;
        CHECK(try_gguf(&now) == STATUS_OK, "type %d: %s", now.type, base_error());
    }
    CHECK_FAILS(try_gguf(VARIANT(now.retype = 4, now.type = 20, now.block = 32, now.block_bytes = 18)),
                STATUS_INPUT, "blk.0.attn_v.weight: type IQ4_NL is not supported");
    CHECK_FAILS(try_gguf(VARIANT(now.retype = 4, now.type = 26, now.block = 1, now.block_bytes = 4)),
                STATUS_INPUT, "type I32 is not supported");
    CHECK_FAILS(try_gguf(VARIANT(now.retype = 1, now.type = 6, now.block = 32, now.block_bytes = 22)),
                STATUS_INPUT, "blk.0.attn_norm.weight: type Q5_0 is not supported");
    CHECK_FAILS(try_gguf(VARIANT(now.retype = 1, now.type = 8, now.block = 32, now.block_bytes = 34)),
                STATUS_INPUT, "blk.0.attn_norm.weight: type Q8_0 is not supported");
}

static void test_extras(void) {
    write_config(false);
    CHECK(try_folder(VARIANT(now.extra = "model.layers.0.self_attn.rotary_emb.inv_freq")) == STATUS_OK, "%s",
          base_error());
    CHECK(n_warnings == 0, "%d warnings", n_warnings);
    CHECK(try_folder(VARIANT(now.extra = "surplus")) == STATUS_OK && n_warnings == 1, "%s", base_error());
    write_config(true); /* tied, and the head is there all the same: equal (zeros), then not */
    struct model_file *file;
    for (int differs = 0; differs < 2; differs++) {
        n_warnings = 0;
        write_shard("model.safetensors", VARIANT(now.embedding = (float)differs), 0, N_ENTRIES);
        REQUIRE(model_file_open(maker_temp(), &file));
        CHECK(model_file_config(file)->tied == !differs && n_warnings == differs, "differs %d", differs);
        CHECK((model_file_find(file, "lm_head.weight") != NULL) == differs, "differs %d", differs);
        model_file_close(file);
    }
}

static void write_index(int split, const char *change, const char *to) {
    char text[4096] = "{\"metadata\":{},\"weight_map\":{", *at = text + strlen(text);
    for (int i = 0; i < N_ENTRIES; i++) {
        const char *name = folder_entries[i].name, *where = i < split ? "1.safetensors" : "2.safetensors";
        if (change && strcmp(name, change) == 0) {
            if (!to)
                continue;
            where = to;
        }
        at += sprintf(at, "%s\"%s\":\"%s\"", at[-1] == '{' ? "" : ",", name, where);
    }
    strcpy(at, "}}");
    write_text("model.safetensors.index.json", text);
}

static void test_shards(void) {
    remove(maker_path("model.safetensors"));
    write_config(false);
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "neither model.safetensors nor model.safetensors.index.json");
    write_shard("1.safetensors", &plain, 0, 5);
    write_shard("2.safetensors", &plain, 5, N_ENTRIES);
    write_index(5, NULL, NULL);
    CHECK(try_open(maker_temp()) == STATUS_OK, "%s", base_error());
    write_index(5, "model.norm.weight", "1.safetensors");
    CHECK_FAILS(try_open(maker_temp()),
                STATUS_INPUT, "tensor model.norm.weight: in 2.safetensors, expected in 1.safetensors");
    write_index(5, "model.norm.weight", NULL);
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "tensor model.norm.weight of 2.safetensors is missing");
    write_index(5, "model.norm.weight", "3.safetensors");
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "3.safetensors: cannot open");
    write_index(5, "model.norm.weight", "../2.safetensors");
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "expected the name of a file in the same folder");
    write_index(5, NULL, NULL);
    write_shard("1.safetensors", &plain, 0, 6); /* o_proj in both */
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "o_proj.weight: in 1.safetensors, expected in 2.safetensors");
    write_shard("1.safetensors", &plain, 0, 4);
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "v_proj.weight: not in 1.safetensors");
    write_text("model.safetensors.index.json", "{\"weight_map\":[]}");
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "model.safetensors.index.json: weight_map: expected an object");
    write_text("model.safetensors.index.json", "{");
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "model.safetensors.index.json: line ");
    remove(maker_path("model.safetensors.index.json"));
}

static void check_template(const char *expected) {
    struct model_file *file;
    REQUIRE(model_file_open(maker_temp(), &file));
    const char *got = model_file_tokenizer(file)->chat_template;
    CHECK(got && strcmp(got, expected) == 0, "'%s', expected '%s'", got ? got : "(none)", expected);
    const struct tokenizer_source *s = model_file_tokenizer(file);
    CHECK(s->json && s->json_bytes == 2 && memcmp(s->json, "{}", 2) == 0 && s->config_json && !s->tokens, "%s",
          expected);
    model_file_close(file);
}

static void test_folder_texts(void) {
    write_config(false);
    write_shard("model.safetensors", &plain, 0, N_ENTRIES);
    write_text("tokenizer.json", "{}");
    write_text("tokenizer_config.json", "{\"chat_template\":\"one\"}");
    check_template("one");
    write_text("tokenizer_config.json",
               "{\"chat_template\":[{\"name\":\"tool\",\"template\":\"no\"},{\"name\":\"default\",\"template\":\"two\"}]}");
    check_template("two");
    write_text("chat_template.jinja", "three\n");
    check_template("three\n");
    remove(maker_path("chat_template.jinja"));
    write_text("tokenizer_config.json", "{\"chat_template\":5}");
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "tokenizer_config.json: chat_template: expected a text");
    remove(maker_path("tokenizer_config.json"));
    write_text("generation_config.json", "{\"eos_token_id\":[4,3,6]}");
    struct model_file *file;
    REQUIRE(model_file_open(maker_temp(), &file));
    const struct model_config *c = model_file_config(file);
    CHECK(c->n_stop == 3 && c->stop_id[0] == 3 && c->stop_id[1] == 4 && c->stop_id[2] == 6, "%d stop ids", c->n_stop);
    model_file_close(file);
    write_text("generation_config.json", "{\"eos_token_id\":8}");
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "generation_config.json: eos_token_id: 8");
    remove(maker_path("generation_config.json"));
    remove(maker_path("config.json"));
    CHECK_FAILS(try_open(maker_temp()), STATUS_INPUT, "config.json: cannot open");
}

/* A good configuration without the field `drop` and with the text `add`; a field given twice is refused. */
static int read_fields(const char *drop, const char *add) {
    static const char *const fields[] = {
        "\"model_type\":\"llama\"", "\"hidden_size\":512", "\"intermediate_size\":32", "\"num_hidden_layers\":1",
        "\"num_attention_heads\":8", "\"vocab_size\":100", "\"max_position_embeddings\":256", "\"num_key_value_heads\":2",
    };
    char text[1024] = "{\"x\":0";
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (!drop || !strstr(fields[i], drop))
            strcat(strcat(text, ","), fields[i]);
    if (add)
        strcat(strcat(text, ","), add);
    strcat(text, "}");
    struct model_config config;
    return model_config_json_read(text, strlen(text), &config);
}

static void test_config_fields(void) {
    static const struct {
        const char *drop, *add, *words; /* words NULL: it is accepted */
    } rows[] = {
        {NULL, NULL, NULL},
        {NULL, "\"eos_token_id\":[1,2,1]", NULL},
        {NULL, "\"rope_scaling\":null,\"rope_theta\":500000", NULL},
        {NULL, "\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}", NULL},
        {"num_key_value_heads", NULL, NULL},
        {"model_type", NULL, "model_type is missing"},
        {"model_type", "\"model_type\":\"gpt9\"", "architecture gpt9 is not supported, expected one of: llama, qwen2, qwen3"},
        {"vocab_size", NULL, "vocab_size is missing"},
        {"hidden_size", "\"hidden_size\":\"512\"", "hidden_size: expected an integer"},
        {"hidden_size", "\"hidden_size\":0", "hidden_size: 0, expected 1 to"},
        {"hidden_size", "\"hidden_size\":2147483648", "hidden_size: 2147483648, expected 1 to"},
        {"hidden_size", "\"hidden_size\":513", "hidden_size 513, expected a multiple of num_attention_heads 8"},
        {"hidden_size", "\"hidden_size\":768", "head_dim 96 is not supported, expected 64 or 128"},
        {NULL, "\"head_dim\":32", "head_dim 32 is not supported"},
        {"num_key_value_heads", "\"num_key_value_heads\":3", "8 query heads, expected a multiple of the 3"},
        {"num_hidden_layers", "\"num_hidden_layers\":100000", "100000 layers, expected at most"},
        {NULL, "\"architectures\":[\"LlamaForSequenceClassification\"]", "expected LlamaForCausalLM"},
        {NULL, "\"attention_bias\":true", "attention_bias: true is not supported"},
        {NULL, "\"mlp_bias\":true", "mlp_bias: true is not supported"},
        {NULL, "\"use_sliding_window\":true", "use_sliding_window: true is not supported"},
        {NULL, "\"layer_types\":[\"full_attention\"]", NULL},
        {NULL, "\"layer_types\":[\"full_attention\",\"sliding_attention\"]", "layer_types: entry 1 is sliding_attention"},
        {"model_type", "\"model_type\":\"qwen2\",\"architectures\":[\"Qwen2ForCausalLM\"],\"use_sliding_window\":false", NULL},
        {"model_type", "\"model_type\":\"qwen2\",\"use_sliding_window\":true", "use_sliding_window: true is not supported"},
        {"model_type", "\"model_type\":\"qwen2\",\"architectures\":[\"Qwen3ForCausalLM\"]", "expected Qwen2ForCausalLM"},
        {"model_type", "\"model_type\":\"qwen3\",\"architectures\":[\"Qwen3ForCausalLM\"]", NULL},
        {"model_type", "\"model_type\":\"qwen3\",\"architectures\":[\"LlamaForCausalLM\"]", "expected Qwen3ForCausalLM"},
        {NULL, "\"hidden_act\":\"gelu\"", "hidden_act: gelu is not supported"},
        {NULL, "\"quantization_config\":{}", "quantization_config"},
        {NULL, "\"partial_rotary_factor\":0.5", "partial_rotary_factor: 0.5 is not supported"},
        {NULL, "\"rms_norm_eps\":0", "rms_norm_eps: 0, expected a positive number"},
        {NULL, "\"tie_word_embeddings\":1", "tie_word_embeddings: expected true or false"},
        {NULL, "\"eos_token_id\":100", "eos_token_id: 100, expected a token id below the vocabulary's 100"},
        {NULL, "\"eos_token_id\":\"a\"", "eos_token_id: expected an id"},
        {NULL, "\"eos_token_id\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", "more than 16 stop ids"},
        {NULL, "\"bos_token_id\":100", "bos_token_id: 100, expected a token id below"},
        {NULL, "\"rope_scaling\":3", "expected an object"},
        {NULL, "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}", "rope_type: yarn is not supported"},
        {NULL, "\"rope_parameters\":{\"rope_type\":\"dynamic\"}", "rope_type: dynamic is not supported"},
        {NULL, "\"rope_scaling\":{\"type\":\"linear\"}", "rope parameters: factor is missing"},
        {NULL, "\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}", "rope factor: 0, expected a positive"},
        {NULL, "\"rope_parameters\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4}",
         "rope high_freq_factor: 4, expected more than"},
        {NULL, "\"rope_theta\":-1", "rope_theta: -1, expected a positive number"},
        {NULL, "\"hidden_size\":512", "duplicate object key"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].words)
            CHECK_FAILS(read_fields(rows[i].drop, rows[i].add), STATUS_INPUT, rows[i].words);
        else
            CHECK(read_fields(rows[i].drop, rows[i].add) == STATUS_OK, "%s", base_error());
    struct model_config config;
    CHECK_FAILS(model_config_json_read("[]", 2, &config), STATUS_INPUT, "expected a JSON object");
    CHECK_FAILS(model_config_json_read(NULL, 0, &config), STATUS_INPUT, "line");
}

/* What the golden Qwen3 has beyond Llama's tensors, in both forms: bound by name, no row permuted; and one fingerprint. */
static void test_qwen3(void) {
    static const char *const paths[] = {"golden/tiny/qwen3-gqa2-d64-bf16-untied", "golden/tiny/qwen3-gqa2-d64-bf16-untied/model.gguf"};
    char path[512], hex[2][65];
    for (int form = 0; form < 2; form++) {
        struct model_file *file;
        snprintf(path, sizeof path, TEST_FILE("%s"), paths[form]);
        n_warnings = 0;
        REQUIRE(model_file_open(path, &file));
        const struct model_config *c = model_file_config(file);
        CHECK(c->arch == MODEL_ARCH_QWEN3 && c->qk_norm && !c->qkv_bias && n_warnings == 0, "%s: %d warnings", path, n_warnings);
        CHECK(c->hidden == 20 && c->n_heads == 4 && c->n_kv_heads == 2 && c->head_dim == 64 && c->rms_eps == 1e-5f, "%s", path);
        CHECK(model_file_n_tensors(file) == 3 + 2 * 11, "%s: %d tensors", path, model_file_n_tensors(file));
        const struct model_tensor *norm = model_file_find(file, "model.layers.1.self_attn.k_norm.weight");
        CHECK(norm && norm->n_dims == 1 && norm->shape[0] == 64, "%s", path);
        CHECK(!model_file_find(file, "model.layers.0.self_attn.q_proj.weight")->permuted, "%s", path);
        REQUIRE(model_file_fingerprint(file, hex[form]));
        model_file_close(file);
    }
    CHECK(strcmp(hex[0], hex[1]) == 0, "fingerprints %s and %s", hex[0], hex[1]);
}

/* Without the norms of its heads a Qwen3 is no model, nor with norms of another size. */
static void test_qwen3_norms(void) {
    CHECK_FAILS(try_gguf(VARIANT(now.arch = "qwen3")), STATUS_INPUT, "tensor blk.0.attn_q_norm.weight is missing");
    CHECK_FAILS(try_gguf(VARIANT(now.arch = "qwen3", now.extra = "blk.0.attn_q_norm.weight")), STATUS_INPUT,
                "tensor blk.0.attn_q_norm.weight: shape [8], the configuration wants [64]");
}

/* The same of the golden Qwen2, whose head is tied: biases of q, k and v, of the values that the folder has. */
static void test_qwen2(void) {
    static const char *const paths[] = {"golden/tiny/qwen2-gqa3-d64-bf16-tied", "golden/tiny/qwen2-gqa3-d64-bf16-tied/model.gguf"};
    static const char *const parts[] = {"q", "k", "v"};
    char path[512], name[64], hex[2][65];
    float values[2][3][6 * 64];
    for (int form = 0; form < 2; form++) {
        struct model_file *file;
        snprintf(path, sizeof path, TEST_FILE("%s"), paths[form]);
        n_warnings = 0;
        REQUIRE(model_file_open(path, &file));
        const struct model_config *c = model_file_config(file);
        CHECK(c->arch == MODEL_ARCH_QWEN2 && c->qkv_bias && !c->qk_norm && c->tied && n_warnings == 0, "%s: %d warnings", path, n_warnings);
        CHECK(c->hidden == 28 && c->n_heads == 6 && c->n_kv_heads == 2 && c->head_dim == 64 && c->rope_theta == 1e6, "%s", path);
        CHECK(model_file_n_tensors(file) == 2 + 2 * 12, "%s: %d tensors", path, model_file_n_tensors(file));
        for (int i = 0; i < 3; i++) {
            int64_t rows = (i ? 2 : 6) * 64;
            snprintf(name, sizeof name, "model.layers.1.self_attn.%s_proj.bias", parts[i]);
            const struct model_tensor *bias = model_file_find(file, name);
            CHECK(bias && bias->n_dims == 1 && bias->shape[0] == rows && !bias->permuted, "%s: %s", path, name);
            dtype_widen(bias->dtype, bias->data, values[form][i], rows);
            CHECK(memcmp(values[0][i], values[form][i], (size_t)rows * sizeof(float)) == 0, "%s: %s", path, name);
        }
        CHECK(!model_file_find(file, "model.layers.0.self_attn.q_proj.weight")->permuted, "%s", path);
        REQUIRE(model_file_fingerprint(file, hex[form]));
        model_file_close(file);
    }
    CHECK(strcmp(hex[0], hex[1]) == 0, "fingerprints %s and %s", hex[0], hex[1]);
    CHECK_FAILS(try_gguf(VARIANT(now.arch = "qwen2")), STATUS_INPUT, "tensor blk.0.attn_q.bias is missing");
    CHECK_FAILS(try_gguf(VARIANT(now.arch = "qwen2", now.extra = "blk.0.attn_q.bias")), STATUS_INPUT,
                "tensor blk.0.attn_q.bias: shape [8], the configuration wants [128]");
}

static void test_rows(void) {
    struct model_tensor t = {.dtype = DTYPE_F32, .n_dims = 2, .shape = {256, 8}};
    for (int64_t row = 0; row < 256; row++)
        CHECK(model_file_row_index(&t, row, 64) == row, "row %d", (int)row);
    t.permuted = true;
    for (int64_t h = 0; h < 2; h++)
        for (int64_t j = 0; j < 2; j++)
            for (int64_t i = 0; i < 64; i++)
                CHECK(model_file_row_index(&t, h * 128 + j * 64 + i, 128) == h * 128 + 2 * i + j, "%d %d %d", (int)h,
                      (int)j, (int)i);
}

static void test_map_file(void) {
    struct map_file map;
    CHECK_FAILS(map_file_open(maker_path("absent"), &map), STATUS_INPUT, "cannot open: No such file");
    CHECK_FAILS(map_file_open(maker_temp(), &map), STATUS_INPUT, "not a regular file");
    REQUIRE(map_file_open(maker_write("empty", "", 0), &map));
    CHECK(map.bytes == 0, "%zu bytes", map.bytes);
    map_file_close(&map);
    REQUIRE(map_file_open(maker_write("three", "abc", 3), &map));
    CHECK(map.bytes == 3 && memcmp(map.data, "abc", 3) == 0, "%zu bytes", map.bytes);
    map_file_close(&map);
    CHECK_FAILS(try_open(maker_path("empty")), STATUS_INPUT, "empty: the magic: 4 bytes at byte 0");
}

/* Metadata and infos of a whole model, one byte changed at a time. */
static void test_mutations(void) {
    struct maker m = {0};
    size_t head_bytes = make_gguf(&m, &plain);
    maker_mutate(&m, "x.gguf", head_bytes, N_MUTATIONS, 5, try_open);
    maker_free(&m);
}

int main(void) {
    base_set_log_sink(count_warning, NULL);
    test_good_folder();
    test_good_gguf();
    test_bad_tensors();
    test_gguf_fields();
    test_gguf_types();
    test_extras();
    test_shards();
    test_folder_texts();
    test_config_fields();
    test_qwen3();
    test_qwen3_norms();
    test_qwen2();
    test_rows();
    test_map_file();
    test_mutations();
    return test_report();
}
