/* Nobody hangs on GPUs either: a rank is stopped, killed, or does not come to a sum that the other one's GPU spins in, at once or in a
 * replayed graph; the job must end in time, with one message that names rank, operation and step, and with no process left. The next
 * job then finds its GPUs free. A rank that is only late ends nothing. As test_watchdog, this program plays both parts. */
#include "dist/comm.h"
#include "job.h"

enum { RANKS = 2, COUNT = 1000, CHOSEN_STEP = 7 };
static const double DEADLINE = 5; /* longer than two ranks differ in opening their GPUs */

/* ---- one rank ------------------------------------------------------------------------------------------------------------ */

struct rank {
    struct comm *world, *all;
    struct backend *backend;
    struct stream *stream;
    struct graph *graph; /* the same sum */
    float *x;            /* [COUNT] */
};

static void sum_once(const struct rank *r, bool replay) {
    if (replay)
        REQUIRE(graph_replay(r->graph));
    else
        REQUIRE(comm_all_reduce(r->all, r->stream, "layer sum", r->x, r->x, COUNT, COMM_FLOAT, COMM_SUM));
    REQUIRE(stream_sync(r->stream));
}

static void rank_open(struct rank *r, int *argc, char ***argv) {
    REQUIRE(comm_start("auto", DEADLINE, argc, argv, &r->world));
    printf("[pid %d]\n", (int)getpid());
    fflush(stdout);
    REQUIRE(backend_open("cuda", &(struct backend_options){.device = comm_rank(r->world)}, &r->backend));
    REQUIRE(stream_open(r->backend, &r->stream));
    REQUIRE(comm_watch_device(r->world, r->backend));
    REQUIRE(comm_split(r->world, 0, comm_rank(r->world), "all", &r->all));
    REQUIRE(comm_use_device(&r->all, r->backend));
    REQUIRE(comm_alloc(r->all, r->backend, COUNT * sizeof(float), &r->x));
}

static void rank_close(struct rank *r) {
    graph_close(r->graph);
    comm_release(r->all, r->backend, r->x);
    comm_free(r->all);
    stream_close(r->stream);
    backend_close(r->backend);
    comm_finish(r->world);
}

static int run_rank(int argc, char **argv) {
    struct rank r = {0};
    const char *mode = argv[1];
    bool replay = strcmp(mode, "replay") == 0;
    rank_open(&r, &argc, &argv);
    bool chosen = strchr(argv[2], '0' + comm_rank(r.world)) != NULL;
    sum_once(&r, false); /* connects the ranks */
    REQUIRE(backend_record_begin(r.backend));
    REQUIRE(comm_all_reduce(r.all, r.stream, "layer sum", r.x, r.x, COUNT, COMM_FLOAT, COMM_SUM));
    REQUIRE(backend_record_end(r.backend, &r.graph));
    for (int step = 0; step <= CHOSEN_STEP; step++) {
        comm_set_step(r.world, step);
        if (step == CHOSEN_STEP && chosen) {
            if (strcmp(mode, "stop") == 0)
                raise(SIGSTOP);
            if (strcmp(mode, "kill") == 0)
                raise(SIGKILL);
            for (double end = base_seconds() + (strcmp(mode, "late") == 0 ? DEADLINE / 2 : 60); base_seconds() < end;)
                usleep(1000);
        }
        sum_once(&r, replay);
    }
    rank_close(&r);
    return 0;
}

/* ---- the job as seen from outside -------------------------------------------------------------------------------------------- */

#define WAITS "waits in 'work of the GPU; last collective enqueued: layer sum' (all) at step 7"

static void test_ends(char *self) {
    static const double LIMIT = 40; /* start of two GPUs, deadline, answers, end */
    const char *stopped[] = {"; rank 0 (", "does not answer", "; rank 1 " WAITS, NULL};
    job_check_ends(RANKS, self, "stop", "0", LIMIT, stopped);
    const char *nothing[] = {NULL};
    job_check_ends(RANKS, self, "kill", "1", LIMIT, nothing);
    const char *computing[] = {"; rank 1 (", "is still computing at step 7", "; rank 0 " WAITS, NULL};
    job_check_ends(RANKS, self, "compute", "1", LIMIT, computing);
    job_check_ends(RANKS, self, "replay", "1", LIMIT, computing);
}

static void test_goes_on(char *self, int n_ranks) {
    struct job *job = malloc(sizeof *job);
    job_run_ranks(job, n_ranks, 0, self, "late", n_ranks > 1 ? "1" : "0");
    CHECK(job->code == 0, "late, %d ranks: exit code %d: %s", n_ranks, job->code, job->output);
    free(job);
}

int main(int argc, char **argv) {
    char self[4096];
    if (argc > 1)
        return run_rank(argc, argv);
    int n_devices = backend_n_devices("cuda");
    if (n_devices == 0) {
        fprintf(stderr, "skipped: no GPU here\n");
        return TEST_SKIP;
    }
    job_find_self(self, sizeof self);
    if (n_devices >= RANKS)
        test_ends(self); /* with one GPU nobody can be waited for */
    test_goes_on(self, n_devices >= RANKS ? RANKS : 1);
    return test_report();
}
