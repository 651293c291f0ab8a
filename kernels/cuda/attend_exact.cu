/* Causal attention of a prompt in 16 bit: the meaning is kernels/cpu/attend_exact.c. cuDNN does it where it is there and pays for the shape
 * (dnn.h says when); the kernel here does the rest and is what cuDNN is held against.
 *
 * Flash attention (2205.14135) on mma.m16n8k16, which all GPUs since sm_80 have. A CTA of 4 warps takes 128 query vectors of one KV
 * head (vector i = head i % group of row i / group, so the group shares each tile of keys), a warp 32 of them: with two 16-row tiles a
 * warp, a fragment of K or V read from shared memory serves two products, which keeps shared memory below the tensor cores' rate.
 * Sums of 32 x d and scores of 32 x 64 stay in registers; K and V come in tiles of 64 keys by cp.async, one tile ahead.
 *
 * Precision: scores, maxima and sums in fp32, weights rounded to the 16-bit type for the second product. Weights are kept times 2^14:
 * relative to the largest one so far they lie in [0, 2^14], so that fp16 rounds them by 2^-11 of themselves, or by 2^-39 of the largest
 * one where they are subnormal, and a long tail far below the maximum is not lost. bf16 rounds by 2^-8 of themselves. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/dnn.h"

enum {
    KEYS = 64,              /* keys of a tile: 32 x 64 scores of a warp are 64 registers a thread, as many as d = 128 leaves free */
    WARPS = 4,
    THREADS = WARPS * WARP,
    WARP_VECTORS = 32,      /* query vectors of a warp: two tiles of 16 */
    VECTORS = WARPS * WARP_VECTORS,
    CHUNK = 8,              /* 16-bit values of one 16-byte cp.async or ldmatrix row */
    STAGES = 2,
    WIDEN_THREADS = 256,
};

#define WEIGHT_EXPONENT 14.0f /* weights are kept times 2^14: the largest power of two with room for rounding below fp16's 65504 */
#define LOG2_E 1.4426950408889634f

/* CTAs that share a multiprocessor: what registers (about 240 and 160 a thread) and shared memory (96 and 48 KiB) allow. */
constexpr int ctas_per_sm(int d) { return d == 64 ? 3 : 2; }
constexpr int shared_bytes(int d) { return (VECTORS + 2 * STAGES * KEYS) * d * 2; }

struct exact_shape { /* positions and vectors fit 31 bits: checked by the launcher */
    int n_vectors;   /* n_rows * group */
    int first, n, group, n_heads, n_kv_heads;
    int n_tiles;     /* of VECTORS vectors, per KV head */
    float scale;     /* of scores, times log2(e) */
    bool by_head;    /* order of work: KV head after KV head, or all heads of a tile together */
};

/* ---- the instructions ---------------------------------------------------------------------------------------------- */

