/* Whatever is wrong with a row ends here as a line of the output; any other failure is passed on and ends the run. */
#include "launch/batch_job.h"

#include <stdlib.h>
#include <string.h>

#include "launch/journal.h"

enum { FAILED_SHOWN = 5 };
_Static_assert((int)OPENAI_ID_BYTES == (int)JOURNAL_ID_BYTES, "a row's id is its line's");

void batch_job_free(struct batch_job *job) {
    if (!job)
        return;
    if (job->previous)
        *job->previous = job->next;
    if (job->next)
        job->next->previous = job->previous;
    openai_answer_free(job->answer);
    openai_row_deinit(&job->row);
    free(job->sequence);
    free(job);
}

static int job_submit(struct engine *engine, struct batch_job *job) {
    int n = openai_answer_n_sequences(job->answer);
    TRY(base_alloc(&job->sequence, (size_t)n, sizeof *job->sequence));
    for (int i = 0; i < n; i++) {
        struct engine_request request;
        openai_answer_request(job->answer, i, &request);
        job->sequence[i] = (struct batch_sequence){.job = job, .choice = i};
        request.user = &job->sequence[i];
        TRY(engine_submit(engine, &request, &job->sequence[i].id));
        job->n_open++;
    }
    return 0;
}

static int job_begin(struct batch_desk *desk, int index, struct batch_job *job, const char **code) {
    struct openai_item item;
    TRY(batch_input_read(desk->input, index, &item));
    int status = openai_row_parse(&item, desk->context, &job->row, code);
    openai_item_deinit(&item);
    TRY(status);
    TRY(openai_answer_new(&job->row, desk->context, &job->answer));
    return job_submit(desk->engine, job);
}

static int job_fail(struct batch_desk *desk, struct batch_job *job, const char *code) {
    if (desk->n_failed++ < FAILED_SHOWN)
        log_warn("row \"%s\" (line %lld) cannot be served: %s", job->from->custom_id, (long long)job->from->line, base_error());
    journal_line_error(&desk->line, job->id, job->from->custom_id, code, base_error());
    base_clear_error();
    return desk->line.status;
}

int batch_job_start(struct batch_desk *desk, int index, const char *id) {
    const char *code = NULL; /* stays so while the trouble is the file's */
    struct batch_job *job = NULL;
    TRY(base_alloc(&job, 1, sizeof *job));
    job->from = batch_input_row(desk->input, index);
    memcpy(job->id, id, sizeof job->id);
    job->next = desk->jobs;
    job->previous = &desk->jobs;
    if (job->next)
        job->next->previous = &job->next;
    desk->jobs = job;
    int status = job_begin(desk, index, job, &code);
    if (status >= 0)
        return 0;
    if (status == STATUS_INPUT && code)
        status = job_fail(desk, job, code);
    job->dropped = true;
    for (int i = 0; i < job->n_open; i++)
        engine_cancel(desk->engine, job->sequence[i].id);
    if (job->n_open == 0)
        batch_job_free(job);
    return status;
}

int batch_job_add(struct batch_desk *desk, const struct engine_event *event, int64_t created, bool *done) {
    struct batch_sequence *sequence = event->user;
    struct batch_job *job = sequence->job;
    struct openai_news news;
    job->n_open -= event->kind == ENGINE_FINISHED;
    *done = job->n_open == 0;
    if (job->dropped)
        return 0;
    TRY(openai_answer_add(job->answer, sequence->choice, event, &news));
    if (news.cancel)
        engine_cancel(desk->engine, sequence->id);
    if (!*done)
        return 0;
    journal_line_begin(&desk->line, job->id, job->from->custom_id);
    TRY(openai_answer_write(job->answer, job->id, created, &desk->line));
    journal_line_end(&desk->line);
    return desk->line.status;
}
