/* Collectives in the memory of GPUs on 1, 2 and 4 ranks, one GPU each, against values that each rank computes alone. Integers, extremes
 * and sums of small whole numbers are exact; sums of other floats have a bound and are the same bits on all ranks and in each run.
 * In windows and in plain memory, at once and inside a recording, on the ranks of the world and on those of a tp x cp grid. */
#include "dist/comm_impl.h"
#include "dist/place.h"
#include "combine.h"

enum { GUARD = 64, GUARD_BYTE = 0xa5, MOST_RANKS = 16, MOST_BYTES = (1 << 20) + 4, GAP = 5, SLACK = 256 };
enum values { SMALL, ANY }; /* whole numbers up to 1000, whose sums are exact in float; all kinds */

struct setup {
    struct comm *comm;
    struct backend *backend;
    struct stream *stream;
    bool plain; /* buffers are the backend's, not windows */
    char *from, *to, *host_from, *host_to; /* each [GUARD + room + GUARD] */
    int64_t room;
};

/* ---- a setup and its two buffers --------------------------------------------------------------------------------- */

static char *take(const struct setup *s, int64_t bytes) {
    char *memory;
    if (s->plain)
        REQUIRE(backend_alloc(s->backend, MEMORY_WORKSPACE, (size_t)bytes, &memory));
    else
        REQUIRE(comm_alloc(s->comm, s->backend, (size_t)bytes, &memory));
    return memory;
}

static void give(const struct setup *s, char *memory) {
    if (s->plain)
        backend_free(s->backend, memory);
    else
        comm_release(s->comm, s->backend, memory);
}

static struct setup setup_new(struct comm *comm, struct backend *backend, struct stream *stream, bool plain) {
    struct setup s = {.comm = comm, .backend = backend, .stream = stream, .plain = plain};
    s.room = comm_size(comm) * (int64_t)(MOST_BYTES + SLACK);
    s.from = take(&s, s.room + 2 * GUARD);
    s.to = take(&s, s.room + 2 * GUARD);
    s.host_from = malloc((size_t)s.room + 2 * GUARD);
    s.host_to = malloc((size_t)s.room + 2 * GUARD);
    return s;
}

static void setup_free(struct setup *s) {
    give(s, s->from);
    give(s, s->to);
    free(s->host_from);
    free(s->host_to);
}

/* Fills the first `bytes` of both buffers on the host, guards included, with the guards' byte. */
static void begin(const struct setup *s, int64_t bytes) {
    CHECK(bytes <= s->room, "%lld bytes in a buffer of %lld", (long long)bytes, (long long)s->room);
    memset(s->host_from, GUARD_BYTE, (size_t)bytes + 2 * GUARD);
    memset(s->host_to, GUARD_BYTE, (size_t)bytes + 2 * GUARD);
}

static void send_both(const struct setup *s, int64_t bytes) {
    REQUIRE(stream_copy_in(s->stream, s->from, s->host_from, (size_t)bytes + 2 * GUARD));
    REQUIRE(stream_copy_in(s->stream, s->to, s->host_to, (size_t)bytes + 2 * GUARD));
    REQUIRE(stream_sync(s->stream)); /* the host's copies are free again */
}

static void check_guard(const char *at, const char *where, const char *what) {
    for (int i = 0; i < GUARD; i++)
        CHECK((unsigned char)at[i] == GUARD_BYTE, "%s: guard %s, byte %d is %02x", what, where, i, (unsigned char)at[i]);
}

static void receive_both(const struct setup *s, int64_t bytes, const char *what) {
    REQUIRE(stream_copy_out(s->stream, s->host_from, s->from, (size_t)bytes + 2 * GUARD));
    REQUIRE(stream_copy_out(s->stream, s->host_to, s->to, (size_t)bytes + 2 * GUARD));
    REQUIRE(stream_sync(s->stream));
    check_guard(s->host_from, "before from", what);
    check_guard(s->host_to, "before to", what);
    check_guard(s->host_from + GUARD + bytes, "after from", what);
    check_guard(s->host_to + GUARD + bytes, "after to", what);
}

