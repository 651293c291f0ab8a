/* Stands in for engine/map_file.c in the readers' tests: the file is copied to the heap, byte for byte, so that the address
 * sanitizer sees a read one byte beyond its end, which a mapping rounded up to pages would hide. */
#include "engine/map_file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int map_file_open(const char *path, struct map_file *out) {
    *out = (struct map_file){0};
    FILE *in = fopen(path, "rb");
    if (!in)
        FAIL(STATUS_INPUT, "cannot open");
    fseek(in, 0, SEEK_END);
    size_t bytes = (size_t)ftell(in);
    rewind(in);
    uint8_t *data = malloc(bytes ? bytes : 1);
    if (!data || fread(data, 1, bytes, in) != bytes)
        exit(1);
    fclose(in);
    out->data = data;
    out->bytes = bytes;
    return STATUS_OK;
}

void map_file_drop(const void *data, size_t bytes) { (void)data, (void)bytes; }

void map_file_close(struct map_file *map) {
    free((void *)(uintptr_t)map->data);
    *map = (struct map_file){0};
}
