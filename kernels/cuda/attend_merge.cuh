/* From what teams know of a segment to its output. A team that has a whole segment delivers it; else its CTA joins what its teams left, and
 * where a segment reaches over several CTAs, or waits for its correction, the last to arrive joins theirs. Who is last depends on
 * time, what it adds and in which order does not.
 *
 * A piece is Y [D], m (of base 2), l of one query head. One warp takes one head of one segment, D / 32 channels a lane. */
#pragma once

#include "kernels/cuda/attend_mma.cuh"
#include "kernels/cuda/attend_plan.cuh"

enum {
    JOIN_AT_ONCE = 4,   /* pieces of teams, from shared memory: few instructions, which few warps run and so have to fetch */
    CLOSE_AT_ONCE = 18, /* of CTAs, from the second-level cache: what 8 KV heads of one sequence have on 132 multiprocessors, in one go */
};

#define LN_2 0.69314718055994531f

/* What a warp holds of one head: channels lane * D / 32 .. of y, the same m and l in all lanes. */
template <int D> struct head_sums {
    static constexpr int PER_LANE = D / WARP;
    float y[PER_LANE], m, l;
};

template <int D> __device__ __forceinline__ void head_load(const float *piece, int lane, float (&y)[D / WARP]) {
    if constexpr (D / WARP == 4) {
        const float4 four = *(const float4 *)(piece + 4 * lane);
        y[0] = four.x, y[1] = four.y, y[2] = four.z, y[3] = four.w;
    } else {
        const float2 two = *(const float2 *)(piece + 2 * lane);
        y[0] = two.x, y[1] = two.y;
    }
}
template <int D> __device__ __forceinline__ void head_store(float *to, int lane, const float (&y)[D / WARP]) {
    if constexpr (D / WARP == 4)
        *(float4 *)(to + 4 * lane) = make_float4(y[0], y[1], y[2], y[3]);
    else
        *(float2 *)(to + 2 * lane) = make_float2(y[0], y[1]);
}

/* n pieces of one head, added in order: piece i is at first + i * stride floats, but the last one at `last`. */
struct piece_list {
    const float *first, *last;
    int stride, n;
};
__device__ __forceinline__ const float *piece_at(const struct piece_list &list, int i) {
    return i >= list.n - 1 ? list.last : list.first + (int64_t)i * list.stride;
}

/* AT_ONCE <= 32 pieces at a time. A warp works here alone, so what counts is the length of its chain: loads of Y go out first, and each lane
 * weighs one piece. */
template <int D, int AT_ONCE> __device__ __forceinline__ void head_join(const struct piece_list &list, struct head_sums<D> &sums) {
    const int lane = (int)threadIdx.x % WARP;
    sums.m = -INFINITY;
    sums.l = 0.0f;
#pragma unroll
    for (int c = 0; c < D / WARP; c++)
        sums.y[c] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < list.n; i += AT_ONCE) {
        float y[AT_ONCE][D / WARP];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (i + k < list.n)
                head_load<D>(piece_at(list, i + k), lane, y[k]);
        float2 tail = make_float2(-INFINITY, 0.0f);
        if (lane < AT_ONCE && i + lane < list.n)
            tail = *(const float2 *)(piece_at(list, i + lane) + D);
        const float m = fmaxf(sums.m, warp_max(tail.x)), old = sums.m == -INFINITY ? 0.0f : fast_exp2(sums.m - m);
        const float weight = tail.x == -INFINITY ? 0.0f : fast_exp2(tail.x - m);
        sums.l = fmaf(sums.l, old, warp_sum(tail.y * weight));
        sums.m = m;
#pragma unroll
        for (int c = 0; c < D / WARP; c++)
            sums.y[c] *= old;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const float factor = __shfl_sync(0xffffffffu, weight, k);
            if (i + k < list.n)
#pragma unroll
                for (int c = 0; c < D / WARP; c++)
                    sums.y[c] = fmaf(y[k][c], factor, sums.y[c]);
        }
    }
}

/* ---- the end ---------------------------------------------------------------------------------------------------------- */

/* C_n of a head, C_d behind it. */
template <int D> __device__ __forceinline__ float *side_sums(const struct attend_args *args, const struct attend_shape *shape, int row, int head) {
    return shape->side.sums + ((int64_t)row * args->n_heads + head) * piece_floats(D);
}

/* Y, m, l of a whole segment, and what the side found, to the record; or all together, with what another kernel may have left in the record, to
 * the output. */
