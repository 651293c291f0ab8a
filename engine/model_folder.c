/* A Hugging Face folder as a model: config.json, the shards, and the tokenizer's files where there are any. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/model_config.h"
#include "engine/model_parts.h"

enum { MOST_SHARDS = 4096 };

/* path/name in one malloced text */
static int join(const char *folder, const char *name, char **out) {
    if (asprintf(out, "%s/%s", folder, name) < 0) {
        *out = NULL;
        FAIL(STATUS_MEMORY, "out of memory: a path");
    }
    return STATUS_OK;
}

/* Maps folder/name. Returns 1, or 0 when there is no such file and `optional`. *path is malloced in both cases. */
static int map_named(const char *folder, const char *name, bool optional, struct map_file *map, char **path) {
    TRY(join(folder, name, path));
    struct stat info;
    if (optional && stat(*path, &info) != 0 && errno == ENOENT)
        return 0;
    int status = map_file_open(*path, map);
    if (status < 0)
        base_error_prefix("%s: ", *path);
    return status < 0 ? status : 1;
}

/* Runs one reader of model_config.h over a file of the folder. */
static int read_config(struct model_file *file, const char *name, bool optional,
                       int (*read)(const char *, size_t, struct model_config *)) {
    struct map_file map = {0};
    char *path = NULL;
    int status = map_named(file->path, name, optional, &map, &path);
    if (status == 1) {
        status = read((const char *)map.data, map.bytes, &file->config);
        if (status < 0)
            base_error_prefix("%s: ", path);
    }
    map_file_close(&map);
    free(path);
    return status < 0 ? status : STATUS_OK;
}

static int open_shard(struct model_file *file, struct model_source *source, const char *name) {
    char *path = NULL;
    TRY(join(file->path, name, &path));
    int n = 0;
    int status = safetensors_open(path, &source->shard);
    if (status == STATUS_OK) {
        const struct file_tensor *tensors = safetensors_tensors(source->shard, &n);
        status = model_parts_set_source(source, path, tensors, n);
    }
    free(path);
    return status;
}

/* The index of sharded files: which tensor is in which file. */
struct shard_index {
    json_t *root;
    json_t *map; /* name -> file, borrowed from root */
    const char *files[MOST_SHARDS];
    int n_files;
};

static int add_shard_name(struct shard_index *index, const char *tensor, const char *name) {
    if (!name || name[0] == '\0' || name[0] == '.' || strchr(name, '/'))
        FAIL(STATUS_INPUT, "weight_map: %s: expected the name of a file in the same folder", tensor);
    for (int i = 0; i < index->n_files; i++)
        if (strcmp(index->files[i], name) == 0)
            return STATUS_OK;
    if (index->n_files == MOST_SHARDS)
        FAIL(STATUS_INPUT, "weight_map: more than %d files", MOST_SHARDS);
    index->files[index->n_files++] = name;
    return STATUS_OK;
}

static int read_index(const struct map_file *map, struct shard_index *index) {
    json_error_t error;
    index->root = json_loadb(map->data ? (const char *)map->data : "", map->bytes, JSON_REJECT_DUPLICATES, &error);
    if (!index->root)
        FAIL(STATUS_INPUT, "line %d: %s", error.line, error.text);
    index->map = json_object_get(index->root, "weight_map");
    if (!json_is_object(index->map) || json_object_size(index->map) == 0)
        FAIL(STATUS_INPUT, "weight_map: expected an object of names and files");
    const char *tensor;
    json_t *name;
    json_object_foreach(index->map, tensor, name)
        TRY(add_shard_name(index, tensor, json_string_value(name)));
    return STATUS_OK;
}

/* Index and shards must tell the same: every named tensor is in its file, and every tensor of a file is named there. */
static int check_index(const struct model_file *file, const struct shard_index *index) {
    int n_found = 0;
    for (int i = 0; i < file->n_sources; i++)
        for (int t = 0; t < file->sources[i].n_tensors; t++) {
            const char *tensor = file->sources[i].tensors[t].name;
            const char *named = json_string_value(json_object_get(index->map, tensor));
            if (!named)
                FAIL(STATUS_INPUT, "weight_map: tensor %s of %s is missing", tensor, index->files[i]);
            if (strcmp(named, index->files[i]) != 0)
                FAIL(STATUS_INPUT, "weight_map: tensor %s: in %s, expected in %s", tensor, index->files[i], named);
            n_found++;
        }
    if ((size_t)n_found == json_object_size(index->map))
        return STATUS_OK;
    const char *tensor;
    json_t *name;
    json_object_foreach(index->map, tensor, name)
        if (!model_parts_find(file, tensor, NULL))
            FAIL(STATUS_INPUT, "weight_map: tensor %s: not in %s", tensor, json_string_value(name));
    FAIL(STATUS_INPUT, "weight_map: %zu tensors, the files have %d", json_object_size(index->map), n_found);
}

