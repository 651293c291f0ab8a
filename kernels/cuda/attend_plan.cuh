/* Who does what while decoding: the work of a step is cut into tiles, and every team of warps takes an equal range of them.
 *
 * A tile is one page (of which K or V is encoded) or ATTEND_SLICE tokens in 16 bit. A segment is a row and a KV head; its tiles are
 * pages, sink, window in this order, and segment row * n_kv_heads + kv_head follows segment by segment. Of T tiles each of W teams takes
 * T / W, the first T % W one more, so no team without tiles stands between others. What a team knows of a segment goes to piece w + segment: along the walk over tiles neither number falls and
 * one of them grows at each change, so no two (team, segment) share a piece, and the merge finds them without a list. */
#pragma once

#include "kernels/cuda/attend.cuh"

enum { PLAN_SCRATCH_BYTES = 4096 }; /* plan->begin, before the pieces */

struct attend_plan {
    int begin[STEP_MAX_ROWS + 1];     /* first tile of a row; those beyond the last: the total */
    int n_tiles[STEP_MAX_ROWS + 1];   /* of one KV head of a row; 0: padding, rows beyond, and rows of long runs */
    struct attend_view view[STEP_MAX_ROWS];
};

/* Numbers chosen by the launcher. */
struct attend_shape {
    int n_warps, n_stages, stage_bytes; /* of a CTA; stages of a warp */
    int n_teams;                        /* W */
    int n_passes;                       /* warps of a team: each takes pass_heads of the group's heads */
    int pass_heads;
    int *begin;                         /* scratch: plan->begin for the merge */
    float *pieces;                      /* [W + n_rows n_kv_heads - 1][group][piece_floats]: Y, m (of base 2), l */
};

HOST_DEVICE static inline int piece_floats(int head_dim) { return head_dim + 4; }

/* Tiles of a team, and how many teams have one more. All numbers of tiles fit 32 bits, whose divisions are several times faster: a tile has
 * at least 4 KiB, so 2^31 of them are more than any device holds. */
struct team_share {
    int each, more;
};

__device__ static inline struct team_share team_share_of(int n_tiles, int n_teams) {
    struct team_share share;
    share.each = n_tiles / n_teams;
    share.more = n_tiles - share.each * n_teams;
    return share;
}
__device__ static inline int team_begin(const struct team_share *share, int team) {
    return share->each * team + min(team, share->more);
}
/* The team that has `tile`. */
__device__ static inline int team_of(const struct team_share *share, int tile) {
    int wide = share->more * (share->each + 1); /* tiles of the teams with one more; share->each > 0 where a tile lies beyond */
    return tile < wide ? tile / (share->each + 1) : share->more + (tile - wide) / share->each;
}

/* What one tile is. */
struct attend_tile {
    bool page;           /* a whole page, else a slice */
    int local;           /* page: local index */
    int n;               /* slice: its first n tokens count */
    const uint8_t *k, *v; /* slice: rows of K and of V; page: k is the record */
};

/* 16-bit tokens of a view: sink and window, in slices. */
__device__ static inline int plan_exact_slices(const struct attend_args *args, const struct attend_view *view) {
    int n = attend_sink_tokens(args, view) / ATTEND_SLICE, cp = args->layout.cp_size;
    int current = view->position / KV_BLOCK;
    if (view->window > current)
        return n;
    int n_blocks = (current - view->window) / cp + 1, last = view->window + (n_blocks - 1) * cp;
    n += (n_blocks - 1) * (KV_BLOCK / ATTEND_SLICE);
    return n + (attend_window_tokens(view->position, last) + ATTEND_SLICE - 1) / ATTEND_SLICE;
}

