/* The decode kernel: each team of warps walks its tiles (attend_plan.cuh) through rings of stages in shared memory; copies run ahead by
 * as many tiles as a warp has stages; all state of a segment is in registers. What comes of it: attend_merge.cuh.
 *
 * In bounds: a page's copy is exactly its record; a slice's copies are rows below its n, which are tokens that the row sees, so they lie in
 * the sink's, the slot's or the record's [..][D]; the rest of the slice's rows are zeroed, since a NaN times a weight of 0 is a NaN.
 * Reads of a stage: page parts as laid out in page.cuh, slices 16 rows of row_stride bytes for K and then for V. A warp's pieces of its
 * pass' heads fit a stage: the launcher checks it. */
#pragma once

#include "kernels/cuda/attend_correct.cuh"
#include "kernels/cuda/attend_merge.cuh"
#include "kernels/cuda/attend_tile.cuh"

enum {
    DECODE_MAX_STAGES = 3,
    DECODE_ROW_PAD = 16,       /* bytes behind a slice's row: ldmatrix then meets each bank once */
};

#define LOG2_E 1.4426950408889634f

HOST_DEVICE static inline int decode_row_stride(int head_dim) { return 2 * head_dim + DECODE_ROW_PAD; }

/* Constants of a kernel. Bits 0: read from the format (2, 4, 8, 16 in any pair but 16, 16), always with PLUS: layer.rotate_k and
 * layer.mean count. */
template <int D_, typename T_, int BITS_, bool SPLIT_, bool PLUS_> struct decode_config {
    static constexpr int D = D_, BITS = BITS_;
    static constexpr bool SPLIT = SPLIT_, PLUS = PLUS_, SLICED = BITS_ == 16;
    static constexpr int MAX_WARPS = SPLIT && !PLUS ? DECODE_MAX_WARPS : DECODE_MAX_WARPS_WIDE; /* of a CTA */
    typedef T_ T;
};

/* One warp's part of the step. */
template <class C> struct decode_warp {
    const struct attend_args *args;
    const struct attend_shape *shape;
    const struct attend_plan *plan;
    int lane, first_head, n_heads; /* query heads of the group that this warp takes, from first_head on */
    uint8_t *stages;
    uint64_t *barriers;
    bool waited;                   /* for the kernel in front */
    struct attend_cursor at;       /* tile that is computed */
    enum { NO_QUERY, CODE_QUERY, ROW_QUERY } loaded;
    struct tile_query<C::D> query;
    struct tile_sums<C::D> sums;
};

/* ---- copies --------------------------------------------------------------------------------------------------------- */

/* Before it reads what the kernel in front may have written, and before it writes what others read. */
template <class C> __device__ __forceinline__ void decode_wait(struct decode_warp<C> &w) {
    if (!w.waited)
        wait_for_earlier();
    w.waited = true;
}

/* Is the tile an encoded page? Else it is a slice. */
template <class C> __device__ __forceinline__ bool decode_is_page(const struct attend_cursor &at) { return !C::SLICED && at.index < at.n_pages; }

/* Bytes of a page's record. */
template <class C> __device__ __forceinline__ int decode_record_bytes(const struct decode_warp<C> &w) {
    return C::BITS == 2 ? KV_BLOCK * C::D / 2 + 4 * C::D + 4 * KV_BLOCK : page_record_size(&w.args->layer.format);
}

/* The tokens of a slice, of a page in 16 bit (id: the page's) or of the stores. */
template <class C>
__device__ __forceinline__ struct attend_tokens decode_tokens(const struct decode_warp<C> &w, const struct attend_cursor &at, int id) {
    const int per_block = KV_BLOCK / ATTEND_SLICE, row_bytes = 2 * C::D;
    const struct attend_view *view = &w.plan->row[at.row].view;
    if (!C::SLICED || at.index >= at.n_pages)
        return plan_slice<C::D>(w.args, view, at.kv_head, at.index - at.n_pages);
    const int token = at.index % per_block * ATTEND_SLICE;
    const uint8_t *k = at.pages + id * w.args->layer.page_stride + token * row_bytes;
    return {token < attend_page_begin(w.args, view, at.index / per_block) ? 0 : ATTEND_SLICE, k, k + KV_BLOCK * row_bytes};
}

