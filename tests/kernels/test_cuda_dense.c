/* The small dense operations on a GPU against the CPU's: step input, embedding, norm, activation, sum, RoPE, and prefill's rows.
 *
 * Grades. Copies, widenings and single sums are exact; add_rmsnorm has the bits of the GPU's own add and rmsnorm. The others, with u = 2^-24 and the CPU's result as the measure:
 *  - rmsnorm: sums in double differ in their last bits only, so the two means are the same float or neighbours (2 u). Adding eps rounds
 *    once on each side (4 u), the root halves that and rounds (4 u), the inverse rounds (6 u), two products round (10 u). 11 u allowed.
 *  - silu_mul: both exponentials within 2 units in the last place (4 u); sum, quotient and product round: 7 u a side, 14 u. Where the
 *    exponential overflows (gate below -88) a side may have 0 for up to 89 e^-88 |up| < 1e-36 |up|.
 *  - rope is held against double precision, as a test of rounding that is off by one unit would not see truncation: cos and sin within 2
 *    units (4 u), two products and a sum (2 u): 6 u of the absolute terms, then half a unit of the window's type. Heads that are
 *    normalized first, with sums in double: mean and eps round (2 u, half of that after the root), the root, its inverse and two products
 *    (5 u): 8 u more allowed.
 * Rows that do not count, and what lies beside the rows, are NaN or numbers that no row has, and must stay untouched. */
#include "cuda_rig.h"

#define U 0x1p-24

enum { SPREAD = 6 }; /* rows differ by this many octaves, so that a row taken for another shows */

static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

static void *make_host(size_t bytes) {
    void *host = malloc(bytes + 1);
    if (!host)
        exit(1);
    return host;
}

/* [rows][width] normals; rows from `live` on are NaN. */
static float *make_rows(uint64_t seed, int64_t rows, int64_t live, int64_t width) {
    float *x = make_host((size_t)(rows * width) * sizeof *x);
    for (int64_t i = 0; i < rows * width; i++)
        x[i] = i / width < live ? ldexpf(test_normal(seed, (uint64_t)i), (int)(i / width % 3) * SPREAD - SPREAD) : NAN;
    return x;
}

static struct twin twin_of_rows(struct rig *rig, uint64_t seed, int64_t rows, int64_t live, int64_t width) {
    float *x = make_rows(seed, rows, live, width);
    struct twin twin = rig_make(rig, (size_t)(rows * width) * sizeof *x, x);
    free(x);
    return twin;
}

static struct twin twin_of_live(struct rig *rig, int32_t live) { return rig_make(rig, sizeof live, &live); }

/* ---- step_begin ------------------------------------------------------------------------------------------------------- */

static void check_step_begin(struct rig *rig, int n_rows, int live) {
    static struct step_input in;
    enum { SLOTS = 7 };
    int32_t last[SLOTS];
    memset(&in, 0x7f, sizeof in); /* rows beyond: slots that do not exist */
    in.n_rows = live;
    for (int i = 0; i < SLOTS; i++)
        last[i] = 1000 + i;
    for (int i = 0; i < live; i++) {
        uint64_t h = test_hash(1, (uint64_t)i);
        in.row[i] =
            (struct step_row){(int)(h % (SLOTS + 1)) - 1, h >> 8 & 1 ? -1 : (int32_t)(h >> 16 & 0xffff), (int32_t)(h >> 32 & 0xfffff), i};
    }
    struct twin input = rig_make(rig, sizeof in, &in), slots = rig_make(rig, sizeof last, last);
    struct twin tokens = rig_make(rig, (size_t)n_rows * 4, NULL), positions = rig_make(rig, (size_t)n_rows * 4, NULL);
    for (int side = 0; side < RIG_SIDES; side++)
        REQUIRE(op_step_begin(rig->stream[side],
                              &(struct step_begin_args){input.at[side], n_rows, slots.at[side], tokens.at[side], positions.at[side]}));
    char what[80];
    snprintf(what, sizeof what, "step_begin, %d rows, %d live", n_rows, live);
    rig_expect_equal(rig, &tokens, what);
    rig_expect_equal(rig, &positions, what);
    rig_drop(rig, 0);
}

