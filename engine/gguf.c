/* GGUF: magic, version, counts, key-value pairs, tensor infos, then the data from the next aligned byte. As ggml demands,
 * tensors stand in the order of their infos with nothing but padding between them; so an overlap cannot pass. */
#include "engine/gguf.h"

#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "engine/map_file.h"

enum {
    VALUE_U8, VALUE_I8, VALUE_U16, VALUE_I16, VALUE_U32, VALUE_I32, VALUE_F32, VALUE_BOOL,
    VALUE_STRING, VALUE_ARRAY, VALUE_U64, VALUE_I64, VALUE_F64, N_VALUE_TYPES,
};
enum {
    DEFAULT_ALIGNMENT = 32,
    MOST_ALIGNMENT = 1 << 20,
    LEAST_PAIR_BYTES = 8 + 4 + 1,          /* length of an empty key, type, a one-byte value */
    LEAST_INFO_BYTES = 8 + 4 + 8 + 4 + 8,  /* length of an empty name, n_dims, one dimension, type, offset */
};

static const struct {
    const char *name;
    size_t bytes; /* 0: of no fixed size */
} value_types[N_VALUE_TYPES] = {
    [VALUE_U8] = {"uint8", 1},   [VALUE_I8] = {"int8", 1},   [VALUE_U16] = {"uint16", 2}, [VALUE_I16] = {"int16", 2},
    [VALUE_U32] = {"uint32", 4}, [VALUE_I32] = {"int32", 4}, [VALUE_F32] = {"float32", 4}, [VALUE_BOOL] = {"bool", 1},
    [VALUE_STRING] = {"string", 0}, [VALUE_ARRAY] = {"array", 0}, [VALUE_U64] = {"uint64", 8},
    [VALUE_I64] = {"int64", 8},  [VALUE_F64] = {"float64", 8},
};

/* ggml's tensor types by number: all are measured, so that places can be checked; dtype is -1 where a tensor of the type
 * cannot be used. */
static const struct element {
    const char *name; /* NULL: a number that ggml gave to no type or took back */
    int block;
    int bytes;
    int dtype;
} elements[] = {
    [0] = {"F32", 1, 4, DTYPE_F32},       [1] = {"F16", 1, 2, DTYPE_F16},       [2] = {"Q4_0", 32, 18, DTYPE_Q4_0},
    [3] = {"Q4_1", 32, 20, DTYPE_Q4_1},   [6] = {"Q5_0", 32, 22, DTYPE_Q5_0},   [7] = {"Q5_1", 32, 24, DTYPE_Q5_1},
    [8] = {"Q8_0", 32, 34, DTYPE_Q8_0},   [9] = {"Q8_1", 32, 40, -1},           [10] = {"Q2_K", 256, 84, -1},
    [11] = {"Q3_K", 256, 110, -1},        [12] = {"Q4_K", 256, 144, DTYPE_Q4_K}, [13] = {"Q5_K", 256, 176, DTYPE_Q5_K},
    [14] = {"Q6_K", 256, 210, DTYPE_Q6_K}, [15] = {"Q8_K", 256, 292, -1},        [16] = {"IQ2_XXS", 256, 66, -1},
    [17] = {"IQ2_XS", 256, 74, -1},       [18] = {"IQ3_XXS", 256, 98, -1},      [19] = {"IQ1_S", 256, 50, -1},
    [20] = {"IQ4_NL", 32, 18, -1},        [21] = {"IQ3_S", 256, 110, -1},       [22] = {"IQ2_S", 256, 82, -1},
    [23] = {"IQ4_XS", 256, 136, -1},      [24] = {"I8", 1, 1, -1},              [25] = {"I16", 1, 2, -1},
    [26] = {"I32", 1, 4, DTYPE_I32},      [27] = {"I64", 1, 8, -1},             [28] = {"F64", 1, 8, -1},
    [29] = {"IQ1_M", 256, 56, -1},        [30] = {"BF16", 1, 2, DTYPE_BF16},    [34] = {"TQ1_0", 256, 54, -1},
    [35] = {"TQ2_0", 256, 66, -1},        [39] = {"MXFP4", 32, 17, -1},         [40] = {"NVFP4", 64, 36, -1},
    [41] = {"Q1_0", 128, 18, -1},
};
enum { N_ELEMENTS = sizeof elements / sizeof *elements };

