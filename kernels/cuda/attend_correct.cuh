/* The correction inside the decode kernel: C_n = phi_q(q) S and C_d = phi_q(q) . P of every row and query head, by a few warps of each CTA
 * while the others attend. A head's work is cut into slices, one a warp: first its share of the logits q W, then, when all slices of the
 * head have theirs, phi of all features and its share of the channels of C_n. All CTAs of the grid are on the device at once, so one
 * may wait for another. Slices are made of steps that sum alike however many slices there are: the bits do not depend on that. A KV head's
 * query heads read the same W and S, from the second-level cache: one warp for all would take four times as long, and nobody waits for
 * bandwidth here. */
#pragma once

#include "kernels/cuda/attend_merge.cuh"

enum {
    SIDE_FEATURES = 256,     /* D; other ranks of the correction have a kernel of their own (correct.cu) */
    SIDE_HALF = SIDE_FEATURES / 2,
    SIDE_STEPS = 16,         /* of a head: features, and at d = 128 channels */
    SIDE_STEP_FEATURES = SIDE_FEATURES / SIDE_STEPS,
    SIDE_STEP_CHANNELS = 8,
    SIDE_LANE_FEATURES = SIDE_FEATURES / WARP, /* features 4 lane .. of each half */
};

/* Which slices are this warp's: every step-th item from `first` on; item = (row * n_heads + head) * n_slices + slice. */
struct side_items {
    int first, step, n;
};
__device__ __forceinline__ struct side_items side_items_of(const struct attend_args *args, const struct attend_shape *shape, int side) {
    return {(int)blockIdx.x + (int)gridDim.x * side, (int)gridDim.x * shape->side.n_warps, args->n_rows * args->n_heads * shape->side.n_slices};
}

struct side_item {
    int row, kv_head, head, slice;
};
/* False where the row has nothing here. */
__device__ __forceinline__ bool side_item_at(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                             int index, struct side_item *item) {
    const unsigned both = (unsigned)index / (unsigned)shape->side.n_slices;
    item->slice = index - (int)both * shape->side.n_slices;
    item->row = (int)(both / (unsigned)args->n_heads);
    item->head = (int)both - item->row * args->n_heads;
    item->kv_head = (int)((unsigned)item->head / (unsigned)(args->n_heads / args->layout.n_kv_heads));
    return plan->n_tiles[item->row] > 0;
}
__device__ __forceinline__ const float *side_states_of(const struct attend_args *args, const struct attend_plan *plan,
                                                       const struct side_item *item) {
    const int64_t at = (int64_t)plan->view[item->row].seq * args->layout.n_kv_heads + item->kv_head;
    return args->layer.states + at * (SIDE_FEATURES * args->layout.head_dim + SIDE_FEATURES);
}
__device__ __forceinline__ float *side_logits_of(const struct attend_args *args, const struct attend_shape *shape, const struct side_item *item) {
    return shape->side.logits + ((int64_t)item->row * args->n_heads + item->head) * SIDE_FEATURES;
}

/* ---- logits ------------------------------------------------------------------------------------------------------------- */

/* 16 logits: lane 4 g + t sums channels g * D / 8 .. for features 4 t .. 4 t + 3 of the step. */
template <int D, typename T>
__device__ __forceinline__ void side_logits_step(const struct attend_args *args, const struct side_item *item, int step, float *logits) {
    constexpr int CHANNELS = D / 8;
    const int lane = (int)threadIdx.x % WARP, t = lane % 4, g = lane / 4, feature = step * SIDE_STEP_FEATURES, half = feature / SIDE_HALF;
    const float *w = args->layer.phi_q + ((int64_t)item->kv_head * 2 + half) * D * SIDE_HALF + (int64_t)g * CHANNELS * SIDE_HALF +
                     feature % SIDE_HALF + 4 * t;
    const T *q = (const T *)args->q + ((int64_t)item->row * args->n_heads + item->head) * D + g * CHANNELS;
    float sum[4] = {};
    float4 four[CHANNELS];
    uint4 words[CHANNELS / 8];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        four[i] = __ldg((const float4 *)(w + i * SIDE_HALF));
#pragma unroll
    for (int i = 0; i < CHANNELS / 8; i++)
        words[i] = *(const uint4 *)(q + 8 * i);
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) {
        const uint32_t pair[4] = {words[i / 4].x, words[i / 4].y, words[i / 4].z, words[i / 4].w};
        const float2 x = widen_pair<T>(pair[i % 4]);
        const float4 a = four[2 * i], b = four[2 * i + 1];
        sum[0] = fmaf(x.y, b.x, fmaf(x.x, a.x, sum[0]));
        sum[1] = fmaf(x.y, b.y, fmaf(x.x, a.y, sum[1]));
        sum[2] = fmaf(x.y, b.z, fmaf(x.x, a.z, sum[2]));
        sum[3] = fmaf(x.y, b.w, fmaf(x.x, a.w, sum[3]));
    }
#pragma unroll
    for (int lanes = 4; lanes < WARP; lanes *= 2)
#pragma unroll
        for (int k = 0; k < 4; k++)
            sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], lanes);
    if (g == 0)
        *(float4 *)(logits + feature + 4 * t) = make_float4(sum[0], sum[1], sum[2], sum[3]);
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
        if (item.head == item.kv_head * group)
            side_prefetch<D>(side_states_of(args, plan, &item), item.slice, shape->side.n_slices);
