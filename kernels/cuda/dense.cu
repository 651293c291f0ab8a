/* The small dense operations between the matrix products: step input, row lookup, norm, gated activation, residual sum. Meaning:
 * kernels/cpu/dense.c.
 *
 * All are bound by launch latency in decode and by memory in prefill, so a thread takes four successive values at once and as many
 * threads as there are quads work side by side. Where rows do not begin on 16 bytes (odd widths) the same kernels go value by value.
 * Loads do not wait for *live: rows up to n_rows exist, so only the stores ask whether a row counts. Sums and products never fuse
 * (quad.cuh). All begin early (device.cuh). */
#include "kernels/cuda/quad.cuh"

enum {
    THREADS = 128,         /* elementwise kernels: small blocks spread one decode row over more multiprocessors */
    STEP_THREADS = 256,    /* one block is enough for STEP_MAX_ROWS rows */
    NORM_MAX_THREADS = 512, /* 512 threads of 8 quads hold a row of 16384 in registers */
    NORM_MAX_QUADS = 8,
    MAX_GRID_Y = 65535,    /* CUDA's limit */
};

/* Values k .. k+3 of a row of n, widened; 0 beyond its end; k is a multiple of 4. VECTOR: n is as well, and the row begins on a multiple of
 * a quad's bytes. */
template <bool VECTOR, typename T> __device__ static inline quad<float> quad_load(const T *row, int64_t k, int64_t n) {
    quad<float> out = {};
    if (VECTOR) {
        if (k < n) {
            quad<T> in = *(const quad<T> *)(row + k);
            for (int j = 0; j < QUAD; j++)
                out.v[j] = device_widen(in.v[j]);
        }
    } else {
        for (int j = 0; j < QUAD; j++)
            out.v[j] = k + j < n ? device_widen(row[k + j]) : 0.0f;
    }
    return out;
}

template <bool VECTOR> __device__ static inline void quad_store(float *row, int64_t k, int64_t n, quad<float> x) {
    if (VECTOR) {
        if (k < n)
            *(quad<float> *)(row + k) = x;
    } else {
        for (int j = 0; j < QUAD; j++)
            if (k + j < n)
                row[k + j] = x.v[j];
    }
}

__device__ static inline quad<float> quad_add(quad<float> x, quad<float> y) {
    for (int j = 0; j < QUAD; j++)
        x.v[j] = __fadd_rn(x.v[j], y.v[j]);
    return x;
}

/* The first value of this thread's quad in rows cut into slices along the grid's y. */
__device__ static inline int64_t quad_of_slice(void) { return ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * QUAD; }

static bool aligned(const void *pointer, size_t to) { return (uintptr_t)pointer % to == 0; }

/* ---- step_begin ------------------------------------------------------------------------------------------------------- */

/* In bounds: row i of `in` is read below in->n_rows only, and its slot (seq >= 0) is one of last_token's. */
static __global__ void step_begin_kernel(struct step_begin_args args) {
    int i = blockIdx.x * STEP_THREADS + threadIdx.x;
    wait_for_earlier();
    let_later_begin();
    if (i >= args.n_rows)
        return;
    int32_t token = -1, position = 0;
    if (i < args.in->n_rows) {
        struct step_row row = args.in->row[i];
        if (row.seq >= 0) {
            token = row.token >= 0 ? row.token : args.last_token[row.seq];
            position = row.position;
        }
    }
    args.tokens[i] = token;
    args.positions[i] = position;
}

extern "C" int cuda_step_begin(const struct cuda_launch *launch, const struct step_begin_args *args) {
    if (args->n_rows > STEP_MAX_ROWS)
        FAIL(STATUS_USAGE, "step_begin: %d rows, expected at most %d", args->n_rows, STEP_MAX_ROWS);
    if (args->n_rows <= 0)
        return STATUS_OK;
    (void)launch_early(launch, step_begin_kernel, dim3((unsigned)ceil_div(args->n_rows, STEP_THREADS)), STEP_THREADS, 0, *args);
    CHECK_LAUNCH("step_begin");
    return STATUS_OK;
}