__device__ static inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 bytes from global to shared memory, or zeros; `from` must be readable in both cases. */
__device__ static inline void copy_chunk(uint32_t to, const void *from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ static inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ static inline void copy_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

/* Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8. */
__device__ static inline void load_matrices(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ static inline void load_matrices_transposed(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

/* c += a b: 16 x 16 times 16 x 8. Lane i has of c the columns 2 (i % 4) + {0, 1} of rows i / 4 (c[0], c[1]) and i / 4 + 8. */
template <typename T> __device__ static inline void multiply(float c[4], const uint32_t a[4], const uint32_t b[2]);
template <> __device__ inline void multiply<__half>(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> __device__ inline void multiply<__nv_bfloat16>(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Two floats as 16-bit values in one register, `low` in the lower half. */
template <typename T> __device__ static inline uint32_t pack(float low, float high);
template <> __device__ inline uint32_t pack<__half>(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *(const uint32_t *)&both;
}
template <> __device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&both;
}

__device__ static inline float exp2_fast(float x) { /* relative error 2^-22; exact for integers; 0 for -inf */
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Maximum and sum over the four lanes that share a row of c. */
__device__ static inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ static inline float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* ---- tiles in shared memory ---------------------------------------------------------------------------------------- */

/* Byte of chunk `chunk` of row `row` in a tile of rows of D values. The low three bits of the chunk are crossed with the row's: the
 * eight rows that ldmatrix reads at one chunk number then lie in different banks. Tiles begin at multiples of 256 bytes, so the place of
 * chunk `chunk ^ 2 i` is this one's ^ 32 i, and that of 8 rows further on this one's + 16 D. */
template <int D> __device__ static inline uint32_t tile_offset(int row, int chunk) {
    return (uint32_t)(row * D * 2 + ((chunk ^ (row & 7)) * 16));
}

/* Rows key .. key + KEYS - 1 of K or V, zeros from `end` on: what lies there may be anything, and 0 * NaN would be NaN. */
template <typename T, int D> __device__ static inline void copy_keys(uint32_t to, const T *rows, int key, int end) {
    constexpr int CHUNKS = D / CHUNK, ROWS = THREADS / CHUNKS; /* rows copied at a time */
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread)); /* or what follows from it would be kept in registers from tile to tile */
    int chunk = thread % CHUNKS, row = thread / CHUNKS;
#pragma unroll
    for (int i = 0; i < KEYS / ROWS; i++, row += ROWS) {
        copy_chunk(to + tile_offset<D>(row, chunk), rows + (int64_t)min(key + row, end - 1) * D + chunk * CHUNK, key + row < end);
    }
}

/* Index of a vector's first value in q and out. */
template <int D> __device__ static inline int64_t vector_offset(const struct exact_shape &s, int kv_head, int vector) {
    int row = vector / s.group, head = kv_head * s.group + vector - row * s.group;
    return ((int64_t)row * s.n_heads + head) * D;
}

/* The CTA's query vectors, zeros from n_vectors on. */
template <typename T, int D>
__device__ static inline void copy_queries(uint32_t to, const T *q, const struct exact_shape &s, int kv_head, int vector) {
    constexpr int CHUNKS = D / CHUNK, ROWS = THREADS / CHUNKS;
    int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    for (int i = 0; i < VECTORS / ROWS; i++, row += ROWS) {
        bool wanted = vector + row < s.n_vectors;
        int64_t from = wanted ? vector_offset<D>(s, kv_head, vector + row) : 0;
        copy_chunk(to + tile_offset<D>(row, chunk), q + from + chunk * CHUNK, wanted);
    }
}

/* ---- one warp, one tile of keys ------------------------------------------------------------------------------------ */

/* A warp's running sums: 2 x 16 rows; of each tile a lane has the rows lane / 4 and lane / 4 + 8. Row index r = 2 * tile + half. */
template <int D> struct warp_sums {
    float y[2][D / 8][4];
    float max[4]; /* of raw scores so far */
    float l[4];   /* this lane's part of the sum of weights */
};

/* s = Q K^T. `q`, `k`: where this lane's rows of the first matrices lie. Of Q: rows 0-7, rows 8-15, then both with channels 8-15; of K:
 * keys 0-7 with channels 0-7 and 8-15, then keys 8-15. */
template <typename T, int D> __device__ static inline void warp_scores(float s[2][KEYS / 8][4], uint32_t q, uint32_t k) {
#pragma unroll
    for (int i = 0; i < 2 * (KEYS / 8) * 4; i++)
        (&s[0][0][0])[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            load_matrices(a[m], (q ^ (step * 32)) + m * 16 * D * 2);
#pragma unroll
        for (int pair = 0; pair < KEYS / 16; pair++) {
            uint32_t b[4];
            load_matrices(b, (k ^ (step * 32)) + pair * 16 * D * 2);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply<T>(s[m][pair * 2], a[m], b);
                multiply<T>(s[m][pair * 2 + 1], a[m], b + 2);
            }
        }
    }
}

/* -inf where the key comes after the vector's position. `vector`: the warp's first. */
__device__ static inline void warp_mask(float s[2][KEYS / 8][4], const struct exact_shape &shape, int vector, int key, int lane) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int own = vector + m * 16 + half * 8 + lane / 4;
            int seen = shape.first + min(own, shape.n_vectors - 1) / shape.group + 1 - key - lane % 4 * 2; /* of the keys from mine on */
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                s[m][n][half * 2] = n * 8 < seen ? s[m][n][half * 2] : -INFINITY;
                s[m][n][half * 2 + 1] = n * 8 + 1 < seen ? s[m][n][half * 2 + 1] : -INFINITY;
            }
        }
}

