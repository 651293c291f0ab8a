/* Batch's own work, on an engine made for the test: each sequence gets `max_tokens` letters, one a step, drawn from its prompt and seed.
 * Killed at every step and started again, stopped by signals, with rows that fail, changed rows, changed settings. */
#include <jansson.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launch/batch.h"
#include "launch/signals.h"
#include "tiny_tokenizer.h"

/* ---- the engine -------------------------------------------------------------------------------------------------------- */

enum { MAX_BATCH = 2, MAX_SEQUENCES = 64, MAX_EVENTS = 256 };

struct sequence {
    bool live, cancelled;
    int64_t id;
    struct engine_request request;
    int first, n_done;
};

static struct {
    struct tokenizer *tokenizer;
    struct model_config model;
    const char *settings;
    struct sequence sequence[MAX_SEQUENCES];
    struct engine_event event[MAX_EVENTS];
    int n_events, next_event, most_active;
    int64_t next_id;
    int n_steps, n_submitted;
    int die_at, stop_at; /* the step at which the process is killed, a signal comes; -1: never */
    bool stopped;
} fake;

void engine_request_init(struct engine_request *request) {
    *request = (struct engine_request){.temperature = 1, .top_p = 1, .repetition_penalty = 1, .logprobs = -1, .prompt_logprobs = -1};
}
const struct model_config *engine_model(const struct engine *engine) { (void)engine; return &fake.model; }
const char *engine_model_path(const struct engine *engine) { (void)engine; return "/models/fake.gguf"; }
const struct tokenizer *engine_tokenizer(const struct engine *engine) { (void)engine; return fake.tokenizer; }
const struct chat_template *engine_chat(const struct engine *engine) {
    (void)engine;
    base_fail(STATUS_INPUT, __FILE__, __LINE__, "the fake has no template");
    return NULL;
}
int64_t engine_context(const struct engine *engine) { (void)engine; return 100; }
int engine_max_batch(const struct engine *engine) { (void)engine; return MAX_BATCH; }
const char *engine_settings(const struct engine *engine) { (void)engine; return fake.settings; }

int engine_n_active(const struct engine *engine) {
    int n = 0;
    (void)engine;
    for (int i = 0; i < MAX_SEQUENCES; i++)
        n += fake.sequence[i].live;
    return n;
}

int engine_submit(struct engine *engine, const struct engine_request *request, int64_t *id) {
    fake.n_submitted++;
    if (request->prompt[0] == 'E')
        FAIL(STATUS_INPUT, "the fake does not like E");
    if (request->prompt[0] == 'F' && request->choice == 1)
        FAIL(STATUS_INPUT, "the fake does not like two of F");
    for (int i = 0; i < MAX_SEQUENCES; i++) {
        struct sequence *sequence = &fake.sequence[i];
        if (!sequence->live) {
            *sequence = (struct sequence){.live = true, .id = ++fake.next_id, .request = *request, .first = request->prompt[0]};
            *id = sequence->id;
            if (engine_n_active(engine) > fake.most_active)
                fake.most_active = engine_n_active(engine);
            return 0;
        }
    }
    FAIL(STATUS_FAILED, "too many sequences");
}

void engine_cancel(struct engine *engine, int64_t id) {
    (void)engine;
    for (int i = 0; i < MAX_SEQUENCES; i++)
        fake.sequence[i].cancelled |= fake.sequence[i].live && fake.sequence[i].id == id;
}

bool engine_next_event(struct engine *engine, struct engine_event *event) {
    (void)engine;
    if (fake.next_event == fake.n_events) {
        fake.next_event = fake.n_events = 0;
        return false;
    }
    *event = fake.event[fake.next_event++];
    return true;
}

void engine_prefill_progress(const struct engine *engine, int64_t *done, int64_t *total) { (void)engine; *done = *total = 0; }

/* The first MAX_BATCH live sequences get a token each. */
int run_step(struct run *run) {
    (void)run;
    if (fake.n_steps == fake.die_at)
        kill(getpid(), SIGKILL);
    if (fake.n_steps++ == fake.stop_at)
        raise(SIGTERM);
    for (int i = 0, n = 0; i < MAX_SEQUENCES && n < MAX_BATCH; i++) {
        struct sequence *s = &fake.sequence[i];
        if (!s->live)
            continue;
        n++;
        bool last = s->cancelled || s->n_done == s->request.max_tokens;
        struct engine_event event = {.kind = last ? ENGINE_FINISHED : ENGINE_TOKEN, .id = s->id, .user = s->request.user};
        event.finish = s->cancelled ? ENGINE_CANCELLED : ENGINE_LENGTH;
        event.token.id = 'a' + (int32_t)(test_hash(s->request.seed, (uint64_t)(s->first * 1000 + s->request.choice * 100 + s->n_done++)) % 26);
        s->live = !last;
        fake.event[fake.n_events++] = event;
    }
    return engine_n_active(run->engine) > 0;
}

int run_open_engine(struct run *run, const struct engine_options *options) { (void)run; (void)options; return 0; }
int run_follow(struct run *run) { (void)run; return 0; }
int run_stop(struct run *run) { (void)run; fake.stopped = true; return 0; }
int comm_agree(struct comm *comm, const char *what, int status) { (void)comm; (void)what; return status; }

