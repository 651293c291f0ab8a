/* The yardsticks of a GPU: stream_read reads every word once, graph_time replays as often as it says and its times add up, and the
 * attention of the library beside which bench puts ours is attention: both ways to give it the heads, launched and in a graph. */
#include "kernels/ops.h"
#include "kernels/rates.h"
#include "test.h"

enum {
    READ_TILE = 256 * 4,   /* vectors of 16 bytes that a block of the kernel takes at once */
    MOST_READ = 64 << 20,
    N_TIMES = 150,         /* more than two of graph_time's rounds */
    ROUNDS = 3,            /* of 64 replays, each begun by one that is not timed */
    HEADS = 8, KV_HEADS = 2, BATCH = 2,
};

static struct backend *backend;
static struct stream *stream;

static void *take(size_t bytes) {
    void *memory;
    REQUIRE(backend_alloc(backend, MEMORY_WORKSPACE, bytes, &memory));
    return memory;
}

static void *take_host(size_t bytes) {
    void *memory;
    REQUIRE(backend_alloc(backend, MEMORY_HOST, bytes, &memory));
    return memory;
}

/* ---- reading -------------------------------------------------------------------------------------------------------------- */

static void check_read(const uint32_t *host, uint8_t *device, uint32_t *sum, size_t offset, size_t bytes) {
    const uint32_t start = 0xfffffff0u; /* the sum wraps */
    uint32_t expected = start, *got = take_host(sizeof *got);
    for (size_t i = 0; i < bytes / 4; i++)
        expected += 2 * host[offset / 4 + i];
    *got = start;
    REQUIRE(stream_copy_in(stream, sum, got, sizeof *got));
    for (int i = 0; i < 2; i++)
        REQUIRE(stream_read(stream, device + offset, bytes, sum));
    REQUIRE(stream_sync(stream));
    REQUIRE(stream_copy_out(stream, got, sum, sizeof *got));
    REQUIRE(stream_sync(stream));
    CHECK(*got == expected, "%zu bytes from %zu on: %08x, expected %08x", bytes, offset, *got, expected);
    backend_free(backend, got);
}

static void check_reads(void) {
    const size_t tile = READ_TILE * 16, sizes[] = {0, 16, 48, tile - 16, tile, tile + 16, 300 * tile + 32, MOST_READ - 16};
    uint32_t *host = take_host(MOST_READ), *sum = take(sizeof *sum);
    uint8_t *device = take(MOST_READ);
    for (size_t i = 0; i < MOST_READ / 4; i++)
        host[i] = (uint32_t)test_hash(1, i);
    REQUIRE(stream_copy_in(stream, device, host, MOST_READ));
    REQUIRE(stream_sync(stream));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t offset = 0; offset <= 16; offset += 16)
            check_read(host, device, sum, offset, sizes[i]);
    backend_free(backend, host);
    backend_free(backend, device);
    backend_free(backend, sum);
}

/* ---- timing --------------------------------------------------------------------------------------------------------------- */

static void check_time(void) {
    enum { N = 1 << 20 };
    float *x = take(N * sizeof *x), *y = take(N * sizeof *y), *host = take_host(N * sizeof *host);
    double seconds[N_TIMES], sum = 0;
    struct graph *graph;
    for (int i = 0; i < N; i++)
        host[i] = 1.0f;
    REQUIRE(stream_copy_in(stream, y, host, N * sizeof *host));
    REQUIRE(stream_sync(stream));
    REQUIRE(backend_record_begin(backend));
    for (int i = 0; i < 4; i++)
        REQUIRE(op_add(stream, &(struct add_args){.n_rows = 1, .hidden = N, .x = x, .y = y}));
    REQUIRE(backend_record_end(backend, &graph));
    double start = base_seconds();
    REQUIRE(graph_time(graph, stream, N_TIMES, seconds));
    double all = base_seconds() - start;
    for (int i = 0; i < N_TIMES; i++) {
        CHECK(seconds[i] > 0 && seconds[i] < all, "replay %d took %g s of %g s", i, seconds[i], all);
        sum += seconds[i];
    }
    CHECK(sum <= all, "replays took %g s together, on the host's clock %g s", sum, all);
    REQUIRE(stream_copy_out(stream, host, x, N * sizeof *host));
    REQUIRE(stream_sync(stream));
    const float expected = 4.0f * (N_TIMES + ROUNDS);
    CHECK(host[0] == expected && host[N - 1] == expected, "%g and %g replays' sums, expected %g", (double)host[0], (double)host[N - 1],
          (double)expected);
    graph_close(graph);
    void *all_memory[] = {x, y, host};
    for (int i = 0; i < 3; i++)
        backend_free(backend, all_memory[i]);
}

/* ---- the library's attention ------------------------------------------------------------------------------------------------ */

