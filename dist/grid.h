/* The rank layout: world = dp x tp x cp, cp varying fastest. Pure arithmetic, exhaustively tested. */
#pragma once

#include "kernels/base.h"

struct grid {
    int dp, tp, cp;                /* sizes */
    int dp_rank, tp_rank, cp_rank; /* this rank */
};

/* Fills in sizes left 0 (unset): one unset size is derived; several: dp and tp become 1, the rest goes to cp. Checks that
 * the product is `world` and that tp divides n_kv_heads. Errors: STATUS_USAGE; the message names the layouts that would do. */
int grid_make(int dp, int tp, int cp, int world, int rank, int n_kv_heads, struct grid *out);

/* Rank of (dp, tp, cp) in the world; size and rank within a replica (tp x cp, cp fastest). */
int grid_rank(const struct grid *grid, int dp_rank, int tp_rank, int cp_rank);
static inline int grid_replica_size(const struct grid *grid) { return grid->tp * grid->cp; }
static inline int grid_replica_rank(const struct grid *grid) { return grid->tp_rank * grid->cp + grid->cp_rank; }