template <class C> __device__ __forceinline__ void decode_copy_page(struct decode_warp<C> &w, struct attend_cursor &at, int stage) {
    uint8_t *to = w.stages + stage * w.shape->stage_bytes;
    const uint8_t *from = at.pages + cursor_page_id<C::SLICED>(&at) * w.args->layer.page_stride;
    const int bytes = decode_record_bytes<C>(w);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (w.lane == 0) {
        stage_expect(w.barriers + stage, (uint32_t)bytes);
        stage_copy(to, from, (uint32_t)bytes, w.barriers + stage);
    }
#else
    for (int i = w.lane * 16; i < bytes; i += WARP * 16)
        stage_copy(to + i, from + i, 16, w.barriers + stage);
#endif
}

template <class C> __device__ __forceinline__ void decode_copy_slice(struct decode_warp<C> &w, struct attend_cursor &at, int stage) {
    const int row_bytes = 2 * C::D, row = w.lane % ATTEND_SLICE, part = w.lane / ATTEND_SLICE;
    uint8_t *to = w.stages + stage * w.shape->stage_bytes + (part * ATTEND_SLICE + row) * decode_row_stride(C::D);
    if (at.index >= at.n_pages && !w.shape->early_window)
        decode_wait<C>(w); /* a block in 16 bit, to which this step's tokens were just appended */
    const int id = C::SLICED && at.index < at.n_pages ? cursor_page_id<C::SLICED>(&at) : 0;
    const struct attend_tokens slice = decode_tokens<C>(w, at, id);
    if (w.lane == 0)
        stage_expect(w.barriers + stage, (uint32_t)(2 * slice.n * row_bytes));
    __syncwarp();
    if (row < slice.n) {
        stage_copy(to, (part ? slice.v : slice.k) + row * row_bytes, row_bytes, w.barriers + stage);
    } else {
#pragma unroll 1
        for (int i = 0; i < row_bytes; i += 16)
            *(uint4 *)(to + i) = make_uint4(0, 0, 0, 0);
        stage_fence();
    }
}

/* Starts the copy of tile `at` into stage `stage`. All lanes; they have read what was there before. */
template <class C> __device__ __forceinline__ void decode_copy(struct decode_warp<C> &w, struct attend_cursor &at, int stage) {
    if (decode_is_page<C>(at))
        decode_copy_page<C>(w, at, stage);
    else
        decode_copy_slice<C>(w, at, stage);
    stage_commit();
}

/* ---- one tile --------------------------------------------------------------------------------------------------------- */

/* q of the pass' first head in this row. */
template <class C> __device__ __forceinline__ const typename C::T *decode_q(const struct decode_warp<C> &w) {
    const int group = w.args->n_heads / w.args->layout.n_kv_heads;
    int64_t head = (int64_t)w.at.row * w.args->n_heads + w.at.kv_head * group + w.first_head + lane_head<C::SPLIT>(w.lane);
    return (const typename C::T *)w.args->q + head * C::D;
}

/* Loads q in the form that the tile takes, once per segment and form. */
template <class C> __device__ __forceinline__ void decode_load_query(struct decode_warp<C> &w, bool codes) {
    const bool there = lane_head<C::SPLIT>(w.lane) < w.n_heads;
    const float scale = w.args->scale * LOG2_E;
    if (codes && w.loaded != decode_warp<C>::CODE_QUERY) {
        query_for_codes<C::D, typename C::T, C::PLUS>(decode_q(w), there, w.lane, scale, w.args->layer.rotate_k, w.query);
        w.loaded = decode_warp<C>::CODE_QUERY;
    } else if (!codes && w.loaded != decode_warp<C>::ROW_QUERY) {
        query_for_rows<C::D, typename C::T>(decode_q(w), there, w.lane, scale, w.query);
        w.loaded = decode_warp<C>::ROW_QUERY;
    }
}

template <class C> __device__ __forceinline__ bool decode_takes_codes(const struct decode_warp<C> &w) {
    return decode_is_page<C>(w.at) && (C::BITS == 2 || w.args->layer.format.k_bits < 16);
}

