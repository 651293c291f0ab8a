/* What surrounds the attention of an exact prefill: gathered rows into position order, and the prompt's blocks from the 16-bit K and V of
 * one layer into pages, sink, slots and states.
 *
 * A million tokens are 8192 blocks, all known on the host: one CTA for each part of each head and block encodes. For S and P a head's
 * blocks are cut into as many segments as fill the device once; a CTA adds its segment's blocks in order into scratch, and the segments are
 * added to the states in order. So the sums are fp32, always in one order on one kind of device, and no longer than the CPU's. */
#include "kernels/cuda/states.cuh"

enum {
    PLACE_WARPS = 8,
    SLOT_THREADS = 256,
    ADD_THREADS = 256,
};

/* ---- blocks into pages ------------------------------------------------------------------------------------------------ */

/* K or V (part 0 or 1) of a head from token block * KV_BLOCK on. */
template <typename T>
__device__ static inline const T *exact_rows(const struct flush_exact_args *args, int head, int part, int64_t block) {
    return (const T *)args->kv + (((int64_t)head * 2 + part) * args->n + block * KV_BLOCK) * args->layout.head_dim;
}

/* The rank's local-th block: first is below cp. */
__device__ static inline int64_t exact_block(const struct flush_exact_args *args, int64_t local) {
    int cp = args->layout.cp_size;
    int first = ((args->layout.cp_rank - args->owner_offset) % cp + cp) % cp;
    return first + local * cp;
}

/* grid (owned block, head, part): block < n_flush, and n_flush * KV_BLOCK <= n, so its rows are whole. */
template <typename T, int D>
static __global__ void __launch_bounds__(ENCODE_THREADS) flush_exact_kernel(const __grid_constant__ struct flush_exact_args args) {
    __shared__ struct encode_shared<T, D> shared;
    int64_t local = blockIdx.x, block = exact_block(&args, local);
    int head = blockIdx.y, part = blockIdx.z;
    const T *rows = exact_rows<T>(&args, head, part, block);
    encode_block<T, D>(&shared, &args.layout, &args.layer, args.seq, block, args.page_table[local], head, part, rows);
}

/* grid (slice, head, segment): sums [segment][head][states] of local blocks segment * n / segments up to the next segment's first; never
 * none, as there are at most n segments. */
template <typename T, int D>
static __global__ void __launch_bounds__(STATES_THREADS, 1)
    flush_exact_states_kernel(const __grid_constant__ struct flush_exact_args args, int64_t n_owned, float *sums) {
    extern __shared__ float4 memory[];
    struct states_shared<D> *shared = (struct states_shared<D> *)memory;
    int head = blockIdx.y;
    int64_t segment = blockIdx.z, begin = segment * n_owned / gridDim.z, end = (segment + 1) * n_owned / gridDim.z;
    float *to = sums + (segment * gridDim.y + head) * states_count(&args.layer);
    for (int64_t local = begin; local < end; local++) {
        int64_t at = exact_block(&args, local);
        struct states_block<T> block;
        block.k = exact_rows<T>(&args, head, 0, at);
        block.v = exact_rows<T>(&args, head, 1, at);
        block.record = encode_record(&args.layer, args.page_table[local], head);
        block.head = head;
        block.first = encode_first(&args.layout, at);
        states_add_block<T, D>(&args.layer, blockIdx.x, &block, shared, to, local > begin);
    }
}

/* states[i] += the segments' sums, in order; n: floats of all heads of a sequence. */
static __global__ void flush_exact_add_kernel(const float *sums, int n_segments, int64_t n, float *states) {
    int64_t i = (int64_t)blockIdx.x * ADD_THREADS + threadIdx.x;
    if (i >= n)
        return;
    float x = states[i];
    for (int s = 0; s < n_segments; s++)
        x += sums[s * n + i];
    states[i] = x;
}

/* grid (block from n_flush on, head, part): the rows there are, at most KV_BLOCK, into the block's slot. */
static __global__ void flush_exact_slots_kernel(const __grid_constant__ struct flush_exact_args args) {
    int64_t block = args.n_flush + blockIdx.x;
    int head = blockIdx.y, part = blockIdx.z;
    if (!cache_owns(&args.layout, block, args.owner_offset))
        return;
    int64_t n_vectors = min_i64(KV_BLOCK, args.n - block * KV_BLOCK) * args.layout.head_dim / ENCODE_VECTOR;
    const uint4 *from = (const uint4 *)exact_rows<uint16_t>(&args, head, part, block);
    uint4 *to = (uint4 *)encode_slot<uint16_t>(&args.layout, &args.layer, args.seq, block, head, part);
    for (int64_t i = threadIdx.x; i < n_vectors; i += SLOT_THREADS)
        to[i] = from[i];
}

