/* Every operation of a communicator on 1 to 6 ranks, against values that each rank computes alone: equal to them means equal on
 * all ranks, bit for bit. The whole list runs again with messages cut into tiny chunks and with serialized library calls. */
#include "dist/comm_impl.h"
#include "combine.h"

#include <pthread.h>

enum { GUARD = 64, GUARD_BYTE = 0xa5 };

struct setup {
    struct comm *comm;
    struct backend *backend;
    struct stream *stream;
    bool large;
};

/* ---- buffers with guard bands on both sides ------------------------------------------------------------------------------- */

struct buffer {
    char *device, *host;
    int64_t bytes;
};

static struct buffer buffer_new(const struct setup *s, int64_t bytes) {
    struct buffer b = {.bytes = bytes};
    REQUIRE(comm_alloc(s->comm, s->backend, (size_t)bytes + 2 * GUARD, &b.device));
    b.host = malloc((size_t)bytes + 2 * GUARD);
    memset(b.host, GUARD_BYTE, (size_t)bytes + 2 * GUARD);
    return b;
}

static void buffer_in(const struct setup *s, const struct buffer *b) {
    REQUIRE(stream_copy_in(s->stream, b->device, b->host, (size_t)b->bytes + 2 * GUARD));
}

static void buffer_out(const struct setup *s, const struct buffer *b) {
    REQUIRE(stream_copy_out(s->stream, b->host, b->device, (size_t)b->bytes + 2 * GUARD));
    REQUIRE(stream_sync(s->stream));
    for (int i = 0; i < GUARD; i++) {
        CHECK((unsigned char)b->host[i] == GUARD_BYTE, "guard before, %d", i);
        CHECK((unsigned char)b->host[GUARD + b->bytes + i] == GUARD_BYTE, "guard after, %d", i);
    }
}

static void buffer_free(const struct setup *s, struct buffer *b) {
    comm_release(s->comm, s->backend, b->device);
    free(b->host);
}

/* ---- reductions -------------------------------------------------------------------------------------------------------------- */

static void fill_value(char *at, enum comm_dtype dtype, int rank, int64_t i) {
    uint64_t h = test_hash(100 + (uint64_t)rank, (uint64_t)i);
    if (dtype == COMM_FLOAT) {
        float x = test_uniform(7 + (uint64_t)rank, (uint64_t)i) * (float)(1 << (h % 20));
        if (i % 97 == 3)
            x = -INFINITY;
        memcpy(at, &x, sizeof x);
    } else if (dtype == COMM_INT32) {
        memcpy(at, &h, 4);
    } else {
        memcpy(at, &h, 8);
    }
}

static void check_reduce(const struct setup *s, enum comm_dtype dtype, enum comm_op op, int64_t count, bool in_place) {
    int64_t width = comm_dtype_bytes(dtype), n_wrong = 0;
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    struct buffer from = buffer_new(s, count * width), to = buffer_new(s, count * width);
    for (int64_t i = 0; i < count; i++)
        fill_value(from.host + GUARD + i * width, dtype, rank, i);
    buffer_in(s, &from);
    buffer_in(s, &to);
    char *target = in_place ? from.device : to.device;
    REQUIRE(comm_all_reduce(s->comm, s->stream, "test sum", from.device + GUARD, target + GUARD, count, dtype, op));
    buffer_out(s, &from);
    buffer_out(s, &to);
    const char *result = in_place ? from.host : to.host;
    for (int64_t i = 0; i < count; i++) {
        char sum[8], value[8];
        fill_value(sum, dtype, 0, i);
        for (int r = 1; r < size; r++) {
            fill_value(value, dtype, r, i);
            combine_value(sum, value, dtype, op);
        }
        n_wrong += memcmp(sum, result + GUARD + i * width, (size_t)width) != 0;
        if (!in_place) {
            fill_value(value, dtype, rank, i);
            n_wrong += memcmp(value, from.host + GUARD + i * width, (size_t)width) != 0;
        }
    }
    CHECK(n_wrong == 0, "%lld wrong: dtype %d op %d count %lld in place %d", (long long)n_wrong, dtype, op, (long long)count, in_place);
    buffer_free(s, &from);
    buffer_free(s, &to);
}

static void test_reduce(const struct setup *s) {
    static const int64_t counts[] = {0, 1, 7, 255, 8191, 8192, 8193, 65537, 1048583};
    for (size_t i = 0; i < sizeof counts / sizeof *counts - (s->large ? 0 : 2); i++)
        for (enum comm_dtype dtype = COMM_FLOAT; dtype <= COMM_UINT64; dtype++)
            for (enum comm_op op = COMM_SUM; op <= COMM_MIN; op++) {
                if (counts[i] > 100000 && (dtype != COMM_FLOAT || op == COMM_MIN))
                    continue;
                check_reduce(s, dtype, op, counts[i], (i + dtype + op) % 2);
            }
    if (s->large) /* more than one piece */
        check_reduce(s, COMM_FLOAT, COMM_SUM, 2500003, true);
    CHECK_FAILS(comm_all_reduce(s->comm, s->stream, "bytes", NULL, NULL, 1, COMM_BYTE, COMM_SUM), STATUS_USAGE, "bytes");
}

