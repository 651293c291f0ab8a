/* Answers out: made-up events of an engine go in, the whole JSON is compared, but for the times. What a float is written as
 * comes from the same "%.9g" that json_text.h promises. */
#include <jansson.h>
#include <math.h>

#include "launch/openai.h"
#include "tiny_tokenizer.h"

static struct openai_context context;

struct play { /* one row on its way */
    struct openai_row row;
    struct openai_answer *answer;
};

static void play_start(struct play *play, const char *text) {
    struct openai_item item;
    const char *code;
    REQUIRE(openai_item_read(text, strlen(text), "1", &item));
    REQUIRE(openai_row_parse(&item, &context, &play->row, &code));
    openai_item_deinit(&item);
    REQUIRE(openai_answer_new(&play->row, &context, &play->answer));
}

/* The object as text; the answer is gone afterwards. */
static char *play_end(struct play *play) {
    struct json_text out = {0};
    CHECK(openai_answer_done(play->answer));
    REQUIRE(openai_answer_write(play->answer, "kv-0", 77, &out));
    openai_answer_free(play->answer);
    openai_row_deinit(&play->row);
    json_t *json = json_loadb(out.text, out.bytes, JSON_REJECT_DUPLICATES, NULL);
    CHECK(json_is_object(json), "not JSON: %s", out.text);
    json_decref(json);
    return out.text;
}

static void play_check(struct play *play, const char *expected) {
    char *text = play_end(play);
    CHECK(strcmp(text, expected) == 0, "\n  got      %s\n  expected %s", text, expected);
    free(text);
}

static struct openai_news add(struct play *play, int choice, const struct engine_event *event) {
    struct openai_news news;
    REQUIRE(openai_answer_add(play->answer, choice, event, &news));
    return news;
}

static struct openai_news add_token(struct play *play, int choice, int32_t id, float logprob) {
    const struct engine_event event = {.kind = ENGINE_TOKEN, .token = {.id = id, .logprob = logprob}};
    return add(play, choice, &event);
}

static struct openai_news add_top(struct play *play, int choice, int32_t id, float logprob, int n, const int32_t *top_id,
                                  const float *top) {
    const struct engine_event event = {.kind = ENGINE_TOKEN,
                                       .token = {.id = id, .logprob = logprob, .n_top = n, .top_id = top_id, .top_logprob = top}};
    return add(play, choice, &event);
}

static struct openai_news finish(struct play *play, int choice, enum engine_finish how) {
    const struct engine_event event = {.kind = ENGINE_FINISHED, .finish = how, .queued_s = 0.5 + choice, .prefill_s = 0.25, .decode_s = 2};
    return add(play, choice, &event);
}

#define TIMES "\"timings\":{\"queued_s\":0.500000,\"prefill_s\":0.250000,\"decode_s\":2.000000}"
#define HEAD "{\"id\":\"cmpl-kv-0\",\"object\":\"text_completion\",\"created\":77,\"model\":\"tiny\",\"choices\":["
#define USAGE(p, c, t) "],\"usage\":{\"prompt_tokens\":" #p ",\"completion_tokens\":" #c ",\"total_tokens\":" #t "},"

static void test_plain(void) {
    struct play play;
    play_start(&play, "{\"prompt\": \"a\", \"max_tokens\": 3, \"model\": \"my\\\"model\"}");
    CHECK(openai_answer_n_sequences(play.answer) == 1);
    struct openai_news news = add_token(&play, 0, TINY_HE, 0);
    CHECK(news.bytes == 2 && memcmp(news.text, "he", 2) == 0 && !news.cancel);
    CHECK(!openai_answer_done(play.answer));
    add_token(&play, 0, '\n', 0);
    add_token(&play, 0, '"', 0);
    finish(&play, 0, ENGINE_LENGTH);
    play_check(&play, "{\"id\":\"cmpl-kv-0\",\"object\":\"text_completion\",\"created\":77,\"model\":\"my\\\"model\",\"choices\":[{\"index\":0,"
                      "\"text\":\"he\\n\\\"\",\"finish_reason\":\"length\",\"logprobs\":null}" USAGE(1, 3, 4) TIMES "}");
}

