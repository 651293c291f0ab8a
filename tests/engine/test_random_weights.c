/* Shape files, and the engine that needs no model: shapes against the parameter counts that their models are published with, weights the
 * same in every layout, decoding in a cache of random pages with numbers that are numbers, the same on a device that is late. */
#include "engine/engine_impl.h"
#include "file_maker.h"
#include "test.h"

enum { MOST_NEW = 6, N_SEQS = 2 };

/* ---- shape files ---------------------------------------------------------------------------------------------------------- */

static int64_t n_parameters(const struct model_config *c) {
    int64_t hidden = c->hidden, heads = (int64_t)c->n_heads * c->head_dim, kv = (int64_t)c->n_kv_heads * c->head_dim;
    int64_t layer = hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * c->intermediate + 2 * hidden;
    layer += (c->qkv_bias ? heads + 2 * kv : 0) + (c->qk_norm ? 2 * c->head_dim : 0);
    return (c->tied ? 1 : 2) * hidden * c->vocab + c->n_layers * layer + hidden;
}

static void check_shapes(void) {
    static const struct {
        const char *name;
        int64_t n_parameters; /* of the model cards */
    } shapes[] = {{"llama-3.1-8b", 8030261248}, {"llama-3.2-3b", 3212749824}, {"llama-2-7b", 6738415616}, {"qwen2.5-7b", 7615616512},
                  {"qwen3-8b", 8190735360}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        char path[512];
        struct model_file *file;
        snprintf(path, sizeof path, TEST_FILE("../configs/models/%s.conf"), shapes[i].name);
        REQUIRE(model_file_open_shape(path, &file));
        CHECK(n_parameters(model_file_config(file)) == shapes[i].n_parameters, "%s: %lld parameters", path,
              (long long)n_parameters(model_file_config(file)));
        CHECK(model_file_is_shape(file) && strcmp(model_file_format(file), "shape") == 0, "%s", path);
        model_file_close(file);
        CHECK_FAILS(model_file_open(path, &file), STATUS_INPUT, "a shape without weights is for kvlinc bench");
    }
}

/* The test's shape with `add` after it and the line that begins with `leave_out` left out, in a file. */
static const char *write_shape(const char *leave_out, const char *add) {
    char text[4096], line[256];
    int n = 0;
    FILE *from = fopen(TEST_FILE("launch/shape.conf"), "re");
    if (!from)
        exit(1);
    while (fgets(line, sizeof line, from))
        if (!*leave_out || strncmp(line, leave_out, strlen(leave_out)) != 0)
            n += snprintf(text + n, sizeof text - (size_t)n, "%s", line);
    fclose(from);
    n += snprintf(text + n, sizeof text - (size_t)n, "%s\n", add);
    return maker_write("shape.conf", text, (size_t)n);
}

static int try_shape(const char *leave_out, const char *add) {
    struct model_file *file;
    int status = model_file_open_shape(write_shape(leave_out, add), &file);
    if (status == STATUS_OK)
        model_file_close(file);
    return status;
}

static void check_errors(void) {
    struct model_file *file;
    CHECK(try_shape("", "  # only a comment") == STATUS_OK, "%s", base_error());
    CHECK_FAILS(try_shape("heads", ""), STATUS_INPUT, "heads is missing");
    CHECK_FAILS(try_shape("", "colour = red"), STATUS_INPUT, "line 20: 'colour' is no field of a shape");
    CHECK_FAILS(try_shape("", "layers = 3"), STATUS_INPUT, "layers is there twice");
    CHECK_FAILS(try_shape("layers", "layers = two"), STATUS_INPUT, "layers: 'two', expected a whole number");
    CHECK_FAILS(try_shape("layers", "layers = 0"), STATUS_INPUT, "layers: 0");
    CHECK_FAILS(try_shape("qkv_bias", "qkv_bias = maybe"), STATUS_INPUT, "expected yes or no");
    CHECK_FAILS(try_shape("rope_theta", "rope_theta = 1x"), STATUS_INPUT, "rope_theta: '1x', expected a number");
    CHECK_FAILS(try_shape("rope_factor", ""), STATUS_INPUT, "rope factor");
    CHECK_FAILS(try_shape("shape", "shape = qwen9"), STATUS_INPUT, "qwen9 is not supported");
    CHECK_FAILS(try_shape("head_dim", "head_dim = 96"), STATUS_INPUT, "head_dim 96");
    CHECK_FAILS(try_shape("", "word"), STATUS_INPUT, "expected name = value");
    CHECK_FAILS(model_file_open_shape("/nowhere.conf", &file), STATUS_INPUT, "/nowhere.conf");
}

