/* Running and packing pieces of work. The table from operation to CPU function is here: nothing else calls cpu_... functions. */
#include "kernels/work.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

#define RUN_OP(name)                                                                                  \
    static void run_##name(const void *args) { cpu_##name((const struct name##_args *)args); }
OPS(RUN_OP)
#undef RUN_OP

static void (*const run_op[OP_COUNT])(const void *) = {
#define OP_ENTRY(name) [OP_##name] = run_##name,
    OPS(OP_ENTRY)
#undef OP_ENTRY
};

int work_run(struct work *work) {
    const struct work_copy *copy = (const struct work_copy *)(const void *)work->args;
    switch (work->kind) {
    case WORK_OP:
        run_op[work->what.op](work->args);
        return STATUS_OK;
    case WORK_CALL:
        return work->what.function(work->args);
    case WORK_COPY:
        if (copy->bytes)
            memmove(copy->to, copy->from, copy->bytes);
        return STATUS_OK;
    case WORK_ZERO:
        if (copy->bytes)
            memset(copy->to, 0, copy->bytes);
        return STATUS_OK;
    default:
        FAIL(STATUS_FAILED, "stream work of kind %d cannot be run", (int)work->kind);
    }
}

int work_make(struct work *work, enum work_kind kind, struct stream *stream, const void *args, size_t args_bytes) {
    if (args_bytes > sizeof work->args)
        FAIL(STATUS_FAILED, "arguments of %zu bytes, a stream takes %zu", args_bytes, sizeof work->args);
    work->kind = kind;
    work->stream = stream;
    work->args_bytes = args_bytes;
    if (args_bytes)
        memcpy(work->args, args, args_bytes);
    return STATUS_OK;
}

/* A packed node: the struct up to its arguments, then the arguments, rounded up to 16. */
static size_t node_bytes(const struct work *work) {
    return (size_t)round_up((int64_t)(offsetof(struct work, args) + work->args_bytes), 16);
}

int work_list_add(struct work_list *list, const struct work *work) {
    size_t bytes = node_bytes(work);
    if (list->used + bytes > list->size) {
        size_t size = 2 * list->size + bytes + 4096;
        unsigned char *grown = realloc(list->bytes, size);
        if (!grown)
            FAIL(STATUS_MEMORY, "out of memory: a work list of %zu bytes", size);
        list->bytes = grown;
        list->size = size;
    }
    memcpy(list->bytes + list->used, work, offsetof(struct work, args) + work->args_bytes);
    list->used += bytes;
    list->n++;
    return STATUS_OK;
}

bool work_list_next(const struct work_list *list, size_t *offset, struct work *work) {
    if (*offset >= list->used)
        return false;
    const unsigned char *node = list->bytes + *offset;
    memcpy(work, node, offsetof(struct work, args));
    memcpy(work->args, node + offsetof(struct work, args), work->args_bytes);
    *offset += node_bytes(work);
    return true;
}

void work_list_free(struct work_list *list) {
    free(list->bytes);
    *list = (struct work_list){0};
}
