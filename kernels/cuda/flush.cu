/* Decode's writes to the cache: new rows into 16-bit slots, and full blocks from their slot into a page.
 *
 * How many blocks a step flushes is known on the device only, and most steps flush none. So a grid of about one wave strides over the
 * events and leaves at once where there are none; the kernels begin early (device.cuh) and know that before they wait. States are summed
 * by a second kernel, which reads the records just written; the events of one sequence are added by one CTA in the order of the step,
 * those of different sequences side by side. */
#include "kernels/cuda/states.cuh"

enum {
    APPEND_THREADS = 128,
    ENCODE_WAVES = 2, /* CTAs of an encoding grid for each multiprocessor: several fit, one would leave it waiting for memory */
};

/* grid (part K or V, head, stride over events). Event e < n_flush <= STEP_MAX_ROWS; encode_part says why the rest is in bounds. */
template <typename T, int D>
static __global__ void __launch_bounds__(ENCODE_THREADS) flush_kernel(const __grid_constant__ struct flush_args args) {
    __shared__ struct encode_shared<T, D> shared;
    int part = blockIdx.x, head = blockIdx.y, n_flush = args.in->n_flush;
    wait_for_earlier();
    let_later_begin();
    for (int e = blockIdx.z; e < n_flush; e += gridDim.z) {
        struct step_flush event = args.in->flush[e];
        if (event.page < 0)
            continue;
        const T *rows = encode_slot<T>(&args.layout, &args.layer, event.seq, event.block, head, part);
        encode_block<T, D>(&shared, &args.layout, &args.layer, event.seq, event.block, event.page, head, part, rows);
        if (args.write_table && part == 0 && head == 0 && threadIdx.x == 0)
            args.page_table[event.seq * args.table_stride + event.local] = event.page;
        __syncthreads();
    }
}

/* Whether an earlier event of this rank belongs to the same sequence: then its CTA adds this one too. Called by all threads. */
__device__ static bool flush_is_later(const struct step_input *in, int event) {
    bool earlier = false;
    for (int e = threadIdx.x; e < event; e += STATES_THREADS)
        earlier |= in->flush[e].page >= 0 && in->flush[e].seq == in->flush[event].seq;
    return __syncthreads_or(earlier);
}

/* grid (slice of features, head, stride over events). */
template <typename T, int D>
static __global__ void __launch_bounds__(STATES_THREADS, 1) flush_states_kernel(const __grid_constant__ struct flush_args args) {
    extern __shared__ float4 memory[];
    struct states_shared<D> *shared = (struct states_shared<D> *)memory;
    const struct step_input *in = args.in;
    int slice = blockIdx.x, head = blockIdx.y, n_flush = in->n_flush;
    wait_for_earlier();
    let_later_begin();
    for (int e = blockIdx.z; e < n_flush; e += gridDim.z) {
        int seq = in->flush[e].seq;
        if (in->flush[e].page < 0 || flush_is_later(in, e))
            continue;
        float *states = args.layer.states + ((int64_t)seq * args.layout.n_kv_heads + head) * states_count(&args.layer);
        for (int i = e; i < n_flush; i++) {
            struct step_flush event = in->flush[i];
            if (event.seq != seq || event.page < 0)
                continue;
            struct states_block<T> block;
            block.k = encode_slot<T>(&args.layout, &args.layer, seq, event.block, head, 0);
            block.v = encode_slot<T>(&args.layout, &args.layer, seq, event.block, head, 1);
            block.record = encode_record(&args.layer, event.page, head);
            block.head = head;
            block.first = encode_first(&args.layout, event.block);
            states_add_block<T, D>(&args.layer, slice, &block, shared, states, true);
        }
    }
}

/* How many CTAs along the events make the wanted number in all. */
static unsigned flush_stride(int n_wanted, int n_others) {
    return (unsigned)max_i64(1, min_i64(STEP_MAX_ROWS, n_wanted / n_others));
}

