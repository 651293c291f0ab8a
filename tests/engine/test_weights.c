/* What each rank loads: over all (tp, cp) splits every element of every matrix is held exactly once (Q, K and V by each cp rank of its
 * tp slice), with the file's values; a rotation leaves attention's output; GGUF's and Hugging Face's order of rows give the same. */
#include "engine/weights.h"
#include "tiny_model.h"

enum { LAYER = 1, HEADS_WIDTH = TINY_HEADS * TINY_D, KV_WIDTH = TINY_KV_HEADS * TINY_D };

static struct model_file *model;
static struct tiny_tensor tensors[TINY_TENSORS];
static float *values[TINY_TENSORS];

static int index_of(const char *name) {
    for (int i = 0; i < TINY_TENSORS; i++)
        if (strcmp(tensors[i].name, name) == 0)
            return i;
    CHECK(false, "no tensor %s", name);
    return 0;
}

static int index_in_layer(const char *rest) {
    char name[80];
    snprintf(name, sizeof name, "model.layers.%d.%s.weight", LAYER, rest);
    return index_of(name);
}

/* How often each element of a tensor is held. */
static uint8_t *held[TINY_TENSORS];

/* Rows row .. row+n_rows of tensor `index`, columns column .. +n_columns, as they lie at `got`. */
static void check_block(int index, const float *got, int64_t row, int64_t n_rows, int64_t column, int64_t n_columns) {
    int64_t width = tensors[index].columns ? tensors[index].columns : 1;
    CHECK(row >= 0 && row + n_rows <= tensors[index].rows && column >= 0 && column + n_columns <= width, "%s: rows %lld + %lld, columns %lld + %lld",
          tensors[index].name, (long long)row, (long long)n_rows, (long long)column, (long long)n_columns);
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t c = 0; c < n_columns; c++) {
            int64_t at = (row + r) * width + column + c;
            CHECK(got[r * n_columns + c] == values[index][at], "%s: row %lld, column %lld", tensors[index].name, (long long)(row + r),
                  (long long)(column + c));
            held[index][at]++;
        }
}

static struct cache_spec spec_of(const char *preset) {
    struct cache_spec spec;
    struct cache_request r = {.preset = preset, .window = -1, .sink = -1};
    REQUIRE(cache_spec_make(&r, TINY_LAYERS, &spec));
    return spec;
}

static void load(const struct model_file *file, const struct grid *grid, const char *preset, bool o_whole, const char *dtype, struct backend **b,
                 struct stream **s, struct weights *w) {
    struct cache_spec spec = spec_of(preset);
    REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, b));
    REQUIRE(stream_open(*b, s));
    REQUIRE(weights_load(file, &spec, grid, o_whole, dtype, *b, *s, w));
}

static void unload(struct backend *b, struct stream *s, struct weights *w) {
    weights_free(w);
    CHECK(backend_used(b, MEMORY_WEIGHTS) + backend_used(b, MEMORY_HOST) == 0, "bytes stay");
    weights_free(w);
    stream_close(s);
    backend_close(b);
}

