/* Combining the ranks' partial results of attention (DESIGN, 4). Meaning: kernels/cpu/merge.c. Ranks are added in rank order, in double
 * where the CPU does, so a result differs from the CPU's only where two exponentials in double round to different floats.
 *
 * One warp takes one (row, head). Its lanes first look at one rank each (two beyond 32), so that all ranks' maxima and weights are
 * had in one go; then each lane adds its own channels over the ranks. Loads do not wait for *live: entries up to n_rows * n_heads
 * exist, so only the stores ask whether a row counts. */
#include "kernels/cuda/device.cuh"

enum {
    WARPS = 4,          /* of a block: 32 heads of one row are 8 blocks */
    THREADS = WARPS * WARP,
    RANKS_PER_LANE = 2,
    MAX_RANKS = RANKS_PER_LANE * WARP,
};

/* Entry (row, head) of this warp: the same in all its lanes, so that warps leave as a whole (shuffles below need all lanes). */
__device__ static inline int64_t entry_of_warp(void) { return (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP; }

/* Entries that count. */
__device__ static inline int64_t live_entries(int n_rows, const int32_t *live, int n_heads) {
    return device_live_rows(n_rows, live) * n_heads;
}

/* e^(m - max); 0 where this rank has no token. */
__device__ static inline float weight_of(float m, float max) {
    return m == -INFINITY ? 0.0f : (float)exp((double)m - (double)max);
}

/* What a warp knows of all ranks for one entry: lane r % 32 holds the weight of rank r at [r / 32]; all lanes have max and
 * denominator. */
struct ranks {
    float weight[RANKS_PER_LANE];
    float max;
    double denominator;
};

__device__ static inline float of_rank(const float *held, int rank) {
    float x = held[0];
    for (int half = 1; half < RANKS_PER_LANE; half++)
        x = rank / WARP == half ? held[half] : x; /* `rank` is the same in all lanes */
    return __shfl_sync(0xffffffffu, x, rank % WARP);
}

/* tail: (m, l, C_d) of rank 0, those of rank r at r * rank_stride floats. C_d is touched only with a correction. */
__device__ static struct ranks weigh_ranks(const float *tail, int64_t rank_stride, int n_ranks, bool correction) {
    struct ranks ranks;
    float m[RANKS_PER_LANE], l[RANKS_PER_LANE], c_d[RANKS_PER_LANE];
    ranks.max = -INFINITY;
    for (int half = 0; half < RANKS_PER_LANE; half++) {
        int rank = half * WARP + threadIdx.x % WARP;
        bool here = rank < n_ranks;
        m[half] = here ? tail[rank * rank_stride] : -INFINITY;
        l[half] = here ? tail[rank * rank_stride + 1] : 0.0f;
        c_d[half] = here && correction ? tail[rank * rank_stride + 2] : 0.0f;
        ranks.max = fmaxf(ranks.max, m[half]);
    }
    ranks.max = warp_max(ranks.max);
    for (int half = 0; half < RANKS_PER_LANE; half++)
        ranks.weight[half] = weight_of(m[half], ranks.max);
    ranks.denominator = 0.0;
    for (int rank = 0; rank < n_ranks; rank++) {
        ranks.denominator += (double)of_rank(ranks.weight, rank) * (double)of_rank(l, rank);
        if (correction)
            ranks.denominator += (double)of_rank(c_d, rank);
    }
    return ranks;
}

/* VALUES successive channels of one lane, read and written in one go. */
template <int VALUES> struct alignas(VALUES * sizeof(float)) channels {
    float v[VALUES];
};

/* The launchers' common questions: is there work, and does it fit the kernels. *blocks: 0 when there is nothing to do. */
static int check_merge(const char *what, int n_rows, int n_heads, int head_dim, const void *partial, int n_ranks, unsigned *blocks) {
    int64_t n = ceil_div((int64_t)n_rows * n_heads, WARPS);
    if (head_dim != 64 && head_dim != 128)
        FAIL(STATUS_USAGE, "%s: head_dim %d, expected 64 or 128 on a GPU", what, head_dim);
    if ((uintptr_t)partial % sizeof(float4) != 0)
        FAIL(STATUS_USAGE, "%s: records at %p, expected a multiple of 16", what, partial);
    if (n_ranks < 1 || n_ranks > MAX_RANKS)
        FAIL(STATUS_USAGE, "%s: %d ranks, expected 1 to %d", what, n_ranks, MAX_RANKS);
    if (n > INT32_MAX)
        FAIL(STATUS_USAGE, "%s: %d rows of %d heads are too many for one launch", what, n_rows, n_heads);
    *blocks = (unsigned)max_i64(n, 0);
    return STATUS_OK;
}

/* ---- allreduce -------------------------------------------------------------------------------------------------------- */

/* One thread an entry. In bounds: i < live rows * n_heads; m stands before the end of record i. */
static __global__ void merge_max_kernel(struct merge_max_args args) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < live_entries(args.n_rows, args.live, args.n_heads))
        args.max[i] = args.partial[i * partial_stride(args.head_dim, args.correction) + partial_tail(args.head_dim, args.correction)];
}