/* Collective. The bytes are the same on all ranks. */
static void check_same(const struct setup *s, const char *data, int64_t bytes, const char *what) {
    uint64_t mine = BASE_HASH, all[MOST_RANKS];
    for (int64_t i = 0; i < bytes; i++)
        mine = base_hash(mine, (unsigned char)data[i]);
    REQUIRE(comm_gather_host(s->comm, "test hash", &mine, all, sizeof mine));
    for (int r = 0; r < comm_size(s->comm); r++)
        CHECK(all[r] == mine, "%s, %lld bytes: ranks %d and %d of '%s' hold different bits", what, (long long)bytes, r, comm_rank(s->comm),
              s->comm->name);
}

/* ---- sums and extremes ------------------------------------------------------------------------------------------- */

static void put_value(char *at, enum comm_dtype dtype, enum values values, int rank, int64_t i) {
    uint64_t h = test_hash(100 + (uint64_t)rank, (uint64_t)i);
    int64_t small = (int64_t)(h % 2001) - 1000;
    if (dtype == COMM_FLOAT) {
        float x = values == SMALL ? (float)small : test_normal(7 + (uint64_t)rank, (uint64_t)i) * (float)(1 << (h % 20));
        memcpy(at, &x, sizeof x);
    } else if (dtype == COMM_INT32) {
        int32_t x = values == SMALL ? (int32_t)small : (int32_t)(uint32_t)(h >> 32);
        memcpy(at, &x, sizeof x);
    } else {
        uint64_t x = values == SMALL ? (uint64_t)small : h;
        memcpy(at, &x, sizeof x);
    }
}

/* n floats added in any order, each sum rounded: off by at most (n - 1) u / (1 - (n - 1) u) times the sum of magnitudes, with
 * u = 2^-24 (Higham, Accuracy and Stability, 4.2). The reference in double is off by 2^-29 of that. */
static bool sum_is_near(const char *got, const struct setup *s, int64_t i, double *exact, double *bound) {
    double magnitude = 0, n = comm_size(s->comm) - 1, u = 1.0 / (1 << 24);
    float value;
    *exact = 0;
    for (int r = 0; r < comm_size(s->comm); r++) {
        put_value((char *)&value, COMM_FLOAT, ANY, r, i);
        *exact += (double)value;
        magnitude += fabs((double)value);
    }
    *bound = n * u / (1 - n * u) * magnitude * (1 + 1e-6);
    memcpy(&value, got, sizeof value);
    return fabs((double)value - *exact) <= *bound;
}

static void check_values(const struct setup *s, const char *result, enum comm_dtype dtype, enum comm_op op, enum values values,
                         int64_t count, const char *what) {
    int64_t width = comm_dtype_bytes(dtype), n_wrong = 0, first = -1;
    double exact = 0, bound = 0, shown_exact = 0, shown_bound = 0;
    for (int64_t i = 0; i < count; i++) {
        char sum[8], value[8];
        bool right;
        if (dtype == COMM_FLOAT && op == COMM_SUM && values == ANY) {
            right = sum_is_near(result + i * width, s, i, &exact, &bound);
        } else {
            put_value(sum, dtype, values, 0, i);
            for (int r = 1; r < comm_size(s->comm); r++) {
                put_value(value, dtype, values, r, i);
                combine_value(sum, value, dtype, op);
            }
            right = memcmp(sum, result + i * width, (size_t)width) == 0;
        }
        if (!right && n_wrong++ == 0) {
            first = i;
            shown_exact = exact;
            shown_bound = bound;
        }
    }
    uint64_t bits = 0;
    if (first >= 0)
        memcpy(&bits, result + first * width, (size_t)width);
    CHECK(n_wrong == 0, "%s on '%s': dtype %d op %d values %d, %lld of %lld wrong, first %lld: bits %llx (bounded sums: %.9g +- %.3g)",
          what, s->comm->name, dtype, op, values, (long long)n_wrong, (long long)count, (long long)first, (unsigned long long)bits,
          shown_exact, shown_bound);
}

static void check_reduce(const struct setup *s, enum comm_dtype dtype, enum comm_op op, enum values values, int64_t count,
                         bool in_place) {
    int64_t width = comm_dtype_bytes(dtype), bytes = count * width, n_changed = 0;
    const char *what = in_place ? "reduce in place" : "reduce";
    begin(s, bytes);
    for (int64_t i = 0; i < count; i++)
        put_value(s->host_from + GUARD + i * width, dtype, values, comm_rank(s->comm), i);
    send_both(s, bytes);
    char *target = in_place ? s->from : s->to;
    REQUIRE(comm_all_reduce(s->comm, s->stream, "test sum", s->from + GUARD, target + GUARD, count, dtype, op));
    receive_both(s, bytes, what);
    const char *result = (in_place ? s->host_from : s->host_to) + GUARD;
    check_values(s, result, dtype, op, values, count, what);
    check_same(s, result, bytes, what);
    for (int64_t i = 0; i < count && !in_place; i++) {
        char value[8];
        put_value(value, dtype, values, comm_rank(s->comm), i);
        n_changed += memcmp(value, s->host_from + GUARD + i * width, (size_t)width) != 0;
    }
    CHECK(n_changed == 0, "%s: %lld inputs changed", what, (long long)n_changed);
}

