/* Rank 0 turns the options into the body that a batch row would have, so that fields, checks and the --json answer are the
 * same code (openai.h), and reads the prompt before the engine opens: what is allocated is what this prompt needs.
 * The other ranks follow. */
#include "launch/generate.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "launch/generate_report.h"
#include "launch/openai.h"
#include "launch/progress.h"
#include "launch/signals.h"

enum {
    PROMPT_MAX_BYTES = 1 << 28, /* 1M tokens are some 5 MB of text: more is some other file */
    READ_BYTES = 1 << 16,
};

struct choice {
    char *text;   /* n > 1: what is final so far */
    size_t bytes;
    bool done;
    int64_t id;   /* of its sequence */
};

struct generate { /* rank 0 */
    struct run *run;
    char *prompt;
    size_t prompt_bytes;
    struct model_file *file;
    struct tokenizer *tokenizer;
    struct openai_context context;
    struct openai_item item;
    struct openai_row row;
    struct openai_answer *answer;
    struct choice *choices; /* [n_choices] */
    int n_choices, n_printed;
    char last;              /* byte written to standard output */
    struct progress progress;
    struct generate_times times;
};

/* ---- the prompt ------------------------------------------------------------------------------------------------------- */

static int read_stream(FILE *file, const char *name, char **text, size_t *bytes) {
    size_t used = 0, room = 0;
    char *memory = NULL;
    do {
        if (used + READ_BYTES + 1 > room) {
            room = 2 * room + READ_BYTES + 1;
            char *grown = realloc(memory, room);
            if (!grown) {
                free(memory);
                FAIL(STATUS_MEMORY, "out of memory for the prompt");
            }
            memory = grown;
        }
        size_t got = fread(memory + used, 1, READ_BYTES, file);
        used += got;
        if (got == 0)
            break;
    } while (used <= PROMPT_MAX_BYTES);
    if (ferror(file) || used > PROMPT_MAX_BYTES) {
        free(memory);
        FAIL(STATUS_INPUT, "prompt file %s: %s", name, used > PROMPT_MAX_BYTES ? "larger than 256 MiB" : strerror(errno));
    }
    if (used && memory[used - 1] == '\n')
        used--;
    memory[used] = '\0';
    *text = memory;
    *bytes = used;
    return STATUS_OK;
}

static int read_prompt(const struct options *options, char **text, size_t *bytes) {
    if (!options->prompt == !options->prompt_file)
        FAIL(STATUS_USAGE, "one of --prompt and --prompt-file is needed");
    if (options->prompt) {
        *text = strdup(options->prompt);
        if (!*text)
            FAIL(STATUS_MEMORY, "out of memory for the prompt");
        *bytes = strlen(*text);
        return STATUS_OK;
    }
    if (strcmp(options->prompt_file, "-") == 0)
        return read_stream(stdin, "-", text, bytes);
    FILE *file = fopen(options->prompt_file, "rbe");
    if (!file)
        FAIL(STATUS_INPUT, "prompt file %s: %s", options->prompt_file, strerror(errno));
    int status = read_stream(file, options->prompt_file, text, bytes);
    fclose(file);
    return status;
}

/* ---- options to a body ------------------------------------------------------------------------------------------------ */

static int put(json_t *body, const char *name, json_t *value) {
    if (json_object_set_new(body, name, value) != 0)
        FAIL(STATUS_INPUT, "option %s: not UTF-8 text", name);
    return STATUS_OK;
}

static int put_message(json_t *messages, const char *role, const char *text, size_t bytes) {
    json_t *content = json_stringn(text, bytes);
    if (!content || json_array_append_new(messages, json_pack("{s:s, s:o}", "role", role, "content", content)) != 0)
        FAIL(STATUS_INPUT, "the %s is not UTF-8 text", strcmp(role, "user") == 0 ? "prompt" : "system message");
    return STATUS_OK;
}

static int put_prompt(const struct generate *g, const struct options *o, json_t *body) {
    if (o->chat) {
        json_t *messages = json_array();
        TRY(put(body, "messages", messages));
        if (o->system)
            TRY(put_message(messages, "system", o->system, strlen(o->system)));
        return put_message(messages, "user", g->prompt, g->prompt_bytes);
    }
    if (o->system)
        FAIL(STATUS_USAGE, "--system needs --chat");
    return put(body, "prompt", json_stringn(g->prompt, g->prompt_bytes));
}

