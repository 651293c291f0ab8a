/* Opens a model and binds every tensor of its architecture, once, to the bytes that hold it. What a file has beyond the
 * architecture is named in a warning, unless it is known to be harmless. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/model_config.h"
#include "engine/model_parts.h"

enum size { SIZE_NONE, SIZE_VOCAB, SIZE_HIDDEN, SIZE_INTERMEDIATE, SIZE_QUERY, SIZE_KEY, SIZE_HEAD };

/* Sets of architectures. */
enum {
    LLAMA = 1 << MODEL_ARCH_LLAMA,
    QWEN2 = 1 << MODEL_ARCH_QWEN2,
    QWEN3 = 1 << MODEL_ARCH_QWEN3,
    ALL = LLAMA | QWEN2 | QWEN3,
};

/* A tensor of the architecture: its name in both forms (in a layer: after the layer's prefix) and its shape. */
struct role {
    const char *name;
    const char *gguf_name;
    enum size rows, columns; /* columns SIZE_NONE: a vector of `rows` values: a norm's weight or a bias */
    unsigned of;             /* architectures that have it */
    unsigned permuted;       /* those whose GGUF files hold its rows permuted */
};

static const struct role embedding = {"model.embed_tokens.weight", "token_embd.weight", SIZE_VOCAB, SIZE_HIDDEN, ALL, 0};
static const struct role final_norm = {"model.norm.weight", "output_norm.weight", SIZE_HIDDEN, SIZE_NONE, ALL, 0};
static const struct role head = {"lm_head.weight", "output.weight", SIZE_VOCAB, SIZE_HIDDEN, ALL, 0};

static const struct role layer_roles[] = {
    {"input_layernorm.weight", "attn_norm.weight", SIZE_HIDDEN, SIZE_NONE, ALL, 0},
    {"self_attn.q_proj.weight", "attn_q.weight", SIZE_QUERY, SIZE_HIDDEN, ALL, LLAMA},
    {"self_attn.q_proj.bias", "attn_q.bias", SIZE_QUERY, SIZE_NONE, QWEN2, 0},
    {"self_attn.k_proj.weight", "attn_k.weight", SIZE_KEY, SIZE_HIDDEN, ALL, LLAMA},
    {"self_attn.k_proj.bias", "attn_k.bias", SIZE_KEY, SIZE_NONE, QWEN2, 0},
    {"self_attn.v_proj.weight", "attn_v.weight", SIZE_KEY, SIZE_HIDDEN, ALL, 0},
    {"self_attn.v_proj.bias", "attn_v.bias", SIZE_KEY, SIZE_NONE, QWEN2, 0},
    {"self_attn.q_norm.weight", "attn_q_norm.weight", SIZE_HEAD, SIZE_NONE, QWEN3, 0},
    {"self_attn.k_norm.weight", "attn_k_norm.weight", SIZE_HEAD, SIZE_NONE, QWEN3, 0},
    {"self_attn.o_proj.weight", "attn_output.weight", SIZE_HIDDEN, SIZE_QUERY, ALL, 0},
    {"post_attention_layernorm.weight", "ffn_norm.weight", SIZE_HIDDEN, SIZE_NONE, ALL, 0},
    {"mlp.gate_proj.weight", "ffn_gate.weight", SIZE_INTERMEDIATE, SIZE_HIDDEN, ALL, 0},
    {"mlp.up_proj.weight", "ffn_up.weight", SIZE_INTERMEDIATE, SIZE_HIDDEN, ALL, 0},
    {"mlp.down_proj.weight", "ffn_down.weight", SIZE_HIDDEN, SIZE_INTERMEDIATE, ALL, 0},
};
enum { N_LAYER_ROLES = sizeof layer_roles / sizeof *layer_roles };

