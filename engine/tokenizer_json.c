/* Reads a tokenizer.json of the `tokenizers` library. Whatever would change ids and is not known here is refused by its
 * name; what only concerns offsets, padding or truncation is not read. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "engine/tokenizer_spec.h"

enum { SPEC_MAX_NESTING = 8 }; /* Sequences inside Sequences; real files have one */

static const char *json_type_name(const json_t *node) {
    const char *type = json_string_value(json_object_get(node, "type"));
    return type ? type : "";
}

static bool json_flag(const json_t *node, const char *key, bool missing) {
    const json_t *value = json_object_get(node, key);
    return json_is_boolean(value) ? json_is_true(value) : missing;
}

static bool json_is_absent(const json_t *value) { return !value || json_is_null(value); }

static struct spec_text json_text(const json_t *string) {
    return (struct spec_text){json_string_value(string), json_string_length(string)};
}

/* The BPE variants that byte-level models do not use. */
static int spec_check_model(const json_t *model) {
    static const char *const empty[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    if (!json_is_object(model))
        FAIL(STATUS_INPUT, "tokenizer.json has no model");
    const char *type = json_type_name(model);
    if (*type && strcmp(type, "BPE") != 0)
        FAIL(STATUS_INPUT, "model type '%s' is not known (known: BPE)", type);
    for (int i = 0; i < 2; i++) {
        const json_t *value = json_object_get(model, empty[i]);
        if (!json_is_absent(value) && json_string_length(value) > 0)
            FAIL(STATUS_INPUT, "model: %s '%s' is not known", empty[i], json_string_value(value));
    }
    if (json_flag(model, "byte_fallback", false))
        FAIL(STATUS_INPUT, "model: byte_fallback is not known");
    if (json_number_value(json_object_get(model, "dropout")) != 0)
        FAIL(STATUS_INPUT, "model: dropout is not known");
    return 0;
}

static int spec_json_vocab(const json_t *vocab, struct tokenizer_spec *spec) {
    if (!json_is_object(vocab))
        FAIL(STATUS_INPUT, "model: no vocab");
    TRY(token_map_new((int)json_object_size(vocab), &spec->ids));
    void *at = json_object_iter((json_t *)(uintptr_t)vocab); /* the iterator's type is not const, its use is */
    for (; at; at = json_object_iter_next((json_t *)(uintptr_t)vocab, at)) {
        const char *text = json_object_iter_key(at);
        size_t bytes = strlen(text); /* jansson's keys hold no NUL */
        const json_t *id = json_object_iter_value(at);
        if (!json_is_integer(id))
            FAIL(STATUS_INPUT, "model: vocab '%.40s' has no integer id", text);
        TRY(tokenizer_spec_put(spec, json_integer_value(id), text, bytes, TOKEN_NORMAL));
        (void)token_map_add(spec->ids, text, bytes, (int32_t)json_integer_value(id));
    }
    return 0;
}

static int spec_json_merges(const json_t *merges, struct tokenizer_spec *spec) {
    if (!json_is_array(merges))
        FAIL(STATUS_INPUT, "model: no merges");
    size_t n = json_array_size(merges);
    if (n > INT32_MAX)
        FAIL(STATUS_INPUT, "model: %zu merges", n);
    TRY(base_alloc(&spec->merge, n, sizeof *spec->merge));
    for (size_t i = 0; i < n; i++) {
        const json_t *merge = json_array_get(merges, i);
        const json_t *left = json_array_get(merge, 0), *right = json_array_get(merge, 1);
        if (json_is_string(merge))
            TRY(tokenizer_spec_merge_line(spec, json_text(merge)));
        else if (json_array_size(merge) == 2 && json_is_string(left) && json_is_string(right))
            TRY(tokenizer_spec_merge(spec, json_text(left), json_text(right)));
        else
            FAIL(STATUS_INPUT, "merge %zu is neither a string nor a pair of strings", i);
    }
    return 0;
}

static int spec_json_model(const json_t *model, struct tokenizer_spec *spec) {
    TRY(spec_check_model(model));
    TRY(spec_json_vocab(json_object_get(model, "vocab"), spec));
    TRY(spec_json_merges(json_object_get(model, "merges"), spec));
    spec->ignore_merges = json_flag(model, "ignore_merges", false);
    spec->fuse_unk = json_flag(model, "fuse_unk", false);
    const json_t *unk = json_object_get(model, "unk_token");
    if (json_is_absent(unk))
        return 0;
    spec->unk_id = json_is_string(unk) ? token_map_find(spec->ids, json_string_value(unk), json_string_length(unk)) : -1;
    if (spec->unk_id < 0)
        FAIL(STATUS_INPUT, "model: unk_token is not in the vocabulary");
    return 0;
}

static int spec_json_added(const json_t *list, struct tokenizer_spec *spec) {
    size_t n = json_array_size(list);
    TRY(base_alloc(&spec->added, n, sizeof *spec->added));
    for (size_t i = 0; i < n; i++) {
        const json_t *node = json_array_get(list, i), *content = json_object_get(node, "content");
        const json_t *number = json_object_get(node, "id");
        if (!json_is_string(content) || !json_is_integer(number))
            FAIL(STATUS_INPUT, "added_tokens[%zu] lacks content or id", i);
        struct spec_text text = json_text(content);
        int64_t id = json_integer_value(number);
        int32_t known = token_map_find(spec->ids, text.text, text.bytes);
        bool special = json_flag(node, "special", false);
        if (known >= 0 && known != id)
            FAIL(STATUS_INPUT, "added token '%.40s' has id %lld, in the vocabulary it has %d", text.text, (long long)id, known);
        if (known < 0)
            TRY(tokenizer_spec_put(spec, id, text.text, text.bytes, TOKEN_ADDED));
        spec->kind[id] = special ? TOKEN_SPECIAL : TOKEN_ADDED;
        spec->added[spec->n_added++] = (struct added_token){
            .id = (int32_t)id,
            .text = text.text,
            .bytes = text.bytes,
            .special = special,
            .single_word = json_flag(node, "single_word", false),
            .lstrip = json_flag(node, "lstrip", false),
            .rstrip = json_flag(node, "rstrip", false),
            .normalized = json_flag(node, "normalized", !special),
        };
    }
    return 0;
}

static int spec_json_normalizer(const json_t *node, int depth, struct tokenizer_spec *spec) {
    const char *type = json_type_name(node);
    if (json_is_absent(node))
        return 0;
    if (strcmp(type, "NFC") == 0) {
        spec->nfc = true;
        return 0;
    }
    if (strcmp(type, "Sequence") != 0 || depth == SPEC_MAX_NESTING)
        FAIL(STATUS_INPUT, "normalizer '%s' is not known (known: NFC, Sequence)", type);
    const json_t *list = json_object_get(node, "normalizers");
    for (size_t i = 0; i < json_array_size(list); i++)
        TRY(spec_json_normalizer(json_array_get(list, i), depth + 1, spec));
    return 0;
}

static int spec_json_split(const json_t *node, struct tokenizer_spec *spec) {
    const char *regex = json_string_value(json_object_get(json_object_get(node, "pattern"), "Regex"));
    const char *behavior = json_string_value(json_object_get(node, "behavior"));
    if (!regex)
        FAIL(STATUS_INPUT, "pre_tokenizer Split: only a Regex pattern is known");
    if (!behavior || strcmp(behavior, "Isolated") != 0 || json_flag(node, "invert", false))
        FAIL(STATUS_INPUT, "pre_tokenizer Split: behavior '%s'%s is not known (known: Isolated)", behavior ? behavior : "",
             json_flag(node, "invert", false) ? " inverted" : "");
    int rule = pretokenize_find_regex(regex);
    if (rule < 0)
        FAIL(STATUS_INPUT, "pre_tokenizer Split: regex '%.200s' is not known", regex);
    return tokenizer_spec_rule(spec, (enum pretokenize_rule)rule);
}

/* *byte_level tells that the ByteLevel step was met: nothing that cuts may come after it. */
static int spec_json_pretokenizer(const json_t *node, int depth, bool *byte_level, struct tokenizer_spec *spec) {
    const char *type = json_type_name(node);
    if (strcmp(type, "Sequence") == 0 && depth < SPEC_MAX_NESTING) {
        const json_t *list = json_object_get(node, "pretokenizers");
        for (size_t i = 0; i < json_array_size(list); i++)
            TRY(spec_json_pretokenizer(json_array_get(list, i), depth + 1, byte_level, spec));
        return 0;
    }
    if (*byte_level)
        FAIL(STATUS_INPUT, "pre_tokenizer '%s' comes after ByteLevel; ByteLevel must be the last", type);
    if (strcmp(type, "Digits") == 0)
        return tokenizer_spec_rule(spec, json_flag(node, "individual_digits", false) ? PRETOKENIZE_DIGITS : PRETOKENIZE_DIGIT_RUNS);
    if (strcmp(type, "Split") == 0)
        return spec_json_split(node, spec);
    if (strcmp(type, "ByteLevel") != 0)
        FAIL(STATUS_INPUT, "pre_tokenizer '%s' is not known (known: ByteLevel, Digits, Sequence, Split)", type);
    if (json_flag(node, "add_prefix_space", true))
        FAIL(STATUS_INPUT, "pre_tokenizer ByteLevel: add_prefix_space is not known");
    *byte_level = true;
    return json_flag(node, "use_regex", true) ? tokenizer_spec_rule(spec, PRETOKENIZE_GPT2) : 0;
}

/* Ids of the special token that a template's piece names. */
static int spec_json_affix(const json_t *template, const char *name, int32_t *affix, int *n, struct tokenizer_spec *spec) {
    const json_t *ids = json_object_get(json_object_get(json_object_get(template, "special_tokens"), name), "ids");
    if (json_array_size(ids) == 0)
        FAIL(STATUS_INPUT, "post_processor TemplateProcessing: special token '%s' has no ids", name);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        int64_t id = json_integer_value(json_array_get(ids, i));
        if (id < 0 || id >= spec->n_tokens)
            FAIL(STATUS_INPUT, "post_processor TemplateProcessing: id %lld of '%s' is none of %d tokens", (long long)id, name,
                 spec->n_tokens);
        if (*n == SPEC_MAX_AFFIX)
            FAIL(STATUS_INPUT, "post_processor TemplateProcessing: more than %d special tokens", SPEC_MAX_AFFIX);
        affix[(*n)++] = (int32_t)id;
    }
    return 0;
}

