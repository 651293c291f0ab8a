/* A new field is one line of the table. Whatever the table does not know is an error: a field that is silently ignored is a
 * wrong answer. */
#include "launch/openai_fields.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COMPLETION = 1 << OPENAI_COMPLETION, CHAT = 1 << OPENAI_CHAT, BOTH = COMPLETION | CHAT, SHOWN = 60 };

enum field_type {
    FIELD_INT,     /* an int */
    FIELD_WIDE,    /* an int64_t */
    FIELD_FLOAT,
    FIELD_BOOL,
    FIELD_STRING,  /* borrowed, into the reader */
    FIELD_VALUE,   /* the JSON value as it is, into the reader */
    FIELD_READ,    /* by a function */
    FIELD_NO_EFFECT,
    FIELD_UNSUPPORTED,
};

struct field {
    const char *name;
    int kinds;
    enum field_type type;
    bool of_row;               /* `offset` is one of openai_row's, else of openai_reader's */
    size_t offset;
    double min, max;
    bool above_min;            /* min itself is out */
    int (*read)(struct openai_reader *reader, json_t *value);
    json_type json;            /* FIELD_NO_EFFECT: the type it must have */
    const char *harmless;      /* FIELD_UNSUPPORTED: JSON values that ask for nothing, separated by spaces */
};

static const char *type_name(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "a list";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: return "an integer";
    case JSON_REAL: return "a number with a fraction";
    case JSON_TRUE: case JSON_FALSE: return "a boolean";
    case JSON_NULL: break;
    }
    return "null";
}

int openai_expected(const char *field, const char *expected, const struct json_t *got) {
    char text[SHOWN + 1] = "";
    if (json_is_number(got) || json_is_string(got) || json_is_boolean(got)) {
        char *whole = json_dumps(got, JSON_ENCODE_ANY);
        size_t n = whole ? strlen(whole) : 0;
        snprintf(text, sizeof text, " %.*s%s", SHOWN - 4, whole ? whole : "", n > SHOWN - 4 ? "..." : "");
        free(whole);
    }
    FAIL(STATUS_INPUT, "%s: expected %s, got %s%s", field, expected, type_name(got), text);
}

static int field_range(const struct field *field, const json_t *value) {
    char expected[96];
    const char *what = field->type == FIELD_FLOAT ? "a number" : "an integer";
    bool typed = field->type == FIELD_FLOAT ? json_is_number(value) : json_is_integer(value);
    double number = json_number_value(value);
    if (typed && number >= field->min && number <= field->max && !(field->above_min && number == field->min))
        return 0;
    if (!typed && isinf(field->max))
        snprintf(expected, sizeof expected, "%s", what);
    else if (isinf(field->max))
        snprintf(expected, sizeof expected, "%s of at least %g", what, field->min);
    else
        snprintf(expected, sizeof expected, "%s %s %g %s %g", what, field->above_min ? "above" : "from", field->min,
                 field->above_min ? "up to" : "to", field->max);
    return openai_expected(field->name, expected, value);
}

/* ---- fields with a form of their own ---------------------------------------------------------------------------------- */

static int read_model(struct openai_reader *reader, json_t *value) {
    const char *text = json_string_value(value);
    if (!text)
        return openai_expected("model", "a string", value);
    reader->row->model = strdup(text);
    if (!reader->row->model)
        FAIL(STATUS_MEMORY, "no memory for a model's name");
    return 0;
}

static int read_seed(struct openai_reader *reader, json_t *value) {
    if (!json_is_integer(value))
        return openai_expected("seed", "an integer", value);
    reader->seeded = true;
    reader->seed = json_integer_value(value);
    return 0;
}

static int read_stop_text(struct openai_row *row, const char *name, const json_t *value) {
    const char *text = json_string_value(value);
    if (!text || !*text)
        return openai_expected(name, "a string that is not empty", value);
    if (strlen(text) != json_string_length(value))
        FAIL(STATUS_INPUT, "%s: a stop string cannot hold the character U+0000", name);
    row->stop[row->n_stop] = strdup(text);
    if (!row->stop[row->n_stop])
        FAIL(STATUS_MEMORY, "no memory for a stop string");
    row->n_stop++;
    return 0;
}

