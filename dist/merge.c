/* The three merges, composed of operations and collectives. Buffers are carved out of one allocation of the communicator:
 * `gather`: records of all ranks; `allreduce`: own records, maxima, sums; `fused`: own records, (m, l, C_d) of all ranks. */
#include "dist/merge.h"

#include <string.h>

static const char *const names[] = {[MERGE_ALLREDUCE] = "allreduce", [MERGE_FUSED] = "fused", [MERGE_GATHER] = "gather"};

int merge_parse(const char *name, enum merge_kind *out) {
    /* one collective a layer, and W_o stays sliced: the fewest bytes and messages for small batches */
    if (!name || strcmp(name, "auto") == 0) {
        *out = MERGE_GATHER;
        return STATUS_OK;
    }
    for (int i = 0; i < 3; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (enum merge_kind)i;
            return STATUS_OK;
        }
    FAIL(STATUS_USAGE, "merge '%s' is not known; allowed: auto, allreduce, fused, gather", name);
}

const char *merge_name(enum merge_kind kind) { return names[kind]; }

static int64_t records_floats(const struct merge *m, int64_t n_rows, bool correction) {
    return n_rows * m->n_heads * partial_stride(m->head_dim, correction);
}

int merge_init(struct merge *m, enum merge_kind kind, struct comm *comm, struct backend *backend, int max_rows, int n_heads,
               int head_dim) {
    *m = (struct merge){.kind = kind, .comm = comm, .backend = backend, .n_heads = n_heads, .head_dim = head_dim};
    int64_t n = comm_size(comm), items = (int64_t)max_rows * n_heads;
    int64_t records = records_floats(m, max_rows, true);
    int64_t floats = records;
    if (n > 1 && kind == MERGE_GATHER)
        floats = n * records;
    else if (n > 1 && kind == MERGE_ALLREDUCE)
        floats = records + items + items * (head_dim + 1);
    else if (n > 1)
        floats = records + n * items * 3;
    m->buffer_bytes = (size_t)floats * sizeof(float);
    return comm_alloc(comm, backend, m->buffer_bytes, &m->buffer);
}

void merge_deinit(struct merge *m) {
    if (m->buffer)
        comm_release(m->comm, m->backend, m->buffer);
    *m = (struct merge){0};
}

float *merge_partial(const struct merge *m, int n_rows, bool correction) {
    float *buffer = m->buffer;
    if (m->kind == MERGE_GATHER && comm_size(m->comm) > 1)
        buffer += comm_rank(m->comm) * records_floats(m, n_rows, correction);
    return buffer;
}

static int run_allreduce(const struct merge *m, struct stream *stream, int n_rows, const int32_t *live, bool correction, float *out) {
    float *partial = m->buffer;
    float *max = partial + records_floats(m, n_rows, correction);
    int64_t items = (int64_t)n_rows * m->n_heads;
    float *sums = max + items;
    TRY(op_merge_max(stream, &(struct merge_max_args){n_rows, live, m->n_heads, m->head_dim, correction, partial, max}));
    TRY(comm_all_reduce(m->comm, stream, "max of attention scores", max, max, items, COMM_FLOAT, COMM_MAX));
    TRY(op_merge_rescale(stream, &(struct merge_rescale_args){n_rows, live, m->n_heads, m->head_dim, correction, partial, max, sums}));
    TRY(comm_all_reduce(m->comm, stream, "sum of attention", sums, sums, items * (m->head_dim + 1), COMM_FLOAT, COMM_SUM));
    return op_merge_divide(stream, &(struct merge_divide_args){n_rows, live, m->n_heads, m->head_dim, sums, out});
}

static int run_fused(const struct merge *m, struct stream *stream, int n_rows, const int32_t *live, bool correction, float *out) {
    float *partial = m->buffer;
    float *stats = partial + records_floats(m, n_rows, correction);
    int64_t own = (int64_t)n_rows * m->n_heads * 3;
    float *mine = stats + comm_rank(m->comm) * own;
    TRY(op_merge_stats(stream, &(struct merge_stats_args){n_rows, live, m->n_heads, m->head_dim, correction, partial, mine}));
    TRY(comm_all_gather(m->comm, stream, "gather of attention sums", mine, stats, own * (int64_t)sizeof(float)));
    return op_merge_scale(stream, &(struct merge_scale_args){n_rows, live, m->n_heads, m->head_dim, correction, partial, stats,
                                                             comm_size(m->comm), out});
}

int merge_run(const struct merge *m, struct stream *stream, int n_rows, const int32_t *live, bool correction, float *out) {
    int n = comm_size(m->comm);
    if (n > 1 && m->kind == MERGE_ALLREDUCE)
        return run_allreduce(m, stream, n_rows, live, correction, out);
    if (n > 1 && m->kind == MERGE_FUSED)
        return run_fused(m, stream, n_rows, live, correction, out);
    if (n > 1)
        TRY(comm_all_gather(m->comm, stream, "gather of attention", merge_partial(m, n_rows, correction), m->buffer,
                            records_floats(m, n_rows, correction) * (int64_t)sizeof(float)));
    return op_merge_gather(stream, &(struct merge_gather_args){n_rows, live, m->n_heads, m->head_dim, correction, m->buffer, n, out});
}
