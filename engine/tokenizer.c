/* The tables of an open tokenizer and the order of work of encoding. Reading the files is tokenizer_spec.c's and
 * tokenizer_json.c's, cutting pretokenize.c's and added_tokens.c's, merging bpe.c's. Nothing changes after opening:
 * every call brings its own working memory, so that threads may share one tokenizer. */
#include "engine/tokenizer.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "engine/digest.h"
#include "engine/tokenizer_spec.h"
#include "engine/utf8.h"

struct tokenizer {
    int n_tokens;
    uint8_t *kind;               /* [n_tokens], enum token_kind */
    size_t *start;               /* [n_tokens + 1]: token i is bytes [start[i], start[i + 1]) */
    char *bytes;                 /* of all tokens */
    struct token_map *pieces;    /* bytes of the normal tokens */
    struct bpe *bpe;
    struct pretokenizer *pretokenizer;
    struct added_tokens *in_raw, *in_normalized;
    int n_normalized;
    char **normalized;           /* texts of in_normalized's tokens where they are not in `bytes` */
    bool nfc;
    int n_prefix, n_suffix;
    int32_t prefix[SPEC_MAX_AFFIX], suffix[SPEC_MAX_AFFIX];
    char hash[65];
};

/* Canonical composition of `text`; *out is NULL when the text is ASCII and so stays as it is. */
static int tokenizer_nfc(const char *text, size_t bytes, char **out, size_t *out_bytes) {
    size_t ascii = 0;
    *out = NULL;
    while (ascii < bytes && (uint8_t)text[ascii] < 0x80)
        ascii++;
    if (ascii == bytes)
        return 0;
    utf8proc_uint8_t *composed = NULL;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)bytes, &composed,
                                      UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (n < 0)
        FAIL(STATUS_FAILED, "utf8proc: %s", utf8proc_errmsg(n));
    *out = (char *)composed;
    *out_bytes = (size_t)n;
    return 0;
}

/* Bytes of every token: added ones stand for their text, the others are written in the byte-level alphabet. */
static int tokenizer_build_bytes(struct tokenizer *t, const struct tokenizer_spec *spec) {
    size_t total = 0, at = 0;
    for (int i = 0; i < spec->n_tokens; i++)
        total += spec->token[i].bytes;
    TRY(base_alloc(&t->bytes, total + 1, 1));
    TRY(base_alloc(&t->start, (size_t)spec->n_tokens + 1, sizeof *t->start));
    TRY(base_alloc(&t->kind, (size_t)spec->n_tokens, sizeof *t->kind));
    TRY(token_map_new(spec->n_tokens, &t->pieces));
    memcpy(t->kind, spec->kind, (size_t)spec->n_tokens);
    t->n_tokens = spec->n_tokens;
    for (int i = 0; i < spec->n_tokens; i++) {
        const struct spec_text *token = &spec->token[i];
        size_t bytes = token->bytes;
        bool added = spec->kind[i] == TOKEN_ADDED || spec->kind[i] == TOKEN_SPECIAL;
        t->start[i] = at;
        if (!added && pretokenize_bytes(token->text, token->bytes, t->bytes + at, &bytes)) {
            if (spec->kind[i] == TOKEN_NORMAL)
                (void)token_map_add(t->pieces, t->bytes + at, bytes, i);
        } else if (token->bytes > 0) {
            memcpy(t->bytes + at, token->text, token->bytes);
        }
        at += bytes;
    }
    t->start[spec->n_tokens] = at;
    return 0;
}

static int tokenizer_build_bpe(struct tokenizer *t, const struct tokenizer_spec *spec) {
    struct bpe_rules rules = {
        .merge = spec->merge,
        .n_merges = spec->n_merges,
        .whole = spec->ignore_merges ? t->pieces : NULL,
        .unk_id = spec->unk_id,
        .fuse_unk = spec->fuse_unk,
    };
    for (int byte = 0; byte < 256; byte++) {
        char character[3];
        size_t bytes = pretokenize_byte_char((uint8_t)byte, character);
        rules.byte_id[byte] = token_map_find(spec->ids, character, bytes);
    }
    return bpe_new(&rules, &t->bpe);
}

