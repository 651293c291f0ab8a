/* Rows in: every field, good and bad; the envelope; prompts and messages; names, digests, ids and seeds. */
#include <jansson.h>

#include "launch/openai.h"
#include "tiny_tokenizer.h"

static struct openai_context context;

static int parse(const char *text, struct openai_row *row, const char **code) {
    struct openai_item item;
    REQUIRE(openai_item_read(text, strlen(text), "7", &item));
    int status = openai_row_parse(&item, &context, row, code);
    openai_item_deinit(&item);
    return status;
}

static struct openai_row good(const char *text) {
    struct openai_row row;
    const char *code;
    int status = parse(text, &row, &code);
    CHECK(status == 0, "%s: %s", text, base_error());
    base_clear_error();
    return row;
}

/* Every field with a value that differs from its default. */
static void test_fields(void) {
    struct openai_row row = good(
        "{\"prompt\": \"hey\", \"model\": \"m\", \"max_tokens\": 5, \"temperature\": 0.5, \"top_p\": 0.25, \"n\": 3, \"seed\": -2,"
        "\"stop\": [\"x\", \"yz\", \"<|endoftext|>\", \"a\", \"b\"], \"presence_penalty\": -2, \"frequency_penalty\": 2, "
        "\"logit_bias\": {\"5\": -100, \"263\": 1.5}, \"top_k\": 7, \"min_p\": 0.125, \"repetition_penalty\": 1.25, "
        "\"ignore_eos\": true, \"return_token_ids\": true, \"prefill\": \"cached\", \"logprobs\": 4, \"echo\": true, \"best_of\": 3, "
        "\"user\": \"u\", \"metadata\": {\"a\": 1}, \"store\": true, \"service_tier\": \"auto\", \"stream\": false, "
        "\"response_format\": {\"type\": \"text\"}, \"suffix\": \"\"}");
    CHECK(row.kind == OPENAI_COMPLETION && strcmp(row.model, "m") == 0);
    CHECK(row.n_prompt == 2 && row.prompt[0] == TINY_HE && row.prompt[1] == 'y' && row.n_added == 0);
    CHECK(row.max_tokens == 5 && row.temperature == 0.5f && row.top_p == 0.25f && row.n == 3 && row.seed == (uint64_t)-2);
    CHECK(row.n_stop == 5 && strcmp(row.stop[1], "yz") == 0 && strcmp(row.stop[4], "b") == 0);
    CHECK(row.n_stop_id == 1 && row.stop_id[0] == TINY_EOS, "ignore_eos leaves out the model's end token only");
    CHECK(row.presence_penalty == -2 && row.frequency_penalty == 2 && row.repetition_penalty == 1.25f);
    CHECK(row.n_bias == 2);
    for (int i = 0; i < row.n_bias; i++)
        CHECK((row.bias_id[i] == 5 && row.bias[i] == -100) || (row.bias_id[i] == 263 && row.bias[i] == 1.5f));
    CHECK(row.top_k == 7 && row.min_p == 0.125f && row.ignore_eos && row.return_token_ids);
    CHECK(row.prefill == ENGINE_PREFILL_CACHED && row.logprobs == 4 && row.echo && openai_row_scores_prompt(&row));
    openai_row_deinit(&row);
}