struct value {
    char *key;
    uint32_t type;
    uint32_t item;       /* of an array: the type of its values */
    uint64_t count;      /* of an array: how many; else 1 */
    const uint8_t *data; /* the first value; lengths of strings have been checked */
    char *text;          /* of a string: a NUL-terminated copy */
};

struct gguf {
    char *path;
    struct map_file map;
    struct value *values; /* sorted by key */
    uint64_t n_values;
    struct file_tensor *tensors;
    int n_tensors;
};

struct cursor {
    const uint8_t *data;
    size_t bytes, at;
};

static size_t left(const struct cursor *cursor) { return cursor->bytes - cursor->at; }

/* Zeroes *out when the file is too short. */
static int take(struct cursor *cursor, void *out, size_t bytes, const char *what) {
    memset(out, 0, bytes);
    if (bytes > left(cursor))
        FAIL(STATUS_INPUT, "%s: %zu bytes at byte %zu, the file ends at %zu", what, bytes, cursor->at, cursor->bytes);
    memcpy(out, cursor->data + cursor->at, bytes);
    cursor->at += bytes;
    return STATUS_OK;
}

static int skip(struct cursor *cursor, uint64_t bytes, const char *what) {
    if (bytes > left(cursor))
        FAIL(STATUS_INPUT, "%s: %" PRIu64 " bytes at byte %zu, the file ends at %zu", what, bytes, cursor->at,
             cursor->bytes);
    cursor->at += (size_t)bytes;
    return STATUS_OK;
}

/* A malloced, NUL-terminated copy of the string at the cursor; for keys, names and single values, which hold no NUL. */
static int take_text(struct cursor *cursor, char **out, const char *what) {
    uint64_t bytes;
    TRY(take(cursor, &bytes, sizeof bytes, what));
    const char *text = (const char *)cursor->data + cursor->at;
    TRY(skip(cursor, bytes, what));
    if (memchr(text, '\0', (size_t)bytes))
        FAIL(STATUS_INPUT, "%s: the text at byte %td holds a NUL", what, text - (const char *)cursor->data);
    *out = strndup(text, (size_t)bytes);
    if (!*out)
        FAIL(STATUS_MEMORY, "out of memory: %s", what);
    return STATUS_OK;
}

static int skip_items(struct cursor *cursor, uint32_t type, uint64_t count, const char *key) {
    size_t bytes = type == VALUE_STRING ? sizeof(uint64_t) : value_types[type].bytes;
    if (count > left(cursor) / bytes)
        FAIL(STATUS_INPUT, "%s: an array of %" PRIu64 " values at byte %zu, the file ends at %zu", key, count,
             cursor->at, cursor->bytes);
    if (type != VALUE_STRING)
        return skip(cursor, count * bytes, key);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t length;
        TRY(take(cursor, &length, sizeof length, key));
        TRY(skip(cursor, length, key));
    }
    return STATUS_OK;
}

static int read_value(struct cursor *cursor, struct value *value) {
    TRY(take_text(cursor, &value->key, "a metadata key"));
    TRY(take(cursor, &value->type, sizeof value->type, value->key));
    if (value->type >= N_VALUE_TYPES)
        FAIL(STATUS_INPUT, "%s: value type %u is unknown", value->key, value->type);
    value->count = 1;
    value->data = cursor->data + cursor->at;
    if (value->type == VALUE_STRING)
        return take_text(cursor, &value->text, value->key);
    if (value->type != VALUE_ARRAY)
        return skip(cursor, value_types[value->type].bytes, value->key);
    TRY(take(cursor, &value->item, sizeof value->item, value->key));
    TRY(take(cursor, &value->count, sizeof value->count, value->key));
    if (value->item >= N_VALUE_TYPES || value->item == VALUE_ARRAY)
        FAIL(STATUS_INPUT, "%s: an array of type %u, expected plain values or strings", value->key, value->item);
    value->data = cursor->data + cursor->at;
    return skip_items(cursor, value->item, value->count, value->key);
}

static int compare_values(const void *a, const void *b) {
    return strcmp(((const struct value *)a)->key, ((const struct value *)b)->key);
}

