/* Nobody hangs: three ranks are started, one of them is stopped, killed, busy or deadlocked, and the job must end in time, with one
 * message that names the right rank, operation and step, and with no process left. Jobs that only look stuck must go on.
 * The program plays both parts: without arguments it is the test, with them one rank of a job. */
#include "dist/comm_impl.h"
#include "job.h"

enum { RANKS = 3 };
static const double DEADLINE = 2;

/* ---- one rank ------------------------------------------------------------------------------------------------------------ */

static void sum_once(struct comm *world, struct stream *stream, struct backend *backend) {
    float *x;
    REQUIRE(comm_alloc(world, backend, 4000, &x));
    REQUIRE(comm_all_reduce(world, stream, "layer sum", x, x, 1000, COMM_FLOAT, COMM_SUM));
    REQUIRE(stream_sync(stream));
    comm_release(world, backend, x);
}

static void compute(double seconds) {
    for (double end = base_seconds() + seconds; base_seconds() < end;)
        usleep(1000);
}

/* What the rank does at step 7; `chosen`: it is one of those that misbehave. */
static void act(const char *mode, bool chosen, struct comm *world, struct stream *stream, struct backend *backend) {
    int64_t plan = 1;
    double late = 0;
    if (strcmp(mode, "stop") == 0 && chosen)
        raise(SIGSTOP);
    if (strcmp(mode, "kill") == 0 && chosen)
        raise(SIGKILL);
    if (strcmp(mode, "compute") == 0 && chosen)
        compute(60);
    if (strcmp(mode, "abort") == 0 && chosen)
        comm_abort(world, 3);
    if (strcmp(mode, "deadlock") == 0 && chosen)
        REQUIRE(comm_barrier(world, "other barrier"));
    if (strncmp(mode, "idle", 4) == 0) {
        if (chosen && strcmp(mode, "idle-stop") == 0)
            raise(SIGSTOP);
        if (chosen)
            compute(2 * DEADLINE + 0.5);
        REQUIRE(comm_broadcast_idle(world, "next plan", &plan, sizeof plan, 1));
        if (comm_rank(world) == 0)
            late = 2 * DEADLINE; /* rank 0 may be late at the end */
    }
    if (strcmp(mode, "suspend") == 0)
        for (int round = 0; plan; round++) {
            plan = round < 30; /* six seconds of running: enough after the suspension for a false alarm to end the job */
            REQUIRE(comm_broadcast(world, "plan", &plan, sizeof plan, 0));
            compute(comm_rank(world) == 1 ? 0.2 : 0); /* so that the others are in a long wait when they are suspended */
            sum_once(world, stream, backend);
        }
    sum_once(world, stream, backend);
    compute(late);
}

static int run_rank(int argc, char **argv) {
    struct comm *world;
    struct backend *backend;
    struct stream *stream;
    struct backend_options options = {.n_threads = 1};
    int status = comm_start("auto", DEADLINE, &argc, &argv, &world);
    if (status < 0) {
        log_error("%s", base_error());
        return status == STATUS_USAGE ? 2 : 1;
    }
    REQUIRE(backend_open("cpu", &options, &backend));
    REQUIRE(stream_open(backend, &stream));
    printf("[pid %d]\n", (int)getpid());
    printf("[%s of %d]\n", comm_kind(world), comm_size(world));
    fflush(stdout);
    for (int step = 0; step < 7; step++) {
        comm_set_step(world, step);
        sum_once(world, stream, backend);
    }
    comm_set_step(world, 7);
    act(argv[1], strchr(argv[2], '0' + comm_rank(world)) != NULL, world, stream, backend);
    stream_close(stream);
    backend_close(backend);
    comm_finish(world);
    return 0;
}

/* ---- the job as seen from outside -------------------------------------------------------------------------------------------- */

