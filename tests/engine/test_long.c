/* Index arithmetic beyond 2^31: decode attention over 2^20 tokens of one sequence, 2 bits, one layer, one KV head, on every number of ranks,
 * against double precision. The pool has more than 2^31 bytes and the sequence gets its last pages; the slots of the 16-bit blocks have
 * more than 2^31 bytes and the sequence has the last one. Only what is touched takes memory: the rest is never written. */
#include "dist/merge.h"
#include "engine/cache.h"
#include "device.h"

enum { D = 64, N_HEADS = 2, TOKENS = 1 << 20, N_SEQS = 40000, SEQ = N_SEQS - 1, N_PAGES = 560000, OFFSET = 1 };
static const double tolerance = 1e-6; /* values lie in [-1, 1): float sums of 2^20 positive weights, added in steps, keep that */
/* A GPU rounds each weight to 11 bits: four deviations of a sum of them, 4 2^-11 sqrt(mean p^2) / (mean p 2^10); scores of deviation 1.7 make
 * the quotient of the means e^1.5. */
static const double tolerance_gpu = 1e-5;

struct rig {
    struct backend *backend;
    struct stream *stream;
    struct comm *comm;
    struct cache cache;
    int offset;
    struct step_input *step, host;
    void *k, *v, *q;
    float *decoded; /* device: K and V of one page */
    float queries[N_HEADS * D];
};

static void rig_open(struct rig *r, const char *device, struct comm *comm) {
    struct cache_spec spec = {.name = "kivi", .window_type = DTYPE_F16, .window = KV_BLOCK, .n_layers = 1, .layer = {{2, 2, false, false}}};
    struct cache_shape shape = {.n_kv_heads = 1, .head_dim = D, .n_heads = N_HEADS, .cp_rank = comm_rank(comm), .cp_size = comm_size(comm),
                                .max_seqs = N_SEQS, .context = TOKENS, .n_pages = N_PAGES};
    *r = (struct rig){.offset = OFFSET % comm_size(comm)};
    device_open(device, comm_rank(comm), 0, &r->backend);
    r->comm = device_comm(comm, r->backend);
    REQUIRE(stream_open(r->backend, &r->stream));
    REQUIRE(cache_init(&r->cache, r->backend, &spec, &shape, NULL));
    CHECK(r->cache.bytes.pages > (int64_t)1 << 31, "%lld bytes of pages", (long long)r->cache.bytes.pages);
    int64_t window_each = r->cache.bytes.window / N_SEQS;
    if (comm_size(comm) == 1) /* more ranks have one slot of a sequence each */
        CHECK(SEQ * window_each > (int64_t)1 << 31, "%lld bytes of slots", (long long)r->cache.bytes.window);
    for (int64_t i = 0; i < N_PAGES; i++)
        r->cache.free_pages[i] = (int32_t)i; /* the last pages are taken first */
    static struct seq_params params;
    params.owner_offset = r->offset;
    REQUIRE(stream_copy_in(r->stream, r->cache.params + SEQ, &params, sizeof params));
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, sizeof *r->step, &r->step));
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, dtype_bytes(DTYPE_F16, KV_BLOCK * D), &r->k));
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, dtype_bytes(DTYPE_F16, KV_BLOCK * D), &r->v));
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, 2 * KV_BLOCK * D * sizeof(float), &r->decoded));
    REQUIRE(backend_alloc(r->backend, MEMORY_WORKSPACE, dtype_bytes(DTYPE_F16, N_HEADS * D), &r->q));
    uint8_t narrow[2 * N_HEADS * D];
    for (int i = 0; i < N_HEADS * D; i++)
        r->queries[i] = 3 * test_normal(1, (uint64_t)i);
    dtype_narrow(DTYPE_F16, r->queries, narrow, N_HEADS * D);
    dtype_widen(DTYPE_F16, narrow, r->queries, N_HEADS * D);
    REQUIRE(stream_copy_in(r->stream, r->q, narrow, sizeof narrow));
    REQUIRE(stream_sync(r->stream));
}