#pragma unroll 1
        for (int i = 0; i < n_steps; i++)
            side_logits_step<D, T>(args, &item, item.slice * n_steps + i, side_logits_of(args, shape, &item));
        __syncwarp();
        if (threadIdx.x % WARP == 0)
            asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(side_ready(args, shape, item.row, item.head)) : "memory");
    }
}

/* ---- states ------------------------------------------------------------------------------------------------------------- */

/* phi of this lane's features: 4 lane .. 4 lane + 3 of each half. */
__device__ __forceinline__ void side_phi(const float *logits, float (&phi)[SIDE_LANE_FEATURES]) {
    const int lane = (int)threadIdx.x % WARP;
    float top[2], sum[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float4 x = *(const float4 *)(logits + half * SIDE_HALF + 4 * lane);
        float *to = &phi[4 * half];
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        top[half] = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    }
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2)
#pragma unroll
        for (int half = 0; half < 2; half++)
            top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], lanes));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            phi[4 * half + k] = fast_exp(phi[4 * half + k] - top[half]);
            sum[half] += phi[4 * half + k];
        }
    }
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2)
#pragma unroll
        for (int half = 0; half < 2; half++)
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], lanes);
#pragma unroll
    for (int k = 0; k < SIDE_LANE_FEATURES; k++)
        phi[k] /= sum[k / 4];
}

/* Halves of 2 N numbers change places between lanes `apart` and are added. */
template <int N> __device__ __forceinline__ void lanes_halve(float (&x)[SIDE_STEP_CHANNELS], int apart) {
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float keep = upper ? x[i + N] : x[i], give = upper ? x[i] : x[i + N];
        x[i] = keep + __shfl_xor_sync(0xffffffffu, give, apart);
    }
}

/* Eight channels of C_n. states: at the first of the channels. Lane 4 c writes channel c. */
template <int D>
__device__ __forceinline__ void side_states_step(const float *states, const float (&phi)[SIDE_LANE_FEATURES], float *c_n) {
    const int lane = (int)threadIdx.x % WARP;
    float sum[SIDE_STEP_CHANNELS] = {};
    float4 a[SIDE_LANE_FEATURES], b[SIDE_LANE_FEATURES];
#pragma unroll
    for (int f = 0; f < SIDE_LANE_FEATURES; f++) {
        const float *row = states + (int64_t)(f / 4 * SIDE_HALF + 4 * lane + f % 4) * D;
        a[f] = *(const float4 *)row, b[f] = *(const float4 *)(row + 4);
    }
#pragma unroll
    for (int f = 0; f < SIDE_LANE_FEATURES; f++) {
        const float eight[SIDE_STEP_CHANNELS] = {a[f].x, a[f].y, a[f].z, a[f].w, b[f].x, b[f].y, b[f].z, b[f].w};
#pragma unroll
        for (int c = 0; c < SIDE_STEP_CHANNELS; c++)
            sum[c] = fmaf(phi[f], eight[c], sum[c]);
    }
    lanes_halve<4>(sum, 16);
    lanes_halve<2>(sum, 8);
    lanes_halve<1>(sum, 4);
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 2);
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
    if (lane % 4 == 0)
        c_n[lane / 4] = sum[0];
}

/* The slice of C_n, and with slice 0 C_d. */
template <int D>
__device__ __forceinline__ void side_states_head(const struct attend_args *args, const struct attend_shape *shape, const float *states,
                                                 const struct side_item *item) {
    const int lane = (int)threadIdx.x % WARP, width = D / shape->side.n_slices;
    float *record = attend_record(args, item->row, item->head);
    float phi[SIDE_LANE_FEATURES];
    side_phi(side_logits_of(args, shape, item), phi);
#pragma unroll 1
    for (int c = item->slice * width; c < (item->slice + 1) * width; c += SIDE_STEP_CHANNELS)
        side_states_step<D>(states + c, phi, record + D + c);
    if (item->slice > 0)
        return;
    const float *p = states + SIDE_FEATURES * D + 4 * lane;
    const float4 a = *(const float4 *)p, b = *(const float4 *)(p + SIDE_HALF);
    const float own = phi[0] * a.x + phi[1] * a.y + phi[2] * a.z + phi[3] * a.w + phi[4] * b.x + phi[5] * b.y + phi[6] * b.z + phi[7] * b.w;
    const float c_d = warp_sum(own);
    if (lane == 0)
        record[partial_tail(D, true) + 2] = c_d;
}

/* Behind side_logits. */
template <int D>
__device__ __noinline__ void side_states(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                         int side) {
    const struct side_items items = side_items_of(args, shape, side);
    const int group = args->n_heads / args->layout.n_kv_heads;
    struct side_item item;
    wait_for_earlier();
#pragma unroll 1
    for (int index = items.first; index < items.n; index += items.step) {
        if (!side_item_at(args, shape, plan, index, &item))
            continue;
        const int *ready = side_ready(args, shape, item.row, item.head);
        int n = 0;
        while (n < shape->side.n_slices)
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(n) : "l"(ready) : "memory");
        side_states_head<D>(args, shape, side_states_of(args, plan, &item), &item);
        const struct attend_segment s = plan_segment(plan, item.row, item.kv_head);
        const int in_group = item.head - item.kv_head * group;
        if (heads_arrive(&shape->arrived[(int64_t)item.row * args->n_heads + item.head], 1, head_expected(shape, plan, &s)))
            head_merge<D>(args, shape, plan, s, in_group, cta_pieces<D>(args, shape, plan, &s, in_group), true);
    }
}
