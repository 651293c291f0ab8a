/* y = x w^T: the dense layers. Three ways, chosen by choose_way from the number of rows and the layout alone.
 *
 * Up to FEW_ROWS rows (decoding) the weights' way through DRAM is the time that it takes, and x is not rounded:
 *  - dot: one row. A warp dots a few weight rows with it on the CUDA cores. Also the plain way of all that the next one cannot read
 *    (float weights, rows of weights that do not begin at 16 bytes), four rows of x at a time.
 *  - tensor: 2 rows and more. Weights are the 16-row operand of mma.m16n8k8 in TF32, which holds every fp16 and bf16 number; x is split
 *    into two TF32 numbers (high and low), which leaves off less than 2^-21 of it and keeps the range of float. A k-step of 8 takes
 *    the columns that make both operands 16-byte loads straight into registers: weights pass no shared memory. The warps of a
 *    block, and on Hopper the blocks of a cluster, share the sum over k of one tile of outputs and add up in a fixed order.
 *    Both begin early (device.cuh) and fetch their first weights, as many as registers hold, before they wait for x: the weights' way
 *    through DRAM goes on while the small kernels between two products run.
 * More rows (prefill): x is rounded to the weights' type and cuBLASLt multiplies. */
#include "kernels/cuda/blas.h"
#include "kernels/cuda/device.cuh"

enum {
    FEW_ROWS = 32,            /* beyond, two TF32 products of a weight take longer than its way from DRAM (H100: 500 TFLOP/s, 3 TB/s) */
    SIZE_LIMIT = 1 << 27,     /* of n_in, n_out and tensor's ldx: 32-bit offsets within a tile, 32-bit grids */

    DOT_WARPS = 8,            /* of a block */
    DOT_OUTS = 2,             /* weight rows of a warp */
    DOT_TAIL = 2,             /* steps at a time at the end of a row */
    DOT_PLAIN_ROWS = 4,       /* rows of x at a time where tensor cannot be used */
    DOT_WARPS_PER_SM = 12,    /* wanted: 4 KiB of loads in flight each; Little's law asks for 25 to 40 KiB an SM */

    TENSOR_WARPS = 8,         /* of a block */
    TENSOR_K = 32,            /* columns of a step: 4 lanes of 16 bytes */
    TENSOR_MOST_SPLITS = 8,   /* blocks of a cluster: the most that every device takes */

    NARROW_THREADS = 256,
    BLAS_TILE = 128,           /* where a product is cut into blocks: multiples of the library's tiles */
    BLAS_WORKSPACE = 32 << 20, /* bytes of scratch: what the library recommends for Hopper */
};

/* ---- loads and fragments ------------------------------------------------------------------------------------------- */

/* 16 bytes of weights, which are read once: not kept in L1, where x lies. Zeros, and no access, unless valid. No .nc, which ptxas would
 * move behind the wait for x. */
__device__ static inline uint4 load_once(const void *from, bool valid) {
    uint4 to;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t"
                 "mov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\tmov.u32 %2, 0;\n\tmov.u32 %3, 0;\n\t"
                 "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "=&r"(to.x), "=&r"(to.y), "=&r"(to.z), "=&r"(to.w)
                 : "l"(from), "r"((int)valid));
    return to;
}

/* VEC weights: 16 bytes, or one alone (in the low bits of x). */
template <typename T, int VEC> __device__ static inline uint4 load_weights(const T *from, bool valid) {
    static_assert(VEC == 1 || VEC * sizeof(T) == 16, "a vector is 16 bytes");
    if (VEC > 1)
        return load_once(from, valid);
    uint4 to = make_uint4(0, 0, 0, 0);
    if (valid && sizeof(T) == 2)
        to.x = __ldg((const unsigned short *)from);
    else if (valid)
        to.x = __ldg((const unsigned *)from);
    return to;
}

__device__ static inline uint32_t word_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* Both values of a word of two, low half first. */
__device__ static inline float2 widen_pair(uint32_t word, __half) {
    __half2_raw raw;
    raw.x = (unsigned short)word;
    raw.y = (unsigned short)(word >> 16);
    return __half22float2(__half2(raw));
}
__device__ static inline float2 widen_pair(uint32_t word, __nv_bfloat16) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