template <int D>
__device__ __forceinline__ void head_finish(const struct attend_args *args, const struct attend_shape *shape, int row, int head,
                                            const struct head_sums<D> &sums) {
    const int lane = (int)threadIdx.x % WARP;
    float *record = attend_record(args, row, head);
    float c_n[D / WARP] = {}, c_d = 0.0f;
    if (shape->side.n_slices) {
        const float *c = side_sums<D>(args, shape, row, head);
        head_load<D>(c, lane, c_n);
        c_d = c[D];
    } else if (shape->out && args->stride > partial_stride(D, false)) {
        head_load<D>(record + D, lane, c_n);
        c_d = record[partial_tail(D, true) + 2];
    }
    if (!shape->out) {
        head_store<D>(record, lane, sums.y);
        if (shape->side.n_slices)
            head_store<D>(record + D, lane, c_n);
        if (lane == 0)
            attend_finish_record(args, record, sums.m * LN_2, sums.l);
        if (lane == 0 && shape->side.n_slices)
            record[partial_tail(D, true) + 2] = c_d;
        return;
    }
    const float l = sums.l + c_d, part = l > 0.0f ? 1.0f / l : 0.0f;
#pragma unroll
    for (int c = 0; c < D / WARP; c++)
        c_n[c] = (c_n[c] + sums.y[c]) * part;
    head_store<D>(shape->out + ((int64_t)row * args->n_heads + head) * D, lane, c_n);
}

/* Counts an arrival at n <= 32 counters in a row, once all that this warp wrote can be seen by the others. A bit for each counter at which it
 * was the last of `expected`: there it sees what they wrote, and the counter is 0 again. */
__device__ __forceinline__ unsigned heads_arrive(int *counters, int n, int expected) {
    const int lane = (int)threadIdx.x % WARP;
    int before = -1;
    __syncwarp();
    if (lane < n)
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counters + lane) : "memory");
    const bool last = before + 1 == expected;
    if (last)
        counters[lane] = 0;
    return __ballot_sync(0xffffffffu, last);
}

/* CTAs that have tiles of a segment: first .. last. */
struct cta_range {
    int first, last;
};
__device__ __forceinline__ struct cta_range segment_ctas(const struct attend_plan *plan, const struct attend_segment *s) {
    return {share_of(&plan->share, s->begin), share_of(&plan->share, s->end - 1)};
}

/* Counter of the slices whose logits are there, of the task of the correction that begins with a head. */
__device__ __forceinline__ int *side_ready(const struct attend_args *args, const struct attend_shape *shape, int row, int head) {
    return shape->arrived + ((int64_t)args->n_rows + row) * args->n_heads + head;
}

/* Parts that a head waits for: those of CTAs, and of the correction. */
__device__ __forceinline__ int head_expected(const struct attend_shape *shape, const struct attend_plan *plan,
                                             const struct attend_segment *s) {
    const struct cta_range ctas = segment_ctas(plan, s);
    return ctas.last - ctas.first + 1 + shape->side.n_slices;
}

/* A head's pieces in all CTAs. */
template <int D>
__device__ __forceinline__ struct piece_list cta_pieces(const struct attend_args *args, const struct attend_shape *shape,
                                                        const struct attend_plan *plan, const struct attend_segment *s, int in_group) {
    const int n_kv_heads = args->layout.n_kv_heads, group = args->n_heads / n_kv_heads, stride = group * piece_floats(D);
    const struct cta_range ctas = segment_ctas(plan, s);
    const float *first = cta_piece(shape, ctas.first, s->row * n_kv_heads + s->kv_head, group, in_group, D);
    return {first, first + (int64_t)(ctas.last - ctas.first) * stride, stride, ctas.last - ctas.first + 1};
}

/* A head from its pieces: those of all CTAs (`all`), by the last that arrived; or those of this CTA's teams, and then, if it turns out to be
 * the last, of all CTAs. */