/* Added tokens of the one kind or the other; those sought in normalized text are normalized themselves. */
static int tokenizer_build_added(struct tokenizer *t, const struct tokenizer_spec *spec, bool normalized,
                                 struct added_tokens **out) {
    struct added_token *chosen = NULL;
    int n = 0, status;
    TRY_GOTO(base_alloc(&chosen, (size_t)spec->n_added, sizeof *chosen));
    for (int i = 0; i < spec->n_added; i++) {
        struct added_token token = spec->added[i];
        if (token.normalized != normalized)
            continue;
        token.text = t->bytes + t->start[token.id];
        if (normalized && spec->nfc) {
            char **text = &t->normalized[t->n_normalized++];
            TRY_GOTO(tokenizer_nfc(token.text, token.bytes, text, &token.bytes));
            token.text = *text ? *text : token.text;
        }
        chosen[n++] = token;
    }
    status = added_tokens_new(chosen, n, out);
fail:
    free(chosen);
    return status;
}

static bool tokenizer_digest_number(EVP_MD_CTX *md, int64_t number) {
    uint8_t little[8];
    for (int i = 0; i < 8; i++)
        little[i] = (uint8_t)((uint64_t)number >> 8 * i);
    return EVP_DigestUpdate(md, little, sizeof little);
}

static bool tokenizer_digest_text(EVP_MD_CTX *md, const char *text, size_t bytes) {
    return tokenizer_digest_number(md, (int64_t)bytes) && EVP_DigestUpdate(md, text, bytes);
}

/* Only what both file forms know enters: not the flags of added tokens, nor a GGUF file's padding tokens. */
static bool tokenizer_digest(EVP_MD_CTX *md, const struct tokenizer_spec *spec) {
    bool fine = EVP_DigestInit_ex(md, EVP_sha256(), NULL);
    for (int i = 0; i < spec->n_tokens; i++) {
        if (spec->kind[i] == TOKEN_ABSENT || spec->kind[i] == TOKEN_UNUSED)
            continue;
        fine = fine && tokenizer_digest_number(md, i) && tokenizer_digest_number(md, spec->kind[i]) &&
               tokenizer_digest_text(md, spec->token[i].text, spec->token[i].bytes);
    }
    fine = fine && tokenizer_digest_text(md, "merges", strlen("merges"));
    for (int i = 0; i < spec->n_merges; i++)
        fine = fine && tokenizer_digest_number(md, spec->merge[i].left) && tokenizer_digest_number(md, spec->merge[i].right);
    fine = fine && tokenizer_digest_text(md, "rules", strlen("rules"));
    for (int i = 0; i < spec->n_rules; i++) {
        const char *name = pretokenize_rule_name(spec->rule[i]);
        fine = fine && tokenizer_digest_text(md, name, strlen(name));
    }
    fine = fine && tokenizer_digest_number(md, spec->nfc) && tokenizer_digest_number(md, spec->ignore_merges) &&
           tokenizer_digest_number(md, spec->unk_id);
    return fine;
}

static int tokenizer_build_hash(struct tokenizer *t, const struct tokenizer_spec *spec) {
    uint8_t digest[EVP_MAX_MD_SIZE];
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    bool fine = md && tokenizer_digest(md, spec) && EVP_DigestFinal_ex(md, digest, NULL);
    EVP_MD_CTX_free(md);
    if (!fine)
        FAIL(STATUS_FAILED, "SHA-256 is not available from OpenSSL");
    digest_hex(digest, t->hash);
    return 0;
}