/* What a block holds, rounded to fp16: k and v [KV_BLOCK][D]. */
static void make_block(int64_t block, float *k, float *v, void *k16, void *v16) {
    for (int i = 0; i < KV_BLOCK * D; i++) {
        k[i] = test_uniform(2, (uint64_t)(block * KV_BLOCK * D + i));
        v[i] = test_uniform(3, (uint64_t)(block * KV_BLOCK * D + i));
    }
    dtype_narrow(DTYPE_F16, k, k16, KV_BLOCK * D);
    dtype_narrow(DTYPE_F16, v, v16, KV_BLOCK * D);
    dtype_widen(DTYPE_F16, k16, k, KV_BLOCK * D);
    dtype_widen(DTYPE_F16, v16, v, KV_BLOCK * D);
}

struct sums { /* Algorithm 1 in double, shifted by m */
    double m, l, y[D];
};

static void sums_add(struct sums *s, const float *q, const float *k, const float *v) {
    for (int t = 0; t < KV_BLOCK; t++) {
        double score = 0;
        for (int i = 0; i < D; i++)
            score += (double)q[i] * (double)k[t * D + i];
        score /= sqrt(D);
        if (score > s->m) {
            double shrink = exp(s->m - score);
            s->l *= shrink;
            for (int i = 0; i < D; i++)
                s->y[i] *= shrink;
            s->m = score;
        }
        double weight = exp(score - s->m);
        s->l += weight;
        for (int i = 0; i < D; i++)
            s->y[i] += weight * (double)v[t * D + i];
    }
}

/* Writes this rank's blocks and sums them in double from what was stored. */
static void fill(struct rig *r, struct sums *sums) {
    static float k[KV_BLOCK * D], v[KV_BLOCK * D], decoded[2 * KV_BLOCK * D];
    static uint8_t k16[2 * KV_BLOCK * D], v16[2 * KV_BLOCK * D];
    struct cache *c = &r->cache;
    int64_t n_flushed = cache_n_flushed(&c->layout, TOKENS - 1);
    for (int64_t block = 0; block < TOKENS / KV_BLOCK; block++) {
        if (!cache_owns(&c->layout, block, r->offset))
            continue;
        make_block(block, k, v, k16, v16);
        r->host.n_rows = KV_BLOCK;
        for (int i = 0; i < KV_BLOCK; i++)
            r->host.row[i] = (struct step_row){SEQ, 0, (int32_t)(block * KV_BLOCK + i), 0};
        r->host.n_flush = block < n_flushed;
        if (r->host.n_flush) {
            struct step_flush f = {SEQ, (int32_t)block, -1, -1};
            REQUIRE(cache_take_page(c, SEQ, block, &f.page, &f.local));
            CHECK(f.page * c->layers[0].page_stride > (int64_t)1 << 31, "page %d", f.page);
            r->host.flush[0] = f;
        }
        REQUIRE(stream_copy_in(r->stream, r->step, &r->host, sizeof r->host));
        REQUIRE(stream_copy_in(r->stream, r->k, k16, sizeof k16));
        REQUIRE(stream_copy_in(r->stream, r->v, v16, sizeof v16));
        REQUIRE(op_append(r->stream, &(struct append_args){r->step, c->params, c->layout, c->layers[0], r->k, r->v}));
        if (r->host.n_flush) {
            REQUIRE(op_flush(r->stream, &(struct flush_args){r->step, c->params, c->layout, c->layers[0], c->page_table, c->table_stride, true}));
            REQUIRE(op_unpack(r->stream, &(struct unpack_args){c->layers[0].format,
                                                               c->layers[0].pages + r->host.flush[0].page * c->layers[0].page_stride,
                                                               r->decoded, r->decoded + KV_BLOCK * D}));
            REQUIRE(stream_copy_out(r->stream, decoded, r->decoded, sizeof decoded));
        }
        REQUIRE(stream_sync(r->stream));
        for (int h = 0; h < N_HEADS; h++)
            sums_add(&sums[h], r->queries + h * D, r->host.n_flush ? decoded : k, r->host.n_flush ? decoded + KV_BLOCK * D : v);
    }
}

