/* Collectives of all ranks as a step's graph holds them, and what the merges of attention make of them. Inputs are small integers (plain
 * collectives) or random records (merges), so that every result is known on every rank. */
#include <math.h>
#include <stdlib.h>

#include "dist/merge.h"
#include "launch/bench.h"
#include "launch/units.h"

enum {
    N_CALLS = 20,          /* in one graph: its launch does not count beside them */
    PATTERN = 64,          /* values of an input, from 0 on: sums of 2^17 ranks are exact */
    SEED_RECORDS = 21,
};
static const int64_t sizes[] = {1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20};
#define LARGEST ((int64_t)1 << 20)
/* Records and outputs are floats; each is a sum of as many products as there are ranks, each rounded a few times. */
#define LIMIT 1e-5

static void add_row(struct bench *b, const char *item, double seconds, double best, double bytes, const char *note) {
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "collective", .item = item, .ms = seconds * 1e3, .best_ms = best * 1e3,
                                        .rate = seconds * 1e6, .unit = "us", .bytes = bytes, .note = note});
}

/* ---- plain -------------------------------------------------------------------------------------------------------------- */

struct plain {
    struct bench *b;
    uint8_t *from, *to; /* LARGEST each, in the communicator's memory */
    int64_t bytes;      /* of a sum; of a gather: of all ranks together */
};

static int64_t part_bytes(const struct plain *p) { return p->bytes / comm_size(p->b->device.comm) / 16 * 16; }

static int call_sum(void *context) {
    const struct plain *p = context;
    return comm_all_reduce(p->b->device.comm, p->b->device.stream, "bench", p->from, p->to, p->bytes / 4, COMM_FLOAT, COMM_SUM);
}

static int call_gather(void *context) {
    const struct plain *p = context;
    return comm_all_gather(p->b->device.comm, p->b->device.stream, "bench", p->from, p->to, part_bytes(p));
}

static float input(int rank, int64_t i) { return (float)((i + rank) % PATTERN); }

static float expected_sum(const struct plain *p, int64_t i) {
    float sum = 0;
    for (int r = 0; r < comm_size(p->b->device.comm); r++)
        sum += input(r, i);
    return sum;
}

static int check_plain(const struct plain *p, bool sums, float *host) {
    int64_t part = part_bytes(p) / 4, n = sums ? p->bytes / 4 : part * comm_size(p->b->device.comm);
    TRY(stream_copy_out(p->b->device.stream, host, p->to, (size_t)n * sizeof *host));
    TRY(stream_sync(p->b->device.stream));
    for (int64_t i = 0; i < n; i++) {
        float expected = sums ? expected_sum(p, i) : input((int)(i / part), i % part);
        if (host[i] != expected)
            FAIL(STATUS_FAILED, "%s of %lld bytes: entry %lld is %g, expected %g", sums ? "all-reduce" : "all-gather", (long long)p->bytes,
                 (long long)i, (double)host[i], (double)expected);
    }
    return STATUS_OK;
}

/* Collective. */
static int plain_row(struct plain *p, bool sums, float *host) {
    char item[64], size[UNITS_TEXT];
    double seconds, best;
    TRY(bench_time_calls(p->b, sums ? call_sum : call_gather, p, N_CALLS, p->b->options->steps, &seconds, &best));
    TRY(comm_agree(p->b->run->world, "bench collective", check_plain(p, sums, host)));
    snprintf(item, sizeof item, "%s, %s", sums ? "all-reduce" : "all-gather", units_bytes(p->bytes, size));
    add_row(p->b, item, seconds, best, (double)p->bytes, sums ? NULL : "bytes of all ranks");
    return STATUS_OK;
}

static int fill_plain(const struct plain *p, float *host) {
    for (int64_t i = 0; i < LARGEST / 4; i++)
        host[i] = input(comm_rank(p->b->device.comm), i);
    return bench_upload(p->b, p->from, host, LARGEST);
}

