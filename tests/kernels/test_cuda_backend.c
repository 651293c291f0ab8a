/* The seam on "cuda", as test_backend.c has it for the CPU: memory and its accounts, copies, order within and between streams,
 * recording and replaying over two streams, failures that are kept. Every number here is a small integer in a float, so results are
 * exact; buffers are large enough (4 MB) for work that is not ordered to be caught half done. */
#include "kernels/ops.h"
#include "test.h"

enum {
    N = 1 << 20,       /* floats of a buffer: some microseconds of work for each operation */
    STEPS = 30,        /* of two sequences that add up each other: the 31st Fibonacci number is exact in float */
    ROUNDS = 20,
    REPLAYS = 12,
    LARGE = 3 << 20,
};

static struct backend *open_backend(void) {
    struct backend *b;
    REQUIRE(backend_open("cuda", &(struct backend_options){0}, &b));
    return b;
}

static void *make_host(size_t bytes) {
    void *host = malloc(bytes + 1);
    if (!host)
        exit(1);
    return host;
}

/* How many of n floats are not `expected`. */
static int count_others(const float *x, int n, float expected, int *first) {
    int others = 0;
    for (int i = n - 1; i >= 0; i--)
        if (x[i] != expected) {
            others++;
            *first = i;
        }
    return others;
}

static void expect_all(const float *host, int n, double expected, const char *what, int step) {
    int at = 0, others = count_others(host, n, (float)expected, &at);
    CHECK(others == 0, "%s, step %d: %d of %d are not %g, the first at %d: %g", what, step, others, n, expected, at, (double)host[at]);
}

static void expect_device(struct stream *s, const float *device, double expected, const char *what, int step) {
    float *host = make_host(N * sizeof *host);
    REQUIRE(stream_copy_out(s, host, device, N * sizeof *host));
    REQUIRE(stream_sync(s));
    expect_all(host, N, expected, what, step);
    free(host);
}

static float *make_device(struct backend *b, struct stream *s, float value) {
    float *device, *host = make_host(N * sizeof *host);
    for (int i = 0; i < N; i++)
        host[i] = value;
    REQUIRE(backend_alloc(b, MEMORY_WORKSPACE, N * sizeof *host, &device));
    REQUIRE(stream_copy_in(s, device, host, N * sizeof *host));
    REQUIRE(stream_sync(s));
    free(host);
    return device;
}

static int add(struct stream *s, float *x, const float *y) {
    struct add_args args = {.n_rows = 1, .hidden = N, .x = x, .y = y};
    int status = op_add(s, &args);
    memset(&args, 0xff, sizeof args); /* the launch has its own copy */
    return status;
}

/* ---- devices and memory --------------------------------------------------------------------------------------------------- */

static void check_devices(void) {
    int n = backend_n_devices("cuda");
    struct backend_device device;
    struct backend *b;
    for (int i = 0; i < n; i++) {
        REQUIRE(backend_find_device("cuda", i, &device));
        CHECK(device.name[0] && device.pci[0] && device.bytes > 0 && device.architecture >= 70, "GPU %d: '%s', pci '%s', %lld bytes, %d", i,
              device.name, device.pci, (long long)device.bytes, device.architecture);
    }
    CHECK_FAILS(backend_find_device("cuda", n, &device), STATUS_USAGE, "GPU");
    CHECK_FAILS(backend_open("cuda", &(struct backend_options){.device = n}, &b), STATUS_USAGE, "GPU");
    b = open_backend();
    CHECK(strcmp(backend_name(b), "cuda") == 0, "%s", backend_name(b));
    CHECK(backend_is_async(b), "launches return before the work is done");
    backend_close(b);
}

/* Whether n bytes of device memory are zero. */
static bool is_zero(struct stream *s, const unsigned char *device, size_t n) {
    unsigned char *host = make_host(n);
    size_t others = 0;
    memset(host, 1, n);
    REQUIRE(stream_copy_out(s, host, device, n));
    REQUIRE(stream_sync(s));
    for (size_t i = 0; i < n; i++)
        others += host[i] != 0;
    free(host);
    return others == 0;
}

