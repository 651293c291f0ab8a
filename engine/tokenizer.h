/* Text to token ids and back: byte-level BPE (the GPT-2 family) from a tokenizer.json or from GGUF's metadata.
 *
 * Order of work, as in the `tokenizers` library: special and added tokens are cut out first (longest match, leftmost),
 * the rest is normalized, pre-tokenized (a sequence of steps: split every numeric character, split by regex, byte-level),
 * and each piece merged by rank. PCRE2 runs the regexes, utf8proc the Unicode categories. Immutable once open. */
#pragma once

#include "engine/model_file.h"

struct tokenizer;

/* Copies what it needs; `source` may go away. `vocab` is the model's embedding rows: a token id beyond it is an error. */
int tokenizer_open(const struct tokenizer_source *source, int vocab, struct tokenizer **out);
void tokenizer_close(struct tokenizer *tokenizer);

/* Ids in all: the largest id + 1. */
int tokenizer_size(const struct tokenizer *tokenizer);

/* Encodes `bytes` bytes of UTF-8 (invalid bytes are replaced as `tokenizers`' Python strings would be: U+FFFD). *ids is
 * malloced (caller frees). `parse_special` maps the text of special tokens to their ids; otherwise they are plain text.
 * `add_special` adds what the tokenizer's post-processor adds (a begin token where the model wants one). */
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool parse_special,
                     bool add_special, int32_t **ids, int *n_ids);

/* Bytes of one token: exact, may be part of a character. Special tokens give their text. NULL for an id out of range. */
const char *tokenizer_token(const struct tokenizer *tokenizer, int32_t id, size_t *bytes);
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);

/* Id of a token given by its exact text; -1 if none. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *text, size_t bytes);

/* Concatenated bytes of `n` ids, NUL-terminated, malloced. Special tokens are left out when `skip_special`. */
int tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, int n, bool skip_special, char **text,
                     size_t *bytes);

/* SHA-256 as 64 hex digits and a NUL over vocabulary, merges, special tokens and pre-tokenizer rules: the same for
 * the GGUF and the JSON form of one tokenizer. */
void tokenizer_hash(const struct tokenizer *tokenizer, char hex[65]);
