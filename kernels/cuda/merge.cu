/* Combining the ranks' partial results of attention (DESIGN, 4). Meaning: kernels/cpu/merge.c. Ranks are added in rank order, in double
 * where the CPU does, so a result differs from the CPU's only where two exponentials in double round to different floats.
 *
 * One warp takes one (row, head). For one and two ranks every lane looks at all of them; for more, one rank a lane (two beyond 32): all
 * ranks' maxima and weights are had in one go. Then each lane adds its own channels over the ranks. All begin early (device.cuh). */
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

/* e^(m - max); 0 where this rank has no token. The rank that has the maximum, the only one perhaps, needs no exponential. */
__device__ static inline float weight_of(float m, float max) {
    if (m == -INFINITY)
        return 0.0f;
    return m == max ? 1.0f : (float)exp((double)m - (double)max);
}

/* What a warp knows of all ranks for one entry; all lanes have max and denominator. RANKS of them, known when this is compiled: every lane
 * has all weights, so nothing passes between lanes. RANKS = 0, any number: lane r % 32 holds the weight of rank r at [r / 32]. */
template <int RANKS> struct ranks {
    enum { HELD = RANKS > 0 ? RANKS : RANKS_PER_LANE };
    float weight[HELD];
    float max;
    double denominator;
};

/* A value that is held as the weights are. */
template <int RANKS> __device__ static inline float of_rank(const float *held, int rank) {
    if (RANKS > 0)
        return held[rank];
    float x = held[0];
    for (int half = 1; half < RANKS_PER_LANE; half++)
        x = rank / WARP == half ? held[half] : x; /* `rank` is the same in all lanes */
    return __shfl_sync(0xffffffffu, x, rank % WARP);
}

/* tail: (m, l, C_d) of rank 0, those of rank r at r * rank_stride floats. C_d is touched only with a correction. */
template <int RANKS>
__device__ static inline struct ranks<RANKS> weigh_ranks(const float *tail, int64_t rank_stride, int n_ranks, bool correction) {
    enum { HELD = ranks<RANKS>::HELD };
    struct ranks<RANKS> ranks;
    float m[HELD], l[HELD], c_d[HELD];
    ranks.max = -INFINITY;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int rank = RANKS > 0 ? i : i * WARP + (int)threadIdx.x % WARP;
        bool here = RANKS > 0 || rank < n_ranks;
        m[i] = here ? tail[rank * rank_stride] : -INFINITY;
        l[i] = here ? tail[rank * rank_stride + 1] : 0.0f;
        c_d[i] = here && correction ? tail[rank * rank_stride + 2] : 0.0f;
        ranks.max = fmaxf(ranks.max, m[i]);
    }
    if (RANKS == 0)
        ranks.max = warp_max(ranks.max);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        ranks.weight[i] = weight_of(m[i], ranks.max);
    ranks.denominator = 0.0;
#pragma unroll
    for (int rank = 0; rank < (RANKS > 0 ? RANKS : n_ranks); rank++) {
        ranks.denominator += (double)of_rank<RANKS>(ranks.weight, rank) * (double)of_rank<RANKS>(l, rank);
        if (correction)
            ranks.denominator += (double)of_rank<RANKS>(c_d, rank);
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
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, n_live = live_entries(args.n_rows, args.live, args.n_heads);
    wait_for_earlier();
    let_later_begin();
    if (i < n_live)
        args.max[i] = args.partial[i * partial_stride(args.head_dim, args.correction) + partial_tail(args.head_dim, args.correction)];
}

extern "C" int cuda_merge_max(const struct cuda_launch *launch, const struct merge_max_args *args) {
    int64_t n = (int64_t)args->n_rows * args->n_heads;
    if (n <= 0)
        return STATUS_OK;
    (void)launch_early(launch, merge_max_kernel, dim3((unsigned)ceil_div(n, THREADS)), THREADS, 0, *args);
    CHECK_LAUNCH("merge_max");
    return STATUS_OK;
}

/* In bounds: i < n_rows * n_heads; records are read at 0 .. d-1, d .. 2d-1 (with correction) and in the tail; sums at 0 .. d. Rows of
 * sums are d + 1 long, so lanes take single channels, 32 apart. */
