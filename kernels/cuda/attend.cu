/* Attention over the cache while decoding: choice of a kernel and its launch. The work is cut in attend_plan.cuh, walked in
 * attend_decode.cuh, done in attend_tile.cuh and put together in attend_merge.cuh; the correction runs beside it (attend_correct.cuh), so a
 * layer's attention is one kernel. Rows of long runs belong to attend_block.cu.
 *
 * No result depends on time: a team's range is a function of the lengths in the batch, and pieces are added in the order of the teams. So the
 * same step gives the same bits. */
#include "kernels/cuda/attend_decode.cuh"

enum {
    MAX_GROUP = 16,           /* query heads of a KV head */
    STAGE_ALIGN = 128,
    SHARED_80 = 163 << 10, SHARED_86 = 99 << 10, SHARED_90 = 227 << 10, /* shared memory a CTA can have (CUDA manual, table of limits) */
    SIDE_MAX_WARPS = 3,       /* of a CTA for the correction */
    SIDE_SHORT = 4,           /* slices of a task up to which tasks have one head */
    SIDE_STEP_COST = 3,       /* sixteenths of a tile: what 16 features and 8 channels of a head take, by instructions */
    SIDE_STEP_COST_4 = 12,    /* of four heads */
    SIDE_ITEM_COST = 6,       /* the same for phi and for waiting */
};

/* ---- choice --------------------------------------------------------------------------------------------------------- */

