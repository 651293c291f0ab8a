/* Three stages: bytes that may be the beginning of a character (`partial`), characters that may be the beginning of a stop
 * string (`held`), final text. What is cut is the earliest place where any stop string begins (of several at one place the
 * shortest), and so depends on the text alone, not on how tokens divide it: a match that begins later than a
 * possible earlier one waits until that one is decided. Tokens' starts only grow, so that a cut is a binary search. */
#include "engine/text_stream.h"

#include <stdlib.h>
#include <string.h>

#include "engine/utf8.h"

struct text_buffer {
    char *data; /* NUL-terminated */
    size_t bytes, capacity;
};

struct text_stream {
    const struct tokenizer *tokenizer;
    char **stop;
    int n_stop;
    char partial[4];
    size_t n_partial;
    struct text_buffer held, final;
    size_t *start; /* per token: offset in the whole text of the character that holds its first byte */
    int n_tokens, start_capacity;
    int n_textless; /* newest tokens without text: they start where the next one with text does */
    bool stopped, finished;
};

static int text_reserve(struct text_buffer *buffer, size_t more) {
    if (buffer->bytes + more < buffer->capacity)
        return 0;
    size_t capacity = 2 * (buffer->bytes + more) + 64;
    char *grown = realloc(buffer->data, capacity);
    if (!grown)
        FAIL(STATUS_MEMORY, "no memory for %zu bytes of text", capacity);
    buffer->data = grown;
    buffer->capacity = capacity;
    buffer->data[buffer->bytes] = 0;
    return 0;
}

/* For space that text_reserve made. */
static void text_append(struct text_buffer *buffer, const char *text, size_t bytes) {
    memcpy(buffer->data + buffer->bytes, text, bytes);
    buffer->bytes += bytes;
    buffer->data[buffer->bytes] = 0;
}

int text_stream_new(const struct tokenizer *tokenizer, const char *const *stop, int n_stop, struct text_stream **out) {
    struct text_stream *stream = NULL;
    int status;
    *out = NULL;
    TRY(base_alloc(&stream, 1, sizeof *stream));
    stream->tokenizer = tokenizer;
    TRY_GOTO(base_alloc(&stream->stop, (size_t)n_stop, sizeof *stream->stop));
    for (int i = 0; i < n_stop; i++) {
        if (!*stop[i])
            FAIL_GOTO(STATUS_INPUT, "stop string %d is empty", i);
        if (!utf8_is_valid(stop[i], strlen(stop[i])))
            FAIL_GOTO(STATUS_INPUT, "stop string %d is not UTF-8", i);
        stream->stop[i] = strdup(stop[i]);
        if (!stream->stop[i])
            FAIL_GOTO(STATUS_MEMORY, "no memory for stop string %d", i);
        stream->n_stop = i + 1;
    }
    TRY_GOTO(text_reserve(&stream->held, 1));
    TRY_GOTO(text_reserve(&stream->final, 1));
    *out = stream;
    return 0;
fail:
    text_stream_free(stream);
    return status;
}

void text_stream_free(struct text_stream *stream) {
    if (!stream)
        return;
    for (int i = 0; i < stream->n_stop; i++)
        free(stream->stop[i]);
    free(stream->stop);
    free(stream->held.data);
    free(stream->final.data);
    free(stream->start);
    free(stream);
}

/* Moves what can be judged from `partial` to `held`; at the end of the sequence (`last`) a cut-off character is an error. */
static void text_judge(struct text_stream *stream, bool last) {
    size_t bytes;
    while (stream->n_partial > 0) {
        enum utf8_kind kind = utf8_next(stream->partial, stream->n_partial, &bytes);
        if (kind == UTF8_PARTIAL && !last)
            return;
        if (kind == UTF8_CHAR)
            text_append(&stream->held, stream->partial, bytes);
        else
            text_append(&stream->held, utf8_replacement, UTF8_REPLACEMENT_BYTES);
        stream->n_partial -= bytes;
        memmove(stream->partial, stream->partial + bytes, stream->n_partial);
    }
}