/* Raw scores to weights times 2^14, in place; earlier sums are brought to the new maxima. Tiles come in ascending order and every vector
 * sees key 0, so a maximum is finite from the first tile on; before it, exp2(-inf) = 0 meets sums that are 0. */
template <int D> __device__ static inline void warp_weights(struct warp_sums<D> &w, float s[2][KEYS / 8][4], float scale) {
    float factor[4];
    bool same = true;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int m = r / 2, half = r % 2 * 2;
        float top = w.max[r];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            top = fmaxf(top, fmaxf(s[m][n][half], s[m][n][half + 1]));
        top = row_max(top);
        float shift = fmaf(top, scale, -WEIGHT_EXPONENT); /* what is subtracted in the exponent */
        factor[r] = exp2_fast(fmaf(w.max[r], scale, -WEIGHT_EXPONENT) - shift);
        same = same && top == w.max[r];
        w.max[r] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            s[m][n][half] = exp2_fast(fmaf(s[m][n][half], scale, -shift));
            s[m][n][half + 1] = exp2_fast(fmaf(s[m][n][half + 1], scale, -shift));
            sum += s[m][n][half] + s[m][n][half + 1];
        }
        w.l[r] = fmaf(w.l[r], factor[r], sum);
    }
    if (__all_sync(0xffffffffu, same)) /* maxima settle early */
        return;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                w.y[m][n][i] *= factor[m * 2 + i / 2];
}

/* y += P V. The layout of scores is that of the first operand: 16 keys are two of its 8-column tiles side by side. `v`: where this lane's
 * row of the first matrices lies; they are transposed: keys 0-7 and 8-15 of channels 0-7, then of channels 8-15. */
template <typename T, int D>
__device__ static inline void warp_values(struct warp_sums<D> &w, const float s[2][KEYS / 8][4], uint32_t v) {
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = pack<T>(s[m][step * 2 + i / 2][i % 2 * 2], s[m][step * 2 + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int pair = 0; pair < D / 16; pair++) {
            uint32_t b[4];
            load_matrices_transposed(b, (v ^ (pair * 32)) + step * 16 * D * 2);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply<T>(w.y[m][pair * 2], a[m], b);
                multiply<T>(w.y[m][pair * 2 + 1], a[m], b + 2);
            }
        }
    }
}

template <int D>
__device__ static inline void warp_store(const struct warp_sums<D> &w, const struct exact_shape &shape, int kv_head, int vector, int lane,
                                         float *out) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int m = r / 2, half = r % 2, own = vector + m * 16 + half * 8 + lane / 4;
        float inverse = 1.0f / row_sum(w.l[r]);
        if (own >= shape.n_vectors)
            continue;
        float *to = out + vector_offset<D>(shape, kv_head, own) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(to + n * 8) = make_float2(w.y[m][n][half * 2] * inverse, w.y[m][n][half * 2 + 1] * inverse);
    }
}

/* ---- the kernel ---------------------------------------------------------------------------------------------------- */

/* One CTA per tile of VECTORS vectors and KV head, the tiles that see the most keys first.
 * In bounds: q and out by vector < n_vectors = n_rows * group, kv_head < n_kv_heads; K and V by min(key, end - 1) < n. */
