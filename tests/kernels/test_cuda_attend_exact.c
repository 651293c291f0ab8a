/* Exact prefill attention on the GPU against the CPU's: our own kernel over row counts around its tiles, late first positions, groups, head
 * sizes and types, with NaN in the keys that no query may see; then cuDNN, where it is there, on a shape it is meant for, and both kernels'
 * rates (printed only).
 *
 * Grades: exact where all scores are 0 and values are small integers (weights 2^14 and sums are exact, so the mask must be right to the
 * key), bounded else, repeats bitwise.
 *
 * Bound of one result, out = sum p v / sum p, with A = scale |q| |k|max (no score is larger, nor a part of one) and Y = sum p |v| / sum p,
 * which the CPU's operation gives for |v|:
 *  - Tensor cores cut 16 products and the accumulator at 2^-23 of the largest of them or better: per score d / 16 * 17 * 2^-23 A, with the
 *    scale's roundings and the exponent's (1.1 d + 8) 2^-23 A; the CPU's are (d + 4) 2^-24 A. The exponentials have 2^-22 and 2^-22 more.
 *    An error e of every score moves the result by at most 2 e Y: numerator and denominator.
 *  - Weights are rounded for the second product: r = 2^-11 (f16) or 2^-8 (bf16) of themselves; f16 below the normal range by 2^-39 of the
 *    largest weight: 2^-39 n |v|max in all, since the denominator is at least the largest weight. (cuDNN's lie in [0, 1]: 2^-25 n |v|max.)
 *  - Sums over n keys: 17/16 n 2^-23 in the second product, n 2^-24 in the denominator, n / 64 rescalings: 1.6 n 2^-23; the CPU's are
 *    2 (128 + 48 + 3 n / 2048 + 12) 2^-24 (test_attend_exact.c).
 *  - cuDNN's result is rounded to 16 bits: r Y more. */
#include <cuda_runtime_api.h>

#include "kernels/cuda/dnn.h"
#include "kernels/cuda_rig.h"

enum fill { RANDOM, EQUAL, TAIL }; /* TAIL: one key at score 0, all others at -16, which carry the result */
enum { TIMED_ROWS = 16384, TIMED_HEADS = 32, TIMED_KV_HEADS = 8, TIMED_D = 128, TIMED_RUNS = 5, PIECE = 1 << 20 };

struct problem {
    struct attend_exact_args a[RIG_SIDES];
    struct twin q, kv, absolute, out, y; /* absolute: kv with |v|; y: what it gives */
    float *weights_error;                /* [row][head]: 2 e, of each vector */
    double v_max;
    char name[160];
};

static double rounding(enum dtype dtype) { return dtype == DTYPE_F16 ? 0x1p-11 : 0x1p-8; }
static double sums_error(int64_t n) { return (1.6 * (double)n + 192 + 3.0 * (double)n / 2048) * 0x1p-23; }
static double scores_error(int d, double a) { return (1.6 * d + 10) * 0x1p-23 * a + 0x1p-21; }

static void *checked(void *memory) {
    if (!memory)
        exit(1);
    return memory;
}

static float q_value(enum fill fill, uint64_t seed, int64_t i, int d) {
    if (fill == TAIL)
        return i % d == 0 ? 8.0f : 0.0f;
    return 2.0f * test_normal(seed, (uint64_t)i);
}

static float kv_value(enum fill fill, uint64_t seed, int64_t i, int64_t position, bool is_v, int d) {
    if (fill == TAIL)
        return is_v ? (float)(position > 0) : position > 0 && i % d == 0 ? -16.0f : 0.0f; /* 8 * -16 / 8 */
    if (fill == EQUAL)
        return is_v ? (float)(int64_t)(test_hash(seed, (uint64_t)i) % 17) - 8.0f : 0.0f;
    return test_normal(seed, (uint64_t)i);
}

