/* One piece of work of a CPU stream, and packed lists of them: what a recording holds and what an asynchronous stream queues. */
#pragma once

#include "kernels/backend_impl.h"

enum work_kind { WORK_OP, WORK_CALL, WORK_COPY, WORK_ZERO, WORK_EVENT_RECORD, WORK_EVENT_WAIT };

struct work_copy {
    void *to;
    const void *from;
    size_t bytes;
};

struct work {
    enum work_kind kind;
    struct stream *stream;
    union {
        int op;                  /* WORK_OP */
        int (*function)(void *); /* WORK_CALL */
        struct event *event;     /* WORK_EVENT_... */
    } what;
    size_t args_bytes;
    _Alignas(16) unsigned char args[STREAM_MAX_ARGS]; /* of the operation or call; struct work_copy for copies and zeroing */
};

/* Runs a WORK_OP, WORK_CALL, WORK_COPY or WORK_ZERO. */
int work_run(struct work *work);

/* Fills in a piece of work. Errors: STATUS_FAILED when the arguments do not fit. */
int work_make(struct work *work, enum work_kind kind, struct stream *stream, const void *args, size_t args_bytes);

/* A growing list of work, packed: a node takes its header and its own arguments only. */
struct work_list {
    unsigned char *bytes;
    size_t used, size;
    int n;
};
int work_list_add(struct work_list *list, const struct work *work);
/* Copies the piece at *offset and moves on; false at the end. */
bool work_list_next(const struct work_list *list, size_t *offset, struct work *work);
void work_list_free(struct work_list *list);