/* null, like nothing, is OpenAI's default. */
static void test_defaults(void) {
    static const char *const texts[] = {
        "{\"prompt\": \"hey\"}",
        "{\"prompt\": \"hey\", \"custom_id\": null, \"model\": null, \"max_tokens\": null, \"temperature\": null, \"top_p\": null, "
        "\"n\": null, \"seed\": null, \"stop\": null, \"presence_penalty\": null, \"frequency_penalty\": null, \"logit_bias\": null, "
        "\"top_k\": null, \"min_p\": null, \"repetition_penalty\": null, \"ignore_eos\": null, \"return_token_ids\": null, "
        "\"prefill\": null, \"logprobs\": null, \"echo\": null, \"best_of\": null, \"user\": null, \"stream\": null, \"suffix\": null, "
        "\"stream_options\": null, \"messages\": null, \"tools\": null}",
    };
    for (int i = 0; i < 2; i++) {
        struct openai_row row = good(texts[i]);
        CHECK(!row.model && row.n == 1 && row.max_tokens == 16 && row.temperature == 1 && row.top_p == 1 && row.min_p == 0);
        CHECK(row.top_k == 0 && row.presence_penalty == 0 && row.frequency_penalty == 0 && row.repetition_penalty == 1);
        CHECK(row.n_stop == 0 && row.n_bias == 0 && row.logprobs == -1 && !row.echo && !row.ignore_eos && !row.return_token_ids);
        CHECK(row.prefill == ENGINE_PREFILL_EXACT && row.n_stop_id == 1 && row.stop_id[0] == TINY_END);
        openai_row_deinit(&row);
    }
    struct openai_row row = good("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}");
    CHECK(row.kind == OPENAI_CHAT && row.max_tokens == (int)context.context - row.n_prompt && row.logprobs == -1);
    openai_row_deinit(&row);
}

/* What fields mean together and at their edges. */
static void test_meaning(void) {
    struct openai_row row = good("{\"prompt\": \"hey\", \"top_p\": 0, \"top_k\": -1, \"echo\": true, \"max_tokens\": 0}");
    CHECK(row.top_k == 1 && row.top_p == 1 && row.max_tokens == 0);
    CHECK(row.prefill == ENGINE_PREFILL_CACHED && !openai_row_scores_prompt(&row), "echo is cached unless said otherwise");
    openai_row_deinit(&row);
    row = good("{\"prompt\": \"hey\", \"echo\": true, \"logprobs\": 0, \"prefill\": \"exact\", \"stop\": []}");
    CHECK(row.prefill == ENGINE_PREFILL_EXACT && row.logprobs == 0 && openai_row_scores_prompt(&row) && row.n_stop == 0);
    openai_row_deinit(&row);
    row = good("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"logprobs\": true, \"top_logprobs\": 20, \"stop\": \"q\", "
               "\"max_completion_tokens\": 9, \"max_tokens\": 9, \"tool_choice\": \"none\", \"tools\": [], \"modalities\": [\"text\"]}");
    CHECK(row.logprobs == 20 && row.max_tokens == 9 && row.n_stop == 1);
    openai_row_deinit(&row);
    row = good("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"logprobs\": true}");
    CHECK(row.logprobs == 0);
    openai_row_deinit(&row);
    row = good("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"logprobs\": false, \"top_logprobs\": 0}");
    CHECK(row.logprobs == -1);
    openai_row_deinit(&row);
    context.prefill = "cached";
    row = good("{\"prompt\": \"hey\"}");
    CHECK(row.prefill == ENGINE_PREFILL_CACHED, "the run's default");
    openai_row_deinit(&row);
    context.prefill = NULL;
    context.context = 20;
    row = good("{\"prompt\": [1,2,3,4,5,6,7,8,9,10]}");
    CHECK(row.max_tokens == 10, "the default ends with the context: %d", row.max_tokens);
    openai_row_deinit(&row);
    row = good("{\"prompt\": [1,2,3,4,5,6,7,8,9,10,1,2,3,4,5,6,7,8,9,10], \"max_tokens\": 0}");
    CHECK(row.max_tokens == 0 && row.n_prompt == 20);
    openai_row_deinit(&row);
    context.context = 4096;
}

