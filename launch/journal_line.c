/* Lines of the output file: written, and known again. Reading takes the short way for lines as they are written here, since one
 * may be 100 MB of log-probabilities: fixed beginning and end, and no control character between them (a block that never reached the
 * disk reads as zeros). Lines that another program has put into another form of the same JSON are parsed. */
#include "launch/journal_line.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define LINE_ID "{\"id\":\""
#define LINE_NAME "\",\"custom_id\":"
#define LINE_ANSWER ",\"response\":{\"status_code\":200,\"request_id\":\""
#define LINE_BODY "\",\"body\":"
#define LINE_ANSWER_END "},\"error\":null}"
#define LINE_ERROR ",\"response\":null,\"error\":{\"code\":"
#define LINE_MESSAGE ",\"message\":"
#define LINE_ERROR_END "}}"

static void line_name(struct json_text *line, const char *id, const char *custom_id) {
    json_text_raw(line, LINE_ID);
    json_text_raw(line, id);
    json_text_raw(line, LINE_NAME);
    json_text_string(line, custom_id, strlen(custom_id));
}

void journal_line_begin(struct json_text *line, const char *id, const char *custom_id) {
    line_name(line, id, custom_id);
    json_text_raw(line, LINE_ANSWER);
    json_text_raw(line, id);
    json_text_raw(line, LINE_BODY);
}

void journal_line_end(struct json_text *line) { json_text_raw(line, LINE_ANSWER_END "\n"); }

void journal_line_error(struct json_text *line, const char *id, const char *custom_id, const char *code, const char *message) {
    line_name(line, id, custom_id);
    json_text_raw(line, LINE_ERROR);
    json_text_string(line, code, strlen(code));
    json_text_raw(line, LINE_MESSAGE);
    json_text_string(line, message, strlen(message));
    json_text_raw(line, LINE_ERROR_END "\n");
}

static bool id_is_ours(const char *id) {
    return strncmp(id, "kv-", 3) == 0 && strspn(id + 3, "0123456789abcdef") == JOURNAL_ID_BYTES - 4;
}

static int entry_set(struct journal_entry *out, const char *id, const char *custom_id, bool failed) {
    memcpy(out->id, id, JOURNAL_ID_BYTES - 1);
    out->id[JOURNAL_ID_BYTES - 1] = '\0';
    out->failed = failed;
    out->custom_id = strdup(custom_id);
    if (!out->custom_id)
        FAIL(STATUS_MEMORY, "no memory for a row's name");
    return 1;
}

/* Whether text at *at begins with `word`, which is then passed over. */
static bool line_take(const char *text, size_t bytes, size_t *at, const char *word) {
    size_t n = strlen(word);
    if (bytes - *at < n || memcmp(text + *at, word, n) != 0)
        return false;
    *at += n;
    return true;
}

static bool line_ends(const char *text, size_t bytes, size_t from, const char *word) {
    size_t n = strlen(word);
    return bytes - from >= n && memcmp(text + bytes - n, word, n) == 0;
}

/* 1: a line as written here; 0: not one. */
static int line_read_own(const char *text, size_t bytes, struct journal_entry *out) {
    size_t at = 0, id_bytes = JOURNAL_ID_BYTES - 1;
    for (size_t i = 0; i < bytes; i++) {
        if ((uint8_t)text[i] < 0x20)
            return 0;
    }
    if (!line_take(text, bytes, &at, LINE_ID) || bytes - at < id_bytes || !id_is_ours(text + at))
        return 0;
    const char *id = text + at;
    at += id_bytes;
    if (!line_take(text, bytes, &at, LINE_NAME "\""))
        return 0;
    size_t name = at - 1;
    while (at < bytes && text[at] != '"')
        at += text[at] == '\\' ? 2 : 1;
    if (at++ >= bytes)
        return 0;
    size_t name_end = at;
    bool failed = line_take(text, bytes, &at, LINE_ERROR);
    if (failed ? !line_ends(text, bytes, at, LINE_ERROR_END)
               : !line_take(text, bytes, &at, LINE_ANSWER) || !line_ends(text, bytes, at, LINE_ANSWER_END))
        return 0;
    json_t *custom_id = json_loadb(text + name, name_end - name, JSON_DECODE_ANY, NULL);
    int status = custom_id ? entry_set(out, id, json_string_value(custom_id), failed) : 0;
    json_decref(custom_id);
    return status;
}

static int line_read_any(const char *text, size_t bytes, struct journal_entry *out) {
    json_t *json = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, NULL);
    const char *id = json_string_value(json_object_get(json, "id"));
    const char *custom_id = json_string_value(json_object_get(json, "custom_id"));
    bool answered = json_is_object(json_object_get(json, "response")) && json_is_null(json_object_get(json, "error"));
    bool failed = json_is_null(json_object_get(json, "response")) && json_is_object(json_object_get(json, "error"));
    bool ours = id && id_is_ours(id) && strlen(id) == JOURNAL_ID_BYTES - 1 && custom_id && (answered || failed);
    int status = ours ? entry_set(out, id, custom_id, failed) : 0;
    json_decref(json);
    return status;
}

int journal_line_read(const char *text, size_t bytes, struct journal_entry *out) {
    int status = line_read_own(text, bytes, out);
    return status ? status : line_read_any(text, bytes, out);
}

bool journal_line_is_cut(const char *text, size_t bytes) {
    static const char begin[] = LINE_ID "kv-";
    size_t n = sizeof begin - 1;
    while (bytes > 0 && text[bytes - 1] == '\0')
        bytes--;
    return memcmp(text, begin, bytes < n ? bytes : n) == 0;
}
