/* The dense product on the GPU against the CPU's: every way and tile (kernels/cuda/matmul.cu), sizes around them, strides, skewed pointers,
 * bias, live rows.
 *
 * Exact: sums of small integers, and of 18-bit integers times -1, 0, 1 where x is not rounded (up to FEW_ROWS rows, and float
 * weights): every partial sum is an integer below 2^24.
 *
 * Bounded, u = 2^-24, S = |bias| + sum |x w| of an output, z the products that are not 0:
 *  - CPU: z + 2 roundings of a value of at most S (1.01: S itself is computed in float): (z + 2) u S.
 *  - GPU, float sums: no more. Tensor cores align the terms of one product to the largest and cut below its 24th bit. A product of x and w
 *    goes into at most two of them (high and low part of x); each costs it, the running sum and the result one cut of 2 u S: 12 z u S,
 *    and z + 2 roundings where partial sums of warps and blocks are added. Adding zeros costs nothing.
 *  - Up to FEW_ROWS rows the two parts of x miss less than 2^-21 of it: 2^-21 S.
 *  - Beyond, x is rounded to the weights' type: 2^-11 S (F16; and below its normal range 2^-25 sum |w|), 2^-8 S (BF16), nothing (F32). */
#include "cuda_rig.h"
#include "kernels/dtype.h"

enum { FEW_ROWS = 32 }; /* as in kernels/cuda/matmul.cu */

enum kind {
    UNIFORM, /* x and w in [-1, 1) */
    WHOLE,   /* integers -4 .. 4: exact */
    WIDE,    /* x integers of 18 bits, w -1, 0, 1: exact up to FEW_ROWS rows */
    SPARSE,  /* three entries of a row of x are not 0: the bound shows whether all of x counts */
    LARGE,   /* x up to 1e5 (more than F16 holds; 6e4 beyond FEW_ROWS rows), most of it small */
    N_KINDS,
};
static const char *const kind_names[N_KINDS] = {"uniform", "whole", "wide", "sparse", "large"};

struct shape {
    int rows;
    int64_t n_in, n_out;
    int more_ldx, more_ldy;  /* floats between rows */
    bool bias;
    int dead;                /* rows that are not live */
    int skew_x, skew_w, skew_bias; /* values from an aligned address to the first */
};

struct problem {
    struct shape s;
    enum dtype dtype;
    enum kind kind;
    uint64_t seed;
    char name[160];
    int64_t live, ldx, ldy;
    struct twin x, w, bias, y, abs_x, abs_w, abs_bias, abs_y;
};

static bool is_exact(const struct problem *p) { return p->kind == WHOLE || p->kind == WIDE; }

static float x_entry(const struct problem *p, int64_t row, int64_t k) {
    uint64_t i = (uint64_t)(row * p->s.n_in + k);
    float u = test_uniform(p->seed, i);
    switch (p->kind) {
    case WHOLE: return rintf(4 * u);
    case WIDE: return rintf(131071 * u);
    case SPARSE: return k == row % p->s.n_in || k == (7 * row + p->s.n_in / 2) % p->s.n_in || k == p->s.n_in - 1 ? 3 * u : 0;
    case LARGE: return (p->s.rows > FEW_ROWS ? 6e4f : 1e5f) * (i % 13 == 0 ? u : u * u * u * 1e-3f);
    default: return u;
    }
}

static float w_entry(const struct problem *p, uint64_t i) {
    float u = test_uniform(p->seed + 1, i);
    return p->kind == WHOLE ? rintf(4 * u) : p->kind == WIDE ? rintf(u) : u;
}

/* A twin of `skew` poisoned values and then `values` rounded to dtype. */
static struct twin make_values(struct rig *rig, enum dtype dtype, const float *values, int64_t n, int skew) {
    size_t lead = dtype_bytes(dtype, skew), bytes = dtype_bytes(dtype, n);
    uint8_t *host = malloc(lead + bytes);
    if (!host)
        exit(1);
    memset(host, 0xff, lead);
    dtype_narrow(dtype, values, host + lead, n);
    struct twin twin = rig_make(rig, lead + bytes, host);
    free(host);
    return twin;
}

static float *floats(int64_t n) {
    float *values = malloc((size_t)(n ? n : 1) * sizeof *values);
    if (!values)
        exit(1);
    return values;
}

/* Both twins of one input: as it is, and the absolute values (of what the type holds). */
static void make_both(struct rig *rig, enum dtype dtype, float *values, int64_t n, int skew, struct twin *plain, struct twin *absolute) {
    *plain = make_values(rig, dtype, values, n, skew);
    for (int64_t i = 0; i < n; i++)
        values[i] = fabsf(values[i]);
    *absolute = make_values(rig, dtype, values, n, skew);
    free(values);
}

