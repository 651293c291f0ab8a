/* The JSON of one row: its name, and the digest that tells whether a finished row is still the same row. */
#include <errno.h>
#include <jansson.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launch/openai.h"

_Static_assert(OPENAI_DIGEST_BYTES == SHA256_DIGEST_LENGTH, "a digest is a SHA-256");

/* The row's custom_id if it can serve as a name: a string that is not empty and holds no NUL. */
static const char *item_custom_id(const json_t *json) {
    const json_t *value = json_object_get(json, "custom_id");
    const char *text = json_string_value(value);
    return text && *text && strlen(text) == json_string_length(value) ? text : NULL;
}

/* Of a JSON row: its canonical form with the name in it. */
static int item_digest_json(struct openai_item *item) {
    json_t *named = json_copy(item->json);
    char *text = NULL;
    if (named && json_object_set_new(named, "custom_id", json_string(item->custom_id)) == 0)
        text = json_dumps(named, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(named);
    if (!text)
        FAIL(STATUS_MEMORY, "no memory for the canonical form of row %s", item->custom_id);
    SHA256((const unsigned char *)text, strlen(text), item->digest);
    free(text);
    return 0;
}

/* Of text that is no JSON object: the name, a NUL, the bytes. */
static int item_digest_text(struct openai_item *item, const char *text, size_t bytes) {
    size_t name_bytes = strlen(item->custom_id) + 1;
    unsigned char *all = NULL;
    TRY(base_alloc(&all, name_bytes + bytes, 1));
    memcpy(all, item->custom_id, name_bytes);
    memcpy(all + name_bytes, text, bytes);
    SHA256(all, name_bytes + bytes, item->digest);
    free(all);
    return 0;
}

static int item_name(struct openai_item *item, const char *name) {
    const char *own = item->json ? item_custom_id(item->json) : NULL;
    item->custom_id = strdup(own ? own : name);
    if (!item->custom_id)
        FAIL(STATUS_MEMORY, "no memory for the name of a row");
    return 0;
}

int openai_item_wrap(struct json_t *body, const char *name, struct openai_item *out) {
    int status;
    *out = (struct openai_item){.json = json_incref(body)};
    TRY_GOTO(item_name(out, name));
    TRY_GOTO(item_digest_json(out));
    return 0;
fail:
    openai_item_deinit(out);
    return status;
}

int openai_item_read(const char *text, size_t bytes, const char *name, struct openai_item *out) {
    json_error_t error;
    char problem[sizeof error.text + 96];
    int status;
    *out = (struct openai_item){0};
    json_t *json = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
    if (!json && json_error_code(&error) == json_error_out_of_memory)
        FAIL(STATUS_MEMORY, "no memory for a row of %zu bytes", bytes);
    if (json_is_object(json)) {
        out->json = json;
    } else {
        if (json)
            snprintf(problem, sizeof problem, "expected a JSON object");
        else
            snprintf(problem, sizeof problem, "not JSON: %s (character %d)", error.text, error.position);
        json_decref(json);
        out->problem = strdup(problem);
        if (!out->problem)
            FAIL_GOTO(STATUS_MEMORY, "no memory for a message");
    }
    TRY_GOTO(item_name(out, name));
    TRY_GOTO(out->json ? item_digest_json(out) : item_digest_text(out, text, bytes));
    return 0;
fail:
    openai_item_deinit(out);
    return status;
}

void openai_item_deinit(struct openai_item *item) {
    json_decref(item->json);
    free(item->problem);
    free(item->custom_id);
    *item = (struct openai_item){0};
}

void openai_id(const uint8_t digest[OPENAI_DIGEST_BYTES], const char *settings, char id[OPENAI_ID_BYTES]) {
    uint8_t of_settings[2 * OPENAI_DIGEST_BYTES], all[OPENAI_DIGEST_BYTES];
    memcpy(of_settings, digest, OPENAI_DIGEST_BYTES);
    SHA256((const unsigned char *)settings, strlen(settings), of_settings + OPENAI_DIGEST_BYTES);
    SHA256(of_settings, sizeof of_settings, all);
    uint64_t head = 0;
    for (int i = 0; i < 8; i++)
        head = head << 8 | all[i];
    snprintf(id, OPENAI_ID_BYTES, "kv-%016llx", (unsigned long long)head);
}