static int spec_json_template(const json_t *node, struct tokenizer_spec *spec) {
    const json_t *single = json_object_get(node, "single");
    int n_texts = 0;
    if (spec->n_prefix || spec->n_suffix)
        FAIL(STATUS_INPUT, "post_processor: more than one TemplateProcessing");
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *piece = json_array_get(single, i);
        const char *name = json_string_value(json_object_get(json_object_get(piece, "SpecialToken"), "id"));
        if (!name) {
            n_texts += json_object_get(piece, "Sequence") != NULL;
        } else if (n_texts == 0) {
            TRY(spec_json_affix(node, name, spec->prefix, &spec->n_prefix, spec));
        } else {
            TRY(spec_json_affix(node, name, spec->suffix, &spec->n_suffix, spec));
        }
    }
    if (n_texts != 1)
        FAIL(STATUS_INPUT, "post_processor TemplateProcessing: 'single' holds the text %d times, expected once", n_texts);
    return 0;
}

static int spec_json_postprocessor(const json_t *node, int depth, struct tokenizer_spec *spec) {
    const char *type = json_type_name(node);
    if (json_is_absent(node) || strcmp(type, "ByteLevel") == 0) /* ByteLevel moves offsets only */
        return 0;
    if (strcmp(type, "TemplateProcessing") == 0)
        return spec_json_template(node, spec);
    if (strcmp(type, "Sequence") != 0 || depth == SPEC_MAX_NESTING)
        FAIL(STATUS_INPUT, "post_processor '%s' is not known (known: ByteLevel, Sequence, TemplateProcessing)", type);
    const json_t *list = json_object_get(node, "processors");
    for (size_t i = 0; i < json_array_size(list); i++)
        TRY(spec_json_postprocessor(json_array_get(list, i), depth + 1, spec));
    return 0;
}

int tokenizer_spec_read_json(const struct tokenizer_source *source, struct tokenizer_spec *spec) {
    json_error_t error;
    bool byte_level = false;
    spec->json = json_loadb(source->json, source->json_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    if (!spec->json)
        FAIL(STATUS_INPUT, "tokenizer.json, line %d: %s", error.line, error.text);
    TRY(spec_json_model(json_object_get(spec->json, "model"), spec));
    TRY(spec_json_added(json_object_get(spec->json, "added_tokens"), spec));
    TRY(spec_json_normalizer(json_object_get(spec->json, "normalizer"), 0, spec));
    TRY(spec_json_pretokenizer(json_object_get(spec->json, "pre_tokenizer"), 0, &byte_level, spec));
    if (!byte_level)
        FAIL(STATUS_INPUT, "pre_tokenizer has no ByteLevel step; only byte-level BPE is known");
    const char *decoder = json_type_name(json_object_get(spec->json, "decoder"));
    if (strcmp(decoder, "ByteLevel") != 0)
        FAIL(STATUS_INPUT, "decoder '%s' is not known (known: ByteLevel)", decoder);
    return spec_json_postprocessor(json_object_get(spec->json, "post_processor"), 0, spec);
}