static int64_t size_of(const struct model_config *config, enum size size) {
    switch (size) {
    case SIZE_VOCAB:
        return config->vocab;
    case SIZE_HIDDEN:
        return config->hidden;
    case SIZE_INTERMEDIATE:
        return config->intermediate;
    case SIZE_QUERY:
        return (int64_t)config->n_heads * config->head_dim;
    case SIZE_KEY:
        return (int64_t)config->n_kv_heads * config->head_dim;
    case SIZE_HEAD:
        return config->head_dim;
    default:
        return 1;
    }
}

int model_parts_alloc_sources(struct model_file *file, int n) {
    TRY(base_alloc(&file->sources, (size_t)n, sizeof *file->sources));
    file->n_sources = n;
    return STATUS_OK;
}

int model_parts_set_source(struct model_source *source, const char *path, const struct file_tensor *tensors, int n) {
    source->tensors = tensors;
    source->n_tensors = n;
    source->path = strdup(path);
    if (!source->path)
        FAIL(STATUS_MEMORY, "out of memory: a path");
    return base_alloc(&source->used, (size_t)n, sizeof *source->used);
}

const struct file_tensor *model_parts_find(const struct model_file *file, const char *name,
                                           struct model_source **source) {
    for (int i = 0; i < file->n_sources; i++) {
        const struct file_tensor *found =
            file_tensor_find(file->sources[i].tensors, file->sources[i].n_tensors, name);
        if (found && source)
            *source = &file->sources[i];
        if (found)
            return found;
    }
    return NULL;
}

/* Vectors are read as plain numbers; matrices may be in block formats too. */
static bool dtype_fits(int dtype, bool vector) {
    switch (dtype) {
    case DTYPE_F32:
    case DTYPE_F16:
    case DTYPE_BF16:
        return true;
    case DTYPE_Q4_0:
    case DTYPE_Q4_1:
    case DTYPE_Q8_0:
    case DTYPE_Q5_0:
    case DTYPE_Q5_1:
    case DTYPE_Q4_K:
    case DTYPE_Q5_K:
    case DTYPE_Q6_K:
        return !vector;
    default:
        return false;
    }
}

/* Checks `found` against the role and makes it the next tensor. `name` is Hugging Face's, taken over. */
static int bind_found(struct model_file *file, const struct role *role, char *name, struct model_source *source,
                      const struct file_tensor *found) {
    struct model_tensor *tensor = &file->tensors[file->n_tensors++];
    *tensor = (struct model_tensor){.name = name, .n_dims = role->columns == SIZE_NONE ? 1 : 2, .data = found->data};
    bool vector = tensor->n_dims == 1;
    tensor->shape[0] = size_of(&file->config, role->rows);
    tensor->shape[1] = vector ? 0 : size_of(&file->config, role->columns);
    bool same = found->n_dims == tensor->n_dims;
    for (int i = 0; same && i < tensor->n_dims; i++)
        same = found->shape[i] == tensor->shape[i];
    char got[FILE_TENSOR_SHAPE_TEXT], wanted[FILE_TENSOR_SHAPE_TEXT];
    if (!same)
        FAIL(STATUS_INPUT, "%s: tensor %s: shape %s, the configuration wants %s", source->path, found->name,
             file_tensor_shape_text(found->shape, found->n_dims, got),
             file_tensor_shape_text(tensor->shape, tensor->n_dims, wanted));
    if (!dtype_fits(found->dtype, vector))
        FAIL(STATUS_INPUT, "%s: tensor %s: type %s is not supported, expected F32, F16%s", source->path, found->name,
             found->type, vector ? " or BF16" : ", BF16, or in GGUF Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K");
    tensor->dtype = (enum dtype)found->dtype;
    tensor->permuted = file->gguf && (role->permuted & 1u << file->config.arch);
    source->used[found - source->tensors] = true;
    return STATUS_OK;
}

