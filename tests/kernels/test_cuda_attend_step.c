/* Attention, correction and merge in one go against the same three operations one by one, which tests of their own hold against the CPU
 * and double precision. Every pair of bits, head sizes, groups, ranks, windows, sinks, D = 256 and others, one phi_q per KV head and per
 * query head; records and outputs; the same bits each time. Then what early launches may get wrong: a row of 16-bit blocks that the
 * operation right in front wrote, and many attentions in a row.
 *
 * Bounds, u = 2^-24, |v| at most v_max. The same page gives the same weights; sums of pages are joined in another order: up to
 * MAX_BLOCKS * 8 pieces, each of which costs l and Y three roundings of their absolute terms, so 3 * 64 u of l and of l * v_max.
 * Correction: a logit is a sum of d products of |q| < Q_MAX and |W| <= W_MAX in two orders, so it is off by 2 d u * d * Q_MAX * W_MAX at
 * the very most; phi by twice that, relatively, and its exponential by 2^-20; phi sums to 2, |S| <= S_MAX. */
#include "kernels/cuda_attend_world.h"

enum { N_IN_A_ROW = 12 };

#define Q_MAX 8.0
#define W_MAX 0.005
#define S_MAX 1.0

struct step_world {
    struct world w;
    struct attend_args args; /* on the GPU, with states where the setup has a correction */
    struct twin partial[2], out[2]; /* one by one, in one go */
    int features;
    bool per_head;
    double v_max, correction_error;
};

static float *uniform(uint64_t seed, size_t n, double most) {
    float *x = fresh(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(most * ((double)(test_hash(seed, i) >> 40) * 0x1p-23 - 1.0));
    return x;
}

/* P is positive, as sums of phi are. */
static void make_states(struct rig *rig, struct step_world *s) {
    const struct cache_layout *l = &s->w.s.layout;
    size_t each = (size_t)s->features * (size_t)(s->w.d + 1), n = (size_t)SEQS * (size_t)l->n_kv_heads * each;
    size_t n_phi = (size_t)(s->per_head ? s->w.n_heads : l->n_kv_heads) * (size_t)s->w.d * (size_t)s->features;
    float *states = uniform(s->w.s.seed + 71, n, S_MAX), *phi = uniform(s->w.s.seed + 72, n_phi, W_MAX);
    for (size_t i = 0; i < n; i++)
        if (i % each >= (size_t)s->features * (size_t)s->w.d)
            states[i] = fabsf(states[i]);
    s->args.layer.states = rig_make(rig, n * sizeof *states, states).at[RIG_CUDA];
    s->args.layer.phi_k = s->args.layer.phi_q = rig_make(rig, n_phi * sizeof *phi, phi).at[RIG_CUDA];
    s->args.layer.features = s->features;
    s->args.layer.phi_q_per_head = s->per_head;
    double logit = 2.0 * s->w.d * 0x1p-24 * s->w.d * Q_MAX * W_MAX;
    s->correction_error = 2.0 * S_MAX * (2.0 * logit + 0x1p-20);
    free(states), free(phi);
}

static void step_world_make(struct rig *rig, struct step_world *s, const struct setup *setup) {
    static const int features[] = {256, 256, 128, 256, 512};
    world_make(rig, &s->w, setup);
    s->args = s->w.args[RIG_CUDA];
    s->features = features[setup->seed / 300000 % 5];
    s->per_head = setup->seed / 300000 % 4 == 3;
    s->correction_error = 0.0;
    if (setup->correction)
        make_states(rig, s);
    size_t n = (size_t)s->args.n_rows * (size_t)s->w.n_heads;
    for (int i = 0; i < 2; i++) {
        s->partial[i] = rig_make(rig, (n * (size_t)s->args.stride + 1) * sizeof(float), NULL);
        s->out[i] = rig_make(rig, (n * (size_t)s->w.d + 1) * sizeof(float), NULL);
    }
    s->v_max = 0.0;
    for (int h = 0; h < setup->layout.n_kv_heads; h++)
        for (int kind = 0; kind < POOL; kind++)
            for (int i = 0; i < KV_BLOCK * s->w.d; i++)
                s->v_max = fmax(s->v_max, (double)s->w.page[kind][h].v_abs[i]);
    s->v_max = fmax(s->v_max, 8.0); /* 16-bit rows are normal deviates */
}

static int one_by_one(struct stream *stream, const struct step_world *s) {
    struct attend_args args = s->args;
    args.partial = s->partial[0].at[RIG_CUDA];
    TRY(op_attend(stream, &args));
    if (args.layer.states)
        TRY(op_correct(stream, &(struct correct_args){args.in, args.n_rows, args.layout, args.layer, args.n_heads, args.q, args.partial,
                                                      args.stride}));
    return op_merge_gather(stream, &(struct merge_gather_args){args.n_rows, NULL, args.n_heads, s->w.d, args.layer.states != NULL, args.partial,
                                                               1, s->out[0].at[RIG_CUDA]});
}

static struct attend_step_args in_one_go(const struct step_world *s, bool out) {
    struct attend_step_args args = {s->args, out ? s->out[1].at[RIG_CUDA] : NULL};
    args.attend.partial = s->partial[1].at[RIG_CUDA];
    return args;
}

static void check_row(const struct step_world *s, const char *what, int row, const float *got, const float *expected, int n, double bound) {
    int worst = 0;
    for (int i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)expected[i]) <= fabs((double)got[worst] - (double)expected[worst])))
            worst = i;
    CHECK(fabs((double)got[worst] - (double)expected[worst]) <= bound, "%s, D %d%s, %s [%d]: %.9g, one by one %.9g, bound %g",
          describe(&s->w, RIG_CUDA, row / s->w.n_heads, row % s->w.n_heads), s->features, s->per_head ? " per head" : "", what, worst,
          (double)got[worst], (double)expected[worst], bound);
}

