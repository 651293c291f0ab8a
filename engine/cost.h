/* What a model, a cache, a context and a layout cost on each rank: bytes of memory, bytes read in a step, time. Pure arithmetic: opens no
 * device and needs no rank, so it answers for machines that are not there.
 *
 * Bytes are exact: they follow the engine's own allocations (weights.c, cache.c, forward.c, prefill.c, merge.c, worker.c), which
 * tests/engine/test_cost.c compares. Times are a model: what has to be moved at the machine's measured rates, and a fixed time for each
 * operation and collective; nothing overlaps but prefill's gather of weights. All is for the rank that has most to hold or to read. */
#pragma once

#include "dist/merge.h"
#include "engine/cache.h"
#include "engine/weights.h"

/* ---- the machine --------------------------------------------------------------------------------------------------- */

enum cost_collective {
    COST_ALL_REDUCE, /* sum, in the memory that comm_alloc gives */
    COST_ALL_MAX,    /* maximum: where NCCL has no kernels on symmetric windows for it */
    COST_ALL_GATHER, /* bytes: of all ranks together */
    COST_N_COLLECTIVES,
};
enum { COST_MAX_CURVES = 8, COST_MAX_POINTS = 12, COST_TEXT = 256 };

struct cost_curve { /* time of one collective on `ranks` GPUs of one node, points ascending in bytes */
    int ranks, n;
    double bytes[COST_MAX_POINTS], seconds[COST_MAX_POINTS];
};

struct cost_rates { /* a file of configs/clusters */
    char about[COST_TEXT];     /* the machine in words */
    char assumed[COST_TEXT];   /* names of the rates that nobody measured; "" if none */
    int gpus, gpus_per_node;
    int64_t memory_bytes;      /* of one GPU */
    int64_t reserved_bytes;    /* of it, taken by driver, libraries and recorded graphs */
    double read_rate;          /* bytes/s of one GPU */
    double gemm_rate;          /* FLOP/s, 16-bit products of many rows */
    double weights_share;      /* products of few rows: of the read rate; 1 where a file does not say */
    double attention_share;    /* decode attention: of the read rate, long caches */
    double attention_s;        /* beside that, each time: planning, splits, their merge */
    double prefill_rate;       /* FLOP/s of exact causal attention, 2 n^2 d for each head */
    double cached_rate;        /* the same over a cache, a block of rows at a time; 0: not known, reckoned as reading the cache */
    double launch_s;           /* each operation of a recorded step, whatever it does */
    double node_latency_s;     /* one message between nodes */
    double node_bandwidth;     /* bytes/s of each GPU to other nodes */
    int n_curves[COST_N_COLLECTIVES];
    struct cost_curve curves[COST_N_COLLECTIVES][COST_MAX_CURVES]; /* ascending in ranks */
};

/* Reads and checks a file of one name = value a line. Errors: STATUS_INPUT, naming path and line. */
int cost_rates_read(const char *path, struct cost_rates *out);

struct cost_group { /* ranks that talk: `each` at most on one node, on `nodes` nodes */
    int ranks, nodes, each;
};
/* Ranks first, first + stride, ... of a replica whose ranks fill nodes one after the other. */
struct cost_group cost_group_make(const struct cost_rates *rates, int first, int stride, int ranks);
/* Seconds; 0 for one rank. Between points and between numbers of ranks: straight lines; beyond the last point the slope of the last two.
 * Over several nodes: inside them, and log2(nodes) messages and the bytes between them, shared by the GPUs of a node. */
double cost_collective(const struct cost_rates *rates, enum cost_collective kind, const struct cost_group *group, double bytes);

/* ---- the job ------------------------------------------------------------------------------------------------------- */

struct cost_job {
    const struct model_config *config;
    const struct cache_spec *spec;
    int features;          /* D of the adapters, where the cache has a correction */
    int64_t context;       /* most tokens of a sequence */
    int batch;             /* sequences decoded at once, each of up to `context` tokens */
    int tp, cp;
    enum merge_kind merge;
    int prefill_gather;    /* as the engine's option; 0: default */
    bool no_prefill;       /* prompts are assumed to be in the cache: no arena for exact prefill */
    bool gpu;              /* windows of NCCL and scratch memory count */
};

struct cost_memory { /* bytes of one rank's device */
    int64_t weights;
    int64_t workspace;       /* of decoding */
    int64_t prefill;         /* arena of exact prefill */
    struct cache_bytes cache;
    int64_t cache_total, total;
    int64_t host;            /* beside it: buffers in the host's memory */
};
void cost_memory(const struct cost_job *job, int tp_rank, int cp_rank, struct cost_memory *out);

/* Whether rank (0, 0), which holds most, fits as the engine plans it: the cache gets a share of what weights and workspace leave free.
 * `left`: bytes of that share that stay free; negative: lacking. May be NULL. */
bool cost_fits(const struct cost_job *job, const struct cost_rates *rates, int64_t *left);

/* Bytes that a decode step reads on one rank: weights once; caches of `batch` sequences whose newest token is their n-th, where sequence i
 * has owner offset i mod cp. Summed over the ranks this is engine_read_bytes. */
struct cost_reads {
    int64_t weights, cache;
};
void cost_reads(const struct cost_job *job, int tp_rank, int cp_rank, int64_t n_tokens, struct cost_reads *out);

struct cost_step { /* seconds of one decode step, by what they go to */
    double weights;     /* reading them, or computing where that takes longer */
    double attention;   /* reading caches */
    double merge;       /* collectives that combine attention over cp */
    double sums;        /* of o_proj and down_proj over the replica */
    double ends;        /* collectives of embedding and sampling */
    double launches;    /* the fixed time of every operation */
    double total;
};
void cost_decode(const struct cost_job *job, const struct cost_rates *rates, int64_t n_tokens, struct cost_step *out);

struct cost_prefill { /* seconds of a prefill of one prompt */
    double dense, attention, activations, collectives, launches, total;
    double gather;      /* of weights, beside the others: counted where it takes longer */
    double flop;        /* of all ranks */
};
/* Exact; a prompt within the window goes as a cached one does. */
void cost_prefill(const struct cost_job *job, const struct cost_rates *rates, int64_t n_tokens, struct cost_prefill *out);
/* In steps of one block. */
void cost_prefill_cached(const struct cost_job *job, const struct cost_rates *rates, int64_t n_tokens, struct cost_prefill *out);