static int tokenizer_build(struct tokenizer *t, const struct tokenizer_spec *spec) {
    TRY(tokenizer_build_bytes(t, spec));
    TRY(tokenizer_build_bpe(t, spec));
    TRY(pretokenizer_new(spec->rule, spec->n_rules, &t->pretokenizer));
    TRY(base_alloc(&t->normalized, (size_t)spec->n_added, sizeof *t->normalized));
    TRY(tokenizer_build_added(t, spec, false, &t->in_raw));
    TRY(tokenizer_build_added(t, spec, true, &t->in_normalized));
    TRY(tokenizer_build_hash(t, spec));
    t->nfc = spec->nfc;
    t->n_prefix = spec->n_prefix;
    t->n_suffix = spec->n_suffix;
    memcpy(t->prefix, spec->prefix, sizeof t->prefix);
    memcpy(t->suffix, spec->suffix, sizeof t->suffix);
    return 0;
}

int tokenizer_open(const struct tokenizer_source *source, int vocab, struct tokenizer **out) {
    struct tokenizer *t = NULL;
    struct tokenizer_spec spec;
    *out = NULL;
    TRY(base_alloc(&t, 1, sizeof *t));
    int status = tokenizer_spec_read(source, vocab, &spec);
    if (status == 0)
        status = tokenizer_build(t, &spec);
    tokenizer_spec_deinit(&spec);
    if (status < 0) {
        base_error_prefix("%s: ", source->path);
        tokenizer_close(t);
        return status;
    }
    *out = t;
    return 0;
}

void tokenizer_close(struct tokenizer *tokenizer) {
    if (!tokenizer)
        return;
    for (int i = 0; i < tokenizer->n_normalized; i++)
        free(tokenizer->normalized[i]);
    free(tokenizer->normalized);
    added_tokens_free(tokenizer->in_raw);
    added_tokens_free(tokenizer->in_normalized);
    pretokenizer_free(tokenizer->pretokenizer);
    bpe_free(tokenizer->bpe);
    token_map_free(tokenizer->pieces);
    free(tokenizer->kind);
    free(tokenizer->start);
    free(tokenizer->bytes);
    free(tokenizer);
}

int tokenizer_size(const struct tokenizer *tokenizer) { return tokenizer->n_tokens; }

/* One call of tokenizer_encode. */
struct tokenizer_run {
    const struct tokenizer *tokenizer;
    bool parse_special;
    struct pretokenizer_work *cut;
    struct bpe_work merge;
    struct id_list ids;
};

static int tokenizer_add_piece(void *context, const char *piece, size_t bytes) {
    struct tokenizer_run *run = context;
    return bpe_encode(run->tokenizer->bpe, &run->merge, piece, bytes, &run->ids);
}

static int tokenizer_add_plain(struct tokenizer_run *run, const char *text, size_t bytes) {
    struct pretokenizer_sink sink = {tokenizer_add_piece, run};
    return pretokenizer_run(run->tokenizer->pretokenizer, run->cut, text, bytes, &sink);
}

/* Text without the raw added tokens: normalized, then searched for those that are sought in normalized text. */
static int tokenizer_add_section(struct tokenizer_run *run, const char *text, size_t bytes) {
    struct added_match match;
    char *composed = NULL;
    int status = 0;
    if (run->tokenizer->nfc)
        TRY(tokenizer_nfc(text, bytes, &composed, &bytes));
    if (composed)
        text = composed;
    size_t at = 0, done = 0;
    while (added_tokens_next(run->tokenizer->in_normalized, text, bytes, run->parse_special, &at, &match)) {
        if (done < match.start)
            TRY_GOTO(tokenizer_add_plain(run, text + done, match.start - done));
        TRY_GOTO(id_list_add(&run->ids, match.id));
        done = match.end;
    }
    status = tokenizer_add_plain(run, text + done, bytes - done);
fail:
    free(composed);
    return status;
}