static int read_values(struct gguf *file, struct cursor *cursor, uint64_t count) {
    if (count > left(cursor) / LEAST_PAIR_BYTES)
        FAIL(STATUS_INPUT, "%" PRIu64 " metadata pairs, more than fit in the file's %zu bytes", count, cursor->bytes);
    TRY(base_alloc(&file->values, (size_t)count, sizeof *file->values));
    for (uint64_t i = 0; i < count; i++) {
        file->n_values = i + 1; /* also what a failed read has copied is freed */
        TRY(read_value(cursor, &file->values[i]));
    }
    qsort(file->values, (size_t)count, sizeof *file->values, compare_values);
    for (uint64_t i = 1; i < count; i++)
        if (strcmp(file->values[i - 1].key, file->values[i].key) == 0)
            FAIL(STATUS_INPUT, "%s: there twice", file->values[i].key);
    return STATUS_OK;
}

/* GGUF writes the innermost dimension first. */
static int read_shape(struct cursor *cursor, struct file_tensor *tensor) {
    uint32_t n_dims;
    TRY(take(cursor, &n_dims, sizeof n_dims, tensor->name));
    if (n_dims < 1 || n_dims > MODEL_MAX_DIMS)
        FAIL(STATUS_INPUT, "tensor %s: %u dimensions, expected 1 to %d", tensor->name, n_dims, MODEL_MAX_DIMS);
    tensor->n_dims = (int)n_dims;
    for (int i = tensor->n_dims - 1; i >= 0; i--)
        TRY(take(cursor, &tensor->shape[i], sizeof tensor->shape[i], tensor->name));
    return STATUS_OK;
}

/* `offset` is where the data of this tensor must begin, as the tensors before it have it; moved on to the next one. */
static int read_info(struct cursor *cursor, struct file_tensor *tensor, uint64_t alignment, uint64_t *offset) {
    TRY(take_text(cursor, &tensor->name, "a tensor's name"));
    TRY(read_shape(cursor, tensor));
    uint32_t type;
    uint64_t place;
    TRY(take(cursor, &type, sizeof type, tensor->name));
    TRY(take(cursor, &place, sizeof place, tensor->name));
    if (type >= N_ELEMENTS || !elements[type].name)
        FAIL(STATUS_INPUT, "tensor %s: type %u is unknown", tensor->name, type);
    const struct element *element = &elements[type];
    tensor->type = element->name;
    tensor->dtype = element->dtype;
    char text[FILE_TENSOR_SHAPE_TEXT];
    int64_t count = 0, bytes = 0;
    int status = file_tensor_count(tensor->shape, tensor->n_dims, &count);
    if (status < 0) {
        base_error_prefix("tensor %s: ", tensor->name);
        return status;
    }
    if (tensor->shape[tensor->n_dims - 1] % element->block != 0)
        FAIL(STATUS_INPUT, "tensor %s: shape %s, rows of type %s are multiples of %d", tensor->name,
             file_tensor_shape_text(tensor->shape, tensor->n_dims, text), element->name, element->block);
    if (__builtin_mul_overflow(count / element->block, (int64_t)element->bytes, &bytes) ||
        (uint64_t)bytes > cursor->bytes)
        FAIL(STATUS_INPUT, "tensor %s: shape %s of type %s is larger than the file's %zu bytes", tensor->name,
             file_tensor_shape_text(tensor->shape, tensor->n_dims, text), element->name, cursor->bytes);
    if (place != *offset)
        FAIL(STATUS_INPUT, "tensor %s: offset %" PRIu64 ", expected %" PRIu64 " (right after the tensor before)",
             tensor->name, place, *offset);
    tensor->bytes = (size_t)bytes;
    *offset += ((uint64_t)bytes + alignment - 1) / alignment * alignment;
    if (*offset > (uint64_t)INT64_MAX / 2)
        FAIL(STATUS_INPUT, "tensor %s: lies beyond the file's end", tensor->name);
    return STATUS_OK;
}

/* Data pointers, once it is known where the data begins. The infos are still in the order of the file. */
static int place_tensors(struct gguf *file, const struct cursor *cursor, uint64_t alignment) {
    uint64_t at = ((uint64_t)cursor->at + alignment - 1) / alignment * alignment;
    for (int i = 0; i < file->n_tensors; i++) {
        struct file_tensor *tensor = &file->tensors[i];
        if (at > cursor->bytes || tensor->bytes > cursor->bytes - at)
            FAIL(STATUS_INPUT, "tensor %s: bytes %" PRIu64 " to %" PRIu64 ", the file ends at %zu", tensor->name, at,
                 at + tensor->bytes, cursor->bytes);
        tensor->data = cursor->data + at;
        at += (tensor->bytes + alignment - 1) / alignment * alignment;
    }
    if (cursor->bytes > at)
        FAIL(STATUS_INPUT, "%zu bytes, the last tensor ends at %" PRIu64, cursor->bytes, at);
    return STATUS_OK;
}

