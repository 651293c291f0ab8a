/* The correction against golden/correct.py (float64 PyTorch): S and P after several flushed blocks, C_n and C_d of decode rows, whole
 * on one rank and as a sum over the ranks that share the sequence. Also what must stay untouched: other sequences' states, padding
 * rows, the parts of a record that attention writes.
 *
 * Tolerance, with u = 2^-24 and first-order bounds. A logit sums d rounded products of a rounded difference, so it is off by at most
 * (d + 2) u z, z the largest sum of |x_c W_cj|. Softmax turns an absolute error e of logits into a relative one of 2 e, its own
 * subtraction, exponential, sum over D/2 and division add (4 z + D/2 + 10) u. A state sums 128 tokens of a block one by one, then the blocks:
 * (128 + n_blocks + 3) u with the gate's product. All terms of P have one sign, and |S_fc| errors are at most that share of P_f max|V^q|. C_n and
 * C_d add phi_q's own error, a sum over D and, over ranks, cp more additions. */
#include "kernels/cpu/correct.h"
#include "kernels/cpu/cpu.h"
#include "test.h"

enum { SEQ = 1, N_SEQS = 3, MAX_CP = 3, SAMPLE = 5, N_ROWS = 4, TAIL_TOKENS = 57, N_CASES = 6 };
static const float POISON = -77.25f;

struct golden {
    struct cache_layer layer;
    struct cache_layout layout;
    int n_heads, n_blocks;
    int64_t n;
    bool gated;
    uint64_t seed;
    void *kv, *q;             /* kv [n_kv_heads][K, V][n][d]; q [2][n_heads][d] */
    float *phi_k, *phi_q, *gate;
    double *s, *p, *c_n, *c_d; /* s: sampled, [kv_head][..]; p [kv_head][D]; c_n [2][n_heads][d]; c_d [2][n_heads] */
    double zk, zq, vmax;
};

static void *new_array(size_t n, size_t size) {
    void *out;
    REQUIRE(base_alloc(&out, n, size));
    return out;
}

static float bell(uint64_t seed, int64_t index) {
    uint64_t u = test_hash(seed, (uint64_t)index);
    int64_t sum = -131070;
    for (int i = 0; i < 4; i++)
        sum += (int64_t)(u >> (16 * i) & 0xffff);
    return (float)((double)sum / 32768.0);
}

static float *bells(uint64_t seed, int64_t n, float factor) {
    float *out = new_array((size_t)n, sizeof *out);
    for (int64_t i = 0; i < n; i++)
        out[i] = bell(seed, i) * factor;
    return out;
}

static double *read_line(FILE *file, const char *word, int64_t n) {
    char name[8];
    double *out = new_array((size_t)n, sizeof *out);
    REQUIRE(fscanf(file, "%7s", name) == 1 && strcmp(name, word) == 0 ? 0 : STATUS_INPUT);
    for (int64_t i = 0; i < n; i++)
        REQUIRE(fscanf(file, "%lf", &out[i]) == 1 ? 0 : STATUS_INPUT);
    return out;
}

static int64_t n_sampled(const struct golden *g) {
    return ceil_div((int64_t)g->layer.features * g->layer.format.head_dim, SAMPLE);
}

static void read_values(FILE *file, struct golden *g) {
    int n_kv_heads = g->layout.n_kv_heads, d = g->layout.head_dim, features = g->layer.features;
    g->s = new_array((size_t)(n_kv_heads * n_sampled(g)), sizeof *g->s);
    g->p = new_array((size_t)(n_kv_heads * features), sizeof *g->p);
    for (int h = 0; h < n_kv_heads; h++) {
        double *s = read_line(file, "S", n_sampled(g)), *p = read_line(file, "P", features);
        memcpy(g->s + h * n_sampled(g), s, sizeof *s * (size_t)n_sampled(g));
        memcpy(g->p + (int64_t)h * features, p, sizeof *p * (size_t)features);
        free(s);
        free(p);
    }
    g->c_n = read_line(file, "C_n", (int64_t)2 * g->n_heads * d);
    g->c_d = read_line(file, "C_d", (int64_t)2 * g->n_heads);
    double *bound = read_line(file, "bound", 3);
    g->zk = bound[0];
    g->zq = bound[1];
    g->vmax = bound[2];
    free(bound);
}