/* A token begins where the text ends, or with the character that is still incomplete there. */
static int text_add_start(struct text_stream *stream) {
    if (stream->n_tokens == stream->start_capacity) {
        int capacity = 2 * stream->start_capacity + 64;
        size_t *grown = realloc(stream->start, (size_t)capacity * sizeof *grown);
        if (!grown)
            FAIL(STATUS_MEMORY, "no memory for the starts of %d tokens", capacity);
        stream->start = grown;
        stream->start_capacity = capacity;
    }
    stream->start[stream->n_tokens++] = stream->final.bytes + stream->held.bytes;
    return 0;
}

/* Bytes of `held` before the first place where a stop string stands or may yet come to stand; *met: it stands there. */
static size_t text_scan(const struct text_stream *stream, bool last, bool *met) {
    const struct text_buffer *held = &stream->held;
    *met = false;
    for (size_t at = 0; at < held->bytes; at++) {
        bool open = false;
        for (int i = 0; i < stream->n_stop; i++) {
            size_t bytes = strlen(stream->stop[i]), left = held->bytes - at;
            if (memcmp(held->data + at, stream->stop[i], bytes < left ? bytes : left) != 0)
                continue;
            *met = *met || bytes <= left;
            open = open || bytes > left;
        }
        if (*met || (open && !last))
            return at;
    }
    return held->bytes;
}

/* Moves what is decided to the final text. Returns 1 when a stop string stands there. */
static int text_release(struct text_stream *stream, bool last, const char **ready, size_t *ready_bytes) {
    bool met;
    size_t free_bytes = text_scan(stream, last, &met);
    TRY(text_reserve(&stream->final, free_bytes));
    *ready = stream->final.data + stream->final.bytes;
    *ready_bytes = free_bytes;
    text_append(&stream->final, stream->held.data, free_bytes);
    stream->held.bytes -= free_bytes;
    memmove(stream->held.data, stream->held.data + free_bytes, stream->held.bytes + 1);
    stream->stopped = met;
    return met;
}

/* A token with text came, `first` is its first byte: if that breaks off the character before, it begins one of its own. */
static void text_place_tokens(struct text_stream *stream, char first) {
    size_t start = stream->final.bytes + stream->held.bytes, judged;
    stream->partial[stream->n_partial] = first;
    if (stream->n_partial > 0 && utf8_next(stream->partial, stream->n_partial + 1, &judged) == UTF8_INVALID)
        start += UTF8_REPLACEMENT_BYTES;
    for (; stream->n_textless > 0; stream->n_textless--)
        stream->start[stream->n_tokens - stream->n_textless] = start;
}

int text_stream_push(struct text_stream *stream, int32_t id, const char **ready, size_t *ready_bytes) {
    size_t bytes = 0;
    *ready = "";
    *ready_bytes = 0;
    if (stream->stopped || stream->finished)
        FAIL(STATUS_FAILED, "token %d was added to a text that has ended", id);
    TRY(text_add_start(stream));
    const char *token = tokenizer_token(stream->tokenizer, id, &bytes);
    stream->n_textless++;
    if (!token || bytes == 0 || tokenizer_is_special(stream->tokenizer, id))
        return 0;
    /* Each byte gives at most one replacement, and so may a partial character before them. */
    TRY(text_reserve(&stream->held, UTF8_REPLACEMENT_BYTES * (bytes + 1)));
    text_place_tokens(stream, token[0]);
    for (size_t i = 0; i < bytes; i++) {
        stream->partial[stream->n_partial++] = token[i];
        text_judge(stream, false);
    }
    return text_release(stream, false, ready, ready_bytes);
}

int text_stream_finish(struct text_stream *stream, const char **ready, size_t *ready_bytes) {
    *ready = "";
    *ready_bytes = 0;
    if (stream->stopped || stream->finished)
        FAIL(STATUS_FAILED, "a text was finished that has ended already");
    stream->finished = true;
    TRY(text_reserve(&stream->held, UTF8_REPLACEMENT_BYTES * sizeof stream->partial));
    text_judge(stream, true);
    return text_release(stream, true, ready, ready_bytes);
}

const char *text_stream_text(const struct text_stream *stream, size_t *bytes) {
    *bytes = stream->final.bytes;
    return stream->final.data;
}

int text_stream_n_tokens(const struct text_stream *stream) {
    if (!stream->stopped)
        return stream->n_tokens;
    int low = 0, high = stream->n_tokens;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (stream->start[middle] < stream->final.bytes)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

size_t text_stream_token_start(const struct text_stream *stream, int index) { return stream->start[index]; }