static int put_logit_bias(const char *list, json_t *body) {
    json_t *biases = json_object();
    TRY(put(body, "logit_bias", biases));
    while (*list) {
        char id[16];
        int used = 0;
        double bias;
        if (sscanf(list, "%15[0-9]:%lf%n", id, &bias, &used) != 2 || (list[used] && list[used] != ','))
            FAIL(STATUS_USAGE, "option --logit-bias: '%s' is not of the form id:bias,id:bias", list);
        TRY(put(biases, id, json_real(bias)));
        list += used + (list[used] == ',');
    }
    return STATUS_OK;
}

static int put_scores(const struct options *o, json_t *body) {
    if (o->logprobs >= 0 && o->chat) {
        TRY(put(body, "logprobs", json_true()));
        TRY(put(body, "top_logprobs", json_integer(o->logprobs)));
    } else if (o->logprobs >= 0) {
        TRY(put(body, "logprobs", json_integer(o->logprobs)));
    }
    if (o->echo && o->chat)
        FAIL(STATUS_USAGE, "--echo does not go with --chat");
    if (o->echo)
        TRY(put(body, "echo", json_true()));
    if (o->return_token_ids)
        TRY(put(body, "return_token_ids", json_true()));
    return STATUS_OK;
}

/* Only what the user gave: the rest keeps the body's defaults, which are the options' too. */
static int put_sampling(const struct options *o, json_t *body) {
    const struct {
        const char *option, *field;
        double value;
    } reals[] = {
        {"temperature", "temperature", (double)o->temperature},
        {"top-p", "top_p", (double)o->top_p},
        {"min-p", "min_p", (double)o->min_p},
        {"presence-penalty", "presence_penalty", (double)o->presence_penalty},
        {"frequency-penalty", "frequency_penalty", (double)o->frequency_penalty},
        {"repetition-penalty", "repetition_penalty", (double)o->repetition_penalty},
    };
    for (size_t i = 0; i < sizeof reals / sizeof reals[0]; i++)
        if (options_given(o, reals[i].option))
            TRY(put(body, reals[i].field, json_real(reals[i].value)));
    if (options_given(o, "top-k"))
        TRY(put(body, "top_k", json_integer(o->top_k)));
    TRY(put(body, "max_tokens", json_integer(options_given(o, "max-tokens") ? o->max_tokens : 0)));
    TRY(put(body, "n", json_integer(o->n)));
    TRY(put(body, "seed", json_integer((json_int_t)o->seed)));
    if (o->ignore_eos)
        TRY(put(body, "ignore_eos", json_true()));
    if (o->logit_bias)
        TRY(put_logit_bias(o->logit_bias, body));
    if (!o->n_stop)
        return STATUS_OK;
    json_t *stop = json_array();
    TRY(put(body, "stop", stop));
    for (int i = 0; i < o->n_stop; i++)
        if (json_array_append_new(stop, json_string(o->stop[i])) != 0)
            FAIL(STATUS_INPUT, "option stop: not UTF-8 text");
    return STATUS_OK;
}

static int make_body(const struct generate *g, const struct options *o, json_t *body) {
    TRY(put_prompt(g, o, body));
    TRY(put_sampling(o, body));
    TRY(put_scores(o, body));
    return STATUS_OK;
}

/* ---- before the engine ------------------------------------------------------------------------------------------------ */

/* openai_context_init wants an open engine; here the model's files must do. */
static int make_context(struct generate *g, const struct options *o) {
    const struct model_config *config = model_file_config(g->file);
    const struct tokenizer_source *source = model_file_tokenizer(g->file);
    TRY(tokenizer_open(source, config->vocab, &g->tokenizer));
    const char *path = model_file_path(g->file), *slash = strrchr(path, '/');
    g->context = (struct openai_context){
        .tokenizer = g->tokenizer,
        .model = slash && slash[1] ? slash + 1 : path,
        .vocab = config->vocab,
        .context = o->engine.context ? o->engine.context : config->context,
        .n_stop = config->n_stop,
        .stop_id = config->stop_id,
        .prefill = o->prefill,
    };
    if (o->chat)
        TRY(chat_find(source->chat_template, source->path, &g->context.chat));
    return STATUS_OK;
}

