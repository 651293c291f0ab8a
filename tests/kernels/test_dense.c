/* The small dense operations against double precision, and the vector exponential against libm: every lane position, the whole range,
 * the special values. Tolerances, u = 2^-24: v16_exp is promised within 2 units in the last place; rmsnorm rounds the mean, the root,
 * its inverse and two products (2.5 u and 2 u at most, 8 u allowed); silu_mul has the exponential (4 u), a sum, a quotient and a
 * product (8 u allowed, and 1e-33 where the exponential overflows); rope takes the angle in float as given, cos and sin within one unit of libm's, two products and a sum (5 u
 * of the absolute terms), then one rounding to the window's type; where heads are normalized first, 8 u more as for rmsnorm. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd.h"
#include "test.h"

#define U 0x1p-24

static void check_exp(void) {
    double worst = 0.0;
    for (int64_t i = 0; i < 400000; i++) {
        float lanes[V16];
        for (int j = 0; j < V16; j++)
            lanes[j] = -110.0f + 210.0f * ((float)(i % 20000) * V16 + (float)j + test_uniform(1, (uint64_t)(i * V16 + j))) / 320000.0f;
        float out[V16];
        v16_store(out, v16_exp(v16_load(lanes)));
        for (int j = (int)(i % 2); j < V16; j += 5) {
            double truth = exp((double)lanes[j]), unit = fmax(0x1p-149, truth * 0x1p-24);
            if (lanes[j] >= 88.7f)
                continue;
            unit = ldexp(1.0, (int)fmax(floor(log2(truth)) - 23.0, -149.0));
            worst = fmax(worst, fabs((double)out[j] - truth) / unit);
        }
        if (i == 19999)
            i = 399000;
    }
    CHECK(worst <= 2.0, "%g units in the last place", worst);
    CHECK(simd_exp(-INFINITY) == 0.0f && simd_exp(-1e30f) == 0.0f && simd_exp(-104.0f) == 0.0f, "%g", (double)simd_exp(-104.0f));
    CHECK(simd_exp(0.0f) == 1.0f && simd_exp(INFINITY) == INFINITY && simd_exp(89.0f) == INFINITY, "special values");
    CHECK(isnan(simd_exp(NAN)), "NaN");
}

static void check_simd(void) {
    float a[V16], four[4];
    uint32_t words[V16];
    for (int i = 0; i < V16; i++) {
        a[i] = (float)(i * i % 11);
        words[i] = (uint32_t)test_hash(1, (uint64_t)i);
    }
    struct v16 v = v16_load(a);
    float sum = 0.0f, top = 0.0f;
    for (int i = 0; i < V16; i++) {
        sum += a[i];
        top = fmaxf(top, a[i]);
    }
    CHECK(v16_sum(v) == sum && v16_top(v) == top, "sum %g, top %g", (double)v16_sum(v), (double)v16_top(v));
    v16_sum4(v, v16_mul(v, v16_set(2.0f)), v16_set(1.0f), v16_sub(v16_set(0.0f), v), four);
    CHECK(four[0] == sum && four[1] == 2.0f * sum && four[2] == 16.0f && four[3] == -sum, "sum4");
    for (int bits = 2; bits <= 8; bits *= 2)
        for (int bit = 0; bit < 32; bit += bits) {
            float got[V16];
            v16_store(got, v16_field(w16_load(words), bit, bits));
            for (int i = 0; i < V16; i++) {
                double field = (double)(words[i] >> bit & ((1u << bits) - 1));
                CHECK((double)got[i] == (V16_FIELD_IN_PLACE ? ldexp(field, bit) : field), "bits %d at %d", bits, bit);
            }
        }
    for (int t = 0; t < 3; t++) {
        static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
        float values[40], back[40], wide[40];
        uint8_t stored[160];
        for (int i = 0; i < 40; i++)
            values[i] = test_normal(3, (uint64_t)i);
        dtype_narrow(dtypes[t], values, stored, 40), dtype_widen(dtypes[t], stored, back, 40);
        simd_widen(dtypes[t], stored, wide, 39);
        CHECK(memcmp(wide, back, 39 * 4) == 0, "%s", dtype_name(dtypes[t]));
        float tail[V16];
        v16_store(tail, v16_load_tail(dtypes[t], stored, 32, 5));
        for (int i = 0; i < V16; i++)
            CHECK(tail[i] == (i < 5 ? back[32 + i] : 0.0f), "tail of %s", dtype_name(dtypes[t]));
    }
}

static void check_step_begin(void) {
    static struct step_input in;
    int32_t last[3] = {70, 71, 72}, tokens[5], positions[5];
    in.n_rows = 4;
    in.row[0] = (struct step_row){2, 9, 100, 0};
    in.row[1] = (struct step_row){-1, 5, 7, 1};
    in.row[2] = (struct step_row){1, -1, 33, 2};
    in.row[3] = (struct step_row){0, 0, 0, 3};
    in.row[4] = (struct step_row){77777, 1, 1, 1};
    cpu_step_begin(&(struct step_begin_args){&in, 5, last, tokens, positions});
    CHECK(tokens[0] == 9 && tokens[1] == -1 && tokens[2] == 71 && tokens[3] == 0 && tokens[4] == -1, "tokens");
    CHECK(positions[0] == 100 && positions[1] == 0 && positions[2] == 33 && positions[3] == 0 && positions[4] == 0, "positions");
}

static void check_embed(void) {
    enum { HIDDEN = 37, COUNT = 5, ROWS = 6 };
    int32_t tokens[ROWS] = {10, -1, 14, 9, 15, 12}, live = 5;
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    for (int t = 0; t < 3; t++) {
        float table[COUNT * HIDDEN], x[ROWS * HIDDEN];
        uint8_t stored[COUNT * HIDDEN * 4];
        for (int i = 0; i < COUNT * HIDDEN; i++)
            table[i] = test_normal(1, (uint64_t)i);
        dtype_narrow(dtypes[t], table, stored, COUNT * HIDDEN), dtype_widen(dtypes[t], stored, table, COUNT * HIDDEN);
        memset(x, 0xee, sizeof x);
        cpu_embed(&(struct embed_args){ROWS, &live, tokens, stored, dtypes[t], 10, COUNT, HIDDEN, x});
        for (int i = 0; i < live * HIDDEN; i++) {
            int token = tokens[i / HIDDEN] - 10;
            CHECK(x[i] == (token < 0 || token >= COUNT ? 0.0f : table[token * HIDDEN + i % HIDDEN]), "row %d", i / HIDDEN);
        }
        CHECK(memcmp(&x[5 * HIDDEN], "\xee\xee\xee\xee", 4) == 0, "a dead row was written");
    }
}

static void check_rmsnorm(int hidden, int n_rows, bool pick) {
    float *x = malloc((size_t)(hidden * n_rows) * 4), *weight = malloc((size_t)hidden * 4), *out = malloc((size_t)(hidden * n_rows) * 4);
    struct step_logit picks[8];
    int32_t live = n_rows;
    for (int i = 0; i < hidden * n_rows; i++)
        x[i] = ldexpf(test_normal(2, (uint64_t)i), i / hidden * 5 - 10);
    for (int i = 0; i < hidden; i++)
        weight[i] = 1.0f + test_uniform(3, (uint64_t)i);
    for (int i = 0; i < n_rows && i < 8; i++)
        picks[i].row = n_rows - 1 - i;
    cpu_rmsnorm(&(struct rmsnorm_args){n_rows + 3, &live, pick ? picks : NULL, x, weight, 1e-5f, hidden, out});
    for (int i = 0; i < n_rows; i++) {
        const float *row = x + (pick ? n_rows - 1 - i : i) * hidden;
        double sum = 0.0;
        for (int k = 0; k < hidden; k++)
            sum += (double)row[k] * (double)row[k];
        double factor = 1.0 / sqrt(sum / hidden + (double)1e-5f);
        for (int k = 0; k < hidden; k++) {
            double truth = (double)row[k] * factor * (double)weight[k];
            CHECK(fabs((double)out[i * hidden + k] - truth) <= 8 * U * fabs(truth), "hidden %d, row %d, %d", hidden, i, k);
        }
    }
    free(x), free(weight), free(out);
}

static void check_silu_mul(int n, int n_rows) {
    float *x = malloc((size_t)(2 * n * n_rows) * 4), *out = malloc((size_t)(n * n_rows + 1) * 4);
    for (int i = 0; i < 2 * n * n_rows; i++)
        x[i] = (i % 7 ? 5.0f : 60.0f) * test_normal(4, (uint64_t)i);
    x[0] = -200.0f;
    memset(out, 0xee, (size_t)(n * n_rows + 1) * 4);
    cpu_silu_mul(&(struct silu_mul_args){n_rows, NULL, x, n, out});
    for (int i = 0; i < n * n_rows; i++) {
        double gate = (double)x[i / n * 2 * n + i % n], up = (double)x[i / n * 2 * n + n + i % n], truth = gate / (1.0 + exp(-gate)) * up;
        CHECK(fabs((double)out[i] - truth) <= 8 * U * fabs(truth) + 1e-33, "n %d, %d: %g, truth %g", n, i, (double)out[i], truth);
    }
    CHECK(memcmp(&out[n * n_rows], "\xee\xee\xee\xee", 4) == 0, "written beyond the end");
    free(x), free(out);
}

static void check_add(int n_rows, int hidden) {
    int n = n_rows * hidden;
    int32_t live = n_rows - 1;
    float *x = malloc((size_t)n * 4), *y = malloc((size_t)n * 4);
    for (int i = 0; i < n; i++)
        x[i] = test_normal(5, (uint64_t)i), y[i] = test_normal(6, (uint64_t)i);
    cpu_add(&(struct add_args){n_rows, &live, hidden, x, y});
    for (int i = 0; i < n; i++) {
        float before = test_normal(5, (uint64_t)i);
        CHECK(x[i] == (i < live * hidden ? before + y[i] : before), "%d", i);
    }
    free(x), free(y);
}

/* The bits of add and then rmsnorm; the last row is dead and stays as it was. */
static void check_add_rmsnorm(int n_rows, int hidden) {
    int n = n_rows * hidden;
    int32_t live = n_rows - 1;
    float *x = malloc((size_t)n * 4), *y = malloc((size_t)n * 4), *out = malloc((size_t)n * 4), *weight = malloc((size_t)hidden * 4);
    float *sum = malloc((size_t)n * 4), *expected = malloc((size_t)n * 4);
    for (int i = 0; i < n; i++)
        sum[i] = x[i] = ldexpf(test_normal(5, (uint64_t)i), i / hidden * 3), y[i] = test_normal(6, (uint64_t)i);
    for (int i = 0; i < hidden; i++)
        weight[i] = 1.0f + test_uniform(3, (uint64_t)i);
    memset(out, 0xee, (size_t)n * 4), memset(expected, 0xee, (size_t)n * 4);
    cpu_add(&(struct add_args){n_rows, &live, hidden, sum, y});
    cpu_rmsnorm(&(struct rmsnorm_args){n_rows, &live, NULL, sum, weight, 1e-5f, hidden, expected});
    cpu_add_rmsnorm(&(struct add_rmsnorm_args){n_rows, &live, x, y, weight, 1e-5f, hidden, out});
    CHECK(memcmp(x, sum, (size_t)n * 4) == 0, "hidden %d, %d rows: another sum", hidden, n_rows);
    CHECK(memcmp(out, expected, (size_t)n * 4) == 0, "hidden %d, %d rows: another norm", hidden, n_rows);
    free(x), free(y), free(out), free(weight), free(sum), free(expected);
}

