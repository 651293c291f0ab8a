/* Safetensors. The format forbids what a lenient reader would let through: tensors that overlap, bytes that belong to no
 * tensor, a header that says one size in shape and dtype and another in its offsets. All of it is refused here. */
#include "engine/safetensors.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "engine/map_file.h"

enum {
    LENGTH_BYTES = 8,
    MOST_HEADER_BYTES = 100000000, /* the limit of the reference implementation */
    MOST_TENSORS = 1000000,
};

/* Every element type of the format, in bits; dtype is -1 where this program has none. */
static const struct element {
    const char *name;
    int bits;
    int dtype;
} elements[] = {
    {"F32", 32, DTYPE_F32},  {"F16", 16, DTYPE_F16}, {"BF16", 16, DTYPE_BF16}, {"I32", 32, DTYPE_I32},
    {"F64", 64, -1},         {"C64", 64, -1},        {"I64", 64, -1},          {"U64", 64, -1},
    {"U32", 32, -1},         {"I16", 16, -1},        {"U16", 16, -1},          {"I8", 8, -1},
    {"U8", 8, -1},           {"BOOL", 8, -1},        {"F8_E4M3", 8, -1},       {"F8_E5M2", 8, -1},
    {"F8_E8M0", 8, -1},      {"F8_E4M3FNUZ", 8, -1}, {"F8_E5M2FNUZ", 8, -1},   {"F6_E2M3", 6, -1},
    {"F6_E3M2", 6, -1},      {"F4", 4, -1},
};
enum { N_ELEMENTS = sizeof elements / sizeof *elements };

struct safetensors {
    struct map_file map;
    struct file_tensor *tensors; /* names are ours */
    int n_tensors;
    json_t *metadata; /* NULL without */
};

struct area {
    const uint8_t *data; /* first byte after the header */
    size_t bytes;
};

static const struct element *find_element(const char *name) {
    for (int i = 0; i < N_ELEMENTS; i++)
        if (strcmp(elements[i].name, name) == 0)
            return &elements[i];
    return NULL;
}

static int read_shape(json_t *shape, struct file_tensor *tensor) {
    if (!json_is_array(shape))
        FAIL(STATUS_INPUT, "shape: expected an array of integers");
    if (json_array_size(shape) > MODEL_MAX_DIMS)
        FAIL(STATUS_INPUT, "shape: %zu dimensions, expected at most %d", json_array_size(shape), MODEL_MAX_DIMS);
    tensor->n_dims = (int)json_array_size(shape);
    for (int i = 0; i < tensor->n_dims; i++) {
        json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim))
            FAIL(STATUS_INPUT, "shape: dimension %d is not an integer", i);
        tensor->shape[i] = json_integer_value(dim);
    }
    return STATUS_OK;
}

static int read_offsets(json_t *offsets, struct area area, int64_t *begin, int64_t *end) {
    if (!json_is_array(offsets) || json_array_size(offsets) != 2 || !json_is_integer(json_array_get(offsets, 0)) ||
        !json_is_integer(json_array_get(offsets, 1)))
        FAIL(STATUS_INPUT, "data_offsets: expected two integers");
    *begin = json_integer_value(json_array_get(offsets, 0));
    *end = json_integer_value(json_array_get(offsets, 1));
    if (*begin < 0 || *end < *begin || (uint64_t)*end > area.bytes)
        FAIL(STATUS_INPUT, "data_offsets [%" PRId64 ",%" PRId64 "], expected a range within the %zu bytes of data",
             *begin, *end, area.bytes);
    return STATUS_OK;
}

static int read_tensor(json_t *entry, struct area area, struct file_tensor *tensor) {
    static const char *const fields[] = {"dtype", "shape", "data_offsets"};
    if (!json_is_object(entry))
        FAIL(STATUS_INPUT, "expected an object with dtype, shape and data_offsets");
    for (int i = 0; i < 3; i++)
        if (!json_object_get(entry, fields[i]))
            FAIL(STATUS_INPUT, "%s is missing", fields[i]);
    if (json_object_size(entry) != 3)
        FAIL(STATUS_INPUT, "%zu fields, expected dtype, shape and data_offsets alone", json_object_size(entry));
    const char *type = json_string_value(json_object_get(entry, "dtype"));
    const struct element *element = type ? find_element(type) : NULL;
    if (!element)
        FAIL(STATUS_INPUT, "dtype %s is unknown", type ? type : "(not a string)");
    tensor->type = element->name;
    tensor->dtype = element->dtype;
    TRY(read_shape(json_object_get(entry, "shape"), tensor));
    int64_t count = 0, begin = 0, end = 0, bits = 0;
    TRY(file_tensor_count(tensor->shape, tensor->n_dims, &count));
    TRY(read_offsets(json_object_get(entry, "data_offsets"), area, &begin, &end));
    char text[FILE_TENSOR_SHAPE_TEXT];
    if (__builtin_mul_overflow(count, (int64_t)element->bits, &bits) || bits % 8 != 0 || bits / 8 != end - begin)
        FAIL(STATUS_INPUT, "dtype %s and shape %s do not make the %" PRId64 " bytes that data_offsets give", type,
             file_tensor_shape_text(tensor->shape, tensor->n_dims, text), end - begin);
    tensor->data = area.data + begin;
    tensor->bytes = (size_t)(end - begin);
    return STATUS_OK;
}