/* ---- runs --------------------------------------------------------------------------------------------------------------- */

static char folder[] = "/tmp/test_batch.XXXXXX";
static char in_path[64], out_path[64];
static struct options options;
static const struct environment environment = {.launcher_rank = -1};

static const char rows[] =
    "{\"custom_id\": \"a\", \"prompt\": \"A\", \"max_tokens\": 3}\n"
    "{\"custom_id\": \"b\", \"prompt\": \"B\", \"max_tokens\": 6, \"n\": 3}\n"
    "not json\n"
    "{\"prompt\": \"D\", \"max_tokens\": 1}\n"
    "{\"custom_id\": \"e\", \"prompt\": \"E\"}\n"
    "{\"custom_id\": \"f\", \"prompt\": \"F\", \"n\": 2}\n"
    "{\"custom_id\": \"g\", \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n"
    "{\"custom_id\": \"h\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": \"H\", \"max_tokens\": 8}}\n"
    "{\"custom_id\": \"i\", \"prompt\": \"I\", \"stop\": [\"a\", \"e\", \"i\", \"o\", \"u\"], \"max_tokens\": 40}\n"
    "{\"custom_id\": \"j\", \"prompt\": \"J\", \"frob\": 1}\n";
enum { N_ROWS = 10, N_FAILED = 5 };

static void put(const char *text) {
    FILE *file = fopen(in_path, "w");
    if (!file || fputs(text, file) < 0 || fclose(file) != 0)
        exit(1);
}

static int run_batch(void) {
    struct tokenizer *tokenizer = fake.tokenizer;
    const char *settings = fake.settings;
    int die_at = fake.die_at, stop_at = fake.stop_at;
    memset(&fake, 0, sizeof fake);
    fake.tokenizer = tokenizer;
    fake.settings = settings;
    fake.die_at = die_at;
    fake.stop_at = stop_at;
    fake.model.vocab = TINY_VOCAB;
    struct run run = {.options = &options, .environment = &environment, .root = true};
    return batch_main(&run);
}

/* custom_id -> the row without what differs from run to run; a row twice is a failure. */
static json_t *read_rows(const char *path) {
    json_t *all = json_object();
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t capacity = 0;
    for (ssize_t bytes; file && (bytes = getline(&line, &capacity, file)) > 0;) {
        json_t *row = json_loadb(line, (size_t)bytes, 0, NULL);
        const char *name = json_string_value(json_object_get(row, "custom_id"));
        CHECK(name && !json_object_get(all, name), "broken or twice: %s", line);
        json_t *body = json_object_get(json_object_get(row, "response"), "body");
        json_object_del(body, "created");
        json_object_del(body, "timings");
        json_object_set_new(all, name ? name : "?", row);
    }
    free(line);
    if (file)
        fclose(file);
    return all;
}

static void check_same(const json_t *expected) {
    json_t *got = read_rows(out_path);
    char *text = json_equal(got, expected) ? NULL : json_dumps(got, JSON_INDENT(1));
    CHECK(json_equal(got, expected), "%s", text);
    free(text);
    json_decref(got);
}

static json_t *test_undisturbed(void) {
    put(rows);
    REQUIRE(run_batch());
    CHECK(fake.stopped && fake.most_active <= MAX_BATCH * 2 + 2, "%d sequences at once", fake.most_active);
    json_t *all = read_rows(out_path), *row;
    const char *name;
    int n_failed = 0;
    CHECK(json_object_size(all) == N_ROWS);
    json_object_foreach(all, name, row) {
        bool failed = !json_is_null(json_object_get(row, "error"));
        CHECK(failed == json_is_null(json_object_get(row, "response")), "%s", name);
        n_failed += failed;
    }
    CHECK(n_failed == N_FAILED, "%d failed", n_failed);
    const json_t *b = json_object_get(json_object_get(json_object_get(json_object_get(all, "b"), "response"), "body"), "choices");
    CHECK(json_array_size(b) == 3 && strcmp(json_string_value(json_object_get(json_array_get(b, 2), "finish_reason")), "length") == 0);
    const char *code = json_string_value(json_object_get(json_object_get(json_object_get(all, "3"), "error"), "code"));
    CHECK(code && strcmp(code, "invalid_json") == 0);
    const char *message = json_string_value(json_object_get(json_object_get(json_object_get(all, "f"), "error"), "message"));
    CHECK(message && strcmp(message, "the fake does not like two of F") == 0);
    /* once more: nothing to do */
    REQUIRE(run_batch());
    CHECK(fake.n_submitted == 0 && fake.stopped);
    check_same(all);
    return all;
}

static int run_apart(void) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0)
        _exit(run_batch() == 0 ? 0 : 3);
    int how = 0;
    waitpid(child, &how, 0);
    return how;
}