/* Value i of a vector. */
template <typename T> __device__ static inline float weight_at(const uint4 &v, int i) {
    float2 pair = widen_pair(word_of(v, i / 2), T());
    return i % 2 ? pair.y : pair.x;
}
template <> __device__ inline float weight_at<float>(const uint4 &v, int i) { return __uint_as_float(word_of(v, i)); }

/* N floats from a 16-byte aligned place (any place if N is 1); zeros, and no access, unless valid. Plain loads: the kernel in front may
 * write x. */
template <int N> __device__ static inline void load_x(const float *from, bool valid, float (&to)[N]) {
    static_assert(N == 1 || N % 4 == 0, "one float or whole vectors");
    if constexpr (N == 1)
        to[0] = valid ? *from : 0.0f;
    else
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            float4 four = valid ? ((const float4 *)from)[i] : make_float4(0, 0, 0, 0);
            to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
        }
}

/* Asks for `bytes` of weights, a multiple of 16 from a 16-byte aligned place, to be brought to L2. Before Hopper nothing begins early. */
__device__ static inline void prefetch_weights(const void *from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

/* The upper 19 bits: sign, exponent and the 10 bits of fraction of a TF32 number. */
__device__ static inline uint32_t tf32_part(float x) { return __float_as_uint(x) & 0xffffe000u; }

/* c (16 x 8) += a (16 x 8) b (8 x 8). Lane 4 g + t holds a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g);
 * c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1). */
__device__ static inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ static inline void store_y(const struct matmul_args &a, int64_t row, int64_t out, float sum) {
    a.y[row * a.ldy + out] = a.bias ? a.bias[out] + sum : sum;
}

/* ---- dot ------------------------------------------------------------------------------------------------------------ */

/* The weights of UNROLL steps of a warp, `stride` columns apart, the first at column k of this lane. CHECKED: columns from n_in on count
 * as zeros. */
template <typename T, int VEC, int UNROLL, bool CHECKED>
__device__ static inline void dot_load(uint4 (&raw)[UNROLL][DOT_OUTS], const T *const (&w)[DOT_OUTS], int k, int stride, int n_in) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
        for (int o = 0; o < DOT_OUTS; o++)
            raw[u][o] = load_weights<T, VEC>(w[o] + (k + u * stride), !CHECKED || k + u * stride < n_in);
}

/* The sums over the same steps. */
template <typename T, int VEC, int ROWS, int UNROLL, bool CHECKED>
__device__ static inline void dot_add(float (&sums)[ROWS][DOT_OUTS], const uint4 (&raw)[UNROLL][DOT_OUTS], const float *const (&x)[ROWS],
                                      int k, int stride, int n_in) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        float v[ROWS][VEC];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            load_x<VEC>(x[r] + (k + u * stride), !CHECKED || k + u * stride < n_in, v[r]);
#pragma unroll
        for (int o = 0; o < DOT_OUTS; o++)
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float weight = weight_at<T>(raw[u][o], i);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    sums[r][o] = fmaf(weight, v[r][i], sums[r][o]);
            }
    }
}

/* All loads of weights go out before the first is used. */
template <typename T, int VEC, int ROWS, int UNROLL, bool CHECKED>
__device__ static inline void dot_steps(float (&sums)[ROWS][DOT_OUTS], const T *const (&w)[DOT_OUTS], const float *const (&x)[ROWS], int k,
                                        int stride, int n_in) {
    uint4 raw[UNROLL][DOT_OUTS];
    dot_load<T, VEC, UNROLL, CHECKED>(raw, w, k, stride, n_in);
    dot_add<T, VEC, ROWS, UNROLL, CHECKED>(sums, raw, x, k, stride, n_in);
}

/* The first steps, around the wait for x: their weights come into registers meanwhile, those of as many steps after them into L2, for
 * which one warp of each `split` asks. */
template <typename T, int VEC, int ROWS, int UNROLL>
__device__ static inline void dot_first_steps(float (&sums)[ROWS][DOT_OUTS], const T *const (&w)[DOT_OUTS], const float *const (&x)[ROWS],
                                              int k, int stride, int n_in) {
    uint4 raw[UNROLL][DOT_OUTS];
    int after = UNROLL * stride;
    dot_load<T, VEC, UNROLL, true>(raw, w, k, stride, n_in);
    if (VEC > 1 && k == 0 && after < n_in)
#pragma unroll
        for (int o = 0; o < DOT_OUTS; o++)
            prefetch_weights(w[o] + after, (uint32_t)(min(after, n_in - after) * (int)sizeof(T)));
    wait_for_earlier();
    let_later_begin();
    dot_add<T, VEC, ROWS, UNROLL, true>(sums, raw, x, k, stride, n_in);
}

