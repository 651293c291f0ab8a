/* Streams against the whole text: replaced characters (golden: Python's decoder), stop strings by brute force, whatever the
 * tokens divide. The vocabulary is made here: all single bytes, some longer pieces, two special tokens. */
#include "engine/pretokenize.h"
#include "engine/text_stream.h"
#include "engine/utf8.h"
#include "tokenizer_golden.h"

enum { N_BYTES = 256, MAX_TOKENS = 320, MAX_TEXT = 4096 };

/* Pieces beside the single bytes: cut emoji and CJK, parts of stop strings. */
static const char *const pieces[] = {"ab", "abc", "bcd", "aab", "\xF0\x9F\x98", "\x80!", "\xE4\xB8", "\xAD\xE6\x96", "\x87\x20", "\xE4\xB8\xAD", "xSTOPy", "ST",
                                     "OP", "\n\n", "\xBF\xBF", "\xC3\xC3", "\xA9\xC3\xA9", " the", "aaaa", "\xF0\x9F\x98\x80\xE4"};
enum { N_PIECES = sizeof pieces / sizeof pieces[0], SPECIAL = N_BYTES + N_PIECES, END = SPECIAL + 1, N_TOKENS = END + 1 };

static struct tokenizer *make_tokenizer(void) {
    static char text[N_TOKENS][64];
    static const char *token[N_TOKENS];
    static size_t bytes[N_TOKENS];
    static int32_t type[N_TOKENS];
    for (int i = 0; i < N_TOKENS; i++) {
        const char single[2] = {(char)i, 0}, *raw = i < N_BYTES ? single : i < SPECIAL ? pieces[i - N_BYTES] : "";
        size_t n = i < N_BYTES ? 1 : strlen(raw);
        for (size_t b = 0; b < n; b++)
            bytes[i] += pretokenize_byte_char((uint8_t)raw[b], text[i] + bytes[i]);
        if (i >= SPECIAL)
            bytes[i] = (size_t)sprintf(text[i], "<|%d|>", i);
        token[i] = text[i];
        type[i] = i >= SPECIAL ? 3 : 1;
    }
    struct tokenizer_source source = {.path = "made", .tokens = token, .token_bytes = bytes, .token_types = type, .n_tokens = N_TOKENS,
                                      .model = "gpt2", .pre = "smollm", .bos_id = -1, .eos_id = -1};
    struct tokenizer *t;
    REQUIRE(tokenizer_open(&source, MAX_TOKENS, &t));
    return t;
}

struct outcome {
    char text[MAX_TEXT];
    size_t bytes;
    int n_pushed, n_tokens;
    bool stopped;
};

/* Pushes until a stop string or the end; what is ready must be whole characters and add up to the stream's text. */
static void run_stream(const struct tokenizer *t, const int32_t *ids, int n, const char *const *stop, int n_stop, struct outcome *o) {
    struct text_stream *stream;
    const char *ready;
    size_t bytes, whole, last_start = 0;
    *o = (struct outcome){0};
    REQUIRE(text_stream_new(t, stop, n_stop, &stream));
    int met = 0;
    for (int i = 0; i <= n && !met; i++) {
        met = i < n ? text_stream_push(stream, ids[i], &ready, &bytes) : text_stream_finish(stream, &ready, &bytes);
        o->n_pushed += i < n;
        REQUIRE(met);
        CHECK(utf8_is_valid(ready, bytes), "half a character after token %d of %d", i, n);
        memcpy(o->text + o->bytes, ready, bytes);
        o->bytes += bytes;
        const char *text = text_stream_text(stream, &whole);
        CHECK(whole == o->bytes && memcmp(text, o->text, whole) == 0 && text[whole] == 0, "%zu and %zu bytes", whole, o->bytes);
    }
    o->stopped = met == 1;
    o->n_tokens = text_stream_n_tokens(stream);
    for (int i = 0; i < o->n_pushed; i++) {
        size_t start = text_stream_token_start(stream, i);
        CHECK(start >= last_start && (start < o->bytes || o->stopped || start == o->bytes || i >= o->n_tokens), "token %d starts at %zu", i, start);
        last_start = start;
    }
    CHECK_FAILS(text_stream_push(stream, 0, &ready, &bytes), STATUS_FAILED, "has ended");
    CHECK_FAILS(text_stream_finish(stream, &ready, &bytes), STATUS_FAILED, "has ended");
    text_stream_free(stream);
}

/* Where the whole text is cut by definition: the earliest place at which a stop string stands. */
static size_t find_cut(const char *text, size_t bytes, const char *const *stop, int n_stop, bool *found) {
    size_t cut = bytes;
    *found = false;
    for (int i = 0; i < n_stop; i++) {
        const char *at = memmem(text, bytes, stop[i], strlen(stop[i]));
        if (at && (!*found || (size_t)(at - text) < cut)) {
            cut = (size_t)(at - text);
            *found = true;
        }
    }
    return cut;
}

