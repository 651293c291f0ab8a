/* Parts of a step. All of them are chains in one graph, as a step has them, so that what each takes beside its bytes (a launch, a
 * collective's rounds) is measured and not assumed. */
#include "launch/bench_step.h"

#include <math.h>

enum {
    N_SMALL = 20,             /* threes of small operations in a graph */
    N_CALLS = 20,             /* of a collective in a graph */
    REPLAYS = 20,
    BASE_HALVES = 1 << 20,    /* random values that matrices repeat: 2 MiB */
    MOST_COPIES = 64,         /* of a layer's matrices */
    N_PRODUCTS = 4,
    CHECKED_COLUMNS = 16,     /* of a product's first row */
};
#define COLD_BYTES ((int64_t)256 << 20) /* more than four times the last-level cache of an H100 or H200 (50 MB) */

int bench_step_shape(const struct bench *b, struct step_shape *out) {
    const struct engine_options *o = &b->options->engine;
    const struct comm *world = b->run->world;
    struct model_file *file;
    enum merge_kind merge;
    TRY(bench_open_model(b, &file));
    out->config = *model_file_config(file);
    model_file_close(file);
    TRY(merge_parse(o->merge, &merge));
    TRY(grid_make(1, o->tp, o->cp, comm_size(world), comm_rank(world), out->config.n_kv_heads, &out->grid));
    weights_slices_make(&out->config, out->grid.tp, out->grid.tp_rank, out->grid.cp, out->grid.cp_rank,
                        merge == MERGE_FUSED && out->grid.cp > 1, &out->slices);
    return STATUS_OK;
}

/* Random floats on the device. */
static int take_random(const struct bench *b, int64_t n, float **out) {
    float *host;
    TRY(backend_alloc(b->device.backend, MEMORY_WORKSPACE, (size_t)n * sizeof *host, out));
    TRY(backend_alloc(b->device.backend, MEMORY_HOST, (size_t)n * sizeof *host, &host));
    bench_random((uint64_t)n, host, n);
    int status = bench_upload(b, *out, host, (size_t)n * sizeof *host);
    backend_free(b->device.backend, host);
    return status;
}

/* ---- small operations ------------------------------------------------------------------------------------------------ */

struct small {
    const struct bench *b;
    int hidden;
    int64_t inner;
    float *x, *weight, *gate_up, *out, *act; /* [hidden], [hidden], [2 inner], [hidden], [inner] */
};

static int call_small(void *context) {
    const struct small *s = context;
    struct stream *stream = s->b->device.stream;
    TRY(op_rmsnorm(stream, &(struct rmsnorm_args){.n_rows = 1, .x = s->x, .weight = s->weight, .eps = 1e-5f, .hidden = s->hidden,
                                                  .out = s->out}));
    TRY(op_silu_mul(stream, &(struct silu_mul_args){.n_rows = 1, .gate_up = s->gate_up, .n = s->inner, .out = s->act}));
    return op_add(stream, &(struct add_args){.n_rows = 1, .hidden = s->hidden, .x = s->x, .y = s->out});
}

static int small_open(struct small *s) {
    TRY(take_random(s->b, s->hidden, &s->x));
    TRY(take_random(s->b, s->hidden, &s->weight));
    TRY(take_random(s->b, s->hidden, &s->out));
    TRY(take_random(s->b, 2 * s->inner, &s->gate_up));
    return take_random(s->b, s->inner, &s->act);
}

int bench_step_launch(struct bench *b, const struct step_shape *shape, double *seconds) {
    struct small s = {.b = b, .hidden = shape->config.hidden, .inner = max_i64(range_size(shape->slices.inner), 1)};
    double best;
    int status = comm_agree(b->run->world, "bench", small_open(&s));
    if (status == STATUS_OK)
        status = bench_time_calls(b, call_small, &s, N_SMALL, REPLAYS, seconds, &best);
    float *all[] = {s.x, s.weight, s.out, s.gate_up, s.act};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        backend_free(b->device.backend, all[i]);
    *seconds /= 3;
    return status;
}

/* ---- products ---------------------------------------------------------------------------------------------------------- */

struct product {
    int64_t n, k;
    int64_t w;    /* place of its matrix in a copy, halves */
    float *y;     /* [n_rows][n] */
};

struct products { /* of one layer */
    const struct bench *b;
    int n_rows, n_copies, next;
    int64_t widest, halves; /* largest k; of one copy */
    struct product product[N_PRODUCTS];
    float *x;               /* [n_rows][widest] */
    uint16_t *w, *base;     /* [copy][halves]: `base` (host) again and again */
};

