/* C_n = phi_q(q) S and C_d = phi_q(q) . P of each row and query head, into the records of attention.
 *
 * Small products that wait for memory: a CTA takes the query heads of one row and KV head together, so W and S are read once for all of
 * them, 16 bytes a thread with many loads in flight. Few rows would leave most of the device idle, so the channels of C_n are then cut
 * into slices, one a CTA, each of which computes phi again: W comes from the second-level cache, S from memory only once. Every sum is
 * made of strided partial sums, added in order: the bits depend on the shapes alone. */
#include "kernels/cuda/states.cuh"

enum {
    CORRECT_THREADS = 256,
    CORRECT_WARPS = CORRECT_THREADS / WARP,
    CORRECT_MAX_HEADS = 8,               /* query heads at a time: their sums are registers */
    CORRECT_MAX_SLICES = 8,              /* of channels: two threads side by side at d = 64 */
    CORRECT_SUMS = 4 * CORRECT_THREADS,  /* partial sums of one head: four a thread */
    CORRECT_LANE_FEATURES = KV_MAX_FEATURES / 2 / WARP, /* of half of phi, a lane's share */
    CORRECT_LINE = 32,                   /* floats of a cache line */
};

/* What a CTA keeps in shared memory. */
struct correct_shared {
    float *q;    /* [heads][d] */
    float *sums; /* [heads][CORRECT_SUMS]: [groups][columns] */
    float *phi;  /* [heads][features] */
};

/* Partial sums over k = group, group + n_groups, ... < n_k of x[h][k] * m[k * pitch + 0..3], m already at the thread's four of n_columns
 * columns. group < n_groups = threads / (n_columns / 4), so group * n_columns + column + 3 < 4 threads. */
template <int HEADS>
__device__ static void correct_product(const float *x, int x_pitch, int n_k, const float *m, int pitch, int group, int n_groups,
                                       float *sums) {
    float4 a[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
        a[h] = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int k = group; k < n_k; k += n_groups) {
        float4 y = *(const float4 *)(m + k * pitch);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float f = x[h * x_pitch + k];
            a[h].x = fmaf(f, y.x, a[h].x);
            a[h].y = fmaf(f, y.y, a[h].y);
            a[h].z = fmaf(f, y.z, a[h].z);
            a[h].w = fmaf(f, y.w, a[h].w);
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++)
        *(float4 *)(sums + h * CORRECT_SUMS) = a[h];
}

/* A column of one head's partial sums [n_groups][n_columns], in order. */
__device__ static inline float correct_total(const float *sums, int n_groups, int n_columns, int column) {
    float x = 0;
    for (int g = 0; g < n_groups; g++)
        x += sums[g * n_columns + column];
    return x;
}

/* phi of a head from the partial sums of its logits: a warp takes one half of one head; feature lane + 32 j < width <= 256. */
__device__ static void correct_softmax(int n_items, int features, int n_groups, const struct correct_shared *s) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, width = features / 2;
    for (int item = warp; item < n_items; item += CORRECT_WARPS) {
        int head = item / 2, begin = item % 2 * width;
        float x[CORRECT_LANE_FEATURES], top = -INFINITY, sum = 0;
#pragma unroll
        for (int j = 0; j < CORRECT_LANE_FEATURES; j++) {
            int f = lane + WARP * j;
            x[j] = f < width ? correct_total(s->sums + head * CORRECT_SUMS, n_groups, features, begin + f) : -INFINITY;
            top = fmaxf(top, x[j]);
        }
        top = warp_max(top);
#pragma unroll
        for (int j = 0; j < CORRECT_LANE_FEATURES; j++) {
            x[j] = expf(x[j] - top);
            sum += x[j];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int j = 0; j < CORRECT_LANE_FEATURES; j++) {
            int f = lane + WARP * j;
            if (f < width)
                s->phi[head * features + begin + f] = x[j] / sum;
        }
    }
}

