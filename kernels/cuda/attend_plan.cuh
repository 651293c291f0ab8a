/* Who does what while decoding: the work of a step is cut into tiles, every CTA takes an equal range of them, and every team of its warps
 * an equal part of that. Two CTAs share a multiprocessor. Little work goes to half of the CTAs: the other places belong to the attention
 * behind or in front, so that one's end and the other's beginning hide each other.
 *
 * A tile is one page (of which K or V is encoded) or ATTEND_SLICE tokens in 16 bit. A segment is a row and a KV head; its tiles are
 * pages, sink, window in this order, and segment row * n_kv_heads + kv_head follows segment by segment. Of T tiles each of W shares has
 * T / W, the first T % W one more. So a segment's CTAs, and a CTA's teams, are known from the lengths alone. */
#pragma once

#include "kernels/cuda/attend.cuh"

enum {
    PLAN_ELSEWHERE = -1,
    DECODE_CTAS = 2,           /* on a multiprocessor */
    DECODE_MAX_WARPS = 6,      /* of a CTA, at most 16: 168 registers a thread, enough for four heads and nothing but the usual */
    DECODE_MAX_WARPS_WIDE = 4, /* with eight heads a warp, or with bits that are read or mean keys: up to 255 registers */
    SIDE_FEATURES = 256,       /* D of the correction that runs beside the attention; others have a kernel of their own (correct.cu) */
    PLAN_FEW_TILES = 4,        /* for each warp of one CTA a multiprocessor: up to here there is little work */
};

/* Tiles of a share, and how many shares have one more. All numbers of tiles fit 32 bits, whose divisions are several times faster: a tile
 * has at least 4 KiB, so 2^31 of them are more than any device holds. */
struct equal_shares {
    int each, more;
};

__device__ static inline struct equal_shares equal_shares_of(int n_tiles, int n_shares) {
    struct equal_shares share;
    share.each = (int)((unsigned)n_tiles / (unsigned)n_shares);
    share.more = n_tiles - share.each * n_shares;
    return share;
}
__device__ static inline int share_begin(const struct equal_shares *share, int index) {
    return share->each * index + min(index, share->more);
}
/* The share that has `tile`. */
__device__ static inline int share_of(const struct equal_shares *share, int tile) {
    int wide = share->more * (share->each + 1); /* tiles of the shares with one more; share->each > 0 where a tile lies beyond */
    return tile < wide ? (int)((unsigned)tile / (unsigned)(share->each + 1))
                       : share->more + (int)((unsigned)(tile - wide) / (unsigned)share->each);
}

/* The warps of a CTA, the last ones, that take part in the correction, and the tiles that a part is worth: as many fewer come to its warp. */
struct plan_side {
    int n_warps, n_tiles;
};

struct plan_row {
    int begin;                           /* first tile; behind the last row: the total */
    int n_tiles;                         /* of one KV head; 0: padding, rows beyond; PLAN_ELSEWHERE: rows of long runs */
    struct attend_view view;
};

/* What a CTA knows of the step, in shared memory. */
struct attend_plan {
    int n_ctas;                          /* that have work: the first ones */
    struct equal_shares share;           /* of them */
    struct plan_side side;
    int team[DECODE_MAX_WARPS + 1];      /* first tile of a team of this CTA; [n_teams]: that of the next CTA */
    int edge[2 * DECODE_MAX_WARPS];      /* by team: its first segment and its last, where they wait for other teams' parts; else -1 */
    struct plan_row row[STEP_MAX_ROWS + 1]; /* memory ends behind [args.n_rows] */
};
HOST_DEVICE static inline int plan_bytes(int n_rows) {
    return (int)(sizeof(struct attend_plan) - (STEP_MAX_ROWS - n_rows) * sizeof(struct plan_row));
}

/* The correction's part in the launch (attend_correct.cuh). */
struct attend_side {
    int heads;        /* of a task: 1 or 4 */
    int n_slices;     /* of a task; 0: no correction here */
    struct plan_side few, all; /* where few_ctas have work, and where all have */
    float *logits;    /* in the exchange, [n_rows][n_heads][features] */
    float *sums;      /* in the exchange, [n_rows][n_heads][piece_floats]: C_n, C_d */
};

/* Numbers chosen by the launcher. */
struct attend_shape {
    int n_warps, n_stages, stage_bytes; /* of a CTA; stages of a warp */
    int few_ctas, few_tiles;            /* CTAs that have work where there are no more than so many tiles */
    int n_teams;                        /* of a CTA */
    int n_passes;                       /* warps of a team: each takes pass_heads of the group's heads */
    int pass_heads;
    bool early;                         /* the kernel in front wrote nothing that is read here but 16-bit blocks, */
    bool early_window;                  /* nor these */
    struct attend_side side;
    float *team_pieces;                 /* [CTA][team][group][piece_floats]: Y, m (of base 2), l of a team's first segment */
    float *pieces;                      /* in the exchange, [CTAs + segments - 1][group][piece_floats] of a CTA: see cta_piece */
    float *out;                         /* [n_rows][n_heads * d]: one rank's output instead of records; or NULL */
};

