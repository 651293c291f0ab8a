/* Who holds which slice of what. A slice is a half-open range; slices of consecutive ranks are contiguous, cover everything
 * once, and differ by at most one unit. Uneven slices and empty ones are legal. Pure arithmetic. */
#pragma once

#include "kernels/base.h"

struct range {
    int64_t begin, end;
};
static inline int64_t range_size(struct range r) { return r.end - r.begin; }

/* Part `index` of `parts` of [0, n), cut at multiples of `unit` (the last unit may be short). */
struct range shard_range(int64_t n, int64_t unit, int parts, int index);

/* The slices nest: part `outer` of n_outer, cut again into n_inner. So a tp rank's prefill slice is the union, contiguous and
 * in order, of the decode slices of its cp ranks. */
struct range shard_nested(int64_t n, int64_t unit, int n_outer, int outer, int n_inner, int inner);