/* Elements of this many bytes: 1, 3 and 1000 of them, 16 KiB, and 1 MiB and a bit. */
static void test_reduce(const struct setup *s) {
    for (enum comm_dtype dtype = COMM_FLOAT; dtype <= COMM_UINT64; dtype++) {
        int64_t width = comm_dtype_bytes(dtype);
        const int64_t counts[] = {0, 1, 3, 1000, 16384 / width, MOST_BYTES / width};
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
            for (enum comm_op op = COMM_SUM; op <= COMM_MIN; op++)
                for (int in_place = 0; in_place < 2; in_place++) {
                    if (counts[i] > 100000 && op == COMM_MIN)
                        continue;
                    check_reduce(s, dtype, op, SMALL, counts[i], in_place);
                    check_reduce(s, dtype, op, ANY, counts[i], in_place);
                }
    }
}

/* The same sum of floats three times: the same bits. */
static void test_repeat(const struct setup *s) {
    enum { COUNT = 40001 };
    char *before = malloc(COUNT * sizeof(float));
    for (int round = 0; round < 3; round++) {
        check_reduce(s, COMM_FLOAT, COMM_SUM, ANY, COUNT, false);
        CHECK(round == 0 || memcmp(before, s->host_to + GUARD, COUNT * sizeof(float)) == 0, "a sum of %d floats has other bits in run %d",
              COUNT, round);
        memcpy(before, s->host_to + GUARD, COUNT * sizeof(float));
    }
    free(before);
}

/* -inf is the neutral element of max on all ranks. */
static void test_infinity(const struct setup *s) {
    int size = comm_size(s->comm), rank = comm_rank(s->comm), n = size + 1;
    int64_t bytes = n * (int64_t)sizeof(float);
    float *x = (float *)(void *)(s->host_from + GUARD);
    begin(s, bytes);
    for (int i = 0; i < n; i++)
        x[i] = i == rank ? (float)rank : -INFINITY;
    send_both(s, bytes);
    REQUIRE(comm_all_reduce(s->comm, s->stream, "test max", s->from + GUARD, s->from + GUARD, n, COMM_FLOAT, COMM_MAX));
    receive_both(s, bytes, "max");
    for (int i = 0; i < n; i++)
        CHECK(x[i] == (i < size ? (float)i : -INFINITY), "max %d of %d: %g", i, n, (double)x[i]);
}

/* ---- gathers ----------------------------------------------------------------------------------------------------- */

static char byte_of(int rank, int64_t i) { return (char)test_hash(5 + (uint64_t)rank, (uint64_t)i); }

static int64_t count_wrong(const char *part, int rank, int64_t bytes, int64_t *first) {
    int64_t n_wrong = 0;
    for (int64_t i = 0; i < bytes; i++)
        if (part[i] != byte_of(rank, i) && n_wrong++ == 0)
            *first = i;
    return n_wrong;
}

static void check_gather(const struct setup *s, int64_t bytes, bool in_place) {
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    begin(s, size * bytes);
    for (int64_t i = 0; i < bytes; i++)
        (in_place ? s->host_to + rank * bytes : s->host_from)[GUARD + i] = byte_of(rank, i);
    send_both(s, size * bytes);
    const char *source = in_place ? s->to + rank * bytes : s->from;
    REQUIRE(comm_all_gather(s->comm, s->stream, "test gather", source + GUARD, s->to + GUARD, bytes));
    receive_both(s, size * bytes, "gather");
    for (int r = 0; r < size; r++) {
        int64_t first = -1, n_wrong = count_wrong(s->host_to + GUARD + r * bytes, r, bytes, &first);
        CHECK(n_wrong == 0, "gather on '%s': part of rank %d: %lld of %lld bytes wrong, first %lld, in place %d", s->comm->name, r,
              (long long)n_wrong, (long long)bytes, (long long)first, in_place);
    }
}

