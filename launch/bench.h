/* kvlinc bench: what the machine does and what the program makes of it.
 *
 * bench.c opens an engine for each cache and runs the parts, each in a file of its own; rows go to bench_table. The limits that shares
 * refer to are measured on all ranks at once, in the same run. Nothing here is a test: no number is ever required. */
#pragma once

#include "kernels/ops.h"
#include "launch/bench_table.h"
#include "launch/run.h"

/* Collective, on every rank. */
int bench_main(struct run *run);

enum { BENCH_MAX_LIST = 16, BENCH_CACHE_BYTES = 16, BENCH_MAX_REPEATS = 1000 };

struct bench_list { /* "128,1K,4K" */
    int n;
    int64_t value[BENCH_MAX_LIST];
};

struct bench {
    struct run *run;
    const struct options *options;
    struct bench_table table; /* rank 0 */
    int n_threads;            /* of one rank */
    struct bench_list contexts, prompts, batches;
    int n_caches;
    char caches[BENCH_MAX_LIST][BENCH_CACHE_BYTES];
    double read_rate;         /* bytes/s of all ranks; rank 0 */
    double gemm_rate;         /* FLOP/s of all ranks; rank 0 */
};

/* Rank 0. Adds a row. */
static inline void bench_add(struct bench *b, struct bench_row row) { bench_table_add(&b->table, &row); }

/* Sorts: values[0] is the least then. */
double bench_median(double *values, int n);

/* Rank 0. One row for each thing to know of machine, libraries and build. */
void bench_machine(struct bench *b);

/* Collective. Fills in read_rate and gemm_rate. */
int bench_rates(struct bench *b);

/* Rank 0, engine open. Submits a prompt of n hash-made tokens, `which` of its batch, greedy, that goes on to max_tokens. */
int bench_submit(struct bench *b, int64_t n, int which, int max_tokens, enum engine_prefill prefill, int64_t *id);
/* Rank 0, engine open: every context and batch; every prompt, exact and cached. */
int bench_decode(struct bench *b);
int bench_prefill(struct bench *b);
/* Tokens beyond a context that decode needs for its steps. */
int64_t bench_decode_room(const struct bench *b);

/* Rank 0. This rank's time by operation since the engine was opened. */
struct bench_profile {
    struct backend_times times;
    struct backend_time launches[OP_COUNT];
};
void bench_profile_read(const struct bench *b, struct bench_profile *out);
/* Rank 0, with --profile. A row for each operation that ran between `begin` and `end`: its mean time in the `n` steps or prompts of row `of`
 * that took `seconds` together. */
void bench_profile_add(struct bench *b, const struct bench_profile *begin, const struct bench_profile *end, const struct bench_row *of,
                       int n, double seconds);
double bench_sum(const double *values, int n);

/* The peak of this process' resident memory starts anew (where the system can). */
void bench_memory_reset(void);
/* Collective, engine open. What each rank has taken, beside what the engine allocated. */
int bench_memory(struct bench *b);
