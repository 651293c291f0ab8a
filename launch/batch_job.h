/* One row of a batch while it is in the engine: parsed, its sequences submitted, its answer growing. */
#pragma once

#include "launch/batch_input.h"
#include "launch/openai.h"

struct batch_job;

struct batch_sequence { /* what an engine event's `user` points to */
    struct batch_job *job;
    int choice;
    int64_t id;
};

struct batch_job {
    struct batch_job *next, **previous; /* in the list of all jobs */
    const struct batch_row *from;
    char id[OPENAI_ID_BYTES];
    struct openai_row row;
    struct openai_answer *answer;
    struct batch_sequence *sequence; /* one for each sequence of the answer */
    int n_open;                      /* submitted and not finished */
    bool dropped;                    /* the row has failed: what still comes of its sequences is ignored */
};

struct batch_desk { /* where rows are served */
    struct engine *engine;
    const struct openai_context *context;
    const struct batch_input *input;
    struct batch_job *jobs;
    struct json_text line; /* lines that are due to be written */
    int n_failed;          /* rows that could not be served; the first few are also said on standard error */
};

/* Reads row `index` and submits its sequences: a new job. If the row cannot be served, its error line is appended to desk->line instead;
 * a job that is dropped halfway stays in the list until its sequences have finished. */
int batch_job_start(struct batch_desk *desk, int index, const char *id);

/* Takes an event of one of the job's sequences. With its last one the answer's line is appended to desk->line (not for a dropped job)
 * and *done is set: free the job. `created`: seconds since 1970. */
int batch_job_add(struct batch_desk *desk, const struct engine_event *event, int64_t created, bool *done);

/* Takes it out of its list. */
void batch_job_free(struct batch_job *job);