static void fill(struct stream *s, unsigned char *device, size_t n) {
    unsigned char *host = make_host(n);
    memset(host, 0xa5, n);
    REQUIRE(stream_copy_in(s, device, host, n));
    REQUIRE(stream_sync(s));
    free(host);
}

/* Memory is zero when it is given out, also the second time; accounts are to the byte, beside what streams take for themselves. */
static void check_memory(void) {
    static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, LARGE};
    enum { N_SIZES = sizeof sizes / sizeof *sizes };
    struct backend *b = open_backend();
    struct stream *s;
    unsigned char *pointer[N_SIZES];
    REQUIRE(stream_open(b, &s));
    for (int round = 0; round < 2; round++)
        for (int purpose = 0; purpose < MEMORY_COUNT; purpose++) {
            size_t before = backend_used(b, (enum memory)purpose), sum = before;
            for (int i = 0; i < N_SIZES; i++) {
                REQUIRE(backend_alloc(b, (enum memory)purpose, sizes[i], &pointer[i]));
                CHECK((uintptr_t)pointer[i] % 64 == 0, "alignment of %zu bytes, purpose %d", sizes[i], purpose);
                CHECK(is_zero(s, pointer[i], sizes[i]), "%zu new bytes of purpose %d are not zero, round %d", sizes[i], purpose, round);
                fill(s, pointer[i], sizes[i]);
                sum += sizes[i];
            }
            CHECK(backend_used(b, (enum memory)purpose) == sum, "%zu bytes of purpose %d, expected %zu",
                  backend_used(b, (enum memory)purpose), purpose, sum);
            for (int i = 0; i < N_SIZES; i++)
                backend_free(b, pointer[i]);
            CHECK(backend_used(b, (enum memory)purpose) == before, "%zu bytes of purpose %d left, expected %zu",
                  backend_used(b, (enum memory)purpose), purpose, before);
        }
    backend_free(b, NULL);
    stream_close(s);
    CHECK(backend_used(b, MEMORY_WORKSPACE) == 0, "a closed stream leaves %zu bytes", backend_used(b, MEMORY_WORKSPACE));
    backend_close(b);
}

/* What cannot be had says for what and how much, costs no account, and does no harm to work that follows. */
static void check_no_memory(void) {
    static const size_t petabyte = (size_t)1 << 50;
    static const struct {
        enum memory purpose;
        const char *words;
    } rows[] = {{MEMORY_WEIGHTS, "weights"}, {MEMORY_WORKSPACE, "workspace"}, {MEMORY_CACHE, "cache"}, {MEMORY_HOST, "host"}};
    struct backend *b = open_backend();
    struct stream *s;
    REQUIRE(stream_open(b, &s));
    float *x = make_device(b, s, 2.0f);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t before = backend_used(b, rows[i].purpose);
        void *pointer = b;
        int status = backend_alloc(b, rows[i].purpose, petabyte, &pointer);
        CHECK(status == STATUS_MEMORY, "a petabyte: status %d", status);
        CHECK(strstr(base_error(), rows[i].words) && strstr(base_error(), "1125899906842624"), "'%s' lacks '%s' or the size", base_error(),
              rows[i].words);
        base_clear_error();
        CHECK(pointer == NULL, "a pointer after a failure");
        CHECK(backend_used(b, rows[i].purpose) == before, "an account of a failure");
    }
    REQUIRE(add(s, x, x));
    expect_device(s, x, 4.0, "work after a failed allocation", 0);
    stream_close(s);
    backend_close(b);
}

/* ---- copies ---------------------------------------------------------------------------------------------------------------- */

