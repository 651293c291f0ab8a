/* Opening, locking, cleaning and appending; what a line looks like is journal_line.c's. */
#include "launch/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/token_map.h"
#include "launch/journal_line.h"

enum { COPY_BYTES = 1 << 20, FIRST_ENTRIES = 64 };
static const double sync_seconds = 1.0; /* a crash of the machine costs at most the work of this time */

struct journal_part { /* where an entry's line lies in the file */
    int64_t offset, bytes;
};

struct journal {
    char *path;
    int fd;
    bool regular;
    int64_t bytes;      /* whole lines, that is, where the next line belongs */
    int64_t file_bytes; /* the file as it was opened: more than `bytes` if its last line is cut */
    struct journal_entry *entry;
    struct journal_part *part; /* [n] */
    int n, capacity;
    struct token_map *index;
    double synced;
    bool dirty;
};

static int journal_lock(struct journal *journal) {
    if (flock(journal->fd, LOCK_EX | LOCK_NB) == 0)
        return 0;
    if (errno == EWOULDBLOCK)
        FAIL(STATUS_FAILED, "%s: another process is writing this file", journal->path);
    log_warn("%s: this file system has no locks (%s): see to it that only one process writes the file", journal->path,
             strerror(errno));
    return 0;
}

/* A name is as durable as its folder. */
static int journal_sync_folder(const struct journal *journal) {
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", journal->path);
    int fd = open(dirname(folder), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP)) {
        int error = errno;
        if (fd >= 0)
            close(fd);
        FAIL(STATUS_FAILED, "%s: cannot sync its folder: %s", journal->path, strerror(error));
    }
    close(fd);
    return 0;
}

/* Opens and locks. If the file is renamed away between the two (journal_drop_failed of another process), again. */
static int journal_open_file(struct journal *journal, const char *path) {
    struct stat info, named;
    for (;;) {
        bool exists = stat(path, &info) == 0;
        journal->regular = !exists || S_ISREG(info.st_mode) || S_ISDIR(info.st_mode);
        int flags = journal->regular ? O_RDWR | O_CREAT | O_APPEND : O_WRONLY | O_APPEND;
        journal->fd = open(path, flags | O_CLOEXEC, 0666);
        if (journal->fd < 0)
            FAIL(STATUS_FAILED, "%s: cannot be opened for writing: %s", path, strerror(errno));
        journal->path = realpath(path, NULL);
        if (!journal->path && !(journal->path = strdup(path)))
            FAIL(STATUS_MEMORY, "no memory for a path");
        if (!journal->regular)
            return 0;
        TRY(journal_lock(journal));
        if (fstat(journal->fd, &info) != 0)
            FAIL(STATUS_FAILED, "%s: %s", path, strerror(errno));
        if (stat(path, &named) == 0 && named.st_dev == info.st_dev && named.st_ino == info.st_ino) {
            journal->file_bytes = info.st_size;
            return exists ? 0 : journal_sync_folder(journal);
        }
        close(journal->fd);
        journal->fd = -1;
        free(journal->path);
        journal->path = NULL;
    }
}

static int journal_add_entry(struct journal *journal, const struct journal_entry *entry, int64_t offset, int64_t bytes) {
    if (journal->n == journal->capacity) {
        int capacity = 2 * journal->capacity + FIRST_ENTRIES;
        struct journal_entry *entries = realloc(journal->entry, (size_t)capacity * sizeof *entries);
        journal->entry = entries ? entries : journal->entry;
        struct journal_part *parts = realloc(journal->part, (size_t)capacity * sizeof *parts);
        journal->part = parts ? parts : journal->part;
        if (!entries || !parts) {
            free(entry->custom_id);
            FAIL(STATUS_MEMORY, "no memory for the %d rows of %s", journal->n, journal->path);
        }
        journal->capacity = capacity;
    }
    journal->part[journal->n] = (struct journal_part){offset, bytes};
    journal->entry[journal->n++] = *entry;
    return 0;
}