/* Tokens beyond the flushed blocks are huge: nothing of them may enter the states. */
static void make_inputs(struct golden *g) {
    enum dtype window = g->layer.format.window;
    int d = g->layout.head_dim, n_kv_heads = g->layout.n_kv_heads, features = g->layer.features;
    int64_t flushed = (int64_t)g->n_blocks * KV_BLOCK, n_values = n_kv_heads * 2 * g->n * d;
    float *kv = new_array((size_t)n_values, sizeof *kv), *q = bells(g->seed + 2, (int64_t)2 * g->n_heads * d, 1);
    for (int64_t i = 0; i < n_values; i++) {
        int64_t c = i % d, t = i / d % g->n, part = i / d / g->n % 2, h = i / d / g->n / 2;
        float x = bell(g->seed + (uint64_t)part, (h * flushed + t) * d + c);
        kv[i] = t >= flushed ? 60000.0f : part == 0 ? x * (float)(1 << c % 3) : x;
    }
    g->kv = new_array((size_t)n_values, 4);
    g->q = new_array((size_t)(2 * g->n_heads * d), 4);
    dtype_narrow(window, kv, g->kv, n_values);
    dtype_narrow(window, q, g->q, (int64_t)2 * g->n_heads * d);
    free(kv);
    free(q);
    g->phi_k = bells(g->seed + 3, (int64_t)n_kv_heads * d * features, 0.25f);
    g->phi_q = bells(g->seed + 4, (int64_t)(g->layer.phi_q_per_head ? g->n_heads : n_kv_heads) * d * features, 0.25f);
    g->gate = bells(g->seed + 5, n_kv_heads, 1);
    g->layer.phi_k = g->phi_k;
    g->layer.phi_q = g->phi_q;
    g->layer.gate = g->gated ? g->gate : NULL;
}

static bool read_case(FILE *file, struct golden *g) {
    char window[8];
    int d, features, n_kv_heads, n_heads, k_bits, v_bits, sink, n_blocks, gate, per_head, exact_v, seed;
    if (fscanf(file, " case %7s %d %d %d %d %d %d %d %d %d %d %d %d", window, &d, &features, &n_kv_heads, &n_heads, &k_bits, &v_bits, &sink,
               &n_blocks, &gate, &per_head, &exact_v, &seed) != 13)
        return false;
    enum dtype dtype = strcmp(window, "f16") == 0 ? DTYPE_F16 : strcmp(window, "bf16") == 0 ? DTYPE_BF16 : DTYPE_F32;
    *g = (struct golden){.n_heads = n_heads, .n_blocks = n_blocks, .gated = gate, .seed = (uint64_t)seed};
    g->n = (int64_t)n_blocks * KV_BLOCK + TAIL_TOKENS;
    g->layer = (struct cache_layer){.format = {d, k_bits, v_bits, dtype}, .features = features};
    g->layer.phi_q_per_head = per_head;
    g->layer.states_exact_v = exact_v;
    g->layout = (struct cache_layout){.cp_size = 1, .window_blocks = 1, .n_slots = 2, .sink = sink, .n_kv_heads = n_kv_heads, .head_dim = d};
    read_values(file, g);
    make_inputs(g);
    return true;
}

