/* From logits to tokens on the GPU: penalties and bias, what a vocabulary shard knows of a row (sample), the merge of the shards, and the
 * start of a sequence. The rules of one token are kernels/sampling.h, the noise kernels/philox.h, the filters filter.cu.
 *
 * A row is cut into chunks of CHUNK tokens, one CTA each, which holds its tokens in registers; a second launch joins a row's chunks.
 * A token's value and id are packed into one 64-bit number, its pair: greater is better, and no two tokens have the same. So arg-max
 * and the best STEP_MAX_TOP are integer maxima, the same bits in any order. Only the sum of e^(x - max) depends on the order, which is
 * fixed: at most n units of 2^-53 from the CPU's, so the float in the record is the same or a neighbour. */
#include "kernels/cuda/device.cuh"
#include "kernels/sampling.h"

enum {
    THREADS = 256,
    N_WARPS = THREADS / WARP,
    PER_THREAD = 8,               /* tokens in a thread's registers */
    CHUNK = THREADS * PER_THREAD, /* 2048: 75 CTAs for a row of 152K tokens */
    /* select_top: tokens of the STEP_MAX_TOP groups, one for each lane, that hold a candidate */
    MAX_CANDIDATES = (int)STEP_MAX_TOP * N_WARPS * PER_THREAD,
};

static __device__ int64_t sample_n_sampled(const struct step_input *in, int n_sample) { return min_i64(n_sample, in->n_sample); }

static int sample_check(const char *op, int n_rows, int64_t vocab_begin, int64_t vocab_count) {
    if (n_rows < 0 || n_rows > STEP_MAX_ROWS)
        FAIL(STATUS_USAGE, "%s: %d rows, wants 0 to %d", op, n_rows, (int)STEP_MAX_ROWS);
    if (vocab_begin < 0 || vocab_count < 0 || vocab_begin + vocab_count > INT32_MAX)
        FAIL(STATUS_USAGE, "%s: a shard of %lld tokens from %lld on, wants ids below 2^31", op, (long long)vocab_count,
             (long long)vocab_begin);
    return STATUS_OK;
}

/* ---- logits_process ---------------------------------------------------------------------------------------------- */

/* bias[j] of the chunk's token j, 0 where there is none. Ids are distinct, so no two threads write one entry. */
static __device__ void spread_bias(const struct seq_params *p, int64_t first_id, float *bias) {
    for (int j = threadIdx.x; j < CHUNK; j += THREADS)
        bias[j] = 0;
    __syncthreads();
    for (int b = threadIdx.x; b < p->n_bias; b += THREADS) {
        int64_t j = p->bias_id[b] - first_id;
        if (j >= 0 && j < CHUNK)
            bias[j] = p->bias[b];
    }
    __syncthreads();
}

/* All of logits, words and processed are read and written at tokens below vocab_count of a live row. Adding a bias of 0 where there is
 * none can only turn -0 into 0, and so does the last sampling_clean. */
static __global__ void __launch_bounds__(THREADS) logits_process_kernel(struct logits_process_args a) {
    __shared__ float bias[CHUNK];
    const int64_t row = blockIdx.y, begin = (int64_t)blockIdx.x * CHUNK, n = a.counts.vocab_count;
    if (row >= sample_n_sampled(a.in, a.n_sample))
        return;
    const int64_t seq = sampling_row(a.in, row)->seq;
    const struct seq_params *p = &a.params[seq];
    const bool penalty = sampling_has_penalty(p), biased = p->n_bias > 0;
    const float repetition = p->repetition_penalty, frequency = p->frequency_penalty, presence = p->presence_penalty;
    const float divisor = sampling_is_greedy(p) ? 1 : p->temperature;
    if (biased)
        spread_bias(p, a.counts.vocab_begin + begin, bias);
    float x[PER_THREAD];
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int64_t i = begin + j * THREADS + threadIdx.x;
        x[j] = i < n ? sampling_clean(a.logits[row * n + i]) : 0;
    }
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int64_t i = begin + j * THREADS + threadIdx.x;
        if (i >= n)
            continue;
        float y = penalty ? sampling_penalize(x[j], a.counts.words[seq * n + i], repetition, frequency, presence) : x[j];
        if (biased)
            y += bias[j * THREADS + threadIdx.x];
        a.processed[row * n + i] = sampling_clean(y / divisor);
    }
}

