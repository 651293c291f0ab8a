/* Rotary position embedding, where the model wants it after an RMSNorm of each head of q and k, and the one rounding of q, k and v to the
 * window's type. Meaning: kernels/cpu/rope.c.
 *
 * A block takes one row, works out its cosines and sines once and turns several heads with them: four pairs a thread, 16 bytes
 * read from each half of a head. With few rows (decode) a row's heads are spread over blocks, with many one block takes them all. The
 * turns are had before the kernel waits for the product in front of it, which has no part in positions.
 * Products are rounded one by one, as transformers does, so they are written as intrinsics that never fuse. */
#include "kernels/cuda/quad.cuh"

enum {
    THREADS = 128,  /* 8 heads of 128 or 16 heads of 64 channels at once */
    ENOUGH_ROWS = 4, /* rows for each multiprocessor from which a block takes all heads of its row: then the device is full */
};

template <typename T> __device__ static inline void store(T *to, const float *x) {
    quad<T> out;
    for (int j = 0; j < QUAD; j++)
        out.v[j] = device_narrow<T>(x[j]);
    *(quad<T> *)to = out;
}

/* Where head h of row i goes: q heads first, then k's, then v's, as in qkv. */
template <typename T, int HALF> __device__ static inline T *head_of(const struct rope_args &args, int64_t i, int h) {
    T *base = (T *)args.q;
    int64_t heads = args.n_heads;
    if (h >= args.n_heads) {
        h -= args.n_heads;
        base = (T *)(h < args.n_kv_heads ? args.k : args.v);
        h -= h < args.n_kv_heads ? 0 : args.n_kv_heads;
        heads = args.n_kv_heads;
    }
    return base + (i * heads + h) * (2 * HALF);
}

/* RMSNorm of one head, of which the LANES lanes that follow each other hold a quad of each half: a and b. `weight` is this lane's place in
 * the first half of the weights. */
template <int HALF> __device__ static inline void norm_head(quad<float> *a, quad<float> *b, const float *weight, float eps) {
    enum { LANES = HALF / QUAD };
    unsigned lanes = ((1u << LANES) - 1) << threadIdx.x % WARP / LANES * LANES; /* 8 or 16 */
    quad<float> first = *(const quad<float> *)weight, second = *(const quad<float> *)(weight + HALF);
    double sum = square_sum(*a) + square_sum(*b);
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(lanes, sum, offset);
    float factor = norm_factor(sum, 2 * HALF, eps);
    *a = norm_quad(*a, first, factor);
    *b = norm_quad(*b, second, factor);
}

/* In bounds: i < n_rows; head < all = n_heads + 2 n_kv_heads, so qkv is read at i * all + head below n_rows * all heads; `at` is
 * a multiple of 4 below HALF, so at + 3 and HALF + at + 3 lie in the head and in the norms' weights. The position is read before the block
 * knows whether its row counts: positions has n_rows entries; past L1, since another kernel of the step wrote it. inv_freq is read below
 * HALF. */
template <typename T, int HALF> static __global__ void __launch_bounds__(THREADS) rope_kernel(struct rope_args args) {
    enum { LANES = HALF / QUAD, HEADS = THREADS / LANES };
    __shared__ float turn_cos[HALF], turn_sin[HALF];
    int64_t i = blockIdx.x;
    int pair = threadIdx.x % HALF;
    float angle = __fmul_rn((float)__ldcg(&args.positions[i]), args.inv_freq[pair]);
    bool live = i < device_live_rows(args.n_rows, args.live);
    if (live && threadIdx.x < HALF)
        sincosf(angle, &turn_sin[pair], &turn_cos[pair]);
    wait_for_earlier();
    let_later_begin();
    if (!live)
        return;
    __syncthreads();
    int at = threadIdx.x % LANES * QUAD, turned = args.n_heads + args.n_kv_heads, all = turned + args.n_kv_heads;
    for (int head = blockIdx.y * HEADS + threadIdx.x / LANES; head < all; head += gridDim.y * HEADS) {
        const float *x = args.qkv + (i * all + head) * (2 * HALF) + at;
        quad<float> a = *(const quad<float> *)x, b = *(const quad<float> *)(x + HALF);
        const float *weight = head < args.n_heads ? args.q_norm : head < turned ? args.k_norm : NULL;
        if (weight)
            norm_head<HALF>(&a, &b, weight + at, args.norm_eps);
        for (int j = 0; j < QUAD && head < turned; j++) {
            float cosine = turn_cos[at + j], sine = turn_sin[at + j], first = a.v[j], second = b.v[j];
            a.v[j] = __fadd_rn(__fmul_rn(first, cosine), __fmul_rn(-second, sine));
            b.v[j] = __fadd_rn(__fmul_rn(second, cosine), __fmul_rn(first, sine));
        }
        T *to = head_of<T, HALF>(args, i, head) + at;
        store(to, a.v);
        store(to + HALF, b.v);
    }
}

template <typename T> static int rope(const struct cuda_launch *launch, const struct rope_args *args) {
    int half = args->head_dim / 2, heads_at_once = THREADS / (half / QUAD), all = args->n_heads + 2 * args->n_kv_heads;
    bool full = args->n_rows >= ENOUGH_ROWS * launch->n_sms;
    dim3 grid((unsigned)args->n_rows, full ? 1u : (unsigned)ceil_div(all, heads_at_once));
    if (half == 64)
        (void)launch_early(launch, rope_kernel<T, 64>, grid, THREADS, 0, *args);
    else
        (void)launch_early(launch, rope_kernel<T, 32>, grid, THREADS, 0, *args);
    CHECK_LAUNCH("rope");
    return STATUS_OK;
}

extern "C" int cuda_rope(const struct cuda_launch *launch, const struct rope_args *args) {
    if (args->head_dim != 64 && args->head_dim != 128)
        FAIL(STATUS_USAGE, "rope: head_dim %d, expected 64 or 128 on a GPU", args->head_dim);
    if ((uintptr_t)args->qkv % (QUAD * sizeof(float)) != 0 ||
        ((uintptr_t)args->q | (uintptr_t)args->k | (uintptr_t)args->v) % (QUAD * sizeof(__half)) != 0)
        FAIL(STATUS_USAGE, "rope: qkv %p, q %p, k %p, v %p: expected qkv on 16 bytes, the others on 8", (const void *)args->qkv, args->q,
             args->k, args->v);
    if (((uintptr_t)args->q_norm | (uintptr_t)args->k_norm) % (QUAD * sizeof(float)) != 0)
        FAIL(STATUS_USAGE, "rope: q_norm %p, k_norm %p: expected multiples of 16", (const void *)args->q_norm, (const void *)args->k_norm);
    if (args->dtype != DTYPE_F16 && args->dtype != DTYPE_BF16)
        FAIL(STATUS_USAGE, "rope: a window of %s, expected F16 or BF16 on a GPU", dtype_name(args->dtype));
    if (args->n_rows <= 0 || args->n_heads + args->n_kv_heads <= 0)
        return STATUS_OK;
    return args->dtype == DTYPE_F16 ? rope<__half>(launch, args) : rope<__nv_bfloat16>(launch, args);
}