static void products_plan(struct products *p, const struct step_shape *shape) {
    const struct model_config *c = &shape->config;
    const struct weights_slices *s = &shape->slices;
    const int64_t inner = range_size(s->inner), sizes[N_PRODUCTS][2] = {
        {(range_size(s->heads) + 2 * range_size(s->kv_heads)) * c->head_dim, c->hidden}, {c->hidden, range_size(s->o_columns)},
        {2 * inner, c->hidden}, {c->hidden, inner}};
    for (int i = 0; i < N_PRODUCTS; i++) {
        p->product[i] = (struct product){.n = sizes[i][0], .k = sizes[i][1], .w = p->halves};
        p->halves += round_up(sizes[i][0] * sizes[i][1], 64);
        p->widest = max_i64(p->widest, sizes[i][1]);
    }
    const int64_t copies = min_i64(min_i64(MOST_COPIES, c->n_layers), ceil_div(COLD_BYTES, 2 * p->halves));
    p->n_copies = p->n_rows <= KV_BLOCK ? (int)copies : 1; /* a step comes back to a layer after all the others */
}

static int products_open(struct products *p) {
    const struct bench *b = p->b;
    size_t bytes = (size_t)(p->halves * p->n_copies) * 2, first = (size_t)min_i64(BASE_HALVES, p->halves) * 2;
    float values[1024];
    TRY(take_random(b, p->n_rows * p->widest, &p->x));
    TRY(backend_alloc(b->device.backend, MEMORY_HOST, BASE_HALVES * sizeof *p->base, &p->base));
    for (int64_t i = 0; i < BASE_HALVES; i += 1024) {
        bench_random((uint64_t)i, values, 1024);
        dtype_narrow(DTYPE_F16, values, p->base + i, 1024);
    }
    TRY(backend_alloc(b->device.backend, MEMORY_WEIGHTS, bytes, &p->w));
    TRY(bench_upload(b, p->w, p->base, first));
    TRY(bench_replicate(b, p->w, first, (size_t)p->halves * 2));
    TRY(bench_replicate(b, p->w, (size_t)p->halves * 2, bytes));
    for (int i = 0; i < N_PRODUCTS; i++)
        TRY(backend_alloc(b->device.backend, MEMORY_WORKSPACE, (size_t)(p->n_rows * p->product[i].n) * sizeof(float), &p->product[i].y));
    return stream_sync(b->device.stream);
}

static void products_close(struct products *p) {
    struct backend *backend = p->b->device.backend;
    for (int i = 0; i < N_PRODUCTS; i++)
        backend_free(backend, p->product[i].y);
    backend_free(backend, p->x);
    backend_free(backend, p->w);
    backend_free(backend, p->base);
}

static int call_products(void *context) {
    struct products *p = context;
    const uint16_t *w = p->w + p->next++ % p->n_copies * p->halves;
    for (int i = 0; i < N_PRODUCTS; i++) {
        const struct product *one = &p->product[i];
        TRY(op_matmul(p->b->device.stream, &(struct matmul_args){.n_rows = p->n_rows, .x = p->x, .ldx = p->widest, .w = w + one->w,
                                                                 .dtype = DTYPE_F16, .n_in = one->k, .n_out = one->n, .y = one->y,
                                                                 .ldy = one->n}));
    }
    return STATUS_OK;
}

/* The first row: each x is rounded to 16 bit (2^-11 of it) and a sum of k products in float is off by at most k 2^-24 of their sizes. */
static int check_product(const struct products *p, const struct product *one, const float *x, float *y) {
    const int64_t columns = min_i64(CHECKED_COLUMNS, one->n), first = min_i64(BASE_HALVES, p->halves);
    TRY(stream_copy_out(p->b->device.stream, y, one->y, (size_t)columns * sizeof *y));
    TRY(stream_sync(p->b->device.stream));
    for (int64_t o = 0; o < columns; o++) {
        double sum = 0, sizes = 0;
        for (int64_t i = 0; i < one->k; i++) {
            double term = (double)x[i] * (double)dtype_from_f16(p->base[(one->w + o * one->k + i) % first]);
            sum += term;
            sizes += fabs(term);
        }
        if (!(fabs((double)y[o] - sum) <= sizes * (0x1p-11 + (double)one->k * 0x1p-24)))
            FAIL(STATUS_FAILED, "product of %d rows, %lldx%lld, column %lld: %g, expected %g", p->n_rows, (long long)one->n,
                 (long long)one->k, (long long)o, (double)y[o], sum);
    }
    return STATUS_OK;
}

static int check_products(const struct products *p) {
    float *host;
    TRY(backend_alloc(p->b->device.backend, MEMORY_HOST, (size_t)(p->widest + CHECKED_COLUMNS) * sizeof *host, &host));
    int status = stream_copy_out(p->b->device.stream, host, p->x, (size_t)p->widest * sizeof *host);
    for (int i = 0; i < N_PRODUCTS && status == STATUS_OK; i++)
        status = check_product(p, &p->product[i], host, host + p->widest);
    backend_free(p->b->device.backend, host);
    return status;
}