/* OpenAI takes up to four stop strings; here any number. An empty list is none. */
static int read_stop(struct openai_reader *reader, json_t *value) {
    char name[32];
    if (!json_is_string(value) && !json_is_array(value))
        return openai_expected("stop", "a string or a list of strings", value);
    TRY(base_alloc(&reader->row->stop, json_is_array(value) ? json_array_size(value) : 1, sizeof *reader->row->stop));
    if (json_is_string(value))
        return read_stop_text(reader->row, "stop", value);
    for (size_t i = 0; i < json_array_size(value); i++) {
        snprintf(name, sizeof name, "stop[%zu]", i);
        TRY(read_stop_text(reader->row, name, json_array_get(value, i)));
    }
    return 0;
}

static int read_bias_entry(struct openai_reader *reader, const char *key, const json_t *value) {
    struct openai_row *row = reader->row;
    char name[SHOWN], *end;
    long id = strtol(key, &end, 10);
    if (*key < '0' || *key > '9' || *end || id >= reader->context->vocab)
        FAIL(STATUS_INPUT, "logit_bias: expected token ids from 0 to %d as names, got \"%.*s\"", reader->context->vocab - 1, SHOWN,
             key);
    snprintf(name, sizeof name, "logit_bias[\"%ld\"]", id);
    if (!json_is_number(value) || !(fabs(json_number_value(value)) <= 100.0))
        return openai_expected(name, "a number from -100 to 100", value);
    for (int i = 0; i < row->n_bias; i++) {
        if (row->bias_id[i] == id)
            FAIL(STATUS_INPUT, "logit_bias: token id %ld is given twice", id);
    }
    row->bias_id[row->n_bias] = (int32_t)id;
    row->bias[row->n_bias++] = (float)json_number_value(value);
    return 0;
}

static int read_logit_bias(struct openai_reader *reader, json_t *value) {
    const char *key;
    json_t *entry;
    if (!json_is_object(value))
        return openai_expected("logit_bias", "an object", value);
    if (json_object_size(value) > OPENAI_MAX_BIAS)
        FAIL(STATUS_INPUT, "logit_bias: expected at most %d entries, got %zu", OPENAI_MAX_BIAS, json_object_size(value));
    TRY(base_alloc(&reader->row->bias_id, json_object_size(value), sizeof *reader->row->bias_id));
    TRY(base_alloc(&reader->row->bias, json_object_size(value), sizeof *reader->row->bias));
    json_object_foreach(value, key, entry)
        TRY(read_bias_entry(reader, key, entry));
    return 0;
}

static int read_response_format(struct openai_reader *reader, json_t *value) {
    const char *type = json_string_value(json_object_get(value, "type"));
    if (type && strcmp(type, "text") == 0 && json_object_size(value) == 1)
        return 0;
    if (!json_is_object(value) || !type)
        return openai_expected("response_format", "an object with a type", value);
    reader->code = "unsupported";
    FAIL(STATUS_INPUT, "response_format: only {\"type\": \"text\"} is supported, got type \"%.*s\"", SHOWN, type);
}

/* ---- the table -------------------------------------------------------------------------------------------------------- */

#define IN_ROW(member) .of_row = true, .offset = offsetof(struct openai_row, member)
#define IN_READER(member) .offset = offsetof(struct openai_reader, member)
#define UNSUPPORTED(field, where, values) {.name = field, .kinds = where, .type = FIELD_UNSUPPORTED, .harmless = values}
#define NO_EFFECT(field, type_of_value) {.name = field, .kinds = BOTH, .type = FIELD_NO_EFFECT, .json = type_of_value}