/* ---- embed ------------------------------------------------------------------------------------------------------------ */

/* In bounds: i < n_rows (tokens, x); the table is read at rows 0 <= at < vocab_count and columns < hidden only, whatever a token is. */
template <typename T, bool VECTOR> static __global__ void embed_kernel(struct embed_args args) {
    int64_t i = blockIdx.x, hidden = args.hidden, k = quad_of_slice(), live = device_live_rows(args.n_rows, args.live);
    wait_for_earlier();
    let_later_begin();
    if (k >= hidden)
        return;
    int64_t token = args.tokens[i], at = token - args.vocab_begin;
    quad<float> x = {};
    if (token >= 0 && at >= 0 && at < args.vocab_count)
        x = quad_load<VECTOR>((const T *)args.table + at * hidden, k, hidden);
    if (i < live)
        quad_store<VECTOR>(args.x + i * hidden, k, hidden, x);
}

template <typename T> static int embed(const struct cuda_launch *launch, const struct embed_args *args) {
    dim3 grid((unsigned)args->n_rows, (unsigned)ceil_div(args->hidden, THREADS * QUAD));
    bool vector = args->hidden % QUAD == 0 && aligned(args->table, QUAD * sizeof(T)) && aligned(args->x, QUAD * sizeof(float));
    if (vector)
        (void)launch_early(launch, embed_kernel<T, true>, grid, THREADS, 0, *args);
    else
        (void)launch_early(launch, embed_kernel<T, false>, grid, THREADS, 0, *args);
    CHECK_LAUNCH("embed");
    return STATUS_OK;
}

extern "C" int cuda_embed(const struct cuda_launch *launch, const struct embed_args *args) {
    if (args->hidden > MAX_GRID_Y * THREADS * QUAD)
        FAIL(STATUS_USAGE, "embed: hidden %d, expected at most %d", args->hidden, MAX_GRID_Y * THREADS * QUAD);
    if (args->n_rows <= 0 || args->hidden <= 0)
        return STATUS_OK;
    switch (args->dtype) {
    case DTYPE_F32: return embed<float>(launch, args);
    case DTYPE_F16: return embed<__half>(launch, args);
    case DTYPE_BF16: return embed<__nv_bfloat16>(launch, args);
    default: FAIL(STATUS_USAGE, "embed: a table of %s, expected F32, F16 or BF16", dtype_name(args->dtype));
    }
}

/* ---- rmsnorm ---------------------------------------------------------------------------------------------------------- */

