/* What the two kernels of attention over the cache share (attend.cu: every row by itself; attend_block.cu: runs of rows of one
 * sequence): which rows belong to which, where the blocks that a row sees lie, and where its record goes. Pages come first in
 * local order, then the sink, then 16-bit blocks. */
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/page.cuh"

enum {
    ATTEND_BLOCK_ROWS = 8, /* runs of at least so many rows of one sequence go to attend_block.cu */
    ATTEND_SLICE = 16,     /* tokens of a slice: rows of an MMA, and what begin and end of a sink are multiples of */
};

/* Rows of the step that count: those beyond hold anything and are not read. */
__device__ static inline int attend_n_rows(const struct attend_args *args) {
    return args->in->n_rows < args->n_rows ? args->in->n_rows : args->n_rows;
}

/* A run: consecutive rows with the same seq >= 0 and the same `first`; all in one block, so all see the same pages. */
__device__ static inline bool attend_same_run(const struct step_input *in, int a, int b) {
    return in->row[a].seq == in->row[b].seq && in->row[a].first == in->row[b].first && in->row[a].seq >= 0;
}

/* Does `row` (below n_rows = attend_n_rows) belong to a run of at least ATTEND_BLOCK_ROWS rows? */
__device__ static __noinline__ bool attend_in_long_run(const struct step_input *in, int n_rows, int row) {
    int before = 0, after = 0;
    while (before < ATTEND_BLOCK_ROWS - 1 && row - before > 0 && attend_same_run(in, row, row - before - 1))
        before++;
    while (before + after < ATTEND_BLOCK_ROWS - 1 && row + after + 1 < n_rows && attend_same_run(in, row, row + after + 1))
        after++;
    return before + after >= ATTEND_BLOCK_ROWS - 1;
}

/* Rows of the run that begins at `row`; 0 where none begins there (padding, or a row within a run). */
__device__ static inline int attend_run_length(const struct step_input *in, int n_rows, int row) {
    if (in->row[row].seq < 0 || (row > 0 && attend_same_run(in, row, row - 1)))
        return 0;
    int n = 1;
    while (row + n < n_rows && attend_same_run(in, row, row + n))
        n++;
    return n;
}

/* Of a sequence at `position`. All numbers of blocks fit 32 bits: positions do. */
struct attend_view {
    int seq, position;
    int first_owned; /* first block of the sequence that this rank owns; its page of local index l is block first_owned + l cp_size */
    int n_flushed;   /* F(p), on all ranks */
    int n_pages;     /* of them on this rank: local index 0 .. n_pages - 1 */
    int window;      /* first 16-bit block on this rank; the next ones are cp_size apart, up to position / KV_BLOCK */
};

__device__ static inline struct attend_view attend_view_of(const struct attend_args *args, const struct step_row *row) {
    const struct cache_layout *layout = &args->layout;
    int cp = layout->cp_size;
    struct attend_view view;
    view.seq = row->seq;
    view.position = row->position;
    view.first_owned = cp == 1 ? 0 : ((layout->cp_rank - args->params[row->seq].owner_offset) % cp + cp) % cp;
    view.n_flushed = (int)cache_n_flushed(layout, row->position);
    view.n_pages = view.n_flushed <= view.first_owned ? 0 : cp == 1 ? view.n_flushed : (view.n_flushed - view.first_owned + cp - 1) / cp;
    view.window = view.first_owned + view.n_pages * cp;
    return view;
}

/* Record of page `local` and one KV head; 16-byte aligned. */
__device__ static inline const uint8_t *attend_page_at(const struct attend_args *args, int page, int kv_head) {
    return args->layer.pages + page * args->layer.page_stride + (int64_t)page_record_size(&args->layer.format) * kv_head;
}
__device__ static inline int attend_page_id(const struct attend_args *args, const struct attend_view *view, int local) {
    return args->page_table[view->seq * args->table_stride + local];
}

/* First token that counts of page `local`: those of the sink do not. */
__device__ static inline int attend_page_begin(const struct attend_args *args, const struct attend_view *view, int local) {
    return local == 0 && view->first_owned == 0 ? args->layout.sink : 0;
}

/* Tokens in the sink store: none where block 0 is not flushed or not here. */
__device__ static inline int attend_sink_tokens(const struct attend_args *args, const struct attend_view *view) {
    return view->n_flushed > 0 && view->first_owned == 0 ? args->layout.sink : 0;
}

/* Rows of K of the sink [sink][d]; those of V follow. The window's type is one of 2 bytes. */
__device__ static inline const uint8_t *attend_sink_rows(const struct attend_args *args, const struct attend_view *view, int kv_head) {
    int64_t head_bytes = 2 * (int64_t)args->layout.sink * args->layout.head_dim;
    return (const uint8_t *)args->layer.sink + ((int64_t)view->seq * args->layout.n_kv_heads + kv_head) * 2 * head_bytes;
}

/* Rows of K of 16-bit block `block` (one that this rank owns) [KV_BLOCK][d]; those of V follow. */
__device__ static inline const uint8_t *attend_window_rows(const struct attend_args *args, const struct attend_view *view, int block,
                                                           int kv_head) {
    const struct cache_layout *layout = &args->layout;
    int slot = block / layout->cp_size % layout->n_slots;
    int64_t head_bytes = 2 * (int64_t)KV_BLOCK * layout->head_dim;
    int64_t index = ((int64_t)view->seq * layout->n_slots + slot) * layout->n_kv_heads + kv_head;
    return (const uint8_t *)args->layer.window + index * 2 * head_bytes;
}

/* Tokens of 16-bit block `block` that a row at `position` sees. */
__device__ static inline int attend_window_tokens(int position, int block) {
    int end = position - block * KV_BLOCK + 1;
    return end < KV_BLOCK ? end : KV_BLOCK;
}

/* Record of (row, head). */
__device__ static inline float *attend_record(const struct attend_args *args, int row, int head) {
    return args->partial + ((int64_t)row * args->n_heads + head) * args->stride;
}

/* The record's scalars, m in natural logarithm; where there is a correction C_d and C_n come from elsewhere. */
__device__ static inline void attend_finish_record(const struct attend_args *args, float *record, float max, float sum) {
    bool correction = args->stride > partial_stride(args->layout.head_dim, false);
    float *tail = record + partial_tail(args->layout.head_dim, correction);
    tail[0] = max;
    tail[1] = sum;
    if (!correction)
        tail[2] = 0.0f;
    tail[3] = 0.0f;
}

#ifdef __cplusplus
extern "C" {
#endif

/* The rows of long runs, whole records; leaves all other rows alone. attend_block.cu; called by cuda_attend, which has checked the
 * arguments, after its own kernels: launch->scratch is free. */
int cuda_attend_block(const struct cuda_launch *launch, const struct attend_args *args);

#ifdef __cplusplus
}
#endif