static void check_rank(const struct grid *grid, bool o_whole) {
    struct backend *b;
    struct stream *s;
    struct weights w;
    load(model, grid, "f32", o_whole, "f32", &b, &s, &w);
    const struct weights_slices *k = &w.slices;
    const struct layer_weights *l = &w.layers[LAYER];
    int64_t q_rows = range_size(k->heads) * TINY_D, kv_rows = range_size(k->kv_heads) * TINY_D, inner = range_size(k->inner);
    CHECK(k->heads.begin == k->kv_heads.begin * (TINY_HEADS / TINY_KV_HEADS) && k->heads.end == k->kv_heads.end * (TINY_HEADS / TINY_KV_HEADS),
          "query heads go with their KV heads");
    const float *qkv = l->qkv.data;
    check_block(index_in_layer("self_attn.q_proj"), qkv, k->heads.begin * TINY_D, q_rows, 0, TINY_HIDDEN);
    check_block(index_in_layer("self_attn.k_proj"), qkv + q_rows * TINY_HIDDEN, k->kv_heads.begin * TINY_D, kv_rows, 0, TINY_HIDDEN);
    check_block(index_in_layer("self_attn.v_proj"), qkv + (q_rows + kv_rows) * TINY_HIDDEN, k->kv_heads.begin * TINY_D, kv_rows, 0, TINY_HIDDEN);
    check_block(index_in_layer("self_attn.o_proj"), l->o.data, 0, TINY_HIDDEN, k->o_columns.begin, range_size(k->o_columns));
    CHECK(k->o_columns.begin >= k->heads.begin * TINY_D && k->o_columns.end <= k->heads.end * TINY_D, "o_proj's columns are those of the heads");
    check_block(index_in_layer("mlp.gate_proj"), l->gate_up.data, k->inner.begin, inner, 0, TINY_HIDDEN);
    check_block(index_in_layer("mlp.up_proj"), (const float *)l->gate_up.data + inner * TINY_HIDDEN, k->inner.begin, inner, 0, TINY_HIDDEN);
    check_block(index_in_layer("mlp.down_proj"), l->down.data, 0, TINY_HIDDEN, k->inner.begin, inner);
    check_block(index_of("model.embed_tokens.weight"), w.embed.data, k->vocab.begin, range_size(k->vocab), 0, TINY_HIDDEN);
    check_block(index_of("lm_head.weight"), w.head.data, k->vocab.begin, range_size(k->vocab), 0, TINY_HIDDEN);
    check_block(index_in_layer("input_layernorm"), l->attn_norm, 0, TINY_HIDDEN, 0, 1);
    check_block(index_in_layer("post_attention_layernorm"), l->mlp_norm, 0, TINY_HIDDEN, 0, 1);
    check_block(index_of("model.norm.weight"), w.final_norm, 0, TINY_HIDDEN, 0, 1);
    CHECK(w.layer_sliced_bytes == weights_sliced_bytes(model_file_config(model), k, DTYPE_F32, o_whole), "bytes of a layer's slices");
    size_t told = (size_t)weights_slices_bytes(model_file_config(model), k, 4), vectors = (size_t)(TINY_HIDDEN * (1 + 2 * TINY_LAYERS) + TINY_D / 2) * 4;
    CHECK(backend_used(b, MEMORY_WEIGHTS) == told + vectors, "%zu bytes, expected %zu", backend_used(b, MEMORY_WEIGHTS), told + vectors);
    unload(b, s, &w);
}

static void check_split(int tp, int cp, bool o_whole) {
    for (int i = 0; i < TINY_TENSORS; i++)
        memset(held[i], 0, (size_t)tiny_count(&tensors[i]));
    for (int t = 0; t < tp; t++)
        for (int c = 0; c < cp; c++)
            check_rank(&(struct grid){1, tp, cp, 0, t, c}, o_whole);
    static const char *const by_cp[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"};
    static const char *const once[] = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};
    for (int i = 0; i < 8; i++) {
        int index = i < 3 ? index_in_layer(by_cp[i]) : i < 6 ? index_in_layer(once[i - 3]) : i == 6 ? index_of("lm_head.weight") : index_of("model.embed_tokens.weight");
        for (int64_t k = 0; k < tiny_count(&tensors[index]); k++)
            CHECK(held[index][k] == (i < 3 ? cp : 1), "tp %d, cp %d: %s, element %lld is held %d times", tp, cp, tensors[index].name, (long long)k,
                  held[index][k]);
    }
    int o = index_in_layer("self_attn.o_proj");
    for (int64_t k = 0; k < tiny_count(&tensors[o]); k++)
        CHECK(held[o][k] == (o_whole ? cp : 1), "tp %d, cp %d: o_proj, element %lld", tp, cp, (long long)k);
}