/* `layer` -1: a tensor of no layer. */
static int bind_role(struct model_file *file, const struct role *role, int layer) {
    char *name = NULL, gguf_name[64];
    int n = layer < 0 ? asprintf(&name, "%s", role->name) : asprintf(&name, "model.layers.%d.%s", layer, role->name);
    if (n < 0)
        FAIL(STATUS_MEMORY, "out of memory: a tensor's name");
    if (layer < 0)
        snprintf(gguf_name, sizeof gguf_name, "%s", role->gguf_name);
    else
        snprintf(gguf_name, sizeof gguf_name, "blk.%d.%s", layer, role->gguf_name);
    const char *file_name = file->gguf ? gguf_name : name;
    struct model_source *source = NULL;
    const struct file_tensor *found = model_parts_find(file, file_name, &source);
    if (!found) {
        int status = base_fail(STATUS_INPUT, __FILE__, __LINE__, "%s: tensor %s is missing (%s of %d layers)",
                               file->path, file_name, model_config_arch_name(file->config.arch),
                               file->config.n_layers);
        free(name);
        return status;
    }
    return bind_found(file, role, name, source, found);
}

/* A folder whose configuration ties the head may hold the head's weights all the same: as transformers has it, they are
 * tied if equal, else the file's head counts. */
static void resolve_tied(struct model_file *file) {
    struct model_source *source = NULL;
    const struct file_tensor *own = file->gguf ? NULL : model_parts_find(file, head.name, &source);
    if (!file->config.tied || !own)
        return;
    const struct model_tensor *shared = &file->tensors[0];
    size_t bytes = dtype_bytes(shared->dtype, shared->shape[0] * shared->shape[1]);
    if (own->dtype == (int)shared->dtype && own->bytes == bytes && memcmp(own->data, shared->data, own->bytes) == 0) {
        source->used[own - source->tensors] = true;
        return;
    }
    log_warn("%s: tie_word_embeddings is true, but %s differs from the embedding: it is used", source->path, head.name);
    file->config.tied = false;
}

static int bind_all(struct model_file *file) {
    const struct model_config *config = &file->config;
    int most = 3 + N_LAYER_ROLES * config->n_layers;
    TRY(base_alloc(&file->tensors, (size_t)most, sizeof *file->tensors));
    TRY(bind_role(file, &embedding, -1));
    for (int layer = 0; layer < config->n_layers; layer++)
        for (int i = 0; i < N_LAYER_ROLES; i++)
            if (layer_roles[i].of & 1u << config->arch)
                TRY(bind_role(file, &layer_roles[i], layer));
    TRY(bind_role(file, &final_norm, -1));
    resolve_tied(file);
    return config->tied ? STATUS_OK : bind_role(file, &head, -1);
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), n_end = strlen(end);
    return n >= n_end && strcmp(text + n - n_end, end) == 0;
}

/* Tensors that no role took. inv_freq is computed, rope_freqs is part of the configuration. In GGUF, which has no field
 * for it, a bias means another computation. */
static int check_unused(const struct model_file *file) {
    const char *first = NULL;
    int n_unused = 0;
    for (int i = 0; i < file->n_sources; i++) {
        const struct model_source *source = &file->sources[i];
        for (int t = 0; t < source->n_tensors; t++) {
            const char *name = source->tensors[t].name;
            if (source->used[t] || ends_with(name, "rotary_emb.inv_freq") || strcmp(name, "rope_freqs.weight") == 0)
                continue;
            if (file->gguf && ends_with(name, ".bias"))
                FAIL(STATUS_INPUT, "%s: tensor %s: biases are not supported for architecture %s", source->path, name,
                     model_config_arch_name(file->config.arch));
            if (n_unused++ == 0)
                first = name;
        }
    }
    if (n_unused > 0)
        log_warn("%s: %d tensors are not used, the first is %s", file->path, n_unused, first);
    return STATUS_OK;
}