/* Twins of q, kv and kv with |v|, NaN from first + n_rows on. */
static void make_inputs(struct problem *p, struct rig *rig, enum fill fill, uint64_t seed) {
    const struct attend_exact_args *a = &p->a[RIG_CPU];
    int d = a->head_dim;
    int64_t n_q = a->n_rows * a->n_heads * d, n_kv = (int64_t)a->n_kv_heads * 2 * a->n * d;
    float *q = checked(malloc((size_t)n_q * 4 + 4)), *kv = checked(malloc((size_t)n_kv * 4 + 4));
    uint16_t *stored = checked(malloc((size_t)(n_q > n_kv ? n_q : n_kv) * 2 + 2));
    for (int64_t i = 0; i < n_q; i++)
        q[i] = q_value(fill, seed, i, d);
    dtype_narrow(a->dtype, q, stored, n_q);
    dtype_widen(a->dtype, stored, q, n_q);
    p->q = rig_make(rig, (size_t)n_q * 2, stored);
    for (int64_t i = 0; i < n_kv; i++) {
        int64_t position = i / d % a->n;
        bool is_v = i / d / a->n % 2 == 1;
        kv[i] = position < a->first + a->n_rows ? kv_value(fill, seed + 1, i, position, is_v, d) : NAN;
    }
    dtype_narrow(a->dtype, kv, stored, n_kv);
    dtype_widen(a->dtype, stored, kv, n_kv);
    p->kv = rig_make(rig, (size_t)n_kv * 2, stored);
    double k_max = 0, norm = 0;
    p->v_max = 0;
    for (int64_t i = 0; i < n_kv; i++) {
        if (i / d / a->n % 2 == 1) {
            stored[i] &= 0x7fff;
            p->v_max = fmax(p->v_max, fabs((double)kv[i])); /* fmax passes NaN over */
            continue;
        }
        norm = i % d ? norm + (double)kv[i] * (double)kv[i] : (double)kv[i] * (double)kv[i];
        if (i % d == d - 1)
            k_max = fmax(k_max, norm);
    }
    p->absolute = rig_make(rig, (size_t)n_kv * 2, stored);
    p->weights_error = checked(malloc((size_t)(n_q / d) * 4 + 4));
    for (int64_t i = 0; i < n_q / d; i++) {
        norm = 0;
        for (int c = 0; c < d; c++)
            norm += (double)q[i * d + c] * (double)q[i * d + c];
        p->weights_error[i] = (float)(2 * scores_error(d, (double)a->scale * sqrt(norm * k_max)));
    }
    free(q), free(kv), free(stored);
}

static void problem_make(struct problem *p, struct rig *rig, struct attend_exact_args args, enum fill fill) {
    uint64_t seed = (uint64_t)(args.n_rows * 31 + args.first * 7 + args.n_heads);
    size_t n_out = (size_t)(args.n_rows * args.n_heads * args.head_dim);
    args.scale = fill == TAIL ? 0.125f : 1.0f / sqrtf((float)args.head_dim);
    snprintf(p->name, sizeof p->name, "d %d, heads %d/%d, %s, rows %lld from %lld, n %lld, fill %d", args.head_dim, args.n_heads,
             args.n_kv_heads, dtype_name(args.dtype), (long long)args.n_rows, (long long)args.first, (long long)args.n, (int)fill);
    p->a[RIG_CPU] = args;
    make_inputs(p, rig, fill, seed);
    p->out = rig_make(rig, n_out * 4, NULL);
    p->y = rig_make(rig, n_out * 4, NULL);
    for (int side = 0; side < RIG_SIDES; side++) {
        p->a[side] = args;
        p->a[side].q = p->q.at[side], p->a[side].kv = p->kv.at[side], p->a[side].out = p->out.at[side];
    }
    struct attend_exact_args absolute = p->a[RIG_CPU];
    absolute.kv = p->absolute.at[RIG_CPU], absolute.out = p->y.at[RIG_CPU];
    REQUIRE(op_attend_exact(rig->stream[RIG_CPU], &absolute));
    REQUIRE(op_attend_exact(rig->stream[RIG_CPU], &p->a[RIG_CPU]));
}

/* The GPU's result against the CPU's. */
static void check_close(const struct problem *p, struct rig *rig, bool by_dnn, const char *who) {
    const struct attend_exact_args *a = &p->a[RIG_CPU];
    int64_t n_out = a->n_rows * a->n_heads * a->head_dim, where = 0;
    size_t bytes = (size_t)n_out * 4;
    float *cpu = rig_fetch(rig, RIG_CPU, p->out.at[RIG_CPU], bytes), *cuda = rig_fetch(rig, RIG_CUDA, p->out.at[RIG_CUDA], bytes);
    float *y = rig_fetch(rig, RIG_CPU, p->y.at[RIG_CPU], bytes);
    double worst = 0, r = rounding(a->dtype) * (by_dnn ? 2 : 1), tiny = (by_dnn ? 0x1p-25 : 0x1p-39) * p->v_max;
    int64_t n_bad = 0, per_row = (int64_t)a->n_heads * a->head_dim;
    for (int64_t i = 0; i < n_out; i++) {
        int64_t n = a->first + i / per_row + 1; /* keys seen */
        double relative = 1.05 * ((double)p->weights_error[i / a->head_dim] + r + sums_error(n));
        double bound = relative * (double)y[i] + tiny * (double)n + 1e-30;
        double error = fabs((double)cpu[i] - (double)cuda[i]) / bound;
        n_bad += !(error <= 1);
        if (!(error <= worst) && worst == worst) { /* the first NaN stays */
            worst = error;
            where = i;
        }
    }
    CHECK(n_bad == 0, "%s: %s: %lld of %lld beyond the bound, worst %.3g times at row %lld, head %lld, channel %lld: cpu %g, cuda %g", who,
          p->name, (long long)n_bad, (long long)n_out, worst, (long long)(where / per_row), (long long)(where % per_row / a->head_dim),
          (long long)(where % a->head_dim), n_out ? (double)cpu[where] : 0, n_out ? (double)cuda[where] : 0);
    free(cpu), free(cuda), free(y);
}