/* In, across, out and zeroing of `bytes` at `offset`, from plain or pinned host memory; what lies beside stays. */
static void check_copy(struct backend *b, struct stream *s, size_t bytes, size_t offset, bool pinned) {
    enum { BESIDE = 16 };
    size_t all = offset + bytes + BESIDE;
    unsigned char *x, *y, *host = NULL, *back = make_host(all), *plain = make_host(bytes);
    REQUIRE(backend_alloc(b, MEMORY_WORKSPACE, all, &x));
    REQUIRE(backend_alloc(b, MEMORY_CACHE, all, &y));
    if (pinned)
        REQUIRE(backend_alloc(b, MEMORY_HOST, bytes, &host));
    unsigned char *from = pinned ? host : plain;
    for (size_t i = 0; i < bytes; i++)
        from[i] = (unsigned char)test_hash(1, i);
    fill(s, y, all);
    REQUIRE(stream_copy_in(s, x + offset, from, bytes));
    REQUIRE(stream_copy(s, y + offset, x + offset, bytes));
    REQUIRE(stream_zero(s, y + offset, bytes / 3));
    REQUIRE(stream_copy_out(s, back, y, all));
    REQUIRE(stream_sync(s));
    size_t bad = 0, first = 0;
    for (size_t i = all; i-- > 0;) {
        bool inside = i >= offset && i < offset + bytes;
        unsigned char expected = !inside ? 0xa5 : i - offset < bytes / 3 ? 0 : (unsigned char)test_hash(1, i - offset);
        if (back[i] != expected) {
            bad++;
            first = i;
        }
    }
    CHECK(bad == 0, "%zu bytes at %zu, pinned %d: %zu are wrong, the first at %zu", bytes, offset, pinned, bad, first);
    backend_free(b, x);
    backend_free(b, y);
    backend_free(b, host);
    free(back), free(plain);
}

static void check_copies(void) {
    static const size_t sizes[] = {0, 1, 3, 63, 4097, 1 << 20};
    struct backend *b = open_backend();
    struct stream *s;
    REQUIRE(stream_open(b, &s));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t offset = 0; offset <= 3; offset += 3)
            for (int pinned = 0; pinned < 2; pinned++)
                check_copy(b, s, sizes[i], offset, pinned);
    stream_close(s);
    backend_close(b);
}

/* ---- order ----------------------------------------------------------------------------------------------------------------- */

struct pair { /* two streams and an event of each */
    struct backend *backend;
    struct stream *s[2];
    struct event *e[2];
};

static struct pair pair_open(void) {
    struct pair p = {.backend = open_backend()};
    for (int i = 0; i < 2; i++) {
        REQUIRE(stream_open(p.backend, &p.s[i]));
        REQUIRE(event_open(p.backend, &p.e[i]));
        CHECK(stream_backend(p.s[i]) == p.backend, "backend of stream %d", i);
    }
    return p;
}

static void pair_close(struct pair *p) {
    for (int i = 0; i < 2; i++) {
        event_close(p->e[i]);
        stream_close(p->s[i]);
    }
    backend_close(p->backend);
}

/* x += y on one stream, then y += x on the other, and so on, handed over by events: any other order gives other numbers. */
static void check_order(void) {
    struct pair p = pair_open();
    for (int i = 0; i < 2; i++) {
        REQUIRE(stream_wait(p.s[i], p.e[i])); /* never recorded: nothing to wait for */
        REQUIRE(event_sync(p.e[i]));
    }
    for (int round = 0; round < ROUNDS; round++) {
        float *v[2] = {make_device(p.backend, p.s[0], 1.0f), make_device(p.backend, p.s[1], 1.0f)};
        double expected[2] = {1.0, 1.0};
        for (int i = 0; i < STEPS; i++) {
            int turn = i % 2;
            if (i > 0)
                REQUIRE(stream_wait(p.s[turn], p.e[!turn]));
            REQUIRE(add(p.s[turn], v[turn], v[!turn]));
            REQUIRE(event_record(p.e[turn], p.s[turn]));
            expected[turn] += expected[!turn];
        }
        REQUIRE(event_sync(p.e[1])); /* of the last step: both results may be read on any stream */
        for (int i = 0; i < 2; i++) {
            expect_device(p.s[!i], v[i], expected[i], "handing over between streams", round);
            backend_free(p.backend, v[i]);
        }
    }
    pair_close(&p);
}

