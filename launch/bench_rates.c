/* Yardsticks: memory, matrix products and collectives, all ranks at once. A pass begins on all ranks together and lasts until the
 * slowest is done; the median of the passes counts. */
#include "launch/bench_rates.h"

#include <unistd.h>

#include "kernels/rates.h"
#include "launch/units.h"

enum {
    GEMM_SIZE = 1024,     /* the yardstick's: large enough that the library is at its best */
    GEMM_ROWS = 512,      /* rows of the model's own shapes: a tile of exact prefill */
    GPU_GEMM_ROWS = 4096, /* the same on a GPU, and */
    GPU_GEMM_SIZE = 8192, /* its yardstick's other two sizes */
    LLC_TIMES = 4,        /* a buffer of so many last-level caches cannot be held by them */
    N_CALLS = 200,        /* of each collective */
    GPU_CALLS = 20,       /* of them in one graph on a GPU, which is replayed N_CALLS / GPU_CALLS times */
    SMALL_FLOATS = 576,   /* one residual row of a 135M model: 2.3 KB */
    LARGE_FLOATS = 16384, /* 64 KB */
};
#define LEAST_BYTES ((int64_t)1 << 30)
#define MEMORY_SHARE 0.25 /* of the rank's memory, at most, for one buffer */

/* Collective. Runs `pass` on all ranks together, `repeats` times and once before; *seconds is the median, *best the least. */
static int time_passes(struct rates *r, rates_pass *pass, double *seconds, double *best) {
    struct comm *world = r->bench->run->world;
    double times[BENCH_MAX_REPEATS];
    int n = r->bench->options->repeats;
    for (int i = -1; i < n; i++) {
        double own = 0;
        TRY(comm_barrier(world, "bench"));
        TRY(comm_agree(world, "bench", pass(r, &own)));
        int64_t ns = (int64_t)(own * 1e9);
        TRY(comm_reduce_host(world, "bench", &ns, 1, COMM_MAX));
        if (i >= 0)
            times[i] = (double)ns * 1e-9;
    }
    *seconds = bench_median(times, n);
    *best = times[0];
    return STATUS_OK;
}

static int pass_read(struct rates *r, double *seconds) {
    double start = base_seconds();
    r->sum += rates_read(r->from, r->bytes, r->bench->n_threads);
    *seconds = base_seconds() - start;
    return STATUS_OK;
}

static int pass_copy(struct rates *r, double *seconds) {
    double start = base_seconds();
    rates_copy(r->to, r->from, r->bytes, r->bench->n_threads);
    *seconds = base_seconds() - start;
    return STATUS_OK;
}

static int pass_gemm(struct rates *r, double *seconds) {
    double start = base_seconds();
    rates_gemm_run(r->gemm);
    *seconds = base_seconds() - start;
    return STATUS_OK;
}

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

/* A rank's part of a buffer that no cache can hold. */
static size_t buffer_bytes(const struct bench *b) {
    int64_t last_level = max_i64(sysconf(_SC_LEVEL3_CACHE_SIZE), 0);
    int64_t all = max_i64(LEAST_BYTES, LLC_TIMES * last_level), most = (int64_t)(MEMORY_SHARE * (double)b->run->place.memory_bytes);
    return (size_t)round_up(max_i64(min_i64(all / b->run->place.local_size, most), 1 << 20), 4096);
}

int bench_rates_memory_row(struct rates *r, const char *what, rates_pass *pass, int factor, double *rate) {
    struct bench *b = r->bench;
    char item[64], size[UNITS_TEXT];
    double seconds, best, bytes = (double)factor * (double)r->bytes * comm_size(b->run->world);
    TRY(time_passes(r, pass, &seconds, &best));
    *rate = bytes / seconds;
    snprintf(item, sizeof item, "%s, %s a rank", what, units_bytes((int64_t)r->bytes, size));
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "rates", .item = item, .ms = seconds * 1e3, .best_ms = best * 1e3, .rate = *rate * 1e-9,
                                        .unit = "GB/s", .bytes = bytes});
    return STATUS_OK;
}

static int take_buffer(struct rates *r, uint8_t **out) {
    TRY(backend_alloc(r->bench->device.backend, MEMORY_WORKSPACE, r->bytes, out));
    rates_fill(*out, r->bytes, r->bench->n_threads);
    return STATUS_OK;
}

/* Collective. */
static int measure_memory(struct rates *r) {
    struct comm *world = r->bench->run->world;
    double copy_rate;
    r->bytes = buffer_bytes(r->bench);
    TRY(comm_agree(world, "bench", take_buffer(r, &r->from)));
    TRY(bench_rates_memory_row(r, "read", pass_read, 1, &r->bench->read_rate));
    r->bytes /= 2; /* as much memory in all */
    TRY(comm_agree(world, "bench", take_buffer(r, &r->to)));
    TRY(bench_rates_memory_row(r, "copy", pass_copy, 2, &copy_rate));
    backend_free(r->bench->device.backend, r->from);
    backend_free(r->bench->device.backend, r->to);
    r->from = r->to = NULL;
    return STATUS_OK;
}

/* ---- matrix products --------------------------------------------------------------------------------------------------- */