static int again(struct stream *stream, const void *args) { return op_attend_exact(stream, args); }

static void check(struct rig *rig, struct attend_exact_args args, enum fill fill) {
    struct problem p;
    int n_twins = rig->n_twins;
    problem_make(&p, rig, args, fill);
    REQUIRE(op_attend_exact(rig->stream[RIG_CUDA], &p.a[RIG_CUDA]));
    if (fill == EQUAL)
        rig_expect_equal(rig, &p.out, p.name);
    else
        check_close(&p, rig, false, "own");
    rig_expect_repeat(rig, &p.out, again, &p.a[RIG_CUDA], p.name);
    free(p.weights_error);
    rig_drop(rig, n_twins);
}

/* `room`: keys after the last one that is seen. */
static struct attend_exact_args shape(int64_t n_rows, int64_t first, int64_t room, int n_heads, int n_kv_heads, int d, enum dtype dtype) {
    return (struct attend_exact_args){.n_rows = n_rows, .first = first, .n = first + n_rows + room, .n_heads = n_heads,
                                      .n_kv_heads = n_kv_heads, .head_dim = d, .dtype = dtype};
}

static void check_shapes(struct rig *rig) {
    static const int64_t rows[] = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 200};
    static const int64_t firsts[] = {0, 1, 63, 64, 77, 500};
    static const int groups[] = {1, 3, 4, 8};
    int k = 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (size_t j = 0; j < sizeof firsts / sizeof *firsts; j++, k++) {
            int n_kv_heads = 1 + k % 3, n_heads = groups[(i + j) % 4] * n_kv_heads;
            struct attend_exact_args args = shape(rows[i], firsts[j], 1 + k % 5, n_heads, n_kv_heads, (i + j / 2) % 2 ? 128 : 64,
                                                  (i / 2 + j) % 2 ? DTYPE_F16 : DTYPE_BF16);
            check(rig, args, RANDOM);
            check(rig, args, EQUAL);
        }
    for (int d = 64; d <= 128; d += 64)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            enum dtype dtype = bf16 ? DTYPE_BF16 : DTYPE_F16;
            check(rig, shape(70, 130, 0, 2, 2, d, dtype), EQUAL);     /* no room after the last key */
            check(rig, shape(3, 130, 7, 200, 1, d, dtype), RANDOM);   /* a group that is larger than a tile */
            check(rig, shape(40, 4056, 4, 4, 1, d, dtype), TAIL);     /* small weights that carry the result */
        }
}

static void check_refusals(struct rig *rig) {
    struct twin x = rig_make(rig, 4096, NULL);
    void *p = x.at[RIG_CUDA];
    struct cuda_launch launch = {0}; /* never used: the arguments are refused first */
    struct attend_exact_args good = {.n_rows = 1, .first = 1, .n = 2, .n_heads = 1, .n_kv_heads = 1, .head_dim = 64, .scale = 1.0f,
                                     .dtype = DTYPE_F16, .q = p, .kv = p, .out = p}, bad = good;
    bad.dtype = DTYPE_F32;
    CHECK_FAILS(cuda_attend_exact_own(&launch, &bad), STATUS_USAGE, "f16 and bf16");
    bad = good, bad.head_dim = 96;
    CHECK_FAILS(cuda_attend_exact_own(&launch, &bad), STATUS_USAGE, "head_dim 96");
    bad = good, bad.n_heads = 3, bad.n_kv_heads = 2;
    CHECK_FAILS(cuda_attend_exact_own(&launch, &bad), STATUS_USAGE, "3 query heads on 2");
    bad = good, bad.n_rows = 2;
    CHECK_FAILS(cuda_attend_exact_own(&launch, &bad), STATUS_USAGE, "keys of 2 positions");
    bad = good, bad.q = (uint8_t *)p + 8;
    CHECK_FAILS(cuda_attend_exact_own(&launch, &bad), STATUS_USAGE, "multiples of 16");
}