/* sum over ranks of W_o (for every head: a mix of values of its KV head): what attention gives for fixed weights of its tokens. */
static void attention_output(const char *preset, int tp, int cp, double *out) {
    memset(out, 0, TINY_HIDDEN * sizeof *out);
    for (int rank = 0; rank < tp * cp; rank++) {
        struct backend *b;
        struct stream *s;
        struct weights w;
        struct grid grid = {1, tp, cp, 0, rank / cp, rank % cp};
        load(model, &grid, preset, false, "f32", &b, &s, &w);
        const struct layer_weights *l = &w.layers[LAYER];
        int64_t q_rows = range_size(w.slices.heads) * TINY_D, kv_rows = range_size(w.slices.kv_heads) * TINY_D;
        const float *v = (const float *)l->qkv.data + (q_rows + kv_rows) * TINY_HIDDEN, *o = l->o.data;
        for (int64_t c = 0; c < range_size(w.slices.o_columns); c++) {
            int64_t column = w.slices.o_columns.begin + c, head = column / TINY_D, kv_head = head / (TINY_HEADS / TINY_KV_HEADS);
            int64_t row = (kv_head - w.slices.kv_heads.begin) * TINY_D + column % TINY_D;
            double mixed = 0;
            for (int i = 0; i < TINY_HIDDEN; i++)
                mixed += (double)v[row * TINY_HIDDEN + i] * (double)test_normal(9 + (uint64_t)head, (uint64_t)i);
            for (int i = 0; i < TINY_HIDDEN; i++)
                out[i] += mixed * (double)o[i * range_size(w.slices.o_columns) + c];
        }
        unload(b, s, &w);
    }
}

static void check_rotation(void) {
    double plain[TINY_HIDDEN], rotated[TINY_HIDDEN];
    struct backend *b;
    struct stream *s;
    struct weights w;
    attention_output("f32", 1, 1, plain);
    for (int cp = 1; cp <= 5; cp += 2) { /* o_proj is cut within heads: whole heads are rotated all the same */
        attention_output("hadv", cp == 3 ? 2 : 1, cp, rotated);
        for (int i = 0; i < TINY_HIDDEN; i++) /* sums of 768 products of about 0.06, each rounded to float after the rotation */
            CHECK(fabs(plain[i] - rotated[i]) <= 1e-5, "cp %d: %g, rotated %g", cp, plain[i], rotated[i]);
    }
    load(model, &(struct grid){1, 1, 1, 0, 0, 0}, "hadv", false, "f32", &b, &s, &w);
    const float *v = (const float *)w.layers[LAYER].qkv.data + (HEADS_WIDTH + KV_WIDTH) * TINY_HIDDEN;
    const float *plain_v = values[index_in_layer("self_attn.v_proj")];
    for (int r = 0; r < TINY_D; r++) { /* head 0: v' = H v, H[r][k] = (-1)^popcount(r & k) / sqrt(d) */
        double sum = 0;
        for (int k = 0; k < TINY_D; k++)
            sum += (__builtin_popcount((unsigned)(r & k)) % 2 ? -1.0 : 1.0) / sqrt(TINY_D) * (double)plain_v[k * TINY_HIDDEN + 7];
        CHECK(fabs(sum - (double)v[r * TINY_HIDDEN + 7]) <= 1e-6, "row %d: %g, expected %g", r, (double)v[r * TINY_HIDDEN + 7], sum);
    }
    unload(b, s, &w);
}

/* A tiny GGUF of one layer, whose Q and K rows are permuted: row h d + 2 i + j holds Hugging Face's row h d + j d/2 + i. The down
 * projection is of type `down`, GGUF's number `down_type`: hashed bytes where that is a block format. */
enum { G_HIDDEN = 64, G_HEADS = 2, G_D = 64, G_INNER = 512, G_VOCAB = 8, G_DOWN = 10 };