extern "C" int cuda_logits_process(const struct cuda_launch *launch, const struct logits_process_args *args) {
    TRY(sample_check("logits_process", args->n_sample, args->counts.vocab_begin, args->counts.vocab_count));
    if (args->n_sample == 0 || args->counts.vocab_count == 0)
        return STATUS_OK;
    const dim3 grid((unsigned)ceil_div(args->counts.vocab_count, CHUNK), (unsigned)args->n_sample);
    logits_process_kernel<<<grid, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("logits_process");
    return STATUS_OK;
}

/* ---- pairs and reductions of a CTA ---------------------------------------------------------------------------------- */

/* A clean value and its id: greater is better, the lower id among equals. Never 0, which stands for no token. */
static __device__ uint64_t pair_of(float value, int32_t id) { return (uint64_t)sampling_image(value) << 32 | (uint32_t)~id; }
static __device__ int32_t pair_id(uint64_t pair) { return (int32_t)~(uint32_t)pair; }
static __device__ float pair_value(uint64_t pair) {
    uint32_t image = (uint32_t)(pair >> 32);
    return __uint_as_float(image >> 31 ? image & 0x7fffffffu : ~image);
}

static __device__ uint64_t pair_max(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* The same value in all threads, added in one order. Called by all of them. `op` must not depend on the order of its two arguments. */
template <typename T, typename Op> static __device__ T block_reduce(T x, Op op) {
    __shared__ T of_warp[N_WARPS];
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
    __syncthreads(); /* of_warp may still be read for the reduction before */
    if (threadIdx.x % WARP == 0)
        of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = of_warp[0];
    for (int w = 1; w < N_WARPS; w++)
        x = op(x, of_warp[w]);
    return x;
}

static __device__ float block_max(float x) {
    return block_reduce(x, [](float a, float b) { return fmaxf(a, b); });
}
static __device__ double block_sum(double x) {
    return block_reduce(x, [](double a, double b) { return a + b; });
}
static __device__ unsigned long long block_best(unsigned long long x) {
    return block_reduce(x, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
}

/* ---- the best STEP_MAX_TOP ----------------------------------------------------------------------------------------- */

struct top_shared {
    uint64_t best[N_WARPS][WARP]; /* of each thread */
    uint64_t bound;
    int n_candidates;
    uint64_t candidate[MAX_CANDIDATES];
    uint64_t list[STEP_MAX_TOP]; /* the result: descending, 0 beyond the end */
};

/* The STEP_MAX_TOP greatest of a CTA's pairs, PER_THREAD of each thread (0: none), into s->list. The pairs fall into WARP groups, the
 * threads of one lane. The STEP_MAX_TOPth greatest of the groups' maxima bounds the answer from below; about 30 of 2048 random pairs
 * reach it. As pairs differ, exactly STEP_MAX_TOP groups can hold them (fewer, if the bound is 0), so MAX_CANDIDATES suffice. Each
 * candidate's place is the number of greater ones, whatever order they were collected in. */
static __device__ void select_top(const uint64_t *pair, struct top_shared *s) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint64_t best = 0;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        best = pair_max(best, pair[j]);
    s->best[warp][lane] = best;
    if (threadIdx.x < STEP_MAX_TOP)
        s->list[threadIdx.x] = 0;
    if (threadIdx.x == 0)
        s->n_candidates = 0;
    __syncthreads();
    if (warp == 0) {
        for (int w = 1; w < N_WARPS; w++)
            best = pair_max(best, s->best[w][lane]);
        int place = 0; /* of this group's maximum among all, groups without tokens by lane */
        for (int l = 0; l < WARP; l++) {
            uint64_t other = __shfl_sync(0xffffffffu, best, l);
            place += other > best || (other == best && l < lane);
        }
        if (place == STEP_MAX_TOP - 1)
            s->bound = best;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (pair[j] != 0 && pair[j] >= s->bound)
            s->candidate[atomicAdd(&s->n_candidates, 1)] = pair[j];
    __syncthreads();
    const int n = s->n_candidates;
    for (int c = threadIdx.x; c < n; c += THREADS) {
        int place = 0;
        for (int o = 0; o < n; o++)
            place += s->candidate[o] > s->candidate[c];
        if (place < STEP_MAX_TOP)
            s->list[place] = s->candidate[c];
    }
    __syncthreads();
}

/* The same of n pairs in device memory. The list so far takes part in each round as the threads' first pair. */
static __device__ void select_top_of(const uint64_t *pairs, int64_t n, struct top_shared *s) {
    const int t = threadIdx.x;
    if (t < STEP_MAX_TOP)
        s->list[t] = 0;
    for (int64_t begin = 0; begin < n; begin += CHUNK - THREADS) {
        uint64_t pair[PER_THREAD];
        pair[0] = t < STEP_MAX_TOP ? s->list[t] : 0; /* written by this thread, or before the last barrier */
#pragma unroll
        for (int j = 1; j < PER_THREAD; j++) {
            int64_t i = begin + (j - 1) * THREADS + t;
            pair[j] = i < n ? pairs[i] : 0;
        }
        select_top(pair, s);
    }
}

/* ---- sample ------------------------------------------------------------------------------------------------------ */

struct chunk_part { /* what one chunk knows of a row */
    double sum;    /* of e^(x - max) */
    uint64_t best; /* pair of the best key; 0: no candidate */
    float max;     /* of the raw logits */
};

struct sample_scratch {
    struct chunk_part *parts; /* [n_logits][n_chunks] */
    uint64_t *top;            /* [n_logits][STEP_MAX_TOP][n_chunks]: the chunks' lists, side by side; NULL unless `top` */
    int64_t n_chunks;
};

struct draw { /* what one row is drawn with */
    uint64_t seed;
    int32_t choice, position;
    bool greedy;
    uint32_t floor;
};

static __device__ struct draw draw_of(const struct sample_args *a, int64_t row) {
    const struct step_row *step_row = sampling_row(a->in, row);
    const struct seq_params *p = &a->params[step_row->seq];
    struct draw d;
    d.seed = p->seed;
    d.choice = p->choice;
    d.position = step_row->position + 1;
    d.greedy = sampling_is_greedy(p);
    d.floor = a->filtered && !d.greedy ? a->state[row].floor : SAMPLING_LOWEST;
    return d;
}

static __device__ float noisy_key(const struct draw *d, float processed, int32_t id) {
    return (float)((double)processed + philox_gumbel(philox_bits(d->seed, d->choice, d->position, id)));
}

/* Whether a token whose key is at most `bound` may beat or tie `sure`; a token that is out has -inf. */
static __device__ bool may_win(float bound, float sure) { return bound > -INFINITY && bound >= sure; }

/* Rank of the chunk's best key, processed + noise, in all threads. y[j]: processed logit of the chunk's token j * THREADS + threadIdx.x,
 * -inf beyond the row; x, first_id: the chunk's processed logits in device memory, its first id.
 *
 * The exact noise takes two logarithms in double, so it is computed only where it matters: each warp takes the token with the highest
 * upper bound and computes that one's key; the greatest of these, `sure`, is a key that exists. A token whose bound, rounded as a key
 * is, lies below `sure` cannot even tie with it: rounding is monotone, so key <= bound holds for the floats as well. */
static __device__ uint64_t draw_noisy(const struct draw *d, const float *y, const float *x, int32_t first_id) {
    float bound[PER_THREAD], greatest = -INFINITY;
    int of_greatest = 0;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int local = j * THREADS + threadIdx.x;
        bound[j] = -INFINITY;
        if (sampling_image(y[j]) >= d->floor) {
            uint64_t bits = philox_bits(d->seed, d->choice, d->position, first_id + local);
            bound[j] = (float)((double)y[j] + philox_gumbel_bound((uint32_t)(bits >> 32)));
        }
        if (bound[j] > greatest) {
            greatest = bound[j];
            of_greatest = local;
        }
    }
    const float of_warp = warp_max(greatest);
    const unsigned holders = __ballot_sync(0xffffffffu, greatest == of_warp); /* at least one: a maximum, never NaN */
    const bool chosen = of_warp > -INFINITY && __ffs(holders) - 1 == (int)threadIdx.x % WARP;
    const float sure = block_max(chosen ? noisy_key(d, x[of_greatest], first_id + of_greatest) : -INFINITY);
    unsigned left = 0;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        left |= may_win(bound[j], sure) ? 1u << j : 0;
    uint64_t best = 0;
    for (; left; left &= left - 1) { /* tokens below the floor or beyond the row have no bit */
        const int local = (__ffs(left) - 1) * THREADS + threadIdx.x;
        best = pair_max(best, pair_of(noisy_key(d, x[local], first_id + local) + 0.0f, first_id + local));
    }
    return block_best(best);
}

static __device__ uint64_t draw_greedy(const float *y, int32_t first_id) {
    uint64_t best = 0;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (y[j] >= -FLT_MAX)
            best = pair_max(best, pair_of(y[j], first_id + j * THREADS + threadIdx.x));
    return block_best(best);
}

/* One thread's tokens of a chunk: x[begin + j * THREADS + threadIdx.x] below n, -inf beyond. */
static __device__ void load_tokens(const float *x, int64_t begin, int64_t n, float *token) {
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int64_t i = begin + j * THREADS + threadIdx.x;
        token[j] = i < n ? x[i] : -INFINITY;
    }
}

