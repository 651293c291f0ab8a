/* One pass for names and digests; the lines themselves are read again with pread. */
#include "launch/batch_input.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/token_map.h"

enum { FIRST_ROWS = 64, NAME_BYTES = 24, BOM_BYTES = 3 };

struct batch_input {
    char *path;
    FILE *file;
    struct batch_row *row;
    int n, capacity;
    struct token_map *index;
};

static int input_add(struct batch_input *input, const char *text, int64_t line, int64_t offset, int64_t bytes) {
    char name[NAME_BYTES];
    struct openai_item item;
    if (input->n == input->capacity) {
        int capacity = 2 * input->capacity + FIRST_ROWS;
        struct batch_row *grown = realloc(input->row, (size_t)capacity * sizeof *grown);
        if (!grown)
            FAIL(STATUS_MEMORY, "no memory for the %d rows of %s", input->n, input->path);
        input->row = grown;
        input->capacity = capacity;
    }
    snprintf(name, sizeof name, "%lld", (long long)line);
    TRY(openai_item_read(text, (size_t)bytes, name, &item));
    struct batch_row *row = &input->row[input->n++];
    *row = (struct batch_row){.custom_id = item.custom_id, .line = line, .offset = offset, .bytes = bytes};
    memcpy(row->digest, item.digest, sizeof row->digest);
    item.custom_id = NULL;
    openai_item_deinit(&item);
    return 0;
}

static int input_read_all(struct batch_input *input) {
    char *text = NULL;
    size_t capacity = 0;
    ssize_t bytes;
    int64_t offset = 0;
    int status = 0;
    for (int64_t line = 1; status == 0 && (bytes = getline(&text, &capacity, input->file)) > 0; line++) {
        /* Windows programs begin a file with a byte order mark */
        int64_t skip = line == 1 && bytes >= BOM_BYTES && memcmp(text, "\xEF\xBB\xBF", BOM_BYTES) == 0 ? BOM_BYTES : 0;
        int64_t end = bytes;
        while (end > skip && strchr(" \t\r\n", text[end - 1]) && text[end - 1])
            end--;
        if (end > skip)
            status = input_add(input, text + skip, line, offset + skip, end - skip);
        offset += bytes;
    }
    if (status == 0 && ferror(input->file))
        status = base_fail(STATUS_INPUT, __FILE__, __LINE__, "%s: cannot be read: %s", input->path, strerror(errno));
    free(text);
    return status;
}

static int input_make_index(struct batch_input *input) {
    TRY(token_map_new(input->n, &input->index));
    for (int i = 0; i < input->n; i++) {
        const char *name = input->row[i].custom_id;
        int32_t first = token_map_add(input->index, name, strlen(name), i);
        if (first != i)
            FAIL(STATUS_INPUT, "%s: lines %lld and %lld have the same custom_id \"%s\" (a row without one has its line number)",
                 input->path, (long long)input->row[first].line, (long long)input->row[i].line, name);
    }
    return 0;
}

int batch_input_open(const char *path, struct batch_input **out) {
    struct batch_input *input = NULL;
    struct stat info;
    int status;
    *out = NULL;
    TRY(base_alloc(&input, 1, sizeof *input));
    input->path = strdup(path);
    input->file = fopen(path, "re");
    if (!input->path || !input->file || fstat(fileno(input->file), &info) != 0)
        FAIL_GOTO(STATUS_INPUT, "%s: cannot be read: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode))
        FAIL_GOTO(STATUS_INPUT, "%s: expected a file of rows (JSON Lines), got %s", path,
                  S_ISDIR(info.st_mode) ? "a folder" : "something that cannot be read twice");
    TRY_GOTO(input_read_all(input));
    TRY_GOTO(input_make_index(input));
    *out = input;
    return 0;
fail:
    batch_input_close(input);
    return status;
}

void batch_input_close(struct batch_input *input) {
    if (!input)
        return;
    for (int i = 0; i < input->n; i++)
        free(input->row[i].custom_id);
    free(input->row);
    token_map_free(input->index);
    if (input->file)
        fclose(input->file);
    free(input->path);
    free(input);
}

int batch_input_n_rows(const struct batch_input *input) { return input->n; }
const struct batch_row *batch_input_row(const struct batch_input *input, int index) { return &input->row[index]; }

int batch_input_find(const struct batch_input *input, const char *custom_id) {
    return token_map_find(input->index, custom_id, strlen(custom_id));
}

static int input_pread(const struct batch_input *input, const struct batch_row *row, char *text) {
    for (int64_t done = 0; done < row->bytes;) {
        ssize_t got = pread(fileno(input->file), text + done, (size_t)(row->bytes - done), row->offset + done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            FAIL(STATUS_INPUT, "%s: line %lld cannot be read again: %s", input->path, (long long)row->line,
                 got == 0 ? "the file became shorter" : strerror(errno));
        done += got;
    }
    return 0;
}

int batch_input_read(const struct batch_input *input, int index, struct openai_item *item) {
    const struct batch_row *row = &input->row[index];
    char *text = NULL, name[NAME_BYTES];
    int status;
    *item = (struct openai_item){0};
    TRY(base_alloc(&text, (size_t)row->bytes, 1));
    snprintf(name, sizeof name, "%lld", (long long)row->line);
    TRY_GOTO(input_pread(input, row, text));
    TRY_GOTO(openai_item_read(text, (size_t)row->bytes, name, item));
    if (memcmp(item->digest, row->digest, sizeof row->digest) != 0) {
        openai_item_deinit(item);
        FAIL_GOTO(STATUS_INPUT, "%s: line %lld has changed since the run began", input->path, (long long)row->line);
    }
    status = 0;
fail:
    free(text);
    return status;
}

bool batch_input_is(const struct batch_input *input, const char *path) {
    struct stat own, other;
    return fstat(fileno(input->file), &own) == 0 && stat(path, &other) == 0 && own.st_dev == other.st_dev &&
           own.st_ino == other.st_ino;
}