/* Copies, zeroing and operations of one stream run in the order they were given. */
static void check_one_stream(void) {
    struct backend *b = open_backend();
    struct stream *s;
    REQUIRE(stream_open(b, &s));
    float *x = make_device(b, s, 3.0f), *y = make_device(b, s, 0.0f);
    for (int round = 0; round < ROUNDS; round++) { /* y = 4 x, x = 0, x = y / 4 would need the old x */
        REQUIRE(stream_copy(s, y, x, N * sizeof *x));
        REQUIRE(add(s, y, x));
        REQUIRE(stream_zero(s, x, N * sizeof *x));
        REQUIRE(add(s, x, y));
        REQUIRE(stream_zero(s, y, N * sizeof *x));
        REQUIRE(add(s, y, x));
    }
    expect_device(s, x, 3.0 * (1 << ROUNDS), "one stream, x", ROUNDS);
    expect_device(s, y, 3.0 * (1 << ROUNDS), "one stream, y", ROUNDS);
    stream_close(s);
    backend_close(b);
}

/* ---- recording --------------------------------------------------------------------------------------------------------------- */

struct loop { /* what one replay does: input from the host; a += input; c = a, then b += c on the other stream; a += b; a goes out */
    float *input, *a, *b, *c;
    float *host_in, *host_out; /* pinned */
};

/* Streams fork after the first addition and meet before the last one; `done` is recorded last. */
static void record(struct pair *p, const struct loop *l, struct event *done) {
    REQUIRE(stream_copy_in(p->s[0], l->input, l->host_in, N * sizeof(float)));
    REQUIRE(add(p->s[0], l->a, l->input));
    REQUIRE(event_record(p->e[0], p->s[0]));
    REQUIRE(stream_zero(p->s[0], l->input, N * sizeof(float))); /* beside the other stream */
    REQUIRE(stream_wait(p->s[1], p->e[0]));
    REQUIRE(stream_copy(p->s[1], l->c, l->a, N * sizeof(float)));
    REQUIRE(add(p->s[1], l->b, l->c));
    REQUIRE(event_record(p->e[1], p->s[1]));
    REQUIRE(stream_wait(p->s[0], p->e[1]));
    REQUIRE(add(p->s[0], l->a, l->b));
    REQUIRE(stream_copy_out(p->s[0], l->host_out, l->a, N * sizeof(float)));
    REQUIRE(event_record(done, p->s[0]));
}

/* Replays read the input anew; the host waits for an event of the recording; work on either stream follows a replay. */
static void run_replays(struct pair *p, const struct loop *l, struct event *done, struct graph *graph) {
    double a = 0.0, b = 0.0;
    for (int i = 0; i < REPLAYS; i++) {
        for (int k = 0; k < N; k++)
            l->host_in[k] = (float)(i + 1);
        REQUIRE(graph_replay(graph));
        a += i + 1;
        b += a;
        a += b;
        if (i % 3 == 2) {
            REQUIRE(event_sync(done));
        } else {
            REQUIRE(stream_sync(p->s[0]));
        }
        expect_all(l->host_out, N, a, i % 3 == 2 ? "replay, after its event" : "replay, after its stream", i);
        if (i % 4 == 3) { /* outside of the recording, on the other stream, without an event */
            REQUIRE(stream_zero(p->s[1], l->b, N * sizeof(float)));
            b = 0.0;
        }
    }
    for (int i = 0; i < 2; i++) /* back to back */
        REQUIRE(graph_replay(graph));
    for (int i = 0; i < 2; i++) {
        a += REPLAYS;
        b += a;
        a += b;
    }
    expect_device(p->s[1], l->b, b, "two replays back to back, b on the other stream", 0);
    expect_device(p->s[0], l->a, a, "two replays back to back, a", 0);
    expect_device(p->s[0], l->input, 0.0, "two replays back to back, input", 0);
}

