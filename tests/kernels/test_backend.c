/* The seam itself on both CPU backends: order within and between streams, recording and replaying, errors that are kept, accounts of memory;
 * and what cpu-async is for: a host access to device memory faults, delays change no result. */
#include "kernels/ops.h"
#include "test.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 64, STEPS = 200, LARGE = 3 << 20 };

static struct backend *open_backend(const char *name, uint64_t seed) {
    struct backend *b;
    REQUIRE(backend_open(name, &(struct backend_options){.n_threads = 1, .seed = seed}, &b));
    CHECK(strcmp(backend_name(b), name) == 0, "%s", backend_name(b));
    CHECK(backend_is_async(b) == (strcmp(name, "cpu-async") == 0), "%s", name);
    CHECK(backend_n_threads(b) == 1, "%d threads", backend_n_threads(b));
    return b;
}

/* ---- memory ------------------------------------------------------------------------------------------------------------- */

static void check_memory(const char *name) {
    static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, LARGE, LARGE - 64};
    enum { N_SIZES = sizeof sizes / sizeof *sizes };
    struct backend *b = open_backend(name, 1);
    struct stream *s;
    unsigned char *host = malloc(LARGE), *pointer[MEMORY_COUNT][N_SIZES];
    size_t sum = 0;
    REQUIRE(stream_open(b, &s));
    for (int i = 0; i < N_SIZES; i++)
        sum += sizes[i];
    for (int purpose = 0; purpose < MEMORY_COUNT; purpose++) {
        for (int i = 0; i < N_SIZES; i++) {
            REQUIRE(backend_alloc(b, (enum memory)purpose, sizes[i], &pointer[purpose][i]));
            CHECK((uintptr_t)pointer[purpose][i] % 64 == 0, "alignment of %zu bytes", sizes[i]);
            memset(host, 1, LARGE);
            REQUIRE(stream_copy_out(s, host, pointer[purpose][i], sizes[i]));
            REQUIRE(stream_sync(s));
            for (size_t k = 0; k < sizes[i]; k++)
                if (host[k]) {
                    CHECK(false, "%s: byte %zu of %zu is not zero", name, k, sizes[i]);
                    break;
                }
            memset(host, 0xa5, LARGE);
            REQUIRE(stream_copy_in(s, pointer[purpose][i], host, sizes[i]));
            REQUIRE(stream_sync(s));
        }
        CHECK(backend_used(b, (enum memory)purpose) == sum, "%zu bytes of purpose %d, expected %zu", backend_used(b, (enum memory)purpose), purpose, sum);
    }
    for (int purpose = 0; purpose < MEMORY_COUNT; purpose++)
        for (int i = purpose; i < N_SIZES; i += 2) /* the rest goes with the backend */
            backend_free(b, pointer[purpose][i]);
    size_t left = 0;
    for (int i = 1; i < N_SIZES; i += 2)
        left += sizes[i];
    CHECK(backend_used(b, MEMORY_WEIGHTS) == left, "%zu bytes left, expected %zu", backend_used(b, MEMORY_WEIGHTS), left);
    backend_free(b, NULL);
    CHECK_FAILS(backend_alloc(b, MEMORY_CACHE, (size_t)1 << 60, &pointer[0][0]), STATUS_MEMORY, "cache");
    CHECK(pointer[0][0] == NULL, "a pointer after a failure");
    stream_close(s);
    backend_close(b);
    free(host);
}

/* Runs `touch` in a child; whether it died of a fault. */
static bool faults(const char *name, void (*touch)(const char *name)) {
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* sanitizers report faults, here one is wanted */
        signal(SIGBUS, SIG_DFL);
        touch(name);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) && (WTERMSIG(status) == SIGSEGV || WTERMSIG(status) == SIGBUS);
}

static void touch_device(const char *name) {
    struct backend *b;
    volatile unsigned char *device;
    if (backend_open(name, &(struct backend_options){.n_threads = 1}, &b) == 0 && backend_alloc(b, MEMORY_CACHE, 4096, &device) == 0)
        device[0] = 1;
}

static void touch_host_memory(const char *name) {
    struct backend *b;
    volatile unsigned char *host;
    if (backend_open(name, &(struct backend_options){.n_threads = 1}, &b) == 0 && backend_alloc(b, MEMORY_HOST, 4096, &host) == 0)
        host[0] = 1;
}

static void touch_beyond(const char *name) {
    struct backend *b;
    volatile unsigned char *device;
    if (backend_open(name, &(struct backend_options){.n_threads = 1}, &b) == 0 && backend_alloc(b, MEMORY_CACHE, LARGE, &device) == 0)
        device[LARGE] = 1;
}

