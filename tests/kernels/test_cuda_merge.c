/* Combining partial results on a GPU against the CPU, for 1 to 64 ranks, with and without a correction.
 *
 * Grades. Maxima, (m, l, C_d) and quotients of floats are exact. So is everything on one rank, and on several with equal maxima:
 * all weights are e^0 = 1, and sums go in rank order in double on both sides. Otherwise a weight is a double exponential rounded to
 * float: the two libraries' doubles differ in the last bits, so the floats are the same or neighbours, 2 u apart (u = 2^-24). With
 * A = sum of w |y| + |c_n| and D = sum of w l + c_d, all of whose terms are positive:
 *  - rescale, in float: 2 u A from the weight, 2 u A from two products, 2 u A from two sums: 6 u A;
 *  - scale and gather: 2 u A / D from the numerator, 2 u A / D from the denominator, 2 u A / D from rounding twice: 6 u A / D.
 * 7 u allowed, and 1e-40 for weights too small for a normal float. Rows that do not count hold NaN and must stay untouched. */
#include "cuda_rig.h"

#define U 0x1p-24

struct merge_case {
    int d, n_heads, n_rows, live, n_ranks;
    bool correction;
    bool equal; /* all maxima are the same */
};

struct inputs {
    struct merge_case c;
    int stride, n;       /* floats of a record; entries: n_rows * n_heads */
    float *partial;      /* [n_ranks][n][stride] */
    float *max, *stats;  /* [n] global maxima; [n_ranks][n][3] */
    double *denominator; /* [n] */
};

static char label[120];

static void *make_host(size_t bytes) {
    void *host = malloc(bytes + 1);
    if (!host)
        exit(1);
    return host;
}

/* The record of `rank` for entry i; every third is without a token, and those of the second live row are padding on all ranks. */
static void fill_record(const struct inputs *in, int rank, int i, float *record, float *stats) {
    const struct merge_case *c = &in->c;
    float *tail = record + partial_tail(c->d, c->correction);
    uint64_t id = (uint64_t)(rank * in->n + i);
    bool dead = i >= c->live * c->n_heads, padding = i / c->n_heads == 1, empty = padding || (!c->equal && test_hash(1, id) % 3 == 0);
    for (int k = 0; k < in->stride; k++)
        record[k] = NAN; /* also what nobody may use: the last of the tail, and C_d without a correction */
    if (!dead) {
        for (int k = 0; k < c->d; k++) {
            record[k] = empty ? 0.0f : 10.0f * test_normal(2, id * KV_MAX_HEAD_DIM + (uint64_t)k);
            if (c->correction)
                record[c->d + k] = padding ? 0.0f : test_normal(3, id * KV_MAX_HEAD_DIM + (uint64_t)k);
        }
        tail[0] = empty ? -INFINITY : c->equal ? 2.5f : 30.0f * test_normal(4, id);
        tail[1] = empty ? 0.0f : 1.0f + 100.0f * fabsf(test_normal(5, id));
        if (c->correction)
            tail[2] = padding ? 0.0f : fabsf(test_normal(6, id));
    }
    stats[0] = tail[0];
    stats[1] = tail[1];
    stats[2] = c->correction || dead ? tail[2] : 0.0f;
}

static double weight_of(double m, double max) { return m == -INFINITY ? 0.0 : exp(m - max); }

