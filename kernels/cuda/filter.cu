/* Top-k, top-p and min-p on the GPU: histograms of a vocabulary shard for the radix descent that ops.h describes. What a bin is and how
 * a row narrows its search is kernels/sampling.h; this file spreads it over CTAs. Counts and masses are integers, so atomic additions
 * in any order give the same bits.
 *
 * A row is cut into chunks of CHUNK tokens, one CTA each, which holds its tokens in registers. The bins of a chunk are counted in shared
 * memory and then added to the row's in device memory. Shared memory adds 32-bit words natively but 64-bit ones by a loop of
 * compare-and-swap, so a mass is added as two halves. */
#include "kernels/cuda/device.cuh"
#include "kernels/sampling.h"

enum {
    THREADS = 256,
    N_WARPS = THREADS / WARP,
    PER_THREAD = 8,                    /* tokens in a thread's registers */
    CHUNK = THREADS * PER_THREAD,      /* 2048: 75 CTAs for a row of 152K tokens */
    MASS_BITS = 40,                    /* no mass is above 2^40 (sampling_mass) */
    HALF_BITS = MASS_BITS / 2,         /* CHUNK halves of at most 2^20 each sum to at most 2^31 */
    BINS_PER_THREAD = FILTER_BINS / THREADS,
};

static_assert((int64_t)CHUNK << (MASS_BITS - HALF_BITS) <= (int64_t)UINT32_MAX, "half masses of a chunk fit 32 bits");
static_assert(FILTER_BINS % (2 * THREADS) == 0, "each thread has whole bins, in the rounds of 10 bits too");

/* Sampled rows that are computed. */
static __device__ int64_t filter_n_rows(const struct step_input *in, int n_sample) { return min_i64(n_sample, in->n_sample); }

static int filter_check(const char *op, int n_sample, int64_t vocab_count) {
    if (n_sample < 0 || n_sample > STEP_MAX_ROWS || vocab_count < 0)
        FAIL(STATUS_USAGE, "%s: %d rows of %lld logits, wants 0 to %d rows", op, n_sample, (long long)vocab_count, (int)STEP_MAX_ROWS);
    return STATUS_OK;
}

/* ---- filter_begin ------------------------------------------------------------------------------------------------ */

/* One chunk's maximum: partial [n_sample][gridDim.x]. Reads processed below vocab_count only; every chunk of a live row writes. */
static __global__ void __launch_bounds__(THREADS) filter_chunk_max_kernel(struct filter_begin_args a, float *partial) {
    __shared__ float of_warp[N_WARPS];
    const int64_t row = blockIdx.y, first = (int64_t)blockIdx.x * CHUNK + threadIdx.x;
    if (row >= filter_n_rows(a.in, a.n_sample))
        return;
    const float *x = a.processed + row * a.vocab_count;
    float max = -INFINITY;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int64_t i = first + j * THREADS;
        max = fmaxf(max, i < a.vocab_count ? x[i] : -INFINITY);
    }
    max = warp_max(max);
    if (threadIdx.x % WARP == 0)
        of_warp[threadIdx.x / WARP] = max;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < N_WARPS; w++)
            max = fmaxf(max, of_warp[w]);
        partial[row * gridDim.x + blockIdx.x] = max;
    }
}

/* One warp a row. */
static __global__ void __launch_bounds__(WARP) filter_row_max_kernel(struct filter_begin_args a, const float *partial, int64_t n_chunks) {
    const int64_t row = blockIdx.x;
    if (row >= filter_n_rows(a.in, a.n_sample))
        return;
    float max = -INFINITY;
    for (int64_t c = threadIdx.x; c < n_chunks; c += WARP)
        max = fmaxf(max, partial[row * n_chunks + c]);
    max = warp_max(max);
    if (threadIdx.x == 0)
        a.max[row] = max;
}

/* One thread a row. */
static __global__ void __launch_bounds__(THREADS) filter_begin_kernel(struct filter_begin_args a) {
    const int64_t row = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (row < filter_n_rows(a.in, a.n_sample))
        sampling_filter_begin(&a.params[sampling_row(a.in, row)->seq], a.max[row], &a.state[row]);
}

