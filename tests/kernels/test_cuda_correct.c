/* C_n and C_d on the GPU against the CPU, and against the same sums in double: states and queries are random, so that rows, heads and
 * features of every count are quick to make. What the correction does not own in a record is poison and stays so. */
#include "kernels/cuda_rig.h"

enum { N_SEQS = 3, EXTRA_STRIDE = 3 };
static struct rig rig;

struct shape {
    int n_rows, n_live, n_heads, n_kv_heads, d, features;
    enum dtype window;
    bool per_head;
};

/* For each float of the records: how far an fp32 result may lie from the true one; and the true one. */
struct expected {
    double *value, *bound;
};

static void *new_array(size_t n, size_t size) {
    void *out;
    REQUIRE(base_alloc(&out, n, size));
    return out;
}

static float *uniforms(uint64_t seed, size_t n, float factor) {
    float *out = new_array(n, sizeof *out);
    for (size_t i = 0; i < n; i++)
        out[i] = factor * test_uniform(seed, i);
    return out;
}

static size_t states_count(const struct shape *s) { return (size_t)s->features * (size_t)s->d + (size_t)s->features; }
static int stride_of(const struct shape *s) { return partial_stride(s->d, true) + EXTRA_STRIDE; }

/* Rows of all slots; every third is padding. */
static int seq_of(int row) { return row % 3 == 1 ? -1 : row % N_SEQS; }

/* phi of a query in double; returns z, the largest sum_c |q_c W_cf|. w: [2][d][features / 2]. */
static double exact_phi(const struct shape *s, const float *q, const float *w, double *phi) {
    int half = s->features / 2;
    double z = 0;
    for (int part = 0; part < 2; part++) {
        double max = -INFINITY, sum = 0, *to = phi + part * half;
        for (int f = 0; f < half; f++) {
            double x = 0, size = 0;
            for (int c = 0; c < s->d; c++) {
                double term = (double)q[c] * (double)w[(int64_t)(part * s->d + c) * half + f];
                x += term;
                size += fabs(term);
            }
            to[f] = x;
            max = fmax(max, x);
            z = fmax(z, size);
        }
        for (int f = 0; f < half; f++)
            sum += to[f] = exp(to[f] - max);
        for (int f = 0; f < half; f++)
            to[f] /= sum;
    }
    return z;
}

/* u = 2^-24. A logit is off by (d + 1) u z, its distance from the maximum (at most 2 z) by 2 (d + 2) u z, an exponential (2 ulp) by that
 * + 4 u in relation to itself; the denominator by the same and D / 2 additions, a division by u: phi by u (4 (d + 2) z + D / 2 + 9). A sum
 * of D products adds D + 1 roundings in relation to sum phi |S|. A tenth more for products of errors. */
static double relative_bound(const struct shape *s, double z) {
    return 1.1 * 0x1p-24 * (4 * (double)(s->d + 2) * z + 1.5 * (double)s->features + 10);
}

static void expect_head(const struct shape *s, const float *q, const float *w, const float *states, double *value, double *bound) {
    static double phi[KV_MAX_FEATURES];
    double z = exact_phi(s, q, w, phi), relative = relative_bound(s, z);
    int tail = partial_tail(s->d, true);
    for (int f = 0; f < s->features; f++) {
        for (int c = 0; c < s->d; c++) {
            double x = (double)states[(int64_t)f * s->d + c];
            value[s->d + c] += phi[f] * x;
            bound[s->d + c] += relative * phi[f] * fabs(x);
        }
        double p = (double)states[(int64_t)s->features * s->d + f];
        value[tail + 2] += phi[f] * p;
        bound[tail + 2] += relative * phi[f] * fabs(p);
    }
}

static struct expected expect(const struct shape *s, const float *q, const float *phi_q, const float *states) {
    size_t n = (size_t)(s->n_rows * s->n_heads * stride_of(s));
    struct expected e = {new_array(n + 1, sizeof *e.value), new_array(n + 1, sizeof *e.bound)};
    int group = s->n_heads / s->n_kv_heads;
    for (int row = 0; row < s->n_live; row++) {
        for (int h = 0; h < s->n_heads && seq_of(row) >= 0; h++) {
            int64_t i = (int64_t)row * s->n_heads + h, w = (int64_t)(s->per_head ? h : h / group) * s->d * s->features;
            const float *own = states + (size_t)(seq_of(row) * s->n_kv_heads + h / group) * states_count(s);
            expect_head(s, q + i * s->d, phi_q + w, own, e.value + i * stride_of(s), e.bound + i * stride_of(s));
        }
    }
    return e;
}

/* Both sides within the bound of the true values, the GPU within twice that of the CPU; poison where nothing belongs. */
static void check(const struct shape *s, const struct expected *e, const struct twin *partial, const char *where) {
    float *got[RIG_SIDES];
    for (int side = 0; side < RIG_SIDES; side++)
        got[side] = rig_fetch(&rig, side, partial->at[side], partial->bytes);
    int d = s->d, stride = stride_of(s), tail = partial_tail(d, true);
    for (int64_t i = 0; i < (int64_t)(partial->bytes / sizeof(float)); i++) {
        int64_t o = i % stride, head = i / stride % s->n_heads, row = i / stride / s->n_heads;
        bool written = row < s->n_live && ((o >= d && o < 2 * d) || o == tail + 2);
        uint32_t bits;
        memcpy(&bits, &got[RIG_CUDA][i], sizeof bits);
        if (!written) {
            CHECK(bits == 0xffffffffu, "%s: row %ld, head %ld, float %ld is not the correction's, cuda wrote %g", where, (long)row,
                  (long)head, (long)o, (double)got[RIG_CUDA][i]);
            continue;
        }
        for (int side = 0; side < RIG_SIDES; side++)
            CHECK(fabs((double)got[side][i] - e->value[i]) <= e->bound[i], "%s: row %ld, head %ld, float %ld: %s %g, expected %g +- %g",
                  where, (long)row, (long)head, (long)o, side ? "cuda" : "cpu", (double)got[side][i], e->value[i], e->bound[i]);
    }
    for (int side = 0; side < RIG_SIDES; side++)
        free(got[side]);
}

