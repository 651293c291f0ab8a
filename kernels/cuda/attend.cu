/* Attention over the cache while decoding: choice of a kernel, its launch, and the merge of what the warps found into records. The work
 * is cut in attend_plan.cuh, walked in attend_decode.cuh and done in attend_tile.cuh; rows of long runs belong to attend_block.cu.
 *
 * No order of work depends on time: a team's range is a function of the lengths in the batch, and the merge adds pieces in the order
 * of the teams. So the same step gives the same bits. */
#include "kernels/cuda/attend_decode.cuh"

enum {
    MERGE_THREADS = 128,      /* of a record, where there are enough records to fill the device */
    MERGE_THREADS_FEW = 512,  /* else: a record then has up to hundreds of pieces */
    MERGE_MAX_WARPS = MERGE_THREADS_FEW / WARP,
    MERGE_FEW_PER_SM = 4,     /* records per multiprocessor up to which they are few */
    MAX_GROUP = 16,           /* query heads of a KV head */
    STAGE_ALIGN = 128,
    SHARED_80 = 163 << 10, SHARED_86 = 99 << 10, SHARED_90 = 227 << 10, /* shared memory a CTA can have (CUDA manual, table of limits) */
};

/* ---- merge ---------------------------------------------------------------------------------------------------------- */

/* Pieces of a segment: those of teams first .. last. */
struct merge_range {
    int first, last, segment;
};

struct merge_part { /* of one warp */
    float m, l;
    float y[KV_MAX_HEAD_DIM];
};

__device__ static inline const float *merge_piece(const struct attend_args *args, const struct attend_shape *shape,
                                                  const struct merge_range *range, int team, int head) {
    const int group = args->n_heads / args->layout.n_kv_heads;
    return shape->pieces + ((int64_t)(team + range->segment) * group + head % group) * piece_floats(args->layout.head_dim);
}

/* This warp's share of the pieces: every n_warps-th, in order. D / 32 channels a lane. */
template <int D>
__device__ static inline void merge_share(const struct attend_args *args, const struct attend_shape *shape, const struct merge_range *range,
                                          int head, float m, struct merge_part *part) {
    const int lane = (int)threadIdx.x % WARP, n_warps = (int)blockDim.x / WARP, per_lane = D / WARP;
    float y[per_lane] = {}, l = 0.0f;
#pragma unroll 4
    for (int team = range->first + (int)threadIdx.x / WARP; team <= range->last; team += n_warps) {
        const float *piece = merge_piece(args, shape, range, team, head);
        const float factor = piece[D] == -INFINITY ? 0.0f : exp2f(piece[D] - m);
        l = fmaf(piece[D + 1], factor, l);
        for (int i = 0; i < per_lane; i++)
            y[i] = fmaf(piece[i * WARP + lane], factor, y[i]);
    }
    part->l = l; /* the same in all lanes */
    for (int i = 0; i < per_lane; i++)
        part->y[i * WARP + lane] = y[i];
}

/* The largest m of the pieces, in all threads. */
template <int D>
__device__ static inline float merge_max(const struct attend_args *args, const struct attend_shape *shape, const struct merge_range *range,
                                         int head, struct merge_part *parts) {
    float m = -INFINITY;
    for (int team = range->first + (int)threadIdx.x; team <= range->last; team += (int)blockDim.x)
        m = fmaxf(m, merge_piece(args, shape, range, team, head)[D]);
    m = warp_max(m);
    if (threadIdx.x % WARP == 0)
        parts[threadIdx.x / WARP].m = m;
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / WARP; i++)
        m = fmaxf(m, parts[i].m);
    return m;
}

/* A row without a sequence, or beyond the step's rows: no token, and nothing is left of C_n and C_d either. */
__device__ static inline void merge_empty(const struct attend_args *args, float *record) {
    for (int i = (int)threadIdx.x; i < args->stride; i += (int)blockDim.x)
        record[i] = 0.0f;
    __syncthreads();
    if (threadIdx.x == 0)
        attend_finish_record(args, record, -INFINITY, 0.0f);
}

