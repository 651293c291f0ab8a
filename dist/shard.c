/* Slices of rows, heads and vocabularies over ranks. The first slices take the units that do not divide evenly. */
#include "dist/shard.h"

struct range shard_range(int64_t n, int64_t unit, int parts, int index) {
    int64_t units = ceil_div(n, unit);
    int64_t each = units / parts, more = units % parts;
    int64_t begin = each * index + min_i64(index, more);
    int64_t end = begin + each + (index < more ? 1 : 0);
    return (struct range){min_i64(begin * unit, n), min_i64(end * unit, n)};
}

/* Outer slices begin at multiples of the unit, so cutting one of them again keeps to the same units. */
struct range shard_nested(int64_t n, int64_t unit, int n_outer, int outer, int n_inner, int inner) {
    struct range whole = shard_range(n, unit, n_outer, outer);
    struct range part = shard_range(range_size(whole), unit, n_inner, inner);
    return (struct range){whole.begin + part.begin, whole.begin + part.end};
}