/* Tile `index` of a segment. SLICED: pages are plain 16-bit rows and come in slices. page_id: of the page that it belongs to. */
template <int D, bool SLICED>
__device__ static inline struct attend_tile plan_tile(const struct attend_args *args, const struct attend_view *view, int kv_head,
                                                      int index,
                                                      int page_id) {
    const int per_block = KV_BLOCK / ATTEND_SLICE, row_bytes = 2 * D, n_of_pages = view->n_pages * (SLICED ? per_block : 1);
    struct attend_tile tile = {false, 0, ATTEND_SLICE, NULL, NULL};
    if (index < n_of_pages) {
        tile.page = !SLICED;
        tile.local = SLICED ? index / per_block : index;
        tile.k = attend_page_at(args, page_id, kv_head);
        if (SLICED) {
            int token = index % per_block * ATTEND_SLICE;
            tile.n = token < attend_page_begin(args, view, tile.local) ? 0 : ATTEND_SLICE;
            tile.k += token * row_bytes;
            tile.v = tile.k + KV_BLOCK * row_bytes;
        }
        return tile;
    }
    index -= n_of_pages;
    int n_sink = attend_sink_tokens(args, view);
    if (index < n_sink / ATTEND_SLICE) {
        tile.k = attend_sink_rows(args, view, kv_head) + index * ATTEND_SLICE * row_bytes;
        tile.v = tile.k + n_sink * row_bytes;
        return tile;
    }
    index -= n_sink / ATTEND_SLICE;
    int block = view->window + index / per_block * args->layout.cp_size, token = index % per_block * ATTEND_SLICE;
    tile.k = attend_window_rows(args, view, block, kv_head) + token * row_bytes;
    tile.v = tile.k + KV_BLOCK * row_bytes;
    tile.n = min(ATTEND_SLICE, attend_window_tokens(view->position, block) - token);
    return tile;
}

/* Fills the plan; all threads of a CTA, which has at least a warp. Ends with a barrier. */
template <bool SLICED> __device__ static inline void plan_make(const struct attend_args *args, struct attend_plan *plan) {
    const struct step_input *in = args->in;
    int n_rows = attend_n_rows(args);
    for (int row = (int)threadIdx.x; row <= STEP_MAX_ROWS; row += (int)blockDim.x) {
        int n = 0;
        if (row < n_rows && in->row[row].seq >= 0 && !attend_in_long_run(in, n_rows, row)) {
            struct attend_view view = attend_view_of(args, &in->row[row]);
            n = view.n_pages * (SLICED ? KV_BLOCK / ATTEND_SLICE : 1) + plan_exact_slices(args, &view);
            plan->view[row] = view;
        }
        plan->n_tiles[row] = n;
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
        const int per_lane = STEP_MAX_ROWS / WARP;
        int first = (int)threadIdx.x * per_lane;
        int sum = 0, before;
        for (int i = 0; i < per_lane; i++)
            sum += plan->n_tiles[first + i] * args->layout.n_kv_heads;
        before = sum;
        for (int offset = 1; offset < WARP; offset *= 2) {
            int other = __shfl_up_sync(0xffffffffu, before, offset);
            before += (int)threadIdx.x >= offset ? other : 0;
        }
        if (threadIdx.x == WARP - 1)
            plan->begin[STEP_MAX_ROWS] = before;
        before -= sum;
        for (int i = 0; i < per_lane; i++) {
            plan->begin[first + i] = before;
            before += plan->n_tiles[first + i] * args->layout.n_kv_heads;
        }
    }
    __syncthreads();
}

/* A place in the walk over tiles. */
struct attend_cursor {
    int row, kv_head, index, n; /* tile `index` of n */
    int page_id;                /* of that tile's page, where it has one; asked for early, so that its latency is hidden */
};

template <bool SLICED>
__device__ static inline void cursor_look_up(const struct attend_args *args, const struct attend_plan *plan, struct attend_cursor *at) {
    if (at->n == 0)
        return; /* the end */
    const struct attend_view *view = &plan->view[at->row];
    int local = SLICED ? at->index / (KV_BLOCK / ATTEND_SLICE) : at->index;
    if (local < view->n_pages)
        at->page_id = attend_page_id(args, view, local);
}

/* At tile `tile` of all; below the total. */
__device__ static inline struct attend_cursor cursor_at(const struct attend_plan *plan, int tile) {
    int low = 0, high = STEP_MAX_ROWS;
    while (low < high) { /* rows that begin at or before the tile: the last of them has it */
        int middle = (low + high) / 2;
        if (plan->begin[middle] <= tile)
            low = middle + 1;
        else
            high = middle;
    }
    struct attend_cursor at = {low - 1, 0, 0, plan->n_tiles[low - 1], 0};
    int within = tile - plan->begin[at.row];
    at.kv_head = within / at.n;
    at.index = within % at.n;
    return at;
}

/* To the next tile; n = 0 behind the last. True where another segment begins. */
__device__ static inline bool cursor_next(const struct attend_plan *plan, int n_kv_heads, struct attend_cursor *at) {
    if (++at->index < at->n)
        return false;
    at->index = 0;
    if (++at->kv_head == n_kv_heads) {
        at->kv_head = 0;
        do
            at->n = plan->n_tiles[++at->row];
        while (at->n == 0 && at->row < STEP_MAX_ROWS);
    }
    return true;
}
