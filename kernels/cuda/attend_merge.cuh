/* From what teams know of a segment to its output. A CTA joins what its teams have; parts of a segment that reaches over several CTAs, and of
 * the correction, go through the exchange to the CTA that closes the head. Who adds what in which order follows from the plan alone.
 *
 * The exchange is memory whose words are all POST_EMPTY between kernels. Whoever has a number writes it there, whoever wants it reads until it
 * is there and empties the word: no counter, no fence, one trip to the second-level cache. No sum is mistaken for an empty word: the only
 * NaN that arithmetic gives is 0x7fffffff (PTX manual, fma.f32). No wait can last: a warp writes all parts of its own before it waits for
 * others', and all CTAs that have work get a place on the device, since those in front of them wait for nothing behind.
 *
 * A piece is Y [D], m (of base 2), l of one query head. One warp takes one head of one segment, D / 32 channels a lane. */
#pragma once

#include "kernels/cuda/attend_mma.cuh"
#include "kernels/cuda/attend_plan.cuh"

enum {
    CLOSE_AT_ONCE = 18, /* pieces: what 8 KV heads of one sequence have on 132 multiprocessors, in one go */
};

#define POST_EMPTY 0xffffffffu
#define LN_2 0.69314718055994531f

/* ---- exchange ----------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ bool post_is_there(float x) { return __float_as_uint(x) != POST_EMPTY; }

/* N = 1, 2 or 4 words in a row, aligned to their size. */
template <int N> __device__ __forceinline__ bool post_read(const float *at, float (&x)[N]) {
    if constexpr (N == 4)
        asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                     : "l"(at)
                     : "memory");
    else if constexpr (N == 2)
        asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "l"(at) : "memory");
    else
        asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x[0]) : "l"(at) : "memory");
    bool there = true;
#pragma unroll
    for (int i = 0; i < N; i++)
        there &= post_is_there(x[i]);
    return there;
}
template <int N> __device__ __forceinline__ void post_write(float *at, const float (&x)[N]) {
    if constexpr (N == 4)
        asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
    else if constexpr (N == 2)
        asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(x[0]), "f"(x[1]) : "memory");
    else
        asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(at), "f"(x[0]) : "memory");
}
template <int N> __device__ __forceinline__ void post_empty(float *at) {
    float x[N];
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = __uint_as_float(POST_EMPTY);
    post_write<N>(at, x);
}

/* ---- sums of a head ------------------------------------------------------------------------------------------------------- */

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

/* Pieces of one head: piece i is at first + i * stride floats, but the last one at `last`. */
struct piece_list {
    const float *first, *last;
    int stride, n;
};
__device__ __forceinline__ const float *piece_at(const struct piece_list &list, int i) {
    return i >= list.n - 1 ? list.last : list.first + (int64_t)i * list.stride;
}

template <int D> __device__ __forceinline__ void head_clear(struct head_sums<D> &sums) {
    sums.m = -INFINITY;
    sums.l = 0.0f;
#pragma unroll
    for (int c = 0; c < D / WARP; c++)
        sums.y[c] = 0.0f;
}

/* Teams' pieces, mostly from shared memory, in order. Every lane weighs all of them: no lane waits for another. */
template <int D> __device__ __forceinline__ void head_join(const struct piece_list &list, struct head_sums<D> &sums) {
    const int lane = (int)threadIdx.x % WARP;
    head_clear<D>(sums);
#pragma unroll 2
    for (int i = 0; i < list.n; i++)
        sums.m = fmaxf(sums.m, piece_at(list, i)[D]);
#pragma unroll 2
    for (int i = 0; i < list.n; i++) {
        const float *piece = piece_at(list, i);
        const float2 tail = *(const float2 *)(piece + D);
        const float weight = tail.x == -INFINITY ? 0.0f : fast_exp2(tail.x - sums.m);
        float y[D / WARP];
        head_load<D>(piece, lane, y);
        sums.l = fmaf(tail.y, weight, sums.l);
#pragma unroll
        for (int c = 0; c < D / WARP; c++)
            sums.y[c] = fmaf(y[c], weight, sums.y[c]);
    }
}