struct decode_choice {
    void (*kernel)(struct attend_args, struct attend_shape, bool);
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

/* Can the correction run beside this attention? */
static bool side_can(const struct attend_args *args) { return args->layer.features == SIDE_FEATURES && !args->layer.phi_q_per_head; }

/* Slices of a task: as many as give all warps that can take part one, at most one for each step. */
static int side_slices(int64_t n_tasks, int64_t n_warps, int head_dim) {
    int n = 1;
    while (n < head_dim / SIDE_STEP_CHANNELS && 2 * n * n_tasks <= n_warps)
        n *= 2;
    return n;
}

/* A CTA's part in n_items slices of `cost` sixteenths of a tile. */
static struct plan_side side_part(int64_t n_items, int64_t cost, int64_t n_ctas, int64_t most_warps) {
    int64_t n_warps = min_i64(most_warps, ceil_div(n_items, n_ctas)), each = ceil_div(n_items, n_ctas * n_warps);
    return (struct plan_side){(int)n_warps, (int)ceil_div(each * cost, 16)};
}

/* One head a task where that keeps slices short; else four, so that W and S are read less often. */
static struct attend_side choose_side(const struct cuda_launch *launch, const struct attend_args *args, int n_teams) {
    struct attend_side side = {.heads = 1};
    int64_t most_warps = min_i64(SIDE_MAX_WARPS, n_teams / 2), n_warps = launch->n_sms * most_warps;
    int64_t n_tasks = (int64_t)args->n_rows * args->n_heads;
    int group = args->n_heads / args->layout.n_kv_heads;
    if (group > 1 && n_tasks > n_warps / SIDE_SHORT) {
        side.heads = SIDE_MAX_HEADS;
        n_tasks = (int64_t)args->n_rows * args->layout.n_kv_heads * side_tasks(group, side.heads);
    }
    side.n_slices = side_slices(n_tasks, n_warps, args->layout.head_dim);
    int64_t steps = SIDE_STEPS / side.n_slices, cost = SIDE_ITEM_COST + steps * (side.heads == 1 ? SIDE_STEP_COST : SIDE_STEP_COST_4);
    side.few = side_part(n_tasks * side.n_slices, cost, launch->n_sms, most_warps);
    side.all = side_part(n_tasks * side.n_slices, cost, launch->n_sms * DECODE_CTAS, most_warps);
    return side;
}

static int shared_of(const struct cuda_launch *launch) {
    return launch->architecture == 80 ? SHARED_80 : launch->architecture == 90 || launch->architecture == 100 ? SHARED_90 : SHARED_86;
}

/* Shared memory of a CTA where `n_ctas` share a multiprocessor, which keeps 1 KiB for each. */
static int shared_of_cta(const struct cuda_launch *launch, int n_ctas) { return (shared_of(launch) + 1024) / n_ctas - 1024; }

/* Warps and stages from what a tile takes: as many warps as have two stages each, or, of large records, one; then more stages. */
static struct attend_shape choose_shape(const struct cuda_launch *launch, const struct attend_args *args, int max_warps) {
    const struct page_format *format = &args->layer.format;
    int group = args->n_heads / args->layout.n_kv_heads;
    int slice = 2 * ATTEND_SLICE * decode_row_stride(args->layout.head_dim);
    bool sliced = format->k_bits == 16 && format->v_bits == 16;
    int fixed = plan_bytes(args->n_rows) + DECODE_MAX_WARPS * DECODE_MAX_STAGES * (int)sizeof(uint64_t) + 2 * STAGE_ALIGN;
    struct attend_shape shape = {0};
    shape.stage_bytes = (int)round_up(max_i64(slice, sliced ? 0 : page_record_size(format)), STAGE_ALIGN);
    int n_stages = (shared_of_cta(launch, DECODE_CTAS) - fixed) / shape.stage_bytes;
    if (n_stages < 4)
        n_stages = (shared_of_cta(launch, 1) - fixed) / shape.stage_bytes; /* large records: one CTA a multiprocessor at a time */
    shape.n_passes = (int)ceil_div(group, TILE_COLUMNS);
    shape.n_warps = (int)min_i64(max_warps, n_stages >= 4 ? n_stages / 2 : n_stages) / shape.n_passes * shape.n_passes;
    shape.n_stages = shape.n_warps ? (int)min_i64(DECODE_MAX_STAGES, n_stages / shape.n_warps) : 0;
    shape.pass_heads = (int)ceil_div(group, shape.n_passes);
    shape.n_teams = shape.n_warps / shape.n_passes;
    shape.few_ctas = launch->n_sms;
    shape.few_tiles = PLAN_FEW_TILES * shape.few_ctas * shape.n_teams;
    return shape;
}

/* Where pieces and logits lie in scratch and exchange. Attentions in a row let each other begin before they wait, so they take turns in their
 * parts, of which three are enough: as long as one, A, has a CTA on the device, all working CTAs of the next, B, which are as many as there
 * are multiprocessors or more, are there too, once they have begun, since none ends before A; a multiprocessor holds two CTAs at most; so the
 * next but one, C, has not begun with all of its own, and what follows C with none. When that one does begin, it takes the place of a CTA of
 * B or C, each of which has waited for A. */
static int place_scratch(const struct cuda_launch *launch, const struct attend_args *args, struct attend_shape *shape) {
    int64_t group = args->n_heads / args->layout.n_kv_heads, n_segments = (int64_t)args->n_rows * args->layout.n_kv_heads;
    int64_t piece = group * piece_floats(args->layout.head_dim), n_ctas = (int64_t)launch->n_sms * DECODE_CTAS;
    int64_t teams = n_ctas * shape->n_teams * piece, pieces = (n_ctas + n_segments) * piece;
    int64_t logits = shape->side.n_slices ? n_segments * group * SIDE_FEATURES : 0, sums = shape->side.n_slices ? n_segments * piece : 0;
    int64_t posted = (pieces + logits + sums) * (int64_t)sizeof(float);
    if (posted > (int64_t)CUDA_EXCHANGE_BYTES || teams * (int64_t)sizeof(float) > (int64_t)CUDA_TURN_BYTES)
        FAIL(STATUS_USAGE, "attend: %d rows of %d heads want %lld bytes of exchange and %lld of scratch, there are %lld and %lld", args->n_rows,
             args->n_heads, (long long)posted, (long long)teams * (long long)sizeof(float), (long long)CUDA_EXCHANGE_BYTES,
             (long long)CUDA_TURN_BYTES);
    shape->team_pieces = (float *)((uint8_t *)launch->scratch + launch->turn * CUDA_TURN_BYTES);
    shape->pieces = (float *)(launch->exchange + launch->turn * CUDA_EXCHANGE_BYTES);
    shape->side.logits = shape->pieces + pieces;
    shape->side.sums = shape->side.logits + logits;
    return STATUS_OK;
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

/* side: with the correction. any_run: runs of many rows of one sequence are left out. out: NULL, or where outputs go instead of records. */
static int launch_decode(const struct cuda_launch *launch, const struct attend_args *args, bool side, bool any_run, bool early, float *out) {
    int group = args->n_heads / args->layout.n_kv_heads, d = args->layout.head_dim;
    bool split = ceil_div(group, ceil_div(group, TILE_COLUMNS)) <= TILE_COLUMNS / 2;
    struct decode_choice choice = d == 64 ? choose_kernel<64>(args, split) : choose_kernel<128>(args, split);
    struct attend_shape shape = choose_shape(launch, args, choice.max_warps);
    if (shape.n_teams == 0)
        FAIL(STATUS_USAGE, "attend: a tile of %d bytes does not fit this device's shared memory", shape.stage_bytes);
    if (shape.pass_heads * piece_floats(d) * (int)sizeof(float) > shape.n_stages * shape.stage_bytes)
        FAIL(STATUS_USAGE, "attend: pieces of %d heads do not fit stages of %d bytes", shape.pass_heads, shape.stage_bytes);
    if (side)
        shape.side = choose_side(launch, args, shape.n_teams);
    shape.early = early;
    shape.early_window = early && launch->previous == OP_attend_step;
    shape.out = out;
    TRY(place_scratch(launch, args, &shape));
    int dynamic = shape.n_warps * shape.n_stages * shape.stage_bytes + plan_bytes(args->n_rows);
    if (dynamic <= shared_of_cta(launch, DECODE_CTAS + 1)) /* place_scratch's rule */
        shape.early = shape.early_window = false;
    if (cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic) != cudaSuccess)
        FAIL(STATUS_FAILED, "CUDA: attend: %d bytes of shared memory: %s", dynamic, cudaGetErrorString(cudaGetLastError()));
    (void)launch_early(launch, choice.kernel, dim3((unsigned)(launch->n_sms * DECODE_CTAS)), (unsigned)(shape.n_warps * WARP),
                       (size_t)dynamic, *args, shape, any_run);
    CHECK_LAUNCH("attend");
    return STATUS_OK;
}

extern "C" int cuda_attend(const struct cuda_launch *launch, const struct attend_args *args) {
    TRY(check_args(args));
    if (args->n_rows == 0 || args->n_heads == 0)
        return STATUS_OK;
    bool any_run = args->n_rows >= ATTEND_BLOCK_ROWS;
    TRY(launch_decode(launch, args, false, any_run, false, NULL));
    return any_run ? cuda_attend_block(launch, args) : STATUS_OK; /* last: it may overwrite the pieces */
}

/* Whether all that the operation in front wrote is read behind the kernel's wait: 16-bit blocks are; pages, their table, states and q are
 * read before, and were written by older ones. Those are done: what is in front waits for them before it lets this kernel begin. Only an
 * attention itself does not, so that the next one's blocks follow its own on each multiprocessor one by one; it writes none of these. All
 * other kernels read before their wait only what no operation of a step writes, so none of them minds. */
static bool can_be_early(const struct cuda_launch *launch) { return launch->previous == OP_append || launch->previous == OP_attend_step; }

extern "C" int cuda_attend_step(const struct cuda_launch *launch, const struct attend_step_args *args) {
    const struct attend_args *attend = &args->attend;
    TRY(check_args(attend));
    if (attend->n_rows == 0 || attend->n_heads == 0)
        return STATUS_OK;
    bool correction = attend->layer.states != NULL, side = correction && side_can(attend);
    if (correction && attend->stride < partial_stride(attend->layout.head_dim, true))
        FAIL(STATUS_USAGE, "attend_step: records of %d floats, expected %d", attend->stride, partial_stride(attend->layout.head_dim, true));
    struct correct_args correct = {attend->in, attend->n_rows, attend->layout, attend->layer, attend->n_heads, attend->q, attend->partial,
                                   attend->stride};
    if (correction && !side)
        TRY(cuda_correct(launch, &correct));
    return launch_decode(launch, attend, side, false, can_be_early(launch) && correction == side, args->out);
}