static struct correct_args args_of(const struct shape *s, int side, const struct twin *in, const struct twin *states,
                                   const struct twin *phi_q, const struct twin *q, const struct twin *partial) {
    struct cache_layout layout = {.cp_size = 1, .window_blocks = 1, .n_slots = 2, .n_kv_heads = s->n_kv_heads, .head_dim = s->d};
    struct cache_layer layer = {.format = {s->d, 2, 2, s->window}, .states = states->at[side], .features = s->features};
    layer.phi_k = layer.phi_q = phi_q->at[side];
    layer.phi_q_per_head = s->per_head;
    return (struct correct_args){in->at[side], s->n_rows, layout, layer, s->n_heads, q->at[side], partial->at[side], stride_of(s)};
}

static int launch_again(struct stream *stream, const void *args) { return op_correct(stream, args); }

static void run_shape(const struct shape *s, uint64_t seed) {
    static struct step_input in;
    size_t n_q = (size_t)(s->n_rows * s->n_heads * s->d), n_states = N_SEQS * (size_t)s->n_kv_heads * states_count(s);
    size_t n_phi = (size_t)((s->per_head ? s->n_heads : s->n_kv_heads) * s->d * s->features);
    float *q = uniforms(seed, n_q + 1, 2), *phi_q = uniforms(seed + 1, n_phi, 0.3f), *states = uniforms(seed + 2, n_states, 50);
    uint16_t *narrow = new_array(n_q + 1, sizeof *narrow);
    dtype_narrow(s->window, q, narrow, (int64_t)n_q);
    dtype_widen(s->window, narrow, q, (int64_t)n_q);
    memset(&in, 0x11, sizeof in); /* rows beyond the live ones name slots that are not there */
    in.n_rows = s->n_live;
    for (int row = 0; row < s->n_live; row++)
        in.row[row] = (struct step_row){seq_of(row), 0, 0, 0};
    struct twin in_twin = rig_make(&rig, sizeof in, &in), q_twin = rig_make(&rig, n_q * 2, narrow);
    struct twin phi_twin = rig_make(&rig, n_phi * sizeof *phi_q, phi_q), states_twin = rig_make(&rig, n_states * sizeof *states, states);
    struct twin partial = rig_make(&rig, (size_t)(s->n_rows * s->n_heads * stride_of(s)) * sizeof(float), NULL);
    struct correct_args args[RIG_SIDES];
    for (int side = 0; side < RIG_SIDES; side++) {
        args[side] = args_of(s, side, &in_twin, &states_twin, &phi_twin, &q_twin, &partial);
        REQUIRE(op_correct(rig.stream[side], &args[side]));
    }
    char where[160];
    snprintf(where, sizeof where, "%d of %d rows, %d heads, %d KV heads, d %d, D %d, %s%s", s->n_live, s->n_rows, s->n_heads, s->n_kv_heads,
             s->d, s->features, dtype_name(s->window), s->per_head ? ", phi_q per head" : "");
    struct expected e = expect(s, q, phi_q, states);
    check(s, &e, &partial, where);
    rig_expect_repeat(&rig, &partial, launch_again, &args[RIG_CUDA], where);
    void *all[] = {q, phi_q, states, narrow, e.value, e.bound};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    rig_drop(&rig, 0);
}

/* Without an adapter nothing is written. */
static void test_off(void) {
    struct shape s = {1, 1, 1, 1, 64, 0, DTYPE_F16, false};
    struct step_input in = {.n_rows = 1};
    struct twin in_twin = rig_make(&rig, sizeof in, &in), q = rig_make(&rig, 128, NULL), partial = rig_make(&rig, 600, NULL);
    for (int side = 0; side < RIG_SIDES; side++) {
        struct correct_args args = args_of(&s, side, &in_twin, &q, &q, &q, &partial);
        REQUIRE(op_correct(rig.stream[side], &args));
    }
    rig_expect_equal(&rig, &partial, "correction off");
    rig_drop(&rig, 0);
}

int main(void) {
    rig_open(&rig);
    static const int groups[] = {1, 2, 3, 4, 5, 7, 8, 9, 16}, features[] = {32, 64, 96, 160, 256, 480, 512};
    static const int rows[][2] = {{0, 0}, {1, 1}, {1, 0}, {4, 3}, {7, 7}, {33, 30}};
    for (int i = 0; i < 84; i++) {
        const int *n = rows[(i + i / 12) % 6];
        int n_kv_heads = (const int[]){1, 2, 8, 3}[i / 2 % 4];
        struct shape s = {n[0], n[1], n_kv_heads * groups[i % 9], n_kv_heads, i / 3 % 2 ? 64 : 128, features[i % 7],
                          i % 2 ? DTYPE_BF16 : DTYPE_F16, i % 5 == 2};
        run_shape(&s, 10 * (uint64_t)i);
    }
    /* The most rows of a step: one slice of all channels; and a single row of a single head: all slices. */
    run_shape(&(struct shape){STEP_MAX_ROWS, STEP_MAX_ROWS, 4, 1, 128, 64, DTYPE_F16, false}, 2000);
    run_shape(&(struct shape){1, 1, 1, 1, 64, 512, DTYPE_BF16, true}, 2010);
    test_off();
    rig_close(&rig);
    return test_report();
}
