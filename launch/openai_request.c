/* One row to a checked openai_row: the batch envelope, the prompt or the messages, what the fields mean together. */
#include <float.h>
#include <jansson.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launch/openai.h"
#include "launch/openai_fields.h"

enum { DEFAULT_MAX_TOKENS = 16, NAME_BYTES = 48, SHOWN = 60 }; /* 16: OpenAI's for completions */

static void row_init(struct openai_row *row) {
    *row = (struct openai_row){.n = 1, .temperature = 1, .top_p = 1, .repetition_penalty = 1, .logprobs = -1};
}

void openai_row_deinit(struct openai_row *row) {
    for (int i = 0; i < row->n_stop; i++)
        free(row->stop[i]);
    free(row->stop);
    free(row->model);
    free(row->prompt);
    free(row->stop_id);
    free(row->bias_id);
    free(row->bias);
    row_init(row);
}

bool openai_row_scores_prompt(const struct openai_row *row) { return row->echo && row->logprobs >= 0; }

/* ---- the envelope ----------------------------------------------------------------------------------------------------- */

static bool row_gives(const json_t *json, const char *name) {
    const json_t *value = json_object_get(json, name);
    return value && !json_is_null(value);
}

static int row_kind_of_url(const json_t *url, enum openai_kind *kind) {
    static const char *const urls[] = {"/v1/completions", "/v1/chat/completions"};
    const char *text = json_string_value(url);
    for (int i = 0; text && i < 2; i++) {
        if (strcmp(text, urls[i]) == 0) {
            *kind = i == 0 ? OPENAI_COMPLETION : OPENAI_CHAT;
            return 0;
        }
    }
    if (!url || json_is_null(url))
        FAIL(STATUS_INPUT, "url: missing, expected \"%s\" or \"%s\"", urls[0], urls[1]);
    return openai_expected("url", "\"/v1/completions\" or \"/v1/chat/completions\"", url);
}

/* OpenAI's batch form. */
static int row_open_envelope(struct openai_reader *reader, const struct openai_item *item, json_t **body) {
    static const char *const names[] = {"custom_id", "method", "url", "body"};
    const char *key;
    json_t *value;
    json_object_foreach(item->json, key, value) {
        bool known = false;
        for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
            known = known || strcmp(key, names[i]) == 0;
        if (!known) {
            reader->code = "unknown_field";
            FAIL(STATUS_INPUT, "%.*s: unknown field beside \"body\"", SHOWN, key);
        }
    }
    const json_t *method = json_object_get(item->json, "method");
    if (method && !json_is_null(method) && (!json_is_string(method) || strcmp(json_string_value(method), "POST") != 0))
        return openai_expected("method", "\"POST\"", method);
    TRY(row_kind_of_url(json_object_get(item->json, "url"), &reader->row->kind));
    json_t *given = json_object_get(item->json, "body");
    if (!row_gives(item->json, "body"))
        FAIL(STATUS_INPUT, "body: missing");
    if (!json_is_object(given))
        return openai_expected("body", "an object", given);
    *body = json_incref(given);
    return 0;
}

/* The body alone: what it holds says what it is. */
static int row_open_body(struct openai_reader *reader, const struct openai_item *item, json_t **body) {
    bool prompt = row_gives(item->json, "prompt"), messages = row_gives(item->json, "messages");
    if (prompt == messages)
        FAIL(STATUS_INPUT, "expected either \"prompt\" or \"messages\", got %s", prompt ? "both" : "none");
    reader->row->kind = messages ? OPENAI_CHAT : OPENAI_COMPLETION;
    *body = json_copy(item->json);
    if (!*body)
        FAIL(STATUS_MEMORY, "no memory for a row");
    json_object_del(*body, "custom_id");
    return 0;
}

static int row_open(struct openai_reader *reader, const struct openai_item *item, json_t **body) {
    if (!item->json) {
        reader->code = "invalid_json";
        FAIL(STATUS_INPUT, "%s", item->problem);
    }
    const json_t *custom_id = json_object_get(item->json, "custom_id");
    const char *text = json_string_value(custom_id);
    if (custom_id && !json_is_null(custom_id) && (!text || !*text))
        return openai_expected("custom_id", "a string that is not empty", custom_id);
    if (text && strlen(text) != json_string_length(custom_id))
        FAIL(STATUS_INPUT, "custom_id: cannot hold the character U+0000");
    bool envelope = row_gives(item->json, "body") || row_gives(item->json, "url") || row_gives(item->json, "method");
    return envelope ? row_open_envelope(reader, item, body) : row_open_body(reader, item, body);
}

