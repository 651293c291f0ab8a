/* The decode kernel: each warp walks its range of tiles (attend_plan.cuh) through a ring of stages in shared memory and leaves a piece
 * for each segment that it touched. Copies run ahead by as many tiles as a warp has stages; all state of a segment is in registers.
 *
 * In bounds: a page's copy is exactly its record; a slice's copies are rows below its n, which are tokens that the row sees, so they lie in
 * the sink's, the slot's or the record's [..][D]; the rest of the slice's rows are zeroed, since a NaN times a weight of 0 is a NaN.
 * Reads of a stage: page parts as laid out in page.cuh, slices 16 rows of row_stride bytes for K and then for V. A piece index is at most
 * n_teams - 1 + n_rows n_kv_heads - 1, which the launcher checked against the scratch. */
#pragma once

#include "kernels/cuda/attend_plan.cuh"
#include "kernels/cuda/attend_tile.cuh"

enum {
    DECODE_MAX_WARPS = 12,     /* of a CTA: 168 registers a thread, enough for four heads and nothing but the usual */
    DECODE_MAX_WARPS_WIDE = 8, /* with eight heads a warp, or with bits that are read or mean keys: up to 255 registers */
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
    static constexpr int MAX_WARPS = SPLIT && !PLUS ? DECODE_MAX_WARPS : DECODE_MAX_WARPS_WIDE;
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
    struct attend_cursor at;       /* tile that is computed */
    enum { NO_QUERY, CODE_QUERY, ROW_QUERY } loaded;
    struct tile_query<C::D> query;
    struct tile_sums<C::D> sums;
};

/* ---- copies --------------------------------------------------------------------------------------------------------- */