int bench_step_products(struct bench *b, const struct step_shape *shape, int n_rows, double launch, double *rate) {
    struct products p = {.b = b, .n_rows = n_rows};
    double seconds, best;
    products_plan(&p, shape);
    int status = comm_agree(b->run->world, "bench", products_open(&p));
    if (status == STATUS_OK)
        status = bench_time_calls(b, call_products, &p, p.n_copies, b->options->repeats, &seconds, &best);
    if (status == STATUS_OK)
        status = comm_agree(b->run->world, "bench", check_products(&p));
    products_close(&p);
    TRY(status);
    *rate = 2 * (double)p.halves / fmax(seconds - N_PRODUCTS * launch, seconds / 2); /* of tiny matrices launches are nearly all */
    return STATUS_OK;
}

/* ---- collectives ------------------------------------------------------------------------------------------------------- */

static const int64_t sizes[] = {1 << 10, 16 << 10, 64 << 10, 256 << 10, 4 << 20};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

struct call {
    struct bench *b;
    struct comm *comm;
    enum cost_collective kind;
    uint8_t *from, *to; /* the largest of sizes, and room to round a rank's part up */
    int64_t bytes;
};

static int64_t part_bytes(const struct call *c) { return round_up(ceil_div(c->bytes, comm_size(c->comm)), 16); }

static int call_collective(void *context) {
    const struct call *c = context;
    struct stream *stream = c->b->device.stream;
    if (c->kind == COST_ALL_GATHER)
        return comm_all_gather(c->comm, stream, "bench", c->from, c->to, part_bytes(c));
    return comm_all_reduce(c->comm, stream, "bench", c->from, c->to, c->bytes / 4, COMM_FLOAT,
                           c->kind == COST_ALL_MAX ? COMM_MAX : COMM_SUM);
}

/* Collective. */
static int measure_curves(struct call *c, struct cost_rates *rates) {
    const int calls = bench_on_gpu(c->b) ? N_CALLS : 1;
    for (c->kind = 0; c->kind < COST_N_COLLECTIVES; c->kind++) {
        struct cost_curve *curve = &rates->curves[c->kind][rates->n_curves[c->kind]++];
        *curve = (struct cost_curve){.ranks = comm_size(c->comm), .n = N_SIZES};
        for (int i = 0; i < N_SIZES; i++) {
            double best;
            c->bytes = sizes[i];
            curve->bytes[i] = (double)sizes[i];
            TRY(bench_time_calls(c->b, call_collective, c, calls, REPLAYS, &curve->seconds[i], &best));
        }
    }
    return STATUS_OK;
}

/* Collective. All groups of a kind at once. */
static int measure_group(struct bench *b, int color, int key, struct cost_rates *rates) {
    struct call c = {.b = b};
    TRY(comm_split(b->run->world, color, key, "bench group", &c.comm));
    int status = comm_use_device(&c.comm, b->device.backend);
    size_t bytes = (size_t)(sizes[N_SIZES - 1] + 16 * (int64_t)comm_size(c.comm));
    if (status == STATUS_OK)
        status = comm_alloc(c.comm, b->device.backend, bytes, &c.from);
    if (status == STATUS_OK)
        status = comm_alloc(c.comm, b->device.backend, bytes, &c.to);
    if (status == STATUS_OK)
        status = measure_curves(&c, rates);
    if (c.to)
        comm_release(c.comm, b->device.backend, c.to);
    if (c.from)
        comm_release(c.comm, b->device.backend, c.from);
    comm_free(c.comm);
    return status;
}

int bench_step_collectives(struct bench *b, const struct step_shape *shape, struct cost_rates *rates) {
    const struct grid *g = &shape->grid;
    const bool tp_less = g->tp <= g->cp; /* curves ascend in ranks */
    const int less = tp_less ? g->tp : g->cp, more = tp_less ? g->cp : g->tp;
    const int colors[2] = {tp_less ? g->cp_rank : g->tp_rank, tp_less ? g->tp_rank : g->cp_rank};
    const int keys[2] = {tp_less ? g->tp_rank : g->cp_rank, tp_less ? g->cp_rank : g->tp_rank};
    if (less > 1)
        TRY(measure_group(b, colors[0], keys[0], rates));
    if (more > less && less > 1)
        TRY(measure_group(b, colors[1], keys[1], rates));
    return more > 1 ? measure_group(b, 0, grid_replica_rank(g), rates) : STATUS_OK;
}