extern "C" int cuda_filter_begin(const struct cuda_launch *launch, const struct filter_begin_args *args) {
    TRY(filter_check("filter_begin", args->n_sample, args->vocab_count));
    if (args->n_sample == 0)
        return STATUS_OK;
    if (!args->find_max) {
        const unsigned n_blocks = (unsigned)ceil_div(args->n_sample, THREADS);
        filter_begin_kernel<<<n_blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
        CHECK_LAUNCH("filter_begin");
        return STATUS_OK;
    }
    const int64_t n_chunks = max_i64(1, ceil_div(args->vocab_count, CHUNK)); /* an empty shard's maximum is -inf */
    const size_t bytes = (size_t)(args->n_sample * n_chunks) * sizeof(float);
    if (bytes > CUDA_SCRATCH_BYTES)
        FAIL(STATUS_USAGE, "filter_begin: %lld logits a row need %zu bytes of scratch, there are %zu", (long long)args->vocab_count, bytes,
             CUDA_SCRATCH_BYTES);
    float *partial = (float *)launch->scratch;
    const dim3 grid((unsigned)n_chunks, (unsigned)args->n_sample);
    filter_chunk_max_kernel<<<grid, THREADS, 0, cuda_stream_of(launch)>>>(*args, partial);
    CHECK_LAUNCH("filter_begin");
    filter_row_max_kernel<<<(unsigned)args->n_sample, WARP, 0, cuda_stream_of(launch)>>>(*args, partial, n_chunks);
    CHECK_LAUNCH("filter_begin");
    return STATUS_OK;
}

/* ---- filter_count ------------------------------------------------------------------------------------------------ */

/* One entry a thread: bins of the live rows, which lie one after the other. */
static __global__ void __launch_bounds__(THREADS) filter_zero_kernel(struct filter_count_args a) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < filter_n_rows(a.in, a.n_sample) * (FILTER_BINS + 1))
        a.bins[i] = 0;
}

static __device__ void add_to_bin(uint64_t *bin, uint64_t x) { atomicAdd((unsigned long long *)bin, (unsigned long long)x); }

/* The sum over all threads goes to *to, a warp at a time. */
static __device__ void add_total(uint64_t *to, uint64_t x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (threadIdx.x % WARP == 0)
        add_to_bin(to, x);
}

/* bin[j] is -1 or below FILTER_BINS (a digit has at most 11 bits), so low, high and the row's bins are never exceeded. A chunk without
 * a token to count leaves before it touches shared memory: most chunks after the first round of a search. */
static __global__ void __launch_bounds__(THREADS) filter_count_kernel(struct filter_count_args a) {
    __shared__ uint32_t low[FILTER_BINS], high[FILTER_BINS];
    const int64_t row = blockIdx.y, first = (int64_t)blockIdx.x * CHUNK + threadIdx.x;
    if (row >= filter_n_rows(a.in, a.n_sample))
        return;
    const struct filter_state state = a.state[row];
    if (!sampling_is_active(&state, a.round))
        return;
    const float *x = a.processed + row * a.vocab_count;
    float value[PER_THREAD];
    int bin[PER_THREAD];
    bool any = false;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        value[j] = first + j * THREADS < a.vocab_count ? x[first + j * THREADS] : -INFINITY; /* which no floor lets in */
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        bin[j] = sampling_bin(&state, a.round, sampling_image(value[j]));
        any |= bin[j] >= 0;
    }
    if (!__syncthreads_or(any))
        return;
    for (int b = threadIdx.x; b < FILTER_BINS; b += THREADS)
        low[b] = high[b] = 0;
    __syncthreads();
    uint64_t total = 0;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        if (bin[j] < 0)
            continue;
        const uint64_t amount = a.round < 3 ? 1 : sampling_mass(value[j], state.max);
        const uint32_t high_half = (uint32_t)(amount >> HALF_BITS);
        atomicAdd(&low[bin[j]], (uint32_t)amount & ((1u << HALF_BITS) - 1));
        if (high_half) /* not in the long tail */
            atomicAdd(&high[bin[j]], high_half);
        total += amount;
    }
    __syncthreads();
    uint64_t *bins = a.bins + row * (FILTER_BINS + 1);
    for (int b = threadIdx.x; b < FILTER_BINS; b += THREADS) {
        const uint64_t sum = ((uint64_t)high[b] << HALF_BITS) + low[b];
        if (sum)
            add_to_bin(&bins[b], sum);
    }
    if (a.round == 3)
        add_total(&bins[FILTER_BINS], total);
}