/* max-tokens that the user did not ask for yields to the context: the body says 0, and here it becomes what there is room for. */
static int parse_row(struct generate *g, const struct options *o) {
    const char *code;
    TRY(openai_row_parse(&g->item, &g->context, &g->row, &code));
    if (options_given(o, "max-tokens"))
        return STATUS_OK;
    int64_t room = g->context.context - g->row.n_prompt;
    if (room == 0)
        FAIL(STATUS_INPUT, "prompt: %d tokens fill the context and leave no room for a new one", g->row.n_prompt);
    g->row.max_tokens = (int)min_i64(o->max_tokens, room);
    return STATUS_OK;
}

static int prepare(struct generate *g, const struct options *o) {
    TRY(read_prompt(o, &g->prompt, &g->prompt_bytes));
    TRY(model_file_open(o->engine.model, &g->file));
    TRY(make_context(g, o));
    json_t *body = json_object();
    int status = make_body(g, o, body);
    if (status == STATUS_OK)
        status = openai_item_wrap(body, "generate", &g->item);
    json_decref(body);
    TRY(status);
    TRY(parse_row(g, o));
    TRY(openai_answer_new(&g->row, &g->context, &g->answer));
    g->n_choices = openai_answer_n_sequences(g->answer);
    return base_alloc(&g->choices, (size_t)g->n_choices, sizeof *g->choices);
}

/* Collective. Every rank opens the engine with what rank 0 found: a batch of n and a context that holds prompt and answer. */
static int open_engine(struct run *run, struct generate *g) {
    struct {
        int64_t status, context;
        int32_t batch, unused;
    } found = {.status = STATUS_OK};
    if (run->root) {
        found.status = prepare(g, run->options);
        found.batch = g->n_choices;
        found.context = (int64_t)g->row.n_prompt + g->row.max_tokens;
    }
    TRY(comm_broadcast(run->world, "prompt", &found, sizeof found, 0));
    if (found.status < 0)
        return base_fail_text((int)found.status, "rank 0 could not prepare the prompt"); /* rank 0 keeps its own text */
    struct engine_options options = run->options->engine;
    if (!options.context)
        options.context = max_i64(found.context, 1);
    if (!options.max_batch)
        options.max_batch = found.batch;
    return run_open_engine(run, &options);
}

/* ---- output ----------------------------------------------------------------------------------------------------------- */

static int write_text(struct generate *g, const char *text, size_t bytes) {
    if (bytes == 0)
        return STATUS_OK;
    progress_clear(&g->progress);
    g->last = text[bytes - 1];
    if (fwrite(text, 1, bytes, stdout) != bytes || fflush(stdout) != 0)
        FAIL(STATUS_FAILED, "standard output: %s", strerror(errno));
    return STATUS_OK;
}

static int end_line(struct generate *g) { return g->last && g->last != '\n' ? write_text(g, "\n", 1) : STATUS_OK; }

/* Prints choices that are complete, or all that there is, in their order. */
static int print_choices(struct generate *g, bool all) {
    while (g->n_choices > 1 && g->n_printed < g->n_choices && (g->choices[g->n_printed].done || all)) {
        const struct choice *choice = &g->choices[g->n_printed++];
        TRY(end_line(g));
        progress_clear(&g->progress);
        if (!g->run->options->quiet)
            fprintf(stderr, "choice %d of %d:\n", g->n_printed, g->n_choices);
        TRY(write_text(g, choice->text, choice->bytes));
    }
    return STATUS_OK;
}

static int take_text(struct generate *g, struct choice *choice, const char *text, size_t bytes) {
    if (g->run->options->json || bytes == 0)
        return STATUS_OK;
    if (g->n_choices == 1)
        return write_text(g, text, bytes);
    char *grown = realloc(choice->text, choice->bytes + bytes);
    if (!grown)
        FAIL(STATUS_MEMORY, "out of memory for the text of a choice");
    memcpy(grown + choice->bytes, text, bytes);
    choice->text = grown;
    choice->bytes += bytes;
    return STATUS_OK;
}

