/* The one binary. Owns the table of commands, the start and the end of the ranks, and the only way from a status to a message
 * and an exit code.
 *
 * Every rank parses the same command line. The ranks start before anybody complains, then agree on what each found, so that a
 * wrong option is said once, by rank 0, and no launcher kills the rank that is about to say it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/blas.h"
#include "launch/batch.h"
#include "launch/bench.h"
#include "launch/generate.h"
#include "launch/inspect.h"
#include "launch/plan.h"
#include "launch/signals.h"

struct command {
    enum options_command options;
    const char *summary;                        /* one line, for the list of commands */
    const char *about;                          /* for --help of the command */
    int (*on_ranks)(struct run *run);           /* either this, on every rank, */
    int (*alone)(const struct options *options); /* or this, in one process */
    bool model_optional;                        /* of on_ranks */
};

static const struct command commands[] = {
    {OPTIONS_GENERATE, "one prompt to text",
     "Generates text for one prompt. The text goes to standard output as it comes, everything else to standard error.\n"
     "Run it alone, or on ranks: mpirun -np 4 kvlinc generate --model M --cp 4 --chat --prompt 'Why is the sky blue?'",
     .on_ranks = generate_main},
    {OPTIONS_BATCH, "JSONL in, JSONL out, resumable",
     "Answers every row of a JSON Lines file (OpenAI's batch form, or bodies alone) and writes a line for each as soon as it is\n"
     "finished. Started again with the same files it does only what is missing.",
     .on_ranks = batch_main},
    {OPTIONS_INSPECT, "what a file holds, who gets what",
     "Shows what a model's files hold and, with a layout, how many bytes of weights each rank holds. Runs alone, computes nothing.",
     .alone = inspect_main},
    {OPTIONS_BENCH, "how fast machine and model are",
     "Measures memory, matrix products and collectives of all ranks at once, then decoding, prompts and memory in use of a model, and\n"
     "prints how much of the machine's own rates they reach. Run it on a quiet machine: mpirun -np 2 kvlinc bench --model M",
     .on_ranks = bench_main, .model_optional = true},
    {OPTIONS_PLAN, "what fits, how fast",
     "Says which layouts of a machine's GPUs hold a model, a cache and a context, where their memory goes, and how long a token and a prompt\n"
     "take, from a file of rates. Without --tp and --cp all layouts are compared, with --merge auto all ways of merging. Runs alone and\n"
     "measures nothing, so the machine need not be there:\n"
     "kvlinc plan --model configs/models/llama-3.1-8b.conf --cluster h200-8 --context 1000000",
     .alone = plan_main},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0], FOUND_BYTES = 2048 };

/* How long the other ranks give rank 0 to say what went wrong: a launcher ends the job with the first that fails. */
static void let_root_speak(void) {
    struct timespec rest = {.tv_sec = 3};
    while (nanosleep(&rest, &rest) != 0) /* a launcher that ends the job sends TERM first */
        continue;
}

static void print_commands(FILE *stream) {
    fprintf(stream, "kvlinc COMMAND [--name value]...\n\n");
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(stream, "    %-10s %s\n", options_command_name(commands[i].options), commands[i].summary);
    fprintf(stream, "\nkvlinc COMMAND --help lists the options; kvlinc --version the version.\n");
}

static const struct command *find_command(const char *name) {
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(options_command_name(commands[i].options), name) == 0)
            return &commands[i];
    return NULL;
}

static void print_error(void) {
    fprintf(stderr, "kvlinc: %s\n", base_error()[0] ? base_error() : "failed without a message");
    fflush(stderr);
}

static int print_help(const struct command *command) {
    char *text = options_help(command->options, command->about);
    if (!text)
        return 1;
    fputs(text, stdout);
    free(text);
    return fflush(stdout) == 0 ? 0 : 1;
}

static void set_log(const struct options *options, int rank) {
    char prefix[32] = "";
    if (rank > 0)
        snprintf(prefix, sizeof prefix, "rank %d: ", rank);
    base_set_log(options->verbose ? LOG_DEBUG : options->quiet ? LOG_WARN : LOG_INFO, prefix);
}

/* A collective failed: the others may wait for this rank or be gone. Rank 0 says why; if it cannot, another rank does. */
static void end_broken_job(struct run *run, int status) {
    if (!run->root) {
        let_root_speak();
        base_error_prefix("rank %d: ", comm_rank(run->world));
    }
    print_error();
    comm_abort(run->world, run_exit_code(status));
}

