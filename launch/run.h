/* What the commands that run on ranks share: the communicator, this rank's place, the engine, and how a job ends.
 *
 * main.c starts the ranks and calls the command's function on every one of them. The command opens the engine (run_open_engine,
 * collective), after that rank 0 (`root`) works and calls run_step, the others call run_follow until rank 0 calls run_stop.
 * A command returns its status; main.c closes the engine, lets the ranks agree, prints the one message and picks the exit code.
 * A failure inside run_step or run_follow is the whole job's: `broken` says that nothing collective may follow. */
#pragma once

#include "launch/environment.h"
#include "launch/options.h"

struct run {
    const struct options *options;
    const struct environment *environment;
    struct comm *world;
    struct place place;
    struct engine *engine;  /* NULL until run_open_engine */
    bool root;              /* rank 0 of the world */
    bool broken;            /* a collective failed */
    double load_s;          /* how long opening the engine took */
};

/* Collective. Opens the engine with these options (usually options->engine; a command may have filled in max_batch and context) and
 * prints on rank 0 who runs where, to standard error. */
int run_open_engine(struct run *run, const struct engine_options *options);

/* Rank 0: engine_step. Others: engine_follow. Rank 0: engine_stop. Each notes when the job is broken. */
int run_step(struct run *run);
int run_follow(struct run *run);
int run_stop(struct run *run);

/* The exit code of a status (INTERFACE.md): 0, 1, 2 or 75. */
int run_exit_code(int status);