/* Sum of e^(x - max) over the chunk, in all threads. */
static __device__ double sum_exp(const float *x, float max) {
    double sum = 0;
    if (max >= -FLT_MAX) {
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++)
            sum += sampling_exp((double)x[j] - (double)max);
    }
    return block_sum(sum);
}

/* One chunk of a row. The branches around barriers depend on the row alone. Writes part and lists [row][..][chunk] only. */
static __global__ void __launch_bounds__(THREADS) sample_kernel(struct sample_args a, struct sample_scratch scratch) {
    __shared__ struct top_shared top;
    const int64_t row = blockIdx.y, chunk = blockIdx.x, begin = chunk * CHUNK, n = a.vocab_count;
    if (row >= min_i64(a.n_logits, a.in->n_logits))
        return;
    const bool sampled = row < sample_n_sampled(a.in, a.n_sample);
    const int32_t first_id = (int32_t)(a.vocab_begin + begin);
    float x[PER_THREAD], y[PER_THREAD];
    load_tokens(a.logits + row * n, begin, n, x);
    if (sampled)
        load_tokens(a.processed + row * n, begin, n, y);
    float max = -INFINITY;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        x[j] = sampling_clean(x[j]);
        max = fmaxf(max, x[j]);
    }
    struct chunk_part part;
    part.max = block_max(max);
    part.sum = sum_exp(x, part.max);
    part.best = 0;
    if (sampled) {
        const struct draw d = draw_of(&a, row);
        part.best = d.greedy ? draw_greedy(y, first_id) : draw_noisy(&d, y, a.processed + row * n + begin, first_id);
    }
    if (threadIdx.x == 0)
        scratch.parts[row * scratch.n_chunks + chunk] = part;
    if (a.top) {
        uint64_t pair[PER_THREAD];
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++)
            pair[j] = x[j] >= -FLT_MAX ? pair_of(x[j], first_id + j * THREADS + threadIdx.x) : 0;
        select_top(pair, &top);
        if (threadIdx.x < STEP_MAX_TOP)
            scratch.top[(row * STEP_MAX_TOP + threadIdx.x) * scratch.n_chunks + chunk] = top.list[threadIdx.x];
    }
}