HOST_DEVICE static inline int piece_floats(int head_dim) { return head_dim + 4; }

/* Along the walk over tiles neither the CTA nor the segment falls and one of them grows at each change, so no two (CTA, segment) share a
 * piece. */
__device__ static inline float *cta_piece(const struct attend_shape *shape, int cta, int segment, int group, int in_group, int head_dim) {
    return shape->pieces + ((int64_t)(cta + segment) * group + in_group) * piece_floats(head_dim);
}

/* First tile, from that of its CTA on, of team `team` of a CTA with n tiles. The last side->n_warps teams work for the correction as long
 * as side->n_tiles tiles take; where the others have less to do they get no tile at all. */
__device__ static inline int team_begin_of(const struct attend_shape *shape, const struct plan_side *side, int n, int team) {
    const int n_side = side->n_warps, first_side = shape->n_teams - n_side, worth = side->n_tiles;
    if (n_side > 0 && n < first_side * worth) {
        struct equal_shares share = equal_shares_of(n, first_side);
        return share_begin(&share, min(team, first_side));
    }
    struct equal_shares share = equal_shares_of(n + n_side * worth, shape->n_teams);
    return share_begin(&share, team) - max(team - first_side, 0) * worth;
}

/* A slice: its first n tokens count. */
struct attend_tokens {
    int n;
    const uint8_t *k, *v; /* rows of K and of V */
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

/* Slice `index` of a segment's 16-bit tokens in sink and window. */
template <int D>
__device__ static inline struct attend_tokens plan_slice(const struct attend_args *args, const struct attend_view *view, int kv_head, int index) {
    const int per_block = KV_BLOCK / ATTEND_SLICE, row_bytes = 2 * D, n_sink = attend_sink_tokens(args, view);
    struct attend_tokens slice = {ATTEND_SLICE, NULL, NULL};
    if (index < n_sink / ATTEND_SLICE) {
        slice.k = attend_sink_rows(args, view, kv_head) + index * ATTEND_SLICE * row_bytes;
        slice.v = slice.k + n_sink * row_bytes;
        return slice;
    }
    index -= n_sink / ATTEND_SLICE;
    int block = view->window + index / per_block * args->layout.cp_size, token = index % per_block * ATTEND_SLICE;
    slice.k = attend_window_rows(args, view, block, kv_head) + token * row_bytes;
    slice.v = slice.k + KV_BLOCK * row_bytes;
    slice.n = min(ATTEND_SLICE, attend_window_tokens(view->position, block) - token);
    return slice;
}

/* Row `row` of the plan, read before it is known whether it counts. In range: rows up to args->n_rows exist. */
template <bool SLICED>
__device__ static inline int plan_row(const struct attend_args *args, int n_rows, int row, bool any_run, struct attend_view *view) {
    const int4 words = *(const int4 *)&args->in->row[row];
    const struct step_row at = {words.x, words.y, words.z, words.w};
    if (row >= n_rows || at.seq < 0)
        return 0;
    if (any_run && attend_in_long_run(args->in, n_rows, row))
        return PLAN_ELSEWHERE;
    *view = attend_view_of(args, &at);
    return view->n_pages * (SLICED ? KV_BLOCK / ATTEND_SLICE : 1) + plan_exact_slices(args, view);
}

/* begin from n_tiles: one warp. */
__device__ static inline void plan_sum(struct attend_plan *plan, int n_rows, int n_kv_heads) {
    int before = 0;
    for (int first = 0; first < n_rows; first += WARP) {
        const int row = first + (int)threadIdx.x % WARP, own = row < n_rows ? max(plan->row[row].n_tiles, 0) * n_kv_heads : 0;
        int sum = own;
        for (int offset = 1; offset < min(WARP, n_rows); offset *= 2) {
            int other = __shfl_up_sync(0xffffffffu, sum, offset);
            sum += (int)threadIdx.x % WARP >= offset ? other : 0;
        }
        if (row < n_rows)
            plan->row[row].begin = before + sum - own;
        before += __shfl_sync(0xffffffffu, sum, min(WARP, n_rows - first) - 1);
    }
    if (threadIdx.x % WARP == 0)
        plan->row[n_rows].begin = before;
}

/* Fills the plan; all threads of a CTA, which has at least a warp. any_run: rows of long runs are left to attend_block.cu. Ends with a
 * barrier. */
template <bool SLICED>
__device__ static inline void plan_make(const struct attend_args *args, const struct attend_shape *shape, bool any_run,
                                        struct attend_plan *plan) {
    const int n_rows = attend_n_rows(args);
    for (int row = (int)threadIdx.x; row < args->n_rows; row += (int)blockDim.x)
        plan->row[row].n_tiles = plan_row<SLICED>(args, n_rows, row, any_run, &plan->row[row].view);
    if (args->n_rows > WARP)
        __syncthreads();
    else
        __syncwarp();
    if (threadIdx.x < WARP) {
        plan_sum(plan, args->n_rows, args->layout.n_kv_heads);
        __syncwarp();
        const int n_tiles = plan->row[args->n_rows].begin;
        const bool few = n_tiles <= shape->few_tiles;
        const int n_ctas = few ? shape->few_ctas : (int)gridDim.x;
        const struct plan_side side = few ? shape->side.few : shape->side.all;
        const struct equal_shares share = equal_shares_of(n_tiles, n_ctas);
        plan->n_ctas = n_ctas;
        plan->share = share;
        plan->side = side;
        const int begin = share_begin(&share, (int)blockIdx.x), n = share_begin(&share, (int)blockIdx.x + 1) - begin;
        if ((int)threadIdx.x <= shape->n_teams)
            plan->team[threadIdx.x] = begin + team_begin_of(shape, &side, n, (int)threadIdx.x);
    }
    __syncthreads();
}

/* Of a segment: its tiles begin .. end - 1 of all. */
struct attend_segment {
    int row, kv_head, begin, end;
};
__device__ static inline struct attend_segment plan_segment(const struct attend_plan *plan, int row, int kv_head) {
    const int n = plan->row[row].n_tiles, begin = plan->row[row].begin + kv_head * n;
    return {row, kv_head, begin, begin + n};
}

/* A place in the walk over tiles: tile `index` of the n of a segment. What is needed for each of its pages is kept. */
struct attend_cursor {
    int row, kv_head, index, n;
    int n_pages;            /* tiles in pages: the first ones */
    const int32_t *table;   /* the row's page ids */
    const uint8_t *pages;   /* the KV head's record in page 0 */
    int ids_from, id;       /* this lane's page id: of the row's local page ids_from + lane */
};

/* The first tile of a segment; n = 0 behind the last one. */
template <bool SLICED>
__device__ static inline void cursor_enter(const struct attend_args *args, const struct attend_plan *plan, struct attend_cursor *at) {
    if (at->n == 0)
        return;
    const struct attend_view *view = &plan->row[at->row].view;
    at->n_pages = view->n_pages * (SLICED ? KV_BLOCK / ATTEND_SLICE : 1);
    at->table = args->page_table + view->seq * args->table_stride;
    at->pages = attend_page_at(args, 0, at->kv_head);
    at->ids_from = INT32_MIN / 2;
}

/* Id of the page of the tile, which has one. A warp reads 32 at a time. */
template <bool SLICED> __device__ static inline int cursor_page_id(struct attend_cursor *at) {
    const int per_page = SLICED ? KV_BLOCK / ATTEND_SLICE : 1, local = at->index / per_page;
    if (local >= at->ids_from + WARP) {
        at->ids_from = local;
        const int own = local + (int)threadIdx.x % WARP;
        at->id = own < at->n_pages / per_page ? at->table[own] : 0;
    }
    return __shfl_sync(0xffffffffu, at->id, local - at->ids_from);
}

/* At tile `tile` of all, below the total. By a warp. */
template <bool SLICED>
__device__ static inline struct attend_cursor cursor_at(const struct attend_args *args, const struct attend_plan *plan, int tile) {
    int row = -1; /* the last that begins at or before the tile: it is not empty */
    for (int first = 0; first < args->n_rows; first += WARP) {
        const int other = first + (int)threadIdx.x % WARP;
        row += __popc(__ballot_sync(0xffffffffu, other < args->n_rows && plan->row[other].begin <= tile));
    }
    struct attend_cursor at = {row, 0, 0, plan->row[row].n_tiles, 0, NULL, NULL, 0, 0};
    const unsigned within = (unsigned)(tile - plan->row[row].begin);
    at.kv_head = (int)(within / (unsigned)at.n);
    at.index = (int)(within % (unsigned)at.n);
    cursor_enter<SLICED>(args, plan, &at);
    return at;
}

/* To the next tile; n = n_pages = 0 behind the last. True where another segment begins. */
template <bool SLICED>
__device__ static inline bool cursor_next(const struct attend_args *args, const struct attend_plan *plan, struct attend_cursor *at) {
    if (++at->index < at->n)
        return false;
    at->index = 0;
    if (++at->kv_head == args->layout.n_kv_heads) {
        at->kv_head = at->n_pages = 0;
        do
            at->n = ++at->row < args->n_rows ? max(plan->row[at->row].n_tiles, 0) : 0;
        while (at->n == 0 && at->row < args->n_rows);
    }
    cursor_enter<SLICED>(args, plan, at);
    return true;
}