static const struct field field_table[] = {
    {.name = "prompt", .kinds = COMPLETION, .type = FIELD_VALUE, IN_READER(prompt)},
    {.name = "messages", .kinds = CHAT, .type = FIELD_VALUE, IN_READER(messages)},
    {.name = "model", .kinds = BOTH, .type = FIELD_READ, .read = read_model},
    {.name = "max_tokens", .kinds = BOTH, .type = FIELD_WIDE, IN_READER(max_tokens), .max = INT32_MAX},
    {.name = "max_completion_tokens", .kinds = CHAT, .type = FIELD_WIDE, IN_READER(max_completion_tokens), .max = INT32_MAX},
    {.name = "temperature", .kinds = BOTH, .type = FIELD_FLOAT, IN_ROW(temperature), .max = 2},
    {.name = "top_p", .kinds = BOTH, .type = FIELD_FLOAT, IN_ROW(top_p), .max = 1},
    {.name = "n", .kinds = BOTH, .type = FIELD_INT, IN_ROW(n), .min = 1, .max = OPENAI_MAX_CHOICES},
    {.name = "best_of", .kinds = COMPLETION, .type = FIELD_WIDE, IN_READER(best_of), .min = 1, .max = OPENAI_MAX_CHOICES},
    {.name = "seed", .kinds = BOTH, .type = FIELD_READ, .read = read_seed},
    {.name = "stop", .kinds = BOTH, .type = FIELD_READ, .read = read_stop},
    {.name = "presence_penalty", .kinds = BOTH, .type = FIELD_FLOAT, IN_ROW(presence_penalty), .min = -2, .max = 2},
    {.name = "frequency_penalty", .kinds = BOTH, .type = FIELD_FLOAT, IN_ROW(frequency_penalty), .min = -2, .max = 2},
    {.name = "repetition_penalty", .kinds = BOTH, .type = FIELD_FLOAT, IN_ROW(repetition_penalty), .max = 10, .above_min = true},
    {.name = "logit_bias", .kinds = BOTH, .type = FIELD_READ, .read = read_logit_bias},
    {.name = "top_k", .kinds = BOTH, .type = FIELD_INT, IN_ROW(top_k), .min = -1, .max = INT32_MAX},
    {.name = "min_p", .kinds = BOTH, .type = FIELD_FLOAT, IN_ROW(min_p), .max = 1},
    {.name = "ignore_eos", .kinds = BOTH, .type = FIELD_BOOL, IN_ROW(ignore_eos)},
    {.name = "return_token_ids", .kinds = BOTH, .type = FIELD_BOOL, IN_ROW(return_token_ids)},
    {.name = "prefill", .kinds = BOTH, .type = FIELD_STRING, IN_READER(prefill)},
    {.name = "echo", .kinds = COMPLETION, .type = FIELD_BOOL, IN_ROW(echo)},
    {.name = "logprobs", .kinds = COMPLETION, .type = FIELD_WIDE, IN_READER(logprobs), .max = OPENAI_MAX_TOP},
    {.name = "logprobs", .kinds = CHAT, .type = FIELD_BOOL, IN_READER(chat_logprobs)},
    {.name = "top_logprobs", .kinds = CHAT, .type = FIELD_WIDE, IN_READER(top_logprobs), .max = OPENAI_MAX_TOP},
    {.name = "response_format", .kinds = BOTH, .type = FIELD_READ, .read = read_response_format},
    NO_EFFECT("user", JSON_STRING),
    NO_EFFECT("metadata", JSON_OBJECT),
    NO_EFFECT("store", JSON_TRUE),
    NO_EFFECT("service_tier", JSON_STRING),
    UNSUPPORTED("stream", BOTH, "false"),
    UNSUPPORTED("stream_options", BOTH, ""),
    UNSUPPORTED("suffix", COMPLETION, "\"\""),
    UNSUPPORTED("tools", CHAT, "[]"),
    UNSUPPORTED("tool_choice", CHAT, "\"none\""),
    UNSUPPORTED("parallel_tool_calls", CHAT, "true false"),
    UNSUPPORTED("functions", CHAT, "[]"),
    UNSUPPORTED("function_call", CHAT, "\"none\""),
    UNSUPPORTED("modalities", CHAT, "[\"text\"]"),
    UNSUPPORTED("audio", CHAT, ""),
    UNSUPPORTED("prediction", CHAT, ""),
    UNSUPPORTED("reasoning_effort", CHAT, "\"none\""),
    UNSUPPORTED("verbosity", CHAT, ""),
    UNSUPPORTED("web_search_options", CHAT, ""),
    UNSUPPORTED("moderation", CHAT, ""),
    UNSUPPORTED("safety_identifier", CHAT, ""),
    UNSUPPORTED("prompt_cache_key", CHAT, ""),
    UNSUPPORTED("prompt_cache_retention", CHAT, ""),
};