static void make_inputs(struct rig *rig, struct problem *p) {
    const struct shape *s = &p->s;
    float *x = floats(s->rows * p->ldx), *w = floats(s->n_in * s->n_out), *bias = floats(s->n_out);
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t k = 0; k < p->ldx; k++)
            x[row * p->ldx + k] = k < s->n_in && row < p->live ? x_entry(p, row, k) : NAN;
    for (int64_t i = 0; i < s->n_in * s->n_out; i++)
        w[i] = w_entry(p, (uint64_t)i);
    for (int64_t i = 0; i < s->n_out; i++) {
        bias[i] = test_uniform(p->seed + 2, (uint64_t)i);
        if (is_exact(p))
            bias[i] = rintf(9 * bias[i]);
    }
    make_both(rig, DTYPE_F32, x, s->rows * p->ldx, s->skew_x, &p->x, &p->abs_x);
    make_both(rig, p->dtype, w, s->n_in * s->n_out, s->skew_w, &p->w, &p->abs_w);
    make_both(rig, DTYPE_F32, bias, s->n_out, s->skew_bias, &p->bias, &p->abs_bias);
    p->y = rig_make(rig, (size_t)(s->rows * p->ldy) * sizeof(float), NULL);
    p->abs_y = rig_make(rig, (size_t)(s->rows * p->ldy) * sizeof(float), NULL);
}

static struct matmul_args args_of(const struct problem *p, int side, const struct twin *live, bool absolute) {
    const struct shape *s = &p->s;
    const struct twin *x = absolute ? &p->abs_x : &p->x, *w = absolute ? &p->abs_w : &p->w, *bias = absolute ? &p->abs_bias : &p->bias;
    return (struct matmul_args){
        .n_rows = s->rows, .live = s->dead ? live->at[side] : NULL,
        .x = (const float *)x->at[side] + s->skew_x, .ldx = p->ldx,
        .w = (const uint8_t *)w->at[side] + dtype_bytes(p->dtype, s->skew_w), .dtype = p->dtype,
        .bias = s->bias ? (const float *)bias->at[side] + s->skew_bias : NULL,
        .n_in = s->n_in, .n_out = s->n_out, .y = absolute ? p->abs_y.at[side] : p->y.at[side], .ldy = p->ldy,
    };
}

static double bound_of(const struct problem *p, double sum_abs) {
    double z = p->kind == SPARSE ? 3 : (double)p->s.n_in, u = 0x1p-24;
    double relative = (z + 2) * u + (13 * z + 2) * u, below_normal = 0;
    if (p->s.rows <= FEW_ROWS)
        relative += p->dtype == DTYPE_F32 ? 0 : 0x1p-21;
    else if (p->dtype == DTYPE_F16)
        relative += 0x1p-11, below_normal = z * 0x1p-25; /* |w| <= 1 */
    else if (p->dtype == DTYPE_BF16)
        relative += 0x1p-8;
    return 1.01 * relative * sum_abs + below_normal;
}

static void compare(struct rig *rig, const struct problem *p) {
    bool exact = is_exact(p);
    float *cpu = rig_fetch(rig, RIG_CPU, p->y.at[RIG_CPU], p->y.bytes), *cuda = rig_fetch(rig, RIG_CUDA, p->y.at[RIG_CUDA], p->y.bytes);
    float *sums = rig_fetch(rig, RIG_CPU, p->abs_y.at[RIG_CPU], p->abs_y.bytes);
    int64_t n_wrong = 0, n_touched = 0, worst_at = -1;
    double worst = 0;
    for (int64_t i = 0; i < p->s.rows * p->ldy; i++) {
        if (i % p->ldy >= p->s.n_out) {
            n_touched += memcmp(&cuda[i], "\xff\xff\xff\xff", 4) != 0;
            continue;
        }
        if (i / p->ldy >= p->live)
            continue;
        double error = fabs((double)cpu[i] - (double)cuda[i]), bound = exact ? 0 : bound_of(p, (double)sums[i]);
        double share = error == 0 ? 0 : bound > 0 ? error / bound : INFINITY;
        n_wrong += !(share <= 1);
        if (!(share <= worst) && worst == worst) /* a NaN stays the worst */
            worst = share, worst_at = i;
    }
    int64_t at = worst_at < 0 ? 0 : worst_at;
    CHECK(n_wrong == 0, "%s: %lld of %lld outputs; worst at row %lld, out %lld: cpu %.9g, cuda %.9g, sum |x w| %.9g, %.3g times the bound",
          p->name, (long long)n_wrong, (long long)(p->live * p->s.n_out), (long long)(at / p->ldy), (long long)(at % p->ldy),
          (double)cpu[at], (double)cuda[at], (double)sums[at], worst);
    CHECK(n_touched == 0, "%s: %lld floats between rows of y were written", p->name, (long long)n_touched);
    free(cpu), free(cuda), free(sums);
}

