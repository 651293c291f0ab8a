/* Yardsticks: memory, matrix products and collectives, all ranks at once. A pass begins on all ranks together and lasts until the
 * slowest is done; the median of the passes counts. */
#include "launch/bench.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/rates.h"
#include "launch/units.h"

enum {
    GEMM_SIZE = 1024,     /* the yardstick's: large enough that the library is at its best */
    GEMM_ROWS = 512,      /* rows of the model's own shapes: a tile of exact prefill */
    LLC_TIMES = 4,        /* a buffer of so many last-level caches cannot be held by them */
    N_CALLS = 200,        /* of each collective */
    SMALL_FLOATS = 576,   /* one residual row of a 135M model: 2.3 KB */
    LARGE_FLOATS = 16384, /* 64 KB */
};
#define LEAST_BYTES ((int64_t)1 << 30)
#define MEMORY_SHARE 0.25 /* of the rank's memory, at most, for one buffer */

struct rates {
    struct bench *bench;
    struct backend *backend;
    struct stream *stream;
    uint8_t *from, *to; /* bytes each */
    size_t bytes;
    uint64_t sum;       /* of what was read */
    struct rates_gemm *gemm;
};

/* Collective. Runs `pass` on all ranks together, `repeats` times and once before; *seconds is the median, *best the least. */
static int time_passes(struct rates *r, void (*pass)(struct rates *), double *seconds, double *best) {
    struct comm *world = r->bench->run->world;
    double times[BENCH_MAX_REPEATS];
    int n = r->bench->options->repeats;
    for (int i = -1; i < n; i++) {
        TRY(comm_barrier(world, "bench"));
        double start = base_seconds();
        pass(r);
        int64_t ns = (int64_t)((base_seconds() - start) * 1e9);
        TRY(comm_reduce_host(world, "bench", &ns, 1, COMM_MAX));
        if (i >= 0)
            times[i] = (double)ns * 1e-9;
    }
    *seconds = bench_median(times, n);
    *best = times[0];
    return STATUS_OK;
}

static void pass_read(struct rates *r) { r->sum += rates_read(r->from, r->bytes, r->bench->n_threads); }
static void pass_copy(struct rates *r) { rates_copy(r->to, r->from, r->bytes, r->bench->n_threads); }
static void pass_gemm(struct rates *r) { rates_gemm_run(r->gemm); }

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

/* A rank's part of a buffer that no cache can hold. */
static size_t buffer_bytes(const struct bench *b) {
    int64_t last_level = max_i64(sysconf(_SC_LEVEL3_CACHE_SIZE), 0);
    int64_t all = max_i64(LEAST_BYTES, LLC_TIMES * last_level), most = (int64_t)(MEMORY_SHARE * (double)b->run->place.memory_bytes);
    return (size_t)round_up(max_i64(min_i64(all / b->run->place.local_size, most), 1 << 20), 4096);
}

/* Collective. `factor`: bytes moved for each byte of the buffer. */
static int memory_row(struct rates *r, const char *what, void (*pass)(struct rates *), int factor, double *rate) {
    struct bench *b = r->bench;
    char item[64], size[UNITS_TEXT];
    double seconds, best, bytes = (double)factor * (double)r->bytes * comm_size(b->run->world);
    TRY(time_passes(r, pass, &seconds, &best));
    *rate = bytes / seconds;
    snprintf(item, sizeof item, "%s, %s a rank", what, units_bytes((int64_t)r->bytes, size));
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "rates", .item = item, .ms = seconds * 1e3, .best_ms = best * 1e3, .rate = *rate * 1e-9, .unit = "GB/s",
                                           .bytes = bytes});
    return STATUS_OK;
}

static int take_buffer(struct rates *r, uint8_t **out) {
    TRY(backend_alloc(r->backend, MEMORY_WORKSPACE, r->bytes, out));
    rates_fill(*out, r->bytes, r->bench->n_threads);
    return STATUS_OK;
}

/* Collective. */
static int measure_memory(struct rates *r) {
    struct comm *world = r->bench->run->world;
    double copy_rate;
    r->bytes = buffer_bytes(r->bench);
    TRY(comm_agree(world, "bench", take_buffer(r, &r->from)));
    TRY(memory_row(r, "read", pass_read, 1, &r->bench->read_rate));
    r->bytes /= 2; /* as much memory in all */
    TRY(comm_agree(world, "bench", take_buffer(r, &r->to)));
    TRY(memory_row(r, "copy", pass_copy, 2, &copy_rate));
    backend_free(r->backend, r->from);
    backend_free(r->backend, r->to);
    r->from = r->to = NULL;
    return STATUS_OK;
}

/* ---- matrix products --------------------------------------------------------------------------------------------------- */

/* Collective. Every thread of every rank computes one product. */
static int gemm_row(struct rates *r, const char *what, int64_t m, int64_t n, int64_t k, double *rate) {
    struct bench *b = r->bench;
    char item[64];
    double seconds, best, flop = 2.0 * (double)m * (double)n * (double)k * b->n_threads * comm_size(b->run->world);
    TRY(comm_agree(b->run->world, "bench", rates_gemm_open(b->n_threads, m, n, k, &r->gemm)));
    TRY(time_passes(r, pass_gemm, &seconds, &best));
    rates_gemm_close(r->gemm);
    r->gemm = NULL;
    *rate = flop / seconds;
    snprintf(item, sizeof item, "%s %lldx%lldx%lld", what, (long long)m, (long long)n, (long long)k);
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "rates", .item = item, .ms = seconds * 1e3, .best_ms = best * 1e3, .rate = *rate * 1e-9,
                                           .unit = "GFLOP/s", .flop = flop});
    return STATUS_OK;
}

