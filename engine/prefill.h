/* Exact prefill of one prompt, a layer at a time (DESIGN, 5): attention over the whole prompt in 16 bit, then the layer's blocks are
 * flushed into pages, so that K and V of one layer only exist in 16 bit.
 *
 * Queries are split over the cp ranks into zigzag chunks, so causal work balances. Dense layers work in one of two ways: from
 * `gather_from` tokens a rank on, each rank keeps its own tokens and the layer's weight slices are gathered over cp (double-buffered on the
 * side stream); below, every rank keeps all tokens and the slices stay where they are, as in decode. One prompt at a time; between two
 * layers other sequences may decode. */
#pragma once

#include "engine/rank.h"

enum {
    PREFILL_TILE = 512,         /* rows that pass the dense layers at once */
    PREFILL_GATHER_FROM = 1024, /* tokens of a rank from which gathering weights is cheaper than summing rows (DESIGN, 4) */
};

struct prefill_part { /* the weights of one cp peer, as exact prefill reads them */
    struct matrix o, gate_up, down;
    int64_t o_first; /* first of its o columns within the tp slice */
};

struct prefill {
    struct rank *rank;
    int64_t max_tokens;  /* the arena's size */
    int gather_from;
    int64_t max_inner;   /* widest MLP slice of the cp ranks */
    /* the prompt being worked on */
    int seq;             /* -1: none */
    int32_t owner_offset;
    int64_t n, chunk;
    bool gathers;        /* weights move, tokens stay */
    /* device */
    int32_t *tokens;     /* [n] in position order */
    int32_t *positions;  /* of the local rows */
    float *x;            /* [local rows][hidden] */
    void *q;             /* [local rows][heads][d] */
    uint8_t *gathered;   /* K, V as collected */
    uint8_t *kv;         /* [kv_head][K, V][n][d] */
    float *attention;    /* [n][heads * d]: own chunks, then all in position order */
    float *norm, *qkv, *projected, *part, *gate_up, *act; /* one tile */
    float *collected;    /* attention outputs of all ranks, when tokens are everywhere */
    uint8_t *arena[2];   /* gathered weights of two layers */
    int64_t *arena_bytes, *arena_offsets; /* host [cp]: of each peer's slice */
    struct prefill_part *parts[2];        /* host [cp]: what each arena holds */
    struct event *gathered_event[2], *used_event[2];
    int32_t *host_tokens; /* MEMORY_HOST: tokens, positions, page table row */
};

int prefill_init(struct prefill *prefill, struct rank *rank, int64_t max_tokens, int gather_from);
void prefill_deinit(struct prefill *prefill);

/* One layer; layer 0 begins with the prompt (host memory, read before the call returns), takes the pages and fills the slot's page
 * table row. Collective over the replica. */
int prefill_layer(struct prefill *prefill, int seq, int32_t owner_offset, const int32_t *prompt, int64_t n, int layer);

/* After the last layer: the residual rows of positions first .. first+count-1 into to [count][hidden] on every rank. Collective. */
int prefill_rows(struct prefill *prefill, int64_t first, int count, float *to);