/* Killed after every number of steps, then again and again until it is done. */
static void test_kills(const json_t *expected) {
    for (int step = 0; step < 40; step++) {
        unlink(out_path);
        fake.die_at = step;
        int how = run_apart();
        CHECK(WIFSIGNALED(how) || WEXITSTATUS(how) == 0);
        fake.die_at = -1;
        REQUIRE(run_batch());
        check_same(expected);
    }
    unlink(out_path);
    fake.die_at = 16; /* as far as the longest row needs */
    int n_runs = 0, how;
    while (WIFSIGNALED(how = run_apart()) && n_runs < 100)
        n_runs++;
    CHECK(WIFEXITED(how) && WEXITSTATUS(how) == 0 && n_runs > 0, "%d runs", n_runs);
    fake.die_at = -1;
    check_same(expected);
}

static void test_signal(const json_t *expected) {
    unlink(out_path);
    fake.stop_at = 7;
    fflush(NULL);
    pid_t child = fork(); /* the signal stays pending in its process */
    if (child == 0) {
        REQUIRE(signals_install());
        int status = run_batch();
        _exit(status == STATUS_INTERRUPTED && fake.stopped && strstr(base_error(), "stopped by signal TERM with") ? 0 : 1);
    }
    int how = -1;
    waitpid(child, &how, 0);
    CHECK(how == 0);
    fake.stop_at = -1;
    json_t *some = read_rows(out_path);
    CHECK(json_object_size(some) > 0 && json_object_size(some) < N_ROWS, "%zu rows", json_object_size(some));
    json_decref(some);
    REQUIRE(run_batch());
    check_same(expected);
}

static void test_changes(const json_t *expected) {
    fake.settings = "cache=b";
    CHECK_FAILS(run_batch(), STATUS_INPUT, "a setting (model, cache, calibration, prefill, seed) has changed");
    fake.settings = "cache=a";
    options.seed = 4;
    CHECK_FAILS(run_batch(), STATUS_INPUT, "has changed");
    options.seed = 0;
    options.prefill = "exact";
    CHECK_FAILS(run_batch(), STATUS_INPUT, "has changed");
    options.prefill = NULL;
    put("{\"custom_id\": \"a\", \"prompt\": \"A\", \"max_tokens\": 3}\n");
    CHECK_FAILS(run_batch(), STATUS_INPUT, "it is the output of another input");
    char changed[sizeof rows + 64];
    snprintf(changed, sizeof changed, "%s", rows);
    *strchr(changed, '3') = '4';
    put(changed);
    CHECK_FAILS(run_batch(), STATUS_INPUT, "line 1 of");
    CHECK(fake.n_submitted == 0 && fake.stopped);
    snprintf(changed, sizeof changed, "%s{\"custom_id\": \"a\"}\n", rows);
    put(changed);
    CHECK_FAILS(run_batch(), STATUS_INPUT, "have the same custom_id \"a\"");
    check_same(expected);
    snprintf(changed, sizeof changed, "%s{\"custom_id\": \"k\", \"prompt\": \"K\"}\n", rows);
    put(changed); /* more rows are no change */
    REQUIRE(run_batch());
    CHECK(fake.n_submitted == 1);
    put(rows);
    unlink(out_path);
    REQUIRE(run_batch());
    check_same(expected);
}

static void test_retry_errors(const json_t *expected) {
    options.retry_errors = true;
    fake.die_at = 0;
    CHECK(WIFSIGNALED(run_apart()), "the E row is tried again");
    fake.die_at = -1;
    REQUIRE(run_batch());
    check_same(expected);
    REQUIRE(run_batch());
    CHECK(fake.n_submitted == 3, "%d: E, and F's two choices", fake.n_submitted);
    check_same(expected);
    options.retry_errors = false;
    REQUIRE(run_batch());
    CHECK(fake.n_submitted == 0);
}

static void test_files(void) {
    options.output = "/dev/full";
    if (access(options.output, W_OK) == 0) {
        CHECK_FAILS(run_batch(), STATUS_FAILED, "No space left");
        CHECK(fake.stopped, "the followers go home");
    }
    options.output = in_path;
    CHECK_FAILS(run_batch(), STATUS_USAGE, "are the same file");
    options.output = out_path;
    options.input = "/none";
    CHECK_FAILS(run_batch(), STATUS_INPUT, "/none: cannot be read");
    options.input = NULL;
    CHECK_FAILS(run_batch(), STATUS_USAGE, "--input");
    options.input = in_path;
}

int main(void) {
    if (!mkdtemp(folder)) {
        perror(folder);
        return 1;
    }
    base_set_log(LOG_ERROR, "");
    snprintf(in_path, sizeof in_path, "%s/in", folder);
    snprintf(out_path, sizeof out_path, "%s/out", folder);
    options = (struct options){.input = in_path, .output = out_path, .quiet = true};
    fake.tokenizer = tiny_tokenizer(false);
    fake.settings = "cache=a";
    fake.die_at = fake.stop_at = -1;
    json_t *expected = test_undisturbed();
    test_kills(expected);
    test_signal(expected);
    test_changes(expected);
    test_retry_errors(expected);
    test_files();
    json_decref(expected);
    tokenizer_close(fake.tokenizer);
    unlink(in_path);
    unlink(out_path);
    CHECK(rmdir(folder) == 0, "something was left in %s", folder);
    return test_report();
}