/* Closes and agrees; returns the job's status. What rank 0 found itself it says in its own words, else in those agreed on. */
static int end_job(struct run *run, int status) {
    if (run->broken || status == STATUS_TIMEOUT)
        end_broken_job(run, status);
    if (status < 0 && run->root)
        print_error();
    bool said = status < 0;
    if (run->engine)
        engine_close(run->engine);
    status = comm_agree(run->world, "end", status);
    if (status < 0 && run->root && !said)
        print_error();
    comm_finish(run->world);
    return status;
}

/* No communicator: N processes that a launcher started without becoming ranks all find the same usage error, one says it. */
static int fail_start(const struct environment *environment, int status) {
    if (status == STATUS_USAGE && environment->launcher_rank > 0)
        let_root_speak();
    else
        print_error();
    return status;
}

/* Agrees on what each rank found in its options, before anything else is done. What rank 0 found it says in its own words: the
 * others have found the same, and a rank's number would only raise questions. */
static int agree_on_options(struct run *run, int status, const char *found) {
    if (status < 0)
        base_fail_text(status, found);
    int agreed = comm_agree(run->world, "options", status);
    if (status < 0 && run->root) {
        base_clear_error();
        base_fail_text(status, found);
    }
    return agreed;
}

/* `status`: of parsing this rank's options. */
static int run_on_ranks(const struct command *command, struct options *options, const struct environment *environment,
                        int status, int *argc, char ***argv) {
    struct run run = {.options = options, .environment = environment};
    char found[FOUND_BYTES];
    bool parsed = status == STATUS_OK;
    if (parsed)
        status = signals_install();
    if (status == STATUS_OK && !options->engine.model && !command->model_optional)
        status = base_fail(STATUS_USAGE, __FILE__, __LINE__, "option --model is needed");
    snprintf(found, sizeof found, "%s", base_error());
    base_clear_error();
    int started = comm_start(parsed ? options->engine.comm : "auto", parsed ? options->deadline : 60, argc, argv, &run.world);
    if (started < 0)
        return fail_start(environment, started);
    run.root = comm_rank(run.world) == 0;
    set_log(options, comm_rank(run.world));
    status = agree_on_options(&run, status, found);
    if (status == STATUS_OK)
        status = place_bind(run.world, &run.place);
    if (run.place.shared && !options->engine.threads)
        options->engine.threads = 1; /* ranks that take turns on cores: more threads would only wait for each other */
    if (status == STATUS_OK)
        status = command->on_ranks(&run);
    return end_job(&run, status);
}

static int run_alone(const struct command *command, const struct options *options, const struct environment *environment,
                     int status) {
    if (environment->launcher_rank > 0) { /* under a launcher one process speaks for all */
        if (status < 0)
            let_root_speak();
        return status;
    }
    set_log(options, 0);
    if (status == STATUS_OK)
        status = command->alone(options);
    if (status < 0)
        print_error();
    return status;
}

int main(int argc, char **argv) {
    struct environment environment;
    environment_prepare(argv);
    environment_read(&environment);
    bool speaks = environment.launcher_rank <= 0;
    const char *name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "--version") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        if (speaks && strcmp(name, "--version") == 0)
            printf("kvlinc " KVLINC_VERSION "\nBLAS kernels: %s\ndevices: cpu%s\n", blas_core(), backend_has("cuda") ? " cuda" : "");
        else if (speaks)
            print_commands(stdout);
        return 0;
    }
    const struct command *command = find_command(name);
    if (!command) {
        if (speaks && *name)
            fprintf(stderr, "kvlinc: unknown command '%s'\n", name);
        if (speaks)
            print_commands(stderr);
        else
            let_root_speak();
        return run_exit_code(STATUS_USAGE);
    }
    struct options options;
    int status = options_parse(command->options, argc - 2, argv + 2, &options);
    if (status == STATUS_OK && options.help)
        return speaks ? print_help(command) : 0;
    if (!options.engine.threads)
        options.engine.threads = environment.threads;
    options.quiet |= environment.quiet && !options.verbose;
    if (command->on_ranks)
        status = run_on_ranks(command, &options, &environment, status, &argc, &argv);
    else
        status = run_alone(command, &options, &environment, status);
    options_free(&options);
    return run_exit_code(status);
}