static void check_kind(struct rig *r, enum merge_kind kind, const double *expected, double allowed) {
    struct merge m;
    struct cache *c = &r->cache;
    float *device, out[N_HEADS * D];
    double worst = 0;
    REQUIRE(merge_init(&m, kind, r->comm, r->backend, 1, N_HEADS, D));
    REQUIRE(comm_alloc(r->comm, r->backend, sizeof out, &device));
    REQUIRE(op_attend(r->stream, &(struct attend_args){.in = r->step, .n_rows = 1, .params = c->params, .layout = c->layout,
                                                       .layer = c->layers[0], .page_table = c->page_table, .table_stride = c->table_stride,
                                                       .n_heads = N_HEADS, .scale = 1.0f / sqrtf(D), .q = r->q,
                                                       .partial = merge_partial(&m, 1, false), .stride = partial_stride(D, false)}));
    REQUIRE(merge_run(&m, r->stream, 1, &r->step->n_rows, false, device));
    if (kind == MERGE_FUSED && comm_size(r->comm) > 1)
        REQUIRE(comm_all_reduce(r->comm, r->stream, "sum of outputs", device, device, N_HEADS * D, COMM_FLOAT, COMM_SUM));
    REQUIRE(stream_copy_out(r->stream, out, device, sizeof out));
    REQUIRE(stream_sync(r->stream));
    for (int i = 0; i < N_HEADS * D; i++)
        worst = fmax(worst, fabs((double)out[i] - expected[i]));
    CHECK(worst <= allowed, "%s: off by %g", merge_name(kind), worst);
    if (comm_rank(r->comm) == 0)
        printf("%d ranks, %s: off by %.2g at most\n", comm_size(r->comm), merge_name(kind), worst);
    comm_release(r->comm, r->backend, device);
    merge_deinit(&m);
}

int main(int argc, char **argv) { /* DEVICE */
    struct comm *world;
    static struct rig r;
    const char *device = argc > 1 ? argv[1] : "cpu";
    REQUIRE(comm_start("auto", 60, &argc, &argv, &world));
    device_require(world, device);
    int n = comm_size(world);
    struct sums own[N_HEADS], *all = calloc((size_t)n, sizeof own);
    double expected[N_HEADS * D];
    rig_open(&r, device, world);
    for (int h = 0; h < N_HEADS; h++)
        own[h] = (struct sums){.m = -INFINITY};
    fill(&r, own);
    REQUIRE(comm_gather_host(world, "sums", own, all, sizeof own));
    for (int h = 0; h < N_HEADS; h++) {
        double m = -INFINITY, l = 0;
        for (int i = 0; i < n; i++)
            m = fmax(m, all[i * N_HEADS + h].m);
        for (int c = 0; c < D; c++)
            expected[h * D + c] = 0;
        for (int i = 0; i < n; i++) {
            const struct sums *s = &all[i * N_HEADS + h];
            l += exp(s->m - m) * s->l;
            for (int c = 0; c < D; c++)
                expected[h * D + c] += exp(s->m - m) * s->y[c];
        }
        for (int c = 0; c < D; c++)
            expected[h * D + c] /= l;
    }
    r.host = (struct step_input){.n_rows = 1, .row = {{SEQ, 0, TOKENS - 1, 0}}};
    REQUIRE(stream_copy_in(r.stream, r.step, &r.host, sizeof r.host));
    REQUIRE(stream_sync(r.stream));
    for (int kind = MERGE_ALLREDUCE; kind <= MERGE_GATHER; kind++)
        check_kind(&r, (enum merge_kind)kind, expected, device_is_gpu(device) ? tolerance_gpu : tolerance);
    cache_deinit(&r.cache);
    comm_free(r.comm);
    stream_close(r.stream);
    backend_close(r.backend);
    free(all);
    int64_t failed = test_n_failed;
    REQUIRE(comm_reduce_host(world, "result", &failed, 1, COMM_SUM));
    comm_finish(world);
    return failed ? 1 : test_report();
}