/* ---- prompt ----------------------------------------------------------------------------------------------------------- */

static int prompt_encode(struct openai_reader *reader, const char *text, size_t bytes, bool add_special) {
    struct openai_row *row = reader->row;
    const struct tokenizer *tokenizer = reader->context->tokenizer;
    size_t at = 0;
    if (!tokenizer)
        FAIL(STATUS_INPUT, "prompt: the model has no tokenizer, expected a list of token ids");
    TRY(tokenizer_encode(tokenizer, text, bytes, true, add_special, &row->prompt, &row->n_prompt));
    if (!add_special)
        return 0;
    for (int i = 0; i < row->n_prompt && tokenizer_is_special(tokenizer, row->prompt[i]); i++) {
        size_t token_bytes;
        const char *token = tokenizer_token(tokenizer, row->prompt[i], &token_bytes);
        if (token_bytes <= bytes - at && memcmp(token, text + at, token_bytes) == 0)
            return 0; /* the text's own */
        row->n_added = i + 1;
    }
    return 0;
}

static int prompt_ids(struct openai_reader *reader, const json_t *list) {
    struct openai_row *row = reader->row;
    char name[NAME_BYTES], expected[NAME_BYTES];
    size_t n = json_array_size(list);
    if (n > INT32_MAX)
        FAIL(STATUS_INPUT, "prompt: %zu token ids are too many", n);
    TRY(base_alloc(&row->prompt, n, sizeof *row->prompt));
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(list, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= reader->context->vocab) {
            snprintf(name, sizeof name, "prompt[%zu]", i);
            snprintf(expected, sizeof expected, "a token id from 0 to %d", reader->context->vocab - 1);
            return openai_expected(name, expected, id);
        }
        row->prompt[i] = (int32_t)json_integer_value(id);
    }
    row->n_prompt = (int)n;
    return 0;
}

/* Text, a list of token ids, or a list of one of these. */
static int prompt_read(struct openai_reader *reader) {
    const json_t *prompt = reader->prompt;
    const json_t *first = json_array_get(prompt, 0);
    if (!prompt)
        FAIL(STATUS_INPUT, "prompt: missing");
    if (json_is_string(first) || json_is_array(first)) {
        if (json_array_size(prompt) > 1) {
            reader->code = "unsupported";
            FAIL(STATUS_INPUT, "prompt: one prompt a row is supported, got a list of %zu", json_array_size(prompt));
        }
        prompt = first;
    }
    if (json_is_string(prompt))
        TRY(prompt_encode(reader, json_string_value(prompt), json_string_length(prompt), true));
    else if (json_is_array(prompt))
        TRY(prompt_ids(reader, prompt));
    else
        return openai_expected("prompt", "text or a list of token ids", prompt);
    if (reader->row->n_prompt == 0)
        FAIL(STATUS_INPUT, "prompt: expected at least one token, got none");
    return 0;
}

/* ---- messages --------------------------------------------------------------------------------------------------------- */

/* A message's text: a string, or a list of {"type": "text", "text": ...}, joined. *text is malloced. */
static int message_content(struct openai_reader *reader, const char *name, const json_t *content, char **text) {
    struct json_text joined = {0};
    const json_t *part;
    size_t i;
    if (!json_is_string(content) && !json_is_array(content))
        return content ? openai_expected(name, "a string or a list of text parts", content)
                       : base_fail(STATUS_INPUT, __FILE__, __LINE__, "%s: missing", name);
    json_text_raw(&joined, json_is_string(content) ? json_string_value(content) : "");
    size_t bytes = json_is_string(content) ? json_string_length(content) : 0;
    json_array_foreach(content, i, part) {
        const json_t *own = json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!type || strcmp(type, "text") != 0 || !json_is_string(own) || json_object_size(part) != 2) {
            reader->code = type && strcmp(type, "text") != 0 ? "unsupported" : reader->code;
            json_text_deinit(&joined);
            FAIL(STATUS_INPUT, "%s[%zu]: expected {\"type\": \"text\", \"text\": ...}, got %s %.*s", name, i, type ? "type" : "no type",
                 SHOWN, type ? type : "");
        }
        json_text_raw(&joined, json_string_value(own));
        bytes += json_string_length(own);
    }
    if (joined.status < 0)
        return joined.status;
    if (joined.bytes != bytes) {
        json_text_deinit(&joined);
        FAIL(STATUS_INPUT, "%s: cannot hold the character U+0000", name);
    }
    *text = joined.text;
    return 0;
}

