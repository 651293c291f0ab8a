/* The one place that maps files. The descriptor is closed at once: the mapping keeps the file. */
#include "engine/map_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int map_file_open(const char *path, struct map_file *out) {
    *out = (struct map_file){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        FAIL(STATUS_INPUT, "cannot open: %s", strerror(errno));
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        FAIL(STATUS_INPUT, "not a regular file");
    }
    if (info.st_size == 0) {
        close(fd);
        return STATUS_OK;
    }
    size_t bytes = (size_t)info.st_size;
    void *data = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    int error = errno;
    close(fd);
    if (data == MAP_FAILED)
        FAIL(STATUS_FAILED, "cannot map %zu bytes: %s", bytes, strerror(error));
    out->data = data;
    out->bytes = bytes;
    return STATUS_OK;
}

void map_file_drop(const void *data, size_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data / page * page;
    if (bytes)
        (void)madvise((void *)begin, (uintptr_t)data + bytes - begin, MADV_DONTNEED); /* the file's pages are clean: nothing is lost */
}

void map_file_close(struct map_file *map) {
    if (map->data) {
        void *data;
        memcpy(&data, &map->data, sizeof data); /* munmap wants a pointer without const */
        munmap(data, map->bytes);
    }
    *map = (struct map_file){0};
}