static int read_tensors(struct gguf *file, struct cursor *cursor, uint64_t count) {
    int64_t alignment = DEFAULT_ALIGNMENT;
    TRY(gguf_get_int(file, "general.alignment", &alignment));
    if (alignment < 1 || alignment > MOST_ALIGNMENT || (alignment & (alignment - 1)) != 0)
        FAIL(STATUS_INPUT, "general.alignment: %" PRId64 ", expected a power of two up to %d", alignment,
             MOST_ALIGNMENT);
    if (count > left(cursor) / LEAST_INFO_BYTES || count > INT_MAX)
        FAIL(STATUS_INPUT, "%" PRIu64 " tensors, more than fit in the file's %zu bytes", count, cursor->bytes);
    TRY(base_alloc(&file->tensors, (size_t)count, sizeof *file->tensors));
    uint64_t offset = 0;
    for (uint64_t i = 0; i < count; i++) {
        file->n_tensors = (int)i + 1;
        TRY(read_info(cursor, &file->tensors[i], (uint64_t)alignment, &offset));
    }
    TRY(place_tensors(file, cursor, (uint64_t)alignment));
    return file_tensor_sort(file->tensors, file->n_tensors);
}

static int read_file(struct gguf *file) {
    struct cursor cursor = {file->map.data, file->map.bytes, 0};
    char magic[4];
    uint32_t version;
    uint64_t n_tensors, n_values;
    TRY(take(&cursor, magic, sizeof magic, "the magic"));
    if (memcmp(magic, "GGUF", sizeof magic) != 0)
        FAIL(STATUS_INPUT, "not a GGUF file: it does not begin with 'GGUF'");
    TRY(take(&cursor, &version, sizeof version, "the version"));
    if (version != 0 && (version & 0xffff) == 0)
        FAIL(STATUS_INPUT, "a big-endian GGUF file (version field 0x%08x), expected little-endian", version);
    if (version != 2 && version != 3)
        FAIL(STATUS_INPUT, "GGUF version %u, expected 2 or 3", version);
    TRY(take(&cursor, &n_tensors, sizeof n_tensors, "the number of tensors"));
    TRY(take(&cursor, &n_values, sizeof n_values, "the number of metadata pairs"));
    TRY(read_values(file, &cursor, n_values));
    return read_tensors(file, &cursor, n_tensors);
}

int gguf_open(const char *path, struct gguf **out) {
    *out = NULL;
    struct gguf *file;
    TRY(base_alloc(&file, 1, sizeof *file));
    file->path = strdup(path);
    int status = file->path ? map_file_open(path, &file->map) : base_fail_text(STATUS_MEMORY, "out of memory: a path");
    if (status == STATUS_OK)
        status = read_file(file);
    if (status < 0) {
        base_error_prefix("%s: ", path);
        gguf_close(file);
        return status;
    }
    *out = file;
    return STATUS_OK;
}

void gguf_close(struct gguf *file) {
    if (!file)
        return;
    for (uint64_t i = 0; i < file->n_values; i++) {
        free(file->values[i].key);
        free(file->values[i].text);
    }
    free(file->values);
    file_tensor_free(file->tensors, file->n_tensors);
    map_file_close(&file->map);
    free(file->path);
    free(file);
}

const struct file_tensor *gguf_tensors(const struct gguf *file, int *n) {
    *n = file->n_tensors;
    return file->tensors;
}

static int compare_key(const void *key, const void *value) { return strcmp(key, ((const struct value *)value)->key); }

static const struct value *find_value(const struct gguf *file, const char *key) {
    if (file->n_values == 0)
        return NULL;
    return bsearch(key, file->values, (size_t)file->n_values, sizeof *file->values, compare_key);
}

static int wrong_type(const struct value *value, const char *expected) {
    bool array = value->type == VALUE_ARRAY;
    FAIL(STATUS_INPUT, "%s: a value of type %s%s, expected %s", value->key, array ? "array of " : "",
         value_types[array ? value->item : value->type].name, expected);
}

