/* The correction inside the decode kernel: C_n = phi_q(q) S and C_d = phi_q(q) . P of every segment, by a few warps of each CTA while the
 * others attend. A segment's work is cut into slices, one a warp: first its share of the logits q W, then, when all slices of the
 * segment have theirs, phi of all features and its share of the channels of C_n. All CTAs of the grid are on the device at once, so one
 * may wait for another. Slices are made of steps that sum alike however many slices there are: the bits do not depend on that. */
#pragma once

#include "kernels/cuda/attend_merge.cuh"

enum {
    SIDE_FEATURES = 256,     /* D; other ranks of the correction have a kernel of their own (correct.cu) */
    SIDE_HALF = SIDE_FEATURES / 2,
    SIDE_STEPS = 16,         /* of a segment: features, and at d = 128 channels */
    SIDE_STEP_FEATURES = SIDE_FEATURES / SIDE_STEPS,
    SIDE_STEP_CHANNELS = 8,
    SIDE_HEADS = 4,          /* at a time */
    SIDE_LANE_FEATURES = SIDE_FEATURES / WARP, /* features 4 lane .. of each half */
};

/* Which slices are this warp's: every step-th item from `first` on; item = segment * n_slices + slice. */
struct side_items {
    int first, step, n;
};
__device__ __forceinline__ struct side_items side_items_of(const struct attend_args *args, const struct attend_shape *shape, int side) {
    return {(int)blockIdx.x + (int)gridDim.x * side, (int)gridDim.x * shape->side.n_warps,
            args->n_rows * args->layout.n_kv_heads * shape->side.n_slices};
}

struct side_item {
    struct attend_segment segment;
    int slice;
};
/* False where the row has nothing here. */
__device__ __forceinline__ bool side_item_at(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                             int index, struct side_item *item) {
    const int segment = (int)((unsigned)index / (unsigned)shape->side.n_slices), row = segment / args->layout.n_kv_heads;
    item->slice = index - segment * shape->side.n_slices;
    item->segment = plan_segment(plan, row, segment - row * args->layout.n_kv_heads);
    return plan->n_tiles[row] > 0;
}
__device__ __forceinline__ int *side_ready(const struct attend_args *args, const struct attend_shape *shape, const struct attend_segment *s) {
    return shape->arrived + (int64_t)args->n_rows * args->n_heads + s->row * args->layout.n_kv_heads + s->kv_head;
}
__device__ __forceinline__ const float *side_states_of(const struct attend_args *args, const struct attend_plan *plan,
                                                       const struct attend_segment *s) {
    const int64_t at = (int64_t)plan->view[s->row].seq * args->layout.n_kv_heads + s->kv_head;
    return args->layer.states + at * (SIDE_FEATURES * args->layout.head_dim + SIDE_FEATURES);
}
__device__ __forceinline__ float *side_logits_of(const struct attend_args *args, const struct attend_shape *shape, int row, int head) {
    return shape->side.logits + ((int64_t)row * args->n_heads + head) * SIDE_FEATURES;
}

/* ---- logits ------------------------------------------------------------------------------------------------------------- */

/* 16 logits of four heads: lane 4 g + t sums channels g * D / 8 .. for features 4 t .. 4 t + 3 of the step. */
template <int D, typename T>
__device__ __forceinline__ void side_logits_step(const struct attend_args *args, const struct attend_shape *shape, const struct attend_segment *s,
                                                 int step, int first_head, int n_heads) {
    constexpr int CHANNELS = D / 8;
    const int lane = (int)threadIdx.x % WARP, group = args->n_heads / args->layout.n_kv_heads, t = lane % 4, g = lane / 4;
    const int feature = step * SIDE_STEP_FEATURES, half = feature / SIDE_HALF, head = s->kv_head * group + first_head;
    const float *w = args->layer.phi_q + ((int64_t)s->kv_head * 2 + half) * D * SIDE_HALF + (int64_t)g * CHANNELS * SIDE_HALF +
                     feature % SIDE_HALF + 4 * t;
    const T *q = (const T *)args->q + ((int64_t)s->row * args->n_heads + head) * D + g * CHANNELS;
    float sum[SIDE_HEADS][4] = {};
    float4 four[CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        four[i] = __ldg((const float4 *)(w + i * SIDE_HALF));
#pragma unroll
    for (int h = 0; h < SIDE_HEADS; h++) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 8) {
            const uint4 words = *(const uint4 *)(q + (int64_t)min(h, n_heads - 1) * D + i);
            const uint32_t pair[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float2 x = widen_pair<T>(pair[k]);
                const float4 a = four[i + 2 * k], b = four[i + 2 * k + 1];
                sum[h][0] = fmaf(x.y, b.x, fmaf(x.x, a.x, sum[h][0]));
                sum[h][1] = fmaf(x.y, b.y, fmaf(x.x, a.y, sum[h][1]));
                sum[h][2] = fmaf(x.y, b.z, fmaf(x.x, a.z, sum[h][2]));
                sum[h][3] = fmaf(x.y, b.w, fmaf(x.x, a.w, sum[h][3]));
            }
        }
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int lanes = 4; lanes < WARP; lanes *= 2)
                sum[h][k] += __shfl_xor_sync(0xffffffffu, sum[h][k], lanes);
    }
    wait_for_earlier(); /* it may still read the logits of its own */
