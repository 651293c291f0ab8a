/* The yardsticks of GPUs, by the device's clock: a kernel that only reads, a copy on the device, and the product in 16 bit as the program's
 * own operation does it. What was read, copied and multiplied is checked after it was timed. */
#include <math.h>

#include "launch/bench_rates.h"

enum {
    BASE_FLOATS = 1 << 20, /* random values that large buffers repeat: 4 MiB */
    CHECK_COLUMNS = 64,    /* of the first and the last row of a product */
};
#define GPU_BYTES ((int64_t)8 << 30) /* some milliseconds of reading, and far more than any cache holds */
#define GPU_SHARE 0.25               /* of the free memory, at most, for one buffer */

static int pass_graph(struct rates *r, double *seconds) { return graph_time(r->graph, r->bench->device.stream, 1, seconds); }

/* Random values in host memory that the device can copy from; the caller frees. */
static int make_base(const struct bench *b, float **out) {
    TRY(backend_alloc(b->device.backend, MEMORY_HOST, BASE_FLOATS * sizeof **out, out));
    bench_random(1, *out, BASE_FLOATS);
    return STATUS_OK;
}

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

struct buffers {
    struct rates *rates;
    float *base;   /* host */
    uint32_t *sum; /* device */
};

static int enqueue_read(void *context) {
    const struct buffers *m = context;
    return stream_read(m->rates->bench->device.stream, m->rates->from, m->rates->bytes, m->sum);
}

static int enqueue_copy(void *context) {
    const struct buffers *m = context;
    return stream_copy(m->rates->bench->device.stream, m->rates->to, m->rates->from, m->rates->bytes);
}

/* `memory` holds the base again and again, by its sum. */
static int check_sum(const struct buffers *m, const void *memory, const char *what) {
    const struct bench *b = m->rates->bench;
    struct stream *stream = b->device.stream;
    const uint32_t *words = (const uint32_t *)(const void *)m->base;
    uint32_t expected = 0, *got;
    for (int i = 0; i < BASE_FLOATS; i++)
        expected += words[i];
    expected *= (uint32_t)(m->rates->bytes / (BASE_FLOATS * sizeof *words));
    TRY(backend_alloc(b->device.backend, MEMORY_HOST, sizeof *got, &got));
    int status = stream_zero(stream, m->sum, sizeof *got);
    if (status == STATUS_OK)
        status = stream_read(stream, memory, m->rates->bytes, m->sum);
    if (status == STATUS_OK)
        status = stream_copy_out(stream, got, m->sum, sizeof *got);
    if (status == STATUS_OK)
        status = stream_sync(stream);
    if (status == STATUS_OK && *got != expected)
        status = base_fail(STATUS_FAILED, __FILE__, __LINE__, "%s of %zu bytes: the sum of all words is %08x, expected %08x", what,
                           m->rates->bytes, *got, expected);
    backend_free(b->device.backend, got);
    return status;
}

static int prepare(struct buffers *m) {
    struct rates *r = m->rates;
    const struct bench_device *d = &r->bench->device;
    const int64_t base = BASE_FLOATS * (int64_t)sizeof *m->base;
    int64_t most = (int64_t)(GPU_SHARE * (double)backend_free_bytes(d->backend));
    r->bytes = (size_t)(max_i64(min_i64(GPU_BYTES, most) / base, 1) * base);
    TRY(make_base(r->bench, &m->base));
    TRY(backend_alloc(d->backend, MEMORY_WORKSPACE, sizeof *m->sum, &m->sum));
    TRY(backend_alloc(d->backend, MEMORY_WORKSPACE, r->bytes, &r->from));
    TRY(backend_alloc(d->backend, MEMORY_WORKSPACE, r->bytes, &r->to));
    TRY(bench_upload(r->bench, r->from, m->base, (size_t)base));
    TRY(bench_replicate(r->bench, r->from, (size_t)base, r->bytes));
    return stream_sync(d->stream);
}

/* Collective. */
static int memory_row(struct buffers *m, const char *what, int (*enqueue)(void *), int factor, const void *result, double *rate) {
    struct rates *r = m->rates;
    struct comm *world = r->bench->run->world;
    TRY(comm_agree(world, "bench", bench_record(r->bench, enqueue, m, &r->graph)));
    int status = bench_rates_memory_row(r, what, pass_graph, factor, rate);
    graph_close(r->graph);
    r->graph = NULL;
    TRY(status);
    return comm_agree(world, "bench", check_sum(m, result, what));
}

static void release(struct buffers *m) {
    struct backend *backend = m->rates->bench->device.backend;
    backend_free(backend, m->rates->from);
    backend_free(backend, m->rates->to);
    backend_free(backend, m->sum);
    backend_free(backend, m->base);
    m->rates->from = m->rates->to = NULL;
}

int bench_rates_gpu_memory(struct rates *r) {
    struct buffers m = {.rates = r};
    double copy_rate;
    int status = comm_agree(r->bench->run->world, "bench", prepare(&m));
    if (status == STATUS_OK)
        status = memory_row(&m, "read", enqueue_read, 1, r->from, &r->bench->read_rate);
    if (status == STATUS_OK)
        status = memory_row(&m, "copy", enqueue_copy, 2, r->to, &copy_rate);
    release(&m);
    return status;
}