/* Partial logits of one W [2][d][features / 2] for HEADS heads; thread: features 4 column .. 4 column + 3, all in one half. */
template <int HEADS>
__device__ static void correct_logits(const float *w, const float *q, int d, int features, float *sums) {
    int n_columns = features / 4, n_groups = CORRECT_THREADS / n_columns, width = features / 2;
    int column = threadIdx.x % n_columns, group = threadIdx.x / n_columns, half = 4 * column >= width;
    if (group >= n_groups)
        return;
    const float *m = w + (int64_t)half * d * width + 4 * column - half * width;
    correct_product<HEADS>(q, d, d, m, width, group, n_groups, sums + group * features + 4 * column);
}

/* S goes to the second-level cache while phi is computed: rows [features][d], the slice's `width` channels. */
__device__ static void correct_prefetch(const float *s, int features, int d, int width) {
    int lines = max(1, width / CORRECT_LINE);
    for (int i = threadIdx.x; i < features * lines; i += CORRECT_THREADS)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(s + (int64_t)(i / lines) * d + i % lines * CORRECT_LINE));
}

/* phi of heads head .. head + n - 1 of a row, n <= HEADS; the rest of the HEADS repeats or is of zeros, and nobody reads it. */
template <typename T, int HEADS>
__device__ static void correct_phi(const struct correct_args *args, int64_t row, int kv_head, int head, int n,
                                   const struct correct_shared *s) {
    const struct cache_layer *layer = &args->layer;
    int d = layer->format.head_dim, features = layer->features;
    const T *q = (const T *)args->q + (row * args->n_heads + head) * d;
    for (int i = threadIdx.x; i < HEADS * d; i += CORRECT_THREADS)
        s->q[i] = i < n * d ? device_widen(q[i]) : 0.0f;
    __syncthreads();
    int64_t w_floats = (int64_t)d * features;
    if (layer->phi_q_per_head) {
        for (int h = 0; h < HEADS; h++)
            correct_logits<1>(layer->phi_q + (head + min(h, n - 1)) * w_floats, s->q + h * d, d, features, s->sums + h * CORRECT_SUMS);
    } else {
        correct_logits<HEADS>(layer->phi_q + kv_head * w_floats, s->q, d, features, s->sums);
    }
    __syncthreads();
    correct_softmax(2 * HEADS, features, CORRECT_THREADS / (features / 4), s);
    __syncthreads();
}

/* The slice of C_n, and with the first slice C_d, of heads head .. head + n - 1. Slice width w: 4 column + 3 < w, group * w < 4 threads. */
template <int HEADS>
__device__ static void correct_apply(const struct correct_args *args, int64_t row, int head, int n, const float *states, int w,
                                     const struct correct_shared *s) {
    int d = args->layer.format.head_dim, features = args->layer.features, begin = blockIdx.x * w;
    int n_columns = w / 4, n_groups = CORRECT_THREADS / n_columns, column = threadIdx.x % n_columns, group = threadIdx.x / n_columns;
    float *records = args->partial + (row * args->n_heads + head) * args->stride;
    correct_product<HEADS>(s->phi, features, features, states + begin + 4 * column, d, group, n_groups, s->sums + group * w + 4 * column);
    __syncthreads();
    for (int i = threadIdx.x; i < n * w; i += CORRECT_THREADS)
        records[(int64_t)(i / w) * args->stride + d + begin + i % w] = correct_total(s->sums + i / w * CORRECT_SUMS, n_groups, w, i % w);
    const float *p = states + (int64_t)features * d;
    for (int h = threadIdx.x / WARP; h < n && begin == 0; h += CORRECT_WARPS) {
        float c_d = 0;
        for (int f = threadIdx.x % WARP; f < features; f += WARP)
            c_d = fmaf(s->phi[h * features + f], p[f], c_d);
        c_d = warp_sum(c_d);
        if (threadIdx.x % WARP == 0)
            records[(int64_t)h * args->stride + partial_tail(d, true) + 2] = c_d;
    }
    __syncthreads();
}

/* A row without a sequence: 0, so that nothing stale reaches the merge. */
__device__ static void correct_clear(const struct correct_args *args, int64_t row, int head, int n, int w) {
    int d = args->layer.format.head_dim, begin = blockIdx.x * w;
    float *records = args->partial + (row * args->n_heads + head) * args->stride;
    for (int i = threadIdx.x; i < n * w; i += CORRECT_THREADS)
        records[(int64_t)(i / w) * args->stride + d + begin + i % w] = 0;
    if (begin == 0) {
        for (int h = threadIdx.x; h < n; h += CORRECT_THREADS)
            records[(int64_t)h * args->stride + partial_tail(d, true) + 2] = 0;
    }
}