#pragma unroll
    for (int h = 0; h < SIDE_HEADS; h++)
        if (g == h && h < n_heads)
            *(float4 *)(side_logits_of(args, shape, s->row, head + h) + feature + 4 * t) =
                make_float4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
}

/* The slice's channels of S go to the second-level cache. */
template <int D> __device__ __forceinline__ void side_prefetch(const float *states, int slice, int n_slices) {
    const int width = D / n_slices, lines = max(1, width * (int)sizeof(float) / 128);
#pragma unroll 1
    for (int i = (int)threadIdx.x % WARP; i < SIDE_FEATURES * lines; i += WARP)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(states + (int64_t)(i / lines) * D + slice * width + i % lines * 32));
}

template <int D, typename T>
__device__ __noinline__ void side_logits(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                         int side) {
    const struct side_items items = side_items_of(args, shape, side);
    const int group = args->n_heads / args->layout.n_kv_heads, n_steps = SIDE_STEPS / shape->side.n_slices;
    struct side_item item;
#pragma unroll 1
    for (int index = items.first; index < items.n; index += items.step) {
        if (!side_item_at(args, shape, plan, index, &item))
            continue;
        side_prefetch<D>(side_states_of(args, plan, &item.segment), item.slice, shape->side.n_slices);
#pragma unroll 1
        for (int i = 0; i < n_steps; i++)
#pragma unroll 1
            for (int head = 0; head < group; head += SIDE_HEADS)
                side_logits_step<D, T>(args, shape, &item.segment, item.slice * n_steps + i, head, min(SIDE_HEADS, group - head));
        __syncwarp();
        if (threadIdx.x % WARP == 0)
            asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(side_ready(args, shape, &item.segment)) : "memory");
    }
}

/* ---- states ------------------------------------------------------------------------------------------------------------- */

/* phi of this lane's features: 4 lane .. 4 lane + 3 of each half. */
__device__ __forceinline__ void side_phi(const float *logits, float (&phi)[SIDE_LANE_FEATURES]) {
    const int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float4 x = *(const float4 *)(logits + half * SIDE_HALF + 4 * lane);
        const float top = warp_max(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
        float *to = &phi[4 * half];
        to[0] = fast_exp(x.x - top), to[1] = fast_exp(x.y - top), to[2] = fast_exp(x.z - top), to[3] = fast_exp(x.w - top);
        const float part = 1.0f / warp_sum((to[0] + to[1]) + (to[2] + to[3]));
#pragma unroll
        for (int k = 0; k < 4; k++)
            to[k] *= part;
    }
}

/* Halves of 2 N numbers change places between lanes N apart and are added. */
template <int N> __device__ __forceinline__ void lanes_halve(float (&x)[WARP]) {
    const bool upper = threadIdx.x & N;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float keep = upper ? x[i + N] : x[i], give = upper ? x[i] : x[i + N];
        x[i] = keep + __shfl_xor_sync(0xffffffffu, give, N);
    }
}
/* Sums over the lanes of 32 numbers each: number `lane` to lane `lane`. */
__device__ __forceinline__ float lanes_to_one(float (&x)[WARP]) {
    lanes_halve<16>(x);
    lanes_halve<8>(x);
    lanes_halve<4>(x);
    lanes_halve<2>(x);
    lanes_halve<1>(x);
    return x[0];
}

