/* Sums and extremes over ranks, always taken in rank order, so that the bits do not depend on who computes them: floating-point
 * addition is not associative, and a library may add in another order on every rank. */
#include "dist/comm_impl.h"

#include <string.h>

enum { BLOCK = 256 }; /* elements held on the stack, so that `to` may be one of the sources */

int64_t comm_dtype_bytes(enum comm_dtype dtype) {
    switch (dtype) {
    case COMM_FLOAT:
    case COMM_INT32:
        return 4;
    case COMM_UINT64:
        return 8;
    case COMM_BYTE:
        return 1;
    }
    return 0;
}

/* A NaN wins, whichever rank has it. -inf is the neutral element of max. */
static inline float float_max(float a, float b) { return b > a || b != b ? b : a; }
static inline float float_min(float a, float b) { return b < a || b != b ? b : a; }
/* Integers wrap, as MPI's do. */
static inline int32_t int32_sum(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
static inline int32_t int32_max(int32_t a, int32_t b) { return b > a ? b : a; }
static inline int32_t int32_min(int32_t a, int32_t b) { return b < a ? b : a; }
static inline float float_sum(float a, float b) { return a + b; }
static inline uint64_t uint64_sum(uint64_t a, uint64_t b) { return a + b; }
static inline uint64_t uint64_max(uint64_t a, uint64_t b) { return b > a ? b : a; }
static inline uint64_t uint64_min(uint64_t a, uint64_t b) { return b < a ? b : a; }

#define REDUCE(NAME, TYPE)                                                                          \
    static void reduce_##NAME(void *to, const void *const *from, int n_from, int64_t count) {       \
        for (int64_t at = 0; at < count; at += BLOCK) {                                             \
            TYPE sum[BLOCK];                                                                        \
            int64_t n = min_i64(BLOCK, count - at);                                                 \
            memcpy(sum, (const TYPE *)from[0] + at, (size_t)n * sizeof *sum);                       \
            for (int r = 1; r < n_from; r++) {                                                      \
                const TYPE *part = (const TYPE *)from[r] + at;                                      \
                for (int64_t i = 0; i < n; i++)                                                     \
                    sum[i] = NAME(sum[i], part[i]);                                                 \
            }                                                                                       \
            memcpy((TYPE *)to + at, sum, (size_t)n * sizeof *sum);                                  \
        }                                                                                           \
    }
REDUCE(float_sum, float)
REDUCE(float_max, float)
REDUCE(float_min, float)
REDUCE(int32_sum, int32_t)
REDUCE(int32_max, int32_t)
REDUCE(int32_min, int32_t)
REDUCE(uint64_sum, uint64_t)
REDUCE(uint64_max, uint64_t)
REDUCE(uint64_min, uint64_t)

void comm_reduce(void *to, const void *const *from, int n, int64_t count, enum comm_dtype dtype, enum comm_op op) {
    static void (*const table[3][3])(void *, const void *const *, int, int64_t) = {
        [COMM_FLOAT] = {[COMM_SUM] = reduce_float_sum, [COMM_MAX] = reduce_float_max, [COMM_MIN] = reduce_float_min},
        [COMM_INT32] = {[COMM_SUM] = reduce_int32_sum, [COMM_MAX] = reduce_int32_max, [COMM_MIN] = reduce_int32_min},
        [COMM_UINT64] = {[COMM_SUM] = reduce_uint64_sum, [COMM_MAX] = reduce_uint64_max, [COMM_MIN] = reduce_uint64_min},
    };
    table[dtype][op](to, from, n, count);
}