/* What a row asks for reaches the engine; the prompt is scored once. */
static void test_request(void) {
    struct play play;
    struct engine_request request;
    play_start(&play, "{\"prompt\": \"hey\", \"n\": 2, \"echo\": true, \"logprobs\": 3, \"seed\": 11, \"temperature\": 0.5, \"top_p\": 0.25, "
                      "\"top_k\": 9, \"min_p\": 0.125, \"max_tokens\": 6, \"presence_penalty\": 1, \"frequency_penalty\": -1, "
                      "\"repetition_penalty\": 1.5, \"logit_bias\": {\"3\": 4}}");
    CHECK(openai_answer_n_sequences(play.answer) == 2);
    openai_answer_request(play.answer, 1, &request);
    CHECK(request.choice == 1 && request.prompt_logprobs == -1 && request.logprobs == 3);
    openai_answer_request(play.answer, 0, &request);
    CHECK(request.choice == 0 && request.prompt_logprobs == 3 && request.logprobs == 3 && request.seed == 11);
    CHECK(request.n_prompt == 2 && request.prompt[0] == TINY_HE && request.max_tokens == 6 && request.ignore_eos);
    CHECK(request.temperature == 0.5f && request.top_p == 0.25f && request.top_k == 9 && request.min_p == 0.125f);
    CHECK(request.presence_penalty == 1 && request.frequency_penalty == -1 && request.repetition_penalty == 1.5f);
    CHECK(request.n_bias == 1 && request.bias_id[0] == 3 && request.bias[0] == 4 && request.prefill == ENGINE_PREFILL_CACHED);
    openai_answer_free(play.answer);
    openai_row_deinit(&play.row);
}

/* Echo: a special token in the prompt, one cut off by the prompt's end (its own error), a character of two tokens, a token that is
 * not among the alternatives, one of probability 0, an end token as the last entry. */
static void test_echo(void) {
    static const int32_t top_he[] = {TINY_HE, 'x'}, top_c3[] = {'x', 0xC3};
    static const float first[] = {-0.1f, -2.5f}, second[] = {-0.5f, -1.25f};
    const struct engine_scored scored[] = {
        {.id = TINY_START, .logprob = NAN},
        {.id = TINY_HE, .logprob = -0.1f, .n_top = 2, .top_id = top_he, .top_logprob = first},
        {.id = 0xE2, .logprob = -INFINITY, .n_top = 2, .top_id = top_he, .top_logprob = first},
    };
    const struct engine_event prompt = {.kind = ENGINE_PROMPT, .n_scored = 3, .scored = scored, .scored_cached = true};
    struct play play;
    play_start(&play, "{\"prompt\": [257, 256, 226], \"echo\": true, \"logprobs\": 2, \"return_token_ids\": true}");
    add(&play, 0, &prompt);
    add_top(&play, 0, 0xC3, -1.25f, 2, top_c3, second);
    add_top(&play, 0, 0xA9, -3.0f, 2, top_c3, second);
    add_top(&play, 0, 'z', -4.0f, 2, top_c3, second);
    struct openai_news news = add_top(&play, 0, TINY_END, -0.75f, 2, top_c3, second);
    CHECK(news.cancel && news.bytes == 0);
    news = add_token(&play, 0, 'q', 0);
    CHECK(!news.cancel && news.bytes == 0, "what comes after the end is ignored");
    finish(&play, 0, ENGINE_CANCELLED);
    play_check(&play, HEAD
               "{\"index\":0,\"text\":\"<|im_start|>he\xEF\xBF\xBD\xC3\xA9z\",\"finish_reason\":\"stop\",\"logprobs\":{"
               "\"tokens\":[\"<|im_start|>\",\"he\",\"bytes:\\\\xe2\",\"bytes:\\\\xc3\",\"bytes:\\\\xa9\",\"z\",\"<|im_end|>\"],"
               "\"token_logprobs\":[null,-0.100000001,-9999,-1.25,-3,-4,-0.75],"
               "\"top_logprobs\":[null,{\"he\":-0.100000001,\"x\":-2.5},{\"he\":-0.100000001,\"x\":-2.5,\"bytes:\\\\xe2\":-9999},"
               "{\"x\":-0.5,\"bytes:\\\\xc3\":-1.25},{\"x\":-0.5,\"bytes:\\\\xc3\":-1.25,\"bytes:\\\\xa9\":-3},"
               "{\"x\":-0.5,\"bytes:\\\\xc3\":-1.25,\"z\":-4},{\"x\":-0.5,\"bytes:\\\\xc3\":-1.25,\"<|im_end|>\":-0.75}],"
               "\"text_offset\":[0,12,14,15,15,16,17]},\"token_ids\":[195,169,122,258],\"prompt_token_ids\":[257,256,226]}"
               USAGE(3, 4, 7) TIMES ",\"prompt_scored_with\":\"cached\"}");
}