/* -inf from all ranks stays -inf, and a NaN of any rank reaches all. */
static void test_extremes(const struct setup *s) {
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    int n = size + 2;
    struct buffer b = buffer_new(s, n * (int64_t)sizeof(float));
    for (enum comm_op op = COMM_MAX; op <= COMM_MIN; op++) {
        float *x = (float *)(void *)(b.host + GUARD);
        for (int i = 0; i < n; i++)
            x[i] = i == n - 1 ? (rank == size - 1 ? 3.0f : -INFINITY) : i == rank ? NAN : -INFINITY;
        buffer_in(s, &b);
        void *place = b.device + GUARD;
        REQUIRE(comm_all_reduce(s->comm, s->stream, "extreme", place, place, n, COMM_FLOAT, op));
        buffer_out(s, &b);
        for (int i = 0; i < size; i++)
            CHECK(isnan(x[i]), "the NaN of rank %d is lost", i);
        CHECK(x[size] == -INFINITY, "%g", (double)x[size]);
        CHECK(x[size + 1] == (op == COMM_MAX || size == 1 ? 3.0f : -INFINITY), "%g", (double)x[size + 1]);
    }
    buffer_free(s, &b);
}

/* ---- gathers ------------------------------------------------------------------------------------------------------------------ */

static char byte_of(int rank, int64_t i) { return (char)test_hash(5 + (uint64_t)rank, (uint64_t)i); }

static void check_gather(const struct setup *s, int64_t bytes, bool in_place) {
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    struct buffer from = buffer_new(s, bytes), to = buffer_new(s, size * bytes);
    int64_t n_wrong = 0;
    for (int64_t i = 0; i < bytes; i++)
        (in_place ? to.host + rank * bytes : from.host)[GUARD + i] = byte_of(rank, i);
    buffer_in(s, &from);
    buffer_in(s, &to);
    const char *source = in_place ? to.device + rank * bytes : from.device;
    REQUIRE(comm_all_gather(s->comm, s->stream, "test gather", source + GUARD, to.device + GUARD, bytes));
    buffer_out(s, &to);
    for (int r = 0; r < size; r++)
        for (int64_t i = 0; i < bytes; i++)
            n_wrong += to.host[GUARD + r * bytes + i] != byte_of(r, i);
    CHECK(n_wrong == 0, "%lld wrong of %lld bytes, in place %d", (long long)n_wrong, (long long)bytes, in_place);
    buffer_free(s, &from);
    buffer_free(s, &to);
}

static void test_gather(const struct setup *s) {
    static const int64_t bytes[] = {0, 1, 3, 1000, 100003, 3000001};
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes - (s->large ? 0 : 1); i++)
        for (int in_place = 0; in_place < 2; in_place++)
            check_gather(s, bytes[i], in_place);
}

/* Parts of different sizes, empty ones among them, in reverse order with gaps; `first` and `n`: only these parts. */
static void check_gatherv(const struct setup *s, int64_t unit, int variant, int first, int n) {
    enum { MOST = 16, GAP = 5 };
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    int64_t bytes[MOST], offsets[MOST], at = 0, n_wrong = 0;
    for (int r = size - 1; r >= 0; r--) {
        bytes[r] = variant == 0 ? 0 : ((r + variant) % 3) * unit + (r == 0 && variant == 2 ? 1 : 0);
        offsets[r] = at;
        at += bytes[r] + GAP;
    }
    struct buffer from = buffer_new(s, bytes[rank]), to = buffer_new(s, at);
    for (int64_t i = 0; i < bytes[rank]; i++)
        from.host[GUARD + i] = byte_of(rank, i);
    buffer_in(s, &from);
    buffer_in(s, &to);
    if (n == size)
        REQUIRE(comm_all_gatherv(s->comm, s->stream, "test parts", from.device + GUARD, to.device + GUARD, bytes, offsets));
    else
        REQUIRE(s->comm->functions->all_gatherv(s->comm, "test parts", from.device + GUARD, to.device + GUARD, bytes + first,
                                                offsets + first, first, n));
    buffer_out(s, &to);
    for (int r = 0; r < size; r++) {
        const char *part = to.host + GUARD + offsets[r];
        bool sent = r >= first && r < first + n;
        for (int64_t i = 0; i < bytes[r]; i++)
            n_wrong += part[i] != (sent ? byte_of(r, i) : (char)GUARD_BYTE);
        for (int i = 0; i < GAP; i++)
            n_wrong += (unsigned char)part[bytes[r] + i] != GUARD_BYTE;
    }
    CHECK(n_wrong == 0, "%lld wrong, unit %lld, variant %d, parts %d + %d", (long long)n_wrong, (long long)unit, variant, first, n);
    buffer_free(s, &from);
    buffer_free(s, &to);
}