/* The number of tokens that reach into the first `cut` bytes: the fewest whose text, decoded alone with what follows, does. Every
 * byte of the tokens is marked with the offset of its character in the replaced text. */
static int count_tokens(const struct tokenizer *t, const int32_t *ids, int n, const char *raw, size_t n_raw, size_t cut) {
    size_t place[MAX_TEXT], at = 0, out = 0, length, token_bytes;
    while (at < n_raw) {
        bool whole = utf8_next(raw + at, n_raw - at, &length) == UTF8_CHAR;
        for (size_t i = 0; i < length; i++)
            place[at + i] = out;
        at += length;
        out += whole ? length : UTF8_REPLACEMENT_BYTES;
    }
    int counted = 0;
    at = 0;
    for (int i = 0; i < n; i++) {
        if (!tokenizer_token(t, ids[i], &token_bytes) || tokenizer_is_special(t, ids[i]))
            continue;
        if (token_bytes > 0 && place[at] < cut)
            counted = i + 1;
        at += token_bytes;
    }
    return counted;
}

/* A stream against the definition on the text of all ids. */
static void check_stream(const struct tokenizer *t, const int32_t *ids, int n, const char *const *stop, int n_stop) {
    struct outcome *o = malloc(sizeof *o);
    char *raw, *whole;
    size_t n_raw, bytes;
    bool found;
    REQUIRE(tokenizer_decode(t, ids, n, true, &raw, &n_raw));
    REQUIRE(utf8_repair(raw, n_raw, &whole, &bytes));
    size_t cut = find_cut(whole, bytes, stop, n_stop, &found);
    run_stream(t, ids, n, stop, n_stop, o);
    CHECK(o->stopped == found && o->bytes == cut && memcmp(o->text, whole, cut) == 0, "stopped %d at %zu, expected %d at %zu of '%s'",
          o->stopped, o->bytes, found, cut, whole);
    int tokens = found ? count_tokens(t, ids, n, raw, n_raw, cut) : n;
    CHECK(o->n_tokens == tokens, "%d tokens, expected %d: '%s' in '%s'", o->n_tokens, tokens, o->text, whole);
    free(raw);
    free(whole);
    free(o);
}

/* Bytes as single-byte tokens. */
static int byte_ids(const char *text, size_t bytes, int32_t *ids) {
    for (size_t i = 0; i < bytes; i++)
        ids[i] = (uint8_t)text[i];
    return (int)bytes;
}

static void check_golden(const struct tokenizer *t) {
    json_t *golden = golden_load(TEST_FILE("golden/tokenizer.json")), *item;
    size_t i;
    json_array_foreach(json_object_get(golden, "invalid"), i, item) {
        const char *hex = json_string_value(json_object_get(item, "bytes"));
        const json_t *text = json_object_get(item, "text");
        int32_t ids[64];
        int n = (int)strlen(hex) / 2;
        struct outcome *o = malloc(sizeof *o);
        for (int b = 0; b < n; b++) {
            unsigned value;
            sscanf(hex + 2 * b, "%2x", &value);
            ids[b] = (int32_t)value;
        }
        run_stream(t, ids, n, NULL, 0, o);
        CHECK(o->bytes == json_string_length(text) && memcmp(o->text, json_string_value(text), o->bytes) == 0, "bytes %s", hex);
        CHECK(o->n_tokens == n, "%d tokens", o->n_tokens);
        free(o);
    }
    json_decref(golden);
}