template <int D>
__device__ __noinline__ void head_merge(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                        struct attend_segment s, int in_group, struct piece_list list, bool all) {
    const int n_kv_heads = args->layout.n_kv_heads, group = args->n_heads / n_kv_heads, lane = (int)threadIdx.x % WARP;
    const int head = s.kv_head * group + in_group, segment = s.row * n_kv_heads + s.kv_head;
    bool whole = all || (s.begin >= plan->team[0] && s.end <= plan->team[shape->n_teams] && !shape->side.n_slices);
    struct head_sums<D> sums;
    if (!all) {
        head_join<D, JOIN_AT_ONCE>(list, sums);
        if (!whole) {
            float *piece = cta_piece(shape, (int)blockIdx.x, segment, group, in_group, D);
            head_store<D>(piece, lane, sums.y);
            if (lane == 0)
                *(float2 *)(piece + D) = make_float2(sums.m, sums.l);
            if (!heads_arrive(&shape->arrived[(int64_t)s.row * args->n_heads + head], 1, head_expected(shape, plan, &s)))
                return;
            all = true;
            list = cta_pieces<D>(args, shape, plan, &s, in_group);
        }
    }
    if (all)
        head_join<D, CLOSE_AT_ONCE>(list, sums);
    wait_for_earlier(); /* it may belong to those who still read the output */
    head_finish<D>(args, shape, s.row, head, sums);
    if (all && shape->side.n_slices && lane == 0)
        *side_ready(args, shape, s.row, head) = 0; /* all who waited for it have arrived */
}

/* ---- a team's pieces ---------------------------------------------------------------------------------------------------- */

/* The segments that teams of this CTA share with each other or with other CTAs; heads spread over its first n_warps warps. Behind a barrier.
 * Teams leave what they know of their last segment in the stages of their warps, of an earlier one in memory: that can be the case of the
 * last team of a segment only. */
template <int D>
__device__ __forceinline__ void join_teams(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                           const uint8_t *stages, int n_warps) {
    const int n_kv_heads = args->layout.n_kv_heads, group = args->n_heads / n_kv_heads, warp_bytes = shape->n_stages * shape->stage_bytes;
    const int lane = (int)threadIdx.x % WARP, own_edge = lane < 2 * shape->n_teams ? plan->edge[lane] : -1;
    int turn = (int)threadIdx.x / WARP;
#pragma unroll 1
    for (unsigned edges = __ballot_sync(0xffffffffu, own_edge >= 0); edges; edges &= edges - 1) {
        const int i = __ffs((int)edges) - 1, edge = plan->edge[i], first = i / 2;
        const int row = (int)((unsigned)edge / (unsigned)n_kv_heads);
        const struct attend_segment s = plan_segment(plan, row, edge - row * n_kv_heads);
        const int end = min(s.end, plan->team[shape->n_teams]);
        const int last = __popc(__ballot_sync(0xffffffffu, lane < shape->n_teams && plan->team[lane] < end)) - 1;
#pragma unroll 1
        for (; turn < group; turn += n_warps) {
            const int pass = turn / shape->pass_heads;
            const uint8_t *own = stages + (int64_t)pass * warp_bytes + turn % shape->pass_heads * piece_floats(D) * (int)sizeof(float);
            struct piece_list list = {(const float *)(own + (int64_t)first * shape->n_passes * warp_bytes),
                                      (const float *)(own + (int64_t)last * shape->n_passes * warp_bytes),
                                      shape->n_passes * warp_bytes / (int)sizeof(float), last - first + 1};
            if (s.end < plan->team[last + 1])
                list.last = shape->team_pieces + (((int64_t)blockIdx.x * shape->n_teams + last) * group + turn) * piece_floats(D);
            head_merge<D>(args, shape, plan, s, turn, list, false);
        }
        turn -= group;
    }
}

/* ---- rows with nothing ---------------------------------------------------------------------------------------------------- */

/* Padding, rows beyond the step's, and rows of which this rank has no token. Nothing is left of C_n and C_d either, unless another kernel
 * has seen to them. A warp a head. */
template <int D>
__device__ __forceinline__ void empty_rows(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan) {
    const int n_rows = attend_n_rows(args), warp = (int)(blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int n_warps = (int)(gridDim.x * blockDim.x) / WARP, lane = (int)threadIdx.x % WARP;
#pragma unroll 1
    for (int i = warp; i < args->n_rows * args->n_heads; i += n_warps) {
        const int row = i / args->n_heads, head = i % args->n_heads;
        if (plan->n_tiles[row] != 0)
            continue;
        const bool padding = row >= n_rows || args->in->row[row].seq < 0;
        float *record = attend_record(args, row, head);
        const float zeros[D / WARP] = {};
        if (shape->out) {
            head_store<D>(shape->out + (int64_t)i * D, lane, zeros);
            continue;
        }
        for (int c = lane; c < (padding || shape->side.n_slices ? args->stride : D); c += WARP)
            record[c] = 0.0f;
        __syncwarp();
        if (lane == 0)
            attend_finish_record(args, record, -INFINITY, 0.0f);
    }
}