static __global__ void merge_rescale_kernel(struct merge_rescale_args args) {
    int64_t i = entry_of_warp(), n_live = live_entries(args.n_rows, args.live, args.n_heads);
    int d = args.head_dim, lane = threadIdx.x % WARP;
    wait_for_earlier();
    let_later_begin();
    if (i >= n_live)
        return;
    const float *y = args.partial + i * partial_stride(d, args.correction), *c_n = y + d, *tail = y + partial_tail(d, args.correction);
    float *sums = args.sums + i * (d + 1), weight = weight_of(tail[0], args.max[i]);
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
    (void)launch_early(launch, merge_rescale_kernel, dim3(blocks), THREADS, 0, *args);
    CHECK_LAUNCH("merge_rescale");
    return STATUS_OK;
}

/* In bounds: i < n_rows * n_heads, c < d. */
static __global__ void merge_divide_kernel(struct merge_divide_args args) {
    int64_t i = entry_of_warp(), n_live = live_entries(args.n_rows, args.live, args.n_heads);
    int d = args.head_dim;
    wait_for_earlier();
    let_later_begin();
    if (i >= n_live)
        return;
    const float *sums = args.sums + i * (d + 1);
    float denominator = sums[d];
    for (int c = threadIdx.x % WARP; c < d; c += WARP)
        args.out[i * d + c] = denominator != 0.0f ? __fdiv_rn(sums[c], denominator) : 0.0f;
}

extern "C" int cuda_merge_divide(const struct cuda_launch *launch, const struct merge_divide_args *args) {
    unsigned blocks;
    TRY(check_merge("merge_divide", args->n_rows, args->n_heads, args->head_dim, NULL, 1, &blocks));
    if (blocks == 0)
        return STATUS_OK;
    (void)launch_early(launch, merge_divide_kernel, dim3(blocks), THREADS, 0, *args);
    CHECK_LAUNCH("merge_divide");
    return STATUS_OK;
}

/* ---- records to output: fused and gather --------------------------------------------------------------------------------- */

/* (sum over records of e^(m_r - max) Y + C_n) / (sum over ranks of e^(m_r - max) l + C_d). Strides in floats. */
struct combine_task {
    int n_rows;
    const int32_t *live;
    int n_heads;
    bool correction;
    const float *records;       /* of rank 0, or the only ones there are: [entry][partial_stride] */
    int64_t record_rank_stride;
    const float *tails;         /* (m, l, C_d) of rank 0's entries */
    int64_t tail_stride, tail_rank_stride;
    int n_ranks;
    float *out; /* [entry][d] */
};

/* One lane's channels of a record. */
template <int D> struct record {
    enum { VALUES = D / WARP };
    channels<VALUES> y, c_n;
};

/* They begin at `at`. */
template <int D> __device__ static inline struct record<D> load_record(const float *at, bool correction) {
    enum { VALUES = record<D>::VALUES };
    struct record<D> record = {*(const channels<VALUES> *)at, {}};
    if (correction)
        record.c_n = *(const channels<VALUES> *)(at + D);
    return record;
}

/* sums += weight * Y + C_n. */
template <int D> __device__ static inline void add_record(double *sums, const struct record<D> &record, double weight, bool correction) {
    for (int c = 0; c < record.VALUES; c++) {
        sums[c] += weight * (double)record.y.v[c];
        if (correction)
            sums[c] += (double)record.c_n.v[c];
    }
}

/* OWN: this rank's records alone are added (fused), else all ranks' (gather). RANKS: see struct ranks; where it says how many records
 * there are, they are on their way before the first weight is worked out. In bounds: i < n_rows * n_heads;
 * record i of rank r is number r * n_rows * n_heads + i; a lane's channels lane * VALUES .. + VALUES - 1 < D of Y, C_n and out. Aligned:
 * records are a multiple of 4 floats, `records` and `out` begin on 16 bytes. */