/* Block b: rows of x from (b % n_groups) ROWS on, so that the groups of one tile of weights run side by side and find it in L2.
 * `split` warps share the sum over k of DOT_OUTS weight rows. In bounds: weight and x rows are clamped to the last that there is (their
 * sums are not stored); the unchecked steps end at or before n_in, the others check (n_in is a multiple of VEC: a vector is inside or
 * outside whole). */
template <typename T, int VEC, int ROWS>
static __global__ void __launch_bounds__(DOT_WARPS * WARP, ROWS == 1 ? 3 : 1)
dot_kernel(struct matmul_args a, int split, int n_groups) {
    enum { STEP = WARP * VEC, UNROLL = VEC == 1 ? 8 : 4 };
    __shared__ float partial[DOT_WARPS][ROWS * DOT_OUTS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_in = (int)a.n_in, stride = split * STEP;
    int64_t live = device_live_rows(a.n_rows, a.live), row = (int64_t)(blockIdx.x % n_groups) * ROWS;
    int64_t first_out = (int64_t)(blockIdx.x / n_groups) * (DOT_WARPS / split) * DOT_OUTS;
    if (row >= live) {
        wait_for_earlier();
        return;
    }
    const T *w[DOT_OUTS];
    const float *x[ROWS];
    float sums[ROWS][DOT_OUTS] = {};
#pragma unroll
    for (int o = 0; o < DOT_OUTS; o++)
        w[o] = (const T *)a.w + min_i64(first_out + warp / split * DOT_OUTS + o, a.n_out - 1) * a.n_in;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        x[r] = a.x + min_i64(row + r, live - 1) * a.ldx;
    int first = warp % split * STEP; /* column of the warp's next step */
    dot_first_steps<T, VEC, ROWS, UNROLL>(sums, w, x, first + lane * VEC, stride, n_in);
    first += UNROLL * stride;
    for (; first + (UNROLL - 1) * stride + STEP <= n_in; first += UNROLL * stride)
        dot_steps<T, VEC, ROWS, UNROLL, false>(sums, w, x, first + lane * VEC, stride, n_in);
    for (; first < n_in; first += DOT_TAIL * stride)
        dot_steps<T, VEC, ROWS, DOT_TAIL, true>(sums, w, x, first + lane * VEC, stride, n_in);
#pragma unroll
    for (int i = 0; i < ROWS * DOT_OUTS; i++) {
        float sum = warp_sum(sums[i / DOT_OUTS][i % DOT_OUTS]);
        if (lane == 0)
            partial[warp][i] = sum;
    }
    __syncthreads();
    int task = threadIdx.x / (ROWS * DOT_OUTS), i = threadIdx.x % (ROWS * DOT_OUTS);
    if (task >= DOT_WARPS / split)
        return;
    float total = 0;
    for (int part = 0; part < split; part++)
        total += partial[task * split + part][i];
    int64_t out = first_out + task * DOT_OUTS + i % DOT_OUTS;
    if (out < a.n_out && row + i / DOT_OUTS < live)
        store_y(a, row + i / DOT_OUTS, out, total);
}

template <typename T, int VEC, int ROWS> static void dot_start(const struct cuda_launch *launch, const struct matmul_args *a) {
    int n_groups = (int)ceil_div(a->n_rows, ROWS), split = 1;
    int64_t n_tasks = ceil_div(a->n_out, DOT_OUTS);
    while (split < DOT_WARPS && n_tasks * n_groups * split < (int64_t)launch->n_sms * DOT_WARPS_PER_SM && split * WARP * VEC < a->n_in)
        split *= 2;
    int64_t n_blocks = ceil_div(n_tasks, DOT_WARPS / split) * n_groups;
    (void)launch_early(launch, dot_kernel<T, VEC, ROWS>, dim3((unsigned)n_blocks), DOT_WARPS * WARP, 0, *a, split, n_groups);
}

static bool aligned_16(const void *pointer) { return (uintptr_t)pointer % 16 == 0; }

/* Every row of x and of w begins at 16 bytes, and ends there. */
static bool has_vectors(const struct matmul_args *a) {
    int64_t vector = a->dtype == DTYPE_F32 ? 4 : 8;
    return aligned_16(a->w) && aligned_16(a->x) && a->n_in % vector == 0 && a->ldx % 4 == 0 && a->ldx < SIZE_LIMIT;
}

template <typename T> static void dot_start_as(const struct cuda_launch *launch, const struct matmul_args *a) {
    enum { VEC = 16 / sizeof(T) };
    if (has_vectors(a))
        a->n_rows == 1 ? dot_start<T, VEC, 1>(launch, a) : dot_start<T, VEC, DOT_PLAIN_ROWS>(launch, a);
    else
        a->n_rows == 1 ? dot_start<T, 1, 1>(launch, a) : dot_start<T, 1, DOT_PLAIN_ROWS>(launch, a);
}

static int dot(const struct cuda_launch *launch, const struct matmul_args *a) {
    switch (a->dtype) {
    case DTYPE_F32: dot_start_as<float>(launch, a); break;
    case DTYPE_F16: dot_start_as<__half>(launch, a); break;
    default: dot_start_as<__nv_bfloat16>(launch, a);
    }
    CHECK_LAUNCH("matmul, dot");
    return STATUS_OK;
}

/* ---- tensor --------------------------------------------------------------------------------------------------------- */

/* Among the n blocks of a cluster, which see each other's shared memory afterwards. Below Hopper a block is alone. */
__device__ static inline void cluster_barrier(int n) {
#if __CUDA_ARCH__ >= 900
    if (n > 1) {
        asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

/* The float that lies in block `rank` of the cluster where `own` lies in this one. */
__device__ static inline float cluster_load(const float *own, int rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t address = (uint32_t)__cvta_generic_to_shared(own);
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %0, %2;\n\tld.shared::cluster.f32 %1, [%0];"
                 : "+r"(address), "=f"(value)
                 : "r"(rank)
                 : "memory");
    return value;
#else
    return *own;
#endif
}

/* MT tiles of 16 weight rows times NT tiles of 8 rows of x. */
template <int MT, int NT> struct tensor_tile {
    enum {
        OUTS = 16 * MT,
        ROWS = 8 * NT,
        DEPTH = MT == 1 ? 4 : 8 / MT,  /* steps in flight: 8 KiB of weights a warp (MT = 1: 4) */
        LD = OUTS + 4,                 /* floats from row to row of a warp's sums: the lanes' stores meet 32 different banks */
        SUMS = ROWS * LD,              /* floats of a warp's sums */
        SHARED = (TENSOR_WARPS * SUMS + ROWS * OUTS) * 4, /* bytes: sums of the warps, then of the block [ROWS][OUTS] */
        BLOCKS_PER_SM = NT == 1 ? 2 : 1, /* as registers allow */
    };
};

/* Sums of one step: lane t's weights are the columns 8 t .. 8 t + 7 of a row (raw: rows g and g + 8 of each tile), so are its x of row g.
 * Product p = 0..3 takes column 8 t + 2 p as its column t and 8 t + 2 p + 1 as its t + 4. */
template <typename T, int MT, int NT>
__device__ static inline void tensor_step(float (&sums)[MT][NT][4], const uint4 (&raw)[MT][2], const float (&x)[NT][8]) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float2 upper = widen_pair(word_of(raw[m][0], p), T()), lower = widen_pair(word_of(raw[m][1], p), T());
            a[m][0] = __float_as_uint(upper.x), a[m][1] = __float_as_uint(lower.x);
            a[m][2] = __float_as_uint(upper.y), a[m][3] = __float_as_uint(lower.y);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint32_t high0 = tf32_part(x[n][2 * p]), high1 = tf32_part(x[n][2 * p + 1]);
            uint32_t low0 = tf32_part(x[n][2 * p] - __uint_as_float(high0)), low1 = tf32_part(x[n][2 * p + 1] - __uint_as_float(high1));
#pragma unroll
            for (int m = 0; m < MT; m++)
                mma_tf32(sums[m][n], a[m], low0, low1);
#pragma unroll
            for (int m = 0; m < MT; m++)
                mma_tf32(sums[m][n], a[m], high0, high1);
        }
    }
}

