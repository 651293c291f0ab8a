/* The dense product against double: sizes around every tile and panel, strides, bias, all types, live rows, guard values around every
 * row of y, equal bits for every number of threads.
 *
 * Tolerance, u = 2^-24: products are exact or off by u, and the n_in terms (and a bias) are added in some order in float, so the error is
 * at most (n_in + 2) u times the sum of the absolute terms. Small integers must come out exactly. */
#include <omp.h>

#include <cblas.h>

#include "kernels/cpu/cpu.h"
#include "test.h"

struct problem {
    struct matmul_args a;
    int32_t live;
    bool whole;  /* small integers: tolerance 0 */
    uint64_t seed;
};

static float entry(const struct problem *p, uint64_t stream, uint64_t i) {
    float x = test_uniform(p->seed + stream, i);
    return p->whole ? rintf(4.0f * x) : x;
}

static void check(struct problem p) {
    struct matmul_args *a = &p.a;
    int64_t n_x = a->n_rows * a->ldx + 1, n_w = a->n_in * a->n_out, n_y = a->n_rows * a->ldy + 1;
    float *x = malloc((size_t)n_x * 4), *wf = malloc((size_t)n_w * 4), *y = malloc((size_t)n_y * 4), *bias = malloc((size_t)a->n_out * 4);
    float *again = malloc((size_t)n_y * 4);
    void *w = malloc((size_t)n_w * 4);
    if (!x || !wf || !y || !bias || !w || !again)
        exit(1);
    for (int64_t i = 0; i < n_x; i++)
        x[i] = i < a->n_rows * a->ldx && i % a->ldx < a->n_in ? entry(&p, 0, (uint64_t)i) : NAN;
    for (int64_t i = 0; i < n_w; i++)
        wf[i] = entry(&p, 1, (uint64_t)i);
    for (int64_t i = 0; i < a->n_out; i++)
        bias[i] = entry(&p, 2, (uint64_t)i);
    dtype_narrow(a->dtype, wf, w, n_w), dtype_widen(a->dtype, w, wf, n_w);
    memset(y, 0xee, (size_t)n_y * 4);
    memset(again, 0xee, (size_t)n_y * 4);
    a->x = x, a->w = w, a->y = y, a->bias = a->bias ? bias : NULL, a->live = p.live >= 0 ? &p.live : NULL;
    int64_t live = p.live >= 0 ? min_i64(p.live, a->n_rows) : a->n_rows;
    omp_set_num_threads(2);
    cpu_matmul(a);
    for (int64_t i = 0; i < n_y; i++) {
        int64_t row = i / a->ldy, o = i % a->ldy;
        if (row >= a->n_rows || o >= a->n_out) {
            CHECK(memcmp(&y[i], "\xee\xee\xee\xee", 4) == 0, "row %ld, %ld written", (long)row, (long)o);
            continue;
        }
        if (row >= live)
            continue;
        double sum = a->bias ? (double)bias[o] : 0.0, sum_abs = fabs(sum);
        for (int64_t k = 0; k < a->n_in; k++) {
            double term = (double)x[row * a->ldx + k] * (double)wf[o * a->n_in + k];
            sum += term;
            sum_abs += fabs(term);
        }
        double bound = p.whole ? 0.0 : (double)(a->n_in + 2) * 0x1p-24 * sum_abs;
        CHECK(fabs((double)y[i] - sum) <= bound, "%s, %d rows, %ld -> %ld, row %ld, out %ld: %.9g, truth %.9g", dtype_name(a->dtype), a->n_rows,
              (long)a->n_in, (long)a->n_out, (long)row, (long)o, (double)y[i], sum);
    }
    a->y = again;
    for (int threads = 1; threads <= 5; threads += 2) {
        omp_set_num_threads(threads);
        cpu_matmul(a);
        CHECK(memcmp(y, again, (size_t)n_y * 4) == 0, "bits differ with %d threads", threads);
    }
    free(x), free(wf), free(y), free(bias), free(w), free(again);
}

/* Few rows: a row's bits do not depend on the rows beside it. */
static void check_batch(void) {
    enum { ROWS = 7, IN = 83, OUT = 41 };
    float x[ROWS * IN], y[ROWS * OUT], alone[OUT];
    uint16_t w[OUT * IN];
    for (int i = 0; i < ROWS * IN; i++)
        x[i] = test_uniform(1, (uint64_t)i);
    for (int i = 0; i < OUT * IN; i++)
        w[i] = dtype_to_f16(test_uniform(2, (uint64_t)i));
    struct matmul_args a = {.n_rows = ROWS, .x = x, .ldx = IN, .w = w, .dtype = DTYPE_F16, .n_in = IN, .n_out = OUT, .y = y, .ldy = OUT};
    cpu_matmul(&a);
    for (int row = 0; row < ROWS; row++) {
        a.n_rows = 1, a.x = x + row * IN, a.y = alone;
        cpu_matmul(&a);
        CHECK(memcmp(alone, y + row * OUT, sizeof alone) == 0, "row %d", row);
    }
}

int main(void) {
    static const int rows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 47, 48, 49, 65};
    static const int sizes[][2] = {{1, 1}, {3, 5}, {15, 4}, {16, 3}, {17, 33}, {64, 64}, {129, 257}, {31, 1}, {513, 15}};
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    openblas_set_num_threads(1);
    uint64_t k = 0;
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++, k++)
            for (int t = 0; t < 3; t++) {
                struct problem p = {.live = k % 5 ? -1 : (int32_t)(k % 70), .whole = k % 4 == 0, .seed = 10 * k};
                static const float yes = 0.0f;
                p.a = (struct matmul_args){.n_rows = rows[r], .ldx = sizes[s][0] + (int)(k % 3), .dtype = dtypes[t], .bias = k % 2 ? &yes : NULL,
                                           .n_in = sizes[s][0], .n_out = sizes[s][1], .ldy = sizes[s][1] + (int)(k % 4)};
                check(p);
            }
    /* Several panels, pieces of n_in, blocks of rows; and enough weights that the few-row path uses threads. */
    struct problem large = {.live = -1, .seed = 5, .a = {.n_rows = 70, .ldx = 1030, .dtype = DTYPE_F16, .n_in = 1027, .n_out = 530, .ldy = 531}};
    check(large);
    large.a.n_rows = 9, large.a.x = NULL, large.a.n_out = 131;
    check(large);
    large.a = (struct matmul_args){.n_rows = 525, .ldx = 20, .dtype = DTYPE_BF16, .n_in = 20, .n_out = 40, .ldy = 40};
    check(large);
    check_batch();
    return test_report();
}
