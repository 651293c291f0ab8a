/* What surrounds the attention of an exact prefill: rows between the ranks' order and position order, and the prompt's blocks from
 * the 16-bit K and V of one layer into pages and slots. Blocks are summed into S and P as in flush.c, in the same order: a prompt
 * leaves the same bits as its tokens appended one by one. */
#include <string.h>

#include "kernels/cpu/correct.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/flush.h"

void cpu_kv_place(const struct kv_place_args *args) {
    size_t row_bytes = dtype_bytes(args->dtype, args->head_dim);
    int n_kv_heads = args->n_kv_heads;
    int64_t n_local = 2 * args->chunk;
    const uint8_t *gathered = args->gathered;
    uint8_t *kv = args->kv;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < args->cp_size * 2 * n_local; i++) {
        int64_t row = i % n_local, part = i / n_local % 2, rank = i / n_local / 2;
        int64_t position = prefill_position(row, (int)rank, args->cp_size, args->chunk);
        if (position >= args->n)
            continue;
        for (int h = 0; h < n_kv_heads; h++) {
            size_t from = (size_t)(i * n_kv_heads + h), to = (size_t)((h * 2 + part) * args->n + position);
            memcpy(kv + to * row_bytes, gathered + from * row_bytes, row_bytes);
        }
    }
}

void cpu_rows_place(const struct rows_place_args *args) {
    size_t row_bytes = (size_t)args->width * sizeof(float);
    int64_t n_local = 2 * args->chunk;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < args->cp_size * n_local; i++) {
        int64_t position = prefill_position(i % n_local, (int)(i / n_local), args->cp_size, args->chunk);
        if (position < args->n)
            memcpy(args->to + position * args->width, args->from + i * args->width, row_bytes);
    }
}

static const uint8_t *rows_of(const struct flush_exact_args *args, int head, int part, int64_t block) {
    int64_t row = ((int64_t)head * 2 + part) * args->n + block * KV_BLOCK;
    return (const uint8_t *)args->kv + dtype_bytes(args->layer.format.window, row * args->layout.head_dim);
}

/* The last block may be short. */
static void copy_to_slot(const struct flush_exact_args *args, int64_t block, int head) {
    const struct page_format *format = &args->layer.format;
    int64_t n_tokens = min_i64(KV_BLOCK, args->n - block * KV_BLOCK);
    size_t bytes = dtype_bytes(format->window, n_tokens * args->layout.head_dim);
    uint8_t *slot = (uint8_t *)args->layer.window + cpu_flush_slot_offset(&args->layout, &args->layer, args->seq, block, head);
    memcpy(slot, rows_of(args, head, 0, block), bytes);
    memcpy(slot + dtype_bytes(format->window, (int64_t)KV_BLOCK * args->layout.head_dim), rows_of(args, head, 1, block), bytes);
}

void cpu_flush_exact(const struct flush_exact_args *args) {
    const struct cache_layout *layout = &args->layout;
    int n_kv_heads = layout->n_kv_heads;
    int64_t n_owned = cache_n_owned(layout, args->n_flush, args->owner_offset), n_blocks = ceil_div(args->n, KV_BLOCK);
    int64_t n_items = n_owned * n_kv_heads;
    int64_t shift = (layout->cp_rank - args->owner_offset) % layout->cp_size;
    int64_t first = shift < 0 ? shift + layout->cp_size : shift; /* this rank's blocks: first, first + cp, ... */
    bool correction = cpu_correct_is_on(&args->layer);
#pragma omp parallel for ordered schedule(static, 1) if (n_items > 1)
    for (int64_t item = 0; item < n_items; item++) {
        float sums[CPU_FLUSH_MAX_STATES];
        int64_t local = item / n_kv_heads, block = first + local * layout->cp_size;
        int head = (int)(item % n_kv_heads);
        struct cpu_flush_head from = {args->seq, head, block, args->page_table[local],
                                      rows_of(args, head, 0, block), rows_of(args, head, 1, block)};
        cpu_flush_encode(layout, &args->layer, &from);
        if (correction) {
            cpu_flush_sum(layout, &args->layer, &from, sums);
#pragma omp ordered
            cpu_flush_add(layout, &args->layer, &from, sums);
        }
    }
    for (int64_t block = args->n_flush; block < n_blocks; block++) {
        if (!cache_owns(layout, block, args->owner_offset))
            continue;
        for (int head = 0; head < n_kv_heads; head++)
            copy_to_slot(args, block, head);
    }
}