/* The block's warps' sums, and then those of the cluster's blocks, each added in order of rank. Every index is below the sizes in
 * tensor_tile; outputs and rows beyond the last are not stored. Every thread of every block of the cluster comes here. */
template <int MT, int NT>
__device__ static inline void tensor_add_up(const struct matmul_args &a, float *shared, const float (&sums)[MT][NT][4], int n_splits,
                                            int64_t live) {
    typedef tensor_tile<MT, NT> tile;
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, rank = blockIdx.x % n_splits;
    int64_t first_out = (int64_t)(blockIdx.x / n_splits) * tile::OUTS;
    float *own = shared + warp * tile::SUMS, *block = shared + TENSOR_WARPS * tile::SUMS;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                own[(8 * n + 2 * t + i % 2) * tile::LD + 16 * m + g + 8 * (i / 2)] = sums[m][n][i];
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < tile::ROWS * tile::OUTS; i += TENSOR_WARPS * WARP) {
        float sum = 0;
#pragma unroll
        for (int from = 0; from < TENSOR_WARPS; from++)
            sum += shared[from * tile::SUMS + i / tile::OUTS * tile::LD + i % tile::OUTS];
        block[i] = sum;
    }
    cluster_barrier(n_splits);
#pragma unroll 1
    for (int i = rank * TENSOR_WARPS * WARP + threadIdx.x; i < tile::ROWS * tile::OUTS; i += n_splits * TENSOR_WARPS * WARP) {
        float sum = 0;
#pragma unroll 1
        for (int from = 0; from < n_splits; from++)
            sum += cluster_load(block + i, from);
        int64_t row = i / tile::OUTS, out = first_out + i % tile::OUTS;
        if (row < live && out < a.n_out)
            store_y(a, row, out, sum);
    }
    if (n_splits > 1)
        cluster_barrier(n_splits); /* nobody's shared memory ends while another reads it */
}