static int launch_again(struct stream *stream, const void *args) { return op_matmul(stream, args); }

static void check(struct rig *rig, struct shape s, enum dtype dtype, enum kind kind, uint64_t seed) {
    struct problem p = {.s = s, .dtype = dtype, .kind = kind, .seed = seed};
    int before = rig->n_twins;
    p.live = s.rows - s.dead, p.ldx = s.n_in + s.more_ldx, p.ldy = s.n_out + s.more_ldy;
    snprintf(p.name, sizeof p.name, "%s %s, %d rows (%lld live), %lld -> %lld, ldx %lld, ldy %lld, skews %d %d %d%s", dtype_name(dtype),
             kind_names[kind], s.rows, (long long)p.live, (long long)s.n_in, (long long)s.n_out, (long long)p.ldx, (long long)p.ldy,
             s.skew_x, s.skew_w, s.skew_bias, s.bias ? ", bias" : "");
    int32_t live_rows = (int32_t)p.live;
    struct twin live = rig_make(rig, sizeof live_rows, &live_rows);
    make_inputs(rig, &p);
    for (int side = 0; side < RIG_SIDES; side++) {
        struct matmul_args args = args_of(&p, side, &live, false);
        int status = op_matmul(rig->stream[side], &args);
        CHECK(status == STATUS_OK, "%s: %s: %s", p.name, side ? "cuda" : "cpu", base_error());
        base_clear_error();
        REQUIRE(stream_sync(rig->stream[side]));
    }
    struct matmul_args absolute = args_of(&p, RIG_CPU, &live, true), cuda = args_of(&p, RIG_CUDA, &live, false);
    REQUIRE(op_matmul(rig->stream[RIG_CPU], &absolute));
    compare(rig, &p);
    rig_expect_repeat(rig, &p.y, launch_again, &cuda, p.name);
    rig_drop(rig, before);
}

static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
enum { N_DTYPES = 3 };

/* In all types, the kind of numbers changes from one to the next. */
static const struct shape shapes[] = {
    /* one row: dot; one warp a row, or several; tails of every kind; more blocks than fit at once */
    {.rows = 1, .n_in = 1, .n_out = 1},
    {.rows = 1, .n_in = 7, .n_out = 3, .bias = true},
    {.rows = 1, .n_in = 64, .n_out = 16},
    {.rows = 1, .n_in = 256, .n_out = 40001, .bias = true},
    {.rows = 1, .n_in = 576, .n_out = 1536, .more_ldx = 4},
    {.rows = 1, .n_in = 1000, .n_out = 17, .bias = true, .more_ldy = 3},
    {.rows = 1, .n_in = 1000, .n_out = 17, .skew_w = 1},
    {.rows = 1, .n_in = 1000, .n_out = 17, .skew_x = 1},
    {.rows = 1, .n_in = 4096, .n_out = 4096},
    {.rows = 1, .n_in = 4099, .n_out = 577, .bias = true},
    {.rows = 1, .n_in = 14336, .n_out = 576},
    /* 2 .. FEW_ROWS rows: tensor, each tile of rows, small and large slices, clusters of every size */
    {.rows = 2, .n_in = 64, .n_out = 1},
    {.rows = 2, .n_in = 8, .n_out = 3, .bias = true},
    {.rows = 2, .n_in = 4096, .n_out = 576},
    {.rows = 3, .n_in = 576, .n_out = 17, .bias = true, .more_ldx = 4, .more_ldy = 1},
    {.rows = 4, .n_in = 1000, .n_out = 1536, .dead = 1},
    {.rows = 5, .n_in = 4096, .n_out = 4096, .bias = true},
    {.rows = 7, .n_in = 512, .n_out = 768},
    {.rows = 8, .n_in = 14336, .n_out = 576, .bias = true, .dead = 2},
    {.rows = 8, .n_in = 256, .n_out = 28672},
    {.rows = 8, .n_in = 512, .n_out = 6144},
    {.rows = 9, .n_in = 64, .n_out = 16, .bias = true},
    {.rows = 9, .n_in = 1000, .n_out = 33, .dead = 8},
    {.rows = 16, .n_in = 4096, .n_out = 1536, .more_ldy = 5},
    {.rows = 16, .n_in = 320, .n_out = 14400, .bias = true},
    {.rows = 17, .n_in = 576, .n_out = 33},
    {.rows = 32, .n_in = 4096, .n_out = 576, .bias = true, .dead = 5},
    {.rows = 32, .n_in = 320, .n_out = 14337},
    {.rows = 32, .n_in = 14336, .n_out = 65},
    /* few rows that tensor cannot read */
    {.rows = 2, .n_in = 7, .n_out = 3},
    {.rows = 5, .n_in = 1, .n_out = 1, .bias = true},
    {.rows = 8, .n_in = 1000, .n_out = 576, .more_ldx = 1},
    {.rows = 9, .n_in = 577, .n_out = 16, .bias = true, .dead = 4},
    {.rows = 31, .n_in = 1000, .n_out = 64, .skew_w = 3, .more_ldy = 1},
    {.rows = 32, .n_in = 4779, .n_out = 33, .skew_x = 2, .dead = 32},
    /* many rows: cuBLASLt; as they are, padded, with an unaligned bias */
    {.rows = 33, .n_in = 64, .n_out = 16, .bias = true},
    {.rows = 64, .n_in = 4096, .n_out = 576},
    {.rows = 65, .n_in = 1000, .n_out = 17, .bias = true, .more_ldx = 3, .dead = 20},
    {.rows = 65, .n_in = 14336, .n_out = 576, .bias = true},
    {.rows = 128, .n_in = 576, .n_out = 1536, .more_ldy = 1},
    {.rows = 128, .n_in = 64, .n_out = 64, .bias = true, .skew_bias = 1},
    {.rows = 200, .n_in = 7, .n_out = 3},
    {.rows = 200, .n_in = 1, .n_out = 1, .bias = true},
    {.rows = 200, .n_in = 1000, .n_out = 48, .skew_w = 1, .skew_x = 1},
    {.rows = 512, .n_in = 577, .n_out = 1000, .bias = true},
    {.rows = 512, .n_in = 4096, .n_out = 1536},
};