/* Collective. */
static int run_plain(struct plain *p, float *host) {
    struct comm *world = p->b->run->world;
    TRY(comm_agree(world, "bench collective", fill_plain(p, host)));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        p->bytes = sizes[i];
        TRY(plain_row(p, true, host));
        TRY(plain_row(p, false, host));
    }
    return STATUS_OK;
}

static int measure_plain(struct bench *b) {
    const struct bench_device *d = &b->device;
    struct plain p = {.b = b};
    float *host = NULL;
    int status = comm_agree(b->run->world, "bench collective", backend_alloc(d->backend, MEMORY_HOST, LARGEST, &host));
    if (status == STATUS_OK)
        status = comm_alloc(d->comm, d->backend, LARGEST, &p.from);
    if (status == STATUS_OK)
        status = comm_alloc(d->comm, d->backend, LARGEST, &p.to);
    if (status == STATUS_OK)
        status = run_plain(&p, host);
    if (p.to)
        comm_release(d->comm, d->backend, p.to);
    if (p.from)
        comm_release(d->comm, d->backend, p.from);
    backend_free(d->backend, host);
    return status;
}

/* ---- merges ------------------------------------------------------------------------------------------------------------- */

struct merging {
    struct bench *b;
    struct merge merge;
    bool correction;
    float *out; /* [n_heads * d], in the communicator's memory */
};

static int call_merge(void *context) {
    const struct merging *m = context;
    return merge_run(&m->merge, m->b->device.stream, 1, NULL, m->correction, m->out);
}

/* The records of a rank: Y of a few, m in [-2, 2), l and C_d in [1, 5). */
static void make_records(const struct merging *m, int rank, float *records) {
    int stride = partial_stride(m->merge.head_dim, m->correction), tail = partial_tail(m->merge.head_dim, m->correction);
    bench_random(SEED_RECORDS + (uint64_t)rank, records, (int64_t)m->merge.n_heads * stride);
    for (int h = 0; h < m->merge.n_heads; h++) {
        float *end = records + (int64_t)h * stride + tail;
        end[1] += 3.0f;
        end[2] = m->correction ? end[2] + 3.0f : 0.0f;
        end[3] = 0.0f;
    }
}

/* sums[c] = sum over ranks of e^(m_r - m) Y + C_n, and in sums[d] of the denominator; `all`: [rank][head][stride]. */
static void merge_head(const struct merging *m, const float *all, int head, double *sums) {
    int n = comm_size(m->merge.comm), d = m->merge.head_dim;
    int stride = partial_stride(d, m->correction), tail = partial_tail(d, m->correction);
    double max = -INFINITY;
    for (int r = 0; r < n; r++)
        max = fmax(max, (double)all[((int64_t)r * m->merge.n_heads + head) * stride + tail]);
    for (int c = 0; c <= d; c++)
        sums[c] = 0;
    for (int r = 0; r < n; r++) {
        const float *record = all + ((int64_t)r * m->merge.n_heads + head) * stride;
        double factor = exp((double)record[tail] - max);
        for (int c = 0; c < d; c++)
            sums[c] += factor * (double)record[c] + (m->correction ? (double)record[d + c] : 0);
        sums[d] += factor * (double)record[tail + 1] + (double)record[tail + 2];
    }
}

static int check_output(const struct merging *m, const float *all, const float *out) {
    double sums[KV_MAX_HEAD_DIM + 1], ranks = comm_size(m->merge.comm);
    int d = m->merge.head_dim;
    for (int h = 0; h < m->merge.n_heads; h++) {
        merge_head(m, all, h, sums);
        for (int c = 0; c < d; c++) {
            double expected = sums[c] / sums[d], got = (double)out[(int64_t)h * d + c];
            if (!(fabs(got - expected) <= LIMIT * ranks * 4)) /* sizes of terms: below 4, over a denominator above 1 */
                FAIL(STATUS_FAILED, "merge %s: head %d, channel %d is %g, expected %g", merge_name(m->merge.kind), h, c, got, expected);
        }
    }
    return STATUS_OK;
}