/* What RMSNorm multiplies a head of d values with, but for the weights. */
static double head_factor(const float *head, int d, double eps) {
    double sum = 0;
    for (int i = 0; i < d; i++)
        sum += (double)head[i] * (double)head[i];
    return 1 / sqrt(sum / d + eps);
}

static void check_rope(int d, enum dtype dtype, bool q_normed, bool k_normed) {
    enum { HEADS = 3, KV_HEADS = 2, ROWS = 4, WIDTH = (HEADS + 2 * KV_HEADS) * KV_MAX_HEAD_DIM };
    int32_t positions[ROWS] = {0, 1, 127, 1048575};
    float inv_freq[KV_MAX_HEAD_DIM / 2], norms[2][KV_MAX_HEAD_DIM], eps = 1e-3f;
    float qkv[ROWS * WIDTH], q[ROWS * WIDTH], k[ROWS * WIDTH], v[ROWS * WIDTH], wide[WIDTH];
    int width = (HEADS + 2 * KV_HEADS) * d;
    double unit = dtype == DTYPE_F32 ? U : dtype == DTYPE_F16 ? 0x1p-11 : 0x1p-8; /* half a unit in the last place */
    for (int i = 0; i < d / 2; i++)
        inv_freq[i] = 1.0f / powf(10000.0f, 2.0f * (float)i / (float)d);
    for (int i = 0; i < ROWS * width; i++)
        qkv[i] = ldexpf(test_normal(7, (uint64_t)i), i / d % 5 * 3 - 6); /* heads of other sizes: one normed as another shows */
    for (int i = 0; i < 2 * KV_MAX_HEAD_DIM; i++)
        norms[i / KV_MAX_HEAD_DIM][i % KV_MAX_HEAD_DIM] = 1 + test_normal(9, (uint64_t)i);
    cpu_rope(&(struct rope_args){.n_rows = ROWS, .qkv = qkv, .positions = positions, .inv_freq = inv_freq,
                                 .q_norm = q_normed ? norms[0] : NULL, .k_norm = k_normed ? norms[1] : NULL, .norm_eps = eps,
                                 .n_heads = HEADS, .n_kv_heads = KV_HEADS, .head_dim = d, .dtype = dtype, .q = q, .k = k, .v = v});
    for (int row = 0; row < ROWS; row++) {
        const uint8_t *outs[3] = {(uint8_t *)q + dtype_bytes(dtype, row * HEADS * d), (uint8_t *)k + dtype_bytes(dtype, row * KV_HEADS * d),
                                  (uint8_t *)v + dtype_bytes(dtype, row * KV_HEADS * d)};
        const float *in = qkv + row * width;
        for (int part = 0; part < 3; part++) {
            int n = (part ? KV_HEADS : HEADS) * d;
            dtype_widen(dtype, outs[part], wide, n);
            for (int i = 0; i < n; i++) {
                int c = i % d, j = c % (d / 2), across = c < d / 2 ? c + d / 2 : c - d / 2;
                bool normed = part == 0 ? q_normed : part == 1 && k_normed;
                const float *head = in + (i - c), *weight = norms[part % 2];
                double factor = normed ? head_factor(head, d, (double)eps) : 1, grade = normed ? 13 : 5;
                double own = factor * (double)head[c] * (normed ? (double)weight[c] : 1);
                double other = factor * (double)head[across] * (normed ? (double)weight[across] : 1);
                double angle = (double)((float)positions[row] * inv_freq[j]);
                double a = own * cos(angle), b = (c < d / 2 ? -other : other) * sin(angle);
                double truth = part == 2 ? own : a + b, bound = part == 2 ? 0.0 : grade * U * (fabs(a) + fabs(b));
                CHECK(fabs((double)wide[i] - truth) <= bound + unit * (fabs(truth) + bound) + 0x1p-25, "%s, d %d, row %d, part %d, %d: %g, truth %g",
                      dtype_name(dtype), d, row, part, i, (double)wide[i], truth);
            }
            in += n;
        }
    }
}

