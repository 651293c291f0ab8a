/* Three parts: the files are read and locked before the model is loaded; what is due is decided when the settings are known, before
 * anything runs; then rows go in and lines come out until none is left or a signal asks for the end. */
#include "launch/batch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "launch/batch_input.h"
#include "launch/batch_job.h"
#include "launch/journal.h"
#include "launch/progress.h"
#include "launch/signals.h"

enum {
    ROWS_PER_SLOT = 2, /* sequences in the engine for each that it decodes at once: the next is there when one ends */
    NOTE_BYTES = 128,
};
static const double admit_seconds = 0.05; /* reading long rows pauses so that those that run go on */

struct batch {
    struct run *run;
    const char *output; /* path */
    struct batch_input *input;
    struct journal *journal;
    char *settings; /* whatever changes results */
    struct openai_context context;
    int *due; /* indices of rows */
    int n_due, next;
    struct batch_desk desk;
    struct progress progress;
    double started;
    int n_rows, n_before, n_answered; /* n_before: done by an earlier run */
    int64_t n_prompt_tokens, n_new_tokens;
};

static void batch_close(struct batch *batch) {
    while (batch->desk.jobs)
        batch_job_free(batch->desk.jobs);
    json_text_deinit(&batch->desk.line);
    journal_close(batch->journal);
    batch_input_close(batch->input);
    free(batch->settings);
    free(batch->due);
}

/* ---- what is due ------------------------------------------------------------------------------------------------------ */

static int batch_open_files(struct batch *batch) {
    const struct options *options = batch->run->options;
    if (!options->input)
        FAIL(STATUS_USAGE, "option --input is needed");
    TRY(batch_input_open(options->input, &batch->input));
    if (batch_input_is(batch->input, batch->output))
        FAIL(STATUS_USAGE, "--input and --output are the same file, %s", batch->output);
    return journal_open(batch->output, &batch->journal);
}

static int batch_set_settings(struct batch *batch) {
    const struct options *options = batch->run->options;
    const char *engine = engine_settings(batch->run->engine);
    int n = asprintf(&batch->settings, "%s prefill=%s seed=%llu", engine, options->prefill ? options->prefill : "auto",
                     (unsigned long long)options->seed);
    if (n < 0) {
        batch->settings = NULL;
        FAIL(STATUS_MEMORY, "no memory for the settings");
    }
    log_debug("batch: settings: %s", batch->settings);
    return 0;
}

/* Every line of the output has to answer a row of the input. */
static int batch_check_output(const struct batch *batch) {
    const struct options *options = batch->run->options;
    for (int i = 0; i < journal_n_entries(batch->journal); i++) {
        const struct journal_entry *entry = journal_entry_at(batch->journal, i);
        if (batch_input_find(batch->input, entry->custom_id) < 0)
            FAIL(STATUS_INPUT, "%s: line %lld answers custom_id \"%s\", which %s does not have: it is the output of another input",
                 batch->output, (long long)entry->line, entry->custom_id, options->input);
    }
    return 0;
}

static int batch_plan(struct batch *batch) {
    const struct options *options = batch->run->options;
    char id[OPENAI_ID_BYTES];
    batch->n_rows = batch_input_n_rows(batch->input);
    TRY(batch_set_settings(batch));
    TRY(batch_check_output(batch));
    TRY(base_alloc(&batch->due, (size_t)batch->n_rows, sizeof *batch->due));
    for (int i = 0; i < batch->n_rows; i++) {
        const struct batch_row *row = batch_input_row(batch->input, i);
        const struct journal_entry *entry = journal_find(batch->journal, row->custom_id);
        openai_id(row->digest, batch->settings, id);
        if (entry && strcmp(entry->id, id) != 0)
            FAIL(STATUS_INPUT,
                 "%s: line %lld answers custom_id \"%s\" as %s, but with the present row and settings it is %s: the row (line %lld of "
                 "%s) or a setting (model, cache, calibration, prefill, seed) has changed; use another output file",
                 batch->output, (long long)entry->line, row->custom_id, entry->id, id, (long long)row->line, options->input);
        if (!entry || (entry->failed && options->retry_errors))
            batch->due[batch->n_due++] = i;
    }
    batch->n_before = batch->n_rows - batch->n_due;
    return journal_begin(batch->journal, options->retry_errors);
}

/* ---- progress --------------------------------------------------------------------------------------------------------- */

static void batch_show(struct batch *batch) {
    char prefill[NOTE_BYTES] = "", left[NOTE_BYTES] = "";
    int64_t done, total;
    double seconds = base_seconds() - batch->started;
    int finished = batch->n_answered + batch->desk.n_failed;
    engine_prefill_progress(batch->run->engine, &done, &total);
    if (total > 0)
        snprintf(prefill, sizeof prefill, ", prefill %lld of %lld tokens", (long long)done, (long long)total);
    if (finished > 0)
        snprintf(left, sizeof left, ", %.0f s left", seconds / finished * (batch->n_due - finished));
    progress_update(&batch->progress, "batch: %d of %d rows, %d failed, %d sequences in work, %.1f new tokens/s%s%s",
                    batch->n_before + finished, batch->n_rows, batch->desk.n_failed, engine_n_active(batch->run->engine),
                    seconds > 0 ? (double)batch->n_new_tokens / seconds : 0.0, prefill, left);
}