static void check_shapes(struct rig *rig) {
    static const enum kind kinds[] = {UNIFORM, WHOLE, SPARSE, LARGE};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (size_t t = 0; t < N_DTYPES; t++)
            check(rig, shapes[i], dtypes[t], kinds[(i + t) % 4], 100 * i);
}

/* For each number of rows of a step: integers that need all bits of x, and nearly empty rows. */
static void check_rows(struct rig *rig) {
    for (int rows = 1; rows <= FEW_ROWS; rows++)
        for (size_t t = 0; t < N_DTYPES; t++) {
            check(rig, (struct shape){.rows = rows, .n_in = 64, .n_out = 83, .bias = rows % 2}, dtypes[t], WIDE, (uint64_t)rows);
            check(rig, (struct shape){.rows = rows, .n_in = 1024 + 8 * rows, .n_out = 40, .dead = rows / 5}, dtypes[t], SPARSE,
                  (uint64_t)rows);
        }
    check(rig, (struct shape){.rows = 40, .n_in = 64, .n_out = 83}, DTYPE_F32, WIDE, 40); /* fails where the library takes TF32 */
}

/* Rounded x and padded weights take more than the scratch: rows and outputs in blocks (800 rows and 1600 outputs of 28 KiB each). */
static void check_blocks(struct rig *rig) {
    check(rig, (struct shape){.rows = 800, .n_in = 14335, .n_out = 1600, .bias = true}, DTYPE_F16, UNIFORM, 1);
    check(rig, (struct shape){.rows = 800, .n_in = 14335, .n_out = 1600, .bias = true, .more_ldy = 2}, DTYPE_BF16, WHOLE, 2);
}

static void check_nothing(struct rig *rig) {
    struct matmul_args args = {.n_rows = 0, .ldx = 8, .n_in = 8, .n_out = 8, .ldy = 8, .dtype = DTYPE_F16};
    REQUIRE(op_matmul(rig->stream[RIG_CUDA], &args));
    args.n_rows = 3, args.n_out = 0;
    REQUIRE(op_matmul(rig->stream[RIG_CUDA], &args));
    REQUIRE(stream_sync(rig->stream[RIG_CUDA]));
}

int main(void) {
    static struct rig rig;
    rig_open(&rig);
    check_nothing(&rig);
    check_rows(&rig);
    check_shapes(&rig);
    check_blocks(&rig);
    rig_close(&rig);
    return test_report();
}