template <class C> __device__ __forceinline__ void decode_prepare_mean(const struct decode_warp<C> &w, int local,
                                                                       struct tile_mean<C::D> &mean) {
    const struct cache_layer *layer = &w.args->layer;
    mean.rows = layer->mean;
    if (!C::PLUS || !layer->mean)
        return;
    mean.rows += (int64_t)w.at.kv_head * KV_BLOCK * C::D;
    const int block = w.plan->row[w.at.row].view.first_owned + local * w.args->layout.cp_size;
    mean_prepare<C::D, typename C::T, C::SPLIT>(decode_q(w), lane_head<C::SPLIT>(w.lane) < w.n_heads, w.lane, w.args->scale * LOG2_E,
                                                layer->inv_freq, block, mean);
}

template <class C> __device__ __forceinline__ void decode_page(struct decode_warp<C> &w, const uint8_t *record, int local) {
    constexpr int N = C::SPLIT ? 4 : 8;
    const struct page_format *format = &w.args->layer.format;
    const int k_bits = C::BITS ? C::BITS : format->k_bits, v_bits = C::BITS ? C::BITS : format->v_bits;
    const int v_offset = k_bits == 16 ? KV_BLOCK * C::D * 2 : KV_BLOCK * C::D * k_bits / 8 + 4 * C::D; /* page_v_offset */
    float s[N][4], factor[2], offset[2], gain[2];
    if (k_bits < 16) {
        struct tile_mean<C::D> mean;
        decode_prepare_mean<C>(w, local, mean);
        code_scores<C::D, C::SPLIT, C::PLUS>(bits_log2(k_bits), record, w.lane, w.query, mean, s, factor, offset);
    } else {
        row_scores<C::D, typename C::T, C::SPLIT>(record, w.lane, w.query, s);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            factor[e] = w.query.unit[e];
            offset[e] = 0.0f;
        }
    }
    const int begin = local == 0 ? attend_page_begin(w.args, &w.plan->row[w.at.row].view, 0) : 0;
    if (begin > 0) {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (16 * (i + (C::SPLIT && lane_is_second(w.lane) ? 4 : 0)) < begin)
                s[i][0] = s[i][1] = s[i][2] = s[i][3] = -INFINITY;
    }
    tile_weights<C::D, N>(s, factor, offset, w.sums, gain);
    if (v_bits < 16)
        code_values<C::D, C::SPLIT>(bits_log2(v_bits), record + v_offset, w.lane, s, gain, w.sums);
    else
        row_values<C::D, typename C::T, C::SPLIT, N, TILE_STEPS>(record + v_offset, 2 * C::D, w.lane, s, gain, w.sums);
}

/* n of the slice's tokens count; where SPLIT they all go to columns 0-3. */
template <class C> __device__ __forceinline__ void decode_slice(struct decode_warp<C> &w, const uint8_t *rows, int n) {
    const int stride = decode_row_stride(C::D);
    float s[1][4], gain[2];
    const float offset[2] = {0.0f, 0.0f};
    row_product<C::D, typename C::T>(rows, stride, w.lane, w.query, s[0]);
    const bool nothing = C::SPLIT && lane_is_second(w.lane);
#pragma unroll
    for (int r = 0; r < 4; r++)
        s[0][r] = nothing || w.lane / 4 + 8 * (r / 2) >= n ? -INFINITY : s[0][r];
    tile_weights<C::D, 1>(s, w.query.unit, offset, w.sums, gain);
    row_values<C::D, typename C::T, C::SPLIT, 1, 1>(rows + ATTEND_SLICE * stride, stride, w.lane, s, gain, w.sums);
}

/* ---- pieces ----------------------------------------------------------------------------------------------------------- */

__device__ static inline float lanes_of_column_sum(float x) {
#pragma unroll
    for (int lanes = 4; lanes < WARP; lanes *= 2)
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

/* Joins columns c and c + 4, which hold the same head. Both lanes end with the same sums. */
template <int D> __device__ __forceinline__ void sums_join(struct tile_sums<D> &sums) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float m = fmaxf(sums.m[e], __shfl_xor_sync(0xffffffffu, sums.m[e], 2));
        const float factor = sums.m[e] == m ? 1.0f : fast_exp2(sums.m[e] - m); /* also where both are -inf */
        float l = sums.l[e] * factor, zero = sums.zero[e] * factor;
        sums.m[e] = m;
        sums.l[e] = l + __shfl_xor_sync(0xffffffffu, l, 2);
        sums.zero[e] = zero + __shfl_xor_sync(0xffffffffu, zero, 2);
#pragma unroll
        for (int j = 0; j < D / 16; j++)
#pragma unroll
            for (int r = e; r < 4; r += 2) {
                float y = sums.y[j][r] * factor;
                sums.y[j][r] = y + __shfl_xor_sync(0xffffffffu, y, 2);
            }
    }
}

