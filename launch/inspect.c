/* One tree of facts, printed as JSON or as text: both say the same. Opens the files with the engine's readers, so whatever
 * they refuse is refused here in the same words. Who gets what is engine/weights.h's arithmetic; norms, in 32 bit, are everywhere. */
#include "launch/inspect.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_config.h"
#include "engine/safetensors.h"
#include "engine/tokenizer.h"
#include "engine/weights.h"
#include "launch/print_json.h"

/* Takes `value` over; an allocation that failed anywhere shows up here. */
static int put(json_t *object, const char *name, json_t *value) {
    if (json_object_set_new(object, name, value) != 0)
        FAIL(STATUS_MEMORY, "out of memory for '%s'", name);
    return STATUS_OK;
}

static int append(json_t *array, json_t *value) {
    if (json_array_append_new(array, value) != 0)
        FAIL(STATUS_MEMORY, "out of memory for a list");
    return STATUS_OK;
}

static const char *rope_name(enum rope_kind rope) {
    switch (rope) {
    case ROPE_DEFAULT:
        return "default";
    case ROPE_LLAMA3:
        return "llama3";
    case ROPE_LINEAR:
        return "linear";
    case ROPE_DIVISORS:
        return "divisors";
    }
    return "?";
}

static int describe_config(const struct model_config *c, json_t *facts) {
    json_t *stop = json_array();
    TRY(put(facts, "architecture", json_string(model_config_arch_name(c->arch))));
    TRY(put(facts, "layers", json_integer(c->n_layers)));
    TRY(put(facts, "hidden", json_integer(c->hidden)));
    TRY(put(facts, "query_heads", json_integer(c->n_heads)));
    TRY(put(facts, "kv_heads", json_integer(c->n_kv_heads)));
    TRY(put(facts, "head_dim", json_integer(c->head_dim)));
    TRY(put(facts, "intermediate", json_integer(c->intermediate)));
    TRY(put(facts, "vocabulary", json_integer(c->vocab)));
    TRY(put(facts, "tied_head", json_boolean(c->tied)));
    TRY(put(facts, "context", json_integer(c->context)));
    TRY(put(facts, "rms_eps", json_real((double)c->rms_eps)));
    TRY(put(facts, "rope", json_string(rope_name(c->rope))));
    TRY(put(facts, "rope_theta", json_real(c->rope_theta)));
    TRY(put(facts, "bos_id", c->bos_id < 0 ? json_null() : json_integer(c->bos_id)));
    TRY(put(facts, "stop_ids", stop));
    for (int i = 0; i < c->n_stop; i++)
        TRY(append(stop, json_integer(c->stop_id[i])));
    return STATUS_OK;
}

/* ---- tensors ---------------------------------------------------------------------------------------------------------- */

static int64_t tensor_elements(const struct model_tensor *tensor) {
    int64_t n = 1;
    for (int i = 0; i < tensor->n_dims; i++)
        n *= tensor->shape[i];
    return n;
}

static int describe_tensors(const struct model_file *file, bool list, json_t *facts) {
    int64_t parameters = 0, bytes = 0, count[DTYPE_COUNT] = {0}, size[DTYPE_COUNT] = {0};
    int n = model_file_n_tensors(file);
    json_t *all = NULL;
    if (list)
        TRY(put(facts, "tensor_list", all = json_array()));
    for (int i = 0; i < n; i++) {
        const struct model_tensor *tensor = model_file_tensor_at(file, i);
        int64_t elements = tensor_elements(tensor), held = (int64_t)dtype_bytes(tensor->dtype, elements);
        char shape[FILE_TENSOR_SHAPE_TEXT];
        parameters += elements;
        bytes += held;
        count[tensor->dtype]++;
        size[tensor->dtype] += held;
        if (list)
            TRY(append(all, json_pack("{s:s, s:s, s:s, s:I}", "name", tensor->name, "type", dtype_name(tensor->dtype), "shape",
                                      file_tensor_shape_text(tensor->shape, tensor->n_dims, shape), "bytes", (json_int_t)held)));
    }
    TRY(put(facts, "parameters", json_integer(parameters)));
    TRY(put(facts, "tensors", json_integer(n)));
    TRY(put(facts, "stored_bytes", json_integer(bytes)));
    json_t *types = json_array();
    TRY(put(facts, "types", types));
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (count[i])
            TRY(append(types, json_pack("{s:s, s:I, s:I}", "type", dtype_name(i), "tensors", (json_int_t)count[i], "bytes",
                                        (json_int_t)size[i])));
    return STATUS_OK;
}