/* Records are compared where both are shifted by the same m: it is the exact one in both. */
static void check_records(struct rig *rig, const struct step_world *s) {
    const int d = s->w.d, stride = s->args.stride, tail = partial_tail(d, s->w.s.correction);
    float *expected = rig_fetch(rig, RIG_CUDA, s->partial[0].at[RIG_CUDA], s->partial[0].bytes);
    float *got = rig_fetch(rig, RIG_CUDA, s->partial[1].at[RIG_CUDA], s->partial[1].bytes);
    for (int i = 0; i < s->w.s.n_rows * s->w.n_heads; i++) {
        const float *a = got + (size_t)i * (size_t)stride, *b = expected + (size_t)i * (size_t)stride;
        double l = (double)b[tail + 1], sums = 3 * 64 * 0x1p-24 * l;
        CHECK(a[tail] == b[tail], "%s: m %.9g, one by one %.9g", describe(&s->w, RIG_CUDA, i / s->w.n_heads, i % s->w.n_heads),
              (double)a[tail], (double)b[tail]);
        check_row(s, "l", i, a + tail + 1, b + tail + 1, 1, sums);
        check_row(s, "Y", i, a, b, d, sums * s->v_max);
        if (s->w.s.correction && s->w.s.row[i / s->w.n_heads].seq >= 0 && l > 0.0) {
            check_row(s, "C_n", i, a + d, b + d, d, s->correction_error);
            check_row(s, "C_d", i, a + tail + 2, b + tail + 2, 1, s->correction_error);
        }
    }
    free(expected), free(got);
}

/* |out| <= v_max + S_MAX, and what it is divided by is at least 1 where there is a token. */
static void check_outputs(struct rig *rig, const struct step_world *s, const char *what) {
    const double size = s->v_max + S_MAX, bound = 4 * 64 * 0x1p-24 * size * 2 + s->correction_error * (1 + size);
    float *expected = rig_fetch(rig, RIG_CUDA, s->out[0].at[RIG_CUDA], s->out[0].bytes);
    float *got = rig_fetch(rig, RIG_CUDA, s->out[1].at[RIG_CUDA], s->out[1].bytes);
    for (int i = 0; i < s->w.s.n_rows * s->w.n_heads; i++)
        check_row(s, what, i, got + (size_t)i * (size_t)s->w.d, expected + (size_t)i * (size_t)s->w.d, s->w.d, bound);
    free(expected), free(got);
}

