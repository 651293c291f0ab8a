/* Operations that begin before the one in front of them has ended (kernels/cuda/device.cuh) against the same with a wait after each: a
 * chain of layers, in which every operation reads what the last one wrote, must have the same bits one by one, in one go and replayed as
 * a graph. One row takes the matrix product's dot, more its tensor tiles in their sizes. */
#include "cuda_rig.h"

enum { HIDDEN = 1024, INNER = 2816, HEADS = 8, KV_HEADS = 2, D = 128, QKV = (HEADS + 2 * KV_HEADS) * D, LAYERS = 12, MOST_ROWS = 20 };

enum buffer {
    X, FIRST, PROJECTED, NORM, ACTIVE, GATE_UP, PRODUCT, Q, K, V, /* written, but for FIRST */
    W_QKV, W_O, W_GATE_UP, W_DOWN, WEIGHT, FREQUENCIES, POSITIONS, LIVE,
    N_BUFFERS,
};

static const size_t sizes[N_BUFFERS] = {
    [X] = MOST_ROWS * HIDDEN * 4,     [FIRST] = MOST_ROWS * HIDDEN * 4, [PROJECTED] = MOST_ROWS * HIDDEN * 4,
    [NORM] = MOST_ROWS * HIDDEN * 4,  [ACTIVE] = MOST_ROWS * INNER * 4, [GATE_UP] = MOST_ROWS * 2 * INNER * 4,
    [PRODUCT] = MOST_ROWS * QKV * 4,  [Q] = MOST_ROWS * HEADS * D * 2,  [K] = MOST_ROWS * KV_HEADS * D * 2,
    [V] = MOST_ROWS * KV_HEADS * D * 2, [W_QKV] = QKV * HIDDEN * 2,     [W_O] = HIDDEN * HIDDEN * 2,
    [W_GATE_UP] = 2 * INNER * HIDDEN * 2, [W_DOWN] = HIDDEN * INNER * 2, [WEIGHT] = HIDDEN * 4,
    [FREQUENCIES] = D / 2 * 4,        [POSITIONS] = MOST_ROWS * 4,      [LIVE] = 4,
};

struct chain {
    struct stream *stream;
    struct backend *backend;
    void *at[N_BUFFERS];
    int n_rows;
    bool waits; /* for each operation */
};

static void random_values(struct chain *c, enum buffer buffer, enum dtype dtype, float limit) {
    REQUIRE(op_fill_random(c->stream, &(struct fill_random_args){.data = c->at[buffer], .dtype = dtype, .n_rows = 1,
                                                                 .n_columns = (int64_t)(sizes[buffer] / dtype_bytes(dtype, 1)),
                                                                 .stride = 1, .seed = 100 + buffer, .low = -limit, .high = limit}));
}

static void after(struct chain *c) {
    if (c->waits)
        REQUIRE(stream_sync(c->stream));
}

static void product(struct chain *c, enum buffer x, int64_t ldx, enum buffer w, int64_t n_in, int64_t n_out, enum buffer y) {
    REQUIRE(op_matmul(c->stream, &(struct matmul_args){.n_rows = c->n_rows, .live = c->at[LIVE], .x = c->at[x], .ldx = ldx, .w = c->at[w],
                                                       .dtype = DTYPE_F16, .n_in = n_in, .n_out = n_out, .y = c->at[y], .ldy = n_out}));
    after(c);
}

static void add_norm(struct chain *c) {
    REQUIRE(op_add_rmsnorm(c->stream, &(struct add_rmsnorm_args){c->n_rows, c->at[LIVE], c->at[X], c->at[PROJECTED], c->at[WEIGHT], 1e-5f,
                                                                 HIDDEN, c->at[NORM]}));
    after(c);
}

static void layer(struct chain *c) {
    add_norm(c);
    product(c, NORM, HIDDEN, W_QKV, HIDDEN, QKV, PRODUCT);
    REQUIRE(op_rope(c->stream, &(struct rope_args){.n_rows = c->n_rows, .live = c->at[LIVE], .qkv = c->at[PRODUCT],
                                                   .positions = c->at[POSITIONS], .inv_freq = c->at[FREQUENCIES], .n_heads = HEADS,
                                                   .n_kv_heads = KV_HEADS, .head_dim = D, .dtype = DTYPE_F16, .q = c->at[Q], .k = c->at[K],
                                                   .v = c->at[V]}));
    after(c);
    product(c, PRODUCT, QKV, W_O, HIDDEN, HIDDEN, PROJECTED);
    add_norm(c);
    product(c, NORM, HIDDEN, W_GATE_UP, HIDDEN, 2 * INNER, GATE_UP);
    REQUIRE(op_silu_mul(c->stream, &(struct silu_mul_args){c->n_rows, c->at[LIVE], c->at[GATE_UP], INNER, c->at[ACTIVE]}));
    after(c);
    product(c, ACTIVE, INNER, W_DOWN, INNER, HIDDEN, PROJECTED);
}