static int check_metadata(json_t *metadata) {
    const char *key;
    json_t *value;
    if (!json_is_object(metadata))
        FAIL(STATUS_INPUT, "__metadata__: expected an object");
    json_object_foreach(metadata, key, value)
        if (!json_is_string(value))
            FAIL(STATUS_INPUT, "__metadata__: %s is not a string", key);
    return STATUS_OK;
}

static int compare_places(const void *a, const void *b) {
    const struct file_tensor *x = a, *y = b;
    if (x->data != y->data)
        return (const uint8_t *)x->data < (const uint8_t *)y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

/* The tensors, in the order of their places, must tile the data from its first byte to its last. */
static int check_tiling(struct file_tensor *tensors, int n, struct area area) {
    if (n > 0)
        qsort(tensors, (size_t)n, sizeof *tensors, compare_places);
    const uint8_t *at = area.data;
    for (int i = 0; i < n; i++) {
        const uint8_t *data = tensors[i].data;
        if (data != at)
            FAIL(STATUS_INPUT, "tensor %s: begins at byte %td of the data, expected %td (%s)", tensors[i].name,
                 data - area.data, at - area.data, data < at ? "it overlaps another tensor" : "a hole before it");
        at += tensors[i].bytes;
    }
    if (at != area.data + area.bytes)
        FAIL(STATUS_INPUT, "%zu bytes of data, the header describes %td", area.bytes, at - area.data);
    return STATUS_OK;
}

static int read_entries(struct safetensors *file, json_t *header, struct area area) {
    const char *name;
    json_t *entry;
    if (json_object_size(header) > MOST_TENSORS)
        FAIL(STATUS_INPUT, "%zu tensors, expected at most %d", json_object_size(header), MOST_TENSORS);
    TRY(base_alloc(&file->tensors, json_object_size(header), sizeof *file->tensors));
    json_object_foreach(header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) {
            TRY(check_metadata(entry));
            file->metadata = json_incref(entry);
            continue;
        }
        struct file_tensor *tensor = &file->tensors[file->n_tensors];
        int status = read_tensor(entry, area, tensor);
        if (status < 0) {
            base_error_prefix("tensor %s: ", name);
            return status;
        }
        tensor->name = strdup(name);
        if (!tensor->name)
            FAIL(STATUS_MEMORY, "out of memory: a tensor's name");
        file->n_tensors++;
    }
    return STATUS_OK;
}

static int read_header(struct safetensors *file) {
    const struct map_file *map = &file->map;
    if (map->bytes < LENGTH_BYTES)
        FAIL(STATUS_INPUT, "%zu bytes, too short for a safetensors file", map->bytes);
    uint64_t header_bytes;
    memcpy(&header_bytes, map->data, sizeof header_bytes);
    if (header_bytes > MOST_HEADER_BYTES || header_bytes > map->bytes - LENGTH_BYTES)
        FAIL(STATUS_INPUT, "header of %" PRIu64 " bytes, expected at most %zu", header_bytes,
             (size_t)min_i64(MOST_HEADER_BYTES, (int64_t)(map->bytes - LENGTH_BYTES)));
    const char *text = (const char *)map->data + LENGTH_BYTES;
    if (header_bytes == 0 || text[0] != '{')
        FAIL(STATUS_INPUT, "the header does not begin with '{'");
    json_error_t error;
    json_t *header = json_loadb(text, (size_t)header_bytes, JSON_REJECT_DUPLICATES, &error);
    if (!header)
        FAIL(STATUS_INPUT, "header: byte %d: %s", error.position, error.text);
    struct area area = {map->data + LENGTH_BYTES + header_bytes, map->bytes - LENGTH_BYTES - (size_t)header_bytes};
    int status = read_entries(file, header, area);
    json_decref(header);
    TRY(status);
    TRY(check_tiling(file->tensors, file->n_tensors, area));
    return file_tensor_sort(file->tensors, file->n_tensors);
}

int safetensors_open(const char *path, struct safetensors **out) {
    *out = NULL;
    struct safetensors *file;
    TRY(base_alloc(&file, 1, sizeof *file));
    int status = map_file_open(path, &file->map);
    if (status == STATUS_OK)
        status = read_header(file);
    if (status < 0) {
        base_error_prefix("%s: ", path);
        safetensors_close(file);
        return status;
    }
    *out = file;
    return STATUS_OK;
}

void safetensors_close(struct safetensors *file) {
    if (!file)
        return;
    json_decref(file->metadata);
    file_tensor_free(file->tensors, file->n_tensors);
    map_file_close(&file->map);
    free(file);
}

const struct file_tensor *safetensors_tensors(const struct safetensors *file, int *n) {
    *n = file->n_tensors;
    return file->tensors;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key) {
    return json_string_value(json_object_get(file->metadata, key));
}
