/* Loading: every tensor is found by name once, widened row by row from the mapped file, sliced, rotated where the cache wants it, and
 * narrowed into backend memory through one small host buffer. Peak memory is the slice plus that buffer. */
#include "engine/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/map_file.h"

enum {
    SLICE_UNIT = 16,             /* columns and rows are cut at multiples of a vector register */
    STAGE_BYTES = 8 << 20,       /* host buffer through which weights reach the device */
    NAME_BYTES = 128,
    REST_BYTES = 64,
};

void weights_slices_make(const struct model_config *c, int tp, int tp_rank, int cp, int cp_rank, bool o_whole,
                         struct weights_slices *out) {
    out->heads = shard_range(c->n_heads, c->n_heads / c->n_kv_heads, tp, tp_rank);
    out->kv_heads = shard_range(c->n_kv_heads, 1, tp, tp_rank);
    int64_t columns = (int64_t)c->n_heads * c->head_dim;
    out->o_columns = o_whole ? shard_nested(columns, SLICE_UNIT, tp, tp_rank, 1, 0)
                             : shard_nested(columns, SLICE_UNIT, tp, tp_rank, cp, cp_rank);
    out->inner = shard_nested(c->intermediate, SLICE_UNIT, tp, tp_rank, cp, cp_rank);
    out->vocab = shard_nested(c->vocab, SLICE_UNIT, tp, tp_rank, cp, cp_rank);
}

static int64_t sliced_values(const struct model_config *c, const struct weights_slices *s, bool o_whole) {
    int64_t o = o_whole ? 0 : range_size(s->o_columns);
    return c->hidden * (o + 3 * range_size(s->inner));
}

size_t weights_sliced_bytes(const struct model_config *c, const struct weights_slices *s, enum dtype dtype, bool o_whole) {
    return dtype_bytes(dtype, sliced_values(c, s, o_whole));
}

int64_t weights_slices_bytes(const struct model_config *c, const struct weights_slices *s, int element) {
    int64_t qkv = (range_size(s->heads) + 2 * range_size(s->kv_heads)) * c->head_dim;
    int64_t layer = c->hidden * (qkv + range_size(s->o_columns) + 3 * range_size(s->inner));
    int64_t vocab = range_size(s->vocab) * c->hidden * (c->tied ? 1 : 2);
    return (c->n_layers * layer + vocab) * element;
}

int64_t weights_norm_values(const struct model_config *c) {
    int64_t of_heads = c->qk_norm ? 2 * c->head_dim : 0;
    return c->n_layers * (2 * (int64_t)c->hidden + of_heads) + c->hidden;
}

/* ---- rotation ------------------------------------------------------------------------------------------------------ */

/* x <- x H for `n` groups of d values `stride` apart; H the orthonormal Sylvester-Hadamard matrix (symmetric). */
static void rotate(float *x, int d, int64_t stride, int64_t n) {
    float scale = (float)(1.0 / sqrt((double)d));
    for (int64_t g = 0; g < n; g++) {
        float *v = x + g;
        for (int half = 1; half < d; half *= 2)
            for (int i = 0; i < d; i++)
                if (!(i & half)) {
                    float a = v[i * stride], b = v[(i + half) * stride];
                    v[i * stride] = a + b;
                    v[(i + half) * stride] = a - b;
                }
        for (int i = 0; i < d; i++)
            v[i * stride] *= scale;
    }
}

/* ---- staging ------------------------------------------------------------------------------------------------------- */

struct loader {
    const struct model_file *file;
    const struct model_config *config;
    struct backend *backend;
    struct stream *stream;
    enum dtype dtype;
    void *stage;   /* MEMORY_HOST, STAGE_BYTES */
    float *wide;   /* rows in float, STAGE_BYTES */
    bool made_up;  /* no tensors: a shape file */
};

/* What is taken of one tensor: rows [row, row + n_rows), columns [column, column + n_columns). */
struct part {
    const struct model_tensor *tensor;
    int64_t row, n_rows, column, n_columns;
    int rotate_rows;    /* d: groups of d rows are rotated (W_v) */
    int rotate_columns; /* d: groups of d columns are rotated (W_o) */
};

static int find(const struct loader *l, const char *name, const struct model_tensor **out) {
    *out = model_file_find(l->file, name);
    if (!*out)
        FAIL(STATUS_INPUT, "%s: tensor %s is missing", model_file_path(l->file), name);
    return STATUS_OK;
}

