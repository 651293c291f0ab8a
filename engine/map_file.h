/* A whole file, mapped read-only and shared between the ranks of a node through the page cache. */
#pragma once

#include "kernels/base.h"

struct map_file {
    const uint8_t *data; /* NULL when the file is empty */
    size_t bytes;
};

/* Maps the regular file `path`. Error texts do not name the file: the caller puts its path before them. */
int map_file_open(const char *path, struct map_file *out);

/* The pages of these bytes of a mapping leave the process' resident set (not the page cache) until they are touched again. */
void map_file_drop(const void *data, size_t bytes);

/* Also for a zeroed struct. */
void map_file_close(struct map_file *map);