/* ---- embed -------------------------------------------------------------------------------------------------------------- */

/* `skew`: the table begins that many values into its buffer, so that rows do not stand on 16 bytes. */
static void check_embed(struct rig *rig, enum dtype dtype, int hidden, int n_rows, int live, int skew) {
    enum { BEGIN = 10, COUNT = 5 };
    size_t n = (size_t)(COUNT * hidden + skew);
    float *wide = make_host(n * sizeof *wide);
    uint8_t *table = make_host(n * sizeof *wide);
    int32_t *tokens = make_host((size_t)n_rows * sizeof *tokens);
    for (size_t i = 0; i < n; i++)
        wide[i] = test_normal(2, i);
    dtype_narrow(dtype, wide, table, (int64_t)n);
    for (int i = 0; i < n_rows; i++) /* -1, below, inside, at the end, beyond; dead rows: beyond the end of anything */
        tokens[i] = i < live ? (int32_t)(test_hash(3, (uint64_t)i) % 9) + BEGIN - 2 : 0x7f7f7f7f;
    if (live > 1)
        tokens[1] = -1;
    struct twin rows = rig_make(rig, dtype_bytes(dtype, (int64_t)n), table), ids = rig_make(rig, (size_t)n_rows * 4, tokens);
    struct twin x = rig_make(rig, (size_t)(n_rows * hidden) * 4, NULL), count = twin_of_live(rig, live);
    for (int side = 0; side < RIG_SIDES; side++)
        REQUIRE(op_embed(rig->stream[side], &(struct embed_args){.n_rows = n_rows,
                                                                 .live = count.at[side],
                                                                 .tokens = ids.at[side],
                                                                 .table = (char *)rows.at[side] + dtype_bytes(dtype, skew),
                                                                 .dtype = dtype,
                                                                 .vocab_begin = BEGIN,
                                                                 .vocab_count = COUNT,
                                                                 .hidden = hidden,
                                                                 .x = x.at[side]}));
    char what[100];
    snprintf(what, sizeof what, "embed %s, hidden %d, %d rows, %d live, skew %d", dtype_name(dtype), hidden, n_rows, live, skew);
    rig_expect_equal(rig, &x, what);
    rig_drop(rig, 0);
    free(wide), free(table), free(tokens);
}

/* ---- rmsnorm ------------------------------------------------------------------------------------------------------------ */

static int again_rmsnorm(struct stream *stream, const void *args) { return op_rmsnorm(stream, args); }

static double norm_bound(int64_t i, void *context) {
    const float *cpu = context;
    return 11 * U * fabs((double)cpu[i]) + 0x1p-149;
}

