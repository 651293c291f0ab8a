/* Combining the partial attention of the cp ranks (DESIGN, 4), three ways with one answer.
 *
 * Whatever way, the correction is added once, unscaled, to sums shifted by the exact global max (Algorithm 1, lines 13-15). With one
 * cp rank all ways are the same local division. With MERGE_FUSED `out` is this rank's share only: the sum over cp ranks is left to
 * o_proj's all-reduce, so every cp rank multiplies with all columns of W_o of its tp slice. */
#pragma once

#include "dist/comm.h"
#include "kernels/ops.h"

enum merge_kind { MERGE_ALLREDUCE, MERGE_FUSED, MERGE_GATHER };

/* "auto", "allreduce", "fused", "gather". Errors: STATUS_USAGE. */
int merge_parse(const char *name, enum merge_kind *out);
const char *merge_name(enum merge_kind kind);

struct merge {
    enum merge_kind kind;
    struct comm *comm; /* of the cp ranks that share these heads; not owned */
    struct backend *backend;
    int n_heads, head_dim;
    void *buffer; /* collective buffers, carved per call */
    size_t buffer_bytes;
};

/* Buffers for up to max_rows rows of n_heads heads. */
int merge_init(struct merge *merge, enum merge_kind kind, struct comm *comm, struct backend *backend, int max_rows, int n_heads,
               int head_dim);
void merge_deinit(struct merge *merge);

/* Where `attend` and `correct` write their records for a step of n_rows rows: [n_rows][n_heads][partial_stride]. */
float *merge_partial(const struct merge *merge, int n_rows, bool correction);

/* Collective, in stream order: records of merge_partial -> out [n_rows][n_heads * head_dim]. */
int merge_run(const struct merge *merge, struct stream *stream, int n_rows, const int32_t *live, bool correction, float *out);
