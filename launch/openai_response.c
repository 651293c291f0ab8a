/* An answer that is done, as OpenAI's JSON. Both forms of log-probabilities come from the same list of tokens. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/utf8.h"
#include "launch/openai_answer.h"

enum { NAME_BYTES = 32 };

/* ---- tokens as text --------------------------------------------------------------------------------------------------- */

static const char *token_bytes(const struct openai_context *context, int32_t id, size_t *bytes) {
    const char *text = context->tokenizer ? tokenizer_token(context->tokenizer, id, bytes) : NULL;
    if (!text)
        *bytes = 0;
    return text;
}

static void write_token_number(struct json_text *out, int32_t id) {
    char name[NAME_BYTES];
    json_text_string(out, name, (size_t)snprintf(name, sizeof name, "token_id:%d", id));
}

/* A token that the tokenizer does not know (a vocabulary is often padded) is "token_id:N". */
static void write_token(struct json_text *out, const struct openai_context *context, int32_t id) {
    static const char digits[] = "0123456789abcdef";
    size_t bytes;
    const char *text = token_bytes(context, id, &bytes);
    if (!text) {
        write_token_number(out, id);
        return;
    }
    if (utf8_is_valid(text, bytes)) {
        json_text_string(out, text, bytes);
        return;
    }
    json_text_raw(out, "\"bytes:");
    for (size_t i = 0; i < bytes; i++) {
        uint8_t byte = (uint8_t)text[i];
        const char escape[] = {'\\', '\\', 'x', digits[byte >> 4], digits[byte & 15], '\0'}; /* JSON escapes the backslash */
        json_text_raw(out, escape);
    }
    json_text_raw(out, "\"");
}

/* Whether two tokens would be written alike: a special token and a plain one of the same text. */
static bool token_same(const struct openai_context *context, int32_t a, int32_t b) {
    size_t a_bytes, b_bytes;
    const char *a_text = token_bytes(context, a, &a_bytes), *b_text = token_bytes(context, b, &b_bytes);
    return a_text && b_text && a_bytes == b_bytes && memcmp(a_text, b_text, a_bytes) == 0;
}

static void write_bytes(struct json_text *out, const struct openai_context *context, int32_t id) {
    size_t bytes;
    const char *text = token_bytes(context, id, &bytes);
    if (!text) {
        json_text_raw(out, "null");
        return;
    }
    json_text_raw(out, "[");
    for (size_t i = 0; i < bytes; i++) {
        json_text_raw(out, i ? "," : "");
        json_text_int(out, (uint8_t)text[i]);
    }
    json_text_raw(out, "]");
}

/* ---- text and its offsets --------------------------------------------------------------------------------------------- */

struct offsets { /* reads bytes token by token and counts the characters that their text has */
    char partial[4];
    size_t n_partial;
    int64_t n_chars; /* whole ones so far, an error counting as one (U+FFFD) */
};

/* Takes bytes; the character that holds the first of them has the number that offsets->n_chars was before. */
static void offsets_add(struct offsets *offsets, const char *text, size_t bytes) {
    size_t step;
    for (size_t i = 0; i < bytes; i++) {
        offsets->partial[offsets->n_partial++] = text[i];
        while (offsets->n_partial > 0 && utf8_next(offsets->partial, offsets->n_partial, &step) != UTF8_PARTIAL) {
            offsets->n_partial -= step;
            memmove(offsets->partial, offsets->partial + step, offsets->n_partial);
            offsets->n_chars++;
        }
    }
}

static void offsets_end(struct offsets *offsets) {
    offsets->n_chars += offsets->n_partial > 0;
    offsets->n_partial = 0;
}

/* Bytes that prompt token i has in the echoed text: special tokens as they are written, what the tokenizer added not at all. */
static const char *prompt_bytes(const struct openai_answer *answer, int i, size_t *bytes) {
    const char *text = token_bytes(answer->context, answer->row->prompt[i], bytes);
    if (!text || i < answer->row->n_added) {
        *bytes = 0;
        return "";
    }
    return text;
}