static const char *save_gguf(enum dtype down, uint32_t down_type) {
    static const struct {
        const char *name;
        uint64_t rows, columns;
    } parts[] = {{"token_embd.weight", G_VOCAB, G_HIDDEN},
                 {"output_norm.weight", G_HIDDEN, 0},
                 {"blk.0.attn_norm.weight", G_HIDDEN, 0},
                 {"blk.0.ffn_norm.weight", G_HIDDEN, 0},
                 {"blk.0.attn_q.weight", G_HEADS * G_D, G_HIDDEN},
                 {"blk.0.attn_k.weight", G_D, G_HIDDEN},
                 {"blk.0.attn_v.weight", G_D, G_HIDDEN},
                 {"blk.0.attn_output.weight", G_HIDDEN, G_HEADS * G_D},
                 {"blk.0.ffn_gate.weight", G_INNER, G_HIDDEN},
                 {"blk.0.ffn_up.weight", G_INNER, G_HIDDEN},
                 {"blk.0.ffn_down.weight", G_HIDDEN, G_INNER}};
    enum { N = sizeof parts / sizeof *parts };
    struct maker m = {0};
    uint64_t offset = 0;
    maker_gguf_head(&m, 3, N, 10);
    maker_gguf_text(&m, "general.architecture", "llama");
    maker_gguf_u32(&m, "llama.block_count", 1);
    maker_gguf_u32(&m, "llama.context_length", 256);
    maker_gguf_u32(&m, "llama.embedding_length", G_HIDDEN);
    maker_gguf_u32(&m, "llama.feed_forward_length", G_INNER);
    maker_gguf_u32(&m, "llama.attention.head_count", G_HEADS);
    maker_gguf_u32(&m, "llama.attention.head_count_kv", 1);
    maker_gguf_u32(&m, "llama.attention.key_length", G_D);
    maker_gguf_u32(&m, "llama.attention.value_length", G_D);
    maker_gguf_f32(&m, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    for (int i = 0; i < N; i++) {
        maker_gguf_info(&m, parts[i].name, parts[i].rows, parts[i].columns, i == G_DOWN ? down_type : 0, offset);
        offset += parts[i].rows * (parts[i].columns ? parts[i].columns : 1) * sizeof(float);
    }
    maker_align(&m, 32);
    for (int i = 0; i < (down == DTYPE_F32 ? N : G_DOWN); i++)
        for (uint64_t r = 0; r < parts[i].rows; r++)
            for (uint64_t c = 0; c < (parts[i].columns ? parts[i].columns : 1); c++) {
                float x = (float)(1000 * i) + (float)r + (float)c / 128; /* tells tensor, row and column */
                maker_put(&m, &x, sizeof x);
            }
    for (size_t i = 0; down != DTYPE_F32 && i < dtype_bytes(down, (int64_t)G_HIDDEN * G_INNER); i++) {
        uint8_t byte = (uint8_t)test_hash(11, i);
        maker_put(&m, &byte, 1);
    }
    return maker_save(&m, "tiny.gguf");
}

static void check_gguf(void) {
    struct model_file *file;
    struct backend *b;
    struct stream *s;
    struct weights w;
    REQUIRE(model_file_open(save_gguf(DTYPE_F32, 0), &file));
    struct cache_spec spec = spec_of("f32");
    spec.n_layers = 1;
    REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, &b));
    REQUIRE(stream_open(b, &s));
    REQUIRE(weights_load(file, &spec, &(struct grid){1, 1, 1, 0, 0, 0}, false, "f32", b, s, &w));
    const float *qkv = w.layers[0].qkv.data;
    for (int row = 0; row < (G_HEADS + 2) * G_D; row++) {
        int head = row / G_D, in_head = row % G_D, tensor = head < G_HEADS ? 4 : head == G_HEADS ? 5 : 6;
        int stored = tensor == 6 ? in_head : 2 * (in_head % (G_D / 2)) + in_head / (G_D / 2);
        stored += tensor == 4 ? head * G_D : 0;
        for (int c = 0; c < G_HIDDEN; c++)
            CHECK(qkv[row * G_HIDDEN + c] == (float)(1000 * tensor) + (float)stored + (float)c / 128, "row %d, column %d: %g", row, c,
                  (double)qkv[row * G_HIDDEN + c]);
    }
    CHECK(w.head.data == w.embed.data, "a tied head shares the embedding");
    weights_free(&w);
    stream_close(s);
    backend_close(b);
    model_file_close(file);
}