static struct inputs inputs_make(struct merge_case c) {
    struct inputs in = {.c = c, .stride = partial_stride(c.d, c.correction), .n = c.n_rows * c.n_heads};
    in.partial = make_host((size_t)(c.n_ranks * in.n * in.stride) * sizeof(float));
    in.stats = make_host((size_t)(c.n_ranks * in.n * 3) * sizeof(float));
    in.max = make_host((size_t)in.n * sizeof(float));
    in.denominator = make_host((size_t)in.n * sizeof(double));
    for (int i = 0; i < in.n; i++) {
        in.max[i] = -INFINITY;
        in.denominator[i] = 0.0;
        for (int rank = 0; rank < c.n_ranks; rank++) {
            float *stats = in.stats + (rank * in.n + i) * 3;
            fill_record(&in, rank, i, in.partial + (int64_t)(rank * in.n + i) * in.stride, stats);
            in.max[i] = fmaxf(in.max[i], stats[0]);
        }
        for (int rank = 0; rank < c.n_ranks; rank++) {
            const float *stats = in.stats + (rank * in.n + i) * 3;
            in.denominator[i] += weight_of((double)stats[0], (double)in.max[i]) * (double)stats[1] + (double)stats[2];
        }
    }
    snprintf(label, sizeof label, "d %d, %d heads, %d rows, %d live, %d ranks, correction %d, equal %d", c.d, c.n_heads, c.n_rows, c.live,
             c.n_ranks, c.correction, c.equal);
    return in;
}

static void inputs_free(struct inputs *in) {
    free(in->partial), free(in->stats), free(in->max), free(in->denominator);
}

static const char *named(const char *op) {
    static char text[sizeof label + 30];
    snprintf(text, sizeof text, "%s: %s", op, label);
    return text;
}

/* A of entry i, channel k (k = d: of the denominator's part), over the ranks first .. end-1. */
static double absolute_sum(const struct inputs *in, int first, int end, int64_t i, int k) {
    double sum = 0.0;
    int d = in->c.d;
    for (int rank = first; rank < end; rank++) {
        const float *record = in->partial + (rank * in->n + i) * in->stride, *tail = record + partial_tail(d, in->c.correction);
        double weight = weight_of((double)tail[0], (double)in->max[i]);
        sum += weight * fabs((double)(k < d ? record[k] : tail[1]));
        if (in->c.correction)
            sum += fabs((double)(k < d ? record[d + k] : tail[2]));
    }
    return sum;
}

static double rescale_bound(int64_t i, void *context) {
    const struct inputs *in = context;
    return 7 * U * absolute_sum(in, 0, 1, i / (in->c.d + 1), (int)(i % (in->c.d + 1))) + 1e-40;
}

static double quotient_bound(const struct inputs *in, int first, int end, int64_t i) {
    int64_t entry = i / in->c.d;
    double denominator = in->denominator[entry];
    return denominator > 0.0 ? 7 * U * absolute_sum(in, first, end, entry, (int)(i % in->c.d)) / denominator + 1e-40 : 1e-40;
}

static double scale_bound(int64_t i, void *context) {
    const struct inputs *in = context;
    return quotient_bound(in, in->c.n_ranks - 1, in->c.n_ranks, i); /* the last rank's share is what the test asks for */
}

static double gather_bound(int64_t i, void *context) {
    const struct inputs *in = context;
    return quotient_bound(in, 0, in->c.n_ranks, i);
}

/* Live rows without a token on any rank are 0 on the GPU, whatever the bound says; nothing live is NaN. */
static void expect_sane(struct rig *rig, const struct inputs *in, const struct twin *out, const char *op) {
    float *cuda = rig_fetch(rig, RIG_CUDA, out->at[RIG_CUDA], out->bytes);
    int row = in->c.n_heads * in->c.d, bad = 0, where = 0;
    for (int i = 0; i < in->c.live * row; i++)
        if (cuda[i] != cuda[i] || (i / row == 1 && cuda[i] != 0.0f)) {
            bad++;
            where = i;
        }
    CHECK(bad == 0, "%s: %d values are NaN, or not 0 in padding; entry %d, channel %d: %g", named(op), bad, where / in->c.d,
          where % in->c.d, (double)cuda[where]);
    free(cuda);
}

static bool is_exact(const struct inputs *in) { return in->c.n_ranks == 1 || in->c.equal; }

