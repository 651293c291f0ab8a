/* The GGUF reader, and what both readers share. GGUF names the pre-tokenizer by a word; the table here says what each word
 * means in the terms of tokenizer.json. */
#include "engine/tokenizer_spec.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

struct spec_pre {
    const char *name; /* tokenizer.ggml.pre */
    int n_rules;
    enum pretokenize_rule rule[2];
    bool ignore_merges, nfc;
};

static const struct spec_pre spec_pre_table[] = {
    {"smollm", 2, {PRETOKENIZE_DIGITS, PRETOKENIZE_GPT2}, false, false},
    {"gpt-2", 1, {PRETOKENIZE_GPT2}, false, false},
    {"llama-bpe", 1, {PRETOKENIZE_LLAMA3}, true, false},
    {"qwen2", 1, {PRETOKENIZE_QWEN2}, false, true},
};

enum { SPEC_N_PRE = sizeof spec_pre_table / sizeof spec_pre_table[0] };

enum { GGUF_TYPE_NORMAL = 1, GGUF_TYPE_UNKNOWN, GGUF_TYPE_CONTROL, GGUF_TYPE_USER_DEFINED, GGUF_TYPE_UNUSED };

/* GGUF's texts have no NUL at their end: how many bytes of one a message shows. */
static int spec_shown(size_t bytes) { return (int)min_i64((int64_t)bytes, 40); }

int tokenizer_spec_put(struct tokenizer_spec *spec, int64_t id, const char *text, size_t bytes, enum token_kind kind) {
    if (id < 0 || id >= spec->vocab)
        FAIL(STATUS_INPUT, "token id %lld ('%.*s') lies outside the model's %d embedding rows", (long long)id, spec_shown(bytes),
             text, spec->vocab);
    if (bytes > INT32_MAX)
        FAIL(STATUS_INPUT, "token %lld is %zu bytes long", (long long)id, bytes);
    if (spec->kind[id] != TOKEN_ABSENT)
        FAIL(STATUS_INPUT, "token id %lld stands for '%.*s' and for '%.*s'", (long long)id, spec_shown(spec->token[id].bytes),
             spec->token[id].text, spec_shown(bytes), text);
    spec->token[id] = (struct spec_text){text, bytes};
    spec->kind[id] = (uint8_t)kind;
    if (id >= spec->n_tokens)
        spec->n_tokens = (int)id + 1;
    return 0;
}

int tokenizer_spec_rule(struct tokenizer_spec *spec, enum pretokenize_rule rule) {
    if (spec->n_rules == PRETOKENIZE_MAX_RULES)
        FAIL(STATUS_INPUT, "the pre-tokenizer has more than %d steps", PRETOKENIZE_MAX_RULES);
    spec->rule[spec->n_rules++] = rule;
    return 0;
}

static int spec_find(const struct tokenizer_spec *spec, const char *part, const char *text, size_t bytes, int32_t *id) {
    *id = token_map_find(spec->ids, text, bytes);
    if (*id < 0)
        FAIL(STATUS_INPUT, "merge %d: %s '%.*s' is not in the vocabulary", spec->n_merges, part, spec_shown(bytes), text);
    return 0;
}

int tokenizer_spec_merge(struct tokenizer_spec *spec, struct spec_text left, struct spec_text right) {
    char small[256], *joined = small, *large = NULL;
    size_t bytes = left.bytes + right.bytes;
    if (bytes > sizeof small) {
        TRY(base_alloc(&large, bytes, 1));
        joined = large;
    }
    memcpy(joined, left.text, left.bytes);
    memcpy(joined + left.bytes, right.text, right.bytes);
    struct bpe_merge *merge = &spec->merge[spec->n_merges];
    int status;
    TRY_GOTO(spec_find(spec, "left part", left.text, left.bytes, &merge->left));
    TRY_GOTO(spec_find(spec, "right part", right.text, right.bytes, &merge->right));
    TRY_GOTO(spec_find(spec, "result", joined, bytes, &merge->merged));
    spec->n_merges++;
fail:
    free(large);
    return status;
}

int tokenizer_spec_merge_line(struct tokenizer_spec *spec, struct spec_text line) {
    const char *space = memchr(line.text, ' ', line.bytes);
    size_t left = space ? (size_t)(space - line.text) : 0;
    if (!space || memchr(space + 1, ' ', line.bytes - left - 1))
        FAIL(STATUS_INPUT, "merge %d: '%.*s' is not two parts with one space between", spec->n_merges,
             spec_shown(line.bytes), line.text);
    return tokenizer_spec_merge(spec, (struct spec_text){line.text, left},
                                (struct spec_text){space + 1, line.bytes - left - 1});
}