template <int D, int RANKS, bool OWN> static __global__ void __launch_bounds__(THREADS) combine_kernel(struct combine_task task) {
    enum { VALUES = record<D>::VALUES, EARLY = OWN ? 1 : RANKS };
    int64_t i = entry_of_warp(), n_live = live_entries(task.n_rows, task.live, task.n_heads);
    int lane = threadIdx.x % WARP;
    wait_for_earlier();
    let_later_begin();
    if (i >= (int64_t)task.n_rows * task.n_heads)
        return;
    const float *first = task.records + i * partial_stride(D, task.correction), *at = first + lane * VALUES;
    float own_m = OWN ? first[partial_tail(D, task.correction)] : 0.0f;
    struct record<D> early[EARLY > 0 ? EARLY : 1];
#pragma unroll
    for (int rank = 0; rank < EARLY; rank++)
        early[rank] = load_record<D>(at + rank * task.record_rank_stride, task.correction);
    struct ranks<RANKS> ranks =
        weigh_ranks<RANKS>(task.tails + i * task.tail_stride, task.tail_rank_stride, task.n_ranks, task.correction);
    double sums[VALUES] = {};
    if (OWN)
        add_record<D>(sums, early[0], weight_of(own_m, ranks.max), task.correction);
    else
#pragma unroll 4
        for (int rank = 0; rank < (RANKS > 0 ? RANKS : task.n_ranks); rank++)
            add_record<D>(sums, RANKS > 0 ? early[rank] : load_record<D>(at + rank * task.record_rank_stride, task.correction),
                          of_rank<RANKS>(ranks.weight, rank), task.correction);
    channels<VALUES> out;
    for (int c = 0; c < VALUES; c++)
        out.v[c] = ranks.denominator != 0.0 ? (float)(sums[c] / ranks.denominator) : 0.0f;
    if (i < n_live)
        *(channels<VALUES> *)(task.out + i * D + lane * VALUES) = out;
}

template <int D, bool OWN> static void combine_launch(const struct cuda_launch *launch, const struct combine_task *task, unsigned blocks) {
    if (task->n_ranks == 1)
        (void)launch_early(launch, combine_kernel<D, 1, OWN>, dim3(blocks), THREADS, 0, *task);
    else if (task->n_ranks == 2)
        (void)launch_early(launch, combine_kernel<D, 2, OWN>, dim3(blocks), THREADS, 0, *task);
    else
        (void)launch_early(launch, combine_kernel<D, 0, OWN>, dim3(blocks), THREADS, 0, *task);
}

template <bool OWN>
static int combine_start(const struct cuda_launch *launch, const struct combine_task *task, int head_dim, const char *what) {
    unsigned blocks;
    TRY(check_merge(what, task->n_rows, task->n_heads, head_dim, task->records, task->n_ranks, &blocks));
    if ((uintptr_t)task->out % sizeof(float4) != 0)
        FAIL(STATUS_USAGE, "%s: out at %p, expected a multiple of 16", what, (void *)task->out);
    if (blocks == 0)
        return STATUS_OK;
    if (head_dim == 128)
        combine_launch<128, OWN>(launch, task, blocks);
    else
        combine_launch<64, OWN>(launch, task, blocks);
    CHECK_LAUNCH(what);
    return STATUS_OK;
}

/* ---- fused ------------------------------------------------------------------------------------------------------------ */

/* One thread an entry. In bounds: i < live rows * n_heads, so 3 i + 2 < 3 n_rows n_heads; the tail has four floats. */
static __global__ void merge_stats_kernel(struct merge_stats_args args) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, n_live = live_entries(args.n_rows, args.live, args.n_heads);
    wait_for_earlier();
    let_later_begin();
    if (i >= n_live)
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
    (void)launch_early(launch, merge_stats_kernel, dim3((unsigned)ceil_div(n, THREADS)), THREADS, 0, *args);
    CHECK_LAUNCH("merge_stats");
    return STATUS_OK;
}

extern "C" int cuda_merge_scale(const struct cuda_launch *launch, const struct merge_scale_args *args) {
    struct combine_task task = {args->n_rows, args->live, args->n_heads, args->correction, args->partial, 0, args->stats, 3, 0,
                                args->n_ranks, args->out};
    task.tail_rank_stride = (int64_t)args->n_rows * args->n_heads * 3;
    return combine_start<true>(launch, &task, args->head_dim, "merge_scale");
}

/* ---- gather ----------------------------------------------------------------------------------------------------------- */

extern "C" int cuda_merge_gather(const struct cuda_launch *launch, const struct merge_gather_args *args) {
    int d = args->head_dim, stride = partial_stride(d, args->correction);
    struct combine_task task = {args->n_rows, args->live, args->n_heads, args->correction, args->partial, 0,
                                args->partial + partial_tail(d, args->correction), stride, 0, args->n_ranks, args->out};
    task.record_rank_stride = task.tail_rank_stride = (int64_t)args->n_rows * args->n_heads * stride;
    return combine_start<false>(launch, &task, d, "merge_gather");
}