/* Widens the columns of one row that contain [first, last) into `out`, cut exactly. */
static void widen_columns(const struct model_tensor *t, int64_t row, int64_t first, int64_t last, float *out, float *scratch) {
    int block = dtype_block(t->dtype);
    int64_t from = first / block * block, to = round_up(last, block);
    const uint8_t *data = (const uint8_t *)model_file_row(t, row) + dtype_bytes(t->dtype, from);
    if (from == first && to == last) {
        dtype_widen(t->dtype, data, out, last - first);
        return;
    }
    dtype_widen(t->dtype, data, scratch, to - from);
    memcpy(out, scratch + (first - from), (size_t)(last - first) * sizeof *out);
}

static int check_range(const struct loader *l, const struct part *p, const float *values, int64_t n) {
    if (l->dtype != DTYPE_F16)
        return STATUS_OK;
    for (int64_t i = 0; i < n; i++)
        if (!(fabsf(values[i]) < 65520.0f)) /* rounds to infinity from here on */
            FAIL(STATUS_INPUT, "%s: %s has the value %g, which 16-bit floats cannot hold: run with --weights f32",
                 model_file_path(l->file), p->tensor->name, (double)values[i]);
    return STATUS_OK;
}

/* Copies `part` to device memory at `to`, rows one after the other. */
static int load_part(const struct loader *l, const struct part *p, void *to) {
    int64_t first = p->column, last = p->column + p->n_columns;
    if (p->rotate_columns) { /* whole heads are needed to rotate a part of one */
        first = first / p->rotate_columns * p->rotate_columns;
        last = round_up(last, p->rotate_columns);
    }
    int64_t width = last - first, group = p->rotate_rows ? p->rotate_rows : 1;
    int64_t capacity = STAGE_BYTES / (int64_t)sizeof(float) / (width + 2 * DTYPE_MOST_BLOCK) / group * group;
    if (capacity < group)
        FAIL(STATUS_INPUT, "%s: rows of %s are too long: %lld values", model_file_path(l->file), p->tensor->name, (long long)width);
    float *scratch = l->wide + capacity * width;
    for (int64_t done = 0; done < p->n_rows && p->n_columns > 0; done += capacity) {
        int64_t n = min_i64(capacity, p->n_rows - done);
        for (int64_t i = 0; i < n; i++)
            widen_columns(p->tensor, model_file_row_index(p->tensor, p->row + done + i, l->config->head_dim), first, last,
                          l->wide + i * width, scratch);
        if (p->rotate_rows)
            for (int64_t g = 0; g < n / group; g++)
                rotate(l->wide + g * group * width, p->rotate_rows, width, width);
        if (p->rotate_columns)
            for (int64_t i = 0; i < n * (width / p->rotate_columns); i++)
                rotate(l->wide + i * p->rotate_columns, p->rotate_columns, 1, 1);
        for (int64_t i = 0; i < n; i++) {
            const float *row = l->wide + i * width + (p->column - first);
            TRY(check_range(l, p, row, p->n_columns));
            dtype_narrow(l->dtype, row, (uint8_t *)l->stage + dtype_bytes(l->dtype, i * p->n_columns), p->n_columns);
        }
        TRY(stream_copy_in(l->stream, (uint8_t *)to + dtype_bytes(l->dtype, done * p->n_columns), l->stage,
                           dtype_bytes(l->dtype, n * p->n_columns)));
        TRY(stream_sync(l->stream)); /* the stage is used again */
    }
    if (p->n_rows > 0) /* else a rank would hold the file's form of its slice beside its own */
        map_file_drop(model_file_row(p->tensor, p->row), (size_t)p->n_rows * model_file_row_bytes(p->tensor));
    return STATUS_OK;
}

/* ---- made-up weights ----------------------------------------------------------------------------------------------- */

/* Uniform numbers of the size of a trained model's, by tensor name and place: the same model in every layout, rotated or not. */
static const float MADE_UP_RANGE = 0.035f; /* standard deviation 0.02, as such models are initialized */
static const float MADE_UP_NORM = 0.1f;    /* norm weights: 1 +- this */
#define MADE_UP_STRIDE ((int64_t)1 << 32)  /* between rows: more than any has columns */