static int print_answer(struct generate *g) {
    struct json_text json = {0};
    char id[OPENAI_ID_BYTES];
    openai_id(g->item.digest, engine_settings(g->run->engine), id);
    int status = openai_answer_write(g->answer, id, (int64_t)time(NULL), &json);
    if (status == STATUS_OK)
        status = write_text(g, json.text, json.bytes);
    json_text_deinit(&json);
    return status;
}

/* ---- the work of rank 0 ------------------------------------------------------------------------------------------------ */

static int submit(struct generate *g) {
    for (int i = 0; i < g->n_choices; i++) {
        struct engine_request request;
        openai_answer_request(g->answer, i, &request);
        request.user = &g->choices[i];
        TRY(engine_submit(g->run->engine, &request, &g->choices[i].id));
    }
    g->times.submitted = base_seconds();
    return STATUS_OK;
}

static int take_event(struct generate *g, const struct engine_event *event) {
    struct choice *choice = event->user;
    struct openai_news news;
    if (event->kind == ENGINE_TOKEN)
        generate_times_token(&g->times);
    if (event->kind == ENGINE_FINISHED) {
        g->times.prefill_s += event->prefill_s;
        choice->done = true;
    }
    TRY(openai_answer_add(g->answer, (int)(choice - g->choices), event, &news));
    if (news.cancel)
        engine_cancel(g->run->engine, choice->id);
    TRY(take_text(g, choice, news.text, news.bytes));
    return g->run->options->json ? STATUS_OK : print_choices(g, false);
}

static void show_progress(struct generate *g) {
    int64_t done, total;
    engine_prefill_progress(g->run->engine, &done, &total);
    double elapsed = base_seconds() - g->times.submitted;
    bool streams = g->n_choices == 1 && !g->run->options->json;
    if (g->times.n_tokens == 0)
        progress_update(&g->progress, "prefill: %lld of %lld tokens, %.0f s", (long long)done, (long long)total, elapsed);
    else if (!streams) /* else the text is its own progress, and a line would stand in it */
        progress_update(&g->progress, "decode: %lld tokens, %.0f s", (long long)g->times.n_tokens, elapsed);
}

/* Until all choices are done or a signal comes. *signal is 0 or that signal. */
static int work(struct generate *g, int *signal) {
    int more = 1;
    while (more) {
        struct engine_event event;
        more = run_step(g->run);
        TRY(more);
        while (engine_next_event(g->run->engine, &event))
            TRY(take_event(g, &event));
        show_progress(g);
        *signal = signals_pending();
        if (*signal)
            return STATUS_OK;
    }
    if (!openai_answer_done(g->answer))
        FAIL(STATUS_FAILED, "the engine is idle but the answer is not complete");
    return STATUS_OK;
}

static int finish_output(struct generate *g, int signal) {
    bool json = g->run->options->json;
    if (json && !signal)
        TRY(print_answer(g));
    if (!json)
        TRY(print_choices(g, true));
    TRY(end_line(g));
    progress_finish(&g->progress);
    if (!g->run->options->quiet)
        generate_report(g->run, g->row.n_prompt, g->n_choices, &g->times, stderr);
    if (signal)
        FAIL(STATUS_INTERRUPTED, "stopped by signal %s after %lld tokens; run again", signals_name(signal),
             (long long)g->times.n_tokens);
    return STATUS_OK;
}

static int lead(struct generate *g) {
    const struct options *options = g->run->options;
    int signal = 0;
    progress_start(&g->progress, stderr, g->run->environment, options->quiet);
    int status = submit(g);
    if (status == STATUS_OK)
        status = work(g, &signal);
    if (status == STATUS_OK)
        status = finish_output(g, signal);
    progress_finish(&g->progress);
    if (g->run->broken)
        return status;
    int stopped = run_stop(g->run);
    return status < 0 ? status : stopped;
}

static void deinit(struct generate *g) {
    for (int i = 0; g->choices && i < g->n_choices; i++)
        free(g->choices[i].text);
    free(g->choices);
    openai_answer_free(g->answer);
    openai_row_deinit(&g->row);
    openai_item_deinit(&g->item);
    tokenizer_close(g->tokenizer);
    model_file_close(g->file);
    free(g->prompt);
}

int generate_main(struct run *run) {
    struct generate g = {.run = run};
    int status = open_engine(run, &g);
    if (status == STATUS_OK)
        status = run->root ? lead(&g) : run_follow(run);
    deinit(&g);
    return status;
}