/* ---- cuDNN ---------------------------------------------------------------------------------------------------------- */

#define CUDA(call)                                                                                        \
    do {                                                                                                  \
        cudaError_t cuda_error_ = (call);                                                                 \
        if (cuda_error_ != cudaSuccess) {                                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_error_)); \
            exit(1);                                                                                      \
        }                                                                                                 \
    } while (0)

static struct cuda_launch launch_make(void) {
    struct cuda_launch launch = {0};
    int major, minor;
    CUDA(cudaDeviceGetAttribute(&launch.n_sms, cudaDevAttrMultiProcessorCount, 0));
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    launch.architecture = major * 10 + minor;
    CUDA(cudaMalloc(&launch.scratch, CUDA_SCRATCH_BYTES));
    REQUIRE(cuda_dnn_open(&launch.dnn));
    return launch;
}

static bool run_dnn(const struct cuda_launch *launch, const struct attend_exact_args *args) {
    bool done = false;
    if (launch->dnn)
        REQUIRE(cuda_dnn_attend(launch, args, &done));
    return done;
}

/* Which calls go to cuDNN: large ones, and those of round lengths. */
static void check_choice(void) {
    static const struct { int64_t n_rows, first, room; bool pays; } calls[] = {
        {65536, 0, 0, true}, {65537, 0, 3, true}, {4097, 0, 0, false},       {4096, 0, 1, false}, {4096, 0, 0, true},
        {2048, 0, 0, true},  {1024, 0, 0, false}, {1024, 3072, 0, true},     {1024, 3071, 1, false}, {512, 65536, 0, false},
    };
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        struct attend_exact_args args = shape(calls[i].n_rows, calls[i].first, calls[i].room, 32, 8, 128, DTYPE_F16);
        CHECK(cuda_dnn_pays(&args) == calls[i].pays, "%lld rows from %lld on, %lld keys beyond: cuDNN %s", (long long)calls[i].n_rows,
              (long long)calls[i].first, (long long)calls[i].room, calls[i].pays ? "is not used" : "is used");
    }
}

/* One problem by both kernels. */
static void check_both(struct rig *rig, const struct cuda_launch *launch, struct attend_exact_args args) {
    struct problem p;
    int n_twins = rig->n_twins;
    problem_make(&p, rig, args, RANDOM);
    REQUIRE(cuda_attend_exact_own(launch, &p.a[RIG_CUDA]));
    CUDA(cudaDeviceSynchronize());
    check_close(&p, rig, false, "own");
    CUDA(cudaMemset(p.out.at[RIG_CUDA], 0xff, p.out.bytes));
    bool done = run_dnn(launch, &p.a[RIG_CUDA]);
    CUDA(cudaDeviceSynchronize());
    if (done)
        check_close(&p, rig, true, "cuDNN");
    printf("%s: own kernel%s\n", p.name, done ? " and cuDNN" : launch->dnn ? "; cuDNN refuses" : "; no cuDNN here");
    free(p.weights_error);
    rig_drop(rig, n_twins);
}

/* n 16-bit normals in device memory, PIECE of them over and over; `plane`: of planes of that many the odd ones are without sign. */
static void *make_normals(enum dtype dtype, uint64_t seed, size_t n, size_t plane) {
    static float values[PIECE];
    static uint16_t stored[2][PIECE];
    uint16_t *device;
    CUDA(cudaMalloc((void **)&device, n * 2));
    for (size_t i = 0; i < PIECE; i++)
        values[i] = test_normal(seed, i);
    dtype_narrow(dtype, values, stored[0], PIECE);
    for (size_t i = 0; i < PIECE; i++)
        stored[1][i] = stored[0][i] & 0x7fff;
    for (size_t at = 0; at < n; at += PIECE) /* PIECE divides plane and n */
        CUDA(cudaMemcpy(device + at, stored[plane && at / plane % 2 == 1], sizeof stored[0], cudaMemcpyHostToDevice));
    return device;
}

static float timed(const struct cuda_launch *launch, const struct attend_exact_args *args, bool by_dnn) {
    cudaEvent_t start, end;
    float best = INFINITY;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i < TIMED_RUNS; i++) {
        float ms;
        CUDA(cudaEventRecord(start, NULL));
        if (!by_dnn)
            REQUIRE(cuda_attend_exact_own(launch, args));
        else if (!run_dnn(launch, args))
            return INFINITY;
        CUDA(cudaEventRecord(end, NULL));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&ms, start, end));
        best = i ? fminf(best, ms) : INFINITY; /* the first run builds the plan */
    }
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(end));
    return best;
}

