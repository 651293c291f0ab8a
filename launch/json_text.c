/* The buffer doubles; a failure sticks, so that writers need one check at the end. */
#include "launch/json_text.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/utf8.h"

enum { JSON_TEXT_FIRST = 1024, JSON_TEXT_NUMBER = 48 };
static const double json_text_lowest = -9999.0; /* what OpenAI's service gives for log(0) */

void json_text_deinit(struct json_text *json) {
    free(json->text);
    *json = (struct json_text){0};
}

static void json_text_add(struct json_text *json, const char *text, size_t bytes) {
    if (json->status < 0)
        return;
    if (json->bytes + bytes + 1 > json->capacity) {
        size_t capacity = json->capacity ? json->capacity : JSON_TEXT_FIRST;
        while (capacity < json->bytes + bytes + 1)
            capacity *= 2;
        char *grown = realloc(json->text, capacity);
        if (!grown) {
            json->status = base_fail(STATUS_MEMORY, __FILE__, __LINE__, "no memory for an answer of %zu bytes", capacity);
            return;
        }
        json->text = grown;
        json->capacity = capacity;
    }
    memcpy(json->text + json->bytes, text, bytes);
    json->bytes += bytes;
    json->text[json->bytes] = '\0';
}

void json_text_raw(struct json_text *json, const char *text) { json_text_add(json, text, strlen(text)); }

/* What stands for a byte below 0x20, a quote or a backslash. */
static void json_text_escape(struct json_text *json, uint8_t c) {
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    char escape[8];
    const char *known = c ? strchr(from, c) : NULL;
    if (known)
        snprintf(escape, sizeof escape, "\\%c", to[known - from]);
    else
        snprintf(escape, sizeof escape, "\\u%04x", c);
    json_text_raw(json, escape);
}

void json_text_escaped(struct json_text *json, const char *text, size_t bytes) {
    size_t plain = 0; /* start of what can be copied as it is */
    for (size_t at = 0, step; at < bytes; at += step) {
        uint8_t c = (uint8_t)text[at];
        step = 1;
        bool escape = c < 0x20 || c == '"' || c == '\\';
        bool invalid = c >= 0x80 && utf8_next(text + at, bytes - at, &step) != UTF8_CHAR;
        if (!escape && !invalid)
            continue;
        json_text_add(json, text + plain, at - plain);
        if (escape)
            json_text_escape(json, c);
        else
            json_text_add(json, utf8_replacement, UTF8_REPLACEMENT_BYTES);
        plain = at + step;
    }
    json_text_add(json, text + plain, bytes - plain);
}

void json_text_string(struct json_text *json, const char *text, size_t bytes) {
    json_text_raw(json, "\"");
    json_text_escaped(json, text, bytes);
    json_text_raw(json, "\"");
}

void json_text_int(struct json_text *json, int64_t value) {
    char number[JSON_TEXT_NUMBER];
    snprintf(number, sizeof number, "%" PRId64, value);
    json_text_raw(json, number);
}

void json_text_logprob(struct json_text *json, float value) {
    char number[JSON_TEXT_NUMBER];
    double clamped = isfinite(value) && value >= json_text_lowest ? (double)value : json_text_lowest;
    snprintf(number, sizeof number, "%.9g", clamped);
    json_text_raw(json, number);
}

void json_text_seconds(struct json_text *json, double value) {
    char number[JSON_TEXT_NUMBER];
    snprintf(number, sizeof number, "%.6f", isfinite(value) ? value : 0.0);
    json_text_raw(json, number);
}