/* Collective. The shapes of the model's layers, and the rate that they would give together. */
static int measure_shapes(struct rates *r) {
    struct model_file *file = NULL;
    struct comm *world = r->bench->run->world;
    TRY(comm_agree(world, "reading the model", model_file_open(r->bench->options->engine.model, &file)));
    const struct model_config *c = model_file_config(file);
    int64_t heads = (int64_t)c->n_heads * c->head_dim, kv = (int64_t)c->n_kv_heads * c->head_dim;
    struct {
        const char *name;
        int64_t n, k;
    } shapes[] = {{"qkv", heads + 2 * kv, c->hidden}, {"o", c->hidden, heads}, {"gate,up", 2 * (int64_t)c->intermediate, c->hidden},
                  {"down", c->hidden, c->intermediate}};
    double flop = 0, seconds = 0;
    int status = STATUS_OK;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes && status == STATUS_OK; i++) {
        double rate = 0, own = (double)shapes[i].n * (double)shapes[i].k;
        status = gemm_row(r, shapes[i].name, GEMM_ROWS, shapes[i].n, shapes[i].k, &rate);
        flop += own;
        seconds += status == STATUS_OK ? own / rate : 0;
    }
    model_file_close(file);
    TRY(status);
    if (r->bench->run->root)
        bench_add(r->bench, (struct bench_row){.section = "rates", .item = "a layer's four together", .rate = flop / seconds * 1e-9,
                                                  .unit = "GFLOP/s"});
    return STATUS_OK;
}

/* ---- collectives ------------------------------------------------------------------------------------------------------- */

static int call_sum(struct rates *r, int64_t floats) {
    float *x = (float *)(void *)r->from;
    return comm_all_reduce(r->bench->run->world, r->stream, "bench", x, x, floats, COMM_FLOAT, COMM_SUM);
}

static int call_gather(struct rates *r, int64_t floats) {
    int64_t bytes = floats * (int64_t)sizeof(float);
    return comm_all_gather(r->bench->run->world, r->stream, "bench", r->from + comm_rank(r->bench->run->world) * bytes, r->from, bytes);
}

/* Collective. The median as rank 0 sees it. */
static int call_row(struct rates *r, const char *what, int (*call)(struct rates *, int64_t), int64_t floats) {
    double times[N_CALLS];
    char item[64];
    TRY(comm_barrier(r->bench->run->world, "bench"));
    for (int i = 0; i < N_CALLS; i++) {
        double start = base_seconds();
        TRY(call(r, floats));
        TRY(stream_sync(r->stream));
        times[i] = base_seconds() - start;
    }
    double seconds = bench_median(times, N_CALLS), bytes = (double)floats * sizeof(float);
    snprintf(item, sizeof item, "%s, %lld bytes", what, (long long)bytes);
    if (r->bench->run->root)
        bench_add(r->bench, (struct bench_row){.section = "rates", .item = item, .ms = seconds * 1e3, .best_ms = times[0] * 1e3,
                                                  .rate = 1 / seconds,
                                                  .unit = "calls/s", .bytes = bytes});
    return STATUS_OK;
}

/* Collective. */
static int measure_calls(struct rates *r) {
    struct comm *world = r->bench->run->world;
    if (comm_size(world) == 1)
        return STATUS_OK;
    size_t bytes = (size_t)comm_size(world) * LARGE_FLOATS * sizeof(float);
    TRY(comm_agree(world, "bench", comm_alloc(world, r->backend, bytes, &r->from)));
    int status = call_row(r, "all-reduce", call_sum, SMALL_FLOATS);
    if (status == STATUS_OK)
        status = call_row(r, "all-reduce", call_sum, LARGE_FLOATS);
    if (status == STATUS_OK)
        status = call_row(r, "all-gather", call_gather, SMALL_FLOATS);
    if (status == STATUS_OK)
        status = call_row(r, "all-gather", call_gather, LARGE_FLOATS);
    comm_release(world, r->backend, r->from);
    r->from = NULL;
    return status;
}

static int open_device(struct rates *r) {
    struct backend_options options = {.n_threads = r->bench->n_threads};
    TRY(backend_open("cpu", &options, &r->backend));
    return stream_open(r->backend, &r->stream);
}

static int measure(struct rates *r) {
    TRY(comm_agree(r->bench->run->world, "opening the device", open_device(r)));
    TRY(measure_memory(r));
    TRY(gemm_row(r, "sgemm", GEMM_SIZE, GEMM_SIZE, GEMM_SIZE, &r->bench->gemm_rate));
    if (r->bench->options->engine.model)
        TRY(measure_shapes(r));
    return measure_calls(r);
}

int bench_rates(struct bench *b) {
    struct rates r = {.bench = b};
    int status = measure(&r);
    rates_gemm_close(r.gemm);
    stream_close(r.stream);
    backend_close(r.backend);
    return status;
}