static int tokenizer_add_text(struct tokenizer_run *run, const char *text, size_t bytes) {
    struct added_match match;
    size_t at = 0, done = 0;
    while (added_tokens_next(run->tokenizer->in_raw, text, bytes, run->parse_special, &at, &match)) {
        if (done < match.start)
            TRY(tokenizer_add_section(run, text + done, match.start - done));
        TRY(id_list_add(&run->ids, match.id));
        done = match.end;
    }
    return done < bytes ? tokenizer_add_section(run, text + done, bytes - done) : 0;
}

int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool parse_special,
                     bool add_special, int32_t **ids, int *n_ids) {
    struct tokenizer_run run = {.tokenizer = tokenizer, .parse_special = parse_special};
    char *repaired = NULL;
    int status;
    *ids = NULL;
    *n_ids = 0;
    if (bytes > INT32_MAX)
        FAIL(STATUS_INPUT, "a text of %zu bytes, at most %d can be encoded", bytes, INT32_MAX);
    if (!utf8_is_valid(text, bytes)) {
        TRY(utf8_repair(text, bytes, &repaired, &bytes));
        text = repaired;
    }
    TRY_GOTO(pretokenizer_work_new(tokenizer->pretokenizer, &run.cut));
    for (int i = 0; add_special && i < tokenizer->n_prefix; i++)
        TRY_GOTO(id_list_add(&run.ids, tokenizer->prefix[i]));
    TRY_GOTO(tokenizer_add_text(&run, text, bytes));
    for (int i = 0; add_special && i < tokenizer->n_suffix; i++)
        TRY_GOTO(id_list_add(&run.ids, tokenizer->suffix[i]));
    *ids = run.ids.id;
    *n_ids = run.ids.n;
    run.ids.id = NULL;
fail:
    free(run.ids.id);
    bpe_work_deinit(&run.merge);
    pretokenizer_work_free(run.cut);
    free(repaired);
    return status;
}

const char *tokenizer_token(const struct tokenizer *tokenizer, int32_t id, size_t *bytes) {
    *bytes = 0;
    if (id < 0 || id >= tokenizer->n_tokens || tokenizer->kind[id] == TOKEN_ABSENT)
        return NULL;
    *bytes = tokenizer->start[id + 1] - tokenizer->start[id];
    return tokenizer->bytes + tokenizer->start[id];
}

bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id) {
    return id >= 0 && id < tokenizer->n_tokens && tokenizer->kind[id] == TOKEN_SPECIAL;
}

/* Added tokens before the others: theirs is the text that a user writes. They are few, but stand anywhere in the table. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *text, size_t bytes) {
    for (int32_t id = 0; id < tokenizer->n_tokens; id++) {
        size_t length = tokenizer->start[id + 1] - tokenizer->start[id];
        if ((tokenizer->kind[id] == TOKEN_ADDED || tokenizer->kind[id] == TOKEN_SPECIAL) && length == bytes &&
            memcmp(tokenizer->bytes + tokenizer->start[id], text, bytes) == 0)
            return id;
    }
    return token_map_find(tokenizer->pieces, text, bytes);
}

/* Ids that the tokenizer does not know give no text, as in `tokenizers`: models may have more rows than tokens. */
int tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, int n, bool skip_special, char **text,
                     size_t *bytes) {
    size_t total = 0, length;
    *text = NULL;
    *bytes = 0;
    for (int i = 0; i < n; i++)
        if (!skip_special || !tokenizer_is_special(tokenizer, ids[i]))
            total += (tokenizer_token(tokenizer, ids[i], &length), length);
    TRY(base_alloc(text, total + 1, 1));
    for (int i = 0; i < n; i++) {
        const char *token = tokenizer_token(tokenizer, ids[i], &length);
        if (!token || (skip_special && tokenizer_is_special(tokenizer, ids[i])))
            continue;
        memcpy(*text + *bytes, token, length);
        *bytes += length;
    }
    return 0;
}

void tokenizer_hash(const struct tokenizer *tokenizer, char hex[65]) { memcpy(hex, tokenizer->hash, sizeof tokenizer->hash); }