/* `skew`: x begins that many floats into its buffer. With `pick` rows are taken from behind, and entries beyond live name none. */
static void check_rmsnorm(struct rig *rig, int hidden, int n_rows, int live, bool pick, int skew) {
    int64_t x_rows = pick ? n_rows + 2 : n_rows;
    struct step_logit *picks = make_host((size_t)n_rows * sizeof *picks);
    memset(picks, 0x7f, (size_t)n_rows * sizeof *picks);
    for (int i = 0; i < live; i++)
        picks[i].row = (int32_t)(x_rows - 1 - i);
    float *x = make_rows(4, x_rows + 1, pick ? x_rows + 1 : live, hidden); /* one row more, for the skew */
    struct twin in = rig_make(rig, (size_t)((x_rows + 1) * hidden + skew) * 4, NULL),
                chosen = rig_make(rig, (size_t)n_rows * sizeof *picks, picks);
    for (int side = 0; side < RIG_SIDES; side++)
        rig_send(rig, side, (float *)in.at[side] + skew, x, (size_t)(x_rows * hidden) * 4);
    struct twin weight = twin_of_rows(rig, 5, 1, 1, hidden), out = rig_make(rig, (size_t)(n_rows * hidden) * 4, NULL),
                count = twin_of_live(rig, live);
    struct rmsnorm_args args;
    for (int side = 0; side < RIG_SIDES; side++) {
        args = (struct rmsnorm_args){.n_rows = n_rows,
                                     .live = count.at[side],
                                     .pick = pick ? chosen.at[side] : NULL,
                                     .x = (float *)in.at[side] + skew,
                                     .weight = weight.at[side],
                                     .eps = 1e-5f,
                                     .hidden = hidden,
                                     .out = out.at[side]};
        REQUIRE(op_rmsnorm(rig->stream[side], &args));
    }
    char what[100];
    snprintf(what, sizeof what, "rmsnorm, hidden %d, %d rows, %d live, pick %d, skew %d", hidden, n_rows, live, pick, skew);
    float *cpu = rig_fetch(rig, RIG_CPU, out.at[RIG_CPU], out.bytes);
    rig_expect_close(rig, &out, (int64_t)n_rows * hidden, norm_bound, cpu, what);
    rig_expect_repeat(rig, &out, again_rmsnorm, &args, what);
    rig_drop(rig, 0);
    free(cpu), free(x), free(picks);
}

/* out may be x. */
static void check_rmsnorm_in_place(struct rig *rig, int hidden, int n_rows) {
    struct twin x = twin_of_rows(rig, 6, n_rows, n_rows, hidden), weight = twin_of_rows(rig, 5, 1, 1, hidden);
    for (int side = 0; side < RIG_SIDES; side++)
        REQUIRE(op_rmsnorm(
            rig->stream[side],
            &(struct rmsnorm_args){
                .n_rows = n_rows, .x = x.at[side], .weight = weight.at[side], .eps = 1e-6f, .hidden = hidden, .out = x.at[side]}));
    float *cpu = rig_fetch(rig, RIG_CPU, x.at[RIG_CPU], x.bytes);
    char what[80];
    snprintf(what, sizeof what, "rmsnorm in place, hidden %d", hidden);
    rig_expect_close(rig, &x, (int64_t)n_rows * hidden, norm_bound, cpu, what);
    rig_drop(rig, 0);
    free(cpu);
}

/* Twice, so that the second works on the sum that the first left: the bits of add and rmsnorm, in x and in out; the sum is the CPU's too.
 * `skew`: y begins that many floats into its buffer. */
static void check_add_rmsnorm(struct rig *rig, int hidden, int n_rows, int live, bool skew) {
    struct twin x = twin_of_rows(rig, 15, n_rows, live, hidden), sum = twin_of_rows(rig, 15, n_rows, live, hidden);
    struct twin y = twin_of_rows(rig, 16, n_rows + 1, n_rows + 1, hidden), weight = twin_of_rows(rig, 5, 1, 1, hidden);
    struct twin out = rig_make(rig, x.bytes, NULL), expected = rig_make(rig, x.bytes, NULL), count = twin_of_live(rig, live);
    for (int side = 0; side < RIG_SIDES; side++)
        for (int i = 0; i < 2; i++) {
            float *from = (float *)y.at[side] + skew;
            REQUIRE(op_add(rig->stream[side], &(struct add_args){n_rows, count.at[side], hidden, sum.at[side], from}));
            REQUIRE(op_rmsnorm(rig->stream[side], &(struct rmsnorm_args){n_rows, count.at[side], NULL, sum.at[side], weight.at[side], 1e-5f,
                                                                         hidden, expected.at[side]}));
            REQUIRE(op_add_rmsnorm(rig->stream[side], &(struct add_rmsnorm_args){n_rows, count.at[side], x.at[side], from,
                                                                                 weight.at[side], 1e-5f, hidden, out.at[side]}));
        }
    char what[100];
    snprintf(what, sizeof what, "add_rmsnorm, hidden %d, %d rows, %d live, skew %d", hidden, n_rows, live, skew);
    rig_expect_equal(rig, &x, what);
    for (int side = 0; side < RIG_SIDES; side++) {
        void *got = rig_fetch(rig, side, out.at[side], out.bytes), *want = rig_fetch(rig, side, expected.at[side], out.bytes);
        CHECK(memcmp(got, want, out.bytes) == 0, "%s: not the norm of %s", what, side ? "cuda" : "cpu");
        free(got), free(want);
    }
    rig_drop(rig, 0);
}