struct peer {
    struct peer_attention args;
    uint16_t *q, *k, *v, *out;                     /* host; out: of two launches */
    uint16_t *device_q, *device_k, *device_v, *device_out;
    size_t n_q, n_kv;
};

static uint16_t *fill(uint64_t seed, size_t n, uint16_t **device) {
    uint16_t *host = take_host(n * sizeof *host);
    for (size_t i = 0; i < n; i++)
        host[i] = dtype_to_f16(2.0f * test_uniform(seed, i));
    *device = take(n * sizeof *host);
    REQUIRE(stream_copy_in(stream, *device, host, n * sizeof *host));
    REQUIRE(stream_sync(stream));
    return host;
}

static struct peer peer_open(int d, int64_t n, bool grouped) {
    struct peer p = {.n_q = (size_t)BATCH * HEADS * (size_t)d, .n_kv = (size_t)BATCH * KV_HEADS * (size_t)n * (size_t)d};
    p.q = fill(2, p.n_q, &p.device_q);
    p.k = fill(3, p.n_kv, &p.device_k);
    p.v = fill(4, p.n_kv, &p.device_v);
    p.out = take_host(2 * p.n_q * sizeof *p.out);
    p.device_out = take(2 * p.n_q * sizeof *p.out);
    memset(p.out, 0xff, 2 * p.n_q * sizeof *p.out);
    REQUIRE(stream_copy_in(stream, p.device_out, p.out, 2 * p.n_q * sizeof *p.out));
    p.args = (struct peer_attention){.batch = BATCH, .n_heads = HEADS, .n_kv_heads = KV_HEADS, .head_dim = d, .n = n, .dtype = DTYPE_F16,
                                     .scale = 1.0f / sqrtf((float)d), .grouped = grouped, .q = p.device_q, .k = p.device_k,
                                     .v = p.device_v, .out = p.device_out};
    return p;
}

static void peer_close(struct peer *p) {
    void *all[] = {p->q, p->k, p->v, p->out, p->device_q, p->device_k, p->device_v, p->device_out};
    REQUIRE(stream_sync(stream));
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(backend, all[i]);
}

/* Channel c of (sequence, head) in double; *size: the same sum of |v|. */
static double peer_expected(const struct peer *p, int seq, int head, int c, double *weight, double *size) {
    const int d = p->args.head_dim;
    const uint16_t *q = p->q + (seq * HEADS + head) * d;
    const uint16_t *k = p->k + (seq * KV_HEADS + head / (HEADS / KV_HEADS)) * p->args.n * d;
    const uint16_t *v = p->v + (seq * KV_HEADS + head / (HEADS / KV_HEADS)) * p->args.n * d;
    double max = -INFINITY, sum = 0, out = 0;
    *size = 0;
    for (int64_t t = 0; c == 0 && t < p->args.n; t++) { /* once a head */
        weight[t] = 0;
        for (int i = 0; i < d; i++)
            weight[t] += (double)p->args.scale * (double)dtype_from_f16(q[i]) * (double)dtype_from_f16(k[t * d + i]);
        max = fmax(max, weight[t]);
    }
    for (int64_t t = 0; c == 0 && t < p->args.n; t++)
        weight[t] = exp(weight[t] - max);
    for (int64_t t = 0; t < p->args.n; t++) {
        sum += weight[t];
        out += weight[t] * (double)dtype_from_f16(v[t * d + c]);
        *size += weight[t] * fabs((double)dtype_from_f16(v[t * d + c]));
    }
    *size /= sum;
    return out / sum;
}

/* Shares of `size`, the weighted mean of |v|: weights are rounded to 16 bit (2^-11); scores are off by d 2^-24 of the sum of their terms'
 * sizes, which is at most 4 d scale: less than 2^-11, in weights and in their sum; the output is rounded once more (2^-11). Apart from
 * that, weights below what fp16 holds are off by 2^-25 each, times values below 2, over a sum of at least 1. */
static void peer_check(const struct peer *p, const uint16_t *out, const char *what) {
    double *weight = malloc((size_t)p->args.n * sizeof *weight), worst = 0;
    int64_t where = 0;
    for (int i = 0; i < BATCH * HEADS; i++)
        for (int c = 0; c < p->args.head_dim; c++) {
            double size, expected = peer_expected(p, i / HEADS, i % HEADS, c, weight, &size);
            double bound = size * 4 * 0x1p-11 + (double)p->args.n * 0x1p-24 + 0x1p-24;
            double error = fabs((double)dtype_from_f16(out[i * p->args.head_dim + c]) - expected) / bound;
            if (!(error <= worst)) {
                worst = error;
                where = i * p->args.head_dim + c;
            }
        }
    CHECK(worst <= 1, "%s, %lld keys, d %d, %s: entry %lld is %g: %.3g times the bound", what, (long long)p->args.n, p->args.head_dim,
          p->args.grouped ? "grouped" : "by head", (long long)where, (double)dtype_from_f16(out[where]), worst);
    free(weight);
}