/* Bytes that generated token i has in the text: special tokens and the end token have none. */
static const char *choice_bytes(const struct openai_answer *answer, const struct answer_choice *choice, size_t i, size_t *bytes) {
    int32_t id = choice->tokens.token[i].id;
    const char *text = token_bytes(answer->context, id, bytes);
    if (!text || tokenizer_is_special(answer->context->tokenizer, id) || (choice->ended && i + 1 == choice->tokens.n)) {
        *bytes = 0;
        return "";
    }
    return text;
}

/* The echoed prompt, then the choice's text. */
static int write_text(struct json_text *out, const struct openai_answer *answer, const struct answer_choice *choice) {
    const struct openai_row *row = answer->row;
    int n_echo = row->echo ? row->n_prompt : 0;
    size_t bytes = 0, n = 0, more;
    char *echo = NULL;
    for (int i = 0; i < n_echo; i++, n += more)
        prompt_bytes(answer, i, &more);
    TRY(base_alloc(&echo, n + 1, 1));
    n = 0;
    for (int i = 0; i < n_echo; i++, n += more) {
        const char *token = prompt_bytes(answer, i, &more);
        memcpy(echo + n, token, more);
    }
    const char *text = choice->stream ? text_stream_text(choice->stream, &bytes) : "";
    json_text_raw(out, "\"");
    json_text_escaped(out, echo, n); /* apart: a character that the prompt's end cuts off is an error of its own */
    json_text_escaped(out, text, bytes);
    json_text_raw(out, "\"");
    free(echo);
    return 0;
}

/* ---- log-probabilities ------------------------------------------------------------------------------------------------ */

struct listing { /* the tokens that a choice's log-probabilities are about: the prompt's, if echoed, then its own */
    const struct openai_answer *answer;
    const struct answer_choice *choice;
    size_t n_prompt, n;
};

static struct listing listing_of(const struct openai_answer *answer, const struct answer_choice *choice) {
    struct listing listing = {answer, choice, answer->row->echo ? answer->prompt.n : 0, 0};
    listing.n = listing.n_prompt + (choice->cut ? (size_t)text_stream_n_tokens(choice->stream) : choice->tokens.n);
    return listing;
}

static const struct answer_tokens *listing_at(const struct listing *listing, size_t i, const struct answer_token **token) {
    bool prompt = i < listing->n_prompt;
    const struct answer_tokens *tokens = prompt ? &listing->answer->prompt : &listing->choice->tokens;
    *token = &tokens->token[prompt ? i : i - listing->n_prompt];
    return tokens;
}

/* An object of token texts: the alternatives, best first, and always the token itself with the very number of token_logprobs, so
 * that a client may compare floats. Of two tokens that are written alike the one that is not `token` gets its number as name. */
static void write_top_object(struct json_text *out, const struct openai_context *context, const struct answer_tokens *tokens,
                             const struct answer_token *token) {
    bool itself = false;
    json_text_raw(out, "{");
    for (int i = 0; i <= token->n_top; i++) {
        if (i == token->n_top && itself)
            break;
        int32_t id = i < token->n_top ? tokens->top_id[token->top + (size_t)i] : token->id;
        bool alike = id != token->id && token_same(context, id, token->id);
        for (int k = 0; k < i && id != token->id && !alike; k++)
            alike = token_same(context, id, tokens->top_id[token->top + (size_t)k]);
        itself = itself || id == token->id;
        json_text_raw(out, i ? "," : "");
        if (alike)
            write_token_number(out, id);
        else
            write_token(out, context, id);
        json_text_raw(out, ":");
        json_text_logprob(out, id == token->id ? token->logprob : tokens->top_logprob[token->top + (size_t)i]);
    }
    json_text_raw(out, "}");
}