template <typename T, int D>
__global__ static void __launch_bounds__(THREADS, ctas_per_sm(D))
attend_exact_kernel(const struct exact_shape shape, const T *q, const T *kv, float *out) {
    extern __shared__ __align__(256) uint8_t shared[];
    constexpr int KV_TILE = KEYS * D * 2; /* bytes */
    int item = blockIdx.x, lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * WARP_VECTORS;
    int kv_head = shape.by_head ? item / shape.n_tiles : item % shape.n_kv_heads;
    int vector = (shape.n_tiles - 1 - (shape.by_head ? item % shape.n_tiles : item / shape.n_kv_heads)) * VECTORS;
    int lowest = shape.first + vector / shape.group; /* position of the first vector */
    int end = shape.first + min(vector + VECTORS - 1, shape.n_vectors - 1) / shape.group + 1; /* keys that the last vector sees */
    const T *k = kv + (int64_t)kv_head * 2 * shape.n * D, *v = k + (int64_t)shape.n * D;
    uint32_t q_tile = shared_address(shared), k_tile = q_tile + VECTORS * D * 2, v_tile = k_tile + STAGES * KV_TILE;

    copy_queries<T, D>(q_tile, q, shape, kv_head, vector);
    copy_keys<T, D>(k_tile, k, 0, end);
    copy_keys<T, D>(v_tile, v, 0, end);
    copy_commit();
    struct warp_sums<D> w;
#pragma unroll
    for (int i = 0; i < 2 * (D / 8) * 4; i++)
        (&w.y[0][0][0])[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        w.max[r] = -INFINITY;
        w.l[r] = 0.0f;
    }
    uint32_t q_lane = q_tile + tile_offset<D>(warp_row + lane % 16, lane / 16);
    uint32_t k_lane = tile_offset<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2), v_lane = tile_offset<D>(lane % 16, lane / 16);
    for (int key = 0, stage = 0; key < end; key += KEYS, stage ^= 1) {
        copy_wait(); /* this tile is here, and the barrier says that nobody reads the one before any more */
        __syncthreads();
        if (key + KEYS < end) {
            copy_keys<T, D>(k_tile + (stage ^ 1) * KV_TILE, k, key + KEYS, end);
            copy_keys<T, D>(v_tile + (stage ^ 1) * KV_TILE, v, key + KEYS, end);
            copy_commit();
        }
        float s[2][KEYS / 8][4];
        asm volatile("" : "+r"(q_lane)); /* or its variants for all steps would be kept in registers that are not there */
        warp_scores<T, D>(s, q_lane, k_tile + stage * KV_TILE + k_lane);
        if (key + KEYS > lowest + 1)
            warp_mask(s, shape, vector + warp_row, key, lane);
        warp_weights<D>(w, s, shape.scale);
        warp_values<T, D>(w, s, v_tile + stage * KV_TILE + v_lane);
    }
    warp_store<D>(w, shape, kv_head, vector + warp_row, lane, out);
}

/* cuDNN's 16-bit result to float, two values a thread; count is even. In bounds: i < pairs = count / 2. */
template <typename T> __global__ static void attend_exact_widen_kernel(const T *from, float *to, int64_t pairs) {
    int64_t i = (int64_t)blockIdx.x * WIDEN_THREADS + threadIdx.x;
    if (i >= pairs)
        return;
    uint32_t both = ((const uint32_t *)from)[i];
    const T *values = (const T *)&both;
    ((float2 *)to)[i] = make_float2(device_widen(values[0]), device_widen(values[1]));
}

/* ---- launchers ----------------------------------------------------------------------------------------------------- */

static int check_args(const struct attend_exact_args *a) {
    if (a->dtype != DTYPE_F16 && a->dtype != DTYPE_BF16)
        FAIL(STATUS_USAGE, "attend_exact: keys and values of type %s: the GPU takes f16 and bf16", dtype_name(a->dtype));
    if (a->head_dim != 64 && a->head_dim != 128)
        FAIL(STATUS_USAGE, "attend_exact: head_dim %d: 64 and 128 are there", a->head_dim);
    if (a->n_kv_heads < 1 || a->n_heads < a->n_kv_heads || a->n_heads % a->n_kv_heads != 0)
        FAIL(STATUS_USAGE, "attend_exact: %d query heads on %d KV heads: want a multiple", a->n_heads, a->n_kv_heads);
    if (a->n_rows < 0 || a->first < 0 || a->first + a->n_rows > a->n)
        FAIL(STATUS_USAGE, "attend_exact: rows %lld from position %lld: keys of %lld positions are there", (long long)a->n_rows,
             (long long)a->first, (long long)a->n);
    if (a->n > INT32_MAX / 2 || a->n_rows * a->n_heads > INT32_MAX / 2)
        FAIL(STATUS_USAGE, "attend_exact: %lld positions, %lld rows of %d heads: more than 2^30 at once", (long long)a->n,
             (long long)a->n_rows, a->n_heads);
    if (!(a->scale > 0.0f))
        FAIL(STATUS_USAGE, "attend_exact: scale %g of scores: want a positive number", (double)a->scale);
    if ((uintptr_t)a->q % 16 != 0 || (uintptr_t)a->kv % 16 != 0 || (uintptr_t)a->out % 8 != 0)
        FAIL(STATUS_USAGE, "attend_exact: q, kv at %p, %p, out at %p: want multiples of 16, 16, 8", a->q, a->kv, (void *)a->out);
    return STATUS_OK;
}

