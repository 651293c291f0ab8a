/* What the two ways of attending over the cache share: where the blocks that a row sees lie, and where its record goes. */
#pragma once

#include <math.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/page.h"

/* From this many query vectors (rows of one sequence in a step, times heads per KV head) on, blocks are unpacked once for all of
 * them (attend_block.c). Measured with AVX-512 for 2 bits, d = 64 and 128. */
enum { ATTEND_BLOCK_VECTORS = 24 };

/* A stretch of tokens of one KV head with K and V: a page's record, a 16-bit block or the sink. Tokens begin .. end-1 count. */
struct attend_piece {
    const uint8_t *k, *v; /* part of a page (bits below 16) or rows [..][d] of the window's type */
    int k_bits, v_bits;
    int begin, end;       /* begin is a multiple of 16 */
};

/* Of a sequence at `position`: pages of local index 0 .. n_pages-1, then the sink, then 16-bit blocks. */
struct attend_view {
    const struct attend_args *args;
    int seq, kv_head;
    int64_t position;
    int64_t owner_offset;
    int64_t n_flushed; /* F(p), on all ranks */
    int64_t n_pages;   /* of them on this rank */
};

static inline struct attend_view attend_view_of(const struct attend_args *args, const struct step_row *row, int kv_head) {
    struct attend_view view = {.args = args, .seq = row->seq, .kv_head = kv_head, .position = row->position};
    view.owner_offset = args->params[row->seq].owner_offset;
    view.n_flushed = cache_n_flushed(&args->layout, row->position);
    view.n_pages = cache_n_owned(&args->layout, view.n_flushed, view.owner_offset);
    return view;
}

/* Page of local index `local`. The first block's tokens below `sink` do not count. */
static inline struct attend_piece attend_page_at(const struct attend_view *view, int64_t local) {
    const struct cache_layer *layer = &view->args->layer;
    const struct cache_layout *layout = &view->args->layout;
    const struct page_format *format = &layer->format;
    int64_t page = view->args->page_table[view->seq * view->args->table_stride + local];
    const uint8_t *record = layer->pages + page * layer->page_stride + (int64_t)page_record_bytes(format) * view->kv_head;
    bool first = local == 0 && cache_owns(layout, 0, view->owner_offset);
    return (struct attend_piece){record, record + cpu_page_v_offset(format), format->k_bits, format->v_bits, first ? layout->sink : 0,
                                 KV_BLOCK};
}

/* The sink store; no tokens where block 0 is not flushed or not here. */
static inline struct attend_piece attend_sink_of(const struct attend_view *view) {
    const struct cache_layout *layout = &view->args->layout;
    bool here = view->n_flushed > 0 && layout->sink > 0 && cache_owns(layout, 0, view->owner_offset);
    if (!here)
        return (struct attend_piece){.k_bits = 16, .v_bits = 16};
    int64_t head_bytes = (int64_t)dtype_bytes(view->args->layer.format.window, (int64_t)layout->sink * layout->head_dim);
    const uint8_t *k = (const uint8_t *)view->args->layer.sink + ((int64_t)view->seq * layout->n_kv_heads + view->kv_head) * 2 * head_bytes;
    return (struct attend_piece){k, k + head_bytes, 16, 16, 0, layout->sink};
}

/* The 16-bit block `block`, up to the token at `position`; the caller knows that this rank owns it. */
static inline struct attend_piece attend_window_at(const struct attend_view *view, int64_t block) {
    const struct cache_layout *layout = &view->args->layout;
    int64_t slot = block / layout->cp_size % layout->n_slots;
    int64_t head_bytes = (int64_t)dtype_bytes(view->args->layer.format.window, (int64_t)KV_BLOCK * layout->head_dim);
    int64_t index = ((int64_t)view->seq * layout->n_slots + slot) * layout->n_kv_heads + view->kv_head;
    const uint8_t *k = (const uint8_t *)view->args->layer.window + index * 2 * head_bytes;
    int64_t end = view->position - block * KV_BLOCK + 1;
    return (struct attend_piece){k, k + head_bytes, 16, 16, 0, (int)min_i64(KV_BLOCK, end)};
}

/* The block that page `local` holds. */
static inline int64_t attend_page_block(const struct attend_view *view, int64_t local) {
    int cp = view->args->layout.cp_size;
    return ((view->args->layout.cp_rank - view->owner_offset) % cp + cp) % cp + local * cp;
}

/* q -> q H: what the keys of pages are multiplied with where layer.rotate_k. */
static inline void attend_rotate(float *q, int d) {
    for (int span = 1; span < d; span *= 2)
        for (int i = 0; i < d; i++)
            if (!(i & span)) {
                float a = q[i], b = q[i + span];
                q[i] = a + b;
                q[i + span] = a - b;
            }
    for (int i = 0; i < d; i++)
        q[i] *= 1.0f / sqrtf((float)d);
}

/* out = R_-jG q: with it, a page's tokens get mean[o] back that their keys leave out (block j; only with layer.mean). */
static inline void attend_turn_back(const struct attend_args *args, int64_t block, const float *q, float *out) {
    int half = args->layout.head_dim / 2;
    for (int i = 0; i < half; i++) {
        float angle = (float)(block * KV_BLOCK) * args->layer.inv_freq[i], c = cosf(angle), s = sinf(angle);
        out[i] = q[i] * c + q[i + half] * s;
        out[i + half] = q[i + half] * c - q[i] * s;
    }
}

/* The mean keys [KV_BLOCK][head_dim] of a KV head. */
static inline const float *attend_mean_of(const struct attend_args *args, int kv_head) {
    return args->layer.mean + (int64_t)kv_head * KV_BLOCK * args->layout.head_dim;
}

/* Adds (R_-jG q) . mean[o] to the scores of tokens o = 0 .. KV_BLOCK-1 of block j. q as the scores take it: scaled, not rotated by H. */
static inline void attend_add_mean(const struct attend_args *args, int kv_head, int64_t block, const float *q, float *scores) {
    int d = args->layout.head_dim;
    const float *mean = attend_mean_of(args, kv_head);
    float turned[KV_MAX_HEAD_DIM];
    attend_turn_back(args, block, q, turned);
    for (int o = 0; o < KV_BLOCK; o++) {
        float sum = 0.0f;
        for (int c = 0; c < d; c++)
            sum += turned[c] * mean[o * d + c];
        scores[o] += sum;
    }
}

/* Where the record of (row, head) lies. */
static inline float *attend_record(const struct attend_args *args, int64_t row, int head) {
    return args->partial + (row * args->n_heads + head) * args->stride;
}

/* The record's scalars; C_d and C_n belong to cpu_correct where there is a correction. */
static inline void attend_finish_record(const struct attend_args *args, float *record, float max, float sum) {
    bool correction = args->stride > partial_stride(args->layout.head_dim, false);
    float *tail = record + partial_tail(args->layout.head_dim, correction);
    tail[0] = max;
    tail[1] = sum;
    if (!correction)
        tail[2] = 0.0f;
    tail[3] = 0.0f;
}

/* Rows first .. first + n_rows - 1 of the step: one sequence, one block. */
void attend_block(const struct attend_args *args, int64_t first, int64_t n_rows);
