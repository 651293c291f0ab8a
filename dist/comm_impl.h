/* What the communicators share behind comm.h; nobody else includes this, but the tests.
 *
 * comm.c has all that does not depend on the library: it checks arguments, puts collectives on the stream, answers for
 * communicators of one rank, and builds the small control operations out of broadcast and gather. A library supplies the table. */
#pragma once

#include "dist/comm.h"
#include "dist/comm_watch.h"

enum { COMM_NAME_BYTES = 16 };

struct comm_functions {
    const char *kind;
    void (*library)(const struct comm *comm, char *text, size_t bytes);
    void (*finish)(struct comm *world);
    void (*abort)(struct comm *comm, int exit_code) __attribute__((noreturn));
    int (*split)(struct comm *comm, int colour, int key, const char *name, struct comm **out);
    void (*free)(struct comm *comm);
    void (*set_step)(struct comm *comm, int64_t step);

    /* The rest is only called with at least two ranks. In stream order, on the thread that runs the stream: */
    int (*all_reduce)(struct comm *comm, const char *what, const void *from, void *to, int64_t count, enum comm_dtype dtype,
                      enum comm_op op);
    /* Parts of the ranks [first, first + n) only: bytes and offsets have n entries. */
    int (*all_gatherv)(struct comm *comm, const char *what, const void *from, void *to, const int64_t *bytes,
                       const int64_t *offsets, int first, int n);
    int (*all_gather)(struct comm *comm, const char *what, const void *from, void *to, int64_t bytes);
    /* The same for a library that puts work on streams itself; where these are there, the three above are not. All parts at once. */
    int (*enqueue_all_reduce)(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to, int64_t count,
                              enum comm_dtype dtype, enum comm_op op);
    int (*enqueue_all_gather)(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to, int64_t bytes);
    int (*enqueue_all_gatherv)(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to,
                               const int64_t *bytes, const int64_t *offsets);
    /* Memory of its own kind for collectives; NULL: the backend's workspace. */
    int (*alloc)(struct comm *comm, struct backend *backend, size_t bytes, void **pointer);
    void (*release)(struct comm *comm, struct backend *backend, void *pointer);
    /* On the thread that controls: */
    int (*broadcast)(struct comm *comm, const char *what, void *host, int64_t bytes, int root, bool idle);
    int (*gather)(struct comm *comm, const char *what, const void *from, void *to, int64_t bytes);
};

/* What all communicators of a process share. The world has it and ends it. */
struct comm_shared {
    char asked[COMM_NAME_BYTES];     /* name that comm_start was given */
    struct watch *watch;             /* NULL: one rank alone, nobody to wait for */
    int64_t step;
    /* Work that was put on a device's stream is waited for later and elsewhere: what a long wait of that kind may be about. */
    const char *last_what;
    char last_comm[COMM_NAME_BYTES];
    struct watch_wait device_wait;   /* the wait for the device that lasts at the moment: the host has one thread for it */
    char device_what[WATCH_WHAT_BYTES], device_comm[COMM_NAME_BYTES];
    /* Whether the libraries behind `wrapped` are well, asked while a device is waited for; NULL: there are none. */
    int (*poll)(const struct comm_shared *shared);
    struct comm *wrapped;            /* list of comm_nccl.c: the communicators of NCCL */
};

/* The first member of every library's own struct. */
struct comm {
    const struct comm_functions *functions;
    struct comm_shared *shared;
    int rank, size;
    int world_rank; /* as messages name ranks */
    char name[COMM_NAME_BYTES];
};

/* What the environment says about who started this process. */
struct comm_launcher {
    const char *name;     /* "mpirun of Open MPI"; NULL: no launcher */
    const char *variable; /* where `size` was read */
    int size;             /* ranks started; 0: the launcher does not say */
    int rank;             /* of this process; -1: it does not say */
    bool connects;        /* it offers the ranks a way to find each other: PMI or PMIx */
};
void comm_find_launcher(struct comm_launcher *out);

int comm_self_start(const char *asked, struct comm **world);

/* `asked`: the name that comm_start was given. `launcher` as found: a world that is smaller than what it started is an error. */
int comm_mpi_start(const char *asked, double deadline_seconds, int *argc, char ***argv, const struct comm_launcher *launcher,
                   struct comm **world);

/* Collective. Puts NCCL over a communicator of at least two ranks, whose memory is that of a "cuda" backend: *comm becomes the new one,
 * which owns the old one and leaves the control operations to it. On failure *comm stays as it is. */
int comm_nccl_wrap(struct comm **comm, struct backend *backend);

/* For tests: messages are cut at `chunk_bytes` (0: as it is), and calls are serialized as for a library without
 * MPI_THREAD_MULTIPLE. Same on all ranks, while nothing is under way. */
void comm_mpi_set_limits(struct comm *world, int64_t chunk_bytes, bool serialized);

/* to[i] = from[0][i] op from[1][i] op ..., in this order. `to` may be one of `from`. */
void comm_reduce(void *to, const void *const *from, int n, int64_t count, enum comm_dtype dtype, enum comm_op op);
int64_t comm_dtype_bytes(enum comm_dtype dtype);