static void test_prompts(void) {
    static const char *const ids[] = {"{\"prompt\": [256, 121]}", "{\"prompt\": [[256, 121]]}", "{\"prompt\": [\"hey\"]}", "{\"prompt\": \"hey\"}"};
    for (size_t i = 0; i < sizeof ids / sizeof ids[0]; i++) {
        struct openai_row row = good(ids[i]);
        CHECK(row.n_prompt == 2 && row.prompt && row.prompt[0] == TINY_HE && row.prompt[1] == 'y', "%s", ids[i]);
        openai_row_deinit(&row);
    }
    struct openai_row row = good("{\"prompt\": \"a\\u0000<|im_end|>\"}");
    CHECK(row.n_prompt == 3 && row.prompt[1] == 0 && row.prompt[2] == TINY_END, "a NUL is a byte, special tokens are parsed");
    openai_row_deinit(&row);
    /* a begin token of the tokenizer's is not the text's */
    struct tokenizer *plain = (struct tokenizer *)(uintptr_t)context.tokenizer, *bos = tiny_tokenizer(true);
    context.tokenizer = bos;
    row = good("{\"prompt\": \"hey\"}");
    CHECK(row.n_prompt == 3 && row.prompt[0] == TINY_EOS && row.n_added == 1);
    openai_row_deinit(&row);
    row = good("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}");
    CHECK(row.prompt[0] == TINY_START && row.n_added == 0, "a template writes its own begin token");
    openai_row_deinit(&row);
    context.tokenizer = plain;
    tokenizer_close(bos);
}

static void test_messages(void) {
    struct openai_row row = good("{\"messages\": [{\"role\": \"system\", \"content\": \"s\", \"name\": null}, {\"role\": \"user\", "
                                 "\"content\": [{\"type\": \"text\", \"text\": \"h\"}, {\"type\": \"text\", \"text\": \"ey\"}]}]}");
    const char *expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n";
    char *text;
    size_t bytes;
    REQUIRE(tokenizer_decode(context.tokenizer, row.prompt, row.n_prompt, false, &text, &bytes));
    CHECK(strcmp(text, expected) == 0, "%s", text);
    free(text);
    openai_row_deinit(&row);
}

struct bad {
    const char *text, *code, *words;
};