static int again(struct stream *stream, const void *args) { return op_attend_step(stream, args); }

static void check_setup(struct rig *rig, const struct setup *setup, bool repeat) {
    int n_twins = rig->n_twins;
    struct step_world s;
    step_world_make(rig, &s, setup);
    struct stream *stream = rig->stream[RIG_CUDA];
    REQUIRE(one_by_one(stream, &s));
    struct attend_step_args records = in_one_go(&s, false), outputs = in_one_go(&s, true);
    REQUIRE(op_attend_step(stream, &records));
    check_records(rig, &s);
    REQUIRE(op_attend_step(stream, &outputs));
    if (setup->layout.cp_size == 1) /* elsewhere there may be no token, and nothing to divide by */
        check_outputs(rig, &s, "output");
    if (repeat)
        rig_expect_repeat(rig, &s.out[1], again, &outputs, "attend_step");
    world_free(&s.w);
    rig_drop(rig, n_twins);
}

static void check_formats(struct rig *rig) {
    static const int bits[] = {2, 4, 8, 16};
    uint64_t seed = 1;
    for (int d = 64; d <= 128; d += 64)
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < 4; v++)
                for (int i = 0; i < (k == v && k % 3 == 0 ? 30 : 3); i++, seed++) {
                    struct setup s = setup_of(bits[k], bits[v], d, seed % 2 ? DTYPE_F16 : DTYPE_BF16, seed);
                    for (s.layout.cp_rank = 0; s.layout.cp_rank < s.layout.cp_size; s.layout.cp_rank++)
                        check_setup(rig, &s, seed % 8 == 0);
                }
}

/* Each time the operation in front writes other rows of K and V to the 16-bit blocks: what is read is what it wrote. And attentions one after
 * the other without anything between them. */
static void check_early(struct rig *rig, uint64_t seed) {
    int n_twins = rig->n_twins;
    struct step_world s;
    struct setup setup = setup_of(2, 2, 128, DTYPE_F16, seed);
    setup.correction = true;
    setup.layout.cp_size = 1, setup.layout.cp_rank = 0, setup.layout.n_slots = setup.layout.window_blocks + 1;
    step_world_make(rig, &s, &setup);
    struct stream *stream = rig->stream[RIG_CUDA];
    struct attend_step_args step = in_one_go(&s, true);
    size_t n = (size_t)s.args.n_rows * (size_t)setup.layout.n_kv_heads * (size_t)s.w.d;
    struct twin rows[2] = {rig_make(rig, 2 * n, NULL), rig_make(rig, 2 * n, NULL)};
    for (int i = 0; i < N_IN_A_ROW; i++) {
        uint16_t *half = fresh(2 * n);
        for (int part = 0; part < 2; part++) {
            float *x = uniform(seed + 100 + (uint64_t)(2 * i + part), n, 2.0);
            dtype_narrow(DTYPE_F16, x, half, (int64_t)n);
            rig_send(rig, RIG_CUDA, rows[part].at[RIG_CUDA], half, 2 * n);
            free(x);
        }
        struct append_args append = {s.args.in, s.args.params, s.args.layout, s.args.layer, rows[0].at[RIG_CUDA], rows[1].at[RIG_CUDA]};
        REQUIRE(op_append(stream, &append));
        REQUIRE(op_attend_step(stream, &step));
        for (int k = 0; k < i % 4; k++)
            REQUIRE(op_attend_step(stream, &step));
        REQUIRE(stream_sync(stream));
        REQUIRE(one_by_one(stream, &s));
        check_outputs(rig, &s, "after append");
        free(half);
    }
    world_free(&s.w);
    rig_drop(rig, n_twins);
}

int main(void) {
    struct rig rig;
    rig_open(&rig);
    check_formats(&rig);
    for (uint64_t seed = 2; seed < 40; seed += 3)
        check_early(&rig, seed);
    rig_close(&rig);
    return test_report();
}
