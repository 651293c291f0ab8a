/* Combining the ranks' partial results of attention (DESIGN, 4). Ranks are added in rank order. A rank without a token has m = -inf and
 * weighs 0; where no rank has one (padding) the output is 0. The correction is added once, unscaled, to sums shifted by
 * the global max; without one, no term of it is touched. */
#include "kernels/cpu/cpu.h"

#include <math.h>

enum { PARALLEL_MIN = 1 << 14 }; /* values below which waking other threads costs more than it saves */

struct record {
    const float *y;
    const float *c_n;  /* only with correction */
    const float *tail; /* m, l, C_d */
};

static struct record record_at(const float *partial, int64_t index, int d, bool correction) {
    const float *y = partial + index * partial_stride(d, correction);
    return (struct record){y, y + d, y + partial_tail(d, correction)};
}

/* e^(m - max); 0 where this rank has no token. */
static float weight_of(float m, float max) { return m == -INFINITY ? 0.0f : (float)exp((double)m - (double)max); }

void cpu_merge_max(const struct merge_max_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live) * args->n_heads;
    for (int64_t i = 0; i < n; i++)
        args->max[i] = record_at(args->partial, i, args->head_dim, args->correction).tail[0];
}

void cpu_merge_rescale(const struct merge_rescale_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live) * args->n_heads;
    int d = args->head_dim;
#pragma omp parallel for if (n * d >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        struct record r = record_at(args->partial, i, d, args->correction);
        float weight = weight_of(r.tail[0], args->max[i]);
        float *sums = args->sums + i * (d + 1);
        for (int c = 0; c < d; c++)
            sums[c] = weight * r.y[c];
        sums[d] = weight * r.tail[1];
        if (args->correction) {
            for (int c = 0; c < d; c++)
                sums[c] += r.c_n[c];
            sums[d] += r.tail[2];
        }
    }
}

void cpu_merge_divide(const struct merge_divide_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live) * args->n_heads;
    int d = args->head_dim;
#pragma omp parallel for if (n * d >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *sums = args->sums + i * (d + 1);
        float *out = args->out + i * d;
        for (int c = 0; c < d; c++)
            out[c] = sums[d] != 0.0f ? sums[c] / sums[d] : 0.0f;
    }
}

void cpu_merge_stats(const struct merge_stats_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live) * args->n_heads;
    for (int64_t i = 0; i < n; i++) {
        struct record r = record_at(args->partial, i, args->head_dim, args->correction);
        args->stats[3 * i] = r.tail[0];
        args->stats[3 * i + 1] = r.tail[1];
        args->stats[3 * i + 2] = args->correction ? r.tail[2] : 0.0f;
    }
}

/* The global max and denominator of entry i from all ranks' (m, l, C_d). */
static double global_denominator(const struct merge_scale_args *args, int64_t i, float *max) {
    int64_t rank_stride = (int64_t)args->n_rows * args->n_heads * 3;
    double sum = 0.0;
    *max = -INFINITY;
    for (int r = 0; r < args->n_ranks; r++)
        *max = fmaxf(*max, args->stats[r * rank_stride + 3 * i]);
    for (int r = 0; r < args->n_ranks; r++) {
        const float *stats = args->stats + r * rank_stride + 3 * i;
        sum += (double)weight_of(stats[0], *max) * (double)stats[1];
        if (args->correction)
            sum += (double)stats[2];
    }
    return sum;
}

void cpu_merge_scale(const struct merge_scale_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live) * args->n_heads;
    int d = args->head_dim;
#pragma omp parallel for if (n * d >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        struct record own = record_at(args->partial, i, d, args->correction);
        float max, *out = args->out + i * d;
        double denominator = global_denominator(args, i, &max);
        double weight = weight_of(own.tail[0], max);
        for (int c = 0; c < d; c++) {
            double sum = weight * (double)own.y[c];
            if (args->correction)
                sum += (double)own.c_n[c];
            out[c] = denominator != 0.0 ? (float)(sum / denominator) : 0.0f;
        }
    }
}

/* Entry i of all ranks into one output row of d values. */
static void gather_one(const struct merge_gather_args *args, int64_t i, float *out) {
    int d = args->head_dim;
    int64_t rank_entries = (int64_t)args->n_rows * args->n_heads;
    double sums[KV_MAX_HEAD_DIM] = {0}, denominator = 0.0;
    float max = -INFINITY;
    for (int r = 0; r < args->n_ranks; r++)
        max = fmaxf(max, record_at(args->partial, r * rank_entries + i, d, args->correction).tail[0]);
    for (int r = 0; r < args->n_ranks; r++) {
        struct record record = record_at(args->partial, r * rank_entries + i, d, args->correction);
        double weight = weight_of(record.tail[0], max);
        for (int c = 0; c < d; c++)
            sums[c] += weight * (double)record.y[c];
        denominator += weight * (double)record.tail[1];
        if (args->correction) {
            for (int c = 0; c < d; c++)
                sums[c] += (double)record.c_n[c];
            denominator += (double)record.tail[2];
        }
    }
    for (int c = 0; c < d; c++)
        out[c] = denominator != 0.0 ? (float)(sums[c] / denominator) : 0.0f;
}

void cpu_merge_gather(const struct merge_gather_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live) * args->n_heads;
    int d = args->head_dim;
#pragma omp parallel for if (n * d >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++)
        gather_one(args, i, args->out + i * d);
}