/* Block b: part b % n_splits (its rank in the cluster) of the steps over k of output tile b / n_splits; its warps share that part, each
 * a run of steps. A ring of DEPTH steps of weights is in flight, from before the wait on (up to 128 KiB a multiprocessor: no need to ask
 * L2 for more); x is one step ahead. In bounds: rows of w are clamped to the last, rows
 * of x to the last live one; columns are checked in whole vectors (n_in is a multiple of 8); steps beyond the warp's last are neither
 * loaded nor summed. */
template <typename T, int MT, int NT>
static __global__ void __launch_bounds__(TENSOR_WARPS * WARP, tensor_tile<MT, NT>::BLOCKS_PER_SM)
tensor_kernel(struct matmul_args a, int n_splits) {
    enum { DEPTH = tensor_tile<MT, NT>::DEPTH };
    extern __shared__ float tensor_shared[];
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, n_in = (int)a.n_in;
    int64_t live = device_live_rows(a.n_rows, a.live), first_out = (int64_t)(blockIdx.x / n_splits) * tensor_tile<MT, NT>::OUTS;
    if (live <= 0) { /* all blocks alike */
        wait_for_earlier();
        return;
    }
    int64_t n_steps = (n_in + TENSOR_K - 1) / TENSOR_K, part = blockIdx.x % n_splits * TENSOR_WARPS + warp;
    int step = (int)(n_steps * part / (n_splits * TENSOR_WARPS)), last = (int)(n_steps * (part + 1) / (n_splits * TENSOR_WARPS));
    const uint4 *w = (const uint4 *)a.w + (first_out * n_in / 8 + t); /* 8 values each, the rows of the tile at `offset` */
    uint32_t offset[MT][2];
    uint32_t x_offset[NT]; /* of this lane's first columns, in vectors of 4 */
#pragma unroll
    for (int i = 0; i < 2 * MT; i++)
        offset[i / 2][i % 2] = (uint32_t)(min_i64(first_out + 8 * i + g, a.n_out - 1) - first_out) * (uint32_t)(n_in / 8);
#pragma unroll
    for (int n = 0; n < NT; n++)
        x_offset[n] = (uint32_t)min_i64(8 * n + g, live - 1) * (uint32_t)(a.ldx / 4) + 2 * t;
    uint4 ring[DEPTH][MT][2];
    float ahead[2][NT][8], sums[MT][NT][4] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
#pragma unroll
        for (int i = 0; i < 2 * MT; i++)
            ring[d][i / 2][i % 2] = load_once(w + (offset[i / 2][i % 2] + (step + d) * 4),
                                              step + d < last && (step + d) * TENSOR_K + 8 * t < n_in);
    wait_for_earlier();
    let_later_begin();
#pragma unroll
    for (int n = 0; n < NT; n++)
        load_x<8>(a.x + 4 * (size_t)(x_offset[n] + step * 8), step < last && step * TENSOR_K + 8 * t < n_in, ahead[0][n]);
    for (; step < last; step += DEPTH)
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            int now = step + d;
            if (now >= last)
                break;
#pragma unroll
            for (int n = 0; n < NT; n++)
                load_x<8>(a.x + 4 * (size_t)(x_offset[n] + (now + 1) * 8), now + 1 < last && (now + 1) * TENSOR_K + 8 * t < n_in,
                          ahead[(d + 1) % 2][n]);
            tensor_step<T, MT, NT>(sums, ring[d], ahead[d % 2]);
#pragma unroll
            for (int i = 0; i < 2 * MT; i++)
                ring[d][i / 2][i % 2] = load_once(w + (offset[i / 2][i % 2] + (now + DEPTH) * 4),
                                                  now + DEPTH < last && (now + DEPTH) * TENSOR_K + 8 * t < n_in);
        }
    tensor_add_up<MT, NT>(a, tensor_shared, sums, n_splits, live);
}

