/* Strict reader of one GGUF file (versions 2 and 3, little-endian): metadata and tensors. Every length is checked against
 * what is left of the file before it is used. Error texts begin with the path. */
#pragma once

#include "engine/file_tensor.h"

struct gguf;

int gguf_open(const char *path, struct gguf **out);
void gguf_close(struct gguf *file);

/* Sorted by name; names as in the file. They live as long as the file. */
const struct file_tensor *gguf_tensors(const struct gguf *file, int *n);

/* Metadata by key. Each returns 1 and the value, 0 when the key is absent (*out is left alone), or STATUS_INPUT when the
 * value has another type. A text is NUL-terminated and lives as long as the file. */
int gguf_get_int(const struct gguf *file, const char *key, int64_t *out);
int gguf_get_real(const struct gguf *file, const char *key, double *out);
int gguf_get_bool(const struct gguf *file, const char *key, bool *out);
int gguf_get_text(const struct gguf *file, const char *key, const char **out);

/* An array of strings: NUL-terminated copies and their lengths (a string may hold a NUL). Same returns; freed with
 * gguf_texts_free, also when zeroed. */
struct gguf_texts {
    const char **text;
    size_t *bytes;
    int n;
    char *memory; /* where the texts stand */
};
int gguf_get_texts(const struct gguf *file, const char *key, struct gguf_texts *out);
void gguf_texts_free(struct gguf_texts *texts);

/* An array of 32-bit integers, copied; the caller frees *out. Same returns. */
int gguf_get_ints(const struct gguf *file, const char *key, int32_t **out, int *n);