static void check_record(void) {
    struct pair p = pair_open();
    struct event *done;
    struct graph *graph, *never;
    struct loop l;
    REQUIRE(event_open(p.backend, &done));
    l.input = make_device(p.backend, p.s[0], 0.0f);
    l.a = make_device(p.backend, p.s[0], 0.0f);
    l.b = make_device(p.backend, p.s[0], 0.0f);
    l.c = make_device(p.backend, p.s[0], 0.0f);
    REQUIRE(backend_alloc(p.backend, MEMORY_HOST, N * sizeof(float), &l.host_in));
    REQUIRE(backend_alloc(p.backend, MEMORY_HOST, N * sizeof(float), &l.host_out));
    for (int i = 0; i < N; i++)
        l.host_in[i] = 1000.0f;
    REQUIRE(backend_record_begin(p.backend));
    CHECK_FAILS(backend_record_begin(p.backend), STATUS_FAILED, "recording");
    record(&p, &l, done);
    REQUIRE(backend_record_end(p.backend, &graph));
    CHECK_FAILS(backend_record_end(p.backend, &never), STATUS_FAILED, "recording");
    CHECK(graph_n_nodes(graph) >= 7, "%d nodes of 7 copies and operations", graph_n_nodes(graph));
    expect_device(p.s[0], l.a, 0.0, "recorded only", 0); /* nothing has run yet */
    expect_device(p.s[1], l.b, 0.0, "recorded only", 1);
    run_replays(&p, &l, done, graph);
    graph_close(graph);
    event_close(done);
    pair_close(&p);
}

/* A recording without work is a graph that does nothing. */
static void check_empty_record(void) {
    struct pair p = pair_open();
    struct graph *graph;
    REQUIRE(backend_record_begin(p.backend));
    REQUIRE(backend_record_end(p.backend, &graph));
    CHECK(graph_n_nodes(graph) == 0, "%d nodes", graph_n_nodes(graph));
    REQUIRE(graph_replay(graph));
    graph_close(graph);
    pair_close(&p);
}

/* ---- failures ---------------------------------------------------------------------------------------------------------------- */

static int never_called(void *args) {
    (void)args;
    return STATUS_OK;
}

/* An operation that no GPU has: RoPE into 32-bit windows. */
static int launch_failing(struct stream *s, float *x) {
    return op_rope(s, &(struct rope_args){.n_rows = 1, .qkv = x, .positions = (int32_t *)x, .inv_freq = x, .n_heads = 1, .n_kv_heads = 1,
                                          .head_dim = 128, .dtype = DTYPE_F32, .q = x, .k = x, .v = x});
}

/* A failure is kept with its text, later work of the stream is dropped, and who waits for an event of it fails as well. */
static void check_failure(void) {
    struct pair p = pair_open();
    struct stream *fresh;
    int word = 0;
    float *x = make_device(p.backend, p.s[0], 1.0f);
    CHECK_FAILS(stream_call(p.s[0], never_called, &word, sizeof word), STATUS_USAGE, "cuda");
    REQUIRE(stream_open(p.backend, &fresh));
    REQUIRE(add(fresh, x, x));
    REQUIRE(stream_sync(fresh));
    CHECK_FAILS(launch_failing(fresh, x), STATUS_USAGE, "F32");
    (void)add(fresh, x, x); /* dropped */
    base_clear_error();
    (void)stream_zero(fresh, x, N * sizeof *x);
    base_clear_error();
    (void)event_record(p.e[0], fresh);
    base_clear_error();
    CHECK_FAILS(stream_sync(fresh), STATUS_USAGE, "F32");
    CHECK_FAILS(stream_sync(fresh), STATUS_USAGE, "F32");
    CHECK_FAILS(event_sync(p.e[0]), STATUS_USAGE, "F32");
    (void)stream_wait(p.s[1], p.e[0]);
    base_clear_error();
    CHECK_FAILS(stream_sync(p.s[1]), STATUS_USAGE, "F32");
    stream_close(fresh);
    REQUIRE(stream_open(p.backend, &fresh));
    expect_device(fresh, x, 2.0, "after a failure, on another stream", 0);
    stream_close(fresh);
    pair_close(&p);
}

int main(void) {
    if (backend_n_devices("cuda") == 0) {
        fprintf(stderr, "skipped: no GPU here\n");
        return TEST_SKIP;
    }
    check_devices();
    check_memory();
    check_no_memory();
    check_copies();
    check_one_stream();
    check_order();
    check_record();
    check_empty_record();
    check_failure();
    return test_report();
}