/* ---- weights -------------------------------------------------------------------------------------------------------------- */

struct slice {
    struct backend *backend;
    struct stream *stream;
    struct weights w;
};

static void slice_load(struct slice *s, const struct model_file *file, struct grid grid) {
    struct cache_spec spec;
    REQUIRE(cache_spec_make(&(struct cache_request){.preset = "hadv", .window = -1, .sink = -1}, model_file_config(file)->n_layers, &spec));
    REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, &s->backend));
    REQUIRE(stream_open(s->backend, &s->stream));
    REQUIRE(weights_load(file, &spec, &grid, false, "auto", s->backend, s->stream, &s->w));
}

static void slice_free(struct slice *s) {
    weights_free(&s->w);
    stream_close(s->stream);
    backend_close(s->backend);
}

/* Rows of `part` are those of `whole` from (row, column) on. */
static void check_matrix(const struct matrix *part, const struct matrix *whole, int64_t row, int64_t column, const char *what) {
    const uint16_t *p = part->data, *w = whole->data;
    for (int64_t r = 0; r < part->n_out; r++)
        CHECK(memcmp(p + r * part->n_in, w + (row + r) * whole->n_in + column, (size_t)part->n_in * sizeof *p) == 0, "%s: row %lld", what,
              (long long)r);
}

static void check_layout(const struct model_file *file, const struct slice *whole, struct grid grid) {
    struct slice s;
    const struct model_config *c = model_file_config(file);
    slice_load(&s, file, grid);
    const struct weights_slices *at = &s.w.slices;
    check_matrix(&s.w.embed, &whole->w.embed, at->vocab.begin, 0, "embedding");
    check_matrix(&s.w.head, &whole->w.head, at->vocab.begin, 0, "head");
    for (int i = 0; i < c->n_layers; i++) {
        const struct layer_weights *l = &s.w.layers[i], *all = &whole->w.layers[i];
        struct matrix q = {l->qkv.data, range_size(at->heads) * c->head_dim, c->hidden}, up = l->gate_up;
        up.n_out /= 2;
        up.data = (uint16_t *)l->gate_up.data + up.n_out * up.n_in;
        check_matrix(&q, &all->qkv, at->heads.begin * c->head_dim, 0, "q");
        check_matrix(&l->o, &all->o, 0, at->o_columns.begin, "o");
        check_matrix(&up, &all->gate_up, c->intermediate + at->inner.begin, 0, "up");
        check_matrix(&l->down, &all->down, 0, at->inner.begin, "down");
        CHECK(memcmp(l->attn_norm, all->attn_norm, (size_t)c->hidden * sizeof(float)) == 0, "norm of layer %d", i);
        if (c->qk_norm) { /* of all heads alike */
            size_t bytes = (size_t)c->head_dim * sizeof(float);
            CHECK(memcmp(l->q_norm, all->q_norm, bytes) == 0 && memcmp(l->k_norm, all->k_norm, bytes) == 0, "norms of heads, layer %d", i);
            CHECK(memcmp(l->q_norm, l->k_norm, bytes) != 0, "norms of layer %d: q's are k's", i);
        }
        CHECK(c->qk_norm == (l->q_norm && l->k_norm), "norms of heads, layer %d", i);
        const float *bias = all->qkv_bias + at->heads.begin * c->head_dim;
        CHECK(memcmp(l->qkv_bias, bias, (size_t)q.n_out * sizeof *bias) == 0, "bias of layer %d", i);
    }
    slice_free(&s);
}

