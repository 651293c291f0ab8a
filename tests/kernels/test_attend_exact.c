/* Causal attention of a prompt against plain double precision: head sizes, groups, types, chunks that start late, lengths around the
 * tiles, NaN in the keys that no query may see, equal bits for every number of threads.
 *
 * Tolerance, u = 2^-24: a score is off by at most (d + 4) u A, A = scale * sum |q k|; relative error of a weight twice that plus 4u; sums
 * over n keys go up in pieces of 128, 16 pieces a time, with up to three roundings each: (128 + 3 * 16 + 3 * n / 2048 + 8) u, for the numerator
 * and the denominator each. */
#include <omp.h>

#include <cblas.h>

#include "kernels/cpu/cpu.h"
#include "test.h"

enum { GUARD = 64 };

struct problem {
    struct attend_exact_args a;
    uint64_t seed;
    float *q, *kv; /* what the 16-bit values are */
    void *q_stored, *kv_stored;
    float *out;
};

static void problem_make(struct problem *p) {
    struct attend_exact_args *a = &p->a;
    int64_t d = a->head_dim, n_q = a->n_rows * a->n_heads * d, n_kv = (int64_t)a->n_kv_heads * 2 * a->n * d, n_out = n_q + GUARD;
    p->q = malloc((size_t)n_q * 4 + 4), p->q_stored = malloc((size_t)n_q * 4 + 4);
    p->kv = malloc((size_t)n_kv * 4), p->kv_stored = malloc((size_t)n_kv * 4), p->out = malloc((size_t)n_out * 4);
    if (!p->q || !p->q_stored || !p->kv || !p->kv_stored || !p->out)
        exit(1);
    for (int64_t i = 0; i < n_q; i++)
        p->q[i] = 2.0f * test_normal(p->seed, (uint64_t)i);
    for (int64_t i = 0; i < n_kv; i++)
        p->kv[i] = i / d % a->n < a->first + a->n_rows ? test_normal(p->seed + 1, (uint64_t)i) : NAN;
    dtype_narrow(a->dtype, p->q, p->q_stored, n_q), dtype_widen(a->dtype, p->q_stored, p->q, n_q);
    dtype_narrow(a->dtype, p->kv, p->kv_stored, n_kv), dtype_widen(a->dtype, p->kv_stored, p->kv, n_kv);
    memset(p->out, 0xee, (size_t)n_out * 4);
    a->scale = 1.0f / sqrtf((float)d);
    a->q = p->q_stored, a->kv = p->kv_stored, a->out = p->out;
}

static void problem_free(struct problem *p) {
    free(p->q), free(p->kv), free(p->q_stored), free(p->kv_stored), free(p->out);
}

static void check_vector(const struct problem *p, int64_t row, int head) {
    const struct attend_exact_args *a = &p->a;
    int d = a->head_dim, kv_head = head / (a->n_heads / a->n_kv_heads);
    int64_t n = a->first + row + 1, at = (row * a->n_heads + head) * d;
    const float *k = p->kv + (int64_t)kv_head * 2 * a->n * d, *v = k + a->n * d;
    double *s = malloc((size_t)n * sizeof *s), max = -INFINITY, sum = 0.0, error = 0.0, worst = 0.0;
    for (int64_t t = 0; t < n; t++) {
        double dot = 0.0, dot_abs = 0.0;
        for (int c = 0; c < d; c++) {
            double product = (double)p->q[at + c] * (double)k[t * d + c];
            dot += product;
            dot_abs += fabs(product);
        }
        s[t] = dot * (double)a->scale;
        max = fmax(max, s[t]);
        error = fmax(error, (d + 4) * 0x1p-24 * dot_abs * (double)a->scale);
    }
    for (int64_t t = 0; t < n; t++)
        sum += s[t] = exp(s[t] - max);
    double tolerance = 4.0 * error + 2.0 * (128 + 3 * 16 + 3.0 * (double)n / 2048 + 12) * 0x1p-24;
    bool finite = true;
    for (int c = 0; c < d; c++) {
        double y = 0.0, y_abs = 0.0;
        for (int64_t t = 0; t < n; t++) {
            y += s[t] * (double)v[t * d + c];
            y_abs += s[t] * fabs((double)v[t * d + c]);
        }
        finite = finite && isfinite(p->out[at + c]);
        worst = fmax(worst, fabs((double)p->out[at + c] - y / sum) / (tolerance * y_abs / sum));
    }
    CHECK(finite && worst <= 1.0, "d %d, heads %d/%d, %s, first %ld, rows %ld, n %ld, row %ld head %d: %g of the bound", d, a->n_heads, a->n_kv_heads,
          dtype_name(a->dtype), (long)a->first, (long)a->n_rows, (long)a->n, (long)row, head, worst);
    free(s);
}

static void check(struct attend_exact_args args, int64_t step) {
    struct problem p = {.a = args, .seed = (uint64_t)(args.n_rows * 31 + args.first * 7 + args.n_heads)};
    problem_make(&p);
    omp_set_num_threads(2);
    cpu_attend_exact(&p.a);
    int64_t n_out = args.n_rows * args.n_heads * args.head_dim;
    for (int64_t row = 0; row < args.n_rows; row += row + step < args.n_rows || row == args.n_rows - 1 ? step : args.n_rows - 1 - row)
        for (int head = 0; head < args.n_heads; head++)
            check_vector(&p, row, head);
    for (int i = 0; i < GUARD * 4; i++)
        CHECK(((uint8_t *)(p.out + n_out))[i] == 0xee, "written beyond the end");
    float *again = malloc((size_t)n_out * 4 + 4);
    p.a.out = again;
    for (int threads = 1; threads <= 3; threads += 2) {
        omp_set_num_threads(threads);
        cpu_attend_exact(&p.a);
        CHECK(memcmp(p.out, again, (size_t)n_out * 4) == 0, "bits differ with %d threads", threads);
    }
    free(again);
    problem_free(&p);
}

int main(void) {
    static const int64_t rows[] = {0, 1, 31, 32, 33, 127, 128, 129, 200};
    static const enum dtype dtypes[] = {DTYPE_F16, DTYPE_BF16, DTYPE_F32};
    openblas_set_num_threads(1);
    int k = 0;
    for (int d = 64; d <= 128; d += 64)
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
            for (int late = 0; late < 3; late++, k++) {
                int n_kv_heads = 1 + k % 2, group = 1 + k % 9;
                int64_t first = late * 77;
                check((struct attend_exact_args){.n_rows = rows[i], .first = first, .n = first + rows[i] + 1 + k % 5, .n_heads = group * n_kv_heads,
                                                 .n_kv_heads = n_kv_heads, .head_dim = d, .dtype = dtypes[k % 3]},
                      3);
            }
    /* Long enough for sums to be folded (more than 16 pieces), and one huge group. */
    check((struct attend_exact_args){.n_rows = 70, .first = 4500, .n = 4570, .n_heads = 3, .n_kv_heads = 1, .head_dim = 64, .dtype = DTYPE_F16}, 23);
    check((struct attend_exact_args){.n_rows = 3, .first = 130, .n = 140, .n_heads = 200, .n_kv_heads = 1, .head_dim = 128, .dtype = DTYPE_F16}, 1);
    return test_report();
}