static int journal_take_line(struct journal *journal, const char *text, int64_t bytes, int64_t number) {
    struct journal_entry entry = {.line = number};
    if (text[bytes - 1] != '\n') {
        if (journal_line_is_cut(text, (size_t)bytes))
            return 0;
        FAIL(STATUS_INPUT, "%s: line %lld is not one that batch wrote; is this the right file?", journal->path, (long long)number);
    }
    int known = journal_line_read(text, (size_t)bytes - 1, &entry);
    TRY(known);
    if (!known)
        FAIL(STATUS_INPUT, "%s: line %lld is not one that batch wrote; is this the right file?", journal->path, (long long)number);
    TRY(journal_add_entry(journal, &entry, journal->bytes, bytes));
    journal->bytes += bytes;
    return 0;
}

static int journal_read(struct journal *journal) {
    char *text = NULL;
    size_t capacity = 0;
    ssize_t bytes;
    int status = 0;
    int copy = dup(journal->fd);
    FILE *file = copy < 0 ? NULL : fdopen(copy, "r");
    if (!file) {
        if (copy >= 0)
            close(copy);
        FAIL(STATUS_FAILED, "%s: %s", journal->path, strerror(errno));
    }
    for (int64_t line = 1; status == 0 && (bytes = getline(&text, &capacity, file)) > 0; line++)
        status = journal_take_line(journal, text, bytes, line);
    if (status == 0 && ferror(file))
        status = base_fail(STATUS_FAILED, __FILE__, __LINE__, "%s: cannot be read: %s", journal->path, strerror(errno));
    free(text);
    fclose(file);
    return status;
}

static int journal_make_index(struct journal *journal) {
    TRY(token_map_new(journal->n, &journal->index));
    for (int i = 0; i < journal->n; i++) {
        const char *name = journal->entry[i].custom_id;
        int32_t first = token_map_add(journal->index, name, strlen(name), i);
        if (first != i)
            FAIL(STATUS_INPUT, "%s: lines %lld and %lld both answer custom_id \"%s\"", journal->path,
                 (long long)journal->entry[first].line, (long long)journal->entry[i].line, name);
    }
    return 0;
}

int journal_open(const char *path, struct journal **out) {
    struct journal *journal = NULL;
    int status;
    *out = NULL;
    TRY(base_alloc(&journal, 1, sizeof *journal));
    journal->fd = -1;
    TRY_GOTO(journal_open_file(journal, path));
    if (journal->regular)
        TRY_GOTO(journal_read(journal));
    TRY_GOTO(journal_make_index(journal));
    journal->synced = base_seconds();
    *out = journal;
    return 0;
fail:
    journal_close(journal);
    return status;
}

void journal_close(struct journal *journal) {
    if (!journal)
        return;
    for (int i = 0; i < journal->n; i++)
        free(journal->entry[i].custom_id);
    free(journal->entry);
    free(journal->part);
    token_map_free(journal->index);
    if (journal->fd >= 0)
        close(journal->fd);
    free(journal->path);
    free(journal);
}

int journal_n_entries(const struct journal *journal) { return journal->n; }
const struct journal_entry *journal_entry_at(const struct journal *journal, int index) { return &journal->entry[index]; }

const struct journal_entry *journal_find(const struct journal *journal, const char *custom_id) {
    int32_t at = token_map_find(journal->index, custom_id, strlen(custom_id));
    return at < 0 ? NULL : &journal->entry[at];
}

/* ---- writing ---------------------------------------------------------------------------------------------------------- */

static int write_all(int fd, const char *data, size_t bytes) {
    while (bytes > 0) {
        ssize_t written = write(fd, data, bytes);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return -1;
        data += written;
        bytes -= (size_t)written;
    }
    return 0;
}