/* ---- silu_mul and add --------------------------------------------------------------------------------------------------- */

static int again_silu_mul(struct stream *stream, const void *args) { return op_silu_mul(stream, args); }

struct silu_context {
    const float *gate_up, *cpu;
    int64_t n;
};

static double silu_bound(int64_t i, void *context) {
    const struct silu_context *c = context;
    double up = fabs((double)c->gate_up[i / c->n * 2 * c->n + c->n + i % c->n]);
    return 14 * U * fabs((double)c->cpu[i]) + 1e-36 * up + 0x1p-149;
}

static void check_silu_mul(struct rig *rig, int n, int n_rows, int live) {
    static const float special[] = {-200.0f, 0.0f, -0.0f, 200.0f, -88.5f, -89.5f, -104.0f, 88.5f, 1e-30f, -1e30f};
    enum { N_SPECIAL = sizeof special / sizeof *special };
    float *x = make_rows(7, n_rows, live, 2 * n);
    for (int i = 0; i < live * n; i++) { /* gates of a few units, every ninth far out */
        float *gate = &x[i / n * 2 * n + i % n];
        *gate = i % 9 ? 5.0f * test_normal(8, (uint64_t)i) : special[i / 9 % N_SPECIAL];
    }
    struct twin in = rig_make(rig, (size_t)(2 * n * n_rows) * 4, x), out = rig_make(rig, (size_t)(n * n_rows) * 4, NULL),
                count = twin_of_live(rig, live);
    struct silu_mul_args args;
    for (int side = 0; side < RIG_SIDES; side++) {
        args = (struct silu_mul_args){n_rows, count.at[side], in.at[side], n, out.at[side]};
        REQUIRE(op_silu_mul(rig->stream[side], &args));
    }
    float *cpu = rig_fetch(rig, RIG_CPU, out.at[RIG_CPU], out.bytes);
    char what[80];
    snprintf(what, sizeof what, "silu_mul, n %d, %d rows, %d live", n, n_rows, live);
    rig_expect_close(rig, &out, (int64_t)n_rows * n, silu_bound, &(struct silu_context){x, cpu, n}, what);
    rig_expect_repeat(rig, &out, again_silu_mul, &args, what);
    rig_drop(rig, 0);
    free(cpu), free(x);
}

static void check_add(struct rig *rig, int hidden, int n_rows, int live, bool skew) {
    struct twin x = twin_of_rows(rig, 9, n_rows, n_rows, hidden), y = twin_of_rows(rig, 10, n_rows + 1, n_rows + 1, hidden),
                count = twin_of_live(rig, live);
    for (int side = 0; side < RIG_SIDES; side++)
        for (int i = 0; i < 2; i++) /* the second on what the first left */
            REQUIRE(op_add(rig->stream[side], &(struct add_args){n_rows, count.at[side], hidden, x.at[side], (float *)y.at[side] + skew}));
    char what[80];
    snprintf(what, sizeof what, "add, hidden %d, %d rows, %d live, skew %d", hidden, n_rows, live, skew);
    rig_expect_equal(rig, &x, what);
    rig_drop(rig, 0);
}

/* ---- rope --------------------------------------------------------------------------------------------------------------- */

struct rope_case {
    int n_heads, n_kv_heads, d, n_rows, live;
    enum dtype dtype;
    bool q_normed, k_normed;
};
static const float rope_eps = 1e-3f;