/* Pieces at first + i * stride in the exchange, in order, CLOSE_AT_ONCE at a time; each lane weighs one of them. */
template <int D> __device__ __forceinline__ void head_collect(float *first, int stride, int n, struct head_sums<D> &sums) {
    const int lane = (int)threadIdx.x % WARP;
    head_clear<D>(sums);
#pragma unroll 1
    for (int i = 0; i < n; i += CLOSE_AT_ONCE) {
        float *at = first + (int64_t)i * stride;
        const bool weighs = lane < CLOSE_AT_ONCE && i + lane < n;
        float y[CLOSE_AT_ONCE][D / WARP], tail[2];
        bool there;
        do {
            there = true;
#pragma unroll
            for (int k = 0; k < CLOSE_AT_ONCE; k++)
                if (i + k < n)
                    there &= post_read(at + (int64_t)k * stride + lane * (D / WARP), y[k]);
            tail[0] = -INFINITY, tail[1] = 0.0f;
            if (weighs)
                there &= post_read(at + (int64_t)lane * stride + D, tail);
        } while (!__all_sync(0xffffffffu, there));
#pragma unroll
        for (int k = 0; k < CLOSE_AT_ONCE; k++)
            if (i + k < n)
                post_empty<D / WARP>(at + (int64_t)k * stride + lane * (D / WARP));
        if (weighs)
            post_empty<2>(at + (int64_t)lane * stride + D);
        const float m = fmaxf(sums.m, warp_max(tail[0])), old = sums.m == -INFINITY ? 0.0f : fast_exp2(sums.m - m);
        const float weight = tail[0] == -INFINITY ? 0.0f : fast_exp2(tail[0] - m);
        sums.l = fmaf(sums.l, old, warp_sum(tail[1] * weight));
        sums.m = m;
#pragma unroll
        for (int c = 0; c < D / WARP; c++)
            sums.y[c] *= old;
#pragma unroll
        for (int k = 0; k < CLOSE_AT_ONCE; k++) {
            const float factor = __shfl_sync(0xffffffffu, weight, k);
            if (i + k < n)
#pragma unroll
                for (int c = 0; c < D / WARP; c++)
                    sums.y[c] = fmaf(y[k][c], factor, sums.y[c]);
        }
    }
}

/* ---- the end ---------------------------------------------------------------------------------------------------------- */

/* C_n of a head, C_d behind it, in the exchange. */
template <int D> __device__ __forceinline__ float *side_sums(const struct attend_args *args, const struct attend_shape *shape, int row, int head) {
    return shape->side.sums + ((int64_t)row * args->n_heads + head) * piece_floats(D);
}
/* Logits of a head, in the exchange. */
__device__ __forceinline__ float *side_logits_of(const struct attend_args *args, const struct attend_shape *shape, int row, int head) {
    return shape->side.logits + ((int64_t)row * args->n_heads + head) * SIDE_FEATURES;
}

/* What the correction's warps found. When all of it is there, all of them have read the head's logits. */
template <int D>
__device__ __forceinline__ void side_collect(const struct attend_args *args, const struct attend_shape *shape, int row, int head,
                                             float (&c_n)[D / WARP], float &c_d) {
    const int lane = (int)threadIdx.x % WARP;
    float *sums = side_sums<D>(args, shape, row, head), *logits = side_logits_of(args, shape, row, head), one[1];
    bool there;
    do {
        there = post_read(sums + lane * (D / WARP), c_n);
        there &= post_read(sums + D, one);
    } while (!__all_sync(0xffffffffu, there));
    post_empty<D / WARP>(sums + lane * (D / WARP));
    if (lane == 0)
        post_empty<1>(sums + D);
#pragma unroll
    for (int i = 0; i < SIDE_FEATURES; i += 4 * WARP)
        post_empty<4>(logits + i + 4 * lane);
    c_d = one[0];
}

/* Y, m, l of a whole segment, and what the side found, to the record; or all together, with what another kernel may have left in the record, to
 * the output. */