#define MESSAGES "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], "
#define PROMPT "{\"prompt\": \"hey\", "
static const struct bad bad_rows[] = {
    {"{\"prompt\": ", "invalid_json", "not JSON"},
    {"", "invalid_json", "not JSON"},
    {"[1]", "invalid_json", "expected a JSON object"},
    {"{\"prompt\": \"a\", \"prompt\": \"b\"}", "invalid_json", "duplicate"},
    {"{\"prompt\": \"\xff\"}", "invalid_json", "unable to decode byte 0xff"},
    {"{\"prompt\": \"a\", \"top_p\": NaN}", "invalid_json", "not JSON"},
    {"{}", "invalid_request", "either \"prompt\" or \"messages\", got none"},
    {"{\"prompt\": \"a\", \"messages\": []}", "invalid_request", "got both"},
    {PROMPT "\"frob\": 1}", "unknown_field", "frob: unknown field of /v1/completions"},
    {PROMPT "\"frob\": null}", "unknown_field", "frob: unknown field"},
    {PROMPT "\"top_logprobs\": 1}", "unknown_field", "top_logprobs: not a field of /v1/completions"},
    {MESSAGES "\"echo\": true}", "unknown_field", "echo: not a field of /v1/chat/completions"},
    {PROMPT "\"custom_id\": 5}", "invalid_request", "custom_id: expected a string that is not empty, got an integer 5"},
    {PROMPT "\"custom_id\": \"\"}", "invalid_request", "custom_id"},
    {PROMPT "\"custom_id\": \"a\\u0000\"}", "invalid_request", "custom_id"},
    {PROMPT "\"model\": 5}", "invalid_request", "model: expected a string, got an integer 5"},
    {PROMPT "\"max_tokens\": -1}", "invalid_request", "max_tokens: expected an integer from 0 to"},
    {PROMPT "\"max_tokens\": 1.5}", "invalid_request", "max_tokens: expected an integer from 0 to 2.14748e+09, got a number with a fraction 1.5"},
    {PROMPT "\"max_tokens\": \"5\"}", "invalid_request", "got a string \"5\""},
    {PROMPT "\"max_tokens\": 4095}", "invalid_request", "max_tokens: expected at most 4094 after a prompt of 2 tokens"},
    {MESSAGES "\"max_completion_tokens\": 4095}", "invalid_request", "max_completion_tokens: expected at most"},
    {MESSAGES "\"max_completion_tokens\": 4, \"max_tokens\": 5}", "invalid_request", "max_tokens: 5, but max_completion_tokens is 4"},
    {PROMPT "\"temperature\": 2.5}", "invalid_request", "temperature: expected a number from 0 to 2, got a number with a fraction 2.5"},
    {PROMPT "\"temperature\": -0.5}", "invalid_request", "temperature"},
    {PROMPT "\"temperature\": \"hot\"}", "invalid_request", "temperature: expected a number from 0 to 2, got a string \"hot\""},
    {PROMPT "\"temperature\": true}", "invalid_request", "temperature"},
    {PROMPT "\"top_p\": 1.5}", "invalid_request", "top_p"},
    {PROMPT "\"n\": 0}", "invalid_request", "n: expected an integer from 1 to 128, got an integer 0"},
    {PROMPT "\"n\": 129}", "invalid_request", "n: "},
    {PROMPT "\"seed\": 1.5}", "invalid_request", "seed: expected an integer"},
    {PROMPT "\"stop\": 5}", "invalid_request", "stop: expected a string or a list of strings, got an integer 5"},
    {PROMPT "\"stop\": \"\"}", "invalid_request", "stop: expected a string that is not empty"},
    {PROMPT "\"stop\": [\"a\", \"\"]}", "invalid_request", "stop[1]"},
    {PROMPT "\"stop\": [\"a\", null]}", "invalid_request", "stop[1]: expected a string that is not empty, got null"},
    {PROMPT "\"stop\": \"a\\u0000\"}", "invalid_request", "U+0000"},
    {PROMPT "\"presence_penalty\": 2.5}", "invalid_request", "presence_penalty"},
    {PROMPT "\"frequency_penalty\": -2.5}", "invalid_request", "frequency_penalty"},
    {PROMPT "\"repetition_penalty\": 0}", "invalid_request", "repetition_penalty: expected a number above 0 up to 10, got an integer 0"},
    {PROMPT "\"logit_bias\": [1]}", "invalid_request", "logit_bias: expected an object, got a list"},
    {PROMPT "\"logit_bias\": {\"264\": 1}}", "invalid_request", "logit_bias: expected token ids from 0 to 263 as names, got \"264\""},
    {PROMPT "\"logit_bias\": {\"-1\": 1}}", "invalid_request", "logit_bias"},
    {PROMPT "\"logit_bias\": {\"99999999999999999999\": 1}}", "invalid_request", "logit_bias"},
    {PROMPT "\"logit_bias\": {\"a\": 1}}", "invalid_request", "logit_bias"},
    {PROMPT "\"logit_bias\": {\"5\": 101}}", "invalid_request", "logit_bias[\"5\"]: expected a number from -100 to 100"},
    {PROMPT "\"logit_bias\": {\"5\": 1, \"05\": 1}}", "invalid_request", "given twice"},
    {PROMPT "\"top_k\": -2}", "invalid_request", "top_k"},
    {PROMPT "\"min_p\": -0.1}", "invalid_request", "min_p"},
    {PROMPT "\"ignore_eos\": 1}", "invalid_request", "ignore_eos: expected true or false, got an integer 1"},
    {PROMPT "\"return_token_ids\": \"yes\"}", "invalid_request", "return_token_ids"},
    {PROMPT "\"prefill\": \"fast\"}", "invalid_request", "prefill: expected \"exact\" or \"cached\", got \"fast\""},
    {PROMPT "\"prefill\": 1}", "invalid_request", "prefill: expected a string"},
    {PROMPT "\"logprobs\": true}", "invalid_request", "logprobs: expected an integer from 0 to 20, got a boolean true"},
    {PROMPT "\"logprobs\": 21}", "invalid_request", "logprobs"},
    {PROMPT "\"echo\": \"no\"}", "invalid_request", "echo"},
    {MESSAGES "\"logprobs\": 5}", "invalid_request", "logprobs: expected true or false"},
    {MESSAGES "\"logprobs\": true, \"top_logprobs\": 21}", "invalid_request", "top_logprobs"},
    {MESSAGES "\"top_logprobs\": 2}", "invalid_request", "top_logprobs: needs \"logprobs\": true"},
    {PROMPT "\"user\": 5}", "invalid_request", "user: expected a string"},
    {PROMPT "\"metadata\": \"x\"}", "invalid_request", "metadata: expected an object"},
    {PROMPT "\"store\": 1}", "invalid_request", "store: expected a boolean"},
    {PROMPT "\"stream\": true}", "unsupported", "stream: not supported (got true)"},
    {PROMPT "\"stream_options\": {}}", "unsupported", "stream_options: not supported"},
    {PROMPT "\"best_of\": 2}", "unsupported", "best_of: not supported unless equal to n (1), got 2"},
    {PROMPT "\"best_of\": 0}", "invalid_request", "best_of"},
    {PROMPT "\"suffix\": \"x\"}", "unsupported", "suffix: not supported"},
    {MESSAGES "\"tools\": [{\"type\": \"function\"}]}", "unsupported", "tools: not supported"},
    {MESSAGES "\"tool_choice\": \"auto\"}", "unsupported", "tool_choice"},
    {MESSAGES "\"functions\": [{}]}", "unsupported", "functions"},
    {MESSAGES "\"function_call\": \"auto\"}", "unsupported", "function_call"},
    {MESSAGES "\"response_format\": {\"type\": \"json_object\"}}", "unsupported", "response_format: only {\"type\": \"text\"}"},
    {MESSAGES "\"response_format\": \"text\"}", "invalid_request", "response_format: expected an object"},
    {MESSAGES "\"modalities\": [\"text\", \"audio\"]}", "unsupported", "modalities"},
    {MESSAGES "\"audio\": {}}", "unsupported", "audio"},
    {MESSAGES "\"reasoning_effort\": \"high\"}", "unsupported", "reasoning_effort"},
    {"{\"prompt\": \"\"}", "invalid_request", "prompt: expected at least one token"},
    {"{\"prompt\": []}", "invalid_request", "prompt: expected at least one token"},
    {"{\"prompt\": 5}", "invalid_request", "prompt: expected text or a list of token ids, got an integer 5"},
    {"{\"prompt\": [\"a\", \"b\"]}", "unsupported", "prompt: one prompt a row is supported, got a list of 2"},
    {"{\"prompt\": [[1], [2]]}", "unsupported", "prompt: one prompt a row"},
    {"{\"prompt\": [1, 264]}", "invalid_request", "prompt[1]: expected a token id from 0 to 263, got an integer 264"},
    {"{\"prompt\": [1, -1]}", "invalid_request", "prompt[1]"},
    {"{\"prompt\": [1, \"a\"]}", "invalid_request", "prompt[1]: expected a token id from 0 to 263, got a string"},
    {"{\"prompt\": [[1, null]]}", "invalid_request", "prompt[1]"},
    {"{\"messages\": []}", "invalid_request", "messages: expected a list of at least one message"},
    {"{\"messages\": \"x\"}", "invalid_request", "messages: expected a list"},
    {"{\"messages\": [5]}", "invalid_request", "messages[0]: expected an object, got an integer 5"},
    {"{\"messages\": [{\"content\": \"x\"}]}", "invalid_request", "messages[0].role: missing"},
    {"{\"messages\": [{\"role\": 5, \"content\": \"x\"}]}", "invalid_request", "messages[0].role: expected a string"},
    {"{\"messages\": [{\"role\": \"user\"}]}", "invalid_request", "messages[0].content: missing"},
    {"{\"messages\": [{\"role\": \"user\", \"content\": 5}]}", "invalid_request", "messages[0].content: expected a string or a list"},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\\u0000b\"}]}", "invalid_request", "messages[0].content: cannot hold"},
    {"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {}}]}]}", "unsupported", "messages[0].content[0]"},
    {"{\"messages\": [{\"role\": \"user\", \"content\": [5]}]}", "invalid_request", "messages[0].content[0]"},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"x\", \"tool_calls\": []}]}", "unsupported", "messages[0].tool_calls: not supported"},
    {"{\"messages\": [{\"role\": \"bard\", \"content\": \"x\"}]}", "invalid_request", "bard"},
    {"{\"custom_id\": \"a\", \"method\": \"GET\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": \"x\"}}", "invalid_request", "method: expected \"POST\", got a string \"GET\""},
    {"{\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/embeddings\", \"body\": {\"input\": \"x\"}}", "invalid_request", "url: expected"},
    {"{\"custom_id\": \"a\", \"method\": \"POST\", \"body\": {\"prompt\": \"x\"}}", "invalid_request", "url: missing"},
    {"{\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/completions\"}", "invalid_request", "body: missing"},
    {"{\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": 5}", "invalid_request", "body: expected an object"},
    {"{\"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": \"x\"}, \"n\": 1}", "unknown_field", "n: unknown field beside"},
    {"{\"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"messages\": []}}", "unknown_field", "messages: not a field of /v1/completions"},
    {"{\"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\": {}}", "invalid_request", "messages: missing"},
    {"{\"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {}}", "invalid_request", "prompt: missing"},
};