/* One CTA a record: (head blockIdx.x, row blockIdx.y). Rows of long runs are left alone. */
template <int D>
static __global__ void attend_merge_kernel(const __grid_constant__ struct attend_args args,
                                           const __grid_constant__ struct attend_shape shape) {
    __shared__ struct merge_part parts[MERGE_MAX_WARPS];
    wait_for_earlier();
    const int head = (int)blockIdx.x, row = (int)blockIdx.y, n_rows = attend_n_rows(&args), n_kv_heads = args.layout.n_kv_heads;
    float *record = attend_record(&args, row, head);
    if (row >= n_rows || args.in->row[row].seq < 0) {
        merge_empty(&args, record);
        return;
    }
    if (attend_in_long_run(args.in, n_rows, row))
        return;
    const int kv_head = head / (args.n_heads / n_kv_heads);
    const int n = (shape.begin[row + 1] - shape.begin[row]) / n_kv_heads; /* tiles of the segment */
    const int begin = shape.begin[row] + kv_head * n;
    struct merge_range range = {0, -1, row * n_kv_heads + kv_head};
    if (n > 0) {
        const struct team_share share = team_share_of(shape.begin[STEP_MAX_ROWS], shape.n_teams);
        range.first = team_of(&share, begin);
        range.last = team_of(&share, begin + n - 1);
    }
    const float m = merge_max<D>(&args, &shape, &range, head, parts);
    merge_share<D>(&args, &shape, &range, head, m, &parts[threadIdx.x / WARP]);
    __syncthreads();
    float l = 0.0f;
    for (int i = 0; i < (int)blockDim.x / WARP; i++)
        l += parts[i].l;
    for (int c = (int)threadIdx.x; c < D; c += (int)blockDim.x) {
        float y = 0.0f;
        for (int i = 0; i < (int)blockDim.x / WARP; i++)
            y += parts[i].y[c];
        record[c] = y;
    }
    if (threadIdx.x == 0)
        attend_finish_record(&args, record, m * 0.69314718055994531f, l);
}

/* ---- choice --------------------------------------------------------------------------------------------------------- */

struct decode_choice {
    void (*kernel)(struct attend_args, struct attend_shape);
    int max_warps;
};
template <class C> static struct decode_choice choice_of() { return {attend_kernel<C>, C::MAX_WARPS}; }

/* Pages of 16-bit K and V come in slices; 2-bit pages, with or without what kvlinc+ adds, have kernels of their own; all other pairs share
 * one that reads the bits. */
template <int D, typename T, bool SPLIT> static struct decode_choice choose_bits(const struct page_format *format, bool plus) {
    if (format->k_bits == 16 && format->v_bits == 16)
        return choice_of<decode_config<D, T, 16, SPLIT, false>>();
    if (format->k_bits != 2 || format->v_bits != 2)
        return choice_of<decode_config<D, T, 0, SPLIT, true>>();
    return plus ? choice_of<decode_config<D, T, 2, SPLIT, true>>() : choice_of<decode_config<D, T, 2, SPLIT, false>>();
}

/* split: at most four heads a warp. */
template <int D> static struct decode_choice choose_kernel(const struct attend_args *args, bool split) {
    const struct page_format *format = &args->layer.format;
    bool plus = args->layer.rotate_k || args->layer.mean, half = format->window == DTYPE_F16;
    if (split)
        return half ? choose_bits<D, __half, true>(format, plus) : choose_bits<D, __nv_bfloat16, true>(format, plus);
    return half ? choose_bits<D, __half, false>(format, plus) : choose_bits<D, __nv_bfloat16, false>(format, plus);
}

/* Warps and stages from what a tile takes: as many warps as have two stages each, or, of large records, one; then more stages. */
static struct attend_shape choose_shape(const struct cuda_launch *launch, const struct attend_args *args, int max_warps) {
    const struct page_format *format = &args->layer.format;
    int group = args->n_heads / args->layout.n_kv_heads;
    int slice = 2 * ATTEND_SLICE * decode_row_stride(args->layout.head_dim);
    bool sliced = format->k_bits == 16 && format->v_bits == 16;
    int shared = launch->architecture == 80 ? SHARED_80 : launch->architecture == 90 || launch->architecture == 100 ? SHARED_90 : SHARED_86;
    int fixed = (int)sizeof(struct attend_plan) + DECODE_MAX_WARPS * DECODE_MAX_STAGES * (int)sizeof(uint64_t) + 2 * STAGE_ALIGN;
    struct attend_shape shape = {0};
    shape.stage_bytes = (int)round_up(max_i64(slice, sliced ? 0 : page_record_size(format)), STAGE_ALIGN);
    int n_stages = (shared - fixed) / shape.stage_bytes;
    shape.n_passes = (int)ceil_div(group, TILE_COLUMNS);
    shape.n_warps = (int)min_i64(max_warps, n_stages >= 4 ? n_stages / 2 : n_stages) / shape.n_passes * shape.n_passes;
    shape.n_stages = shape.n_warps ? (int)min_i64(DECODE_MAX_STAGES, n_stages / shape.n_warps) : 0;
    shape.pass_heads = (int)ceil_div(group, shape.n_passes);
    shape.n_teams = launch->n_sms * (shape.n_warps / shape.n_passes);
    shape.begin = (int *)launch->scratch;
    shape.pieces = (float *)((uint8_t *)launch->scratch + PLAN_SCRATCH_BYTES);
    return shape;
}

static bool bits_are_known(int bits) { return bits == 2 || bits == 4 || bits == 8 || bits == 16; }