static int make_up_part(const struct loader *l, const char *name, const struct part *p, void *to) {
    return op_fill_random(l->stream, &(struct fill_random_args){.data = to, .dtype = l->dtype, .n_rows = p->n_rows,
                                                                .n_columns = p->n_columns, .first = p->row * MADE_UP_STRIDE + p->column,
                                                                .stride = MADE_UP_STRIDE, .seed = base_hash_text(name),
                                                                .low = -MADE_UP_RANGE, .high = MADE_UP_RANGE});
}

static int make_up_vector(const struct loader *l, const char *name, int64_t from, int64_t n, float *to) {
    bool norm = strstr(name, "norm.weight");
    return op_fill_random(l->stream, &(struct fill_random_args){.data = to, .dtype = DTYPE_F32, .n_rows = 1, .n_columns = n, .first = from,
                                                                .seed = base_hash_text(name),
                                                                .low = norm ? 1 - MADE_UP_NORM : -MADE_UP_RANGE,
                                                                .high = norm ? 1 + MADE_UP_NORM : MADE_UP_RANGE});
}

/* ---- one tensor ---------------------------------------------------------------------------------------------------- */

/* Of the tensor of that name, the part, whose `tensor` is found here. */
static int load_matrix(const struct loader *l, const char *name, struct part part, void *to) {
    if (l->made_up)
        return make_up_part(l, name, &part, to);
    TRY(find(l, name, &part.tensor));
    return load_part(l, &part, to);
}

/* A vector of `n` values from `from` on, in float. rotate_d as in rotate (bias of W_v). */
static int load_vector(const struct loader *l, const char *name, int64_t from, int64_t n, int rotate_d, float *to) {
    const struct model_tensor *t;
    if (l->made_up)
        return make_up_vector(l, name, from, n, to);
    TRY(find(l, name, &t));
    float *values = l->wide;
    for (int64_t i = 0; i < n; i++) {
        int64_t at = model_file_row_index(t, from + i, l->config->head_dim);
        widen_columns(t, 0, at, at + 1, values + i, values + n);
    }
    for (int64_t g = 0; rotate_d && g < n / rotate_d; g++)
        rotate(values + g * rotate_d, rotate_d, 1, 1);
    memcpy(l->stage, values, (size_t)n * sizeof *values);
    TRY(stream_copy_in(l->stream, to, l->stage, (size_t)n * sizeof *values));
    return stream_sync(l->stream);
}

static int alloc_vector(struct backend *backend, int64_t n, float **out) {
    return backend_alloc(backend, MEMORY_WEIGHTS, (size_t)n * sizeof **out, out);
}

/* ---- one layer ----------------------------------------------------------------------------------------------------- */

static const char *layer_name(char *text, int layer, const char *rest) {
    snprintf(text, NAME_BYTES, "model.layers.%d.%s", layer, rest);
    return text;
}

