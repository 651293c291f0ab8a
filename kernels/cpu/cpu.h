/* The CPU's operations: one function for each row of OPS in ops.h, in the file of that name or its family's. Called on any thread,
 * never twice at once for one stream. They split their work over OpenMP threads (omp_get_max_threads) in a way that gives the
 * same bits for every number of threads. */
#pragma once

#include "kernels/ops.h"

#define CPU_OP(name) void cpu_##name(const struct name##_args *args);
OPS(CPU_OP)
#undef CPU_OP

/* Rows that count: *live, but never more than the buffer has. */
static inline int64_t cpu_live_rows(int64_t n_rows, const int32_t *live) {
    return live && *live < n_rows ? *live : n_rows;
}