static int32_t rope_position(int row) {
    static const int32_t edges[] = {0, 1, 127, 1048575, 105615, 105616, 2000000}; /* 105615: where sinf changes its way to reduce */
    enum { N_EDGES = sizeof edges / sizeof *edges };
    return row < N_EDGES ? edges[row] : (int32_t)(test_hash(11, (uint64_t)row) % 4000000);
}

/* The RMSNorm of one head, in double; its values where there are no weights. */
static void normalize(const float *x, const float *weight, int d, double *out) {
    double sum = 0;
    for (int i = 0; i < d; i++)
        sum += (double)x[i] * (double)x[i];
    double factor = 1 / sqrt(sum / d + (double)rope_eps);
    for (int i = 0; i < d; i++)
        out[i] = weight ? (double)weight[i] * (double)x[i] * factor : (double)x[i];
}

/* One head of one row against double precision: `values` and `out` hold d values. */
static void check_turned(const struct rope_case *c, const float *values, const float *weight, const uint8_t *out, int row,
                         const float *inv_freq, const char *part, int head) {
    double unit = c->dtype == DTYPE_F16 ? 0x1p-11 : 0x1p-8;   /* half a unit in the last place */
    double tiny = c->dtype == DTYPE_F16 ? 0x1p-25 : 0x1p-134; /* half of the smallest number */
    double x[KV_MAX_HEAD_DIM], grade = weight ? 14 : 6;
    float wide[KV_MAX_HEAD_DIM];
    dtype_widen(c->dtype, out, wide, c->d);
    normalize(values, weight, c->d, x);
    for (int i = 0; i < c->d; i++) {
        int half = c->d / 2, pair = i % half;
        float angle = (float)rope_position(row) * inv_freq[pair];
        double other = i < half ? -x[i + half] : x[i - half];
        double a = x[i] * cos((double)angle), b = other * sin((double)angle), bound = grade * U * (fabs(a) + fabs(b));
        CHECK(fabs((double)wide[i] - (a + b)) <= bound + unit * (fabs(a + b) + bound) + tiny,
              "rope %s, %d+%d heads of %d, %d rows: row %d (position %d), %s head %d, channel %d: %.9g, truth %.9g", dtype_name(c->dtype),
              c->n_heads, c->n_kv_heads, c->d, c->n_rows, row, rope_position(row), part, head, i, (double)wide[i], a + b);
    }
}

static int again_rope(struct stream *stream, const void *args) { return op_rope(stream, args); }

/* q or k of the GPU: live rows near the truth, those at position 0 the CPU's bits unless heads are normalized, the rest untouched. */
static void check_heads(struct rig *rig, const struct rope_case *c, const struct twin *twin, int n, int first, const float *qkv,
                        const float *weight, const float *inv_freq, const char *part) {
    uint8_t *cuda = rig_fetch(rig, RIG_CUDA, twin->at[RIG_CUDA], twin->bytes),
            *cpu = rig_fetch(rig, RIG_CPU, twin->at[RIG_CPU], twin->bytes);
    size_t head_bytes = dtype_bytes(c->dtype, c->d), row_bytes = (size_t)n * head_bytes;
    int all = c->n_heads + 2 * c->n_kv_heads;
    for (int row = 0; row < c->live; row++)
        for (int h = 0; h < n; h++)
            check_turned(c, qkv + ((int64_t)row * all + first + h) * c->d, weight, cuda + (size_t)row * row_bytes + (size_t)h * head_bytes,
                         row, inv_freq, part, h);
    if (c->live > 0 && !weight)
        CHECK(memcmp(cuda, cpu, row_bytes) == 0, "rope, %s of row 0 at position 0 is not the CPU's", part);
    for (size_t i = (size_t)c->live * row_bytes; i < twin->bytes; i++)
        if (cuda[i] != 0xff) {
            CHECK(false, "rope, %s: a dead row was written at byte %zu, %d rows of %zu bytes live", part, i, c->live, row_bytes);
            break;
        }
    free(cuda), free(cpu);
}