static void check_faults(void) {
    CHECK(faults("cpu-async", touch_device), "the host may touch device memory");
    CHECK(!faults("cpu-async", touch_host_memory), "the host may not touch host memory");
    CHECK(!faults("cpu", touch_device), "plain cpu");
    CHECK(faults("cpu", touch_beyond), "beyond a mapped block");
}

/* ---- order ---------------------------------------------------------------------------------------------------------------- */

struct call { /* appends `value` to a list in device memory */
    int32_t *list;
    int32_t value;
    int fail;
};

static int append_value(void *args) {
    struct call *c = args;
    if (c->fail)
        FAIL(c->fail, "call %d was told to fail", c->value);
    c->list[1 + c->list[0]++] = c->value;
    return STATUS_OK;
}

static int launch(struct stream *s, int32_t *list, int32_t value, int fail) {
    struct call c = {list, value, fail};
    int status = stream_call(s, append_value, &c, sizeof c);
    memset(&c, 0xff, sizeof c); /* the stream has its own copy */
    return status;
}

static void read_list(struct stream *s, const int32_t *list, int32_t *host, int n) {
    REQUIRE(stream_copy_out(s, host, list, (size_t)(n + 1) * sizeof *host));
    REQUIRE(stream_sync(s));
    CHECK(host[0] == n, "%d entries, expected %d", host[0], n);
}

/* Two streams that hand over to each other through events: the order of the list is the order of submission. */
static void check_order(const char *name, uint64_t seed) {
    struct backend *b = open_backend(name, seed);
    struct stream *s[2];
    struct event *e[2];
    int32_t *list, host[STEPS + 1];
    REQUIRE(backend_alloc(b, MEMORY_WORKSPACE, sizeof host, &list));
    for (int i = 0; i < 2; i++) {
        REQUIRE(stream_open(b, &s[i]));
        REQUIRE(event_open(b, &e[i]));
        CHECK(stream_backend(s[i]) == b, "backend of stream %d", i);
        REQUIRE(stream_wait(s[i], e[i])); /* never recorded: nothing to wait for */
        REQUIRE(event_sync(e[i]));
    }
    for (int i = 0; i < STEPS; i++) {
        int turn = i % 2;
        if (i > 0)
            REQUIRE(stream_wait(s[turn], e[!turn]));
        REQUIRE(launch(s[turn], list, i, 0));
        REQUIRE(event_record(e[turn], s[turn]));
    }
    REQUIRE(event_sync(e[1]));
    read_list(s[0], list, host, STEPS);
    for (int i = 0; i < STEPS; i++)
        CHECK(host[1 + i] == i, "%s: entry %d is %d", name, i, host[1 + i]);
    for (int i = 0; i < 2; i++) {
        event_close(e[i]);
        stream_close(s[i]);
    }
    backend_close(b);
}

/* Copies, zeroing and operations of one stream; `overlap` copies within one buffer. */
static void check_copies(const char *name, uint64_t seed) {
    struct backend *b = open_backend(name, seed);
    struct stream *s;
    float *x, *y, in[N], out[N];
    REQUIRE(stream_open(b, &s));
    REQUIRE(backend_alloc(b, MEMORY_WORKSPACE, sizeof in, &x));
    REQUIRE(backend_alloc(b, MEMORY_WORKSPACE, sizeof in, &y));
    for (int i = 0; i < N; i++)
        in[i] = test_uniform(1, (uint64_t)i);
    REQUIRE(stream_copy_in(s, x, in, sizeof in));
    REQUIRE(stream_copy(s, y, x, sizeof in));
    REQUIRE(stream_zero(s, x, sizeof in / 2));
    struct add_args add = {.n_rows = 1, .hidden = N, .x = x, .y = y};
    for (int i = 0; i < 3; i++)
        REQUIRE(op_add(s, &add));
    REQUIRE(stream_copy_out(s, out, x, sizeof out));
    REQUIRE(stream_copy_out(s, out, x, 0));
    REQUIRE(stream_sync(s));
    for (int i = 0; i < N; i++) {
        float expected = i < N / 2 ? 0 : in[i];
        for (int k = 0; k < 3; k++)
            expected += in[i];
        CHECK(out[i] == expected, "%s: %d is %g, expected %g", name, i, (double)out[i], (double)expected);
    }
    stream_close(s);
    backend_close(b);
}

/* ---- recording -------------------------------------------------------------------------------------------------------------- */