extern "C" int cuda_merge_max(const struct cuda_launch *launch, const struct merge_max_args *args) {
    int64_t n = (int64_t)args->n_rows * args->n_heads;
    if (n <= 0)
        return STATUS_OK;
    merge_max_kernel<<<(unsigned)ceil_div(n, THREADS), THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("merge_max");
    return STATUS_OK;
}

/* In bounds: i < n_rows * n_heads; records are read at 0 .. d-1, d .. 2d-1 (with correction) and in the tail; sums at 0 .. d. Rows of
 * sums are d + 1 long, so lanes take single channels, 32 apart. */
static __global__ void merge_rescale_kernel(struct merge_rescale_args args) {
    int64_t i = entry_of_warp();
    int d = args.head_dim, lane = threadIdx.x % WARP;
    if (i >= (int64_t)args.n_rows * args.n_heads)
        return;
    const float *y = args.partial + i * partial_stride(d, args.correction), *c_n = y + d, *tail = y + partial_tail(d, args.correction);
    float *sums = args.sums + i * (d + 1), weight = weight_of(tail[0], args.max[i]);
    if (i >= live_entries(args.n_rows, args.live, args.n_heads))
        return;
    for (int c = lane; c < d; c += WARP) {
        float sum = __fmul_rn(weight, y[c]);
        sums[c] = args.correction ? __fadd_rn(sum, c_n[c]) : sum;
    }
    if (lane == 0) {
        float sum = __fmul_rn(weight, tail[1]);
        sums[d] = args.correction ? __fadd_rn(sum, tail[2]) : sum;
    }
}

extern "C" int cuda_merge_rescale(const struct cuda_launch *launch, const struct merge_rescale_args *args) {
    unsigned blocks;
    TRY(check_merge("merge_rescale", args->n_rows, args->n_heads, args->head_dim, args->partial, 1, &blocks));
    if (blocks == 0)
        return STATUS_OK;
    merge_rescale_kernel<<<blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("merge_rescale");
    return STATUS_OK;
}

/* In bounds: i < n_rows * n_heads, c < d. */
static __global__ void merge_divide_kernel(struct merge_divide_args args) {
    int64_t i = entry_of_warp();
    int d = args.head_dim;
    if (i >= (int64_t)args.n_rows * args.n_heads)
        return;
    const float *sums = args.sums + i * (d + 1);
    float denominator = sums[d];
    if (i >= live_entries(args.n_rows, args.live, args.n_heads))
        return;
    for (int c = threadIdx.x % WARP; c < d; c += WARP)
        args.out[i * d + c] = denominator != 0.0f ? __fdiv_rn(sums[c], denominator) : 0.0f;
}

extern "C" int cuda_merge_divide(const struct cuda_launch *launch, const struct merge_divide_args *args) {
    unsigned blocks;
    TRY(check_merge("merge_divide", args->n_rows, args->n_heads, args->head_dim, NULL, 1, &blocks));
    if (blocks == 0)
        return STATUS_OK;
    merge_divide_kernel<<<blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("merge_divide");
    return STATUS_OK;
}

/* ---- fused ------------------------------------------------------------------------------------------------------------ */

/* One thread an entry. In bounds: i < live rows * n_heads, so 3 i + 2 < 3 n_rows n_heads; the tail has four floats. */
static __global__ void merge_stats_kernel(struct merge_stats_args args) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= live_entries(args.n_rows, args.live, args.n_heads))
        return;
    const float *tail = args.partial + i * partial_stride(args.head_dim, args.correction) + partial_tail(args.head_dim, args.correction);
    args.stats[3 * i] = tail[0];
    args.stats[3 * i + 1] = tail[1];
    args.stats[3 * i + 2] = args.correction ? tail[2] : 0.0f;
}

extern "C" int cuda_merge_stats(const struct cuda_launch *launch, const struct merge_stats_args *args) {
    int64_t n = (int64_t)args->n_rows * args->n_heads;
    if (n <= 0)
        return STATUS_OK;
    merge_stats_kernel<<<(unsigned)ceil_div(n, THREADS), THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("merge_stats");
    return STATUS_OK;
}

