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

struct bench_heads { /* that attention and collective work on: the model's, where there is one, else as the options say */
    int n_heads, n_kv_heads, head_dim;
};

struct bench_device { /* what the parts without an engine run on */
    struct backend *backend;
    struct stream *stream;
    struct comm *comm; /* all ranks, on this device */
};

struct bench {
    struct run *run;
    const struct options *options;
    struct bench_table table; /* rank 0 */
    int n_threads;            /* of one rank */
    struct bench_list contexts, prompts, batches;
    struct bench_heads heads;
    bool decodes, prefills;   /* with the engine that is open */
    int n_caches, cache;      /* cache: index of the one whose engine is open */
    char caches[BENCH_MAX_LIST][BENCH_CACHE_BYTES];
    struct bench_device device;
    double read_rate;         /* bytes/s of all ranks; rank 0 */
    double gemm_rate;         /* FLOP/s of all ranks; rank 0 */
    const char *gemm_name;    /* of the product that gemm_rate was measured with */
    struct bench_prediction *prediction;
};

/* Whether this part is measured. */
bool bench_wants(const struct bench *b, const char *part);

/* The model's files, or with --random-weights its shape. */
int bench_open_model(const struct bench *b, struct model_file **out);

/* Rank 0. Adds a row. */
static inline void bench_add(struct bench *b, struct bench_row row) { bench_table_add(&b->table, &row); }

/* Sorts: values[0] is the least then. */
double bench_median(double *values, int n);

/* Rank 0. One row for each thing to know of machine, libraries and build. */
void bench_machine(struct bench *b);

/* Collective. Opens what an engine with these options would run on, and closes it (it may be closed already). */
int bench_device_open(struct bench *b);
void bench_device_close(struct bench *b);
bool bench_on_gpu(const struct bench *b);
/* A graph of what `enqueue` puts on the device's stream, once it has run without one: what is loaded at first use is there then. */
int bench_record(const struct bench *b, int (*enqueue)(void *context), void *context, struct graph **out);
/* In stream order: the first `part` bytes of `memory` again and again, until `bytes` of it are filled. */
int bench_replicate(const struct bench *b, void *memory, size_t part, size_t bytes);
/* As many bytes of host memory to the device; waits. */
int bench_upload(const struct bench *b, void *device, const void *host, size_t bytes);
/* x[i] uniform in [-2, 2). */
void bench_random(uint64_t seed, float *x, int64_t n);

/* Collective, device open. Fills in read_rate and gemm_rate. */
int bench_rates(struct bench *b);
/* Collective, device open. `calls` of them on all ranks in one graph, replayed `n` times: seconds of one call, median and least. */
int bench_time_calls(struct bench *b, int (*call)(void *context), void *context, int calls, int n, double *seconds, double *best);

/* Collective, device open. Each context, batch and cache on every rank, all doing the same at once. */
int bench_attention(struct bench *b);
/* Collective, device open. Collectives and merges of all ranks. */
int bench_collective(struct bench *b);

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