/* Every rank's columns of the down projection, cut at multiples of 16 inside blocks, are those of the whole row. */
static void check_block_columns(enum dtype dtype, uint32_t type, int cp) {
    static float row[G_INNER];
    struct model_file *file;
    REQUIRE(model_file_open(save_gguf(dtype, type), &file));
    const struct model_tensor *t = model_file_find(file, "model.layers.0.mlp.down_proj.weight");
    CHECK(t->dtype == dtype, "%s, expected %s", dtype_name(t->dtype), dtype_name(dtype));
    int64_t n_columns = 0;
    for (int rank = 0; rank < cp; rank++) {
        struct backend *b;
        struct stream *s;
        struct weights w;
        struct cache_spec spec = spec_of("f32");
        spec.n_layers = 1;
        REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, &b));
        REQUIRE(stream_open(b, &s));
        REQUIRE(weights_load(file, &spec, &(struct grid){1, 1, cp, 0, 0, rank}, false, "f32", b, s, &w));
        int64_t width = range_size(w.slices.inner);
        for (int64_t r = 0; r < G_HIDDEN; r++) {
            dtype_widen(dtype, model_file_row(t, r), row, G_INNER);
            CHECK(memcmp(row + w.slices.inner.begin, (const float *)w.layers[0].down.data + r * width, (size_t)width * sizeof *row) == 0,
                  "%s: rank %d of %d, row %lld", dtype_name(dtype), rank, cp, (long long)r);
        }
        n_columns += width;
        unload(b, s, &w);
    }
    CHECK(n_columns == G_INNER, "%s: %lld columns", dtype_name(dtype), (long long)n_columns);
    model_file_close(file);
}

static void check_blocks(void) {
    static const struct {
        enum dtype dtype;
        uint32_t type; /* in GGUF */
    } rows[] = {{DTYPE_Q4_0, 2}, {DTYPE_Q4_1, 3},  {DTYPE_Q5_0, 6},  {DTYPE_Q5_1, 7},
                {DTYPE_Q8_0, 8}, {DTYPE_Q4_K, 12}, {DTYPE_Q5_K, 13}, {DTYPE_Q6_K, 14}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int cp = 1; cp <= 5; cp += 2)
            check_block_columns(rows[i].dtype, rows[i].type, cp);
}

/* 16-bit weights are the file's values rounded once; what does not fit 16 bits, and unknown words, are refused. */
static void check_types(void) {
    struct backend *b;
    struct stream *s;
    struct weights w;
    load(model, &(struct grid){1, 1, 1, 0, 0, 0}, "fp16", false, "auto", &b, &s, &w);
    CHECK(w.dtype == DTYPE_F16, "%s", dtype_name(w.dtype));
    const uint16_t *down = w.layers[LAYER].down.data;
    const float *expected = values[index_in_layer("mlp.down_proj")];
    for (int64_t i = 0; i < (int64_t)TINY_HIDDEN * TINY_INNER; i++)
        CHECK(down[i] == dtype_to_f16(expected[i]), "element %lld", (long long)i);
    struct cache_spec spec = spec_of("fp16");
    struct weights none;
    CHECK_FAILS(weights_load(model, &spec, &(struct grid){1, 1, 1, 0, 0, 0}, false, "f64", b, s, &none), STATUS_USAGE, "weights 'f64'");
    unload(b, s, &w);
}

int main(void) {
    char *folder = tiny_model("model", 0);
    REQUIRE(model_file_open(folder, &model));
    tiny_tensors(tensors);
    for (int i = 0; i < TINY_TENSORS; i++) {
        values[i] = malloc((size_t)tiny_count(&tensors[i]) * sizeof(float));
        held[i] = malloc((size_t)tiny_count(&tensors[i]));
        for (int64_t k = 0; k < tiny_count(&tensors[i]); k++)
            values[i][k] = tiny_value(&tensors[i], i, k);
    }
    for (int tp = 1; tp <= 6; tp++)
        for (int cp = 1; TINY_KV_HEADS % tp == 0 && tp * cp <= 6; cp++) {
            check_split(tp, cp, false);
            check_split(tp, cp, true);
        }
    check_rotation();
    check_gguf();
    check_blocks();
    check_types();
    for (int i = 0; i < TINY_TENSORS; i++) {
        free(values[i]);
        free(held[i]);
    }
    model_file_close(model);
    free(folder);
    return test_report();
}
