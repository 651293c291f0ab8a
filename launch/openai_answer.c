/* Collects the events of one row's choices. */
#include "launch/openai_answer.h"

#include <stdlib.h>
#include <string.h>

enum { FIRST_TOKENS = 32 };

static void tokens_free(struct answer_tokens *tokens) {
    free(tokens->token);
    free(tokens->top_id);
    free(tokens->top_logprob);
}

/* `array`: address of a pointer to `capacity` entries of `size` bytes. */
static int tokens_resize(void *array, size_t capacity, size_t size) {
    void *pointer;
    memcpy(&pointer, array, sizeof pointer);
    pointer = realloc(pointer, capacity * size);
    if (!pointer)
        FAIL(STATUS_MEMORY, "no memory for %zu tokens of an answer", capacity);
    memcpy(array, &pointer, sizeof pointer);
    return 0;
}

static int tokens_add(struct answer_tokens *tokens, const struct engine_scored *scored, bool with_top) {
    int n_top = with_top ? scored->n_top : 0;
    if (tokens->n == tokens->capacity) {
        size_t capacity = 2 * tokens->capacity + FIRST_TOKENS;
        TRY(tokens_resize(&tokens->token, capacity, sizeof *tokens->token));
        tokens->capacity = capacity;
    }
    if (tokens->n_top + (size_t)n_top > tokens->top_capacity) {
        size_t capacity = 2 * tokens->top_capacity + FIRST_TOKENS + (size_t)n_top;
        TRY(tokens_resize(&tokens->top_id, capacity, sizeof *tokens->top_id));
        TRY(tokens_resize(&tokens->top_logprob, capacity, sizeof *tokens->top_logprob));
        tokens->top_capacity = capacity;
    }
    tokens->token[tokens->n++] = (struct answer_token){scored->id, scored->logprob, n_top, tokens->n_top};
    for (int i = 0; i < n_top; i++) {
        tokens->top_id[tokens->n_top] = scored->top_id[i];
        tokens->top_logprob[tokens->n_top++] = scored->top_logprob[i];
    }
    return 0;
}

int openai_answer_new(const struct openai_row *row, const struct openai_context *context, struct openai_answer **out) {
    struct openai_answer *answer = NULL;
    int status;
    *out = NULL;
    TRY(base_alloc(&answer, 1, sizeof *answer));
    answer->row = row;
    answer->context = context;
    TRY_GOTO(base_alloc(&answer->choice, (size_t)row->n, sizeof *answer->choice));
    answer->n_sequences = row->max_tokens == 0 ? 1 : row->n;
    for (int i = 0; i < answer->n_sequences && context->tokenizer; i++)
        TRY_GOTO(text_stream_new(context->tokenizer, (const char *const *)row->stop, row->n_stop, &answer->choice[i].stream));
    *out = answer;
    return 0;
fail:
    openai_answer_free(answer);
    return status;
}

void openai_answer_free(struct openai_answer *answer) {
    if (!answer)
        return;
    for (int i = 0; i < answer->n_sequences && answer->choice; i++) {
        text_stream_free(answer->choice[i].stream);
        tokens_free(&answer->choice[i].tokens);
    }
    tokens_free(&answer->prompt);
    free(answer->choice);
    free(answer);
}

int openai_answer_n_sequences(const struct openai_answer *answer) { return answer->n_sequences; }
bool openai_answer_done(const struct openai_answer *answer) { return answer->n_finished == answer->n_sequences; }

int64_t openai_answer_n_generated(const struct openai_answer *answer) {
    int64_t n = 0;
    for (int i = 0; i < answer->n_sequences; i++)
        n += (int64_t)answer->choice[i].tokens.n;
    return n;
}

void openai_answer_request(const struct openai_answer *answer, int choice, struct engine_request *request) {
    const struct openai_row *row = answer->row;
    engine_request_init(request);
    request->prompt = row->prompt;
    request->n_prompt = row->n_prompt;
    request->max_tokens = row->max_tokens;
    request->temperature = row->temperature;
    request->top_p = row->top_p;
    request->min_p = row->min_p;
    request->top_k = row->top_k;
    request->presence_penalty = row->presence_penalty;
    request->frequency_penalty = row->frequency_penalty;
    request->repetition_penalty = row->repetition_penalty;
    request->seed = row->seed;
    request->choice = choice;
    request->n_bias = row->n_bias;
    request->bias_id = row->bias_id;
    request->bias = row->bias;
    request->ignore_eos = true;
    request->logprobs = row->logprobs;
    request->prompt_logprobs = choice == 0 && openai_row_scores_prompt(row) ? row->logprobs : -1;
    request->prefill = row->prefill;
}

static bool answer_ends(const struct openai_row *row, int32_t id) {
    for (int i = 0; i < row->n_stop_id; i++) {
        if (row->stop_id[i] == id)
            return true;
    }
    return false;
}

static int answer_add_token(struct openai_answer *answer, struct answer_choice *choice, const struct engine_scored *token,
                            struct openai_news *news) {
    if (choice->cut || choice->ended || choice->finished)
        return 0;
    TRY(tokens_add(&choice->tokens, token, answer->row->logprobs > 0));
    choice->ended = answer_ends(answer->row, token->id);
    if (!choice->ended && choice->stream) {
        int met = text_stream_push(choice->stream, token->id, &news->text, &news->bytes);
        TRY(met);
        choice->cut = met > 0;
    }
    news->cancel = choice->ended || choice->cut;
    return 0;
}

static int answer_finish(struct openai_answer *answer, struct answer_choice *choice, const struct engine_event *event,
                         struct openai_news *news) {
    if (choice->finished)
        return 0;
    if (event->finish == ENGINE_CANCELLED && !choice->ended && !choice->cut)
        FAIL(STATUS_INTERRUPTED, "the sequence was cancelled");
    if (choice->stream && !choice->cut) {
        int met = text_stream_finish(choice->stream, &news->text, &news->bytes);
        TRY(met);
        choice->cut = met > 0;
    }
    choice->finish = choice->ended || choice->cut ? ENGINE_STOP : event->finish;
    choice->queued_s = event->queued_s;
    choice->prefill_s = event->prefill_s;
    choice->decode_s = event->decode_s;
    choice->finished = true;
    answer->n_finished++;
    return 0;
}

int openai_answer_add(struct openai_answer *answer, int choice, const struct engine_event *event, struct openai_news *news) {
    *news = (struct openai_news){.text = ""};
    switch (event->kind) {
    case ENGINE_PROMPT:
        answer->scored_cached = event->scored_cached;
        for (int i = 0; i < event->n_scored && choice == 0; i++)
            TRY(tokens_add(&answer->prompt, &event->scored[i], answer->row->logprobs > 0));
        return 0;
    case ENGINE_TOKEN:
        return answer_add_token(answer, &answer->choice[choice], &event->token, news);
    case ENGINE_FINISHED:
        return answer_finish(answer, &answer->choice[choice], event, news);
    }
    return 0;
}