/* Parts of different sizes, empty ones among them, in reverse order with gaps. Variant 0: all empty; 4: even, in order, no gaps. */
static void check_gatherv(const struct setup *s, int64_t unit, int variant, bool in_place) {
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    int64_t bytes[MOST_RANKS], offsets[MOST_RANKS], at = 0;
    for (int i = 0; i < size; i++) {
        int r = variant == 4 ? i : size - 1 - i;
        bytes[r] = variant == 0 ? 0 : variant == 4 ? unit : ((r + variant) % 3) * unit + (r == 0 && variant == 2 ? 1 : 0);
        offsets[r] = at;
        at += bytes[r] + (variant == 4 ? 0 : GAP);
    }
    begin(s, at);
    for (int64_t i = 0; i < bytes[rank]; i++)
        (in_place ? s->host_to + offsets[rank] : s->host_from)[GUARD + i] = byte_of(rank, i);
    send_both(s, at);
    const char *source = in_place ? s->to + offsets[rank] : s->from;
    REQUIRE(comm_all_gatherv(s->comm, s->stream, "test parts", source + GUARD, s->to + GUARD, bytes, offsets));
    receive_both(s, at, "gatherv");
    for (int r = 0; r < size; r++) {
        const char *part = s->host_to + GUARD + offsets[r];
        int64_t first = -1, n_wrong = count_wrong(part, r, bytes[r], &first);
        for (int i = 0; i < GAP && variant != 4; i++)
            n_wrong += (unsigned char)part[bytes[r] + i] != GUARD_BYTE;
        CHECK(n_wrong == 0, "gatherv on '%s': part of rank %d: %lld of %lld bytes or of the gap wrong, first %lld; unit %lld, variant %d, "
              "in place %d", s->comm->name, r, (long long)n_wrong, (long long)bytes[r], (long long)first, (long long)unit, variant,
              in_place);
    }
}

static void test_gather(const struct setup *s) {
    static const int64_t sizes[] = {0, 1, 3, 1000, 16384, MOST_BYTES};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int in_place = 0; in_place < 2; in_place++) {
            check_gather(s, sizes[i], in_place);
            for (int variant = 0; variant <= 4; variant++)
                check_gatherv(s, sizes[i] / 2, variant, in_place);
        }
}

/* ---- a recording ------------------------------------------------------------------------------------------------- */

/* A sum, a gather and uneven parts in one graph, replayed with other data each time. */
static void test_graph(const struct setup *s) {
    enum { COUNT = 1000, PART = COUNT * 4, ROUNDS = 3 };
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    int64_t bytes[MOST_RANKS], offsets[MOST_RANKS], gathered = PART, parts = gathered + (int64_t)size * PART, end = parts;
    struct graph *graph;
    for (int r = 0; r < size; r++) {
        bytes[r] = PART / (r + 1);
        offsets[r] = end - parts;
        end += bytes[r];
    }
    REQUIRE(backend_record_begin(s->backend));
    REQUIRE(comm_all_reduce(s->comm, s->stream, "graph sum", s->from + GUARD, s->to + GUARD, COUNT, COMM_INT32, COMM_SUM));
    REQUIRE(comm_all_gather(s->comm, s->stream, "graph gather", s->from + GUARD, s->to + GUARD + gathered, PART));
    REQUIRE(comm_all_gatherv(s->comm, s->stream, "graph parts", s->from + GUARD, s->to + GUARD + parts, bytes, offsets));
    REQUIRE(backend_record_end(s->backend, &graph));
    for (int round = 0; round < ROUNDS; round++) {
        int64_t n_sum = 0, n_gather = 0, n_parts = 0, seed = 10 * round;
        begin(s, end);
        for (int64_t i = 0; i < COUNT; i++)
            put_value(s->host_from + GUARD + 4 * i, COMM_INT32, ANY, (int)seed + rank, i);
        send_both(s, end);
        REQUIRE(graph_replay(graph));
        receive_both(s, end, "graph");
        const char *got = s->host_to + GUARD;
        for (int64_t i = 0; i < COUNT; i++) {
            char sum[8], value[8];
            enum comm_op op = COMM_SUM;
            for (int r = 0; r < size; r++) {
                put_value(value, COMM_INT32, ANY, (int)seed + r, i);
                if (r == 0)
                    memcpy(sum, value, 4);
                else
                    combine_value(sum, value, COMM_INT32, op);
                n_gather += memcmp(got + gathered + (int64_t)r * PART + 4 * i, value, 4) != 0;
                if (4 * i + 4 <= bytes[r])
                    n_parts += memcmp(got + parts + offsets[r] + 4 * i, value, 4) != 0;
            }
            n_sum += memcmp(got + 4 * i, sum, 4) != 0;
        }
        CHECK(n_sum + n_gather + n_parts == 0, "replay %d on '%s': wrong: %lld sums, %lld gathered, %lld of parts", round, s->comm->name,
              (long long)n_sum, (long long)n_gather, (long long)n_parts);
    }
    graph_close(graph);
}