/* ---- tokenizer -------------------------------------------------------------------------------------------------------- */

static int describe_chat(const struct tokenizer_source *source, json_t *out) {
    const struct chat_template *chat;
    if (!source->chat_template)
        return put(out, "chat", json_null());
    if (chat_find(source->chat_template, source->path, &chat) == STATUS_OK)
        return put(out, "chat", json_string(chat_name(chat)));
    base_clear_error(); /* a fact about the file, no failure of inspect */
    return put(out, "chat", json_string("a template that is not known"));
}

static int describe_tokenizer(const struct model_file *file, json_t *facts) {
    const struct tokenizer_source *source = model_file_tokenizer(file);
    struct tokenizer *tokenizer;
    char hash[65];
    if (!source->json && !source->n_tokens)
        return put(facts, "tokenizer", json_null());
    json_t *out = json_object();
    TRY(put(facts, "tokenizer", out));
    TRY(tokenizer_open(source, model_file_config(file)->vocab, &tokenizer));
    int size = tokenizer_size(tokenizer);
    tokenizer_hash(tokenizer, hash);
    tokenizer_close(tokenizer);
    TRY(put(out, "from", json_string(source->json ? "tokenizer.json" : "GGUF metadata")));
    if (source->model)
        TRY(put(out, "kind", json_sprintf("%s/%s", source->model, source->pre ? source->pre : "-")));
    TRY(put(out, "ids", json_integer(size)));
    TRY(put(out, "hash", json_string(hash)));
    return describe_chat(source, out);
}

/* ---- who gets what ---------------------------------------------------------------------------------------------------- */

static json_t *range_text(struct range r) {
    return range_size(r) ? json_sprintf("%lld-%lld", (long long)r.begin, (long long)r.end - 1) : json_string("-");
}

static int describe_rank(const struct options *options, const struct model_config *c, const struct grid *grid, int rank,
                         json_t *ranks) {
    struct weights_slices slices;
    bool fused = strcmp(options->engine.merge, "fused") == 0, wide = strcmp(options->engine.weights, "f32") == 0;
    weights_slices_make(c, grid->tp, grid->tp_rank, grid->cp, grid->cp_rank, fused, &slices);
    int64_t matrices = weights_slices_bytes(c, &slices, (int)(wide ? sizeof(float) : sizeof(uint16_t)));
    int64_t norms = weights_norm_values(c) * (int64_t)sizeof(float);
    json_t *out = json_object();
    TRY(append(ranks, out));
    TRY(put(out, "rank", json_integer(rank)));
    TRY(put(out, "dp", json_integer(grid->dp_rank)));
    TRY(put(out, "tp", json_integer(grid->tp_rank)));
    TRY(put(out, "cp", json_integer(grid->cp_rank)));
    TRY(put(out, "query_heads", range_text(slices.heads)));
    TRY(put(out, "kv_heads", range_text(slices.kv_heads)));
    TRY(put(out, "o_columns", range_text(slices.o_columns)));
    TRY(put(out, "mlp_rows", range_text(slices.inner)));
    TRY(put(out, "words", range_text(slices.vocab)));
    TRY(put(out, "matrices_bytes", json_integer(matrices)));
    return put(out, "norms_bytes", json_integer(norms));
}

/* --ranks, else the product of the axes that were given. */
static int world_size(const struct options *options) {
    if (options->ranks)
        return options->ranks;
    const struct engine_options *e = &options->engine;
    if (!e->dp && !e->tp && !e->cp)
        return 0;
    return (int)min_i64((int64_t)(e->dp ? e->dp : 1) * (e->tp ? e->tp : 1) * (e->cp ? e->cp : 1), INT32_MAX);
}

