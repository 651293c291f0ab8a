/* Tokens in, text out, for one sequence: holds back what might be half a UTF-8 character or the start of a stop
 * string, ends at the first stop string (which is not part of the text), and knows for each token where its text starts. */
#pragma once

#include "engine/tokenizer.h"

struct text_stream;

/* `stop`: n_stop NUL-terminated strings, copied; empty strings are an error (STATUS_INPUT). Special tokens give no text. */
int text_stream_new(const struct tokenizer *tokenizer, const char *const *stop, int n_stop, struct text_stream **out);
void text_stream_free(struct text_stream *stream);

/* Adds one token. *ready / *ready_bytes: bytes that are now final, whole characters (invalid UTF-8 becomes U+FFFD), valid
 * until the next call. Returns 1 when a stop string was met (the sequence ends here, nothing more may be added), else 0. */
int text_stream_push(struct text_stream *stream, int32_t id, const char **ready, size_t *ready_bytes);

/* The sequence has ended for another reason: what was held back becomes final. Returns 1 when a stop string stands in it
 * after all (it had to wait for an earlier, longer one that now cannot come), else 0. */
int text_stream_finish(struct text_stream *stream, const char **ready, size_t *ready_bytes);

/* All final text so far, NUL-terminated. */
const char *text_stream_text(const struct text_stream *stream, size_t *bytes);

/* Tokens whose bytes lie in the final text, wholly or in part, after a stop string cut it: n of those pushed. */
int text_stream_n_tokens(const struct text_stream *stream);

/* Offset in the text of the character that holds the first byte of token `index` of those pushed (a token without text:
 * of the next character). At most the text's length for counted tokens; growing with `index`. */
size_t text_stream_token_start(const struct text_stream *stream, int index);
