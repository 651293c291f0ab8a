/* The inside of struct model_file, shared by the files that fill it: model_gguf.c, model_folder.c (Hugging Face) and
 * model_file.c, which binds tensors to their roles. */
#pragma once

#include "engine/gguf.h"
#include "engine/map_file.h"
#include "engine/safetensors.h"

/* One file with tensors: the GGUF file, or a shard. */
struct model_source {
    char *path;
    struct safetensors *shard;         /* NULL for GGUF */
    const struct file_tensor *tensors; /* sorted by name */
    int n_tensors;
    bool *used; /* [n_tensors]: bound to a role */
};

struct model_file {
    char *path;
    struct gguf *gguf; /* NULL for a folder */
    struct model_source *sources;
    int n_sources;
    struct model_config config;
    struct model_tensor *tensors; /* in the order of the computation; names are malloced */
    int n_tensors;
    const struct model_tensor **by_name; /* the same, sorted by name */
    struct tokenizer_source tokenizer;
    struct gguf_texts tokens, merges; /* what `tokenizer` points to */
    int32_t *token_types;
    struct map_file tokenizer_json, tokenizer_config;
    char *chat_template;
};

/* Each fills path-dependent parts: sources, configuration, tokenizer source. Error texts are complete. */
int model_gguf_read(struct model_file *file);
int model_folder_read(struct model_file *file);

/* Makes room for `n` sources, and completes one whose tensors are set. */
int model_parts_alloc_sources(struct model_file *file, int n);
int model_parts_set_source(struct model_source *source, const char *path, const struct file_tensor *tensors, int n);

/* The tensor of that name in any source, and the source; NULL if none. */
const struct file_tensor *model_parts_find(const struct model_file *file, const char *name,
                                           struct model_source **source);