static void check_rope(struct rig *rig, struct rope_case c) {
    int64_t width = (int64_t)(c.n_heads + 2 * c.n_kv_heads) * c.d;
    float inv_freq[KV_MAX_HEAD_DIM / 2], norms[2][KV_MAX_HEAD_DIM], *qkv = make_host((size_t)(c.n_rows * width) * 4);
    int32_t *positions = make_host((size_t)c.n_rows * 4);
    for (int i = 0; i < c.d / 2; i++)
        inv_freq[i] = 1.0f / powf(500000.0f, 2.0f * (float)i / (float)c.d);
    for (int64_t i = 0; i < c.n_rows * width; i++)
        qkv[i] = i / width < c.live ? ldexpf(test_normal(12, (uint64_t)i), i % 101 ? (int)(i / c.d % 3) * SPREAD - SPREAD : -20) : NAN;
    for (int i = 0; i < 2 * KV_MAX_HEAD_DIM; i++)
        norms[i / KV_MAX_HEAD_DIM][i % KV_MAX_HEAD_DIM] = 1 + test_normal(13, (uint64_t)i);
    for (int i = 0; i < c.n_rows; i++)
        positions[i] = i < c.live ? rope_position(i) : -1;
    struct twin in = rig_make(rig, (size_t)(c.n_rows * width) * 4, qkv), at = rig_make(rig, (size_t)c.n_rows * 4, positions);
    struct twin turns = rig_make(rig, (size_t)(c.d / 2) * 4, inv_freq), count = twin_of_live(rig, c.live);
    struct twin q_norm = rig_make(rig, (size_t)c.d * 4, norms[0]), k_norm = rig_make(rig, (size_t)c.d * 4, norms[1]);
    size_t q_bytes = dtype_bytes(c.dtype, (int64_t)c.n_rows * c.n_heads * c.d),
           kv_bytes = dtype_bytes(c.dtype, (int64_t)c.n_rows * c.n_kv_heads * c.d);
    struct twin q = rig_make(rig, q_bytes, NULL), k = rig_make(rig, kv_bytes, NULL), v = rig_make(rig, kv_bytes, NULL);
    struct rope_args args;
    for (int side = 0; side < RIG_SIDES; side++) {
        args = (struct rope_args){.n_rows = c.n_rows,
                                  .live = count.at[side],
                                  .qkv = in.at[side],
                                  .positions = at.at[side],
                                  .inv_freq = turns.at[side],
                                  .q_norm = c.q_normed ? q_norm.at[side] : NULL,
                                  .k_norm = c.k_normed ? k_norm.at[side] : NULL,
                                  .norm_eps = rope_eps,
                                  .n_heads = c.n_heads,
                                  .n_kv_heads = c.n_kv_heads,
                                  .head_dim = c.d,
                                  .dtype = c.dtype,
                                  .q = q.at[side],
                                  .k = k.at[side],
                                  .v = v.at[side]};
        REQUIRE(op_rope(rig->stream[side], &args));
    }
    check_heads(rig, &c, &q, c.n_heads, 0, qkv, c.q_normed ? norms[0] : NULL, inv_freq, "q");
    check_heads(rig, &c, &k, c.n_kv_heads, c.n_heads, qkv, c.k_normed ? norms[1] : NULL, inv_freq, "k");
    rig_expect_equal(rig, &v, "rope, v");
    rig_expect_repeat(rig, &q, again_rope, &args, "rope, q");
    rig_drop(rig, 0);
    free(qkv), free(positions);
}

/* ---- rows_pick and rows_put ----------------------------------------------------------------------------------------------- */