static int message_read(struct openai_reader *reader, int index, json_t *json, struct chat_message *message) {
    char name[NAME_BYTES], *text = NULL;
    const char *key;
    json_t *value;
    snprintf(name, sizeof name, "messages[%d]", index);
    if (!json_is_object(json))
        return openai_expected(name, "an object", json);
    json_object_foreach(json, key, value) {
        if (strcmp(key, "role") != 0 && strcmp(key, "content") != 0 && !json_is_null(value)) {
            reader->code = "unsupported";
            FAIL(STATUS_INPUT, "%s.%.*s: not supported", name, SHOWN, key);
        }
    }
    snprintf(name, sizeof name, "messages[%d].role", index);
    message->role = json_string_value(json_object_get(json, "role"));
    if (!message->role)
        return json_object_get(json, "role") ? openai_expected(name, "a string", json_object_get(json, "role"))
                                             : base_fail(STATUS_INPUT, __FILE__, __LINE__, "%s: missing", name);
    snprintf(name, sizeof name, "messages[%d].content", index);
    TRY(message_content(reader, name, json_object_get(json, "content"), &text));
    message->content = text;
    return 0;
}

static void messages_free(struct chat_message *messages, int n) {
    for (int i = 0; messages && i < n; i++)
        free((void *)(uintptr_t)messages[i].content);
    free(messages);
}

static int messages_read(struct openai_reader *reader) {
    const json_t *list = reader->messages;
    struct chat_message *messages = NULL;
    char *text = NULL;
    int status, n = 0;
    if (!reader->context->chat)
        FAIL(STATUS_INPUT, "messages: %s", reader->context->chat_error);
    if (!list)
        FAIL(STATUS_INPUT, "messages: missing");
    if (!json_is_array(list) || json_array_size(list) == 0 || json_array_size(list) > INT32_MAX)
        return openai_expected("messages", "a list of at least one message", list);
    TRY(base_alloc(&messages, json_array_size(list), sizeof *messages));
    n = (int)json_array_size(list);
    for (int i = 0; i < n; i++)
        TRY_GOTO(message_read(reader, i, json_array_get(list, (size_t)i), &messages[i]));
    TRY_GOTO(chat_render(reader->context->chat, messages, n, true, &text));
    TRY_GOTO(prompt_encode(reader, text, strlen(text), false));
    status = 0;
fail:
    free(text);
    messages_free(messages, n);
    return status;
}

/* ---- what the fields mean together ------------------------------------------------------------------------------------ */

static int row_set_max_tokens(struct openai_reader *reader) {
    struct openai_row *row = reader->row;
    int64_t given = reader->max_tokens, room = reader->context->context - row->n_prompt;
    const char *name = "max_tokens";
    if (reader->max_completion_tokens >= 0) {
        if (given >= 0 && given != reader->max_completion_tokens)
            FAIL(STATUS_INPUT, "max_tokens: %lld, but max_completion_tokens is %lld: expected one of them", (long long)given,
                 (long long)reader->max_completion_tokens);
        given = reader->max_completion_tokens;
        name = "max_completion_tokens";
    }
    if (room < 0)
        FAIL(STATUS_INPUT, "prompt: expected at most %lld tokens (the context), got %d", (long long)reader->context->context,
             row->n_prompt);
    if (given < 0 && room == 0)
        FAIL(STATUS_INPUT, "prompt: %d tokens fill the context and leave no room for a new one", row->n_prompt);
    if (given > room)
        FAIL(STATUS_INPUT, "%s: expected at most %lld after a prompt of %d tokens (the context is %lld), got %lld", name,
             (long long)room, row->n_prompt, (long long)reader->context->context, (long long)given);
    if (given < 0)
        given = row->kind == OPENAI_CHAT ? room : min_i64(room, DEFAULT_MAX_TOKENS);
    row->max_tokens = (int)min_i64(given, INT32_MAX);
    return 0;
}

