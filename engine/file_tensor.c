/* What the readers of safetensors and GGUF share: counting values without overflow, names, shapes as text. */
#include "engine/file_tensor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int file_tensor_count(const int64_t *shape, int n_dims, int64_t *count) {
    int64_t product = 1;
    for (int i = 0; i < n_dims; i++) {
        if (shape[i] < 0)
            FAIL(STATUS_INPUT, "dimension %d is %lld", i, (long long)shape[i]);
        if (__builtin_mul_overflow(product, shape[i], &product))
            FAIL(STATUS_INPUT, "the shape has more than 2^63 values");
    }
    *count = product;
    return STATUS_OK;
}

void file_tensor_free(struct file_tensor *tensors, int n) {
    for (int i = 0; i < n; i++)
        free(tensors[i].name);
    free(tensors);
}

static int compare_tensors(const void *a, const void *b) {
    return strcmp(((const struct file_tensor *)a)->name, ((const struct file_tensor *)b)->name);
}

static int compare_name(const void *name, const void *tensor) {
    return strcmp(name, ((const struct file_tensor *)tensor)->name);
}

int file_tensor_sort(struct file_tensor *tensors, int n) {
    if (n > 0)
        qsort(tensors, (size_t)n, sizeof *tensors, compare_tensors);
    for (int i = 1; i < n; i++)
        if (strcmp(tensors[i - 1].name, tensors[i].name) == 0)
            FAIL(STATUS_INPUT, "tensor %s: there twice", tensors[i].name);
    return STATUS_OK;
}

const struct file_tensor *file_tensor_find(const struct file_tensor *tensors, int n, const char *name) {
    return n > 0 ? bsearch(name, tensors, (size_t)n, sizeof *tensors, compare_name) : NULL;
}

const char *file_tensor_shape_text(const int64_t *shape, int n_dims, char text[FILE_TENSOR_SHAPE_TEXT]) {
    int at = snprintf(text, FILE_TENSOR_SHAPE_TEXT, "[");
    for (int i = 0; i < n_dims && at < FILE_TENSOR_SHAPE_TEXT; i++)
        at += snprintf(text + at, (size_t)(FILE_TENSOR_SHAPE_TEXT - at), "%s%lld", i ? "," : "", (long long)shape[i]);
    if (at < FILE_TENSOR_SHAPE_TEXT)
        snprintf(text + at, (size_t)(FILE_TENSOR_SHAPE_TEXT - at), "]");
    return text;
}
