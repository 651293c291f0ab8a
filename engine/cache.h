/* This rank's part of the KV cache: pools of pages, 16-bit blocks, S and P, page tables, and who has which page.
 *
 * A page id means one block of one sequence in every layer. Memory is allocated once; pages go from a free list to blocks as the plan
 * flushes them, and back when the plan releases a slot. Everything that is allocated is counted. */
#pragma once

#include "dist/plan.h"
#include "engine/cache_spec.h"

struct cache_shape { /* what a rank's cache is made for */
    int n_kv_heads, head_dim;  /* of this rank */
    int n_heads;               /* query heads of this rank */
    int cp_rank, cp_size;
    int max_seqs;              /* slots */
    int64_t context;           /* most tokens of a sequence */
    int64_t n_pages;           /* in the pool */
    int64_t vocab_begin, vocab_count; /* of this rank: token counts for penalties */
    int features;              /* D of the adapters; 0 without */
};

struct cache_bytes {
    int64_t pages, window, sink, states, tables;
};

/* Bytes for a shape: pure arithmetic, before anything is allocated. Layers with correction take states. */
struct cache_bytes cache_plan_bytes(const struct cache_spec *spec, const struct cache_shape *shape);
int64_t cache_bytes_sum(const struct cache_bytes *bytes);
/* Bytes of one page over all layers. */
int64_t cache_page_bytes(const struct cache_spec *spec, const struct cache_shape *shape);
/* Pages that one sequence of n tokens takes on this cp rank at most over all owner offsets, and for one offset. */
int64_t cache_pages_for(const struct cache_spec *spec, int cp_size, int64_t n_tokens);
int64_t cache_pages_for_offset(const struct cache_layout *layout, int64_t n_tokens, int owner_offset);

struct cache_adapter { /* one layer's phi, in backend memory; NULL without */
    float *phi_k, *phi_q, *gate;
    bool phi_q_per_head, exact_v;
};

struct cache {
    struct backend *backend;
    struct cache_shape shape;
    struct cache_layout layout;
    struct cache_bytes bytes;
    int n_layers;
    struct cache_layer *layers;
    struct seq_params *params;  /* device [max_seqs] */
    struct seq_counts counts;
    int32_t *last_token;        /* device [max_seqs] */
    int32_t *page_table;        /* device [max_seqs][table_stride] */
    int64_t table_stride;
    /* host */
    int64_t n_free;
    int32_t *free_pages;        /* stack of n_free ids */
    int32_t *slot_pages;        /* [max_seqs][table_stride] ids by local index */
    int64_t *slot_n_pages;      /* [max_seqs] */
};

int cache_init(struct cache *cache, struct backend *backend, const struct cache_spec *spec, const struct cache_shape *shape,
               const struct cache_adapter *adapters);
void cache_deinit(struct cache *cache);

/* This rank's page for block `block` of slot `seq`, and its local index. Errors: STATUS_FAILED when the pool is empty or the block is not
 * the slot's next one here: the scheduler's accounts were wrong. */
int cache_take_page(struct cache *cache, int seq, int64_t block, int32_t *page, int32_t *local);
/* This rank's pages for all blocks that are flushed when a sequence of n tokens has been stored, and in stream order the slot's row of the
 * page table. `table`: MEMORY_HOST, room for all of them, untouched until the stream has run. */
int cache_take_prompt(struct cache *cache, struct stream *stream, int seq, int64_t n_tokens, int32_t owner_offset, int32_t *table);
/* Gives back all pages of a slot. */
void cache_release(struct cache *cache, int seq);
/* Zeroes S and P of a slot, in stream order. */
int cache_reset_states(struct cache *cache, struct stream *stream, int seq);
