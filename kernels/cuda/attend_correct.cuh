/* The correction inside the decode kernel: C_n = phi_q(q) S and C_d = phi_q(q) . P of every row and query head, by a few warps of each CTA
 * while the others attend. A task is one head, or where many heads keep the device busy up to four of a KV head, which then read W
 * and S once. It is cut into slices, one a warp: first its share of the logits q W, then, when all slices of the task have theirs, phi of
 * all features and its share of the channels of C_n. Both go through the exchange (attend_merge.cuh).
 * Slices are made of steps that sum alike however many slices there are: the bits do not depend on that. */
#pragma once

#include "kernels/cuda/attend_merge.cuh"

enum {
    SIDE_HALF = SIDE_FEATURES / 2,
    SIDE_STEPS = 16,         /* of a task: features, and at d = 128 channels */
    SIDE_STEP_FEATURES = SIDE_FEATURES / SIDE_STEPS,
    SIDE_STEP_CHANNELS = 8,
    SIDE_MAX_HEADS = 4,      /* of a task */
    SIDE_LANE_FEATURES = SIDE_FEATURES / WARP, /* features 4 lane .. of each half */
};

/* Tasks of a KV head. */
HOST_DEVICE static inline int side_tasks(int group, int heads) { return (group + heads - 1) / heads; }

/* Which slices are this warp's: every step-th item from `first` on; item = ((row * n_kv_heads + kv_head) * tasks + task) * n_slices + slice. */
struct side_items {
    int first, step, n;
};
__device__ __forceinline__ struct side_items side_items_of(const struct attend_args *args, const struct attend_shape *shape,
                                                           const struct attend_plan *plan, int side) {
    const int n_kv_heads = args->layout.n_kv_heads, tasks = side_tasks(args->n_heads / n_kv_heads, shape->side.heads);
    return {(int)blockIdx.x + plan->n_ctas * side, plan->n_ctas * plan->side.n_warps,
            args->n_rows * n_kv_heads * tasks * shape->side.n_slices};
}

struct side_item {
    int row, kv_head, head, n_heads, slice; /* head: the first of n_heads */
};
/* False where the row has nothing here. */
__device__ __forceinline__ bool side_item_at(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                             int index, struct side_item *item) {
    const unsigned n_kv_heads = (unsigned)args->layout.n_kv_heads, group = (unsigned)args->n_heads / n_kv_heads;
    const unsigned tasks = (unsigned)side_tasks((int)group, shape->side.heads), all = (unsigned)index / (unsigned)shape->side.n_slices;
    const unsigned segment = all / tasks, in_group = (all - segment * tasks) * (unsigned)shape->side.heads;
    item->slice = index - (int)all * shape->side.n_slices;
    item->row = (int)(segment / n_kv_heads);
    item->kv_head = (int)segment - item->row * (int)n_kv_heads;
    item->head = item->kv_head * (int)group + (int)in_group;
    item->n_heads = min(shape->side.heads, (int)(group - in_group));
    return plan->row[item->row].n_tiles > 0;
}
__device__ __forceinline__ const float *side_states_of(const struct attend_args *args, const struct attend_plan *plan,
                                                       const struct side_item *item) {
    const int64_t at = (int64_t)plan->row[item->row].view.seq * args->layout.n_kv_heads + item->kv_head;
    return args->layer.states + at * (SIDE_FEATURES * args->layout.head_dim + SIDE_FEATURES);
}

/* ---- logits ------------------------------------------------------------------------------------------------------------- */