static void write_text_offsets(struct json_text *out, const struct listing *listing) {
    struct offsets offsets = {0};
    size_t bytes;
    for (size_t i = 0; i < listing->n; i++) {
        if (i == listing->n_prompt)
            offsets_end(&offsets);
        json_text_raw(out, i ? "," : "");
        json_text_int(out, offsets.n_chars);
        const char *text = i < listing->n_prompt ? prompt_bytes(listing->answer, (int)i, &bytes)
                                                 : choice_bytes(listing->answer, listing->choice, i - listing->n_prompt, &bytes);
        offsets_add(&offsets, text, bytes);
    }
}

/* The form of completions: four arrays of one entry a token. Nothing comes before the first token of the prompt: null. */
static void write_logprob_arrays(struct json_text *out, const struct listing *listing) {
    const struct openai_context *context = listing->answer->context;
    const struct answer_token *token;
    json_text_raw(out, "{\"tokens\":[");
    for (size_t i = 0; i < listing->n; i++) {
        listing_at(listing, i, &token);
        json_text_raw(out, i ? "," : "");
        write_token(out, context, token->id);
    }
    json_text_raw(out, "],\"token_logprobs\":[");
    for (size_t i = 0; i < listing->n; i++) {
        listing_at(listing, i, &token);
        json_text_raw(out, i ? "," : "");
        if (i == 0 && listing->n_prompt > 0)
            json_text_raw(out, "null");
        else
            json_text_logprob(out, token->logprob);
    }
    json_text_raw(out, "],\"top_logprobs\":[");
    for (size_t i = 0; i < listing->n; i++) {
        const struct answer_tokens *tokens = listing_at(listing, i, &token);
        json_text_raw(out, i ? "," : "");
        if (i == 0 && listing->n_prompt > 0)
            json_text_raw(out, "null");
        else
            write_top_object(out, context, tokens, token);
    }
    json_text_raw(out, "],\"text_offset\":[");
    write_text_offsets(out, listing);
    json_text_raw(out, "]}");
}

static void write_content_token(struct json_text *out, const struct openai_context *context, int32_t id, float logprob) {
    json_text_raw(out, "{\"token\":");
    write_token(out, context, id);
    json_text_raw(out, ",\"logprob\":");
    json_text_logprob(out, logprob);
    json_text_raw(out, ",\"bytes\":");
    write_bytes(out, context, id);
}

/* The form of chat: one object a token. */
static void write_logprob_content(struct json_text *out, const struct listing *listing) {
    const struct openai_context *context = listing->answer->context;
    const struct answer_token *token;
    json_text_raw(out, "{\"content\":[");
    for (size_t i = 0; i < listing->n; i++) {
        const struct answer_tokens *tokens = listing_at(listing, i, &token);
        json_text_raw(out, i ? "," : "");
        write_content_token(out, context, token->id, token->logprob);
        json_text_raw(out, ",\"top_logprobs\":[");
        for (int k = 0; k < token->n_top; k++) {
            int32_t id = tokens->top_id[token->top + (size_t)k];
            json_text_raw(out, k ? "," : "");
            write_content_token(out, context, id, id == token->id ? token->logprob : tokens->top_logprob[token->top + (size_t)k]);
            json_text_raw(out, "}");
        }
        json_text_raw(out, "]}");
    }
    json_text_raw(out, "],\"refusal\":null}");
}

/* ---- the object ------------------------------------------------------------------------------------------------------- */

static void write_ids(struct json_text *out, const struct listing *listing) {
    const struct openai_row *row = listing->answer->row;
    json_text_raw(out, ",\"token_ids\":[");
    for (size_t i = 0; i < listing->n - listing->n_prompt; i++) {
        json_text_raw(out, i ? "," : "");
        json_text_int(out, listing->choice->tokens.token[i].id);
    }
    json_text_raw(out, "],\"prompt_token_ids\":[");
    for (int i = 0; i < row->n_prompt; i++) {
        json_text_raw(out, i ? "," : "");
        json_text_int(out, row->prompt[i]);
    }
    json_text_raw(out, "]");
}

