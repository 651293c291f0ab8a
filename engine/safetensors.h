/* Strict reader of one safetensors file: a 64-bit header length, a JSON header, then the tensors' bytes without a hole.
 * Everything is checked against the file's size before it is used. Error texts begin with the path. */
#pragma once

#include "engine/file_tensor.h"

struct safetensors;

int safetensors_open(const char *path, struct safetensors **out);
void safetensors_close(struct safetensors *file);

/* Sorted by name; they live as long as the file. */
const struct file_tensor *safetensors_tensors(const struct safetensors *file, int *n);

/* A text of the header's __metadata__; NULL when there is none of that key. */
const char *safetensors_metadata(const struct safetensors *file, const char *key);