/* Both kernels' results of the timed problem: within two times one's bound, cuDNN's rounding added. */
static void compare_timed(const float *own, const float *dnn, const float *y, const struct attend_exact_args *a) {
    static float x[3][PIECE];
    int64_t n_out = a->n_rows * a->n_heads * a->head_dim, n_bad = 0, where = -1, per_row = (int64_t)a->n_heads * a->head_dim;
    double e = 2 * scores_error(a->head_dim, (double)a->scale * 16 * 16); /* |q|, |k| of 128 normals: 11.3 +- 0.7 */
    for (int64_t at = 0; at < n_out; at += PIECE) {
        const float *from[3] = {own + at, dnn + at, y + at};
        for (int i = 0; i < 3; i++)
            CUDA(cudaMemcpy(x[i], from[i], sizeof x[i], cudaMemcpyDeviceToHost));
        for (int64_t i = 0; i < PIECE; i++) {
            double n = (double)((at + i) / per_row + 1), r = rounding(a->dtype);
            double bound = 1.1 * (2 * e + 3 * r + 2 * sums_error((int64_t)n)) * (double)x[2][i] + 0x1p-24 * 6 * n;
            if (!(fabs((double)x[0][i] - (double)x[1][i]) <= bound) && !n_bad++)
                where = at + i;
        }
    }
    CHECK(n_bad == 0, "own kernel and cuDNN differ at %lld of %lld, first at row %lld, column %lld", (long long)n_bad, (long long)n_out,
          (long long)(where / per_row), (long long)(where % per_row));
}

static void time_both(const struct cuda_launch *launch, enum dtype dtype) {
    size_t n_q = (size_t)TIMED_ROWS * TIMED_HEADS * TIMED_D, plane = (size_t)TIMED_ROWS * TIMED_D, n_kv = plane * 2 * TIMED_KV_HEADS;
    float *out[3];
    struct attend_exact_args args = {.n_rows = TIMED_ROWS, .n = TIMED_ROWS, .n_heads = TIMED_HEADS, .n_kv_heads = TIMED_KV_HEADS,
                                     .head_dim = TIMED_D, .scale = 1.0f / sqrtf((float)TIMED_D), .dtype = dtype};
    void *q = make_normals(dtype, 1, n_q, 0), *kv = make_normals(dtype, 2, n_kv, 0), *absolute = make_normals(dtype, 2, n_kv, plane);
    for (int i = 0; i < 3; i++)
        CUDA(cudaMalloc((void **)&out[i], n_q * 4));
    args.q = q, args.kv = absolute, args.out = out[2];
    REQUIRE(cuda_attend_exact_own(launch, &args));
    args.kv = kv, args.out = out[0];
    double work = 2.0 * TIMED_D * TIMED_HEADS * (double)TIMED_ROWS * TIMED_ROWS, own = (double)timed(launch, &args, false);
    args.out = out[1];
    double dnn = (double)timed(launch, &args, true);
    printf("%s, %d tokens, heads %d/%d of %d: own kernel %.2f ms, %.0f TFLOP/s", dtype_name(dtype), TIMED_ROWS, TIMED_HEADS, TIMED_KV_HEADS,
           TIMED_D, own, work / own * 1e-9);
    if (isfinite(dnn))
        printf("; cuDNN %s with widening %.2f ms, %.0f TFLOP/s", cuda_dnn_version(launch->dnn), dnn, work / dnn * 1e-9);
    printf("\n");
    if (isfinite(dnn))
        compare_timed(out[0], out[1], out[2], &args);
    for (int i = 0; i < 3; i++)
        CUDA(cudaFree(out[i]));
    CUDA(cudaFree(q));
    CUDA(cudaFree(kv));
    CUDA(cudaFree(absolute));
}

int main(void) {
    struct rig rig;
    rig_open(&rig);
    check_shapes(&rig);
    check_refusals(&rig);
    struct cuda_launch launch = launch_make();
    if (launch.dnn)
        check_choice();
    base_set_log(LOG_DEBUG, "");
    check_both(&rig, &launch, shape(1024, 3072, 0, 8, 2, 128, DTYPE_F16));
    check_both(&rig, &launch, shape(1001, 500, 99, 8, 2, 128, DTYPE_BF16)); /* NaN after the last key */
    check_both(&rig, &launch, shape(1001, 500, 99, 9, 3, 64, DTYPE_F16));
    time_both(&launch, DTYPE_F16);
    time_both(&launch, DTYPE_BF16);
    cuda_dnn_close(launch.dnn);
    CUDA(cudaFree(launch.scratch));
    rig_close(&rig);
    return test_report();
}