static int open_shards(struct model_file *file, const struct map_file *map, const char *path) {
    struct shard_index *index;
    TRY(base_alloc(&index, 1, sizeof *index));
    int status = read_index(map, index);
    bool in_index = status < 0;
    if (status == STATUS_OK)
        status = model_parts_alloc_sources(file, index->n_files);
    for (int i = 0; status == STATUS_OK && i < index->n_files; i++)
        status = open_shard(file, &file->sources[i], index->files[i]);
    if (status == STATUS_OK) {
        status = check_index(file, index);
        in_index = status < 0;
    }
    if (in_index)
        base_error_prefix("%s: ", path);
    json_decref(index->root);
    free(index);
    return status;
}

/* model.safetensors, else the shards of the index: the order of transformers. */
static int open_weights(struct model_file *file) {
    static const char single[] = "model.safetensors";
    struct map_file map = {0};
    char *path = NULL;
    int status = join(file->path, single, &path);
    struct stat info;
    if (status == STATUS_OK && stat(path, &info) == 0) {
        free(path);
        TRY(model_parts_alloc_sources(file, 1));
        return open_shard(file, &file->sources[0], single);
    }
    free(path);
    path = NULL;
    TRY(status);
    status = map_named(file->path, "model.safetensors.index.json", true, &map, &path);
    if (status == 1)
        status = open_shards(file, &map, path);
    else if (status == 0)
        status = base_fail(STATUS_INPUT, __FILE__, __LINE__,
                           "%s: neither model.safetensors nor model.safetensors.index.json", file->path);
    map_file_close(&map);
    free(path);
    return status;
}

static int copy_template(struct model_file *file, const char *text, size_t bytes) {
    if (memchr(text, '\0', bytes))
        FAIL(STATUS_INPUT, "chat template: holds a NUL");
    file->chat_template = strndup(text, bytes);
    if (!file->chat_template)
        FAIL(STATUS_MEMORY, "out of memory: the chat template");
    return STATUS_OK;
}

/* chat_template in tokenizer_config.json: a text, or a list of named ones, of which "default" is meant. */
static int find_template(struct model_file *file, json_t *root) {
    json_t *value = json_object_get(root, "chat_template");
    for (size_t i = 0; json_is_array(value) && i < json_array_size(value); i++) {
        json_t *entry = json_array_get(value, i);
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name && strcmp(name, "default") == 0) {
            value = json_object_get(entry, "template");
            break;
        }
    }
    if (!value || json_is_null(value) || json_is_array(value))
        return STATUS_OK;
    if (!json_is_string(value))
        FAIL(STATUS_INPUT, "chat_template: expected a text or a list of named texts");
    return copy_template(file, json_string_value(value), json_string_length(value));
}

static int read_tokenizer_config(struct model_file *file) {
    json_error_t error;
    json_t *root = json_loadb((const char *)file->tokenizer_config.data, file->tokenizer_config.bytes,
                              JSON_REJECT_DUPLICATES, &error);
    if (!root)
        FAIL(STATUS_INPUT, "line %d: %s", error.line, error.text);
    int status = find_template(file, root);
    json_decref(root);
    return status;
}

/* chat_template.jinja goes before the template in tokenizer_config.json, as in transformers. */
static int read_template(struct model_file *file) {
    struct map_file map = {0};
    char *path = NULL;
    int status = map_named(file->path, "chat_template.jinja", true, &map, &path);
    if (status == 1)
        status = copy_template(file, map.data ? (const char *)map.data : "", map.bytes);
    else if (status == 0 && file->tokenizer_config.data) {
        status = read_tokenizer_config(file);
        if (status < 0)
            base_error_prefix("%s/tokenizer_config.json: ", file->path);
    }
    map_file_close(&map);
    free(path);
    return status < 0 ? status : STATUS_OK;
}

static int read_tokenizer(struct model_file *file) {
    struct tokenizer_source *source = &file->tokenizer;
    source->path = file->path;
    source->bos_id = file->config.bos_id;
    source->eos_id = file->config.n_stop > 0 ? file->config.stop_id[0] : -1; /* config.json's come first */
    char *path = NULL;
    int status = map_named(file->path, "tokenizer.json", true, &file->tokenizer_json, &path);
    free(path);
    TRY(status);
    status = map_named(file->path, "tokenizer_config.json", true, &file->tokenizer_config, &path);
    free(path);
    TRY(status);
    source->json = (const char *)file->tokenizer_json.data;
    source->json_bytes = file->tokenizer_json.bytes;
    source->config_json = (const char *)file->tokenizer_config.data;
    source->config_json_bytes = file->tokenizer_config.bytes;
    TRY(read_template(file));
    source->chat_template = file->chat_template;
    return STATUS_OK;
}

int model_folder_read(struct model_file *file) {
    TRY(read_config(file, "config.json", false, model_config_json_read));
    TRY(read_config(file, "generation_config.json", true, model_config_json_add_generation));
    TRY(open_weights(file));
    return read_tokenizer(file);
}