static int spec_gguf_pre(const struct tokenizer_source *source, struct tokenizer_spec *spec) {
    if (!source->model || strcmp(source->model, "gpt2") != 0)
        FAIL(STATUS_INPUT, "tokenizer.ggml.model '%s' is not known (known: gpt2)", source->model ? source->model : "");
    for (int i = 0; i < SPEC_N_PRE; i++) {
        const struct spec_pre *pre = &spec_pre_table[i];
        if (!source->pre || strcmp(source->pre, pre->name) != 0)
            continue;
        for (int r = 0; r < pre->n_rules; r++)
            TRY(tokenizer_spec_rule(spec, pre->rule[r]));
        spec->ignore_merges = pre->ignore_merges;
        spec->nfc = pre->nfc;
        return 0;
    }
    FAIL(STATUS_INPUT, "tokenizer.ggml.pre '%s' is not known (known: smollm, gpt-2, llama-bpe, qwen2)",
         source->pre ? source->pre : "");
}

static int spec_gguf_token(const struct tokenizer_source *source, struct tokenizer_spec *spec, int id) {
    static const uint8_t kind_of[] = {
        [GGUF_TYPE_NORMAL] = TOKEN_NORMAL,      [GGUF_TYPE_UNKNOWN] = TOKEN_NORMAL, [GGUF_TYPE_CONTROL] = TOKEN_SPECIAL,
        [GGUF_TYPE_USER_DEFINED] = TOKEN_ADDED, [GGUF_TYPE_UNUSED] = TOKEN_UNUSED,
    };
    int32_t type = source->token_types ? source->token_types[id] : GGUF_TYPE_NORMAL;
    const char *text = source->tokens[id];
    size_t bytes = source->token_bytes[id];
    if (type < GGUF_TYPE_NORMAL || type > GGUF_TYPE_UNUSED)
        FAIL(STATUS_INPUT, "tokenizer.ggml.token_type of token %d is %d; byte-level BPE has 1 to 5", id, type);
    TRY(tokenizer_spec_put(spec, id, text, bytes, kind_of[type]));
    if (type == GGUF_TYPE_CONTROL || type == GGUF_TYPE_USER_DEFINED)
        spec->added[spec->n_added++] =
            (struct added_token){.id = id, .text = text, .bytes = bytes, .special = type == GGUF_TYPE_CONTROL};
    if (token_map_add(spec->ids, text, bytes, id) != id)
        FAIL(STATUS_INPUT, "tokenizer.ggml.tokens: '%.*s' is there twice, second as %d", spec_shown(bytes), text, id);
    return 0;
}

static int spec_read_gguf(const struct tokenizer_source *source, struct tokenizer_spec *spec) {
    TRY(spec_gguf_pre(source, spec));
    if (source->n_tokens > spec->vocab)
        FAIL(STATUS_INPUT, "tokenizer.ggml.tokens has %d tokens, the model %d embedding rows", source->n_tokens, spec->vocab);
    TRY(token_map_new(source->n_tokens, &spec->ids));
    TRY(base_alloc(&spec->added, (size_t)source->n_tokens, sizeof *spec->added));
    for (int id = 0; id < source->n_tokens; id++)
        TRY(spec_gguf_token(source, spec, id));
    TRY(base_alloc(&spec->merge, (size_t)source->n_merges, sizeof *spec->merge));
    for (int i = 0; i < source->n_merges; i++)
        TRY(tokenizer_spec_merge_line(spec, (struct spec_text){source->merges[i], source->merge_bytes[i]}));
    if (source->add_bos) {
        if (source->bos_id < 0 || source->bos_id >= spec->n_tokens)
            FAIL(STATUS_INPUT, "add_bos_token is set, but the begin token %d is none of %d tokens", source->bos_id, spec->n_tokens);
        spec->prefix[spec->n_prefix++] = source->bos_id;
    }
    return 0;
}

int tokenizer_spec_read(const struct tokenizer_source *source, int vocab, struct tokenizer_spec *spec) {
    *spec = (struct tokenizer_spec){.vocab = vocab, .unk_id = -1};
    if (!source->json && !source->tokens)
        FAIL(STATUS_INPUT, "the model has no tokenizer");
    TRY(base_alloc(&spec->token, (size_t)vocab, sizeof *spec->token));
    TRY(base_alloc(&spec->kind, (size_t)vocab, sizeof *spec->kind));
    return source->json ? tokenizer_spec_read_json(source, spec) : spec_read_gguf(source, spec);
}

void tokenizer_spec_deinit(struct tokenizer_spec *spec) {
    free(spec->token);
    free(spec->kind);
    free(spec->merge);
    free(spec->added);
    token_map_free(spec->ids);
    json_decref(spec->json);
    *spec = (struct tokenizer_spec){0};
}