static void check_peer(int d, int64_t n, bool grouped) {
    struct peer p = peer_open(d, n, grouped);
    struct graph *graph = NULL;
    bool done = false, again = false;
    REQUIRE(stream_peer_attend(stream, &p.args, &done));
    if (done) {
        struct peer_attention second = p.args;
        second.out = p.device_out + p.n_q;
        REQUIRE(backend_record_begin(backend));
        REQUIRE(stream_peer_attend(stream, &second, &again));
        REQUIRE(backend_record_end(backend, &graph));
        CHECK(again, "%lld keys, d %d: not in a recording", (long long)n, d);
        REQUIRE(graph_replay(graph));
        REQUIRE(stream_copy_out(stream, p.out, p.device_out, 2 * p.n_q * sizeof *p.out));
        REQUIRE(stream_sync(stream));
        peer_check(&p, p.out, "launched");
        peer_check(&p, p.out + p.n_q, "replayed");
        graph_close(graph);
    } else {
        fprintf(stderr, "no library, or refused: %lld keys, d %d, %s\n", (long long)n, d, grouped ? "grouped" : "by head");
    }
    peer_close(&p);
}

/* The last n_rows of n tokens, causal, against our own kernel, which is held against doubles elsewhere. Both round weights to 16 bit
 * (2^-11) and sum values below 2 with them; the library rounds its result once more: less than 4 x 2 x 2^-11. */
static void check_peer_causal(int d, int64_t n, int64_t n_rows) {
    const size_t n_q = (size_t)n_rows * HEADS * (size_t)d, n_kv = 2 * KV_HEADS * (size_t)n * (size_t)d;
    uint16_t *device_q, *device_kv, *q = fill(5, n_q, &device_q), *kv = fill(6, n_kv, &device_kv), *out = take_host(n_q * sizeof *out);
    uint16_t *device_out = take(n_q * sizeof *out);
    float *own = take_host(n_q * sizeof *own), *device_own = take(n_q * sizeof *own);
    const float scale = 1.0f / sqrtf((float)d);
    bool done = false;
    REQUIRE(op_attend_exact(stream, &(struct attend_exact_args){.n_rows = n_rows, .first = n - n_rows, .n = n, .n_heads = HEADS,
                                                                .n_kv_heads = KV_HEADS, .head_dim = d, .scale = scale, .dtype = DTYPE_F16,
                                                                .q = device_q, .kv = device_kv, .out = device_own}));
    REQUIRE(stream_peer_attend(stream, &(struct peer_attention){.batch = 1, .n_heads = HEADS, .n_kv_heads = KV_HEADS, .head_dim = d, .n = n,
                                                                .n_rows = n_rows, .dtype = DTYPE_F16, .scale = scale, .q = device_q,
                                                                .k = device_kv, .v = device_kv + n * d, .out = device_out}, &done));
    REQUIRE(stream_copy_out(stream, own, device_own, n_q * sizeof *own));
    REQUIRE(stream_copy_out(stream, out, device_out, n_q * sizeof *out));
    REQUIRE(stream_sync(stream));
    double worst = 0;
    for (size_t i = 0; i < n_q && done; i++) {
        double error = fabs((double)own[i] - (double)dtype_from_f16(out[i]));
        worst = error <= worst ? worst : error;
    }
    CHECK(worst <= 8 * 0x1p-11, "%lld rows of %lld keys, d %d, causal: off by %g", (long long)n_rows, (long long)n, d, worst);
    if (!done)
        fprintf(stderr, "no library, or refused: %lld rows of %lld keys, d %d, causal\n", (long long)n_rows, (long long)n, d);
    void *all[] = {q, kv, out, own, device_q, device_kv, device_out, device_own};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(backend, all[i]);
}

int main(void) {
    if (backend_n_devices("cuda") == 0) {
        fprintf(stderr, "skipped: no GPU here\n");
        return TEST_SKIP;
    }
    REQUIRE(backend_open("cuda", &(struct backend_options){0}, &backend));
    REQUIRE(stream_open(backend, &stream));
    check_reads();
    check_time();
    for (int d = 64; d <= 128; d += 64)
        for (int grouped = 0; grouped < 2; grouped++) {
            check_peer(d, 128, grouped);
            check_peer(d, 1000, grouped);
            check_peer(d, 4096, grouped);
        }
    for (int d = 64; d <= 128; d += 64) {
        check_peer_causal(d, 1024, 1024);
        check_peer_causal(d, 3000, 1000);
    }
    stream_close(stream);
    backend_close(backend);
    return test_report();
}