static int compare_names(const void *a, const void *b) {
    const struct model_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

static int sort_names(struct model_file *file) {
    TRY(base_alloc(&file->by_name, (size_t)file->n_tensors, sizeof *file->by_name));
    for (int i = 0; i < file->n_tensors; i++)
        file->by_name[i] = &file->tensors[i];
    qsort(file->by_name, (size_t)file->n_tensors, sizeof *file->by_name, compare_names);
    return STATUS_OK;
}

static int open_parts(struct model_file *file) {
    struct stat info;
    if (stat(file->path, &info) != 0)
        FAIL(STATUS_INPUT, "%s: no such file or folder, expected a .gguf file or a Hugging Face folder", file->path);
    if (ends_with(file->path, ".conf"))
        FAIL(STATUS_INPUT, "%s: this is no model: a shape without weights is for kvlinc bench --random-weights; to fetch a model by name: "
             "launch/model.sh", file->path);
    TRY(S_ISDIR(info.st_mode) ? model_folder_read(file) : model_gguf_read(file));
    TRY(bind_all(file));
    TRY(check_unused(file));
    return sort_names(file);
}

static int open_shape(struct model_file *file) {
    file->tokenizer = (struct tokenizer_source){.path = file->path, .bos_id = -1, .eos_id = -1};
    return model_config_shape_read(file->path, &file->config);
}

static int open_file(const char *path, int (*fill)(struct model_file *), struct model_file **out) {
    *out = NULL;
    struct model_file *file;
    TRY(base_alloc(&file, 1, sizeof *file));
    file->path = strdup(path);
    int status = file->path ? fill(file) : base_fail_text(STATUS_MEMORY, "out of memory: a path");
    if (status < 0) {
        model_file_close(file);
        return status;
    }
    *out = file;
    return STATUS_OK;
}

int model_file_open(const char *path, struct model_file **out) { return open_file(path, open_parts, out); }

int model_file_open_shape(const char *path, struct model_file **out) { return open_file(path, open_shape, out); }

bool model_file_is_shape(const struct model_file *file) { return file->n_tensors == 0; }

void model_file_close(struct model_file *file) {
    if (!file)
        return;
    for (int i = 0; i < file->n_tensors; i++)
        free((void *)(uintptr_t)file->tensors[i].name); /* const for readers, ours to free */
    free(file->tensors);
    free(file->by_name);
    for (int i = 0; i < file->n_sources; i++) {
        safetensors_close(file->sources[i].shard);
        free(file->sources[i].path);
        free(file->sources[i].used);
    }
    free(file->sources);
    gguf_texts_free(&file->tokens);
    gguf_texts_free(&file->merges);
    free(file->token_types);
    free(file->chat_template);
    map_file_close(&file->tokenizer_json);
    map_file_close(&file->tokenizer_config);
    gguf_close(file->gguf);
    free(file->path);
    free(file);
}

const char *model_file_path(const struct model_file *file) { return file->path; }

const char *model_file_format(const struct model_file *file) {
    return model_file_is_shape(file) ? "shape" : file->gguf ? "gguf" : "safetensors";
}

const struct model_config *model_file_config(const struct model_file *file) { return &file->config; }

int model_file_n_tensors(const struct model_file *file) { return file->n_tensors; }

const struct model_tensor *model_file_tensor_at(const struct model_file *file, int index) {
    return &file->tensors[index];
}

static int compare_name(const void *name, const void *tensor) {
    return strcmp(name, (*(const struct model_tensor *const *)tensor)->name);
}

const struct model_tensor *model_file_find(const struct model_file *file, const char *name) {
    const struct model_tensor **found =
        bsearch(name, file->by_name, (size_t)file->n_tensors, sizeof *file->by_name, compare_name);
    return found ? *found : NULL;
}

int64_t model_file_row_index(const struct model_tensor *tensor, int64_t row, int head_dim) {
    if (!tensor->permuted)
        return row;
    int64_t half = head_dim / 2, first = row / head_dim * head_dim, in_head = row - first;
    return first + 2 * (in_head % half) + in_head / half;
}

size_t model_file_row_bytes(const struct model_tensor *tensor) {
    return dtype_bytes(tensor->dtype, tensor->shape[tensor->n_dims - 1]);
}

const void *model_file_row(const struct model_tensor *tensor, int64_t row) {
    return (const uint8_t *)tensor->data + (size_t)row * model_file_row_bytes(tensor);
}

const struct tokenizer_source *model_file_tokenizer(const struct model_file *file) { return &file->tokenizer; }