static void check_bad(const struct bad *bad) {
    struct openai_row row;
    const char *code;
    int status = parse(bad->text, &row, &code);
    CHECK(status == STATUS_INPUT, "%s: status %d", bad->text, status);
    CHECK(strcmp(code, bad->code) == 0, "%s: code %s", bad->text, code);
    CHECK(strstr(base_error(), bad->words), "%s: %s", bad->text, base_error());
    CHECK(!row.prompt && !row.stop && !row.model && !row.bias && !row.stop_id, "%s: not empty", bad->text);
    base_clear_error();
    if (status == 0)
        openai_row_deinit(&row);
}

static void test_bad(void) {
    for (size_t i = 0; i < sizeof bad_rows / sizeof bad_rows[0]; i++)
        check_bad(&bad_rows[i]);
    const struct tokenizer *tokenizer = context.tokenizer;
    const struct chat_template *chat = context.chat;
    context.tokenizer = NULL;
    context.chat = NULL;
    snprintf(context.chat_error, sizeof context.chat_error, "no template here");
    check_bad(&(struct bad){MESSAGES "\"n\": 1}", "invalid_request", "messages: no template here"});
    check_bad(&(struct bad){"{\"prompt\": \"a\"}", "invalid_request", "the model has no tokenizer"});
    check_bad(&(struct bad){"{\"prompt\": [1], \"stop\": \"a\"}", "invalid_request", "stop: the model has no tokenizer"});
    struct openai_row row = good("{\"prompt\": [1]}");
    openai_row_deinit(&row);
    context.tokenizer = tokenizer;
    context.chat = chat;
    context.context = 3;
    check_bad(&(struct bad){"{\"prompt\": [1,2,3,4]}", "invalid_request", "prompt: expected at most 3 tokens (the context), got 4"});
    check_bad(&(struct bad){"{\"prompt\": [1,2,3]}", "invalid_request", "leave no room"});
    context.context = 4096;
}