/* Values of a slice are those of the whole, in range, each type rounded from the same float, and nothing lies beside. */
static void check_fill(int64_t n_rows, int64_t n_columns) {
    enum { COLUMNS = 700, ROWS = 40 };
    static float whole[ROWS * COLUMNS], slice[ROWS * COLUMNS + 1];
    static uint16_t half[ROWS * COLUMNS + 1];
    struct fill_random_args args = {.data = whole, .dtype = DTYPE_F32, .n_rows = ROWS, .n_columns = COLUMNS, .stride = COLUMNS, .seed = 7,
                                    .low = -0.5f, .high = 2};
    int64_t n = n_rows * n_columns, row = ROWS - n_rows, column = COLUMNS - n_columns;
    cpu_fill_random(&args);
    double sum = 0;
    for (int i = 0; i < ROWS * COLUMNS; i++) {
        CHECK(whole[i] >= -0.5f && whole[i] <= 2, "value %d is %g", i, (double)whole[i]);
        sum += (double)whole[i];
    }
    CHECK(fabs(sum / (ROWS * COLUMNS) - 0.75) < 5 * 2.5 / sqrt(12.0 * ROWS * COLUMNS), "mean %g", sum / (ROWS * COLUMNS));
    slice[n] = 99;
    half[n] = 0x7777;
    args = (struct fill_random_args){.data = slice, .dtype = DTYPE_F32, .n_rows = n_rows, .n_columns = n_columns,
                                     .first = row * COLUMNS + column, .stride = COLUMNS, .seed = 7, .low = -0.5f, .high = 2};
    cpu_fill_random(&args);
    args.data = half;
    args.dtype = DTYPE_BF16;
    cpu_fill_random(&args);
    for (int64_t i = 0; i < n; i++) {
        float expected = whole[(row + i / n_columns) * COLUMNS + column + i % n_columns];
        CHECK(slice[i] == expected && half[i] == dtype_to_bf16(expected), "value %lld is %g, expected %g", (long long)i, (double)slice[i],
              (double)expected);
    }
    CHECK(slice[n] == 99 && half[n] == 0x7777, "written beyond %lld rows of %lld", (long long)n_rows, (long long)n_columns);
}

int main(void) {
    static const int sizes[] = {1, 3, 15, 16, 17, 64, 576, 1001, 8192};
    check_exp();
    check_simd();
    check_step_begin();
    check_embed();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int rows = 0; rows <= 7; rows += rows + 1) {
            check_rmsnorm(sizes[i], rows, i % 2);
            check_silu_mul(sizes[i], rows + 1);
            check_add(rows + 1, sizes[i]);
            check_add_rmsnorm(rows + 1, sizes[i]);
        }
    check_fill(0, 5);
    check_fill(1, 1);
    check_fill(3, 255);
    check_fill(40, 257);
    check_fill(40, 700);
    for (int d = 64; d <= 128; d += 64) {
        for (int norms = 0; norms < 4; norms++) { /* of none, of q, of k, of both */
            check_rope(d, DTYPE_F32, norms & 1, norms & 2);
            check_rope(d, DTYPE_F16, norms & 1, norms & 2);
            check_rope(d, DTYPE_BF16, norms & 1, norms & 2);
        }
    }
    return test_report();
}
