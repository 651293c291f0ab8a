/* Special and added tokens inside a text: leftmost, then longest, with the flags of tokenizer.json's added_tokens. */
#pragma once

#include "kernels/base.h"

struct added_token {
    int32_t id;
    const char *text;
    size_t bytes;
    bool special;     /* plain text unless the caller parses special tokens */
    bool single_word; /* only where no word character stands beside it */
    bool lstrip;      /* takes the white space before it along */
    bool rstrip;      /* and after it */
    bool normalized;  /* looked for in the normalized text, after the others */
};

struct added_tokens;

/* The texts are borrowed. Tokens with empty text are ignored, as `tokenizers` does. */
int added_tokens_new(const struct added_token *tokens, int n, struct added_tokens **out);
void added_tokens_free(struct added_tokens *added);

struct added_match {
    size_t start, end; /* white space included; start may lie before the last match's end */
    int32_t id;
};

/* Finds the next token from *at on, which starts as 0 and then belongs to this function; false when there is none. */
bool added_tokens_next(const struct added_tokens *added, const char *text, size_t bytes, bool parse_special, size_t *at,
                       struct added_match *match);