template <typename T, int D> static int launch_exact(const struct cuda_launch *launch, const struct attend_exact_args *a) {
    int group = a->n_heads / a->n_kv_heads;
    struct exact_shape shape = {};
    shape.n_vectors = (int)(a->n_rows * group);
    shape.first = (int)a->first;
    shape.n = (int)a->n;
    shape.group = group;
    shape.n_heads = a->n_heads;
    shape.n_kv_heads = a->n_kv_heads;
    shape.n_tiles = (int)ceil_div(shape.n_vectors, VECTORS);
    shape.scale = a->scale * LOG2_E;
    /* Head after head, running tiles read the same keys and L2 serves most of them; but the last head's tiles must fill the GPU a few times
     * over, or it would idle while the longest of them end. */
    shape.by_head = shape.n_tiles >= 4 * ctas_per_sm(D) * launch->n_sms;
    cudaError_t error = cudaFuncSetAttribute(attend_exact_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(D));
    if (error != cudaSuccess)
        FAIL(STATUS_FAILED, "attend_exact: %d bytes of shared memory: %s", shared_bytes(D), cudaGetErrorString(error));
    attend_exact_kernel<T, D><<<shape.n_tiles * a->n_kv_heads, THREADS, shared_bytes(D), cuda_stream_of(launch)>>>(
        shape, (const T *)a->q, (const T *)a->kv, a->out);
    CHECK_LAUNCH("attend_exact");
    return STATUS_OK;
}

extern "C" int cuda_attend_exact_own(const struct cuda_launch *launch, const struct attend_exact_args *args) {
    TRY(check_args(args));
    if (args->n_rows == 0)
        return STATUS_OK;
    if (args->dtype == DTYPE_F16)
        return args->head_dim == 64 ? launch_exact<__half, 64>(launch, args) : launch_exact<__half, 128>(launch, args);
    return args->head_dim == 64 ? launch_exact<__nv_bfloat16, 64>(launch, args) : launch_exact<__nv_bfloat16, 128>(launch, args);
}

extern "C" int cuda_attend_exact_widen(const struct cuda_launch *launch, enum dtype dtype, const void *from, float *to, int64_t count) {
    int64_t pairs = count / 2;
    int n_blocks = (int)ceil_div(pairs, WIDEN_THREADS);
    if (pairs == 0)
        return STATUS_OK;
    if (dtype == DTYPE_F16)
        attend_exact_widen_kernel<<<n_blocks, WIDEN_THREADS, 0, cuda_stream_of(launch)>>>((const __half *)from, to, pairs);
    else
        attend_exact_widen_kernel<<<n_blocks, WIDEN_THREADS, 0, cuda_stream_of(launch)>>>((const __nv_bfloat16 *)from, to, pairs);
    CHECK_LAUNCH("attend_exact: widen");
    return STATUS_OK;
}

extern "C" int cuda_attend_exact(const struct cuda_launch *launch, const struct attend_exact_args *args) {
    bool done = false;
    TRY(check_args(args));
    if (launch->dnn && args->n_rows > 0 && cuda_dnn_pays(args))
        TRY(cuda_dnn_attend(launch, args, &done));
    return done ? STATUS_OK : cuda_attend_exact_own(launch, args);
}