/* ---- windows ----------------------------------------------------------------------------------------------------- */

/* Zeroed, of unequal sizes, released in another order than allocated, and again: nothing is left, and collectives go on working. */
static void test_windows(const struct setup *s) {
    enum { WINDOWS = 3, ROUNDS = 3 };
    size_t before = backend_used(s->backend, MEMORY_WORKSPACE);
    int rank = comm_rank(s->comm), size = comm_size(s->comm);
    for (int round = 0; round < ROUNDS; round++) {
        char *windows[WINDOWS], first[100];
        for (int i = 0; i < WINDOWS; i++) {
            REQUIRE(comm_alloc(s->comm, s->backend, (size_t)(100 * (rank + 1) + i * 3000000), &windows[i]));
            REQUIRE(stream_copy_out(s->stream, first, windows[i], sizeof first));
            REQUIRE(stream_sync(s->stream));
            for (size_t k = 0; k < sizeof first; k++)
                CHECK(first[k] == 0, "round %d, window %d: byte %zu is %d", round, i, k, first[k]);
        }
        CHECK(backend_used(s->backend, MEMORY_WORKSPACE) >= before + 300, "windows are not counted");
        int32_t sum = rank + round, expected = size * round + size * (size - 1) / 2;
        REQUIRE(stream_copy_in(s->stream, windows[1] + 16, &sum, sizeof sum));
        REQUIRE(comm_all_reduce(s->comm, s->stream, "window sum", windows[1] + 16, windows[2] + 32, 1, COMM_INT32, COMM_SUM));
        REQUIRE(stream_copy_out(s->stream, &sum, windows[2] + 32, sizeof sum));
        REQUIRE(stream_sync(s->stream));
        CHECK(sum == expected, "round %d: %d, not %d", round, sum, expected);
        for (int i = 0; i < WINDOWS; i++)
            comm_release(s->comm, s->backend, windows[(i + round) % WINDOWS]);
        CHECK(backend_used(s->backend, MEMORY_WORKSPACE) == before, "round %d: %zu bytes, before %zu", round,
              backend_used(s->backend, MEMORY_WORKSPACE), before);
    }
}

/* ---- communicators ----------------------------------------------------------------------------------------------- */

static void check_kind(const struct comm *comm, const char *alone) {
    char text[256];
    bool several = comm_size(comm) > 1;
    comm_library(comm, text, sizeof text);
    CHECK(strcmp(comm_kind(comm), several ? "nccl" : alone) == 0, "'%s' of %d is %s", comm->name, comm_size(comm), comm_kind(comm));
    CHECK(!several || strncmp(text, "NCCL 2.", 7) == 0, "library: %s", text);
}

static void run_some(struct setup *s) {
    check_reduce(s, COMM_FLOAT, COMM_SUM, ANY, 4097, true);
    check_gather(s, 1001, false);
    check_gatherv(s, 77, 2, false);
}

/* tp and cp communicators of each grid, split in host memory first, as the engine does; both at work in turn. Then a split of NCCL's. */
static void test_grids(struct comm *world, struct comm *all, const struct setup *s) {
    int size = comm_size(world), rank = comm_rank(world);
    for (int tp = 1; tp <= size; tp++) {
        struct comm *parts[2];
        struct setup of[2];
        if (size % tp != 0)
            continue;
        int cp = size / tp;
        REQUIRE(comm_split(world, rank % cp, rank / cp, "tp", &parts[0]));
        REQUIRE(comm_split(world, rank / cp, rank % cp, "cp", &parts[1]));
        for (int i = 0; i < 2; i++) {
            REQUIRE(comm_use_device(&parts[i], s->backend));
            CHECK(comm_size(parts[i]) == (i == 0 ? tp : cp), "%d ranks", comm_size(parts[i]));
            check_kind(parts[i], comm_kind(world));
            of[i] = setup_new(parts[i], s->backend, s->stream, false);
        }
        for (int round = 0; round < 2; round++)
            for (int i = 0; i < 2; i++)
                run_some(&of[i]);
        test_graph(&of[1]);
        for (int i = 0; i < 2; i++) {
            setup_free(&of[i]);
            comm_free(parts[i]);
        }
    }
    struct comm *again;
    REQUIRE(comm_split(all, 0, -rank, "again", &again));
    check_kind(again, comm_kind(world));
    CHECK(comm_rank(again) == size - 1 - rank);
    struct setup of = setup_new(again, s->backend, s->stream, false);
    run_some(&of);
    setup_free(&of);
    comm_free(again);
}