template <int D>
__device__ __forceinline__ void head_finish(const struct attend_args *args, const struct attend_shape *shape, int row, int head,
                                            const struct head_sums<D> &sums) {
    const int lane = (int)threadIdx.x % WARP;
    float *record = attend_record(args, row, head);
    float c_n[D / WARP] = {}, c_d = 0.0f;
    if (shape->side.n_slices)
        side_collect<D>(args, shape, row, head, c_n, c_d);
    wait_for_earlier(); /* the output may belong to those who still read it */
    if (!shape->side.n_slices && shape->out && args->stride > partial_stride(D, false)) {
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

/* CTAs that have tiles of a segment: first .. first + n - 1. */
struct cta_range {
    int first, n;
};
__device__ __forceinline__ struct cta_range segment_ctas(const struct attend_plan *plan, const struct attend_segment *s) {
    const int first = share_of(&plan->share, s->begin);
    return {first, share_of(&plan->share, s->end - 1) - first + 1};
}

/* A head from its pieces in the exchange. */
template <int D>
__device__ __noinline__ void head_close(const struct attend_args *args, const struct attend_shape *shape, struct attend_segment s, int in_group,
                                        struct cta_range ctas) {
    const int n_kv_heads = args->layout.n_kv_heads, group = args->n_heads / n_kv_heads;
    struct head_sums<D> sums;
    head_collect<D>(cta_piece(shape, ctas.first, s.row * n_kv_heads + s.kv_head, group, in_group, D), group * piece_floats(D), ctas.n, sums);
    head_finish<D>(args, shape, s.row, s.kv_head * group + in_group, sums);
}

/* ---- a CTA's segments ----------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ struct attend_segment plan_edge(const struct attend_args *args, const struct attend_plan *plan, int i) {
    const int edge = plan->edge[i], n_kv_heads = args->layout.n_kv_heads, row = (int)((unsigned)edge / (unsigned)n_kv_heads);
    return plan_segment(plan, row, edge - row * n_kv_heads);
}

/* A head's pieces by the teams of this CTA, from `first` on. They left what they know of their last segment in the stages of their
 * warps, of an earlier one in memory: that can be the case of the last team of a segment only. */
template <int D>
__device__ __forceinline__ struct piece_list team_pieces(const struct attend_args *args, const struct attend_shape *shape,
                                                         const struct attend_plan *plan, const uint8_t *stages,
                                                         const struct attend_segment *s, int first, int in_group) {
    const int group = args->n_heads / args->layout.n_kv_heads, warp_bytes = shape->n_stages * shape->stage_bytes;
    const int pass = in_group / shape->pass_heads, stride = shape->n_passes * warp_bytes, lane = (int)threadIdx.x % WARP;
    const int last = __popc(__ballot_sync(0xffffffffu, lane < shape->n_teams && plan->team[lane] < min(s->end, plan->team[shape->n_teams]))) - 1;
    const uint8_t *own = stages + (int64_t)pass * warp_bytes + in_group % shape->pass_heads * piece_floats(D) * (int)sizeof(float);
    const bool over = s->end < plan->team[last + 1];
    return {(const float *)(own + (int64_t)first * stride),
            over ? shape->team_pieces + (((int64_t)blockIdx.x * shape->n_teams + last) * group + in_group) * piece_floats(D)
                 : (const float *)(own + (int64_t)last * stride),
            stride / (int)sizeof(float), last - first + 1};
}

/* The segments that teams of this CTA share with each other or with other CTAs; heads spread over its first n_warps warps. Behind a barrier.
 * First all pieces of this CTA, then the heads that it closes. */
template <int D>
__device__ __forceinline__ void join_teams(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                           const uint8_t *stages, int n_warps) {
    const int n_kv_heads = args->layout.n_kv_heads, group = args->n_heads / n_kv_heads, lane = (int)threadIdx.x % WARP;
    const int warp = (int)threadIdx.x / WARP, own_edge = lane < 2 * shape->n_teams ? plan->edge[lane] : -1;
    const unsigned edges = __ballot_sync(0xffffffffu, own_edge >= 0);
    int turn = warp;
#pragma unroll 1
    for (unsigned left = edges; left; left &= left - 1) {
        const int i = __ffs((int)left) - 1;
        const struct attend_segment s = plan_edge(args, plan, i);
        const bool alone = s.begin >= plan->team[0] && s.end <= plan->team[shape->n_teams];
#pragma unroll 1
        for (; turn < group; turn += n_warps) {
            struct head_sums<D> sums;
            head_join<D>(team_pieces<D>(args, shape, plan, stages, &s, i / 2, turn), sums);
            if (alone && !shape->side.n_slices) {
                head_finish<D>(args, shape, s.row, s.kv_head * group + turn, sums);
                continue;
            }
            float *piece = cta_piece(shape, (int)blockIdx.x, s.row * n_kv_heads + s.kv_head, group, turn, D);
            post_write(piece + lane * (D / WARP), sums.y);
            if (lane == 0)
                post_write(piece + D, {sums.m, sums.l});
        }
        turn -= group;
    }
    turn = warp;
#pragma unroll 1
    for (unsigned left = edges; left; left &= left - 1) {
        const struct attend_segment s = plan_edge(args, plan, __ffs((int)left) - 1);
        const struct cta_range ctas = segment_ctas(plan, &s);
#pragma unroll 1
        for (; turn < group; turn += n_warps)
            if ((ctas.n > 1 || shape->side.n_slices) && ctas.first + turn * ctas.n / group == (int)blockIdx.x)
                head_close<D>(args, shape, s, turn, ctas);
        turn -= group;
    }
}

/* ---- rows with nothing ---------------------------------------------------------------------------------------------------- */

/* Padding, rows beyond the step's, and rows of which this rank has no token. Nothing is left of C_n and C_d either, unless another kernel
 * has seen to them. A warp a head. */
template <int D>
__device__ __forceinline__ void empty_rows(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan) {
    const int n_rows = attend_n_rows(args), warp = (int)(blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int n_warps = plan->n_ctas * (int)blockDim.x / WARP, lane = (int)threadIdx.x % WARP;
#pragma unroll 1
    for (int i = warp; i < args->n_rows * args->n_heads; i += n_warps) {
        const int row = i / args->n_heads, head = i % args->n_heads;
        if (plan->row[row].n_tiles != 0)
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