static void batch_summarize(const struct batch *batch) {
    double seconds = base_seconds() - batch->started;
    double rate = seconds > 0 ? 1.0 / seconds : 0.0;
    log_info("batch: %d of %d rows done: %d answered and %d failed now, %d skipped (done before)", batch->n_before + batch->n_answered +
             batch->desk.n_failed, batch->n_rows, batch->n_answered, batch->desk.n_failed, batch->n_before);
    log_info("batch: %lld prompt and %lld new tokens in %.1f s (%.1f and %.1f tokens/s)", (long long)batch->n_prompt_tokens,
             (long long)batch->n_new_tokens, seconds, (double)batch->n_prompt_tokens * rate, (double)batch->n_new_tokens * rate);
}

/* ---- work ------------------------------------------------------------------------------------------------------------- */

/* Writes the line that is due, if any. */
static int batch_write(struct batch *batch) {
    if (batch->desk.line.bytes == 0)
        return 0;
    int status = journal_append(batch->journal, &batch->desk.line);
    batch->desk.line.bytes = 0;
    return status;
}

static int batch_admit_one(struct batch *batch) {
    char id[OPENAI_ID_BYTES];
    int index = batch->due[batch->next++];
    const struct batch_row *row = batch_input_row(batch->input, index);
    openai_id(row->digest, batch->settings, id);
    TRY(batch_job_start(&batch->desk, index, id));
    return batch_write(batch);
}

static int batch_admit(struct batch *batch) {
    struct engine *engine = batch->run->engine;
    double start = base_seconds();
    while (batch->next < batch->n_due && engine_n_active(engine) < ROWS_PER_SLOT * engine_max_batch(engine)) {
        TRY(batch_admit_one(batch));
        if (base_seconds() > start + admit_seconds && engine_n_active(engine) > 0)
            break;
    }
    return 0;
}

static int batch_take_events(struct batch *batch) {
    struct engine_event event;
    while (engine_next_event(batch->run->engine, &event)) {
        const struct batch_sequence *sequence = event.user;
        struct batch_job *job = sequence->job;
        bool done;
        batch->n_new_tokens += event.kind == ENGINE_TOKEN;
        TRY(batch_job_add(&batch->desk, &event, (int64_t)time(NULL), &done));
        if (!done)
            continue;
        if (!job->dropped) {
            batch->n_answered++;
            batch->n_prompt_tokens += job->row.n_prompt;
        }
        batch_job_free(job);
        TRY(batch_write(batch));
    }
    return 0;
}

static int batch_work(struct batch *batch) {
    while (batch->next < batch->n_due || batch->desk.jobs) {
        if (signals_pending())
            return 0;
        TRY(batch_admit(batch));
        int busy = run_step(batch->run);
        TRY(busy);
        TRY(batch_take_events(batch));
        if (!busy && batch->desk.jobs && engine_n_active(batch->run->engine) == 0)
            FAIL(STATUS_FAILED, "batch: the engine is idle, but row \"%s\" has not finished", batch->desk.jobs->from->custom_id);
        TRY(journal_tick(batch->journal));
        batch_show(batch);
    }
    return 0;
}

/* Rank 0, after the engine is open. */
static int batch_serve(struct batch *batch) {
    const struct options *options = batch->run->options;
    TRY(batch_plan(batch));
    openai_context_init(&batch->context, batch->run->engine, options->prefill, options->seed);
    batch->desk = (struct batch_desk){.engine = batch->run->engine, .context = &batch->context, .input = batch->input};
    batch->started = base_seconds();
    progress_start(&batch->progress, stderr, batch->run->environment, options->quiet);
    int status = batch_work(batch);
    progress_finish(&batch->progress);
    int synced = journal_sync(batch->journal); /* whatever happened: what was written stays */
    TRY(status);
    TRY(synced);
    batch_summarize(batch);
    int left = batch->n_due - batch->n_answered - batch->desk.n_failed;
    if (left > 0)
        FAIL(STATUS_INTERRUPTED, "stopped by signal %s with %d of %d rows to do; nothing is lost, run the same command again",
             signals_name(signals_pending()), left, batch->n_rows);
    return 0;
}

int batch_main(struct run *run) {
    struct batch batch = {.run = run, .output = run->options->output ? run->options->output : "/dev/stdout"};
    int status = run->root ? batch_open_files(&batch) : 0;
    status = comm_agree(run->world, "input and output", status);
    if (status == 0)
        status = run_open_engine(run, &run->options->engine);
    if (status == 0 && !run->root)
        status = run_follow(run);
    if (status == 0 && run->root) {
        status = batch_serve(&batch);
        int stopped = run->broken ? 0 : run_stop(run);
        status = status < 0 ? status : stopped;
    }
    batch_close(&batch);
    return status;
}