static int again_rescale(struct stream *stream, const void *args) { return op_merge_rescale(stream, args); }
static int again_scale(struct stream *stream, const void *args) { return op_merge_scale(stream, args); }
static int again_gather(struct stream *stream, const void *args) { return op_merge_gather(stream, args); }

static void check_allreduce(struct rig *rig, const struct inputs *in, const struct twin *partial, const struct twin *live) {
    const struct merge_case *c = &in->c;
    size_t sums_bytes = (size_t)(in->n * (c->d + 1)) * sizeof(float);
    struct twin own_max = rig_make(rig, (size_t)in->n * sizeof(float), NULL), max = rig_make(rig, (size_t)in->n * sizeof(float), in->max);
    struct twin sums = rig_make(rig, sums_bytes, NULL), out = rig_make(rig, (size_t)(in->n * c->d) * sizeof(float), NULL);
    struct merge_rescale_args args;
    for (int side = 0; side < RIG_SIDES; side++) {
        args = (struct merge_rescale_args){c->n_rows,     live->at[side],    c->n_heads,   c->d,
                                           c->correction, partial->at[side], max.at[side], sums.at[side]};
        REQUIRE(op_merge_max(rig->stream[side], &(struct merge_max_args){c->n_rows, live->at[side], c->n_heads, c->d, c->correction,
                                                                         partial->at[side], own_max.at[side]}));
        REQUIRE(op_merge_rescale(rig->stream[side], &args));
    }
    rig_expect_equal(rig, &own_max, named("merge_max"));
    if (is_exact(in))
        rig_expect_equal(rig, &sums, named("merge_rescale"));
    rig_expect_close(rig, &sums, (int64_t)in->n * (c->d + 1), rescale_bound, (void *)(uintptr_t)in, named("merge_rescale"));
    rig_expect_repeat(rig, &sums, again_rescale, &args, named("merge_rescale"));
    float *cpu = rig_fetch(rig, RIG_CPU, sums.at[RIG_CPU], sums_bytes); /* quotients of the same sums on both sides */
    rig_send(rig, RIG_CUDA, sums.at[RIG_CUDA], cpu, sums_bytes);
    for (int side = 0; side < RIG_SIDES; side++)
        REQUIRE(op_merge_divide(rig->stream[side],
                                &(struct merge_divide_args){c->n_rows, live->at[side], c->n_heads, c->d, sums.at[side], out.at[side]}));
    rig_expect_equal(rig, &out, named("merge_divide"));
    free(cpu);
}

static void check_fused(struct rig *rig, const struct inputs *in, const struct twin *partial, const struct twin *live) {
    const struct merge_case *c = &in->c;
    size_t own_bytes = (size_t)(in->n * 3) * sizeof(float);
    struct twin own = rig_make(rig, own_bytes, NULL), stats = rig_make(rig, (size_t)c->n_ranks * own_bytes, in->stats);
    struct twin out = rig_make(rig, (size_t)(in->n * c->d) * sizeof(float), NULL);
    struct merge_scale_args args;
    for (int side = 0; side < RIG_SIDES; side++) {
        float *last = (float *)partial->at[side] + (int64_t)(c->n_ranks - 1) * in->n * in->stride;
        args = (struct merge_scale_args){c->n_rows, live->at[side], c->n_heads, c->d,        c->correction,
                                         last,      stats.at[side], c->n_ranks, out.at[side]};
        REQUIRE(op_merge_stats(rig->stream[side],
                               &(struct merge_stats_args){c->n_rows, live->at[side], c->n_heads, c->d, c->correction, last, own.at[side]}));
        REQUIRE(op_merge_scale(rig->stream[side], &args));
    }
    rig_expect_equal(rig, &own, named("merge_stats"));
    if (is_exact(in))
        rig_expect_equal(rig, &out, named("merge_scale"));
    rig_expect_close(rig, &out, (int64_t)in->n * c->d, scale_bound, (void *)(uintptr_t)in, named("merge_scale"));
    rig_expect_repeat(rig, &out, again_scale, &args, named("merge_scale"));
    expect_sane(rig, in, &out, "merge_scale");
}