/* Collective. Checks the last replay's output; that of `fused` is a share, whose sum is o_proj's in a step. */
static int check_merge(const struct merging *m, float *all) {
    const struct bench_device *d = &m->b->device;
    struct comm *world = m->b->run->world;
    int64_t heads = m->merge.n_heads, n_out = heads * m->merge.head_dim;
    int64_t records = heads * partial_stride(m->merge.head_dim, m->correction);
    float *out = NULL;
    int status = backend_alloc(d->backend, MEMORY_HOST, (size_t)n_out * sizeof *out, &out);
    if (status == STATUS_OK && m->merge.kind == MERGE_FUSED)
        status = comm_all_reduce(d->comm, d->stream, "bench", m->out, m->out, n_out, COMM_FLOAT, COMM_SUM);
    if (status == STATUS_OK)
        status = stream_copy_out(d->stream, out, m->out, (size_t)n_out * sizeof *out);
    if (status == STATUS_OK)
        status = stream_sync(d->stream);
    for (int r = 0; r < comm_size(d->comm); r++)
        make_records(m, r, all + r * records);
    if (status == STATUS_OK)
        status = check_output(m, all, out);
    backend_free(d->backend, out);
    return comm_agree(world, "bench collective", status);
}

/* Collective. `all`: host, room for the records of all ranks. */
static int merge_row(struct merging *m, float *all) {
    struct bench *b = m->b;
    char item[64];
    double seconds, best;
    int64_t bytes = (int64_t)m->merge.n_heads * partial_stride(m->merge.head_dim, m->correction) * 4;
    make_records(m, comm_rank(b->device.comm), all);
    TRY(comm_agree(b->run->world, "bench collective", bench_upload(b, merge_partial(&m->merge, 1, m->correction), all, (size_t)bytes)));
    TRY(bench_time_calls(b, call_merge, m, N_CALLS, b->options->steps, &seconds, &best));
    TRY(check_merge(m, all));
    snprintf(item, sizeof item, "%s%s", merge_name(m->merge.kind), m->correction ? ", correction" : "");
    add_row(b, item, seconds, best, (double)bytes, m->merge.kind == MERGE_FUSED ? "merge; without o_proj's sum" : "merge");
    return STATUS_OK;
}

/* Collective. */
static int merge_rows(struct merging *m, float *all) {
    for (int i = 0; i < 2; i++) {
        m->correction = i == 1;
        TRY(merge_row(m, all));
    }
    return STATUS_OK;
}

/* Collective. */
static int measure_merge(struct bench *b, enum merge_kind kind, float *all) {
    const struct bench_device *d = &b->device;
    const struct bench_heads *heads = &b->heads;
    struct merging m = {.b = b};
    TRY(comm_alloc(d->comm, d->backend, (size_t)heads->n_heads * (size_t)heads->head_dim * sizeof *m.out, &m.out));
    int status = merge_init(&m.merge, kind, d->comm, d->backend, 1, heads->n_heads, heads->head_dim);
    if (status == STATUS_OK)
        status = merge_rows(&m, all);
    merge_deinit(&m.merge);
    comm_release(d->comm, d->backend, m.out);
    return status;
}

static int check_options(const struct bench *b) {
    if (comm_size(b->run->world) < 2)
        FAIL(STATUS_USAGE, "bench collective needs two ranks or more: mpirun -np 2 kvlinc bench collective");
    return STATUS_OK;
}

int bench_collective(struct bench *b) {
    const enum merge_kind kinds[] = {MERGE_ALLREDUCE, MERGE_FUSED, MERGE_GATHER};
    struct comm *world = b->run->world;
    size_t records = (size_t)b->heads.n_heads * (size_t)partial_stride(b->heads.head_dim, true);
    float *all = NULL;
    TRY(comm_agree(world, "bench collective", check_options(b)));
    TRY(measure_plain(b));
    int status = backend_alloc(b->device.backend, MEMORY_HOST, records * (size_t)comm_size(world) * sizeof *all, &all);
    status = comm_agree(world, "bench collective", status);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds && status == STATUS_OK; i++)
        status = measure_merge(b, kinds[i], all);
    backend_free(b->device.backend, all);
    return status;
}