/* 16 logits of each head: lane 4 g + t sums channels g * D / 8 .. for features 4 t .. 4 t + 3 of the step. */
template <int D, typename T, int HEADS>
__device__ __forceinline__ void side_logits_step(const struct attend_args *args, const struct side_item *item, int step, float *logits) {
    constexpr int CHANNELS = D / 8;
    const int lane = (int)threadIdx.x % WARP, t = lane % 4, g = lane / 4, feature = step * SIDE_STEP_FEATURES, half = feature / SIDE_HALF;
    const float *w = args->layer.phi_q + ((int64_t)item->kv_head * 2 + half) * D * SIDE_HALF + (int64_t)g * CHANNELS * SIDE_HALF +
                     feature % SIDE_HALF + 4 * t;
    const T *q = (const T *)args->q + ((int64_t)item->row * args->n_heads + item->head) * D + g * CHANNELS;
    float sum[HEADS][4] = {};
    float4 four[CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        four[i] = __ldg((const float4 *)(w + i * SIDE_HALF));
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        uint4 words[CHANNELS / 8];
#pragma unroll
        for (int i = 0; i < CHANNELS / 8; i++)
            words[i] = *(const uint4 *)(q + min(h, item->n_heads - 1) * D + 8 * i);
#pragma unroll
        for (int i = 0; i < CHANNELS / 2; i++) {
            const uint32_t pair[4] = {words[i / 4].x, words[i / 4].y, words[i / 4].z, words[i / 4].w};
            const float2 x = widen_pair<T>(pair[i % 4]);
            const float4 a = four[2 * i], b = four[2 * i + 1];
            sum[h][0] = fmaf(x.y, b.x, fmaf(x.x, a.x, sum[h][0]));
            sum[h][1] = fmaf(x.y, b.y, fmaf(x.x, a.y, sum[h][1]));
            sum[h][2] = fmaf(x.y, b.z, fmaf(x.x, a.z, sum[h][2]));
            sum[h][3] = fmaf(x.y, b.w, fmaf(x.x, a.w, sum[h][3]));
        }
    }
#pragma unroll
    for (int lanes = 4; lanes < WARP; lanes *= 2)
#pragma unroll
        for (int i = 0; i < HEADS * 4; i++)
            sum[i / 4][i % 4] += __shfl_xor_sync(0xffffffffu, sum[i / 4][i % 4], lanes);
#pragma unroll
    for (int h = 0; h < HEADS; h++)
        if (g == h && h < item->n_heads)
            post_write(logits + h * SIDE_FEATURES + feature + 4 * t, sum[h]);
}

/* The slice's channels of S go to the second-level cache. */
template <int D> __device__ __forceinline__ void side_prefetch(const float *states, int slice, int n_slices) {
    const int width = D / n_slices, lines = max(1, width * (int)sizeof(float) / 128);
#pragma unroll 1
    for (int i = (int)threadIdx.x % WARP; i < SIDE_FEATURES * lines; i += WARP)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(states + (int64_t)(i / lines) * D + slice * width + i % lines * 32));
}

template <int D, typename T, int HEADS>
__device__ __noinline__ void side_logits(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                         int side) {
    const struct side_items items = side_items_of(args, shape, plan, side);
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
            side_logits_step<D, T, HEADS>(args, &item, item.slice * n_steps + i, side_logits_of(args, shape, item.row, item.head));
    }
}

/* ---- states ------------------------------------------------------------------------------------------------------------- */

/* phi of this lane's features: 4 lane .. 4 lane + 3 of each half; once the logits are there. */
__device__ __forceinline__ void side_phi(const float *logits, float (&phi)[SIDE_LANE_FEATURES]) {
    const int lane = (int)threadIdx.x % WARP;
    float top[2], sum[2], x[2][4];
    bool there;
    do {
        there = post_read(logits + 4 * lane, x[0]);
        there &= post_read(logits + SIDE_HALF + 4 * lane, x[1]);
    } while (!__all_sync(0xffffffffu, there));
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int k = 0; k < 4; k++)
            phi[4 * half + k] = x[half][k];
        top[half] = fmaxf(fmaxf(x[half][0], x[half][1]), fmaxf(x[half][2], x[half][3]));
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

/* Sums over the lanes of N numbers each; those `apart` change halves first, then those half as far. Number lane / (32 / N) to each lane. */
template <int N, int APART, int SIZE> __device__ __forceinline__ void lanes_scatter(float (&x)[SIZE]) {
    const bool upper = threadIdx.x & APART;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float keep = upper ? x[i + N / 2] : x[i], give = upper ? x[i] : x[i + N / 2];
        x[i] = keep + __shfl_xor_sync(0xffffffffu, give, APART);
    }
    if constexpr (N == 1)
        x[0] += __shfl_xor_sync(0xffffffffu, x[0], APART);
    if constexpr (APART > 1)
        lanes_scatter<(N > 1 ? N / 2 : 1), APART / 2>(x);
}