static void read_item(const char *text, struct openai_item *item) { REQUIRE(openai_item_read(text, strlen(text), "12", item)); }

static bool same_digest(const char *a, const char *b) {
    struct openai_item x, y;
    read_item(a, &x);
    read_item(b, &y);
    bool same = memcmp(x.digest, y.digest, sizeof x.digest) == 0;
    openai_item_deinit(&x);
    openai_item_deinit(&y);
    return same;
}

static void test_ids(void) {
    static const char *const names[][2] = {
        {"{\"custom_id\": \"abc\", \"prompt\": \"x\"}", "abc"}, {"{\"prompt\": \"x\"}", "12"}, {"{\"custom_id\": 5}", "12"},
        {"{\"custom_id\": \"\"}", "12"}, {"{\"custom_id\": \"a\\u0000\"}", "12"}, {"nonsense", "12"},
    };
    struct openai_item item;
    char id[OPENAI_ID_BYTES], other[OPENAI_ID_BYTES];
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        read_item(names[i][0], &item);
        CHECK(strcmp(item.custom_id, names[i][1]) == 0, "%s", item.custom_id);
        openai_item_deinit(&item);
    }
    CHECK(same_digest("{\"prompt\": \"x\", \"n\": 1}", "{ \"n\":1,\"prompt\":\"\\u0078\"}"), "keys' order, spaces and escapes do not count");
    CHECK(same_digest("{\"prompt\": \"x\"}", "{\"prompt\": \"x\", \"custom_id\": \"12\"}"), "the line number is a name");
    CHECK(!same_digest("{\"prompt\": \"x\"}", "{\"prompt\": \"x\", \"custom_id\": \"13\"}"));
    CHECK(!same_digest("{\"prompt\": \"x\"}", "{\"prompt\": \"y\"}"));
    CHECK(!same_digest("{\"prompt\": \"x\"}", "{\"prompt\": \"x\", \"n\": 1}"));
    CHECK(!same_digest("nonsense", "nonsens"));
    CHECK(same_digest("nonsense", "nonsense"));
    /* SHA-256(SHA-256('{"custom_id":"12","prompt":"x"}') SHA-256("s")), from Python's hashlib */
    read_item("{\"prompt\": \"x\"}", &item);
    openai_id(item.digest, "s", id);
    CHECK(strcmp(id, "kv-1735c692053ea182") == 0, "%s", id);
    openai_id(item.digest, "t", other);
    CHECK(strcmp(id, other) != 0, "settings count");
    openai_item_deinit(&item);
}