static int describe_layout(const struct options *options, const struct model_config *c, json_t *facts) {
    int world = world_size(options);
    if (world == 0)
        return STATUS_OK;
    json_t *ranks = json_array();
    TRY(put(facts, "ranks", ranks));
    for (int rank = 0; rank < world; rank++) {
        struct grid grid;
        TRY(grid_make(options->engine.dp, options->engine.tp, options->engine.cp, world, rank, c->n_kv_heads, &grid));
        TRY(describe_rank(options, c, &grid, rank, ranks));
    }
    return STATUS_OK;
}

/* ---- calibration ------------------------------------------------------------------------------------------------------ */

/* The texts under __metadata__ of a safetensors file: its provenance. The reader of tensors has checked the header's length. */
static int describe_metadata(const char *path, json_t *facts) {
    int status = STATUS_OK;
    uint8_t length[8];
    char *header = NULL;
    FILE *file = fopen(path, "rbe");
    if (!file || fread(length, 1, sizeof length, file) != sizeof length)
        FAIL_GOTO(STATUS_INPUT, "%s: %s", path, strerror(errno));
    size_t bytes = 0;
    for (int i = 7; i >= 0; i--)
        bytes = bytes << 8 | length[i];
    TRY_GOTO(base_alloc(&header, bytes, 1));
    if (fread(header, 1, bytes, file) != bytes)
        FAIL_GOTO(STATUS_INPUT, "%s: the header ends early", path);
    json_t *tree = json_loadb(header, bytes, 0, NULL), *metadata = json_object_get(tree, "__metadata__");
    if (metadata)
        status = put(facts, "metadata", json_incref(metadata));
    json_decref(tree);
fail:
    if (file)
        fclose(file);
    free(header);
    return status;
}

static int describe_calibration(const char *path, json_t *facts) {
    struct safetensors *file;
    int n;
    if (!path)
        return STATUS_OK;
    TRY(safetensors_open(path, &file));
    const struct file_tensor *tensors = safetensors_tensors(file, &n);
    json_t *out = json_object(), *list = json_array();
    int status = put(facts, "calibration", out);
    if (status == STATUS_OK)
        status = put(out, "file", json_string(path));
    if (status == STATUS_OK)
        status = describe_metadata(path, out);
    if (status == STATUS_OK)
        status = put(out, "tensor_list", list);
    for (int i = 0; i < n && status == STATUS_OK; i++) {
        char shape[FILE_TENSOR_SHAPE_TEXT];
        status = append(list, json_pack("{s:s, s:s, s:s, s:I}", "name", tensors[i].name, "type", tensors[i].type, "shape",
                                        file_tensor_shape_text(tensors[i].shape, tensors[i].n_dims, shape), "bytes",
                                        (json_int_t)tensors[i].bytes));
    }
    safetensors_close(file);
    return status;
}

/* ---- the command ------------------------------------------------------------------------------------------------------ */

static int describe_model(const struct options *options, const struct model_file *file, json_t *facts) {
    const struct model_config *config = model_file_config(file);
    char fingerprint[65];
    TRY(put(facts, "file", json_string(model_file_path(file))));
    TRY(put(facts, "format", json_string(model_file_format(file))));
    TRY(describe_config(config, facts));
    TRY(describe_tensors(file, options->tensors, facts));
    TRY(model_file_fingerprint(file, fingerprint));
    TRY(put(facts, "fingerprint", json_string(fingerprint)));
    TRY(describe_tokenizer(file, facts));
    return describe_layout(options, config, facts);
}

int inspect_main(const struct options *options) {
    int status = STATUS_OK;
    struct model_file *file = NULL;
    json_t *facts = json_object();
    if (!options->engine.model && !options->engine.calibration)
        FAIL_GOTO(STATUS_USAGE, "option --model or --calibration is needed");
    if (options->engine.model) {
        TRY_GOTO(model_file_open(options->engine.model, &file));
        TRY_GOTO(describe_model(options, file, facts));
    }
    TRY_GOTO(describe_calibration(options->engine.calibration, facts));
    TRY_GOTO(print_json_facts(options->json, facts));
fail:
    model_file_close(file);
    json_decref(facts);
    return status;
}