/* Every rank of cp and some windows of a prompt of n tokens. */
static void check_rows(struct rig *rig, int cp, int64_t n, int64_t width) {
    int64_t chunk = ceil_div(n, 2 * cp);
    struct twin own = twin_of_rows(rig, 13, 2 * chunk, 2 * chunk, width), ordered = twin_of_rows(rig, 14, n, n, width);
    struct twin to_ordered = rig_make(rig, (size_t)(n * width) * 4, NULL), to_own = rig_make(rig, (size_t)(2 * chunk * width) * 4, NULL);
    const int64_t windows[][2] = {{0, n}, {n - 1, 1}, {n / 3, n / 2}, {n / 2, 0}, {chunk / 2, min_i64(chunk + 1, n - chunk / 2)}};
    for (int rank = 0; rank < cp; rank++)
        for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
            int64_t first = windows[w][0], count = windows[w][1];
            rig_poison(rig, &to_ordered);
            rig_poison(rig, &to_own);
            for (int side = 0; side < RIG_SIDES; side++) {
                struct rows_pick_args pick = {own.at[side], rank, cp, chunk, first, count, width, to_ordered.at[side]};
                struct rows_put_args put = {ordered.at[side], rank, cp, chunk, first, count, width, to_own.at[side]};
                REQUIRE(op_rows_pick(rig->stream[side], &pick));
                REQUIRE(op_rows_put(rig->stream[side], &put));
            }
            char what[140];
            snprintf(what, sizeof what, "rows_pick, rank %d of %d, chunk %lld, rows %lld + %lld of width %lld", rank, cp, (long long)chunk,
                     (long long)first, (long long)count, (long long)width);
            rig_expect_equal(rig, &to_ordered, what);
            memcpy(what + 5, "put,", 4);
            rig_expect_equal(rig, &to_own, what);
        }
    rig_drop(rig, 0);
}

/* ---- fill_random ---------------------------------------------------------------------------------------------------------- */

static int again_fill(struct stream *stream, const void *args) { return op_fill_random(stream, args); }

static void check_fill(struct rig *rig, enum dtype dtype, int64_t n_rows, int64_t n_columns, float low, float high) {
    struct twin data = rig_make(rig, dtype_bytes(dtype, n_rows * n_columns), NULL);
    struct fill_random_args args;
    for (int side = 0; side < RIG_SIDES; side++) {
        args = (struct fill_random_args){.data = data.at[side], .dtype = dtype, .n_rows = n_rows, .n_columns = n_columns,
                                         .first = 3 + ((int64_t)1 << 40), .stride = (int64_t)1 << 32, .seed = 0xfedcba9876543210u, .low = low,
                                         .high = high};
        REQUIRE(op_fill_random(rig->stream[side], &args));
    }
    char what[100];
    snprintf(what, sizeof what, "fill_random %s, %lld rows of %lld, %g to %g", dtype_name(dtype), (long long)n_rows, (long long)n_columns,
             (double)low, (double)high);
    rig_expect_equal(rig, &data, what);
    rig_expect_repeat(rig, &data, again_fill, &args, what);
    rig_drop(rig, 0);
}

/* What a GPU cannot do is said before anything is launched; the words name it. */
static void check_refusals(struct rig *rig) {
    struct twin memory = rig_make(rig, 4096, NULL);
    void *at = memory.at[RIG_CUDA];
    struct rope_args rope = {.n_rows = 1, .qkv = at, .positions = at, .inv_freq = at, .n_heads = 1, .n_kv_heads = 1, .head_dim = 128,
                             .dtype = DTYPE_F32, .q = at, .k = at, .v = at};
    struct stream *stream;
    REQUIRE(stream_open(rig->backend[RIG_CUDA], &stream)); /* its own: a failure is kept */
    CHECK_FAILS(op_rope(stream, &rope), STATUS_USAGE, "F32");
    stream_close(stream);
    rope.dtype = DTYPE_F16, rope.head_dim = 96;
    REQUIRE(stream_open(rig->backend[RIG_CUDA], &stream));
    CHECK_FAILS(op_rope(stream, &rope), STATUS_USAGE, "head_dim 96");
    stream_close(stream);
    rig_drop(rig, 0);
}