/* All of a record but its list. best: 0: no candidate. */
static __device__ void write_record(const struct sample_args *a, int64_t row, float max, double sum, uint64_t best,
                                    struct sample_record *r) {
    const float *logits = a->logits + row * a->vocab_count;
    const int32_t target_id = a->in->logit[row].target;
    const int64_t target = target_id - a->vocab_begin;
    r->max = max;
    r->sum = (float)sum;
    r->target = target_id >= 0 && target >= 0 && target < a->vocab_count ? sampling_clean(logits[target]) : -INFINITY;
    r->best_key = best ? pair_value(best) : -INFINITY;
    r->best_id = INT32_MAX;
    r->best_logit = -INFINITY;
    if (row < sample_n_sampled(a->in, a->n_sample) && a->vocab_count > 0) {
        r->best_id = best ? pair_id(best) : (int32_t)a->vocab_begin;
        r->best_logit = sampling_clean(logits[r->best_id - a->vocab_begin]);
    }
    r->pad[0] = r->pad[1] = 0;
}

/* A row's chunks joined: one CTA a row. */
static __global__ void __launch_bounds__(THREADS) sample_join_kernel(struct sample_args a, struct sample_scratch scratch) {
    __shared__ struct top_shared top;
    const int64_t row = blockIdx.x, n_chunks = scratch.n_chunks;
    const int t = threadIdx.x;
    if (row >= min_i64(a.n_logits, a.in->n_logits))
        return;
    const struct chunk_part *parts = scratch.parts + row * n_chunks;
    float max = -INFINITY;
    unsigned long long best = 0;
    for (int64_t c = t; c < n_chunks; c += THREADS) {
        max = fmaxf(max, parts[c].max);
        best = pair_max(best, parts[c].best);
    }
    max = block_max(max);
    best = block_best(best);
    double sum = 0;
    for (int64_t c = t; c < n_chunks; c += THREADS)
        sum += sampling_rescale(parts[c].sum, parts[c].max, max);
    sum = block_sum(sum);
    struct sample_record *r = &a.records[row];
    if (a.top)
        select_top_of(scratch.top + row * STEP_MAX_TOP * n_chunks, STEP_MAX_TOP * n_chunks, &top);
    if (t == 0)
        write_record(&a, row, max, sum, best, r);
    if (t < STEP_MAX_TOP) {
        const uint64_t pair = a.top ? top.list[t] : 0;
        r->top_id[t] = pair ? pair_id(pair) : -1;
        r->top_logit[t] = pair ? pair_value(pair) : -INFINITY;
    }
}