/* grid (slice of channels, KV head, row). Rows from in->n_rows on are left alone. */
template <typename T, int HEADS>
static __global__ void __launch_bounds__(CORRECT_THREADS) correct_kernel(const __grid_constant__ struct correct_args args) {
    extern __shared__ float4 memory[];
    int64_t row = blockIdx.z;
    if (row >= args.in->n_rows)
        return;
    const struct cache_layer *layer = &args.layer;
    int d = layer->format.head_dim, n_kv_heads = args.layout.n_kv_heads, kv_head = blockIdx.y, group = args.n_heads / n_kv_heads;
    int w = d / gridDim.x, seq = args.in->row[row].seq;
    if (seq < 0) {
        correct_clear(&args, row, kv_head * group, group, w);
        return;
    }
    struct correct_shared shared;
    shared.q = (float *)memory;
    shared.sums = shared.q + HEADS * d;
    shared.phi = shared.sums + HEADS * CORRECT_SUMS;
    const float *states = layer->states + ((int64_t)seq * n_kv_heads + kv_head) * states_count(layer);
    correct_prefetch(states + blockIdx.x * w, layer->features, d, w);
    for (int h = 0; h < group; h += HEADS) {
        int head = kv_head * group + h, n = min(HEADS, group - h);
        correct_phi<T, HEADS>(&args, row, kv_head, head, n, &shared);
        correct_apply<HEADS>(&args, row, head, n, states, w, &shared);
    }
}

/* Slices of channels: as few as give every multiprocessor a CTA. */
static unsigned correct_n_slices(const struct cuda_launch *launch, const struct correct_args *args) {
    int64_t n = 1, n_items = (int64_t)args->n_rows * args->layout.n_kv_heads;
    while (n < CORRECT_MAX_SLICES && n * n_items < launch->n_sms)
        n *= 2;
    return (unsigned)n;
}

template <typename T, int HEADS> static int correct_launch(const struct cuda_launch *launch, const struct correct_args *args) {
    const struct cache_layer *layer = &args->layer;
    int bytes = HEADS * (layer->format.head_dim + CORRECT_SUMS + layer->features) * (int)sizeof(float);
    dim3 grid(correct_n_slices(launch, args), (unsigned)args->layout.n_kv_heads, (unsigned)args->n_rows);
    cudaFuncSetAttribute(correct_kernel<T, HEADS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    correct_kernel<T, HEADS><<<grid, CORRECT_THREADS, bytes, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("correct");
    return STATUS_OK;
}

template <typename T> static int correct_select(const struct cuda_launch *launch, const struct correct_args *args) {
    int group = args->n_heads / args->layout.n_kv_heads;
    if (group == 1)
        return correct_launch<T, 1>(launch, args);
    if (group == 2)
        return correct_launch<T, 2>(launch, args);
    if (group <= 4)
        return correct_launch<T, 4>(launch, args);
    return correct_launch<T, CORRECT_MAX_HEADS>(launch, args);
}

extern "C" int cuda_correct(const struct cuda_launch *launch, const struct correct_args *args) {
    const struct cache_layer *layer = &args->layer;
    if (!states_are_on(layer) || args->n_rows <= 0)
        return STATUS_OK;
    TRY(encode_check_format(&layer->format, "correct"));
    TRY(states_check(layer, "correct"));
    int n_kv_heads = args->layout.n_kv_heads;
    if (n_kv_heads < 1 || n_kv_heads > 65535 || args->n_heads < 1 || args->n_heads % n_kv_heads != 0 || args->n_rows > STEP_MAX_ROWS)
        FAIL(STATUS_USAGE, "cuda correct: %d rows, %d heads, %d KV heads", args->n_rows, args->n_heads, n_kv_heads);
    if (args->stride < partial_stride(layer->format.head_dim, true))
        FAIL(STATUS_USAGE, "cuda correct: records of %d floats, expected %d", args->stride, partial_stride(layer->format.head_dim, true));
    return layer->format.window == DTYPE_F16 ? correct_select<__half>(launch, args) : correct_select<__nv_bfloat16>(launch, args);
}