static int load_qkv(const struct loader *l, const struct weights *w, int layer, bool rotate_v, struct layer_weights *out) {
    static const char *const names[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"};
    const struct model_config *c = l->config;
    const struct weights_slices *s = &w->slices;
    struct range rows[] = {s->heads, s->kv_heads, s->kv_heads};
    out->qkv.n_in = c->hidden;
    out->qkv.n_out = (range_size(s->heads) + 2 * range_size(s->kv_heads)) * c->head_dim;
    TRY(backend_alloc(l->backend, MEMORY_WEIGHTS, dtype_bytes(l->dtype, out->qkv.n_out * c->hidden), &out->qkv.data));
    if (c->qkv_bias)
        TRY(alloc_vector(l->backend, out->qkv.n_out, &out->qkv_bias));
    int64_t at = 0;
    for (int i = 0; i < 3; i++) {
        char name[NAME_BYTES], rest[REST_BYTES];
        int d = i == 2 && rotate_v ? c->head_dim : 0;
        int64_t first = rows[i].begin * c->head_dim, n = range_size(rows[i]) * c->head_dim;
        struct part part = {.row = first, .n_rows = n, .n_columns = c->hidden, .rotate_rows = d};
        snprintf(rest, sizeof rest, "%s.weight", names[i]);
        TRY(load_matrix(l, layer_name(name, layer, rest), part, (uint8_t *)out->qkv.data + dtype_bytes(l->dtype, at * c->hidden)));
        if (c->qkv_bias) {
            snprintf(rest, sizeof rest, "%s.bias", names[i]);
            TRY(load_vector(l, layer_name(name, layer, rest), first, n, d, out->qkv_bias + at));
        }
        at += n;
    }
    return STATUS_OK;
}

/* The norms of q's and k's heads, where the model has them: every rank's heads share them. */
static int load_head_norms(const struct loader *l, int layer, struct layer_weights *out) {
    char name[NAME_BYTES];
    int d = l->config->head_dim;
    if (!l->config->qk_norm)
        return STATUS_OK;
    TRY(alloc_vector(l->backend, d, &out->q_norm));
    TRY(alloc_vector(l->backend, d, &out->k_norm));
    TRY(load_vector(l, layer_name(name, layer, "self_attn.q_norm.weight"), 0, d, 0, out->q_norm));
    return load_vector(l, layer_name(name, layer, "self_attn.k_norm.weight"), 0, d, 0, out->k_norm);
}

static int load_sliced(const struct loader *l, const struct weights *w, int layer, bool rotate_v, bool o_whole,
                       struct layer_weights *out) {
    const struct model_config *c = l->config;
    const struct weights_slices *s = &w->slices;
    int64_t inner = range_size(s->inner), columns = range_size(s->o_columns);
    size_t o_bytes = dtype_bytes(l->dtype, c->hidden * columns), half = dtype_bytes(l->dtype, inner * c->hidden);
    TRY(backend_alloc(l->backend, MEMORY_WEIGHTS, (o_whole ? 0 : o_bytes) + 3 * half, &out->sliced));
    out->o = (struct matrix){out->sliced, c->hidden, columns};
    if (o_whole)
        TRY(backend_alloc(l->backend, MEMORY_WEIGHTS, o_bytes, &out->o.data));
    uint8_t *at = (uint8_t *)out->sliced + (o_whole ? 0 : o_bytes);
    out->gate_up = (struct matrix){at, 2 * inner, c->hidden};
    out->down = (struct matrix){at + 2 * half, c->hidden, inner};
    struct {
        const char *name;
        struct part part;
        void *to;
    } parts[] = {
        {"self_attn.o_proj.weight",
         {.n_rows = c->hidden, .column = s->o_columns.begin, .n_columns = columns, .rotate_columns = rotate_v ? c->head_dim : 0},
         out->o.data},
        {"mlp.gate_proj.weight", {.row = s->inner.begin, .n_rows = inner, .n_columns = c->hidden}, at},
        {"mlp.up_proj.weight", {.row = s->inner.begin, .n_rows = inner, .n_columns = c->hidden}, at + half},
        {"mlp.down_proj.weight", {.n_rows = c->hidden, .column = s->inner.begin, .n_columns = inner}, at + 2 * half},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char name[NAME_BYTES];
        TRY(load_matrix(l, layer_name(name, layer, parts[i].name), parts[i].part, parts[i].to));
    }
    return STATUS_OK;
}

static int load_layer(const struct loader *l, const struct weights *w, const struct cache_spec *spec, int layer, bool o_whole) {
    struct layer_weights *out = &w->layers[layer];
    bool rotate_v = spec->layer[layer].rotate_v;
    char name[NAME_BYTES];
    int hidden = l->config->hidden;
    TRY(alloc_vector(l->backend, hidden, &out->attn_norm));
    TRY(alloc_vector(l->backend, hidden, &out->mlp_norm));
    TRY(load_vector(l, layer_name(name, layer, "input_layernorm.weight"), 0, hidden, 0, out->attn_norm));
    TRY(load_vector(l, layer_name(name, layer, "post_attention_layernorm.weight"), 0, hidden, 0, out->mlp_norm));
    TRY(load_qkv(l, w, layer, rotate_v, out));
    TRY(load_head_norms(l, layer, out));
    return load_sliced(l, w, layer, rotate_v, o_whole, out);
}

/* ---- the whole ----------------------------------------------------------------------------------------------------- */

static int load_vocabulary(const struct loader *l, const char *name, struct range rows, struct matrix *out) {
    struct part part = {.row = rows.begin, .n_rows = range_size(rows), .n_columns = l->config->hidden};
    *out = (struct matrix){NULL, range_size(rows), l->config->hidden};
    TRY(backend_alloc(l->backend, MEMORY_WEIGHTS, dtype_bytes(l->dtype, out->n_out * out->n_in), &out->data));
    return load_matrix(l, name, part, out->data);
}

static int load_all(const struct loader *l, const struct cache_spec *spec, bool o_whole, struct weights *w) {
    const struct model_config *c = l->config;
    TRY(base_alloc(&w->layers, (size_t)c->n_layers, sizeof *w->layers));
    w->n_layers = c->n_layers;
    TRY(load_vocabulary(l, "model.embed_tokens.weight", w->slices.vocab, &w->embed));
    w->head = w->embed;
    if (!c->tied)
        TRY(load_vocabulary(l, "lm_head.weight", w->slices.vocab, &w->head));
    TRY(alloc_vector(l->backend, c->hidden, &w->final_norm));
    TRY(load_vector(l, "model.norm.weight", 0, c->hidden, 0, w->final_norm));
    TRY(alloc_vector(l->backend, c->head_dim / 2, &w->inv_freq));
    model_config_inv_freq(c, l->stage);
    TRY(stream_copy_in(l->stream, w->inv_freq, l->stage, (size_t)c->head_dim / 2 * sizeof(float)));
    TRY(stream_sync(l->stream));
    for (int i = 0; i < c->n_layers; i++)
        TRY(load_layer(l, w, spec, i, o_whole));
    return STATUS_OK;
}

/* "auto": the 16-bit type that the file's matrices have; F16 for those of another width. Made-up weights are BF16, as most models are. */
static int choose_dtype(const struct model_file *file, const char *option, enum dtype *out) {
    const struct model_tensor *t = model_file_is_shape(file) ? NULL : model_file_find(file, "model.layers.0.mlp.down_proj.weight");
    if (!option || strcmp(option, "auto") == 0)
        *out = model_file_is_shape(file) || (t && t->dtype == DTYPE_BF16) ? DTYPE_BF16 : DTYPE_F16;
    else if (strcmp(option, "f32") == 0)
        *out = DTYPE_F32;
    else
        FAIL(STATUS_USAGE, "weights '%s' is not known; allowed: auto, f32", option);
    return STATUS_OK;
}

int weights_load(const struct model_file *file, const struct cache_spec *spec, const struct grid *grid, bool o_whole,
                 const char *dtype_option, struct backend *backend, struct stream *stream, struct weights *out) {
    const struct model_config *c = model_file_config(file);
    struct loader l = {.file = file, .config = c, .backend = backend, .stream = stream,
                       .made_up = model_file_is_shape(file)};
    int status = STATUS_OK;
    *out = (struct weights){.backend = backend};
    TRY_GOTO(choose_dtype(file, dtype_option, &l.dtype));
    out->dtype = l.dtype;
    weights_slices_make(c, grid->tp, grid->tp_rank, grid->cp, grid->cp_rank, o_whole, &out->slices);
    out->layer_sliced_bytes = weights_sliced_bytes(c, &out->slices, l.dtype, o_whole);
    TRY_GOTO(backend_alloc(backend, MEMORY_HOST, STAGE_BYTES, &l.stage));
    TRY_GOTO(base_alloc(&l.wide, STAGE_BYTES, 1));
    TRY_GOTO(load_all(&l, spec, o_whole, out));
    TRY_GOTO(stream_sync(stream));
fail:
    (void)stream_sync(stream); /* nothing writes into what is freed */
    free(l.wide);
    backend_free(backend, l.stage);
    if (status < 0)
        weights_free(out);
    return status;
}

void weights_free(struct weights *w) {
    for (int i = 0; i < w->n_layers; i++) {
        struct layer_weights *l = &w->layers[i];
        bool o_apart = l->o.data && l->o.data != l->sliced;
        void *blocks[] = {l->attn_norm, l->mlp_norm, l->qkv.data, l->qkv_bias, l->q_norm, l->k_norm, l->sliced,
                          o_apart ? l->o.data : NULL};
        for (size_t k = 0; k < sizeof blocks / sizeof *blocks; k++)
            backend_free(w->backend, blocks[k]);
    }
    free(w->layers);
    if (w->head.data != w->embed.data)
        backend_free(w->backend, w->head.data);
    if (w->backend) {
        backend_free(w->backend, w->embed.data);
        backend_free(w->backend, w->final_norm);
        backend_free(w->backend, w->inv_freq);
    }
    *w = (struct weights){0};
}