static int row_set_logprobs(struct openai_reader *reader) {
    struct openai_row *row = reader->row;
    row->logprobs = (int)reader->logprobs;
    if (row->kind == OPENAI_COMPLETION)
        return 0;
    if (reader->top_logprobs > 0 && !reader->chat_logprobs)
        FAIL(STATUS_INPUT, "top_logprobs: needs \"logprobs\": true");
    row->logprobs = reader->chat_logprobs ? (int)max_i64(reader->top_logprobs, 0) : -1;
    return 0;
}

static int row_set_prefill(struct openai_reader *reader) {
    struct openai_row *row = reader->row;
    const char *text = reader->prefill ? reader->prefill : reader->context->prefill;
    bool cached = text && strcmp(text, "cached") == 0;
    if (text && !cached && strcmp(text, "exact") != 0)
        FAIL(STATUS_INPUT, "prefill: expected \"exact\" or \"cached\", got \"%.*s\"", SHOWN, text);
    row->prefill = cached || (!text && row->echo) ? ENGINE_PREFILL_CACHED : ENGINE_PREFILL_EXACT;
    return 0;
}

static void row_set_seed(struct openai_reader *reader, const struct openai_item *item) {
    uint8_t from[OPENAI_DIGEST_BYTES + sizeof(uint64_t)], digest[OPENAI_DIGEST_BYTES];
    reader->row->seed = (uint64_t)reader->seed;
    if (reader->seeded)
        return;
    memcpy(from, item->digest, OPENAI_DIGEST_BYTES);
    for (size_t i = 0; i < sizeof(uint64_t); i++)
        from[OPENAI_DIGEST_BYTES + i] = (uint8_t)(reader->context->seed >> 8 * i);
    SHA256(from, sizeof from, digest);
    for (size_t i = 0; i < sizeof(uint64_t); i++)
        reader->row->seed = reader->row->seed << 8 | digest[i];
}

/* A stop string that is one special token gives no text: it has to be met as a token. */
static int row_set_stop_ids(struct openai_reader *reader) {
    struct openai_row *row = reader->row;
    const struct openai_context *context = reader->context;
    TRY(base_alloc(&row->stop_id, (size_t)context->n_stop + (size_t)row->n_stop, sizeof *row->stop_id));
    for (int i = 0; i < context->n_stop && !row->ignore_eos; i++)
        row->stop_id[row->n_stop_id++] = context->stop_id[i];
    if (row->n_stop > 0 && !context->tokenizer)
        FAIL(STATUS_INPUT, "stop: the model has no tokenizer, so its answers have no text");
    for (int i = 0; i < row->n_stop; i++) {
        int32_t id = tokenizer_find(context->tokenizer, row->stop[i], strlen(row->stop[i]));
        if (id >= 0 && tokenizer_is_special(context->tokenizer, id))
            row->stop_id[row->n_stop_id++] = id;
    }
    return 0;
}

static int row_read(struct openai_reader *reader, const struct openai_item *item, json_t **body) {
    struct openai_row *row = reader->row;
    TRY(row_open(reader, item, body));
    TRY(openai_fields_read(reader, *body));
    if (reader->best_of >= 0 && reader->best_of != row->n) {
        reader->code = "unsupported";
        FAIL(STATUS_INPUT, "best_of: not supported unless equal to n (%d), got %lld", row->n, (long long)reader->best_of);
    }
    if (row->top_p == 0) { /* OpenAI allows it: nothing but the likeliest token */
        row->top_p = 1;
        row->top_k = 1;
    }
    row->top_k = row->top_k < 0 ? 0 : row->top_k; /* -1 is off, as in other servers */
    TRY(row_set_logprobs(reader));
    TRY(row_set_prefill(reader));
    TRY(row->kind == OPENAI_CHAT ? messages_read(reader) : prompt_read(reader));
    TRY(row_set_max_tokens(reader));
    TRY(row_set_stop_ids(reader));
    row_set_seed(reader, item);
    return 0;
}

int openai_row_parse(const struct openai_item *item, const struct openai_context *context, struct openai_row *out,
                     const char **code) {
    struct openai_reader reader = {
        .context = context,
        .row = out,
        .code = "invalid_request",
        .max_tokens = -1,
        .max_completion_tokens = -1,
        .best_of = -1,
        .logprobs = -1,
        .top_logprobs = -1,
    };
    json_t *body = NULL;
    row_init(out);
    int status = row_read(&reader, item, &body);
    json_decref(body);
    if (status < 0)
        openai_row_deinit(out);
    *code = reader.code;
    return status;
}