static uint64_t seed_of(const char *text, uint64_t run_seed) {
    context.seed = run_seed;
    struct openai_row row = good(text);
    uint64_t seed = row.seed;
    openai_row_deinit(&row);
    context.seed = 0;
    return seed;
}

static void test_seeds(void) {
    uint64_t seed = seed_of("{\"custom_id\": \"a\", \"prompt\": \"x\"}", 0);
    CHECK(seed != 0 && seed == seed_of("{\"custom_id\": \"a\", \"prompt\": \"x\"}", 0), "the same row, the same seed");
    CHECK(seed != seed_of("{\"custom_id\": \"b\", \"prompt\": \"x\"}", 0), "equal questions get different answers");
    CHECK(seed != seed_of("{\"custom_id\": \"a\", \"prompt\": \"x\"}", 1), "the run's seed counts");
    CHECK(seed_of("{\"prompt\": \"x\", \"seed\": 0}", 5) == 0 && seed_of("{\"prompt\": \"x\", \"seed\": 9}", 5) == 9, "unless the row has one");
}

int main(void) {
    static const int32_t stop_id[] = {TINY_END};
    struct tokenizer *tokenizer = tiny_tokenizer(false);
    context = (struct openai_context){.tokenizer = tokenizer, .model = "tiny", .vocab = TINY_VOCAB, .context = 4096, .n_stop = 1,
                                      .stop_id = stop_id};
    REQUIRE(chat_find(TINY_CHAT, "tiny", &context.chat));
    test_fields();
    test_defaults();
    test_meaning();
    test_prompts();
    test_messages();
    test_bad();
    test_ids();
    test_seeds();
    tokenizer_close(tokenizer);
    return test_report();
}