/* Pieces of this warp's heads to `to` [n_heads][piece_floats], and starts anew. */
template <class C> __device__ __forceinline__ void decode_leave(struct decode_warp<C> &w, float *to) {
    constexpr int D = C::D;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        w.sums.l[e] = lanes_of_column_sum(w.sums.l[e]);
        w.sums.zero[e] = lanes_of_column_sum(w.sums.zero[e]);
    }
    if (C::SPLIT)
        sums_join<D>(w.sums);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int column = w.lane % 4 * 2 + e;
        if (column < w.n_heads) { /* at most 4 where SPLIT */
            float *out = to + column * piece_floats(D);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                out[16 * j + w.lane / 4] = w.sums.y[j][e] + w.sums.zero[e];
                out[16 * j + w.lane / 4 + 8] = w.sums.y[j][e + 2] + w.sums.zero[e];
            }
            if (w.lane < 4) {
                out[D] = w.sums.m[e];
                out[D + 1] = w.sums.l[e];
            }
        }
    }
    sums_clear<D>(w.sums);
    w.loaded = decode_warp<C>::NO_QUERY;
}

/* ---- the walk ----------------------------------------------------------------------------------------------------------- */

/* The end of a segment, or of the team's tiles [begin, end): what is known of it goes where it is looked for. That of a segment which the team
 * has alone is a piece of the CTA at once. */
template <class C>
__device__ __forceinline__ void decode_end_segment(struct decode_warp<C> &w, struct attend_plan *plan, int team, int begin, int end, bool over) {
    const struct attend_segment s = plan_segment(plan, w.at.row, w.at.kv_head);
    const int n_kv_heads = w.args->layout.n_kv_heads, group = w.args->n_heads / n_kv_heads, segment = w.at.row * n_kv_heads + w.at.kv_head;
    const bool whole = s.begin >= begin && s.end <= end, first = s.begin < begin;
    float *to = (float *)w.stages;
    if (whole)
        to = cta_piece(w.shape, (int)blockIdx.x, segment, group, w.first_head, C::D);
    else if (!over)
        to = w.shape->team_pieces + (((int64_t)blockIdx.x * w.shape->n_teams + team) * group + w.first_head) * piece_floats(C::D);
    __syncwarp(); /* all lanes have read the stage */
    decode_leave<C>(w, to);
    if (!whole && w.first_head == 0 && w.lane == 0 && (!first || begin == plan->team[0]))
        plan->edge[2 * team + (first ? 0 : 1)] = segment; /* no earlier team of the CTA has it */
}

/* What follows for the segments that the team has alone. */
template <class C>
__device__ __forceinline__ void decode_finish_segments(const struct decode_warp<C> &w, const struct attend_plan *plan, int begin, int end) {
    struct attend_cursor at = cursor_at<C::SLICED>(w.args, plan, begin);
    __syncwarp();
#pragma unroll 1
    for (struct attend_segment s = plan_segment(plan, at.row, at.kv_head); s.begin < end && at.n > 0;
         s = plan_segment(plan, at.row, at.kv_head)) {
#pragma unroll 1
        for (int i = w.first_head; i < w.first_head + w.n_heads && s.begin >= begin && s.end <= end; i++)
            head_close<C::D>(w.args, w.shape, s, i, {(int)blockIdx.x, 1});
        at.index = at.n - 1;
        if (cursor_next<C::SLICED>(w.args, plan, &at) && at.n == 0)
            return;
    }
}