/* ---- matrix products --------------------------------------------------------------------------------------------------- */

struct product {
    struct bench *bench;
    int64_t m, n, k;
    float *base;          /* host; x repeats it */
    uint16_t *base_w;     /* host: base in 16 bit; w repeats it */
    float *x, *y, *row;   /* device [m][k], [m][n]; host [CHECK_COLUMNS] */
    uint16_t *w;          /* device [n][k] */
};

static int enqueue_product(void *context) {
    const struct product *p = context;
    return op_matmul(p->bench->device.stream, &(struct matmul_args){.n_rows = (int)p->m, .x = p->x, .ldx = p->k, .w = p->w,
                                                                    .dtype = DTYPE_F16, .n_in = p->k, .n_out = p->n, .y = p->y,
                                                                    .ldy = p->n});
}

static int take(const struct bench *b, void *out, size_t bytes) { return backend_alloc(b->device.backend, MEMORY_WORKSPACE, bytes, out); }

static int repeat(const struct bench *b, void *device, const void *base, size_t base_bytes, size_t bytes) {
    size_t part = bytes < base_bytes ? bytes : base_bytes;
    TRY(bench_upload(b, device, base, part));
    return bench_replicate(b, device, part, bytes);
}

static int prepare_product(struct product *p) {
    const struct bench *b = p->bench;
    size_t x_bytes = (size_t)(p->m * p->k) * sizeof *p->x, w_bytes = (size_t)(p->n * p->k) * sizeof *p->w;
    TRY(make_base(b, &p->base));
    TRY(backend_alloc(b->device.backend, MEMORY_HOST, BASE_FLOATS * sizeof *p->base_w, &p->base_w));
    TRY(backend_alloc(b->device.backend, MEMORY_HOST, CHECK_COLUMNS * sizeof *p->row, &p->row));
    dtype_narrow(DTYPE_F16, p->base, p->base_w, BASE_FLOATS);
    TRY(take(b, &p->x, x_bytes));
    TRY(take(b, &p->w, w_bytes));
    TRY(take(b, &p->y, (size_t)(p->m * p->n) * sizeof *p->y));
    TRY(repeat(b, p->x, p->base, BASE_FLOATS * sizeof *p->base, x_bytes));
    TRY(repeat(b, p->w, p->base_w, BASE_FLOATS * sizeof *p->base_w, w_bytes));
    return stream_sync(b->device.stream);
}

/* Each x is rounded to 16 bit (2^-11 of it) and a sum of k products in float is off by at most k 2^-24 of the sum of their sizes. */
static int check_row(const struct product *p, int64_t row) {
    const struct bench *b = p->bench;
    int64_t columns = min_i64(CHECK_COLUMNS, p->n);
    TRY(stream_copy_out(b->device.stream, p->row, p->y + row * p->n, (size_t)columns * sizeof *p->row));
    TRY(stream_sync(b->device.stream));
    for (int64_t o = 0; o < columns; o++) {
        double sum = 0, sizes = 0;
        for (int64_t i = 0; i < p->k; i++) {
            double term = (double)p->base[(row * p->k + i) % BASE_FLOATS] * (double)dtype_from_f16(p->base_w[(o * p->k + i) % BASE_FLOATS]);
            sum += term;
            sizes += fabs(term);
        }
        if (!(fabs((double)p->row[o] - sum) <= sizes * (0x1p-11 + (double)p->k * 0x1p-24)))
            FAIL(STATUS_FAILED, "product %lldx%lldx%lld, row %lld, column %lld: %g, expected %g", (long long)p->m, (long long)p->n,
                 (long long)p->k, (long long)row, (long long)o, (double)p->row[o], sum);
    }
    return STATUS_OK;
}

static void release_product(struct product *p) {
    void *all[] = {p->base, p->base_w, p->row, p->x, p->w, p->y};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(p->bench->device.backend, all[i]);
}

/* Collective. */
static int time_product(struct rates *r, struct product *p, const char *item, double *rate) {
    struct comm *world = r->bench->run->world;
    TRY(comm_agree(world, "bench", prepare_product(p)));
    TRY(comm_agree(world, "bench", bench_record(r->bench, enqueue_product, p, &r->graph)));
    int status = bench_rates_flop_row(r, item, pass_graph, 2.0 * (double)p->m * (double)p->n * (double)p->k, rate);
    graph_close(r->graph);
    r->graph = NULL;
    TRY(status);
    status = check_row(p, 0);
    return comm_agree(world, "bench", status == STATUS_OK ? check_row(p, p->m - 1) : status);
}

int bench_rates_gpu_gemm(struct rates *r, const char *item, int64_t m, int64_t n, int64_t k, double *rate) {
    struct product p = {.bench = r->bench, .m = m, .n = n, .k = k};
    int status = time_product(r, &p, item, rate);
    release_product(&p);
    return status;
}