template <typename T, int MT, int NT> static int tensor_start(const struct cuda_launch *launch, const struct matmul_args *a, int n_splits) {
    typedef tensor_tile<MT, NT> tile;
    dim3 grid((unsigned)(ceil_div(a->n_out, tile::OUTS) * n_splits));
    cudaError_t error = cudaFuncSetAttribute(tensor_kernel<T, MT, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, tile::SHARED);
    if (error == cudaSuccess)
        error = launch_early_clusters(launch, tensor_kernel<T, MT, NT>, grid, TENSOR_WARPS * WARP, (size_t)tile::SHARED, (unsigned)n_splits,
                                      *a, n_splits);
    if (error != cudaSuccess)
        FAIL(STATUS_FAILED, "CUDA: matmul, tensor: %lld rows, %lld -> %lld, %d splits: %s", (long long)a->n_rows, (long long)a->n_in,
             (long long)a->n_out, n_splits, cudaGetErrorString(error));
    return STATUS_OK;
}

/* Sizes of the tile, and how many blocks share one: as many as there is room for at once. */
struct tensor_plan {
    int mt, nt, n_splits;
};

static struct tensor_plan tensor_plan_for(const struct cuda_launch *launch, const struct matmul_args *a) {
    int nt = a->n_rows <= 8 ? 1 : a->n_rows <= 16 ? 2 : 4;
    int mt = nt == 1 ? 2 : 4; /* weight rows that share a load of x: at 8 and 16 rows x brings half of the weights' bytes through L2 */
    int64_t room = (int64_t)launch->n_sms * (nt == 1 ? 2 : 1), n_steps = ceil_div(a->n_in, TENSOR_K);
    int most = launch->architecture >= 90 ? TENSOR_MOST_SPLITS : 1, n_splits = 1;
    while (most > 1 && most * TENSOR_WARPS > n_steps)
        most /= 2;
    if (ceil_div(a->n_out, 16 * mt) * most * 2 <= room)
        mt = 1; /* a small slice of a matrix */
    while (n_splits < most && ceil_div(a->n_out, 16 * mt) * n_splits * 2 <= room)
        n_splits *= 2;
    return {mt, nt, n_splits};
}

template <typename T> static int tensor_start_as(const struct cuda_launch *launch, const struct matmul_args *a) {
    struct tensor_plan plan = tensor_plan_for(launch, a);
    switch (10 * plan.mt + plan.nt) {
    case 11: return tensor_start<T, 1, 1>(launch, a, plan.n_splits);
    case 12: return tensor_start<T, 1, 2>(launch, a, plan.n_splits);
    case 14: return tensor_start<T, 1, 4>(launch, a, plan.n_splits);
    case 21: return tensor_start<T, 2, 1>(launch, a, plan.n_splits);
    case 42: return tensor_start<T, 4, 2>(launch, a, plan.n_splits);
    default: return tensor_start<T, 4, 4>(launch, a, plan.n_splits);
    }
}

static int tensor(const struct cuda_launch *launch, const struct matmul_args *a) {
    return a->dtype == DTYPE_F16 ? tensor_start_as<__half>(launch, a) : tensor_start_as<__nv_bfloat16>(launch, a);
}

/* ---- many rows: cuBLASLt --------------------------------------------------------------------------------------------- */

/* Saturates: an activation beyond 65504 would be an infinity, which cancels nothing and makes the rest of the model NaN, while a cut one
 * (they occur, rarely, in single channels of a few layers) leaves a small error in one sum. NaN stays. */