static void test_gatherv(const struct setup *s) {
    int size = comm_size(s->comm);
    for (int variant = 0; variant < 4; variant++) {
        check_gatherv(s, 1, variant, 0, size);
        check_gatherv(s, 4099, variant, 0, size);
        for (int first = 0; size > 1 && first < size; first++)
            check_gatherv(s, 100, variant, first, first + 2 <= size ? 2 - (size == 2) : 1);
    }
}

/* ---- control -------------------------------------------------------------------------------------------------------------------- */

static void test_control(const struct setup *s) {
    static const int64_t lengths[] = {0, 1, 9, 4096, 100001};
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    char *data = malloc(100001);
    for (int root = 0; root < size; root++)
        for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
            for (int64_t i = 0; i < lengths[k]; i++)
                data[i] = rank == root ? byte_of(root + 50, i) : 0;
            REQUIRE((k % 2 ? comm_broadcast : comm_broadcast_idle)(s->comm, "test plan", data, lengths[k], root));
            int64_t n_wrong = 0;
            for (int64_t i = 0; i < lengths[k]; i++)
                n_wrong += data[i] != byte_of(root + 50, i);
            CHECK(n_wrong == 0, "root %d, %lld bytes", root, (long long)lengths[k]);
        }
    free(data);
    int64_t mine[2] = {rank * 10, -rank}, all[32];
    REQUIRE(comm_gather_host(s->comm, "test host", mine, all, sizeof mine));
    for (int r = 0; r < size; r++)
        CHECK(all[2 * r] == r * 10 && all[2 * r + 1] == -r, "rank %d", r);
    int64_t last = size - 1;
    int64_t sum[2] = {rank, 1}, most[2] = {rank, -rank}, least[2] = {rank, -rank};
    REQUIRE(comm_reduce_host(s->comm, "sum", sum, 2, COMM_SUM));
    REQUIRE(comm_reduce_host(s->comm, "max", most, 2, COMM_MAX));
    REQUIRE(comm_reduce_host(s->comm, "min", least, 2, COMM_MIN));
    CHECK(sum[0] == last * size / 2 && sum[1] == size);
    CHECK(most[0] == last && most[1] == 0);
    CHECK(least[0] == 0 && least[1] == -last);
    REQUIRE(comm_barrier(s->comm, "barrier"));
    CHECK_FAILS(comm_broadcast(s->comm, "no root", &sum, 8, size), STATUS_USAGE, "rank");
}

/* Every subset of failing ranks: the code nearest the top of the list wins, and the lowest rank that has it speaks. */
static void test_agree(const struct setup *s) {
    int size = comm_size(s->comm), rank = comm_rank(s->comm);
    for (int subset = 0; subset < 1 << size; subset++) {
        int worst = -1, code = STATUS_OK;
        for (int r = 0; r < size; r++) {
            int theirs = subset >> r & 1 ? -1 - (r * 5 + subset) % 6 : STATUS_OK;
            if (theirs < 0 && (worst < 0 || theirs > code)) {
                worst = r;
                code = theirs;
            }
        }
        int mine = subset >> rank & 1 ? -1 - (rank * 5 + subset) % 6 : STATUS_OK;
        if (mine < 0)
            base_fail(mine, __FILE__, __LINE__, "file %d is missing", rank);
        int status = comm_agree(s->comm, "test agreement", mine);
        char expected[64] = "";
        if (worst >= 0 && size > 1)
            snprintf(expected, sizeof expected, "rank %d: file %d is missing", worst, worst);
        else if (worst >= 0)
            snprintf(expected, sizeof expected, "file %d is missing", worst);
        CHECK(status == code, "subset %d: %d, not %d", subset, status, code);
        CHECK(strcmp(base_error(), expected) == 0, "subset %d: '%s'", subset, base_error());
        base_clear_error();
    }
}

/* ---- sub-communicators --------------------------------------------------------------------------------------------------------- */

/* Fills in the ranks that share my colour, in the order of their keys. */
static int expected_members(int size, int rank, int n_colours, bool reverse, int *members) {
    int n = 0;
    for (int i = 0; i < size; i++) {
        int r = reverse ? size - 1 - i : i;
        if (r % n_colours == rank % n_colours)
            members[n++] = r;
    }
    return n;
}