/* In bounds: i < n_rows * n_heads; lane's channels lane * VALUES .. + VALUES - 1 < D of Y, C_n and out; stats of rank r < n_ranks at
 * r * n_rows * n_heads * 3 + 3 i. Aligned: records are a multiple of 4 floats, `partial` and `out` begin on 16 bytes. */
template <int D> static __global__ void merge_scale_kernel(struct merge_scale_args args) {
    enum { VALUES = D / WARP };
    int64_t i = entry_of_warp();
    int lane = threadIdx.x % WARP;
    if (i >= (int64_t)args.n_rows * args.n_heads)
        return;
    const float *record = args.partial + i * partial_stride(D, args.correction), *at = record + lane * VALUES;
    channels<VALUES> y = *(const channels<VALUES> *)at, c_n = {}, out;
    if (args.correction)
        c_n = *(const channels<VALUES> *)(at + D);
    float own_m = record[partial_tail(D, args.correction)];
    struct ranks ranks = weigh_ranks(args.stats + 3 * i, (int64_t)args.n_rows * args.n_heads * 3, args.n_ranks, args.correction);
    double weight = weight_of(own_m, ranks.max);
    for (int c = 0; c < VALUES; c++) {
        double sum = weight * (double)y.v[c];
        if (args.correction)
            sum += (double)c_n.v[c];
        out.v[c] = ranks.denominator != 0.0 ? (float)(sum / ranks.denominator) : 0.0f;
    }
    if (i < live_entries(args.n_rows, args.live, args.n_heads))
        *(channels<VALUES> *)(args.out + i * D + lane * VALUES) = out;
}

extern "C" int cuda_merge_scale(const struct cuda_launch *launch, const struct merge_scale_args *args) {
    unsigned blocks;
    TRY(check_merge("merge_scale", args->n_rows, args->n_heads, args->head_dim, args->partial, args->n_ranks, &blocks));
    if ((uintptr_t)args->out % sizeof(float4) != 0)
        FAIL(STATUS_USAGE, "merge_scale: out at %p, expected a multiple of 16", (void *)args->out);
    if (blocks == 0)
        return STATUS_OK;
    if (args->head_dim == 128)
        merge_scale_kernel<128><<<blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    else
        merge_scale_kernel<64><<<blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("merge_scale");
    return STATUS_OK;
}

/* ---- gather ----------------------------------------------------------------------------------------------------------- */

/* In bounds: record i of rank r is number r * n_rows * n_heads + i of n_ranks * n_rows * n_heads; channels and alignment as in
 * merge_scale. */
template <int D> static __global__ void merge_gather_kernel(struct merge_gather_args args) {
    enum { VALUES = D / WARP };
    int64_t i = entry_of_warp(), stride = partial_stride(D, args.correction), rank_stride = (int64_t)args.n_rows * args.n_heads * stride;
    int lane = threadIdx.x % WARP;
    if (i >= (int64_t)args.n_rows * args.n_heads)
        return;
    const float *record = args.partial + i * stride;
    struct ranks ranks = weigh_ranks(record + partial_tail(D, args.correction), rank_stride, args.n_ranks, args.correction);
    double sums[VALUES] = {};
#pragma unroll 4
    for (int rank = 0; rank < args.n_ranks; rank++) {
        const float *at = record + rank * rank_stride + lane * VALUES;
        channels<VALUES> y = *(const channels<VALUES> *)at;
        double weight = of_rank(ranks.weight, rank);
        for (int c = 0; c < VALUES; c++)
            sums[c] += weight * (double)y.v[c];
        if (args.correction) {
            channels<VALUES> c_n = *(const channels<VALUES> *)(at + D);
            for (int c = 0; c < VALUES; c++)
                sums[c] += (double)c_n.v[c];
        }
    }
    channels<VALUES> out;
    for (int c = 0; c < VALUES; c++)
        out.v[c] = ranks.denominator != 0.0 ? (float)(sums[c] / ranks.denominator) : 0.0f;
    if (i < live_entries(args.n_rows, args.live, args.n_heads))
        *(channels<VALUES> *)(args.out + i * D + lane * VALUES) = out;
}

extern "C" int cuda_merge_gather(const struct cuda_launch *launch, const struct merge_gather_args *args) {
    unsigned blocks;
    TRY(check_merge("merge_gather", args->n_rows, args->n_heads, args->head_dim, args->partial, args->n_ranks, &blocks));
    if ((uintptr_t)args->out % sizeof(float4) != 0)
        FAIL(STATUS_USAGE, "merge_gather: out at %p, expected a multiple of 16", (void *)args->out);
    if (blocks == 0)
        return STATUS_OK;
    if (args->head_dim == 128)
        merge_gather_kernel<128><<<blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    else
        merge_gather_kernel<64><<<blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("merge_gather");
    return STATUS_OK;
}
