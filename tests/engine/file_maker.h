/* Makes files for the tests of the model readers: a growing buffer, the words of GGUF and safetensors, a temporary folder.
 * Little-endian, as the program itself. */
#pragma once

#include <ftw.h>
#include <stdarg.h>
#include <unistd.h>

#include "test.h"

struct maker {
    uint8_t *data;
    size_t n, room;
};

static inline void maker_put(struct maker *m, const void *bytes, size_t n) {
    if (m->n + n > m->room) {
        m->room = 2 * (m->n + n) + 64;
        m->data = realloc(m->data, m->room);
        if (!m->data)
            exit(1);
    }
    if (n > 0)
        memcpy(m->data + m->n, bytes, n);
    m->n += n;
}

static inline void maker_zeros(struct maker *m, size_t n) {
    static const uint8_t zeros[64];
    for (; n > 0; n -= n < 64 ? n : 64)
        maker_put(m, zeros, n < 64 ? n : 64);
}

static inline void maker_u32(struct maker *m, uint32_t value) { maker_put(m, &value, sizeof value); }
static inline void maker_u64(struct maker *m, uint64_t value) { maker_put(m, &value, sizeof value); }

static inline void maker_text(struct maker *m, const char *text) {
    maker_u64(m, strlen(text));
    maker_put(m, text, strlen(text));
}

static inline void maker_align(struct maker *m, size_t alignment) {
    maker_zeros(m, (alignment - m->n % alignment) % alignment);
}

static inline void maker_free(struct maker *m) {
    free(m->data);
    *m = (struct maker){0};
}

/* GGUF's value types */
enum { GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 };

static inline void maker_gguf_head(struct maker *m, uint32_t version, uint64_t n_tensors, uint64_t n_pairs) {
    maker_put(m, "GGUF", 4);
    maker_u32(m, version);
    maker_u64(m, n_tensors);
    maker_u64(m, n_pairs);
}

static inline void maker_gguf_u32(struct maker *m, const char *key, uint32_t value) {
    maker_text(m, key);
    maker_u32(m, GGUF_U32);
    maker_u32(m, value);
}

static inline void maker_gguf_f32(struct maker *m, const char *key, float value) {
    maker_text(m, key);
    maker_u32(m, GGUF_F32);
    maker_put(m, &value, sizeof value);
}

static inline void maker_gguf_text(struct maker *m, const char *key, const char *value) {
    maker_text(m, key);
    maker_u32(m, GGUF_STRING);
    maker_text(m, value);
}

static inline void maker_gguf_array(struct maker *m, const char *key, uint32_t item, uint64_t count) {
    maker_text(m, key);
    maker_u32(m, GGUF_ARRAY);
    maker_u32(m, item);
    maker_u64(m, count);
}

/* `columns` 0: a vector */
static inline void maker_gguf_info(struct maker *m, const char *name, uint64_t rows, uint64_t columns, uint32_t type,
                                   uint64_t offset) {
    maker_text(m, name);
    maker_u32(m, columns ? 2 : 1);
    if (columns)
        maker_u64(m, columns);
    maker_u64(m, rows);
    maker_u32(m, type);
    maker_u64(m, offset);
}

/* A safetensors file of a header and that many bytes of zeros. */
static inline void maker_safetensors(struct maker *m, const char *header, size_t data_bytes) {
    maker_text(m, header);
    maker_zeros(m, data_bytes);
}

static char maker_folder[64];

static inline int maker_remove(const char *path, const struct stat *info, int kind, struct FTW *place) {
    (void)info, (void)kind, (void)place;
    return remove(path);
}

static inline void maker_clean(void) { nftw(maker_folder, maker_remove, 8, FTW_DEPTH | FTW_PHYS); }

/* The temporary folder of this test, removed when the program ends. */
static inline const char *maker_temp(void) {
    if (maker_folder[0] == '\0') {
        snprintf(maker_folder, sizeof maker_folder, "/tmp/kvlinc-test-XXXXXX");
        if (!mkdtemp(maker_folder))
            exit(1);
        atexit(maker_clean);
    }
    return maker_folder;
}

/* Path of a file in the temporary folder; valid until the fourth next call. */
static inline const char *maker_path(const char *name) {
    static char paths[4][256];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", maker_temp(), name);
    return path;
}

static inline const char *maker_write(const char *name, const void *data, size_t n) {
    const char *path = maker_path(name);
    remove(path); /* a new file: writing over an old one makes some file systems wait for the disk */
    FILE *out = fopen(path, "wb");
    if (!out || (n > 0 && fwrite(data, 1, n, out) != n) || fclose(out) != 0) {
        perror(path);
        exit(1);
    }
    return path;
}

static inline const char *maker_save(struct maker *m, const char *name) {
    const char *path = maker_write(name, m->data, m->n);
    maker_free(m);
    return path;
}

/* Writes the file as `name` n times, each time with one other byte of its first `bytes` changed: `try_open` must open it or say
 * STATUS_INPUT, and both must happen. */
static inline void maker_mutate(struct maker *m, const char *name, size_t bytes, int n, uint64_t seed, int (*try_open)(const char *path)) {
    int n_opened = 0;
    for (int i = 0; i < n; i++) {
        size_t at = test_hash(seed, (uint64_t)i) % bytes;
        uint8_t kept = m->data[at];
        m->data[at] = (uint8_t)test_hash(seed + 1, (uint64_t)i);
        int status = try_open(maker_write(name, m->data, m->n));
        CHECK(status == STATUS_OK || status == STATUS_INPUT, "mutation %d: %d %s", i, status, base_error());
        n_opened += status == STATUS_OK;
        base_clear_error();
        m->data[at] = kept;
    }
    CHECK(n_opened > 0 && n_opened < n, "%d opened", n_opened);
}