/* Copies the lines that stay to `fd`. */
static int journal_copy_kept(struct journal *journal, int fd, int64_t *kept) {
    char *buffer = NULL;
    int status = 0;
    TRY(base_alloc(&buffer, COPY_BYTES, 1));
    *kept = 0;
    for (int i = 0; i < journal->n && status == 0; i++) {
        int64_t at = journal->part[i].offset, end = at + journal->part[i].bytes;
        while (!journal->entry[i].failed && at < end && status == 0) {
            ssize_t got = pread(journal->fd, buffer, (size_t)min_i64(COPY_BYTES, end - at), at);
            if (got <= 0 || write_all(fd, buffer, (size_t)got) != 0)
                status = base_fail(STATUS_FAILED, __FILE__, __LINE__, "%s: cannot be copied: %s", journal->path,
                                   got == 0 ? "it became shorter" : strerror(errno));
            at += got;
            *kept += got;
        }
    }
    free(buffer);
    return status;
}

/* The new file is complete, locked and on the disk before it takes the old one's name. */
static int journal_drop_failed(struct journal *journal) {
    char path[PATH_MAX];
    struct stat info;
    int64_t kept;
    int status, fd = -1;
    if (snprintf(path, sizeof path, "%s.retry", journal->path) >= (int)sizeof path)
        FAIL(STATUS_FAILED, "%s: the path is too long", journal->path);
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0 || fstat(journal->fd, &info) != 0 || fchmod(fd, info.st_mode & 07777) != 0)
        FAIL_GOTO(STATUS_FAILED, "%s: %s", path, strerror(errno));
    flock(fd, LOCK_EX | LOCK_NB); /* fails only where journal_lock has warned */
    TRY_GOTO(journal_copy_kept(journal, fd, &kept));
    if (fdatasync(fd) != 0 || rename(path, journal->path) != 0)
        FAIL_GOTO(STATUS_FAILED, "%s: cannot take the place of %s: %s", path, journal->path, strerror(errno));
    close(journal->fd);
    journal->fd = fd;
    journal->bytes = journal->file_bytes = kept;
    return journal_sync_folder(journal);
fail:
    if (fd >= 0) {
        close(fd);
        unlink(path);
    }
    return status;
}

static int journal_truncate(struct journal *journal) {
    if (ftruncate(journal->fd, journal->bytes) != 0)
        FAIL(STATUS_FAILED, "%s: cannot be truncated to its %lld bytes of whole lines: %s", journal->path,
             (long long)journal->bytes, strerror(errno));
    journal->file_bytes = journal->bytes;
    return 0;
}

int journal_begin(struct journal *journal, bool drop_failed) {
    bool failed = false;
    for (int i = 0; i < journal->n; i++)
        failed = failed || journal->entry[i].failed;
    if (failed && drop_failed)
        return journal_drop_failed(journal);
    return journal->file_bytes > journal->bytes ? journal_truncate(journal) : 0;
}

int journal_append(struct journal *journal, const struct json_text *line) {
    TRY(line->status);
    if (write_all(journal->fd, line->text, line->bytes) != 0) {
        int error = errno;
        if (journal->regular && ftruncate(journal->fd, journal->bytes) != 0)
            log_warn("%s: the cut line at its end stays until the next run: %s", journal->path, strerror(errno));
        FAIL(STATUS_FAILED, "%s: cannot be written: %s; rows written before are kept", journal->path, strerror(error));
    }
    journal->bytes += (int64_t)line->bytes;
    journal->dirty = true;
    return journal_tick(journal);
}

int journal_sync(struct journal *journal) {
    if (journal->dirty && journal->regular && fdatasync(journal->fd) != 0)
        FAIL(STATUS_FAILED, "%s: cannot be synced to the disk: %s", journal->path, strerror(errno));
    journal->dirty = false;
    journal->synced = base_seconds();
    return 0;
}

int journal_tick(struct journal *journal) {
    return journal->dirty && base_seconds() >= journal->synced + sync_seconds ? journal_sync(journal) : 0;
}
