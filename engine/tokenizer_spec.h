/* What a tokenizer's files say, in one form: read from tokenizer.json or GGUF metadata, checked, ids resolved. Only
 * tokenizer.c uses it, to build its tables; then it is gone. */
#pragma once

#include "engine/added_tokens.h"
#include "engine/bpe.h"
#include "engine/model_file.h"
#include "engine/pretokenize.h"

struct json_t;

enum token_kind { TOKEN_ABSENT, TOKEN_NORMAL, TOKEN_ADDED, TOKEN_SPECIAL, TOKEN_UNUSED };

enum { SPEC_MAX_AFFIX = 8 }; /* special tokens before or after a text; templates in use have one or two */

struct spec_text {
    const char *text; /* as the file writes it; borrowed from the source or from `json` */
    size_t bytes;
};

struct tokenizer_spec {
    int vocab;               /* ids must lie below: rows of the model's embedding */
    int n_tokens;            /* largest id + 1 */
    struct spec_text *token; /* [n_tokens] */
    uint8_t *kind;           /* [n_tokens], enum token_kind */
    struct token_map *ids;   /* of the merging vocabulary's texts */
    int n_merges, n_added;
    struct bpe_merge *merge;
    struct added_token *added;
    bool ignore_merges, nfc, fuse_unk;
    int32_t unk_id; /* -1: none */
    int n_rules, n_prefix, n_suffix;
    enum pretokenize_rule rule[PRETOKENIZE_MAX_RULES];
    int32_t prefix[SPEC_MAX_AFFIX], suffix[SPEC_MAX_AFFIX]; /* what add_special adds */
    struct json_t *json;                                    /* keeps the texts of a tokenizer.json alive */
};

/* Fills `spec`, which tokenizer_spec_deinit empties also after an error. Errors: STATUS_INPUT. */
int tokenizer_spec_read(const struct tokenizer_source *source, int vocab, struct tokenizer_spec *spec);
void tokenizer_spec_deinit(struct tokenizer_spec *spec);

/* For the two readers. */
int tokenizer_spec_read_json(const struct tokenizer_source *source, struct tokenizer_spec *spec);

/* Puts a token at its id, growing the table. */
int tokenizer_spec_put(struct tokenizer_spec *spec, int64_t id, const char *text, size_t bytes, enum token_kind kind);

/* Room for `n` merges, then each by its two texts. */
int tokenizer_spec_merge(struct tokenizer_spec *spec, struct spec_text left, struct spec_text right);

/* The same from "left right". */
int tokenizer_spec_merge_line(struct tokenizer_spec *spec, struct spec_text line);
int tokenizer_spec_rule(struct tokenizer_spec *spec, enum pretokenize_rule rule);