__device__ static inline __half narrow_finite(float x, __half) {
    return __float2half_rn(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}
__device__ static inline __nv_bfloat16 narrow_finite(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }

/* Block i: row first + i of x, rounded, zeros in columns n_in .. k_pad - 1 (k_pad is a multiple of 8) and in rows that are not live. */
template <typename T>
static __global__ void narrow_kernel(struct matmul_args a, int64_t first, int64_t k_pad, bool vectors, T *to) {
    int64_t row = first + blockIdx.x;
    bool is_live = row < device_live_rows(a.n_rows, a.live);
    const float *x = a.x + row * a.ldx;
    for (int64_t k = 4 * threadIdx.x; k < k_pad; k += 4 * NARROW_THREADS) {
        float v[4] = {};
        if (is_live && vectors && k + 4 <= a.n_in)
            load_x<4>(x + k, true, v);
        else if (is_live)
            for (int i = 0; i < 4 && k + i < a.n_in; i++)
                v[i] = x[k + i];
        alignas(8) T four[4];
        for (int i = 0; i < 4; i++)
            four[i] = narrow_finite(v[i], T());
        *(uint2 *)(to + (int64_t)blockIdx.x * k_pad + k) = *(const uint2 *)four;
    }
}

/* Block i: row first + i of the weights, zeros in columns n_in .. k_pad - 1. */
static __global__ void pad_kernel(struct matmul_args a, int64_t first, int64_t k_pad, uint16_t *to) {
    const uint16_t *w = (const uint16_t *)a.w + (first + blockIdx.x) * a.n_in;
    for (int64_t k = threadIdx.x; k < k_pad; k += NARROW_THREADS)
        to[blockIdx.x * k_pad + k] = k < a.n_in ? w[k] : 0;
}

/* What lies in the scratch, after the workspace: a copy of the bias if it is not aligned, x, and the weights if their rows are not. */
struct many_plan {
    int64_t k_pad, x_rows, w_rows; /* rows of x and of w of one product */
    bool pad;
    char *bias, *x, *w;
};

static int many_plan_for(const struct cuda_launch *launch, const struct matmul_args *a, struct many_plan *p) {
    int64_t left = (int64_t)CUDA_SCRATCH_BYTES - BLAS_WORKSPACE, row_bytes = round_up(a->n_in, 8) * 2;
    int64_t bias_bytes = aligned_16(a->bias) ? 0 : round_up(a->n_out * 4, 256);
    p->k_pad = round_up(a->n_in, 8);
    p->pad = a->n_in % 8 != 0 || !aligned_16(a->w);
    left -= bias_bytes;
    int64_t x_bytes = p->pad ? left / 3 / 256 * 256 : left;
    p->x_rows = min_i64(a->n_rows, x_bytes / row_bytes);
    p->w_rows = p->pad ? min_i64(a->n_out, (left - x_bytes) / row_bytes) : a->n_out;
    if (left <= 0 || p->x_rows < 1 || p->w_rows < min_i64(a->n_out, BLAS_TILE))
        FAIL(STATUS_USAGE, "matmul: %lld -> %lld does not fit the scratch of %zu bytes", (long long)a->n_in, (long long)a->n_out,
             CUDA_SCRATCH_BYTES);
    if (p->x_rows < a->n_rows && p->x_rows > BLAS_TILE)
        p->x_rows = p->x_rows / BLAS_TILE * BLAS_TILE;
    if (p->w_rows < a->n_out)
        p->w_rows = p->w_rows / BLAS_TILE * BLAS_TILE; /* keeps y and bias of a block aligned */
    p->bias = (char *)launch->scratch + BLAS_WORKSPACE;
    p->x = p->bias + bias_bytes;
    p->w = p->x + x_bytes;
    return STATUS_OK;
}

static struct blas_product product_of(const struct cuda_launch *launch, const struct matmul_args *a) {
    struct blas_product product = {};
    product.dtype = a->dtype, product.n_rows = a->n_rows, product.n_out = a->n_out, product.n_in = a->n_in;
    product.x = a->x, product.ldx = a->ldx, product.w = a->w, product.ldw = a->n_in;
    product.bias = a->bias, product.y = a->y, product.ldy = a->ldy;
    product.workspace = launch->scratch, product.workspace_bytes = BLAS_WORKSPACE, product.stream = launch->stream;
    return product;
}

/* Rows `row` and on of x (already in p->x) with the weight rows `out` and on. */
static int many_product(const struct cuda_launch *launch, const struct matmul_args *a, const struct many_plan *p, int64_t row,
                        int64_t out) {
    struct blas_product product = product_of(launch, a);
    product.n_rows = min_i64(p->x_rows, a->n_rows - row), product.n_out = min_i64(p->w_rows, a->n_out - out);
    product.n_in = p->k_pad, product.ldw = p->k_pad, product.ldx = p->k_pad;
    product.x = p->x, product.y = a->y + row * a->ldy + out;
    if (p->pad)
        product.w = p->w;
    if (a->bias)
        product.bias = (aligned_16(a->bias) ? a->bias : (const float *)p->bias) + out;
    return cuda_blas_product(launch->blas, &product);
}

static int many(const struct cuda_launch *launch, const struct matmul_args *a) {
    struct many_plan p;
    cudaStream_t stream = cuda_stream_of(launch);
    if (!launch->blas)
        FAIL(STATUS_USAGE, "matmul: %d rows need cuBLASLt, which this backend has not opened", a->n_rows);
    TRY(many_plan_for(launch, a, &p));
    if (a->bias && !aligned_16(a->bias)) {
        cudaError_t error = cudaMemcpyAsync(p.bias, a->bias, (size_t)a->n_out * 4, cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess)
            FAIL(STATUS_FAILED, "CUDA: matmul: copy of the bias: %s", cudaGetErrorString(error));
    }
    if (a->dtype == DTYPE_F32) {
        struct blas_product product = product_of(launch, a);
        product.bias = a->bias && !aligned_16(a->bias) ? (const float *)p.bias : a->bias;
        return cuda_blas_product(launch->blas, &product);
    }
    bool vectors = aligned_16(a->x) && a->ldx % 4 == 0;
    for (int64_t out = 0; out < a->n_out; out += p.w_rows) {
        if (p.pad)
            pad_kernel<<<(unsigned)min_i64(p.w_rows, a->n_out - out), NARROW_THREADS, 0, stream>>>(*a, out, p.k_pad, (uint16_t *)p.w);
        for (int64_t row = 0; row < a->n_rows; row += p.x_rows) {
            unsigned n = (unsigned)min_i64(p.x_rows, a->n_rows - row);
            if (a->dtype == DTYPE_F16)
                narrow_kernel<<<n, NARROW_THREADS, 0, stream>>>(*a, row, p.k_pad, vectors, (__half *)p.x);
            else
                narrow_kernel<<<n, NARROW_THREADS, 0, stream>>>(*a, row, p.k_pad, vectors, (__nv_bfloat16 *)p.x);
            CHECK_LAUNCH("matmul, rounding");
            TRY(many_product(launch, a, &p, row, out));
        }
    }
    return STATUS_OK;
}

/* ---- the choice ------------------------------------------------------------------------------------------------------ */

enum way { WAY_DOT, WAY_TENSOR, WAY_MANY };

static enum way choose_way(const struct matmul_args *a) {
    if (a->n_rows > FEW_ROWS)
        return WAY_MANY;
    return a->n_rows > 1 && a->dtype != DTYPE_F32 && has_vectors(a) ? WAY_TENSOR : WAY_DOT;
}

extern "C" int cuda_matmul(const struct cuda_launch *launch, const struct matmul_args *a) {
    if (a->dtype != DTYPE_F32 && a->dtype != DTYPE_F16 && a->dtype != DTYPE_BF16)
        FAIL(STATUS_USAGE, "matmul: weights are %s, expected F32, F16 or BF16", dtype_name(a->dtype));
    if (a->n_rows <= 0 || a->n_out == 0)
        return STATUS_OK;
    if (a->n_in < 1 || a->n_in >= SIZE_LIMIT || a->n_out < 0 || a->n_out >= SIZE_LIMIT || a->ldx < a->n_in || a->ldy < a->n_out)
        FAIL(STATUS_USAGE, "matmul: n_in %lld and n_out %lld must be below %d, ldx %lld and ldy %lld not below them", (long long)a->n_in,
             (long long)a->n_out, SIZE_LIMIT, (long long)a->ldx, (long long)a->ldy);
    switch (choose_way(a)) {
    case WAY_DOT: return dot(launch, a);
    case WAY_TENSOR: return tensor(launch, a);
    default: return many(launch, a);
    }
}