template <typename T, int D> static int flush_launch(const struct cuda_launch *launch, const struct flush_args *args) {
    unsigned n_heads = (unsigned)args->layout.n_kv_heads;
    dim3 grid(2, n_heads, flush_stride(ENCODE_WAVES * launch->n_sms, 2 * (int)n_heads));
    (void)launch_early(launch, flush_kernel<T, D>, grid, ENCODE_THREADS, 0, *args);
    CHECK_LAUNCH("flush");
    if (!states_are_on(&args->layer))
        return STATUS_OK;
    const int bytes = (int)sizeof(struct states_shared<D>);
    unsigned n_slices = (unsigned)states_n_slices(&args->layer);
    grid = dim3(n_slices, n_heads, flush_stride(launch->n_sms, (int)(n_slices * n_heads)));
    cudaFuncSetAttribute(flush_states_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    (void)launch_early(launch, flush_states_kernel<T, D>, grid, STATES_THREADS, (size_t)bytes, *args);
    CHECK_LAUNCH("flush states");
    return STATUS_OK;
}

extern "C" int cuda_flush(const struct cuda_launch *launch, const struct flush_args *args) {
    TRY(encode_check_cache(&args->layout, &args->layer, "flush"));
    if (states_are_on(&args->layer))
        TRY(states_check(&args->layer, "flush"));
    bool half = args->layer.format.window == DTYPE_F16;
    if (args->layout.head_dim == 128)
        return half ? flush_launch<__half, 128>(launch, args) : flush_launch<__nv_bfloat16, 128>(launch, args);
    return half ? flush_launch<__half, 64>(launch, args) : flush_launch<__nv_bfloat16, 64>(launch, args);
}

/* Whether this rank keeps row i of the step, which then is *row. Only rows below in->n_rows <= STEP_MAX_ROWS are looked at. */
__device__ static inline bool append_keeps(const struct append_args *args, int i, struct step_row *row) {
    if (i >= args->in->n_rows)
        return false;
    *row = args->in->row[i];
    return row->seq >= 0 && cache_owns(&args->layout, row->position / KV_BLOCK, args->params[row->seq].owner_offset);
}

/* grid: row. Vector v of a row's n_kv_heads * head_dim values of K, then as many of V; rows of a slot are whole vectors. */
static __global__ void __launch_bounds__(APPEND_THREADS) append_kernel(const __grid_constant__ struct append_args args) {
    const struct cache_layout *layout = &args.layout;
    int i = blockIdx.x;
    struct step_row row;
    bool keeps = append_keeps(&args, i, &row);
    wait_for_earlier();
    let_later_begin();
    if (!keeps)
        return;
    int64_t block = row.position / KV_BLOCK;
    int row_vectors = layout->head_dim / ENCODE_VECTOR, n = layout->n_kv_heads * row_vectors;
    for (int v = threadIdx.x; v < 2 * n; v += APPEND_THREADS) {
        int part = v >= n, in_part = v - part * n, head = in_part / row_vectors;
        const uint4 *from = (const uint4 *)(part ? args.v : args.k) + (int64_t)i * n + in_part;
        uint4 *to = (uint4 *)encode_slot<uint16_t>(layout, &args.layer, row.seq, block, head, part);
        to[row.position % KV_BLOCK * row_vectors + in_part % row_vectors] = *from;
    }
}

extern "C" int cuda_append(const struct cuda_launch *launch, const struct append_args *args) {
    TRY(encode_check_cache(&args->layout, &args->layer, "append"));
    if (!encode_aligned(args->k) || !encode_aligned(args->v))
        FAIL(STATUS_USAGE, "cuda append: K and V must lie at multiples of 16 bytes");
    (void)launch_early(launch, append_kernel, dim3(STEP_MAX_ROWS), APPEND_THREADS, 0, *args);
    CHECK_LAUNCH("append");
    return STATUS_OK;
}