/* The sum over a block of whole warps, the same bits in every thread: each step adds the same two numbers in all lanes. */
__device__ static double block_sum(double x) {
    __shared__ double of_warp[WARP];
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    int lane = threadIdx.x % WARP;
    if (lane == 0)
        of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = lane < (int)blockDim.x / WARP ? of_warp[lane] : 0.0;
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

/* What one launch does: out = rmsnorm(x) and, to `sum` if there is one (it is x), x + y before that. */
struct norm_task {
    struct rmsnorm_args norm;
    const float *y;
    float *sum;
};

/* One block a row. The first QUADS quads of each thread, and their weights, stay in registers; what a longer row has beyond is read twice.
 * A thread writes only values that it alone has read, so out may be x. In bounds: i < n_rows, columns < hidden (quad_load and quad_store
 * check); pick holds row numbers below live only, so a dead block with a pick reads row 0. */
template <int QUADS, bool VECTOR, bool ADD>
static __global__ void __launch_bounds__(NORM_MAX_THREADS, 1) rmsnorm_kernel(struct norm_task task) {
    const struct rmsnorm_args &args = task.norm;
    int64_t i = blockIdx.x, hidden = args.hidden;
    int64_t step = (int64_t)blockDim.x * QUAD, first = (int64_t)threadIdx.x * QUAD, beyond = first + QUADS * step;
    bool live = i < device_live_rows(args.n_rows, args.live);
    int64_t row = args.pick ? (live ? args.pick[i].row : 0) : i;
    const float *x = args.x + row * hidden, *y = task.y + i * hidden;
    float *out = args.out + i * hidden, *total = task.sum + i * hidden;
    quad<float> held[QUADS], weight[QUADS];
    double sum = 0.0;
#pragma unroll
    for (int j = 0; j < QUADS; j++)
        weight[j] = quad_load<VECTOR>(args.weight, first + j * step, hidden);
    wait_for_earlier();
    let_later_begin();
#pragma unroll
    for (int j = 0; j < QUADS; j++)
        held[j] = quad_load<VECTOR>(x, first + j * step, hidden);
#pragma unroll
    for (int j = 0; j < QUADS && ADD; j++)
        held[j] = quad_add(held[j], quad_load<VECTOR>(y, first + j * step, hidden));
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        if (ADD && live) /* after all loads: a store holds back those that follow it */
            quad_store<VECTOR>(total, first + j * step, hidden, held[j]);
        sum += square_sum(held[j]);
    }
    for (int64_t k = beyond; k < hidden; k += step) {
        quad<float> at = quad_load<VECTOR>(x, k, hidden);
        if (ADD)
            at = quad_add(at, quad_load<VECTOR>(y, k, hidden));
        if (ADD && live)
            quad_store<VECTOR>(total, k, hidden, at);
        sum += square_sum(at);
    }
    float factor = norm_factor(block_sum(sum), hidden, args.eps);
    if (!live)
        return;
#pragma unroll
    for (int j = 0; j < QUADS; j++)
        quad_store<VECTOR>(out, first + j * step, hidden, norm_quad(held[j], weight[j], factor));
    for (int64_t k = beyond; k < hidden; k += step)
        quad_store<VECTOR>(out, k, hidden, norm_quad(quad_load<VECTOR>(x, k, hidden), quad_load<VECTOR>(args.weight, k, hidden), factor));
}

template <bool VECTOR, bool ADD> static void norm_start(const struct cuda_launch *launch, const struct norm_task *task) {
    int64_t quads = ceil_div(task->norm.hidden, QUAD);
    unsigned threads = (unsigned)min_i64(NORM_MAX_THREADS, round_up(quads, WARP));
    dim3 grid((unsigned)task->norm.n_rows);
    int64_t each = ceil_div(quads, threads);
    if (each <= 2)
        (void)launch_early(launch, rmsnorm_kernel<2, VECTOR, ADD>, grid, threads, 0, *task);
    else if (each <= 4)
        (void)launch_early(launch, rmsnorm_kernel<4, VECTOR, ADD>, grid, threads, 0, *task);
    else
        (void)launch_early(launch, rmsnorm_kernel<NORM_MAX_QUADS, VECTOR, ADD>, grid, threads, 0, *task);
}

template <bool ADD> static int norm_launch(const struct cuda_launch *launch, const struct norm_task *task, const char *what) {
    const size_t quad_bytes = QUAD * sizeof(float);
    const struct rmsnorm_args *args = &task->norm;
    if (args->n_rows <= 0 || args->hidden <= 0)
        return STATUS_OK;
    if (args->hidden % QUAD == 0 && aligned(args->x, quad_bytes) && aligned(args->weight, quad_bytes) && aligned(args->out, quad_bytes) &&
        aligned(task->y, quad_bytes))
        norm_start<true, ADD>(launch, task);
    else
        norm_start<false, ADD>(launch, task);
    CHECK_LAUNCH(what);
    return STATUS_OK;
}

extern "C" int cuda_rmsnorm(const struct cuda_launch *launch, const struct rmsnorm_args *args) {
    const struct norm_task task = {*args, NULL, NULL};
    return norm_launch<false>(launch, &task, "rmsnorm");
}