extern "C" int cuda_sample(const struct cuda_launch *launch, const struct sample_args *args) {
    TRY(sample_check("sample", args->n_logits, args->vocab_begin, args->vocab_count));
    if (args->n_logits == 0)
        return STATUS_OK;
    struct sample_scratch scratch;
    scratch.n_chunks = max_i64(1, ceil_div(args->vocab_count, CHUNK)); /* an empty shard writes its records too */
    const size_t n_parts = (size_t)args->n_logits * (size_t)scratch.n_chunks;
    const size_t bytes = n_parts * (sizeof *scratch.parts + (args->top ? STEP_MAX_TOP * sizeof *scratch.top : 0));
    if (bytes > CUDA_SCRATCH_BYTES)
        FAIL(STATUS_USAGE, "sample: %d rows of %lld logits need %zu bytes of scratch, there are %zu", args->n_logits,
             (long long)args->vocab_count, bytes, CUDA_SCRATCH_BYTES);
    scratch.parts = (struct chunk_part *)launch->scratch;
    scratch.top = args->top ? (uint64_t *)(scratch.parts + n_parts) : NULL;
    const dim3 grid((unsigned)scratch.n_chunks, (unsigned)args->n_logits);
    sample_kernel<<<grid, THREADS, 0, cuda_stream_of(launch)>>>(*args, scratch);
    CHECK_LAUNCH("sample");
    sample_join_kernel<<<(unsigned)args->n_logits, THREADS, 0, cuda_stream_of(launch)>>>(*args, scratch);
    CHECK_LAUNCH("sample");
    return STATUS_OK;
}

/* ---- sample_merge ------------------------------------------------------------------------------------------------ */

/* This lane's pair of a record's list, which is sorted; 0 beyond its end. */
static __device__ uint64_t record_pair(const struct sample_record *r, int lane) {
    if (lane >= STEP_MAX_TOP || r->top_id[lane] < 0 || !(r->top_logit[lane] >= -FLT_MAX))
        return 0;
    return pair_of(r->top_logit[lane], r->top_id[lane]);
}

/* a, b: one lane's pairs of two sorted lists without a common token, 0 beyond their ends; returns the lane's of the STEP_MAX_TOP best of
 * both. A pair's place is its own index plus the number of greater ones in the other list. Zeros of both lists may meet in a place
 * behind all pairs, and those of `a` alone fill all of these. */
static __device__ uint64_t merge_lists(uint64_t a, uint64_t b, int lane, uint64_t *list) {
    int place_a = lane, place_b = lane;
    for (int l = 0; l < STEP_MAX_TOP; l++) {
        place_a += __shfl_sync(0xffffffffu, b, l) > a;
        place_b += __shfl_sync(0xffffffffu, a, l) > b;
    }
    if (place_a < STEP_MAX_TOP)
        list[place_a] = a;
    if (place_b < STEP_MAX_TOP)
        list[place_b] = b;
    __syncwarp();
    uint64_t merged = lane < STEP_MAX_TOP ? list[lane] : 0;
    __syncwarp();
    return merged;
}

/* The token is the sequence's last and is counted where this shard holds it. A sequence is sampled once in a step, so nobody else adds
 * to its words. */
static __device__ void take_token(const struct sample_merge_args *a, int64_t row, int32_t token) {
    const int64_t seq = sampling_row(a->in, row)->seq, local = token - a->counts.vocab_begin;
    a->last_token[seq] = token;
    if (local >= 0 && local < a->counts.vocab_count)
        a->counts.words[seq * a->counts.vocab_count + local]++;
}