/* From the same rows each time; no buffer between begins with what an earlier run has left there. */
static void run(struct chain *c) {
    for (enum buffer b = X; b <= V; b++)
        if (b != FIRST)
            REQUIRE(stream_zero(c->stream, c->at[b], sizes[b]));
    REQUIRE(stream_copy(c->stream, c->at[X], c->at[FIRST], sizes[X]));
    for (int i = 0; i < LAYERS; i++)
        layer(c);
    REQUIRE(op_rmsnorm(c->stream, &(struct rmsnorm_args){.n_rows = c->n_rows, .live = c->at[LIVE], .x = c->at[X], .weight = c->at[WEIGHT],
                                                         .eps = 1e-5f, .hidden = HIDDEN, .out = c->at[NORM]}));
}

static void *results(struct rig *rig, const struct chain *c) {
    static const enum buffer kept[] = {X, NORM, PROJECTED, Q, K, V};
    uint8_t *all = malloc(6 * sizes[X]), *to = all;
    if (!all)
        exit(1);
    memset(all, 0, 6 * sizes[X]);
    for (size_t i = 0; i < sizeof kept / sizeof *kept; to += sizes[X], i++) {
        void *one = rig_fetch(rig, RIG_CUDA, c->at[kept[i]], sizes[kept[i]]);
        memcpy(to, one, sizes[kept[i]]);
        free(one);
    }
    return all;
}

static void expect(struct rig *rig, const struct chain *c, const void *expected, const char *how, int time) {
    void *got = results(rig, c);
    CHECK(memcmp(got, expected, 6 * sizes[X]) == 0, "%d rows, %s, run %d: other bits than one by one", c->n_rows, how, time);
    free(got);
}

static void check_chain(struct rig *rig, struct chain *c, int n_rows) {
    int32_t live = n_rows;
    struct graph *graph;
    c->n_rows = n_rows;
    rig_send(rig, RIG_CUDA, c->at[LIVE], &live, sizeof live);
    c->waits = true;
    run(c);
    void *expected = results(rig, c);
    const float *x = expected;
    CHECK(isfinite(x[0]) && isfinite(x[n_rows * HIDDEN - 1]) && x[0] != x[1], "%d rows: %g and %g", n_rows, (double)x[0], (double)x[1]);
    c->waits = false;
    for (int time = 0; time < 10; time++) {
        run(c);
        expect(rig, c, expected, "in one go", time);
    }
    REQUIRE(backend_record_begin(c->backend));
    run(c);
    REQUIRE(backend_record_end(c->backend, &graph));
    for (int time = 0; time < 10; time++) {
        REQUIRE(graph_replay(graph));
        expect(rig, c, expected, "replayed", time);
    }
    graph_close(graph);
    free(expected);
}

int main(void) {
    static struct rig rig;
    static const int rows[] = {1, 2, 8, 9, 20};
    rig_open(&rig);
    struct chain c = {.stream = rig.stream[RIG_CUDA], .backend = rig.backend[RIG_CUDA]};
    float frequencies[D / 2];
    int32_t positions[MOST_ROWS];
    for (int i = 0; i < N_BUFFERS; i++)
        c.at[i] = rig_make(&rig, sizes[i], NULL).at[RIG_CUDA];
    for (int i = 0; i < D / 2; i++)
        frequencies[i] = 1.0f / powf(500000.0f, 2.0f * (float)i / D);
    for (int i = 0; i < MOST_ROWS; i++)
        positions[i] = 1000 * i + 7;
    rig_send(&rig, RIG_CUDA, c.at[FREQUENCIES], frequencies, sizeof frequencies);
    rig_send(&rig, RIG_CUDA, c.at[POSITIONS], positions, sizeof positions);
    random_values(&c, FIRST, DTYPE_F32, 1);
    random_values(&c, WEIGHT, DTYPE_F32, 2);
    for (enum buffer b = W_QKV; b <= W_DOWN; b++)
        random_values(&c, b, DTYPE_F16, 0.05f); /* rows of 1024: sums of about one */
    REQUIRE(stream_sync(c.stream));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        check_chain(&rig, &c, rows[i]);
    rig_close(&rig);
    return test_report();
}