/* A begin token that the tokenizer added is listed but not echoed. */
static void test_added(void) {
    struct tokenizer *bos = tiny_tokenizer(true), *plain = (struct tokenizer *)(uintptr_t)context.tokenizer;
    const struct engine_scored scored[] = {{.id = TINY_EOS, .logprob = NAN}, {.id = 'a', .logprob = -1}, {.id = 'b', .logprob = -2}};
    const struct engine_event prompt = {.kind = ENGINE_PROMPT, .n_scored = 3, .scored = scored};
    struct play play;
    context.tokenizer = bos;
    play_start(&play, "{\"prompt\": \"ab\", \"echo\": true, \"logprobs\": 0, \"max_tokens\": 0, \"n\": 2}");
    CHECK(openai_answer_n_sequences(play.answer) == 1, "nothing to generate: one sequence serves both choices");
    add(&play, 0, &prompt);
    finish(&play, 0, ENGINE_LENGTH);
#define CHOICE(i)                                                                                                        \
    "{\"index\":" #i ",\"text\":\"ab\",\"finish_reason\":\"length\",\"logprobs\":{\"tokens\":[\"<|endoftext|>\",\"a\",\"b\"]," \
    "\"token_logprobs\":[null,-1,-2],\"top_logprobs\":[null,{\"a\":-1},{\"b\":-2}],\"text_offset\":[0,0,1]}}"
    play_check(&play, HEAD CHOICE(0) "," CHOICE(1) USAGE(3, 0, 3) TIMES ",\"prompt_scored_with\":\"exact\"}");
    context.tokenizer = plain;
    tokenizer_close(bos);
}

/* The text ends before the stop string, within a token; tokens beyond are counted but not listed. */
static void test_stop(void) {
    struct play play;
    play_start(&play, "{\"prompt\": \"a\", \"stop\": [\"eyz\", \"never\"], \"logprobs\": 0, \"return_token_ids\": true}");
    add_token(&play, 0, 'b', -1);
    struct openai_news news = add_token(&play, 0, TINY_HE, -2);
    CHECK(news.bytes == 1 && *news.text == 'h', "an e may begin the stop string");
    news = add_token(&play, 0, 'y', -3);
    CHECK(news.bytes == 0 && !news.cancel);
    news = add_token(&play, 0, 'z', -4);
    CHECK(news.bytes == 0 && news.cancel);
    add_token(&play, 0, 'q', -5);
    finish(&play, 0, ENGINE_CANCELLED);
    play_check(&play, HEAD "{\"index\":0,\"text\":\"bh\",\"finish_reason\":\"stop\",\"logprobs\":{\"tokens\":[\"b\",\"he\"],\"token_logprobs\":[-1,-2],"
                           "\"top_logprobs\":[{\"b\":-1},{\"he\":-2}],\"text_offset\":[0,1]},\"token_ids\":[98,256],\"prompt_token_ids\":[97]}"
                           USAGE(1, 4, 5) TIMES "}");
    /* the same without a match: what was held back comes at the end */
    play_start(&play, "{\"prompt\": \"a\", \"stop\": \"hey\"}");
    news = add_token(&play, 0, TINY_HE, 0);
    CHECK(news.bytes == 0);
    news = finish(&play, 0, ENGINE_LENGTH);
    CHECK(news.bytes == 2 && memcmp(news.text, "he", 2) == 0);
    play_check(&play, HEAD "{\"index\":0,\"text\":\"he\",\"finish_reason\":\"length\",\"logprobs\":null}" USAGE(1, 1, 2) TIMES "}");
    /* a stop string that is a special token */
    play_start(&play, "{\"prompt\": \"a\", \"stop\": \"<|endoftext|>\", \"ignore_eos\": true}");
    CHECK(!add_token(&play, 0, TINY_END, 0).cancel, "ignore_eos");
    CHECK(!add_token(&play, 0, 'k', 0).cancel);
    CHECK(add_token(&play, 0, TINY_EOS, 0).cancel);
    finish(&play, 0, ENGINE_LENGTH);
    play_check(&play, HEAD "{\"index\":0,\"text\":\"k\",\"finish_reason\":\"stop\",\"logprobs\":null}" USAGE(1, 3, 4) TIMES "}");
}