/* What cannot be is refused on all ranks, and changes nothing. */
static void test_refusals(struct comm *world, struct comm **all, struct backend *cuda) {
    struct backend *cpu;
    struct comm *before = *all;
    int64_t one = 1;
    REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, &cpu));
    REQUIRE(comm_use_device(&world, cpu));
    CHECK(strcmp(comm_kind(world), "nccl") != 0, "a CPU made it %s", comm_kind(world));
    if (comm_size(world) > 1) {
        CHECK_FAILS(comm_use_device(all, cuda), STATUS_FAILED, "already");
        CHECK_FAILS(comm_use_device(all, comm_rank(world) == 0 ? cpu : cuda), STATUS_USAGE, "some ranks");
    }
    CHECK(*all == before);
    REQUIRE(comm_reduce_host(*all, "still there", &one, 1, COMM_SUM));
    CHECK(one == comm_size(world));
    backend_close(cpu);
}

static int open_gpu(struct comm *world, struct backend **backend) {
    struct place place;
    char pci[MOST_RANKS][16];
    struct backend_options options = {0};
    int n = (int)min_i64(MOST_RANKS, backend_n_devices("cuda"));
    TRY(place_bind(world, &place));
    for (int i = 0; i < n; i++) {
        struct backend_device device;
        TRY(backend_find_device("cuda", i, &device));
        memcpy(pci[i], device.pci, sizeof pci[i]);
    }
    TRY(place_choose_device(world, &place, n, (const char(*)[16])pci, &options.device));
    return backend_open("cuda", &options, backend);
}

static void run_all(struct comm *world, struct backend *backend, struct stream *stream) {
    struct comm *all;
    REQUIRE(comm_split(world, 0, comm_rank(world), "all", &all));
    REQUIRE(comm_use_device(&all, backend));
    check_kind(all, comm_kind(world));
    for (int plain = 0; plain < 2; plain++) {
        struct setup s = setup_new(all, backend, stream, plain);
        test_reduce(&s);
        test_repeat(&s);
        test_infinity(&s);
        test_gather(&s);
        test_graph(&s);
        if (!plain) {
            test_windows(&s);
            test_grids(world, all, &s);
        }
        setup_free(&s);
    }
    test_refusals(world, &all, backend);
    comm_free(all);
}

int main(int argc, char **argv) {
    struct comm *world;
    struct backend *backend;
    struct stream *stream;
    REQUIRE(comm_start("auto", 60, &argc, &argv, &world));
    int64_t n_devices = backend_n_devices("cuda");
    REQUIRE(comm_reduce_host(world, "devices", &n_devices, 1, COMM_MIN));
    if (n_devices < comm_size(world)) {
        if (comm_rank(world) == 0)
            fprintf(stderr, "skipped: %lld GPUs for %d ranks\n", (long long)n_devices, comm_size(world));
        comm_finish(world);
        return TEST_SKIP;
    }
    REQUIRE(open_gpu(world, &backend));
    size_t used = backend_used(backend, MEMORY_WORKSPACE);
    REQUIRE(stream_open(backend, &stream));
    REQUIRE(comm_watch_device(world, backend));
    run_all(world, backend, stream);
    int64_t failed = test_n_failed;
    REQUIRE(comm_reduce_host(world, "failures", &failed, 1, COMM_SUM));
    CHECK(failed == 0 || test_n_failed > 0, "on another rank");
    stream_close(stream);
    CHECK(backend_used(backend, MEMORY_WORKSPACE) == used, "%zu bytes of workspace, %zu before", backend_used(backend, MEMORY_WORKSPACE),
          used);
    backend_close(backend);
    comm_finish(world);
    return test_report();
}