/* A recording over two streams: s0 appends 1, s1 waits and appends 2, s0 waits and appends 3. Replayed, it reads new input. */
static void check_record(const char *name, uint64_t seed) {
    struct backend *b = open_backend(name, seed);
    struct stream *s[2];
    struct event *e[2];
    struct graph *graph, *never;
    int32_t *list, host[3 * STEPS + 1];
    REQUIRE(backend_alloc(b, MEMORY_WORKSPACE, sizeof host, &list));
    for (int i = 0; i < 2; i++) {
        REQUIRE(stream_open(b, &s[i]));
        REQUIRE(event_open(b, &e[i]));
    }
    REQUIRE(backend_record_begin(b));
    CHECK_FAILS(backend_record_begin(b), STATUS_FAILED, "already");
    REQUIRE(launch(s[0], list, 1, 0));
    REQUIRE(event_record(e[0], s[0]));
    REQUIRE(stream_wait(s[1], e[0]));
    REQUIRE(launch(s[1], list, 2, 0));
    REQUIRE(event_record(e[1], s[1]));
    REQUIRE(stream_wait(s[0], e[1]));
    REQUIRE(launch(s[0], list, 3, 0));
    REQUIRE(backend_record_end(b, &graph));
    CHECK_FAILS(backend_record_end(b, &never), STATUS_FAILED, "no recording");
    CHECK(graph_n_nodes(graph) == 7, "%d nodes", graph_n_nodes(graph));
    read_list(s[0], list, host, 0); /* nothing has run yet */
    for (int i = 0; i < STEPS; i++)
        REQUIRE(graph_replay(graph));
    read_list(s[0], list, host, 3 * STEPS);
    for (int i = 0; i < 3 * STEPS; i++)
        CHECK(host[1 + i] == i % 3 + 1, "%s: entry %d is %d", name, i, host[1 + i]);
    REQUIRE(stream_zero(s[0], list, sizeof host)); /* what lies in memory may change between replays */
    REQUIRE(graph_replay(graph));
    read_list(s[0], list, host, 3);
    double seconds[5] = {0};
    REQUIRE(graph_time(graph, s[0], 5, seconds)); /* and one replay before the first */
    read_list(s[0], list, host, 3 * 7);
    for (int i = 0; i < 5; i++)
        CHECK(seconds[i] > 0, "%s: replay %d took %g s", name, i, seconds[i]);
    graph_close(graph);
    for (int i = 0; i < 2; i++) {
        event_close(e[i]);
        stream_close(s[i]);
    }
    backend_close(b);
}

/* ---- failures ---------------------------------------------------------------------------------------------------------------- */

/* A failure is kept with its text, later work of the stream is dropped, and who waits for an event of it fails as well. */
static void check_failure(const char *name) {
    struct backend *b = open_backend(name, 3);
    struct stream *s[2];
    struct event *e;
    int32_t *list, host[8];
    REQUIRE(backend_alloc(b, MEMORY_WORKSPACE, sizeof host, &list));
    REQUIRE(stream_open(b, &s[0]));
    REQUIRE(stream_open(b, &s[1]));
    REQUIRE(event_open(b, &e));
    REQUIRE(launch(s[0], list, 1, 0));
    (void)launch(s[0], list, 2, STATUS_TIMEOUT); /* returned here, or by the next wait */
    base_clear_error();
    (void)launch(s[0], list, 3, 0);
    base_clear_error();
    (void)launch(s[0], list, 4, STATUS_FAILED); /* the first one is kept */
    base_clear_error();
    (void)event_record(e, s[0]);
    base_clear_error();
    CHECK_FAILS(stream_sync(s[0]), STATUS_TIMEOUT, "call 2 was told to fail");
    CHECK_FAILS(stream_sync(s[0]), STATUS_TIMEOUT, "call 2");
    CHECK_FAILS(event_sync(e), STATUS_TIMEOUT, "call 2");
    (void)stream_wait(s[1], e);
    base_clear_error();
    CHECK_FAILS(stream_sync(s[1]), STATUS_TIMEOUT, "call 2");
    struct stream *fresh;
    REQUIRE(stream_open(b, &fresh));
    read_list(fresh, list, host, 1);
    CHECK(host[1] == 1, "entry %d", host[1]);
    unsigned char large[STREAM_MAX_ARGS + 1] = {0};
    CHECK_FAILS(stream_call(fresh, append_value, large, sizeof large), STATUS_FAILED, "arguments");
    stream_close(fresh);
    event_close(e);
    stream_close(s[0]);
    stream_close(s[1]);
    backend_close(b);
}

int main(void) {
    static const char *const names[] = {"cpu", "cpu-async"};
    struct backend *b;
    check_faults(); /* before any thread is started */
    for (int i = 0; i < 2; i++) {
        check_memory(names[i]);
        check_failure(names[i]);
        for (uint64_t seed = 1; seed <= 5; seed++) {
            check_order(names[i], seed);
            check_copies(names[i], seed);
            check_record(names[i], seed);
        }
    }
    CHECK_FAILS(backend_open("gpu", &(struct backend_options){0}, &b), STATUS_USAGE, "cpu-async");
    stream_close(NULL);
    event_close(NULL);
    graph_close(NULL);
    backend_close(NULL);
    return test_report();
}