/* Mean and deviation of n uniform numbers: within five deviations of theirs. */
static void check_size(const struct matrix *m) {
    int64_t n = m->n_out * m->n_in;
    double sum = 0, squares = 0, width = 0.035 / sqrt(3.0);
    for (int64_t i = 0; i < n; i++) {
        double x = (double)dtype_from_bf16(((const uint16_t *)m->data)[i]);
        sum += x;
        squares += x * x;
    }
    CHECK(fabs(sum / (double)n) < 5 * width / sqrt((double)n), "mean %g of %lld", sum / (double)n, (long long)n);
    CHECK(fabs(sqrt(squares / (double)n) / width - 1) < 5 / sqrt((double)n), "deviation %g", sqrt(squares / (double)n));
}

static void check_weights(const struct model_file *file) {
    struct slice whole;
    slice_load(&whole, file, (struct grid){1, 1, 1, 0, 0, 0});
    CHECK(whole.w.dtype == DTYPE_BF16 && whole.w.head.data != whole.w.embed.data, "%s", dtype_name(whole.w.dtype));
    check_size(&whole.w.embed);
    check_size(&whole.w.layers[1].qkv);
    check_size(&whole.w.layers[0].down);
    CHECK(memcmp(whole.w.layers[0].qkv.data, whole.w.layers[1].qkv.data, 1024) != 0, "two layers are alike");
    for (int tp = 1; tp <= 2; tp++)
        for (int cp = 1; cp <= 3; cp++)
            for (int rank = 0; rank < tp * cp; rank++)
                check_layout(file, &whole, (struct grid){1, tp, cp, 0, rank / cp, rank % cp});
    slice_free(&whole);
}

/* ---- the engine ----------------------------------------------------------------------------------------------------------- */

struct outcome {
    int n[N_SEQS];
    int32_t token[N_SEQS][MOST_NEW];
    float logprob[N_SEQS][MOST_NEW];
};

static struct engine_options options_of(const char *device, const char *cache) {
    return (struct engine_options){.model = TEST_FILE("launch/shape.conf"), .device = device, .cache = cache, .window = -1, .sink = 16,
                                   .context = 5000, .max_batch = N_SEQS, .threads = 1, .random_weights = true, .assume_prompts = true};
}

static void submit(struct engine *e, int n_prompt, int which, int64_t *id) {
    static int32_t prompt[5000];
    struct engine_request r;
    engine_request_init(&r);
    for (int i = 0; i < n_prompt; i++)
        prompt[i] = (int32_t)(test_hash((uint64_t)which, (uint64_t)i) % (uint64_t)engine_model(e)->vocab);
    r.prompt = prompt;
    r.n_prompt = n_prompt;
    r.max_tokens = MOST_NEW;
    r.temperature = 0;
    r.logprobs = 0;
    r.ignore_eos = true;
    REQUIRE(engine_submit(e, &r, id));
    r.prompt_logprobs = 0;
    if (which == 0 && n_prompt > 1000)
        CHECK_FAILS(engine_submit(e, &r, id), STATUS_INPUT, "cannot be scored");
}

static void serve(struct engine *e, const int lengths[N_SEQS], struct outcome *out) {
    struct engine_event event;
    int64_t id[N_SEQS];
    memset(out, 0, sizeof *out);
    for (int i = 0; i < N_SEQS; i++)
        submit(e, lengths[i], i, &id[i]);
    for (int more = 1; more;) {
        more = engine_step(e);
        REQUIRE(more);
        while (engine_next_event(e, &event))
            for (int i = 0; i < N_SEQS; i++)
                if (event.kind == ENGINE_TOKEN && event.id == id[i]) {
                    out->token[i][out->n[i]] = event.token.id;
                    out->logprob[i][out->n[i]++] = event.token.logprob;
                }
    }
    for (int i = 0; i < N_SEQS; i++) {
        CHECK(out->n[i] == MOST_NEW, "%d tokens after %d", out->n[i], lengths[i]);
        for (int k = 0; k < out->n[i]; k++)
            CHECK(isfinite(out->logprob[i][k]) && out->logprob[i][k] < 0, "length %d, token %d: %g", lengths[i], k,
                  (double)out->logprob[i][k]);
    }
}