/* Eight channels of C_n of each head. states, c_n: at the first of the channels. */
template <int D, int HEADS>
__device__ __forceinline__ void side_states_step(const float *states, const float (&phi)[HEADS][SIDE_LANE_FEATURES], float *c_n,
                                                 int n_heads) {
    constexpr int NUMBERS = HEADS * SIDE_STEP_CHANNELS, LANES = WARP / NUMBERS;
    constexpr int AT_ONCE = HEADS == 1 ? SIDE_LANE_FEATURES : SIDE_LANE_FEATURES / 2; /* rows in registers */
    const int lane = (int)threadIdx.x % WARP;
    float sum[NUMBERS] = {};
#pragma unroll
    for (int first = 0; first < SIDE_LANE_FEATURES; first += AT_ONCE) {
        float4 a[AT_ONCE], b[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const float *row = states + (int64_t)((first + k) / 4 * SIDE_HALF + 4 * lane + k % 4) * D;
            a[k] = *(const float4 *)row, b[k] = *(const float4 *)(row + 4);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const float eight[SIDE_STEP_CHANNELS] = {a[k].x, a[k].y, a[k].z, a[k].w, b[k].x, b[k].y, b[k].z, b[k].w};
#pragma unroll
            for (int i = 0; i < NUMBERS; i++)
                sum[i] = fmaf(phi[i / SIDE_STEP_CHANNELS][first + k], eight[i % SIDE_STEP_CHANNELS], sum[i]);
        }
    }
    lanes_scatter<NUMBERS, WARP / 2>(sum);
    const int number = lane / LANES;
    if (lane % LANES == 0 && number / SIDE_STEP_CHANNELS < n_heads)
        post_write(c_n + number / SIDE_STEP_CHANNELS * piece_floats(D) + number % SIDE_STEP_CHANNELS, {sum[0]});
}

/* The slice of C_n, and with slice 0 C_d. */
template <int D, int HEADS>
__device__ __forceinline__ void side_states_heads(const struct attend_args *args, const struct attend_shape *shape, const float *states,
                                                  const struct side_item *item) {
    const int lane = (int)threadIdx.x % WARP, width = D / shape->side.n_slices;
    float *sums = side_sums<D>(args, shape, item->row, item->head);
    float phi[HEADS][SIDE_LANE_FEATURES];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
        side_phi(side_logits_of(args, shape, item->row, item->head + min(h, item->n_heads - 1)), phi[h]);
#pragma unroll 1
    for (int c = item->slice * width; c < (item->slice + 1) * width; c += SIDE_STEP_CHANNELS)
        side_states_step<D, HEADS>(states + c, phi, sums + c, item->n_heads);
    if (item->slice > 0)
        return;
    const float *p = states + SIDE_FEATURES * D + 4 * lane;
    const float4 a = *(const float4 *)p, b = *(const float4 *)(p + SIDE_HALF);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const float *x = phi[h];
        const float c_d = warp_sum(x[0] * a.x + x[1] * a.y + x[2] * a.z + x[3] * a.w + x[4] * b.x + x[5] * b.y + x[6] * b.z + x[7] * b.w);
        if (lane == 0 && h < item->n_heads)
            post_write(sums + h * piece_floats(D) + D, {c_d});
    }
}

/* Behind side_logits. */
template <int D, int HEADS>
__device__ __noinline__ void side_states(const struct attend_args *args, const struct attend_shape *shape, const struct attend_plan *plan,
                                         int side) {
    const struct side_items items = side_items_of(args, shape, plan, side);
    struct side_item item;
#pragma unroll 1
    for (int index = items.first; index < items.n; index += items.step) {
        if (!side_item_at(args, shape, plan, index, &item))
            continue;
        side_states_heads<D, HEADS>(args, shape, side_states_of(args, plan, &item), &item);
    }
}