static void free_case(struct golden *g) {
    void *all[] = {g->kv, g->q, g->phi_k, g->phi_q, g->gate, g->s, g->p, g->c_n, g->c_d};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* Flushes what rank `rank` of `cp` owns; its cache is in `layer`, to be freed by free_layer. */
static void flush_rank(struct golden *g, int cp, int rank, int owner_offset, struct cache_layer *layer) {
    struct cache_layout layout = g->layout;
    int64_t n_states = cpu_correct_n_states(&g->layer) * layout.n_kv_heads;
    size_t row_bytes = dtype_bytes(layer->format.window, layout.head_dim);
    int32_t page_table[8] = {2, 0, 1, 3};
    layout.cp_rank = rank;
    layout.cp_size = cp;
    layer->page_stride = (int64_t)page_record_bytes(&layer->format) * layout.n_kv_heads;
    layer->pages = new_array(4, (size_t)layer->page_stride);
    layer->window = new_array((size_t)(N_SEQS * layout.n_slots * layout.n_kv_heads * 2 * KV_BLOCK), row_bytes);
    layer->sink = new_array((size_t)(N_SEQS * layout.n_kv_heads * 2 * layout.sink), row_bytes);
    layer->states = new_array((size_t)(N_SEQS * n_states), sizeof(float));
    for (int64_t i = 0; i < N_SEQS * n_states; i++)
        layer->states[i] = i / n_states == SEQ ? 0 : POISON;
    cpu_flush_exact(&(struct flush_exact_args){SEQ, g->n, g->n_blocks, owner_offset, layout, *layer, page_table, g->kv});
    for (int64_t i = 0; i < N_SEQS * n_states; i++)
        CHECK(i / n_states == SEQ || layer->states[i] == POISON, "states of another sequence, %ld", (long)i);
    if (cache_n_owned(&layout, g->n_blocks, owner_offset) == 0) {
        for (int64_t i = 0; i < n_states; i++)
            CHECK(layer->states[SEQ * n_states + i] == 0, "an empty rank's state %ld", (long)i);
    }
}

static void free_layer(struct cache_layer *layer) {
    free(layer->pages);
    free(layer->window);
    free(layer->sink);
    free(layer->states);
}

/* Rows: the golden's two, a padding row between them, and one beyond the live rows. Adds C_n, C_d to the sums [2][n_heads][d + 1]. */
static void correct_rank(const struct golden *g, const struct cache_layer *layer, double *sums) {
    int d = g->layout.head_dim, stride = partial_stride(d, true) + 3, tail = partial_tail(d, true);
    size_t row_bytes = dtype_bytes(layer->format.window, (int64_t)g->n_heads * d);
    struct step_input *in = new_array(1, sizeof *in);
    uint8_t *q = new_array(N_ROWS, row_bytes);
    float *partial = new_array((size_t)(N_ROWS * g->n_heads * stride), sizeof *partial);
    for (int64_t i = 0; i < (int64_t)N_ROWS * g->n_heads * stride; i++)
        partial[i] = POISON;
    in->n_rows = N_ROWS - 1;
    for (int i = 0; i < N_ROWS; i++)
        in->row[i].seq = i == 1 ? -1 : SEQ;
    memcpy(q, g->q, row_bytes);
    memcpy(q + 2 * row_bytes, (const uint8_t *)g->q + row_bytes, row_bytes);
    cpu_correct(&(struct correct_args){in, N_ROWS, g->layout, *layer, g->n_heads, q, partial, stride});
    for (int64_t i = 0; i < (int64_t)N_ROWS * g->n_heads * stride; i++) {
        int64_t o = i % stride, head = i / stride % g->n_heads, row = i / stride / g->n_heads;
        bool written = row < N_ROWS - 1 && ((o >= d && o < 2 * d) || o == tail + 2);
        if (!written)
            CHECK(partial[i] == POISON, "row %ld, head %ld, float %ld is not the correction's", (long)row, (long)head, (long)o);
        else if (row == 1)
            CHECK(partial[i] == 0, "padding row, head %ld, float %ld", (long)head, (long)o);
        else
            sums[(row / 2 * g->n_heads + head) * (d + 1) + (o == tail + 2 ? d : o - d)] += (double)partial[i];
    }
    free(in);
    free(q);
    free(partial);
}

static double u_times(double n) { return n * 0x1p-24; }

static double relative_k(const struct golden *g) {
    double d = g->layout.head_dim, features = g->layer.features;
    return u_times((2 * (d + 2) + 4) * g->zk + features / 2 + 10 + KV_BLOCK + g->n_blocks + 3);
}

static void check_states(const struct golden *g, const double *states, int cp) {
    int d = g->layout.head_dim, features = g->layer.features;
    int64_t n_states = cpu_correct_n_states(&g->layer), n_s = (int64_t)features * d;
    for (int h = 0; h < g->layout.n_kv_heads; h++) {
        for (int64_t i = 0; i < n_s; i += SAMPLE) {
            double expected = g->s[h * n_sampled(g) + i / SAMPLE], got = states[h * n_states + i];
            double tolerance = relative_k(g) * fabs(g->p[h * features + i / d]) * g->vmax;
            CHECK(fabs(got - expected) <= tolerance, "cp %d, head %d, S %ld: %g, expected %g", cp, h, (long)i, got, expected);
        }
        for (int f = 0; f < features; f++) {
            double expected = g->p[h * features + f], got = states[h * n_states + n_s + f];
            CHECK(fabs(got - expected) <= relative_k(g) * fabs(expected), "cp %d, head %d, P %d: %g, expected %g", cp, h, f, got, expected);
        }
    }
}

static void check_sums(const struct golden *g, const double *sums, int cp) {
    int d = g->layout.head_dim;
    double features = g->layer.features;
    double relative = relative_k(g) + u_times((2 * (d + 1) + 4) * g->zq + features / 2 + 10 + features + cp);
    for (int i = 0; i < 2 * g->n_heads; i++) {
        double tolerance = relative * fabs(g->c_d[i]);
        CHECK(fabs(sums[i * (d + 1) + d] - g->c_d[i]) <= tolerance, "cp %d, C_d %d: %g, expected %g", cp, i, sums[i * (d + 1) + d], g->c_d[i]);
        for (int c = 0; c < d; c++) {
            double got = sums[i * (d + 1) + c], expected = g->c_n[(int64_t)i * d + c];
            CHECK(fabs(got - expected) <= tolerance * g->vmax, "cp %d, C_n %d, %d: %g, expected %g", cp, i, c, got, expected);
        }
    }
}

static void run_case(struct golden *g) {
    int64_t n_states = cpu_correct_n_states(&g->layer) * g->layout.n_kv_heads;
    for (int cp = 1; cp <= MAX_CP; cp++) {
        double *states = new_array((size_t)n_states, sizeof *states);
        double *sums = new_array((size_t)(2 * g->n_heads * (g->layout.head_dim + 1)), sizeof *sums);
        for (int rank = 0; rank < cp; rank++) {
            struct cache_layer layer = g->layer;
            flush_rank(g, cp, rank, cp - 1, &layer);
            for (int64_t i = 0; i < n_states; i++)
                states[i] += (double)layer.states[SEQ * n_states + i];
            correct_rank(g, &layer, sums);
            free_layer(&layer);
        }
        check_states(g, states, cp);
        check_sums(g, sums, cp);
        free(states);
        free(sums);
    }
}

/* Without an adapter nothing is written: correction off is the plain path. */
static void test_off(void) {
    struct step_input *in = new_array(1, sizeof *in);
    float partial[2 * 64 + 4], q[64] = {0};
    for (int i = 0; i < 2 * 64 + 4; i++)
        partial[i] = POISON;
    in->n_rows = 1;
    struct cache_layer layer = {.format = {64, 2, 2, DTYPE_F32}};
    struct cache_layout layout = {.cp_size = 1, .window_blocks = 1, .n_slots = 2, .n_kv_heads = 1, .head_dim = 64};
    cpu_correct(&(struct correct_args){in, 1, layout, layer, 1, q, partial, 2 * 64 + 4});
    for (int i = 0; i < 2 * 64 + 4; i++)
        CHECK(partial[i] == POISON, "float %d", i);
    free(in);
}

int main(void) {
    char header[256];
    struct golden g;
    int n_cases = 0;
    FILE *file = fopen(TEST_FILE("golden/correct.golden"), "r");
    REQUIRE(file && fgets(header, sizeof header, file) ? 0 : STATUS_FAILED);
    for (; read_case(file, &g); n_cases++) {
        run_case(&g);
        free_case(&g);
    }
    fclose(file);
    CHECK(n_cases == N_CASES, "%d cases", n_cases);
    test_off();
    return test_report();
}