extern "C" int cuda_add_rmsnorm(const struct cuda_launch *launch, const struct add_rmsnorm_args *args) {
    const struct norm_task task = {{args->n_rows, args->live, NULL, args->x, args->weight, args->eps, args->hidden, args->out},
                                   args->y,
                                   args->x};
    return norm_launch<true>(launch, &task, "add_rmsnorm");
}

/* ---- silu_mul --------------------------------------------------------------------------------------------------------- */

/* In bounds: i < n_rows; columns < n of each half of a row of 2 n. */
template <bool VECTOR> static __global__ void silu_mul_kernel(struct silu_mul_args args) {
    int64_t i = blockIdx.x, n = args.n, k = quad_of_slice(), live = device_live_rows(args.n_rows, args.live);
    wait_for_earlier();
    let_later_begin();
    if (k >= n)
        return;
    const float *row = args.gate_up + i * 2 * n;
    quad<float> gate = quad_load<VECTOR>(row, k, n), up = quad_load<VECTOR>(row + n, k, n);
    for (int j = 0; j < QUAD; j++)
        up.v[j] = __fmul_rn(__fdiv_rn(gate.v[j], __fadd_rn(1.0f, expf(-gate.v[j]))), up.v[j]);
    if (i < live)
        quad_store<VECTOR>(args.out + i * n, k, n, up);
}

extern "C" int cuda_silu_mul(const struct cuda_launch *launch, const struct silu_mul_args *args) {
    const size_t quad_bytes = QUAD * sizeof(float);
    int64_t slices = ceil_div(args->n, THREADS * QUAD);
    if (slices > MAX_GRID_Y)
        FAIL(STATUS_USAGE, "silu_mul: %lld columns, expected at most %d", (long long)args->n, MAX_GRID_Y * THREADS * QUAD);
    if (args->n_rows <= 0 || args->n <= 0)
        return STATUS_OK;
    dim3 grid((unsigned)args->n_rows, (unsigned)slices);
    if (args->n % QUAD == 0 && aligned(args->gate_up, quad_bytes) && aligned(args->out, quad_bytes))
        (void)launch_early(launch, silu_mul_kernel<true>, grid, THREADS, 0, *args);
    else
        (void)launch_early(launch, silu_mul_kernel<false>, grid, THREADS, 0, *args);
    CHECK_LAUNCH("silu_mul");
    return STATUS_OK;
}

/* ---- add -------------------------------------------------------------------------------------------------------------- */

/* All rows as one: read below n_rows * hidden, written below live * hidden. */
template <bool VECTOR> static __global__ void add_kernel(struct add_args args) {
    int64_t n = (int64_t)args.n_rows * args.hidden, k = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * QUAD;
    int64_t n_live = device_live_rows(args.n_rows, args.live) * args.hidden;
    wait_for_earlier();
    let_later_begin();
    if (k < n)
        quad_store<VECTOR>(args.x, k, n_live, quad_add(quad_load<VECTOR>(args.x, k, n), quad_load<VECTOR>(args.y, k, n)));
}

extern "C" int cuda_add(const struct cuda_launch *launch, const struct add_args *args) {
    const size_t quad_bytes = QUAD * sizeof(float);
    int64_t blocks = ceil_div((int64_t)args->n_rows * args->hidden, THREADS * QUAD);
    if (blocks > INT32_MAX)
        FAIL(STATUS_USAGE, "add: %d rows of %d are too many for one launch", args->n_rows, args->hidden);
    if (blocks <= 0)
        return STATUS_OK;
    if (args->hidden % QUAD == 0 && aligned(args->x, quad_bytes) && aligned(args->y, quad_bytes))
        (void)launch_early(launch, add_kernel<true>, dim3((unsigned)blocks), THREADS, 0, *args);
    else
        (void)launch_early(launch, add_kernel<false>, dim3((unsigned)blocks), THREADS, 0, *args);
    CHECK_LAUNCH("add");
    return STATUS_OK;
}
