/* The three ways to combine partial results against a double reference, from 1 to 6 ranks, with ranks that hold no token, padding rows,
 * with and without correction. Without one, the records hold NaN where the correction would stand and the results must equal, bit for bit,
 * a plain formula written here that knows no correction. With one, adding it must move sums by exactly itself, once.
 *
 * Tolerance, u = 2^-24: per rank a weight (2u), a product, a sum; then a quotient: (3 + ranks) u of the absolute terms in the numerator and
 * in the denominator, 3u for quotient and rounding. */
#include "kernels/cpu/cpu.h"
#include "test.h"

enum { ROWS = 5, HEADS = 3, D = 64, MAX_RANKS = 6, N = ROWS * HEADS, MAX_STRIDE = 2 * D + 4 };
#define U 0x1p-24

struct ranks {
    int n;
    bool correction;
    int stride;
    int32_t live;
    float partial[MAX_RANKS][N * MAX_STRIDE];
};

static void ranks_make(struct ranks *r, int n, bool correction, uint64_t seed) {
    r->n = n;
    r->correction = correction;
    r->stride = partial_stride(D, correction);
    r->live = ROWS - 1;
    for (int rank = 0; rank < n; rank++)
        for (int i = 0; i < N; i++) {
            float *record = r->partial[rank] + i * r->stride, *tail = record + partial_tail(D, correction);
            uint64_t id = (uint64_t)(rank * N + i);
            bool padding = i / HEADS == 1, empty = padding || test_hash(seed, id) % 3 == 0;
            if (rank == n - 1 && !padding && n > 1 && i % 2)
                empty = false;
            for (int c = 0; c < D; c++)
                record[c] = empty ? 0.0f : 10.0f * test_normal(seed + 1, id * D + (uint64_t)c);
            if (correction)
                for (int c = 0; c < D; c++)
                    record[D + c] = padding ? 0.0f : test_normal(seed + 2, id * D + (uint64_t)c);
            tail[0] = empty ? -INFINITY : 30.0f * test_normal(seed + 3, id);
            tail[1] = empty ? 0.0f : 1.0f + 100.0f * fabsf(test_normal(seed + 4, id));
            tail[2] = !correction ? NAN : padding ? 0.0f : fabsf(test_normal(seed + 5, id));
            tail[3] = NAN;
        }
}

static const float *tail_of(const struct ranks *r, int rank, int i) { return r->partial[rank] + i * r->stride + partial_tail(D, r->correction); }

static void run_allreduce(const struct ranks *r, float *out) {
    float max[N], global[N], sums[N * (D + 1)], total[N * (D + 1)] = {0};
    for (int i = 0; i < N; i++)
        global[i] = -INFINITY;
    for (int rank = 0; rank < r->n; rank++) {
        cpu_merge_max(&(struct merge_max_args){ROWS, &r->live, HEADS, D, r->correction, r->partial[rank], max});
        for (int i = 0; i < r->live * HEADS; i++)
            global[i] = fmaxf(global[i], max[i]);
    }
    for (int rank = 0; rank < r->n; rank++) {
        cpu_merge_rescale(&(struct merge_rescale_args){ROWS, &r->live, HEADS, D, r->correction, r->partial[rank], global, sums});
        for (int i = 0; i < r->live * HEADS * (D + 1); i++)
            total[i] = rank ? total[i] + sums[i] : sums[i];
    }
    cpu_merge_divide(&(struct merge_divide_args){ROWS, &r->live, HEADS, D, total, out});
}

static void run_fused(const struct ranks *r, float *out) {
    static float stats[MAX_RANKS * N * 3], share[N * D];
    for (int rank = 0; rank < r->n; rank++)
        cpu_merge_stats(&(struct merge_stats_args){ROWS, &r->live, HEADS, D, r->correction, r->partial[rank], stats + rank * N * 3});
    for (int rank = 0; rank < r->n; rank++) {
        cpu_merge_scale(&(struct merge_scale_args){ROWS, &r->live, HEADS, D, r->correction, r->partial[rank], stats, r->n, share});
        for (int i = 0; i < r->live * HEADS * D; i++)
            out[i] = rank ? out[i] + share[i] : share[i];
    }
}

static void run_gather(const struct ranks *r, float *out) {
    static float all[MAX_RANKS * N * MAX_STRIDE];
    for (int rank = 0; rank < r->n; rank++)
        memcpy(all + rank * N * r->stride, r->partial[rank], (size_t)(N * r->stride) * 4);
    cpu_merge_gather(&(struct merge_gather_args){ROWS, &r->live, HEADS, D, r->correction, all, r->n, out});
}