int main(void) {
    static struct rig rig;
    static const int widths[] = {1, 3, 4, 31, 64, 65, 512, 516, 576, 1001, 2048, 4096, 5120, 8192, 16384, 16388, 20001};
    static const int rows[] = {0, 1, 2, 5};
    rig_open(&rig);
    for (int n = 0; n <= STEP_MAX_ROWS; n += n < 3 ? 1 : n == 3 ? 252 : 1)
        for (int live = 0; live <= n; live += n > 3 ? 127 : 1)
            check_step_begin(&rig, n, live);
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            int n = rows[r], live = n > 1 ? n - 1 : n;
            check_embed(&rig, dtypes[w % N_DTYPES], widths[w], n, live, 0);
            check_rmsnorm(&rig, widths[w], n, live, r % 2, 0);
            check_silu_mul(&rig, widths[w], n, live);
            check_add(&rig, widths[w], n, live, false);
            check_add_rmsnorm(&rig, widths[w], n, live, false);
        }
        check_rmsnorm_in_place(&rig, widths[w], 3);
    }
    for (int t = 0; t < N_DTYPES; t++) {
        check_embed(&rig, dtypes[t], 576, 4, 4, 0);
        check_embed(&rig, dtypes[t], 576, 4, 3, 1);
        check_embed(&rig, dtypes[t], 37, 6, 5, 2);
    }
    check_rmsnorm(&rig, 576, 4, 3, true, 1);
    check_rmsnorm(&rig, 4096, 256, 200, false, 0);
    check_add(&rig, 576, 3, 2, true);
    check_add(&rig, 4096, 256, 200, false);
    check_add_rmsnorm(&rig, 576, 3, 2, true);
    check_add_rmsnorm(&rig, 4096, 256, 200, false);
    check_silu_mul(&rig, 1536, 256, 200);
    for (int i = 0; i < 2 * 4; i++) { /* norms of none, of q, of k, of both */
        enum dtype type = dtypes[1 + i % 2];
        bool of_q = i / 2 & 1, of_k = i / 2 & 2;
        check_rope(&rig, (struct rope_case){3, 2, 64, 0, 0, type, of_q, of_k});
        check_rope(&rig, (struct rope_case){3, 2, 64, 9, 8, type, of_q, of_k});
        check_rope(&rig, (struct rope_case){32, 8, 128, 8, 7, type, of_q, of_k});
        check_rope(&rig, (struct rope_case){14, 2, 64, 1, 1, type, of_q, of_k});
        check_rope(&rig, (struct rope_case){12, 2, 128, 1, 0, type, of_q, of_k});
        /* more than 4 rows for each of 160 multiprocessors: one block a row */
        check_rope(&rig, (struct rope_case){5, 1, 128, 900, 899, type, of_q, of_k});
        check_rope(&rig, (struct rope_case){12, 3, 64, 900, 900, type, of_q, of_k});
    }
    for (int cp = 1; cp <= 4; cp++)
        for (int64_t n = 1; n <= 21; n += n < 4 ? 1 : 8)
            for (int64_t width = 1; width <= 9; width += 1 + width % 2 * 2)
                check_rows(&rig, cp, n, width);
    check_rows(&rig, 3, 1000, 1028); /* two slices of float4 */
    check_rows(&rig, 2, 301, 577);   /* three of float */
    for (int t = 0; t < N_DTYPES; t++) {
        check_fill(&rig, dtypes[t], 0, 7, -1, 1);
        check_fill(&rig, dtypes[t], 1, 1, -1, 1);
        check_fill(&rig, dtypes[t], 3, 255, -0.035f, 0.035f);
        check_fill(&rig, dtypes[t], 2, 257, 0.9f, 1.1f);
        check_fill(&rig, dtypes[t], 5000, 64, -1.732f, 1.732f); /* more rows than blocks */
        check_fill(&rig, dtypes[t], 1, 100001, 0, 1);
    }
    check_refusals(&rig);
    rig_close(&rig);
    return test_report();
}
