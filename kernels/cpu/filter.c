/* Top-k, top-p and min-p on the CPU: histograms of a vocabulary shard for the radix descent that ops.h describes. What a bin is and
 * how a row narrows its search is kernels/sampling.h; this file spreads it over rows and chunks. Counts and masses are integers, so
 * threads and ranks add them in any order. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sample.h"
#include "kernels/sampling.h"

static void find_max(const struct filter_begin_args *args, int64_t n_rows) {
    struct sample_split split = sample_split_of(args->vocab_count);
    float partial[SAMPLE_MAX_CHUNKS];
    for (int64_t first = 0; first < n_rows; first += split.n_group) {
        int64_t n_group = min_i64(split.n_group, n_rows - first);
#pragma omp parallel for schedule(static) if (n_group * split.n_chunks > 1)
        for (int64_t item = 0; item < n_group * split.n_chunks; item++) {
            int64_t begin = item % split.n_chunks * split.chunk;
            const float *x = args->processed + (first + item / split.n_chunks) * split.n + begin;
            partial[item] = sample_max(x, min_i64(split.chunk, split.n - begin));
        }
        for (int64_t i = 0; i < n_group; i++)
            args->max[first + i] = sample_max(partial + i * split.n_chunks, split.n_chunks);
    }
}

void cpu_filter_begin(const struct filter_begin_args *args) {
    int64_t n_rows = min_i64(args->n_sample, args->in->n_sample);
    if (args->find_max) {
        find_max(args, n_rows);
        return;
    }
    for (int64_t i = 0; i < n_rows; i++)
        sampling_filter_begin(&args->params[sampling_row(args->in, i)->seq], args->max[i], &args->state[i]);
}

static void count_tokens(const struct filter_state *s, int round, const float *x, int64_t n, uint64_t *bins) {
    for (int64_t j = 0; j < n; j++) {
        int bin = sampling_bin(s, round, sampling_image(x[j]));
        if (bin >= 0)
            bins[bin]++;
    }
}

/* Also adds the sum of all that was binned to the entry after the bins: in round 3 that is every token at or above the floor. */
static void count_masses(const struct filter_state *s, int round, const float *x, int64_t n, uint64_t *bins) {
    uint64_t total = 0;
    for (int64_t begin = 0; begin < n; begin += SAMPLE_BLOCK) {
        int64_t n_block = min_i64(SAMPLE_BLOCK, n - begin);
        uint64_t mass[SAMPLE_BLOCK];
        int32_t bin[SAMPLE_BLOCK], any = -1;
        for (int64_t j = 0; j < n_block; j++) {
            bin[j] = sampling_bin(s, round, sampling_image(x[begin + j]));
            any = bin[j] > any ? bin[j] : any;
        }
        if (any < 0)
            continue;
        for (int64_t j = 0; j < n_block; j++)
            mass[j] = sampling_mass(x[begin + j], s->max);
        for (int64_t j = 0; j < n_block; j++) {
            if (bin[j] >= 0) {
                bins[bin[j]] += mass[j];
                total += mass[j];
            }
        }
    }
    if (round == 3)
        bins[FILTER_BINS] += total;
}

static void count_chunk(const struct filter_state *s, int round, const float *x, int64_t n, uint64_t *bins) {
    if (round < 3)
        count_tokens(s, round, x, n, bins);
    else
        count_masses(s, round, x, n, bins);
}

/* A chunk of a row that has several: counted apart, then added. */
static void count_shared(const struct filter_state *s, int round, const float *x, int64_t n, uint64_t *row_bins) {
    uint64_t bins[FILTER_BINS + 1] = {0};
    count_chunk(s, round, x, n, bins);
    for (int b = 0; b <= FILTER_BINS; b++) {
        if (bins[b] == 0)
            continue;
#pragma omp atomic
        row_bins[b] += bins[b];
    }
}

void cpu_filter_count(const struct filter_count_args *args) {
    struct sample_split split = sample_split_of(args->vocab_count);
    int64_t n_rows = min_i64(args->n_sample, args->in->n_sample);
    memset(args->bins, 0, (size_t)n_rows * (FILTER_BINS + 1) * sizeof *args->bins);
#pragma omp parallel for schedule(dynamic) if (n_rows * split.n_chunks > 1)
    for (int64_t item = 0; item < n_rows * split.n_chunks; item++) {
        int64_t row = item / split.n_chunks, begin = item % split.n_chunks * split.chunk;
        int64_t n = min_i64(split.chunk, split.n - begin);
        const struct filter_state *state = &args->state[row];
        const float *x = args->processed + row * split.n + begin;
        uint64_t *bins = args->bins + row * (FILTER_BINS + 1);
        if (!sampling_is_active(state, args->round))
            continue;
        if (split.n_chunks == 1)
            count_chunk(state, args->round, x, n, bins);
        else
            count_shared(state, args->round, x, n, bins);
    }
}

void cpu_filter_narrow(const struct filter_narrow_args *args) {
    int64_t n_rows = min_i64(args->n_sample, args->in->n_sample);
    for (int64_t i = 0; i < n_rows; i++)
        sampling_filter_narrow(&args->params[sampling_row(args->in, i)->seq], args->round, args->bins + i * (FILTER_BINS + 1),
                               &args->state[i]);
}