enum { FIELD_COUNT = sizeof field_table / sizeof field_table[0] };

/* ---- one field -------------------------------------------------------------------------------------------------------- */

static int field_unsupported(struct openai_reader *reader, const struct field *field, const json_t *value) {
    char *text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
    if (!text)
        FAIL(STATUS_MEMORY, "no memory for the value of %s", field->name);
    size_t n = strlen(text);
    bool harmless = false;
    for (const char *at = field->harmless; *at && !harmless; at += strcspn(at, " "), at += *at == ' ')
        harmless = strcspn(at, " ") == n && memcmp(at, text, n) == 0;
    if (!harmless) {
        reader->code = "unsupported";
        base_fail(STATUS_INPUT, __FILE__, __LINE__, "%s: not supported (got %.*s%s)", field->name, SHOWN, text,
                  n > SHOWN ? "..." : "");
    }
    free(text);
    return harmless ? 0 : STATUS_INPUT;
}

static int field_no_effect(const struct field *field, const json_t *value) {
    if (json_typeof(value) == field->json || (field->json == JSON_TRUE && json_is_boolean(value)))
        return 0;
    return openai_expected(field->name, field->json == JSON_STRING ? "a string" : field->json == JSON_OBJECT ? "an object" : "a boolean",
                           value);
}

static int field_set(struct openai_reader *reader, const struct field *field, json_t *value) {
    char *to = (field->of_row ? (char *)reader->row : (char *)reader) + field->offset;
    switch (field->type) {
    case FIELD_INT:
        TRY(field_range(field, value));
        *(int *)(void *)to = (int)json_integer_value(value);
        return 0;
    case FIELD_WIDE:
        TRY(field_range(field, value));
        *(int64_t *)(void *)to = json_integer_value(value);
        return 0;
    case FIELD_FLOAT:
        TRY(field_range(field, value));
        *(float *)(void *)to = (float)json_number_value(value);
        return 0;
    case FIELD_BOOL:
        if (!json_is_boolean(value))
            return openai_expected(field->name, "true or false", value);
        *(bool *)(void *)to = json_is_true(value);
        return 0;
    case FIELD_STRING:
        if (!json_is_string(value))
            return openai_expected(field->name, "a string", value);
        *(const char **)(void *)to = json_string_value(value);
        return 0;
    case FIELD_VALUE:
        *(const json_t **)(void *)to = value;
        return 0;
    case FIELD_READ:
        return field->read(reader, value);
    case FIELD_NO_EFFECT:
        return field_no_effect(field, value);
    case FIELD_UNSUPPORTED:
        return field_unsupported(reader, field, value);
    }
    return 0;
}

int openai_fields_read(struct openai_reader *reader, struct json_t *body) {
    static const char *const urls[] = {"/v1/completions", "/v1/chat/completions"};
    const char *key;
    json_t *value;
    json_object_foreach(body, key, value) {
        const struct field *field = NULL;
        bool elsewhere = false;
        for (int i = 0; i < FIELD_COUNT && !field; i++) {
            bool named = strcmp(field_table[i].name, key) == 0;
            if (named && (field_table[i].kinds & 1 << reader->row->kind))
                field = &field_table[i];
            elsewhere = elsewhere || named;
        }
        if (!field && !(elsewhere && json_is_null(value))) {
            reader->code = "unknown_field";
            FAIL(STATUS_INPUT, "%.*s: %s %s", SHOWN, key, elsewhere ? "not a field of" : "unknown field of", urls[reader->row->kind]);
        }
        if (field && !json_is_null(value))
            TRY(field_set(reader, field, value));
    }
    return 0;
}