static int check_args(const struct attend_args *args) {
    const struct page_format *f = &args->layer.format;
    const struct cache_layout *l = &args->layout;
    if (args->n_rows < 0 || args->n_rows > STEP_MAX_ROWS)
        FAIL(STATUS_USAGE, "attend: %d rows, 0 to %d can be", args->n_rows, STEP_MAX_ROWS);
    if ((l->head_dim != 64 && l->head_dim != 128) || f->head_dim != l->head_dim)
        FAIL(STATUS_USAGE, "attend: head_dim %d in pages of %d, 64 and 128 can be", l->head_dim, f->head_dim);
    if (f->window != DTYPE_F16 && f->window != DTYPE_BF16)
        FAIL(STATUS_USAGE, "attend: window of %s, a GPU takes f16 and bf16", dtype_name(f->window));
    if (!bits_are_known(f->k_bits) || !bits_are_known(f->v_bits))
        FAIL(STATUS_USAGE, "attend: K of %d and V of %d bits, 2, 4, 8 and 16 can be", f->k_bits, f->v_bits);
    if (l->n_kv_heads < 1 || args->n_heads % l->n_kv_heads || args->n_heads / l->n_kv_heads > MAX_GROUP)
        FAIL(STATUS_USAGE, "attend: %d query heads for %d KV heads, a multiple up to %d can be", args->n_heads, l->n_kv_heads, MAX_GROUP);
    if (l->sink % ATTEND_SLICE || l->sink < 0 || l->sink > KV_BLOCK)
        FAIL(STATUS_USAGE, "attend: %d sink tokens, a multiple of %d up to %d can be", l->sink, ATTEND_SLICE, KV_BLOCK);
    if ((args->layer.rotate_k || args->layer.mean) && f->k_bits == 16)
        FAIL(STATUS_USAGE, "attend: keys rotated or without their mean want encoded pages, not 16 bits");
    if (args->layer.page_stride % 16)
        FAIL(STATUS_USAGE, "attend: pages %lld bytes apart, a multiple of 16 is wanted", (long long)args->layer.page_stride);
    return STATUS_OK;
}

static int launch_merge(const struct cuda_launch *launch, const struct attend_args *args, const struct attend_shape *shape) {
    dim3 records((unsigned)args->n_heads, (unsigned)args->n_rows);
    int threads = args->n_heads * args->n_rows <= MERGE_FEW_PER_SM * launch->n_sms ? MERGE_THREADS_FEW : MERGE_THREADS;
    (void)launch_early(launch, args->layout.head_dim == 64 ? attend_merge_kernel<64> : attend_merge_kernel<128>, records, (unsigned)threads,
                       0, *args, *shape);
    CHECK_LAUNCH("attend_merge");
    return STATUS_OK;
}

extern "C" int cuda_attend(const struct cuda_launch *launch, const struct attend_args *args) {
    TRY(check_args(args));
    if (args->n_rows == 0 || args->n_heads == 0)
        return STATUS_OK;
    int group = args->n_heads / args->layout.n_kv_heads, d = args->layout.head_dim;
    bool split = ceil_div(group, ceil_div(group, TILE_COLUMNS)) <= TILE_COLUMNS / 2;
    struct decode_choice choice = d == 64 ? choose_kernel<64>(args, split) : choose_kernel<128>(args, split);
    struct attend_shape shape = choose_shape(launch, args, choice.max_warps);
    if (shape.n_teams == 0)
        FAIL(STATUS_USAGE, "attend: a tile of %d bytes does not fit this device's shared memory", shape.stage_bytes);
    int64_t n_pieces = shape.n_teams + (int64_t)args->n_rows * args->layout.n_kv_heads - 1;
    int64_t bytes = PLAN_SCRATCH_BYTES + n_pieces * group * piece_floats(d) * (int64_t)sizeof(float);
    if (bytes > (int64_t)CUDA_SCRATCH_BYTES)
        FAIL(STATUS_USAGE, "attend: %d rows of %d heads want %lld bytes of scratch, there are %lld", args->n_rows, args->n_heads,
             (long long)bytes, (long long)CUDA_SCRATCH_BYTES);
    int dynamic = shape.n_warps * shape.n_stages * shape.stage_bytes;
    if (cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic) != cudaSuccess)
        FAIL(STATUS_FAILED, "CUDA: attend: %d bytes of shared memory: %s", dynamic, cudaGetErrorString(cudaGetLastError()));
    (void)launch_early(launch, choice.kernel, dim3((unsigned)launch->n_sms), (unsigned)(shape.n_warps * WARP), (size_t)dynamic, *args, shape);
    CHECK_LAUNCH("attend");
    TRY(launch_merge(launch, args, &shape));
    if (args->n_rows >= ATTEND_BLOCK_ROWS) /* last: it may overwrite the pieces */
        TRY(cuda_attend_block(launch, args));
    return STATUS_OK;
}