/* Lengths around block borders: the pages taken at admission and those that decoding flushes follow on each other (cache_take_page). */
static void check_decode(struct comm *world, const char *cache, bool corrects) {
    static const int lengths[][N_SEQS] = {{1, 2}, {128, 129}, {256, 257}, {258, 384}, {385, 4800}};
    static struct outcome one, late;
    struct place place = {.n_cores = 1, .memory_bytes = (int64_t)1 << 30};
    struct engine *e[2];
    for (int i = 0; i < 2; i++) {
        struct engine_options options = options_of(i ? "cpu-async" : "cpu", cache);
        REQUIRE(engine_open(world, &options, &place, &e[i]));
    }
    struct engine_memory m;
    engine_memory(e[0], &m);
    CHECK(strcmp(engine_cache_name(e[0]), cache) == 0 && (m.states > 0) == corrects && engine_tokenizer(e[0]) == NULL, "%s", cache);
    CHECK(engine_fits(e[0], 5000) == N_SEQS, "%d fit", engine_fits(e[0], 5000));
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        serve(e[0], lengths[i], &one);
        serve(e[1], lengths[i], &late);
        CHECK(memcmp(&one, &late, sizeof one) == 0, "%s: lengths %d and %d: a late device gives other tokens", cache, lengths[i][0],
              lengths[i][1]);
    }
    engine_close(e[0]);
    engine_close(e[1]);
}

/* Room for the pages of one sequence and a half. */
static void check_fits(struct comm *world) {
    struct place place = {.n_cores = 1, .memory_bytes = (int64_t)1 << 30};
    struct engine_options options = options_of("cpu", "fp16");
    struct engine *e;
    options.cache_memory = 9 << 20; /* 5000 tokens of 1 KiB and two sequences' slots */
    REQUIRE(engine_open(world, &options, &place, &e));
    CHECK(engine_fits(e, 5000) == 1 && engine_fits(e, 2000) == 2 && engine_fits(e, 20) == 2, "%d, %d fit", engine_fits(e, 5000),
          engine_fits(e, 2000));
    engine_close(e);
    options.cache_memory = 3 << 20;
    CHECK_FAILS(engine_open(world, &options, &place, &e), STATUS_MEMORY, "does not fit");
    options.calibration = "some.safetensors";
    CHECK_FAILS(engine_open(world, &options, &place, &e), STATUS_USAGE, "some.safetensors");
}

/* Without assumed prompts the same engine reads them. */
static void check_prefill(struct comm *world) {
    static struct outcome out;
    struct place place = {.n_cores = 1, .memory_bytes = (int64_t)1 << 30};
    struct engine_options options = options_of("cpu", "kvlinc");
    struct engine *e;
    options.assume_prompts = false;
    options.context = 1000;
    REQUIRE(engine_open(world, &options, &place, &e));
    serve(e, (int[]){40, 700}, &out);
    engine_close(e);
}

int main(int argc, char **argv) {
    struct model_file *file;
    struct comm *world;
    check_shapes();
    check_errors();
    REQUIRE(model_file_open_shape(TEST_FILE("launch/shape.conf"), &file));
    check_weights(file);
    model_file_close(file);
    REQUIRE(model_file_open_shape(write_shape("shape", "shape = qwen3"), &file));
    check_weights(file);
    model_file_close(file);
    REQUIRE(comm_start("self", 60, &argc, &argv, &world));
    check_decode(world, "fp16", false);
    check_decode(world, "kivi", false);
    check_decode(world, "kvlinc", true);
    check_fits(world);
    check_prefill(world);
    comm_finish(world);
    return test_report();
}
