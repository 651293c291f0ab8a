/* Where a block lies in the 16-bit slots, and how one head of it becomes a record: what flush and flush_exact share. */
#pragma once

#include "kernels/ops.h"

/* Byte offset in layer->window of K's first row (V's rows follow) of `block` in its slot. */
static inline size_t cpu_flush_slot_offset(const struct cache_layout *layout, const struct cache_layer *layer, int seq, int64_t block,
                                           int head) {
    int64_t slot = block / layout->cp_size % layout->n_slots;
    int64_t index = ((int64_t)seq * layout->n_slots + slot) * layout->n_kv_heads + head;
    return dtype_bytes(layer->format.window, index * 2 * KV_BLOCK * layout->head_dim);
}

/* Sink tokens at the start of a block. */
static inline int cpu_flush_first(const struct cache_layout *layout, int64_t block) {
    return block == 0 ? layout->sink : 0;
}

/* One KV head of one block, on its way from 16-bit rows to a page. */
struct cpu_flush_head {
    int seq, head;
    int64_t block, page;
    const void *k, *v; /* [KV_BLOCK][head_dim] */
};

/* Encodes it into its page and copies block 0's sink tokens to the sink store. */
void cpu_flush_encode(const struct cache_layout *layout, const struct cache_layer *layer, const struct cpu_flush_head *from);

/* What it adds to S and P (cpu_correct_block), once encoded; and the adding, which must be done in ascending order of blocks. */
void cpu_flush_sum(const struct cache_layout *layout, const struct cache_layer *layer, const struct cpu_flush_head *from, float *sums);
void cpu_flush_add(const struct cache_layout *layout, const struct cache_layer *layer, const struct cpu_flush_head *from,
                   const float *sums);

/* Floats of the largest states of a head. */
enum { CPU_FLUSH_MAX_STATES = KV_MAX_FEATURES * (KV_MAX_HEAD_DIM + 1) };
