/* What the tokenizer's tests share: the golden file, and the check of one tokenizer against its cases. */
#pragma once

#include <jansson.h>

#include "engine/tokenizer.h"
#include "test.h"

static inline json_t *golden_load(const char *path) {
    json_error_t error;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (!root) {
        fprintf(stderr, "%s, line %d: %s\n", path, error.line, error.text);
        exit(1);
    }
    return root;
}

/* 64-bit FNV-1a over little-endian 32-bit values, carried on from `h`. */
static inline uint64_t golden_fnv(uint64_t h, const int32_t *ids, int n) {
    for (int i = 0; i < n; i++)
        for (int b = 0; b < 4; b++)
            h = (h ^ ((uint32_t)ids[i] >> 8 * b & 255)) * 0x100000001b3u;
    return h;
}
static const uint64_t GOLDEN_FNV_START = 0xcbf29ce484222325u;

static inline bool golden_hash_is(const json_t *hex, uint64_t h) {
    char mine[17];
    snprintf(mine, sizeof mine, "%016llx", (unsigned long long)h);
    return json_is_string(hex) && strcmp(mine, json_string_value(hex)) == 0;
}

/* Compares ids with the case's field `key`, or with its number and hash. */
static inline bool golden_ids_are(const json_t *item, const char *key, const int32_t *ids, int n) {
    char name[32];
    const json_t *list = json_object_get(item, key);
    if (list) {
        bool same = json_array_size(list) == (size_t)n;
        for (int i = 0; same && i < n; i++)
            same = json_integer_value(json_array_get(list, (size_t)i)) == ids[i];
        return same;
    }
    snprintf(name, sizeof name, "%s_n", key);
    if (json_integer_value(json_object_get(item, name)) != n)
        return false;
    snprintf(name, sizeof name, "%s_fnv", key);
    return golden_hash_is(json_object_get(item, name), golden_fnv(GOLDEN_FNV_START, ids, n));
}

static inline bool golden_has(const json_t *item, const char *key) {
    char name[32];
    snprintf(name, sizeof name, "%s_n", key);
    return json_object_get(item, key) || json_object_get(item, name);
}

/* The text of a case: its own, one of `texts` by index, or a unit repeated. Malloced. */
static inline char *golden_text(const json_t *item, const json_t *texts, size_t *bytes) {
    const json_t *index = json_object_get(item, "index"), *times = json_object_get(item, "times");
    const json_t *unit = json_object_get(index ? json_array_get(texts, (size_t)json_integer_value(index)) : item, "text");
    size_t n = json_string_length(unit), repeat = times ? (size_t)json_integer_value(times) : 1;
    char *text = malloc(n * repeat + 1);
    for (size_t i = 0; i < repeat; i++)
        memcpy(text + i * n, json_string_value(unit), n);
    text[n * repeat] = 0;
    *bytes = n * repeat;
    return text;
}

static inline void golden_check_case(const struct tokenizer *t, const char *name, const json_t *item, const json_t *texts) {
    static const struct {
        const char *key;
        bool parse_special, add_special;
    } ways[] = {{"ids", true, false}, {"plain", false, false}, {"added", true, true}};
    size_t bytes;
    char *text = golden_text(item, texts, &bytes);
    for (int w = 0; w < 3; w++) {
        int32_t *ids;
        int n;
        const char *key = golden_has(item, ways[w].key) ? ways[w].key : "ids";
        REQUIRE(tokenizer_encode(t, text, bytes, ways[w].parse_special, ways[w].add_special, &ids, &n));
        CHECK(golden_ids_are(item, key, ids, n), "%s, %s of '%.60s' (%zu bytes): %d ids: %d %d %d %d ...", name, ways[w].key, text,
              bytes, n, n > 0 ? ids[0] : -1, n > 1 ? ids[1] : -1, n > 2 ? ids[2] : -1, n > 3 ? ids[3] : -1);
        free(ids);
    }
    free(text);
}

static inline size_t golden_put_code(char *out, uint32_t code) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const uint8_t lead[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = n; i-- > 1; code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)(lead[n] | code);
    return n;
}

/* The text of the script's character_text, with room for 64 bytes. */
static inline size_t golden_character_text(char *text, uint32_t code) {
    static const char *const around[] = {"a", "b ", " ", "", "1", "'", "\n", ""};
    size_t bytes = 0;
    for (int i = 0; i < 8; i++) {
        bytes += (size_t)sprintf(text + bytes, "%s", around[i]);
        bytes += i < 7 ? golden_put_code(text + bytes, code) : 0;
    }
    return bytes;
}

/* Every assigned character between letters, spaces, digits and line ends, as the script's character_text has it. */
static inline void golden_check_every(const struct tokenizer *t, const char *name, const json_t *row, const json_t *ranges) {
    uint64_t h = GOLDEN_FNV_START;
    int64_t total = 0;
    for (size_t r = 0; r < json_array_size(ranges); r++) {
        const json_t *range = json_array_get(ranges, r);
        uint32_t last = (uint32_t)json_integer_value(json_array_get(range, 1));
        for (uint32_t code = (uint32_t)json_integer_value(json_array_get(range, 0)); code <= last; code++) {
            char text[64];
            size_t bytes = golden_character_text(text, code);
            int32_t *ids;
            int n;
            REQUIRE(tokenizer_encode(t, text, bytes, true, false, &ids, &n));
            h = golden_fnv(h, ids, n);
            total += n;
            free(ids);
        }
    }
    CHECK(total == json_integer_value(json_object_get(row, "every_n")), "%s: %lld ids", name, (long long)total);
    CHECK(golden_hash_is(json_object_get(row, "every_fnv"), h), "%s: ids of every character", name);
}

static inline void golden_check_row(const struct tokenizer *t, const char *name, const json_t *golden, const json_t *row) {
    const json_t *texts = json_object_get(json_object_get(golden, "smollm2"), "cases"), *cases = json_object_get(row, "cases");
    CHECK(json_array_size(cases) > 150, "%s", name);
    for (size_t i = 0; i < json_array_size(cases); i++)
        golden_check_case(t, name, json_array_get(cases, i), texts);
    golden_check_every(t, name, row, json_object_get(golden, "ranges"));
}