/* Eight channels of C_n of four heads. states: at the first of the channels. Lane 8 h + c writes channel c of head h. */
template <int D>
__device__ __forceinline__ void side_states_step(const float *states, const float (&phi)[SIDE_HEADS][SIDE_LANE_FEATURES], float *records,
                                                 int64_t stride, int n_heads) {
    const int lane = (int)threadIdx.x % WARP;
    float sum[SIDE_HEADS * SIDE_STEP_CHANNELS] = {};
#pragma unroll
    for (int f = 0; f < SIDE_LANE_FEATURES; f++) {
        const float *row = states + (int64_t)(f / 4 * SIDE_HALF + 4 * lane + f % 4) * D;
        const float4 a = *(const float4 *)row, b = *(const float4 *)(row + 4);
        const float eight[SIDE_STEP_CHANNELS] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int h = 0; h < SIDE_HEADS; h++)
#pragma unroll
            for (int c = 0; c < SIDE_STEP_CHANNELS; c++)
                sum[h * SIDE_STEP_CHANNELS + c] = fmaf(phi[h][f], eight[c], sum[h * SIDE_STEP_CHANNELS + c]);
    }
    const float total = lanes_to_one(sum);
    if (lane / SIDE_STEP_CHANNELS < n_heads)
        records[lane / SIDE_STEP_CHANNELS * stride + lane % SIDE_STEP_CHANNELS] = total;
}

/* The slice of C_n, and with slice 0 C_d, of heads first_head .. of the group. */
template <int D>
__device__ __forceinline__ void side_states_heads(const struct attend_args *args, const struct attend_shape *shape, const float *states,
                                                  const struct side_item *item, int first_head, int n_heads) {
    const int lane = (int)threadIdx.x % WARP, group = args->n_heads / args->layout.n_kv_heads, width = D / shape->side.n_slices;
    const int head = item->segment.kv_head * group + first_head;
    float *records = attend_record(args, item->segment.row, head);
    float phi[SIDE_HEADS][SIDE_LANE_FEATURES];
#pragma unroll
    for (int h = 0; h < SIDE_HEADS; h++)
        side_phi(side_logits_of(args, shape, item->segment.row, head + min(h, n_heads - 1)), phi[h]);
#pragma unroll 1
    for (int c = item->slice * width; c < (item->slice + 1) * width; c += SIDE_STEP_CHANNELS)
        side_states_step<D>(states + c, phi, records + D + c, args->stride, n_heads);
    if (item->slice > 0)
        return;
    const float *p = states + SIDE_FEATURES * D + 4 * lane;
    const float4 a = *(const float4 *)p, b = *(const float4 *)(p + SIDE_HALF);
#pragma unroll
    for (int h = 0; h < SIDE_HEADS; h++) {
        const float *x = phi[h];
        float c_d = warp_sum(x[0] * a.x + x[1] * a.y + x[2] * a.z + x[3] * a.w + x[4] * b.x + x[5] * b.y + x[6] * b.z + x[7] * b.w);
        if (lane == 0 && h < n_heads)
            records[(int64_t)h * args->stride + partial_tail(D, true) + 2] = c_d;
    }
}

/* Behind side_logits. */
template <int D>
__device__ __noinline__ void side_states(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                         int side) {
    const struct side_items items = side_items_of(args, shape, side);
    const int group = args->n_heads / args->layout.n_kv_heads;
    struct side_item item;
#pragma unroll 1
    for (int index = items.first; index < items.n; index += items.step) {
        if (!side_item_at(args, shape, plan, index, &item))
            continue;
        const int *ready = side_ready(args, shape, &item.segment);
        int n = 0;
        while (n < shape->side.n_slices)
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(n) : "l"(ready) : "memory");
#pragma unroll 1
        for (int head = 0; head < group; head += SIDE_HEADS)
            side_states_heads<D>(args, shape, side_states_of(args, plan, &item.segment), &item, head, min(SIDE_HEADS, group - head));
        unsigned last = heads_arrive(&shape->arrived[(int64_t)item.segment.row * args->n_heads + item.segment.kv_head * group], group,
                                     head_expected(shape, plan, &item.segment));
#pragma unroll 1
        for (; last; last &= last - 1)
            head_close<D>(args, shape, plan, item.segment, __ffs((int)last) - 1);
    }
}