static void check_gather(struct rig *rig, const struct inputs *in, const struct twin *partial, const struct twin *live) {
    const struct merge_case *c = &in->c;
    struct twin out = rig_make(rig, (size_t)(in->n * c->d) * sizeof(float), NULL);
    struct merge_gather_args args;
    for (int side = 0; side < RIG_SIDES; side++) {
        args = (struct merge_gather_args){c->n_rows,        live->at[side], c->n_heads, c->d, c->correction,
                                          partial->at[side], c->n_ranks,    out.at[side]};
        REQUIRE(op_merge_gather(rig->stream[side], &args));
    }
    if (is_exact(in))
        rig_expect_equal(rig, &out, named("merge_gather"));
    rig_expect_close(rig, &out, (int64_t)in->n * c->d, gather_bound, (void *)(uintptr_t)in, named("merge_gather"));
    rig_expect_repeat(rig, &out, again_gather, &args, named("merge_gather"));
    expect_sane(rig, in, &out, "merge_gather");
}

static void check_case(struct rig *rig, struct merge_case c) {
    struct inputs in = inputs_make(c);
    struct twin partial = rig_make(rig, (size_t)(c.n_ranks * in.n * in.stride) * sizeof(float), in.partial);
    int32_t count = c.live;
    struct twin live = rig_make(rig, sizeof count, &count);
    check_allreduce(rig, &in, &partial, &live);
    check_fused(rig, &in, &partial, &live);
    check_gather(rig, &in, &partial, &live);
    rig_drop(rig, 0);
    inputs_free(&in);
}

/* Refused before anything is launched; each on a stream of its own, as a failure is kept. */
static void check_refusals(struct rig *rig) {
    struct twin memory = rig_make(rig, 1 << 16, NULL);
    void *at = memory.at[RIG_CUDA];
    struct stream *stream;
    REQUIRE(stream_open(rig->backend[RIG_CUDA], &stream));
    CHECK_FAILS(op_merge_gather(stream, &(struct merge_gather_args){1, NULL, 1, 128, false, at, 65, at}), STATUS_USAGE, "65 ranks");
    stream_close(stream);
    REQUIRE(stream_open(rig->backend[RIG_CUDA], &stream));
    CHECK_FAILS(op_merge_scale(stream, &(struct merge_scale_args){1, NULL, 1, 96, false, at, at, 1, at}), STATUS_USAGE, "head_dim 96");
    stream_close(stream);
    rig_drop(rig, 0);
}

int main(void) {
    static struct rig rig;
    static const int ranks[] = {1, 2, 3, 8, 31, 32, 33, 64}; /* a lane of the kernel holds one rank, beyond 32 two */
    rig_open(&rig);
    for (size_t r = 0; r < sizeof ranks / sizeof *ranks; r++)
        for (int kind = 0; kind < 8; kind++) {
            int d = kind & 1 ? 128 : 64;
            bool correction = kind & 2, equal = kind & 4;
            check_case(&rig, (struct merge_case){d, 5, 4, 3, ranks[r], correction, equal});
            check_case(&rig, (struct merge_case){d, 1, 1, 1, ranks[r], correction, equal});
        }
    for (int heads = 3; heads <= 32; heads += heads < 5 ? 1 : 27) /* a block of the kernel has 4 warps */
        for (int rows = 0; rows <= 3; rows++)
            check_case(&rig, (struct merge_case){128, heads, rows, rows > 1 ? rows - 1 : rows, 2, rows % 2, false});
    check_case(&rig, (struct merge_case){64, 4, 3, 0, 2, true, false});
    check_case(&rig, (struct merge_case){128, 32, 256, 250, 1, true, false});
    check_case(&rig, (struct merge_case){128, 8, 256, 250, 4, true, false});
    check_refusals(&rig);
    rig_close(&rig);
    return test_report();
}