/* One warp a row. What is not the list every lane computes, in rank order as the CPU does, and lane 0 writes. */
static __global__ void __launch_bounds__(WARP) sample_merge_kernel(struct sample_merge_args a) {
    __shared__ uint64_t list[STEP_MAX_TOP];
    const int64_t row = blockIdx.x;
    const int lane = threadIdx.x;
    if (row >= min_i64(a.n_logits, a.in->n_logits))
        return;
    struct sample_record all;
    sampling_record_clear(&all);
    uint64_t pair = 0;
    for (int r = 0; r < a.n_ranks; r++) {
        const struct sample_record *record = &a.records[(int64_t)r * a.n_logits + row];
        sampling_record_merge(&all, record, false);
        if (a.top)
            pair = merge_lists(pair, record_pair(record, lane), lane, list);
    }
    double sum = 0;
    for (int r = 0; r < a.n_ranks; r++) {
        const struct sample_record *record = &a.records[(int64_t)r * a.n_logits + row];
        sum += sampling_rescale((double)record->sum, record->max, all.max);
    }
    const double log_total = sum > 0 ? (double)all.max + log(sum) : -INFINITY;
    const bool sampled = row < sample_n_sampled(a.in, a.n_sample);
    struct sample_result *out = &a.results[row];
    const int n_top = __popc(__ballot_sync(0xffffffffu, pair != 0));
    if (lane < STEP_MAX_TOP) {
        out->top_id[lane] = pair ? pair_id(pair) : -1;
        out->top_logprob[lane] = pair ? sampling_logprob(pair_value(pair), log_total) : -INFINITY;
    }
    if (lane == 0) {
        out->token = sampled ? all.best_id : -1;
        out->logprob = sampled ? sampling_logprob(all.best_logit, log_total) : 0;
        out->target_logprob = a.in->logit[row].target >= 0 ? sampling_logprob(all.target, log_total) : 0;
        out->n_top = n_top;
        if (sampled)
            take_token(&a, row, all.best_id);
    }
}

extern "C" int cuda_sample_merge(const struct cuda_launch *launch, const struct sample_merge_args *args) {
    TRY(sample_check("sample_merge", args->n_logits, args->counts.vocab_begin, args->counts.vocab_count));
    if (args->n_ranks < 1)
        FAIL(STATUS_USAGE, "sample_merge: records of %d ranks, wants at least 1", args->n_ranks);
    if (args->n_logits == 0)
        return STATUS_OK;
    sample_merge_kernel<<<(unsigned)args->n_logits, WARP, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("sample_merge");
    return STATUS_OK;
}

/* ---- seq_begin --------------------------------------------------------------------------------------------------- */

enum { PARAMS_WORDS = sizeof(struct seq_params) / sizeof(uint32_t) };
static_assert(sizeof(struct seq_params) % sizeof(uint32_t) == 0, "params are copied by words");

/* Zeroes the slot's counts, one a thread; the first CTA also copies its parameters. */
static __global__ void __launch_bounds__(THREADS) seq_begin_kernel(struct seq_begin_args a) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < a.counts.vocab_count)
        a.counts.words[a.seq * a.counts.vocab_count + i] = 0;
    if (blockIdx.x > 0)
        return;
    const uint32_t *from = (const uint32_t *)a.from;
    uint32_t *to = (uint32_t *)&a.params[a.seq];
    for (int w = threadIdx.x; w < PARAMS_WORDS; w += THREADS)
        to[w] = from[w];
}

/* One token of the prompt a thread; those who meet in a word write the same. */
static __global__ void __launch_bounds__(THREADS) seq_mark_kernel(struct seq_begin_args a) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.n_prompt)
        return;
    const int64_t local = a.prompt[i] - a.counts.vocab_begin;
    if (local >= 0 && local < a.counts.vocab_count)
        a.counts.words[a.seq * a.counts.vocab_count + local] = SAMPLING_IN_PROMPT;
}

extern "C" int cuda_seq_begin(const struct cuda_launch *launch, const struct seq_begin_args *args) {
    TRY(sample_check("seq_begin", 0, args->counts.vocab_begin, args->counts.vocab_count));
    if (args->seq < 0 || args->n_prompt < 0)
        FAIL(STATUS_USAGE, "seq_begin: slot %d, %lld prompt tokens", args->seq, (long long)args->n_prompt);
    const unsigned n_blocks = (unsigned)max_i64(1, ceil_div(args->counts.vocab_count, THREADS));
    seq_begin_kernel<<<n_blocks, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("seq_begin");
    if (args->n_prompt == 0)
        return STATUS_OK;
    seq_mark_kernel<<<(unsigned)ceil_div(args->n_prompt, THREADS), THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("seq_begin");
    return STATUS_OK;
}
