/* A tensor as a reader of one file format found it: under the file's own name and type, its place checked against the
 * file's end, its meaning not yet known. */
#pragma once

#include "engine/model_file.h"

struct file_tensor {
    char *name;
    const char *type; /* the format's word for the element type, for messages */
    int dtype;        /* enum dtype, or -1: a type of the format that this program does not compute with */
    int n_dims;
    int64_t shape[MODEL_MAX_DIMS]; /* outermost first */
    const void *data;
    size_t bytes;
};

/* Values of a shape; fails on a negative dimension and on a product beyond int64_t. */
int file_tensor_count(const int64_t *shape, int n_dims, int64_t *count);

/* Frees a list whose names are malloced. */
void file_tensor_free(struct file_tensor *tensors, int n);

/* Sorts by name for file_tensor_find; a name that is there twice is an error. */
int file_tensor_sort(struct file_tensor *tensors, int n);

/* NULL when no tensor of the sorted list has that name. */
const struct file_tensor *file_tensor_find(const struct file_tensor *tensors, int n, const char *name);

enum { FILE_TENSOR_SHAPE_TEXT = 96 };

/* "[576,1536]" into `text`, which it returns. */
const char *file_tensor_shape_text(const int64_t *shape, int n_dims, char text[FILE_TENSOR_SHAPE_TEXT]);