static void check_way(const struct ranks *r, const char *way, const float *out) {
    for (int i = 0; i < r->live * HEADS; i++) {
        double max = -INFINITY, l = 0.0;
        for (int rank = 0; rank < r->n; rank++)
            max = fmax(max, (double)tail_of(r, rank, i)[0]);
        for (int rank = 0; rank < r->n; rank++) {
            const float *tail = tail_of(r, rank, i);
            l += (isinf(tail[0]) ? 0.0 : exp((double)tail[0] - max)) * (double)tail[1] + (r->correction ? (double)tail[2] : 0.0);
        }
        for (int c = 0; c < D; c++) {
            double y = 0.0, y_abs = 0.0;
            for (int rank = 0; rank < r->n; rank++) {
                double weight = isinf(tail_of(r, rank, i)[0]) ? 0.0 : exp((double)tail_of(r, rank, i)[0] - max);
                const float *record = r->partial[rank] + i * r->stride;
                double own = weight * (double)record[c], extra = r->correction ? (double)record[D + c] : 0.0;
                y += own + extra;
                y_abs += fabs(own) + fabs(extra);
            }
            double truth = l > 0.0 ? y / l : 0.0, bound = l > 0.0 ? (2.0 * (3 + r->n) + 3) * U * y_abs / l : 0.0;
            CHECK(fabs((double)out[i * D + c] - truth) <= bound, "%s, %d ranks, correction %d, entry %d, %d: %.9g, truth %.9g", way, r->n,
                  r->correction, i, c, (double)out[i * D + c], truth);
        }
    }
    for (int i = r->live * HEADS * D; i < N * D; i++)
        CHECK(memcmp(&out[i], "\xee\xee\xee\xee", 4) == 0, "%s wrote a dead row", way);
}

/* The same formulas without any word of a correction. */
static void plain(const struct ranks *r, int i, int way, float *out) {
    float max = -INFINITY, sums[D + 1] = {0};
    double totals[D + 1] = {0};
    for (int rank = 0; rank < r->n; rank++)
        max = fmaxf(max, tail_of(r, rank, i)[0]);
    for (int rank = 0; rank < r->n; rank++) {
        const float *tail = tail_of(r, rank, i), *y = r->partial[rank] + i * r->stride;
        float weight = isinf(tail[0]) ? 0.0f : (float)exp((double)tail[0] - (double)max);
        for (int c = 0; c <= D; c++) {
            float x = c < D ? y[c] : tail[1];
            sums[c] = rank ? sums[c] + weight * x : weight * x;
            totals[c] += (double)weight * (double)x;
        }
    }
    for (int c = 0; c < D; c++)
        out[c] = totals[D] == 0.0 ? 0.0f : way == 0 ? sums[c] / sums[D] : (float)(totals[c] / totals[D]);
    if (way == 1)
        for (int rank = 0; rank < r->n; rank++) {
            const float *tail = tail_of(r, rank, i), *y = r->partial[rank] + i * r->stride;
            double weight = isinf(tail[0]) ? 0.0 : (double)(float)exp((double)tail[0] - (double)max);
            for (int c = 0; c < D; c++) {
                float share = totals[D] == 0.0 ? 0.0f : (float)(weight * (double)y[c] / totals[D]);
                out[c] = rank ? out[c] + share : share;
            }
        }
}

static void check_all(int n, bool correction, uint64_t seed) {
    static struct ranks r;
    float out[3][N * D];
    static const char *names[] = {"allreduce", "fused", "gather"};
    memset(out, 0xee, sizeof out);
    ranks_make(&r, n, correction, seed);
    run_allreduce(&r, out[0]);
    run_fused(&r, out[1]);
    run_gather(&r, out[2]);
    for (int way = 0; way < 3; way++) {
        check_way(&r, names[way], out[way]);
        for (int i = 0; i < r.live * HEADS && !correction; i++) {
            float expected[D];
            plain(&r, i, way, expected);
            CHECK(memcmp(expected, out[way] + i * D, sizeof expected) == 0, "%s without correction is not the plain path, entry %d", names[way], i);
        }
    }
}

/* With small integers and equal maxima everything is exact, so a correction that is added twice, or scaled, shows. */
static void check_added_once(void) {
    static struct ranks r;
    float out[3][N * D];
    ranks_make(&r, 4, true, 9);
    for (int rank = 0; rank < 4; rank++)
        for (int i = 0; i < N; i++) {
            float *record = r.partial[rank] + i * r.stride, *tail = record + 2 * D;
            for (int c = 0; c < D; c++) {
                record[c] = (float)(c % 5 + rank);
                record[D + c] = (float)(c % 3 - 1);
            }
            tail[0] = 2.5f, tail[1] = 1.0f, tail[2] = 1.0f; /* denominator 4 + 4 */
        }
    run_allreduce(&r, out[0]);
    run_fused(&r, out[1]);
    run_gather(&r, out[2]);
    for (int way = 0; way < 3; way++)
        for (int i = 0; i < r.live * HEADS * D; i++) {
            int c = i % D;
            CHECK(out[way][i] == (float)(4 * (c % 5) + 6 + 4 * (c % 3 - 1)) / 8.0f, "way %d, %d: %g", way, i, (double)out[way][i]);
        }
}

int main(void) {
    for (int n = 1; n <= MAX_RANKS; n++)
        for (uint64_t seed = 0; seed < 20; seed++) {
            check_all(n, false, 100 * seed);
            check_all(n, true, 100 * seed);
        }
    check_added_once();
    return test_report();
}
