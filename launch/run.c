/* Opening the engine on every rank, and noting when the job is past saving. */
#include "launch/run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int print_place(struct run *run) {
    const struct grid *grid = engine_grid(run->engine);
    char *text = NULL;
    TRY(place_table(run->world, &run->place, grid->dp_rank, grid->tp_rank, grid->cp_rank, engine_device(run->engine), &text));
    if (run->root && !run->options->quiet && text)
        fputs(text, stderr);
    free(text);
    return STATUS_OK;
}

int run_open_engine(struct run *run, const struct engine_options *options) {
    double start = base_seconds();
    TRY(engine_open(run->world, options, &run->place, &run->engine));
    TRY(print_place(run));
    run->load_s = base_seconds() - start;
    return STATUS_OK;
}

static int note(struct run *run, int status) {
    if (status < 0)
        run->broken = true;
    return status;
}

int run_step(struct run *run) { return note(run, engine_step(run->engine)); }
int run_follow(struct run *run) { return note(run, engine_follow(run->engine)); }
int run_stop(struct run *run) { return note(run, engine_stop(run->engine)); }

int run_exit_code(int status) {
    switch (status) {
    case STATUS_OK:
        return 0;
    case STATUS_USAGE:
    case STATUS_INPUT:
        return 2;
    case STATUS_INTERRUPTED:
        return 75; /* EX_TEMPFAIL: a scheduler may start the job again */
    default:
        return status > 0 ? 0 : 1;
    }
}