extern "C" int cuda_filter_count(const struct cuda_launch *launch, const struct filter_count_args *args) {
    TRY(filter_check("filter_count", args->n_sample, args->vocab_count));
    if (args->round < 0 || args->round >= FILTER_ROUNDS)
        FAIL(STATUS_USAGE, "filter_count: round %d, wants 0 to %d", args->round, FILTER_ROUNDS - 1);
    if (args->n_sample == 0)
        return STATUS_OK;
    const unsigned n_zero = (unsigned)ceil_div((int64_t)args->n_sample * (FILTER_BINS + 1), THREADS);
    filter_zero_kernel<<<n_zero, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("filter_count");
    if (args->vocab_count == 0)
        return STATUS_OK;
    const dim3 grid((unsigned)ceil_div(args->vocab_count, CHUNK), (unsigned)args->n_sample);
    filter_count_kernel<<<grid, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("filter_count");
    return STATUS_OK;
}

/* ---- filter_narrow ----------------------------------------------------------------------------------------------- */

/* Sets digit and above in the one thread whose bins hold the digit that sampling_filter_narrow's serial search finds, and returns true
 * there; false in all threads if there is none. Thread t has the n_bins / THREADS bins from n_bins - 1 - t * that downwards, the last
 * thread's last is bin 0. Sums from above do not decrease, so the digit is where they pass `remaining` (at least 1). */
static __device__ bool find_digit(const uint64_t *bins, int n_bins, uint64_t remaining, int *digit, uint64_t *above) {
    __shared__ uint64_t of_warp[N_WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_own = n_bins / THREADS;
    const int highest = n_bins - 1 - (int)threadIdx.x * n_own;
    uint64_t own[BINS_PER_THREAD], sum = 0;
#pragma unroll
    for (int k = 0; k < BINS_PER_THREAD; k++) {
        own[k] = k < n_own ? bins[highest - k] : 0;
        sum += own[k];
    }
    uint64_t through = sum; /* of all bins down to this thread's lowest */
    for (int offset = 1; offset < WARP; offset *= 2) {
        uint64_t other = __shfl_up_sync(0xffffffffu, through, offset);
        through += lane >= offset ? other : 0;
    }
    if (lane == WARP - 1)
        of_warp[warp] = through;
    __syncthreads();
    for (int w = 0; w < warp; w++)
        through += of_warp[w];
    uint64_t before = through - sum;
    if (before >= remaining || through < remaining)
        return false;
    bool found = false;
#pragma unroll
    for (int k = 0; k < BINS_PER_THREAD; k++) {
        if (!found && before + own[k] >= remaining) {
            *digit = highest - k;
            *above = before;
            found = true;
        }
        before += own[k];
    }
    return found;
}

/* One CTA a row. All threads have read the state before the one that writes it passes the barrier. */
static __global__ void __launch_bounds__(THREADS) filter_narrow_kernel(struct filter_narrow_args a) {
    const int64_t row = blockIdx.x;
    if (row >= filter_n_rows(a.in, a.n_sample))
        return;
    const struct seq_params *p = &a.params[sampling_row(a.in, row)->seq];
    const uint64_t *bins = a.bins + row * (FILTER_BINS + 1);
    struct filter_state state = a.state[row];
    int digit = -1;
    uint64_t above = 0;
    bool mine = false;
    if (sampling_is_active(&state, a.round)) {
        sampling_filter_aim(p, a.round, bins[FILTER_BINS], &state);
        mine = find_digit(bins, 1 << sampling_digit_bits(a.round % 3), state.remaining, &digit, &above);
    }
    if (!__syncthreads_or(mine))
        mine = threadIdx.x == 0;
    if (mine) {
        sampling_filter_settle(p, a.round, digit, above, &state);
        a.state[row] = state;
    }
}

extern "C" int cuda_filter_narrow(const struct cuda_launch *launch, const struct filter_narrow_args *args) {
    TRY(filter_check("filter_narrow", args->n_sample, 0));
    if (args->round < 0 || args->round >= FILTER_ROUNDS)
        FAIL(STATUS_USAGE, "filter_narrow: round %d, wants 0 to %d", args->round, FILTER_ROUNDS - 1);
    if (args->n_sample == 0)
        return STATUS_OK;
    filter_narrow_kernel<<<(unsigned)args->n_sample, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("filter_narrow");
    return STATUS_OK;
}