/* S and P: as many segments as fill the multiprocessors once (a CTA takes a whole one). */
template <typename T, int D>
static int flush_exact_states(const struct cuda_launch *launch, const struct flush_exact_args *args, int64_t n_owned) {
    const int bytes = (int)sizeof(struct states_shared<D>);
    cudaStream_t stream = cuda_stream_of(launch);
    int n_heads = args->layout.n_kv_heads, n_slices = states_n_slices(&args->layer);
    int64_t n_segments = min_i64(n_owned, max_i64(1, launch->n_sms / (n_heads * n_slices)));
    int64_t n = n_heads * states_count(&args->layer);
    if ((uint64_t)(n_segments * n) * sizeof(float) > CUDA_SCRATCH_BYTES)
        FAIL(STATUS_USAGE, "cuda flush_exact: %lld segments of %lld floats, scratch has %zu bytes", (long long)n_segments, (long long)n,
             CUDA_SCRATCH_BYTES);
    float *sums = (float *)launch->scratch;
    cudaFuncSetAttribute(flush_exact_states_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    dim3 grid((unsigned)n_slices, (unsigned)n_heads, (unsigned)n_segments);
    flush_exact_states_kernel<T, D><<<grid, STATES_THREADS, bytes, stream>>>(*args, n_owned, sums);
    CHECK_LAUNCH("flush_exact states");
    flush_exact_add_kernel<<<(unsigned)ceil_div(n, ADD_THREADS), ADD_THREADS, 0, stream>>>(sums, (int)n_segments, n,
                                                                                          args->layer.states + args->seq * n);
    CHECK_LAUNCH("flush_exact add");
    return STATUS_OK;
}

template <typename T, int D> static int flush_exact_launch(const struct cuda_launch *launch, const struct flush_exact_args *args) {
    int64_t n_owned = cache_n_owned(&args->layout, args->n_flush, args->owner_offset);
    if (n_owned == 0)
        return STATUS_OK;
    dim3 grid((unsigned)n_owned, (unsigned)args->layout.n_kv_heads, 2);
    flush_exact_kernel<T, D><<<grid, ENCODE_THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("flush_exact");
    return states_are_on(&args->layer) ? flush_exact_states<T, D>(launch, args, n_owned) : STATUS_OK;
}

static int flush_exact_check(const struct flush_exact_args *args) {
    TRY(encode_check_cache(&args->layout, &args->layer, "flush_exact"));
    if (states_are_on(&args->layer))
        TRY(states_check(&args->layer, "flush_exact"));
    int64_t n_blocks = ceil_div(args->n, KV_BLOCK);
    if (args->n < 0 || args->n > INT32_MAX || args->n_flush < 0 || args->n_flush > args->n / KV_BLOCK)
        FAIL(STATUS_USAGE, "cuda flush_exact: %lld blocks to flush of %lld tokens", (long long)args->n_flush, (long long)args->n);
    int64_t n_kept = cache_n_owned(&args->layout, n_blocks, args->owner_offset) -
                     cache_n_owned(&args->layout, args->n_flush, args->owner_offset);
    if (n_kept > args->layout.n_slots)
        FAIL(STATUS_USAGE, "cuda flush_exact: %lld blocks stay in 16 bits, %d slots", (long long)n_kept, args->layout.n_slots);
    if (!encode_aligned(args->kv))
        FAIL(STATUS_USAGE, "cuda flush_exact: K and V must lie at a multiple of 16 bytes");
    return STATUS_OK;
}

extern "C" int cuda_flush_exact(const struct cuda_launch *launch, const struct flush_exact_args *args) {
    TRY(flush_exact_check(args));
    bool half = args->layer.format.window == DTYPE_F16;
    if (args->layout.head_dim == 128)
        TRY((half ? flush_exact_launch<__half, 128> : flush_exact_launch<__nv_bfloat16, 128>)(launch, args));
    else
        TRY((half ? flush_exact_launch<__half, 64> : flush_exact_launch<__nv_bfloat16, 64>)(launch, args));
    int64_t n_kept = ceil_div(args->n, KV_BLOCK) - args->n_flush;
    if (n_kept == 0)
        return STATUS_OK;
    dim3 grid((unsigned)n_kept, (unsigned)args->layout.n_kv_heads, 2);
    flush_exact_slots_kernel<<<grid, SLOT_THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("flush_exact slots");
    return STATUS_OK;
}

/* ---- rows into position order -------------------------------------------------------------------------------------------- */

/* A warp copies one gathered row i < cp * 2 * 2 chunk, [rank][K, V][row], of n_kv_heads times row_vectors vectors; its position is below n,
 * so position n - 1 of the last head's V is the last row written. */
static __global__ void __launch_bounds__(PLACE_WARPS * WARP)
    kv_place_kernel(const __grid_constant__ struct kv_place_args args, int row_vectors) {
    int64_t i = (int64_t)blockIdx.x * PLACE_WARPS + threadIdx.x / WARP, n_local = 2 * args.chunk;
    if (i >= args.cp_size * 2 * n_local)
        return;
    int64_t row = i % n_local, part = i / n_local % 2;
    int64_t position = prefill_position(row, (int)(i / n_local / 2), args.cp_size, args.chunk);
    if (position >= args.n)
        return;
    int n_vectors = args.n_kv_heads * row_vectors;
    const uint4 *from = (const uint4 *)args.gathered + i * n_vectors;
    for (int v = threadIdx.x % WARP; v < n_vectors; v += WARP) {
        int head = v / row_vectors;
        ((uint4 *)args.kv)[((head * 2 + part) * args.n + position) * row_vectors + v % row_vectors] = from[v];
    }
}

extern "C" int cuda_kv_place(const struct cuda_launch *launch, const struct kv_place_args *args) {
    if (args->dtype != DTYPE_F16 && args->dtype != DTYPE_BF16)
        FAIL(STATUS_USAGE, "cuda kv_place: f16 or bf16, got %s", dtype_name(args->dtype));
    if (args->head_dim % ENCODE_VECTOR != 0 || !encode_aligned(args->gathered) || !encode_aligned(args->kv))
        FAIL(STATUS_USAGE, "cuda kv_place: rows of %d values must be whole 16-byte vectors", args->head_dim);
    int64_t n_rows = args->n > 0 ? args->cp_size * 4 * args->chunk : 0;
    if (n_rows == 0)
        return STATUS_OK;
    if (ceil_div(n_rows, PLACE_WARPS) > INT32_MAX)
        FAIL(STATUS_USAGE, "cuda kv_place: %lld rows", (long long)n_rows);
    kv_place_kernel<<<(unsigned)ceil_div(n_rows, PLACE_WARPS), PLACE_WARPS * WARP, 0, cuda_stream_of(launch)>>>(
        *args, args->head_dim / ENCODE_VECTOR);
    CHECK_LAUNCH("kv_place");
    return STATUS_OK;
}

/* A warp copies one gathered row i < cp * 2 chunk to its position, if below n. */
static __global__ void __launch_bounds__(PLACE_WARPS * WARP) rows_place_kernel(const __grid_constant__ struct rows_place_args args) {
    int64_t i = (int64_t)blockIdx.x * PLACE_WARPS + threadIdx.x / WARP, n_local = 2 * args.chunk;
    if (i >= args.cp_size * n_local)
        return;
    int64_t position = prefill_position(i % n_local, (int)(i / n_local), args.cp_size, args.chunk);
    if (position >= args.n)
        return;
    int64_t n_vectors = args.width / 4;
    const float4 *from = (const float4 *)args.from + i * n_vectors;
    float4 *to = (float4 *)args.to + position * n_vectors;
    for (int64_t v = threadIdx.x % WARP; v < n_vectors; v += WARP)
        to[v] = from[v];
}

extern "C" int cuda_rows_place(const struct cuda_launch *launch, const struct rows_place_args *args) {
    if (args->width % 4 != 0 || !encode_aligned(args->from) || !encode_aligned(args->to))
        FAIL(STATUS_USAGE, "cuda rows_place: rows of %lld floats must be whole 16-byte vectors", (long long)args->width);
    int64_t n_rows = args->n > 0 ? args->cp_size * 2 * args->chunk : 0;
    if (n_rows == 0)
        return STATUS_OK;
    if (ceil_div(n_rows, PLACE_WARPS) > INT32_MAX)
        FAIL(STATUS_USAGE, "cuda rows_place: %lld rows", (long long)n_rows);
    rows_place_kernel<<<(unsigned)ceil_div(n_rows, PLACE_WARPS), PLACE_WARPS * WARP, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("rows_place");
    return STATUS_OK;
}