/* The rules by example. */
static void check_examples(const struct tokenizer *t) {
    static const struct {
        const char *text, *stop[3], *left;
        int n_tokens; /* bytes are tokens here */
    } examples[] = {
        {"hello STOP more", {"STOP"}, "hello ", 6},
        {"hello STO", {"STOP"}, "hello STO", 9},           /* released at the end */
        {"hello STOx STOP", {"STOP"}, "hello STOx ", 11},  /* released when it turned out not to be one */
        {"aab", {"ab"}, "a", 1},
        {"aaaab", {"aaab"}, "a", 1},                       /* overlaps itself */
        {"abcd", {"bc", "abcd"}, "", 0},                   /* the earlier start wins, though it ends later */
        {"abce", {"bc", "abcd"}, "a", 1},                  /* and gives way when it does not come */
        {"abc", {"bc", "abcd"}, "a", 1},                   /* also at the end */
        {"xabcd", {"abcd", "abc"}, "x", 1},                /* at one place the shorter */
        {"STOP", {"STOP"}, "", 0},
        {"\xE4\xB8\xAD!\xE6\x96\x87", {"\xE6\x96\x87"}, "\xE4\xB8\xAD!", 4},
        {"\xE4\xB8\xAD\xE4\xB8", {"\xE4\xB8\xAD\xE4"}, NULL, 0}, /* a stop string must be characters */
        {"\xFFSTOP", {"STOP"}, "\xEF\xBF\xBD", 1},
        {"\xFF\xFF", {"\xEF\xBF\xBD"}, "", 0},
        {"a\n\nb", {"\n\n", "\n"}, "a", 1},
    };
    for (size_t i = 0; i < sizeof examples / sizeof examples[0]; i++) {
        int32_t ids[64];
        struct outcome *o = malloc(sizeof *o);
        struct text_stream *stream;
        int n_stop = 0, n = byte_ids(examples[i].text, strlen(examples[i].text), ids);
        while (n_stop < 3 && examples[i].stop[n_stop])
            n_stop++;
        if (!examples[i].left) {
            CHECK_FAILS(text_stream_new(t, examples[i].stop, n_stop, &stream), STATUS_INPUT, "stop string 0 is not UTF-8");
        } else {
            run_stream(t, ids, n, examples[i].stop, n_stop, o);
            CHECK(strcmp(o->text, examples[i].left) == 0 && o->n_tokens == examples[i].n_tokens, "'%s': '%s', %d tokens", examples[i].text,
                  o->text, o->n_tokens);
        }
        free(o);
    }
    const char *const longer[] = {"abcd", "abc"}; /* the shorter of two at one place ends the text at once */
    struct outcome *o = malloc(sizeof *o);
    int32_t ids[8];
    run_stream(t, ids, byte_ids("xabcd", 5, ids), longer, 2, o);
    CHECK(o->stopped && o->n_pushed == 4 && o->n_tokens == 1, "%d pushed", o->n_pushed);
    free(o);
    const char *const empty[] = {"a", ""};
    struct text_stream *stream;
    CHECK_FAILS(text_stream_new(t, empty, 2, &stream), STATUS_INPUT, "stop string 1 is empty");
}

/* When text comes out: at once where nothing can follow that changes it, and never before. */
static void check_timing(const struct tokenizer *t) {
    static const struct {
        int32_t id;
        const char *ready;
    } steps[] = {{'a', "a"}, {0xF0, ""}, {0x9F, ""}, {SPECIAL, ""}, {0x98, ""}, {0x80, "\xF0\x9F\x98\x80"}, {'S', ""}, {'T', ""}, {'S', "ST"}, {'x', "Sx"},
                 {N_TOKENS + 5, ""}, {0xE4, ""}, {'b', "\xEF\xBF\xBD" "b"}, {END, ""}, {'S', ""}, {N_BYTES + 10 /* xSTOPy */, "Sx"}};
    const char *const stop[] = {"STOP"}, *ready;
    struct text_stream *stream;
    size_t bytes;
    enum { N_STEPS = sizeof steps / sizeof steps[0] };
    REQUIRE(text_stream_new(t, stop, 1, &stream));
    for (int i = 0; i < N_STEPS; i++) {
        int met = text_stream_push(stream, steps[i].id, &ready, &bytes);
        CHECK(met == (i == N_STEPS - 1), "step %d: %d", i, met);
        CHECK(bytes == strlen(steps[i].ready) && memcmp(ready, steps[i].ready, bytes) == 0, "step %d: %zu bytes", i, bytes);
    }
    CHECK(text_stream_n_tokens(stream) == N_STEPS, "%d tokens: the last lies partly in the text", text_stream_n_tokens(stream));
    CHECK(text_stream_token_start(stream, 4) == 1 && text_stream_token_start(stream, 6) == 5, "starts");
    CHECK(text_stream_token_start(stream, 11) == 9 && text_stream_token_start(stream, 12) == 12, "starts after an error");
    text_stream_free(stream);
}

static void check_random(const struct tokenizer *t) {
    static const char *const stops[][4] = {{NULL}, {"ab"}, {"aab", "ab", "b\xE4\xB8\xAD"}, {"STOP", "aaab", "abcd"}, {"\xEF\xBF\xBD" "a", "\n\n"},
                                           {"aaaaaaaaa", "bab", "!"}};
    static const int32_t common[] = {'a', 'b', 'c', 'S', '\n', 0xE4, 0xB8, 0xAD, 0xF0, SPECIAL, END};
    for (uint64_t round = 0; round < 20000; round++) {
        int32_t ids[48];
        int n = (int)(test_hash(round, 0) % 48), n_stop = 0;
        const char *const *stop = stops[test_hash(round, 1) % 6];
        while (n_stop < 4 && stop[n_stop])
            n_stop++;
        for (int i = 0; i < n; i++) {
            uint64_t h = test_hash(round, 2 + (uint64_t)i);
            ids[i] = h % 4 == 0 ? (int32_t)(h / 4 % N_TOKENS) : h % 4 == 1 ? N_BYTES + (int32_t)(h / 4 % N_PIECES) : common[h / 4 % 11];
        }
        check_stream(t, ids, n, stop, n_stop);
    }
}

int main(void) {
    struct tokenizer *t = make_tokenizer();
    check_golden(t);
    check_examples(t);
    check_timing(t);
    check_random(t);
    tokenizer_close(t);
    return test_report();
}