static void test_stopped(char *self) {
    char silent[2][32];
    static const char *const waiting[] = {"ranks 1, 2 wait in 'layer sum' (world) at step 7",
                                          "ranks 0, 2 wait in 'layer sum' (world) at step 7",
                                          "ranks 0, 1 wait in 'layer sum' (world) at step 7"};
    for (int r = 0; r < RANKS; r++) {
        char chosen[2] = {(char)('0' + r), '\0'};
        snprintf(silent[0], sizeof silent[0], "; rank %d (", r);
        const char *words[] = {silent[0], "does not answer", waiting[r], "pid", NULL};
        job_check_ends(RANKS, self, "stop", chosen, 15, words);
    }
    snprintf(silent[0], sizeof silent[0], "; rank 0 (");
    snprintf(silent[1], sizeof silent[1], "; rank 2 (");
    const char *words[] = {silent[0], silent[1], "does not answer", "; rank 1 waits in 'layer sum' (world) at step 7", NULL};
    job_check_ends(RANKS, self, "stop", "02", 15, words);
}

static void test_others(char *self) {
    const char *idle[] = {"; rank 1 (", "does not answer", "ranks 0, 2 wait in 'next plan' (world) at step 7", NULL};
    job_check_ends(RANKS, self, "idle-stop", "1", 15, idle);
    const char *computing[] = {"; rank 1 (", "is still computing at step 7", "ranks 0, 2 wait in 'layer sum'", NULL};
    job_check_ends(RANKS, self, "compute", "1", 15, computing);
    const char *deadlock[] = {"ranks 0, 1 wait in 'layer sum' (world) at step 7", "; rank 2 waits in 'other barrier'", NULL};
    job_check_ends(RANKS, self, "deadlock", "2", 15, deadlock);
    const char *nothing[] = {NULL};
    job_check_ends(RANKS, self, "kill", "0", 10, nothing);
    job_check_ends(RANKS, self, "kill", "2", 10, nothing);
}

static void test_goes_on(char *self) {
    struct job *job = malloc(sizeof *job);
    job_run_ranks(job, RANKS, 0, self, "idle", "1");
    CHECK(job->code == 0, "idle: exit code %d: %s", job->code, job->output);
    job_run_ranks(job, RANKS, 2 * DEADLINE, self, "suspend", "");
    CHECK(job->code == 0, "suspended and continued: exit code %d: %s", job->code, job->output);
    CHECK(job->seconds > 9, "it was not suspended: %.1f s", job->seconds);
    job_run_ranks(job, RANKS, 0, self, "abort", "1");
    CHECK(job->code == 3, "abort: exit code %d: %s", job->code, job->output);
    CHECK(job->seconds < 10, "abort: %.1f s", job->seconds);
    free(job);
}

/* A rank that a launcher of another MPI started sees a world of one; batch scripts and lone ranks are no such thing. */
static void test_singletons(char *self) {
    static const struct {
        const char *set[3];
        int code;
        const char *words;
    } rows[] = {
        {{"PMI_SIZE=4", "PMI_RANK=2", NULL}, 2, "PMI started 4 ranks (PMI_SIZE=4)"},
        {{"SLURM_STEP_NUM_TASKS=3", "SLURM_PROCID=0", NULL}, 2, "srun --mpi=pmix"},
        {{"MPI_LOCALNRANKS=2", NULL}, 2, "MPI_LOCALNRANKS=2"},
        {{"SLURM_NTASKS=4", "SLURM_PROCID=0", NULL}, 0, "[self of 1]"},
        {{"SLURM_STEP_NUM_TASKS=1", "SLURM_PROCID=0", NULL}, 0, "[self of 1]"},
        {{NULL}, 0, "[self of 1]"},
    };
    struct job *job = malloc(sizeof *job);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char mode[] = "alone", none[] = "-", env[] = "env", sets[3][32];
        char *command[8] = {env};
        int n = 1;
        for (int k = 0; k < 3 && rows[i].set[k]; k++) {
            snprintf(sets[k], sizeof sets[k], "%s", rows[i].set[k]);
            command[n++] = sets[k];
        }
        command[n] = self;
        command[n + 1] = mode;
        command[n + 2] = none;
        job_run(job, 0, 0, command, 20);
        CHECK(job->code == rows[i].code, "row %zu: exit code %d: %s", i, job->code, job->output);
        CHECK(strstr(job->output, rows[i].words), "row %zu: %s", i, job->output);
    }
    free(job);
}

int main(int argc, char **argv) {
    if (argc > 1)
        return run_rank(argc, argv);
    char self[4096];
    job_find_self(self, sizeof self);
    test_stopped(self);
    test_others(self);
    test_goes_on(self);
    test_singletons(self);
    return test_report();
}