/* Starts the copy of tile `at` into stage `stage`. All lanes; they have read what was there before. */
template <class C> __device__ __forceinline__ void decode_copy(const struct decode_warp<C> &w, const struct attend_cursor &at, int stage) {
    const int row_bytes = 2 * C::D, row_stride = decode_row_stride(C::D);
    uint8_t *to = w.stages + stage * w.shape->stage_bytes;
    uint64_t *barrier = w.barriers + stage;
    const struct attend_tile tile = plan_tile<C::D, C::SLICED>(w.args, &w.plan->view[at.row], at.kv_head, at.index, at.page_id);
    if (!C::SLICED && tile.page) {
        const int bytes = page_record_size(&w.args->layer.format);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (w.lane == 0) {
            stage_expect(barrier, (uint32_t)bytes);
            stage_copy(to, tile.k, (uint32_t)bytes, barrier);
        }
#else
        for (int i = w.lane * 16; i < bytes; i += WARP * 16)
            stage_copy(to + i, tile.k + i, 16, barrier);
#endif
    } else {
        const int row = w.lane % ATTEND_SLICE, part = w.lane / ATTEND_SLICE;
        to += (part * ATTEND_SLICE + row) * row_stride;
        if (w.lane == 0)
            stage_expect(barrier, (uint32_t)(2 * tile.n * row_bytes));
        __syncwarp();
        if (row < tile.n) {
            stage_copy(to, (part ? tile.v : tile.k) + row * row_bytes, row_bytes, barrier);
        } else {
            for (int i = 0; i < row_bytes; i += 16)
                *(uint4 *)(to + i) = make_uint4(0, 0, 0, 0);
            stage_fence();
        }
    }
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

template <class C> __device__ __forceinline__ void decode_prepare_mean(const struct decode_warp<C> &w, int local,
                                                                       struct tile_mean<C::D> &mean) {
    const struct cache_layer *layer = &w.args->layer;
    mean.rows = layer->mean;
    if (!C::PLUS || !layer->mean)
        return;
    mean.rows += (int64_t)w.at.kv_head * KV_BLOCK * C::D;
    const int block = w.plan->view[w.at.row].first_owned + local * w.args->layout.cp_size;
    mean_prepare<C::D, typename C::T, C::SPLIT>(decode_q(w), lane_head<C::SPLIT>(w.lane) < w.n_heads, w.lane, w.args->scale * LOG2_E,
                                                layer->inv_freq, block, mean);
}

template <class C> __device__ __forceinline__ void decode_page(struct decode_warp<C> &w, const uint8_t *record, int local) {
    constexpr int N = C::SPLIT ? 4 : 8;
    const struct page_format *format = &w.args->layer.format;
    const int k_bits = C::BITS ? C::BITS : format->k_bits, v_bits = C::BITS ? C::BITS : format->v_bits;
    const int v_offset = k_bits == 16 ? KV_BLOCK * C::D * 2 : KV_BLOCK * C::D * k_bits / 8 + 4 * C::D; /* page_v_offset */
    float s[N][4], factor[2], offset[2], gain[2];
    decode_load_query<C>(w, k_bits < 16);
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
    const int begin = attend_page_begin(w.args, &w.plan->view[w.at.row], local);
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
    decode_load_query<C>(w, false);
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

/* Writes what this warp has of the segment as piece team + segment, and starts anew. */
template <class C> __device__ __forceinline__ void decode_write_piece(struct decode_warp<C> &w, int team) {
    constexpr int D = C::D;
    const int group = w.args->n_heads / w.args->layout.n_kv_heads;
    const int64_t piece = team + (int64_t)w.at.row * w.args->layout.n_kv_heads + w.at.kv_head;
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
            float *out = w.shape->pieces + (piece * group + w.first_head + column) * piece_floats(D);
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

/* ---- the kernel --------------------------------------------------------------------------------------------------------- */

/* n > 0 tiles from `first` on. */
template <class C> __device__ __forceinline__ void decode_walk(struct decode_warp<C> &w, int team, int first, int n) {
    const int n_stages = w.shape->n_stages, n_kv_heads = w.args->layout.n_kv_heads;
    struct attend_cursor ahead;
    w.at = ahead = cursor_at(w.plan, first);
    w.loaded = decode_warp<C>::NO_QUERY;
    sums_clear<C::D>(w.sums);
    cursor_look_up<C::SLICED>(w.args, w.plan, &ahead);
    int stage = 0;
    uint32_t parity = 0;
    for (int i = -n_stages; i < n; i++) { /* tile i is computed, tile i + n_stages copied into the stage that it leaves */
        if (i >= 0) {
            stage_wait(w.barriers + stage, parity, n_stages);
            const uint8_t *data = w.stages + stage * w.shape->stage_bytes;
            const struct attend_tile tile = plan_tile<C::D, C::SLICED>(w.args, &w.plan->view[w.at.row], w.at.kv_head, w.at.index, 0);
            if (!tile.page)
                decode_slice<C>(w, data, tile.n);
            else if constexpr (!C::SLICED)
                decode_page<C>(w, data, tile.local);
            struct attend_cursor next = w.at;
            if (cursor_next(w.plan, n_kv_heads, &next) || i == n - 1)
                decode_write_piece<C>(w, team);
            w.at = next;
            __syncwarp();
        }
        if (i + n_stages < n) {
            decode_copy<C>(w, ahead, stage);
            cursor_next(w.plan, n_kv_heads, &ahead);
            cursor_look_up<C::SLICED>(w.args, w.plan, &ahead);
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
static __global__ void __launch_bounds__(C::MAX_WARPS *WARP, 1)
    attend_kernel(const __grid_constant__ struct attend_args args, const __grid_constant__ struct attend_shape shape) {
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ struct attend_plan plan;
    __shared__ uint64_t barriers[C::MAX_WARPS * DECODE_MAX_STAGES];
    const int warp = (int)threadIdx.x / WARP, n_threads = (int)blockDim.x;
    for (int i = (int)threadIdx.x; i < shape.n_warps * shape.n_stages; i += n_threads)
        stage_init(&barriers[i]);
    stage_fence();
    wait_for_earlier();
    plan_make<C::SLICED>(&args, &plan);
    if (blockIdx.x == 0)
        for (int i = (int)threadIdx.x; i <= STEP_MAX_ROWS; i += n_threads)
            shape.begin[i] = plan.begin[i];
    /* Neighbours in the order of tiles are warps of different CTAs: few tiles spread over the device. */
    const int team = warp / shape.n_passes * (int)gridDim.x + (int)blockIdx.x;
    const struct team_share share = team_share_of(plan.begin[STEP_MAX_ROWS], shape.n_teams);
    const int first = team_begin(&share, team), end = team_begin(&share, team + 1);
    if (first == end)
        return;
    struct decode_warp<C> w;
    const int group = args.n_heads / args.layout.n_kv_heads;
    w.args = &args;
    w.shape = &shape;
    w.plan = &plan;
    w.lane = (int)threadIdx.x % WARP;
    w.first_head = warp % shape.n_passes * shape.pass_heads;
    w.n_heads = min(group - w.first_head, shape.pass_heads);
    w.stages = stages + (int64_t)warp * shape.n_stages * shape.stage_bytes;
    w.barriers = barriers + warp * shape.n_stages;
    decode_walk<C>(w, team, first, end - first);
}