static void check_members(const struct setup *s, struct comm *part, const int *members, int n) {
    int64_t mine = comm_rank(s->comm), all[16];
    CHECK(comm_size(part) == n, "%d, not %d", comm_size(part), n);
    CHECK(members[comm_rank(part)] == mine);
    REQUIRE(comm_gather_host(part, "members", &mine, all, sizeof mine));
    for (int i = 0; i < n; i++)
        CHECK(all[i] == members[i], "member %d is %lld", i, (long long)all[i]);
}

static void test_split(const struct setup *s) {
    int size = comm_size(s->comm), rank = comm_rank(s->comm), members[16];
    for (int n_colours = 1; n_colours <= size; n_colours++) {
        struct comm *parts[2], *again;
        for (int reverse = 0; reverse < 2; reverse++) {
            REQUIRE(comm_split(s->comm, rank % n_colours, reverse ? -rank : 0, reverse ? "back" : "forth", &parts[reverse]));
            check_members(s, parts[reverse], members, expected_members(size, rank, n_colours, reverse, members));
        }
        REQUIRE(comm_split(parts[1], 0, 0, "again", &again));
        check_members(s, again, members, expected_members(size, rank, n_colours, true, members));
        /* All three at work on one stream, in an order of its own for every colour. */
        for (int round = 0; round < 3; round++) {
            struct setup of = *s;
            of.comm = (round + rank % n_colours) % 3 == 0 ? parts[0] : (round + rank % n_colours) % 3 == 1 ? parts[1] : again;
            check_reduce(&of, COMM_FLOAT, COMM_SUM, 10000, true);
            check_gather(&of, 1001, false);
            check_gatherv(&of, 77, 2, 0, comm_size(of.comm));
        }
        comm_free(again);
        comm_free(parts[0]);
        comm_free(parts[1]);
    }
}

/* One thread reduces on a stream while this one broadcasts on the same communicator. */
static void *reduce_many(void *argument) {
    const struct setup *s = argument;
    struct buffer b = buffer_new(s, 400);
    buffer_in(s, &b);
    for (int i = 0; i < 300; i++)
        REQUIRE(comm_all_reduce(s->comm, s->stream, "busy sum", b.device + GUARD, b.device + GUARD, 50, COMM_UINT64, COMM_MAX));
    buffer_out(s, &b);
    for (int i = 0; i < 400; i++)
        CHECK((unsigned char)b.host[GUARD + i] == GUARD_BYTE);
    buffer_free(s, &b);
    return NULL;
}

static void test_threads(struct setup *s) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, reduce_many, s) == 0);
    for (int i = 0; i < 300; i++) {
        int64_t data[16];
        int root = i % comm_size(s->comm);
        for (int k = 0; k < 16; k++)
            data[k] = comm_rank(s->comm) == root ? i * 16 + k : -1;
        REQUIRE(comm_broadcast(s->comm, "busy plan", data, sizeof data, root));
        if (data[0] != i * 16 || data[15] != i * 16 + 15)
            CHECK(false, "round %d: %lld", i, (long long)data[0]);
    }
    pthread_join(thread, NULL);
}

static void run_all(struct setup *s) {
    test_reduce(s);
    test_extremes(s);
    test_gather(s);
    test_gatherv(s);
    test_control(s);
    test_agree(s);
    test_split(s);
    test_threads(s);
}

int main(int argc, char **argv) {
    struct setup s = {.large = true};
    struct backend_options options = {.n_threads = 1};
    REQUIRE(comm_start("nccl", 60, &argc, &argv, &s.comm)); /* as "auto" is, until it meets a device that is no GPU */
    REQUIRE(backend_open("cpu", &options, &s.backend));
    CHECK_FAILS(comm_use_device(&s.comm, s.backend), STATUS_USAGE, "comm = nccl moves memory of GPUs only, and device = cpu has none");
    REQUIRE(stream_open(s.backend, &s.stream));
    CHECK(strcmp(comm_kind(s.comm), comm_size(s.comm) == 1 ? "self" : "mpi") == 0, "%s", comm_kind(s.comm));
    run_all(&s);
    if (comm_size(s.comm) > 1) {
        s.large = false;
        comm_mpi_set_limits(s.comm, 1000, true);
        REQUIRE(comm_barrier(s.comm, "limits"));
        run_all(&s);
        comm_mpi_set_limits(s.comm, 7, false);
        REQUIRE(comm_barrier(s.comm, "limits"));
        check_gatherv(&s, 50, 1, 0, comm_size(s.comm));
        check_gather(&s, 50, true);
        check_reduce(&s, COMM_FLOAT, COMM_SUM, 1001, false);
        test_control(&s);
    }
    int64_t failed = test_n_failed;
    REQUIRE(comm_reduce_host(s.comm, "failures", &failed, 1, COMM_SUM));
    CHECK(failed == 0 || test_n_failed > 0, "on another rank");
    stream_close(s.stream);
    backend_close(s.backend);
    comm_finish(s.comm);
    return test_report();
}