static int write_choice(struct json_text *out, const struct openai_answer *answer, int index) {
    const struct openai_row *row = answer->row;
    const struct answer_choice *choice = &answer->choice[index < answer->n_sequences ? index : 0];
    struct listing listing = listing_of(answer, choice);
    bool chat = row->kind == OPENAI_CHAT;
    json_text_raw(out, "{\"index\":");
    json_text_int(out, index);
    json_text_raw(out, chat ? ",\"message\":{\"role\":\"assistant\",\"content\":" : ",\"text\":");
    TRY(write_text(out, answer, choice));
    json_text_raw(out, chat ? "},\"finish_reason\":" : ",\"finish_reason\":");
    json_text_raw(out, choice->finish == ENGINE_LENGTH ? "\"length\"" : "\"stop\"");
    json_text_raw(out, ",\"logprobs\":");
    if (row->logprobs < 0)
        json_text_raw(out, "null");
    else if (chat)
        write_logprob_content(out, &listing);
    else
        write_logprob_arrays(out, &listing);
    if (row->return_token_ids)
        write_ids(out, &listing);
    json_text_raw(out, "}");
    return 0;
}

static void write_number(struct json_text *out, const char *name, int64_t value) {
    json_text_raw(out, name);
    json_text_int(out, value);
}

/* Times of the choice that took longest in each phase. */
static void write_timings(struct json_text *out, const struct openai_answer *answer) {
    double queued = 0, prefill = 0, decode = 0;
    for (int i = 0; i < answer->n_sequences; i++) {
        const struct answer_choice *choice = &answer->choice[i];
        queued = choice->queued_s > queued ? choice->queued_s : queued;
        prefill = choice->prefill_s > prefill ? choice->prefill_s : prefill;
        decode = choice->decode_s > decode ? choice->decode_s : decode;
    }
    json_text_raw(out, ",\"timings\":{\"queued_s\":");
    json_text_seconds(out, queued);
    json_text_raw(out, ",\"prefill_s\":");
    json_text_seconds(out, prefill);
    json_text_raw(out, ",\"decode_s\":");
    json_text_seconds(out, decode);
    json_text_raw(out, "}");
}

int openai_answer_write(const struct openai_answer *answer, const char *id, int64_t created, struct json_text *out) {
    const struct openai_row *row = answer->row;
    const char *model = row->model ? row->model : answer->context->model;
    bool chat = row->kind == OPENAI_CHAT;
    if (!openai_answer_done(answer))
        FAIL(STATUS_FAILED, "answer %s: %d of %d choices have finished", id, answer->n_finished, answer->n_sequences);
    if (openai_row_scores_prompt(row) && answer->prompt.n != (size_t)row->n_prompt)
        FAIL(STATUS_FAILED, "answer %s: %zu of %d prompt tokens have log-probabilities", id, answer->prompt.n, row->n_prompt);
    json_text_raw(out, chat ? "{\"id\":\"chatcmpl-" : "{\"id\":\"cmpl-");
    json_text_escaped(out, id, strlen(id));
    json_text_raw(out, chat ? "\",\"object\":\"chat.completion\"" : "\",\"object\":\"text_completion\"");
    write_number(out, ",\"created\":", created);
    json_text_raw(out, ",\"model\":");
    json_text_string(out, model, strlen(model));
    json_text_raw(out, ",\"choices\":[");
    for (int i = 0; i < row->n; i++) {
        json_text_raw(out, i ? "," : "");
        TRY(write_choice(out, answer, i));
    }
    write_number(out, "],\"usage\":{\"prompt_tokens\":", row->n_prompt);
    write_number(out, ",\"completion_tokens\":", openai_answer_n_generated(answer));
    write_number(out, ",\"total_tokens\":", row->n_prompt + openai_answer_n_generated(answer));
    json_text_raw(out, "}");
    write_timings(out, answer);
    if (openai_row_scores_prompt(row))
        json_text_raw(out, answer->scored_cached ? ",\"prompt_scored_with\":\"cached\"" : ",\"prompt_scored_with\":\"exact\"");
    json_text_raw(out, "}");
    return out->status;
}
