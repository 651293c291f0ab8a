/* Tokens are sorted by their first byte and, within it, longest first, so that one look at each place of the text
 * decides. Which of them count is decided after the match: one that is refused has still used up its text, as in
 * `tokenizers`, where the search is not told about the flags. */
#include "engine/added_tokens.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "engine/utf8.h"

struct added_tokens {
    int n;
    int first[257]; /* tokens [first[c], first[c + 1]) begin with byte c */
    struct added_token token[];
};

static int added_compare(const void *a, const void *b) {
    const struct added_token *x = a, *y = b;
    uint8_t cx = (uint8_t)x->text[0], cy = (uint8_t)y->text[0];
    if (cx != cy)
        return cx < cy ? -1 : 1;
    if (x->bytes != y->bytes)
        return x->bytes > y->bytes ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

int added_tokens_new(const struct added_token *tokens, int n, struct added_tokens **out) {
    struct added_tokens *added = NULL;
    *out = NULL;
    TRY(base_alloc(&added, 1, sizeof *added + (size_t)n * sizeof added->token[0]));
    for (int i = 0; i < n; i++)
        if (tokens[i].bytes > 0)
            added->token[added->n++] = tokens[i];
    qsort(added->token, (size_t)added->n, sizeof added->token[0], added_compare);
    for (int c = 0, i = 0; c <= 256; c++) {
        while (i < added->n && (uint8_t)added->token[i].text[0] < c)
            i++;
        added->first[c] = i;
    }
    *out = added;
    return 0;
}

void added_tokens_free(struct added_tokens *added) { free(added); }

/* White_Space of Unicode. */
static bool added_is_space(uint32_t code) {
    if (code < 0x80)
        return code == ' ' || (code >= '\t' && code <= '\r');
    return code == 0x85 || code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
           code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

/* \w of Unicode's regex rules: Alphabetic, marks, decimal digits, connectors, joiners. The alphabetic symbols that are
 * neither letter, mark nor letter number are the four ranges of circled and squared letters. */
static bool added_is_word(uint32_t code) {
    switch (utf8proc_category((utf8proc_int32_t)code)) {
    case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT: case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: case UTF8PROC_CATEGORY_MN: case UTF8PROC_CATEGORY_MC: case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND: case UTF8PROC_CATEGORY_NL: case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        return code == 0x200C || code == 0x200D || (code >= 0x24B6 && code <= 0x24E9) ||
               (code >= 0x1F130 && code <= 0x1F149) || (code >= 0x1F150 && code <= 0x1F169) ||
               (code >= 0x1F170 && code <= 0x1F189);
    }
}

/* Code point that starts at `at`; its length in *bytes. */
static uint32_t added_code_after(const char *text, size_t bytes, size_t at, size_t *length) {
    (void)utf8_next(text + at, bytes - at, length);
    return utf8_code(text + at, *length);
}

/* Code point that ends at `at` (> 0). */
static uint32_t added_code_before(const char *text, size_t at, size_t *length) {
    size_t start = at - 1;
    while (start > 0 && ((uint8_t)text[start] & 0xC0) == 0x80)
        start--;
    *length = at - start;
    return utf8_code(text + start, *length);
}

static const struct added_token *added_tokens_at(const struct added_tokens *added, const char *text, size_t bytes) {
    uint8_t c = (uint8_t)text[0];
    for (int i = added->first[c]; i < added->first[c + 1]; i++) {
        const struct added_token *token = &added->token[i];
        if (token->bytes <= bytes && memcmp(token->text, text, token->bytes) == 0)
            return token;
    }
    return NULL;
}

static bool added_stands_alone(const char *text, size_t bytes, const struct added_match *match) {
    size_t length;
    if (match->start > 0 && added_is_word(added_code_before(text, match->start, &length)))
        return false;
    return match->end == bytes || !added_is_word(added_code_after(text, bytes, match->end, &length));
}

bool added_tokens_next(const struct added_tokens *added, const char *text, size_t bytes, bool parse_special, size_t *at,
                       struct added_match *match) {
    size_t length;
    while (added->n > 0 && *at < bytes) {
        const struct added_token *token = added_tokens_at(added, text + *at, bytes - *at);
        if (!token) {
            (*at)++;
            continue;
        }
        *match = (struct added_match){*at, *at + token->bytes, token->id};
        *at = match->end;
        if ((token->special && !parse_special) || (token->single_word && !added_stands_alone(text, bytes, match)))
            continue;
        while (token->lstrip && match->start > 0 && added_is_space(added_code_before(text, match->start, &length)))
            match->start -= length;
        while (token->rstrip && match->end < bytes && added_is_space(added_code_after(text, bytes, match->end, &length)))
            match->end += length;
        return true;
    }
    return false;
}