/* Two choices that finish in another order; chat's form of log-probabilities; a token without text; a cut character at the end. */
static void test_chat(void) {
    static const int32_t top_id[] = {TINY_VOCAB - 1, 'u'};
    static const float top[] = {-0.25f, -0.5f};
    struct play play;
    play_start(&play, "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"n\": 2, \"logprobs\": true, \"top_logprobs\": 2}");
    int n = play.row.n_prompt;
    add_top(&play, 1, 'u', -0.5f, 2, top_id, top);
    add_top(&play, 0, 0xC3, -1, 0, NULL, NULL);
    add_top(&play, 1, TINY_END, -2, 0, NULL, NULL);
    finish(&play, 1, ENGINE_STOP);
    CHECK(!openai_answer_done(play.answer));
    finish(&play, 1, ENGINE_STOP);
    CHECK(!openai_answer_done(play.answer), "a sequence finishes once");
    finish(&play, 0, ENGINE_LENGTH);
    char expected[2048];
    snprintf(expected, sizeof expected,
             "{\"id\":\"chatcmpl-kv-0\",\"object\":\"chat.completion\",\"created\":77,\"model\":\"tiny\",\"choices\":["
             "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"\xEF\xBF\xBD\"},\"finish_reason\":\"length\",\"logprobs\":{\"content\":["
             "{\"token\":\"bytes:\\\\xc3\",\"logprob\":-1,\"bytes\":[195],\"top_logprobs\":[]}],\"refusal\":null}},"
             "{\"index\":1,\"message\":{\"role\":\"assistant\",\"content\":\"u\"},\"finish_reason\":\"stop\",\"logprobs\":{\"content\":["
             "{\"token\":\"u\",\"logprob\":-0.5,\"bytes\":[117],\"top_logprobs\":["
             "{\"token\":\"token_id:263\",\"logprob\":-0.25,\"bytes\":null},{\"token\":\"u\",\"logprob\":-0.5,\"bytes\":[117]}]},"
             "{\"token\":\"<|im_end|>\",\"logprob\":-2,\"bytes\":[60,124,105,109,95,101,110,100,124,62],\"top_logprobs\":[]}],\"refusal\":null}}"
             "],\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":3,\"total_tokens\":%d},"
             "\"timings\":{\"queued_s\":1.500000,\"prefill_s\":0.250000,\"decode_s\":2.000000}}",
             n, n + 3);
    play_check(&play, expected);
}

/* The likeliest token is told by comparing floats: 9 digits bring every float back. */
static void test_floats(void) {
    for (uint64_t i = 0; i < 2000; i++) {
        struct json_text out = {0};
        float value = -expf(8 * test_uniform(1, i));
        json_text_logprob(&out, value);
        CHECK((float)strtod(out.text, NULL) == value, "%a is %s", value, out.text);
        json_text_deinit(&out);
    }
}

static void test_strings(void) {
    static const char text[] = "a\0\x01\"\\\n\r\t\b\f\x7f\xC3\xA9\xE2\x82\xF0\x9F\x98\x80z\xC3";
    struct json_text out = {0};
    json_text_string(&out, text, sizeof text - 1);
    CHECK(strcmp(out.text, "\"a\\u0000\\u0001\\\"\\\\\\n\\r\\t\\b\\f\x7f\xC3\xA9\xEF\xBF\xBD\xF0\x9F\x98\x80z\xEF\xBF\xBD\"") == 0, "%s", out.text);
    json_text_deinit(&out);
}

static void test_troubles(void) {
    struct play play;
    struct openai_news news;
    struct json_text out = {0};
    play_start(&play, "{\"prompt\": \"a\", \"echo\": true, \"logprobs\": 1}");
    const struct engine_event cancelled = {.kind = ENGINE_FINISHED, .finish = ENGINE_CANCELLED};
    CHECK_FAILS(openai_answer_add(play.answer, 0, &cancelled, &news), STATUS_INTERRUPTED, "cancelled");
    CHECK_FAILS(openai_answer_write(play.answer, "kv-0", 0, &out), STATUS_FAILED, "0 of 1 choices");
    finish(&play, 0, ENGINE_LENGTH);
    CHECK_FAILS(openai_answer_write(play.answer, "kv-0", 0, &out), STATUS_FAILED, "0 of 1 prompt tokens");
    openai_answer_free(play.answer);
    openai_row_deinit(&play.row);
    json_text_deinit(&out);
    /* without a tokenizer there are only ids */
    const struct tokenizer *tokenizer = context.tokenizer;
    context.tokenizer = NULL;
    play_start(&play, "{\"prompt\": [5], \"logprobs\": 0, \"return_token_ids\": true}");
    add_token(&play, 0, 6, -1);
    finish(&play, 0, ENGINE_LENGTH);
    play_check(&play, HEAD "{\"index\":0,\"text\":\"\",\"finish_reason\":\"length\",\"logprobs\":{\"tokens\":[\"token_id:6\"],\"token_logprobs\":[-1],"
                           "\"top_logprobs\":[{\"token_id:6\":-1}],\"text_offset\":[0]},\"token_ids\":[6],\"prompt_token_ids\":[5]}"
                           USAGE(1, 1, 2) TIMES "}");
    context.tokenizer = tokenizer;
}

int main(void) {
    static const int32_t stop_id[] = {TINY_END};
    struct tokenizer *tokenizer = tiny_tokenizer(false);
    context = (struct openai_context){.tokenizer = tokenizer, .model = "tiny", .vocab = TINY_VOCAB, .context = 4096, .n_stop = 1,
                                      .stop_id = stop_id};
    REQUIRE(chat_find(TINY_CHAT, "tiny", &context.chat));
    test_plain();
    test_request();
    test_echo();
    test_added();
    test_stop();
    test_chat();
    test_floats();
    test_strings();
    test_troubles();
    tokenizer_close(tokenizer);
    return test_report();
}