/* Tiles begin .. end - 1, at least one. */
template <class C>
__device__ __forceinline__ void decode_walk(struct decode_warp<C> &w, struct attend_plan *plan, int team, int begin, int end) {
    const int n_stages = w.shape->n_stages, n = end - begin;
    struct attend_cursor ahead;
    w.at = ahead = cursor_at<C::SLICED>(w.args, plan, begin);
    w.loaded = decode_warp<C>::NO_QUERY;
    sums_clear<C::D>(w.sums);
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int i = -n_stages; i < n; i++) { /* tile i is computed, tile i + n_stages copied into the stage that it leaves */
        if (i >= 0 || i == -n_stages) /* the first before any copy: behind them it would wait until they are through */
            decode_load_query<C>(w, decode_takes_codes<C>(w));
        if (i >= 0) {
            const uint8_t *data = w.stages + stage * w.shape->stage_bytes;
            stage_wait(w.barriers + stage, parity, n_stages);
            if (!decode_is_page<C>(w.at))
                decode_slice<C>(w, data, decode_tokens<C>(w, w.at, 0).n);
            else if constexpr (!C::SLICED)
                decode_page<C>(w, data, w.at.index);
            const bool over = i == n - 1;
            if (w.at.index == w.at.n - 1 || over)
                decode_end_segment<C>(w, plan, team, begin, end, over);
            cursor_next<C::SLICED>(w.args, plan, &w.at);
            __syncwarp();
        }
        if (i + n_stages < n) {
            decode_copy<C>(w, ahead, stage);
            cursor_next<C::SLICED>(w.args, plan, &ahead);
            __syncwarp();
        } else {
            stage_commit();
        }
        if (++stage == n_stages) {
            stage = 0;
            parity ^= i >= 0;
        }
    }
}

template <class C>
static __global__ void __launch_bounds__(C::MAX_WARPS *WARP, DECODE_CTAS)
    attend_kernel(const __grid_constant__ struct attend_args args, const __grid_constant__ struct attend_shape shape, bool any_run) {
    extern __shared__ __align__(128) uint8_t stages[];
    struct attend_plan &plan = *(struct attend_plan *)(stages + shape.n_warps * shape.n_stages * shape.stage_bytes);
    __shared__ uint64_t barriers[C::MAX_WARPS * DECODE_MAX_STAGES];
    const int warp = (int)threadIdx.x / WARP, team = warp / shape.n_passes;
    for (int i = (int)threadIdx.x; i < shape.n_warps * shape.n_stages; i += (int)blockDim.x)
        stage_init(&barriers[i]);
    if ((int)threadIdx.x < 2 * shape.n_teams)
        plan.edge[threadIdx.x] = -1;
    stage_fence();
    if (!shape.early)
        wait_for_earlier();
    let_later_begin(); /* before it waits, against the rule: can_be_early says why */
    plan_make<C::SLICED>(&args, &shape, any_run, &plan);
    if ((int)blockIdx.x >= plan.n_ctas)
        return; /* others wait for the kernel in front */
    struct decode_warp<C> w;
    const int group = args.n_heads / args.layout.n_kv_heads, pass = warp % shape.n_passes, begin = plan.team[team], end = plan.team[team + 1];
    w.args = &args;
    w.shape = &shape;
    w.plan = &plan;
    w.lane = (int)threadIdx.x % WARP;
    w.first_head = pass * shape.pass_heads;
    w.n_heads = min(group - w.first_head, shape.pass_heads);
    w.stages = stages + (int64_t)warp * shape.n_stages * shape.stage_bytes;
    w.barriers = barriers + warp * shape.n_stages;
    w.waited = false;
    const int side = pass == 0 ? team - (shape.n_teams - plan.side.n_warps) : -1; /* this warp among those of the correction */
    if (side >= 0 && shape.side.heads == 1)
        side_logits<C::D, typename C::T, 1>(&args, &shape, &plan, side);
    else if (side >= 0)
        side_logits<C::D, typename C::T, SIDE_MAX_HEADS>(&args, &shape, &plan, side);
    if (begin < end)
        decode_walk<C>(w, &plan, team, begin, end);
    const int n_joiners = shape.n_warps - plan.side.n_warps * shape.n_passes; /* the correction's warps have their own work to do */
    if (warp < n_joiners) {
        barrier_wait((int)blockDim.x);
        join_teams<C::D>(&args, &shape, &plan, stages, n_joiners);
    } else {
        barrier_arrive((int)blockDim.x);
        if (side >= 0 && shape.side.heads == 1)
            side_states<C::D, 1>(&args, &shape, &plan, side);
        else if (side >= 0)
            side_states<C::D, SIDE_MAX_HEADS>(&args, &shape, &plan, side);
    }
    if (begin < end)
        decode_finish_segments<C>(w, &plan, begin, end);
    decode_wait<C>(w);
    empty_rows<C::D>(&args, &shape, &plan);
}