int bench_rates_flop_row(struct rates *r, const char *item, rates_pass *pass, double flop, double *rate) {
    struct bench *b = r->bench;
    double seconds, best, all = flop * comm_size(b->run->world);
    TRY(time_passes(r, pass, &seconds, &best));
    *rate = all / seconds;
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "rates", .item = item, .ms = seconds * 1e3, .best_ms = best * 1e3, .rate = *rate * 1e-9,
                                           .unit = "GFLOP/s", .flop = all});
    return STATUS_OK;
}

/* Collective. Every thread of every rank computes one product, or every GPU. */
static int gemm_row(struct rates *r, const char *what, int64_t m, int64_t n, int64_t k, double *rate) {
    struct bench *b = r->bench;
    char item[64];
    snprintf(item, sizeof item, "%s %lldx%lldx%lld", what, (long long)m, (long long)n, (long long)k);
    if (bench_on_gpu(b))
        return bench_rates_gpu_gemm(r, item, m, n, k, rate);
    TRY(comm_agree(b->run->world, "bench", rates_gemm_open(b->n_threads, m, n, k, &r->gemm)));
    TRY(bench_rates_flop_row(r, item, pass_gemm, 2.0 * (double)m * (double)n * (double)k * b->n_threads, rate));
    rates_gemm_close(r->gemm);
    r->gemm = NULL;
    return STATUS_OK;
}

/* Collective. The shapes of the model's layers, and the rate that they would give together. */
static int measure_shapes(struct rates *r) {
    struct model_file *file = NULL;
    struct comm *world = r->bench->run->world;
    TRY(comm_agree(world, "reading the model", bench_open_model(r->bench, &file)));
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
        status = gemm_row(r, shapes[i].name, bench_on_gpu(r->bench) ? GPU_GEMM_ROWS : GEMM_ROWS, shapes[i].n, shapes[i].k, &rate);
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

struct collective {
    struct rates *rates;
    int64_t floats;
};

static int call_sum(void *context) {
    const struct collective *c = context;
    const struct bench_device *device = &c->rates->bench->device;
    float *x = (float *)(void *)c->rates->from;
    return comm_all_reduce(device->comm, device->stream, "bench", x, x, c->floats, COMM_FLOAT, COMM_SUM);
}

static int call_gather(void *context) {
    const struct collective *c = context;
    const struct bench_device *device = &c->rates->bench->device;
    int64_t bytes = c->floats * (int64_t)sizeof(float);
    return comm_all_gather(device->comm, device->stream, "bench", c->rates->from + comm_rank(device->comm) * bytes, c->rates->from, bytes);
}

/* Collective. The median as rank 0 sees it. */
static int call_row(struct rates *r, const char *what, int (*call)(void *), int64_t floats) {
    struct collective c = {r, floats};
    char item[64];
    int at_once = bench_on_gpu(r->bench) ? GPU_CALLS : 1;
    double seconds, best, bytes = (double)floats * sizeof(float);
    TRY(comm_barrier(r->bench->run->world, "bench"));
    TRY(bench_time_calls(r->bench, call, &c, at_once, N_CALLS / at_once, &seconds, &best));
    snprintf(item, sizeof item, "%s, %lld bytes", what, (long long)bytes);
    if (r->bench->run->root)
        bench_add(r->bench, (struct bench_row){.section = "rates", .item = item, .ms = seconds * 1e3, .best_ms = best * 1e3,
                                                  .rate = 1 / seconds, .unit = "calls/s", .bytes = bytes});
    return STATUS_OK;
}

/* Collective. */
static int measure_calls(struct rates *r) {
    const struct bench_device *device = &r->bench->device;
    if (comm_size(device->comm) == 1)
        return STATUS_OK;
    size_t bytes = (size_t)comm_size(device->comm) * LARGE_FLOATS * sizeof(float);
    TRY(comm_agree(r->bench->run->world, "bench", comm_alloc(device->comm, device->backend, bytes, &r->from)));
    int status = call_row(r, "all-reduce", call_sum, SMALL_FLOATS);
    if (status == STATUS_OK)
        status = call_row(r, "all-reduce", call_sum, LARGE_FLOATS);
    if (status == STATUS_OK)
        status = call_row(r, "all-gather", call_gather, SMALL_FLOATS);
    if (status == STATUS_OK)
        status = call_row(r, "all-gather", call_gather, LARGE_FLOATS);
    comm_release(device->comm, device->backend, r->from);
    r->from = NULL;
    return status;
}

/* Collective. */
static int measure(struct rates *r) {
    struct bench *b = r->bench;
    bool gpu = bench_on_gpu(b);
    b->gemm_name = gpu ? "gemm" : "sgemm";
    TRY(gpu ? bench_rates_gpu_memory(r) : measure_memory(r));
    if (gpu)
        TRY(gemm_row(r, "fp16 gemm", GPU_GEMM_ROWS, GPU_GEMM_SIZE, GPU_GEMM_SIZE, &b->gemm_rate));
    else
        TRY(gemm_row(r, "sgemm", GEMM_SIZE, GEMM_SIZE, GEMM_SIZE, &b->gemm_rate));
    if (b->options->engine.model)
        TRY(measure_shapes(r));
    return measure_calls(r);
}

int bench_rates(struct bench *b) {
    struct rates r = {.bench = b};
    int status = measure(&r);
    rates_gemm_close(r.gemm);
    return status;
}