int gguf_get_int(const struct gguf *file, const char *key, int64_t *out) {
    const struct value *value = find_value(file, key);
    if (!value)
        return 0;
    size_t bytes = value_types[value->type].bytes;
    uint64_t raw = 0; /* little-endian: the low bytes come first */
    switch (value->type) {
    case VALUE_U8: case VALUE_U16: case VALUE_U32: case VALUE_U64:
        memcpy(&raw, value->data, bytes);
        if (raw > INT64_MAX)
            FAIL(STATUS_INPUT, "%s: %" PRIu64 " is too large", key, raw);
        *out = (int64_t)raw;
        return 1;
    case VALUE_I8: case VALUE_I16: case VALUE_I32: case VALUE_I64:
        memcpy(&raw, value->data, bytes);
        if (bytes < 8 && raw >> (8 * bytes - 1))
            raw |= UINT64_MAX << (8 * bytes); /* sign */
        *out = (int64_t)raw;
        return 1;
    default:
        return wrong_type(value, "an integer");
    }
}

int gguf_get_real(const struct gguf *file, const char *key, double *out) {
    const struct value *value = find_value(file, key);
    if (!value)
        return 0;
    if (value->type == VALUE_F64) {
        memcpy(out, value->data, sizeof *out);
        return 1;
    }
    if (value->type != VALUE_F32)
        return wrong_type(value, "a floating-point number");
    float single;
    memcpy(&single, value->data, sizeof single);
    *out = (double)single;
    return 1;
}

int gguf_get_bool(const struct gguf *file, const char *key, bool *out) {
    const struct value *value = find_value(file, key);
    if (!value)
        return 0;
    if (value->type != VALUE_BOOL)
        return wrong_type(value, "a bool");
    if (*value->data > 1)
        FAIL(STATUS_INPUT, "%s: %d, expected 0 or 1", key, *value->data);
    *out = *value->data == 1;
    return 1;
}

int gguf_get_text(const struct gguf *file, const char *key, const char **out) {
    const struct value *value = find_value(file, key);
    if (!value)
        return 0;
    if (value->type != VALUE_STRING)
        return wrong_type(value, "a string");
    *out = value->text;
    return 1;
}

static int copy_texts(const struct value *value, struct gguf_texts *out) {
    size_t total = 0;
    const uint8_t *at = value->data;
    for (int i = 0; i < out->n; i++) {
        uint64_t bytes;
        memcpy(&bytes, at, sizeof bytes);
        at += sizeof bytes + bytes;
        total += (size_t)bytes + 1;
    }
    TRY(base_alloc(&out->text, (size_t)out->n, sizeof *out->text));
    TRY(base_alloc(&out->bytes, (size_t)out->n, sizeof *out->bytes));
    TRY(base_alloc(&out->memory, total, 1));
    char *copy = out->memory;
    at = value->data;
    for (int i = 0; i < out->n; i++) {
        uint64_t bytes;
        memcpy(&bytes, at, sizeof bytes);
        memcpy(copy, at + sizeof bytes, (size_t)bytes); /* the NUL after it is calloc's */
        out->text[i] = copy;
        out->bytes[i] = (size_t)bytes;
        copy += bytes + 1;
        at += sizeof bytes + bytes;
    }
    return STATUS_OK;
}

int gguf_get_texts(const struct gguf *file, const char *key, struct gguf_texts *out) {
    const struct value *value = find_value(file, key);
    if (!value)
        return 0;
    if (value->type != VALUE_ARRAY || value->item != VALUE_STRING)
        return wrong_type(value, "an array of strings");
    if (value->count > INT_MAX)
        FAIL(STATUS_INPUT, "%s: %" PRIu64 " strings, expected at most %d", key, value->count, INT_MAX);
    *out = (struct gguf_texts){.n = (int)value->count};
    int status = copy_texts(value, out);
    if (status < 0) {
        gguf_texts_free(out);
        return status;
    }
    return 1;
}

void gguf_texts_free(struct gguf_texts *texts) {
    free(texts->text);
    free(texts->bytes);
    free(texts->memory);
    *texts = (struct gguf_texts){0};
}

int gguf_get_ints(const struct gguf *file, const char *key, int32_t **out, int *n) {
    const struct value *value = find_value(file, key);
    if (!value)
        return 0;
    if (value->type != VALUE_ARRAY || (value->item != VALUE_I32 && value->item != VALUE_U32))
        return wrong_type(value, "an array of int32");
    if (value->count > INT_MAX)
        FAIL(STATUS_INPUT, "%s: %" PRIu64 " values, expected at most %d", key, value->count, INT_MAX);
    TRY(base_alloc(out, (size_t)value->count, sizeof **out));
    memcpy(*out, value->data, (size_t)value->count * sizeof **out);
    *n = (int)value->count;
    return 1;
}
