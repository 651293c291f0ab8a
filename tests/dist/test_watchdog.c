/* Nobody hangs: three ranks are started, one of them is stopped, killed, busy or deadlocked, and the job must end in time, with one
 * message that names the right rank, operation and step, and with no process left. Jobs that only look stuck must go on.
 * The program plays both parts: without arguments it is the test, with them one rank of a job. */
#include "dist/comm_impl.h"
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { RANKS = 3, OUTPUT_BYTES = 65536 };
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

struct job {
    int code; /* exit code; -1: by a signal or not in time */
    double seconds;
    char output[OUTPUT_BYTES];
    int n_pids, pids[RANKS];
};

static void find_pids(struct job *job) {
    job->n_pids = 0;
    for (const char *at = job->output; (at = strstr(at, "[pid ")) && strchr(at, ']') && job->n_pids < RANKS; at++)
        job->pids[job->n_pids++] = atoi(at + 5);
}

static void signal_ranks(const struct job *job, int number) {
    for (int i = 0; i < job->n_pids; i++)
        kill(job->pids[i], number);
}

/* Reads until the end of the output; stops and continues all ranks meanwhile if `suspend`. */
static void read_output(struct job *job, int fd, double limit, bool suspend) {
    double begin = base_seconds();
    size_t n = 0;
    for (int phase = 0;;) {
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        double now = base_seconds() - begin;
        if (now > limit || n + 1 >= OUTPUT_BYTES)
            return;
        if (poll(&wait, 1, 50) > 0) {
            ssize_t got = read(fd, job->output + n, OUTPUT_BYTES - 1 - n);
            if (got <= 0)
                return;
            n += (size_t)got;
            find_pids(job);
        }
        if (suspend && phase == 0 && job->n_pids == RANKS && now > 1.5) {
            signal_ranks(job, SIGSTOP);
            phase = 1;
        } else if (phase == 1 && now > 1.5 + 2 * DEADLINE) {
            signal_ranks(job, SIGCONT);
            phase = 2;
        }
    }
}

static void run_job(struct job *job, char *const *command, double limit, bool suspend) {
    int ends[2], status = 0;
    memset(job, 0, sizeof *job);
    job->code = -1;
    double begin = base_seconds();
    CHECK(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        execvp(command[0], command);
        _exit(127);
    }
    close(ends[1]);
    read_output(job, ends[0], limit, suspend);
    close(ends[0]);
    for (; waitpid(child, &status, WNOHANG) == 0; usleep(10000))
        if (base_seconds() - begin > limit) {
            kill(child, SIGKILL);
            signal_ranks(job, SIGKILL);
        }
    job->seconds = base_seconds() - begin;
    if (WIFEXITED(status))
        job->code = WEXITSTATUS(status);
}

static void check_gone(const struct job *job) {
    CHECK(job->n_pids == RANKS, "%d ranks told their pid", job->n_pids);
    for (int i = 0; i < job->n_pids; i++) {
        bool gone = false;
        for (int k = 0; k < 100 && !(gone = kill(job->pids[i], 0) < 0 && errno == ESRCH); k++)
            usleep(20000);
        CHECK(gone, "process %d is still there", job->pids[i]);
    }
    signal_ranks(job, SIGKILL);
}

static int count(const char *text, const char *words) {
    int n = 0;
    for (; (text = strstr(text, words)); text += strlen(words))
        n++;
    return n;
}

static void run_ranks(struct job *job, char *self, const char *mode, const char *chosen) {
    char launch[] = KVLINC_TESTS "/../launch/mpirun.sh", np[] = "-np", n[] = "3", a[16], b[16];
    snprintf(a, sizeof a, "%s", mode);
    snprintf(b, sizeof b, "%s", chosen);
    char *command[] = {launch, np, n, self, a, b, NULL};
    run_job(job, command, 60, strcmp(mode, "suspend") == 0);
    check_gone(job);
}

/* `words` up to NULL must all stand in the output; a report must be there once. */
static void check_ends(char *self, const char *mode, const char *chosen, double limit, const char *const *words) {
    struct job *job = malloc(sizeof *job);
    run_ranks(job, self, mode, chosen);
    CHECK(job->code > 0, "%s %s: exit code %d", mode, chosen, job->code);
    CHECK(job->seconds < limit, "%s %s: %.1f s", mode, chosen, job->seconds);
    for (; *words; words++)
        CHECK(strstr(job->output, *words), "%s %s: no '%s' in: %s", mode, chosen, *words, job->output);
    int reports = count(job->output, "no progress for");
    CHECK(reports == (strcmp(mode, "kill") != 0), "%s %s: %d reports: %s", mode, chosen, reports, job->output);
    free(job);
}

static void test_stopped(char *self) {
    char silent[2][32];
    static const char *const waiting[] = {"ranks 1, 2 wait in 'layer sum' (world) at step 7",
                                          "ranks 0, 2 wait in 'layer sum' (world) at step 7",
                                          "ranks 0, 1 wait in 'layer sum' (world) at step 7"};
    for (int r = 0; r < RANKS; r++) {
        char chosen[2] = {(char)('0' + r), '\0'};
        snprintf(silent[0], sizeof silent[0], "; rank %d (", r);
        const char *words[] = {silent[0], "does not answer", waiting[r], "pid", NULL};
        check_ends(self, "stop", chosen, 15, words);
    }
    snprintf(silent[0], sizeof silent[0], "; rank 0 (");
    snprintf(silent[1], sizeof silent[1], "; rank 2 (");
    const char *words[] = {silent[0], silent[1], "does not answer", "; rank 1 waits in 'layer sum' (world) at step 7", NULL};
    check_ends(self, "stop", "02", 15, words);
}

static void test_others(char *self) {
    const char *idle[] = {"; rank 1 (", "does not answer", "ranks 0, 2 wait in 'next plan' (world) at step 7", NULL};
    check_ends(self, "idle-stop", "1", 15, idle);
    const char *computing[] = {"; rank 1 (", "is still computing at step 7", "ranks 0, 2 wait in 'layer sum'", NULL};
    check_ends(self, "compute", "1", 15, computing);
    const char *deadlock[] = {"ranks 0, 1 wait in 'layer sum' (world) at step 7", "; rank 2 waits in 'other barrier'", NULL};
    check_ends(self, "deadlock", "2", 15, deadlock);
    const char *nothing[] = {NULL};
    check_ends(self, "kill", "0", 10, nothing);
    check_ends(self, "kill", "2", 10, nothing);
}

static void test_goes_on(char *self) {
    struct job *job = malloc(sizeof *job);
    run_ranks(job, self, "idle", "1");
    CHECK(job->code == 0, "idle: exit code %d: %s", job->code, job->output);
    run_ranks(job, self, "suspend", "");
    CHECK(job->code == 0, "suspended and continued: exit code %d: %s", job->code, job->output);
    CHECK(job->seconds > 9, "it was not suspended: %.1f s", job->seconds);
    run_ranks(job, self, "abort", "1");
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
        run_job(job, command, 20, false);
        CHECK(job->code == rows[i].code, "row %zu: exit code %d: %s", i, job->code, job->output);
        CHECK(strstr(job->output, rows[i].words), "row %zu: %s", i, job->output);
    }
    free(job);
}

int main(int argc, char **argv) {
    if (argc > 1)
        return run_rank(argc, argv);
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    CHECK(n > 0);
    self[n > 0 ? n : 0] = '\0';
    test_stopped(self);
    test_others(self);
    test_goes_on(self);
    test_singletons(self);
    return test_report();
}
