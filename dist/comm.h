/* The second seam: how ranks talk. Collectives are enqueued on a stream and run in its order, on buffers that the
 * communicator allocated; every rank of the communicator calls the same ones in the same order.
 *
 * comm_self (one rank, no library), comm_mpi (host memory), comm_nccl (memory of GPUs, with comm_mpi for control). Every wait is polled
 * against a deadline. A rank that finds no progress tells the others what it waits for; whoever does not answer is named, and the job
 * ends: message, abort, _exit. Counts are 64-bit; what exceeds MPI's counts is split. Nothing here depends on the model. */
#pragma once

#include "kernels/backend.h"

enum comm_dtype { COMM_FLOAT, COMM_INT32, COMM_UINT64, COMM_BYTE };
enum comm_op { COMM_SUM, COMM_MAX, COMM_MIN };

struct comm;

/* Starts the library and returns the world. `name`: "auto" (MPI when a launcher started several ranks, else one rank alone),
 * "mpi", "self", "nccl" (as "auto", but devices must be GPUs: comm_use_device). Names N singletons started by a launcher of another MPI
 * (STATUS_USAGE). Call once per process. */
int comm_start(const char *name, double deadline_seconds, int *argc, char ***argv, struct comm **world);
/* Collective. Ends the library; every other communicator is freed before. */
void comm_finish(struct comm *world);
/* Ends the whole job at once with this exit code, whatever the other ranks do. Does not return. */
void comm_abort(struct comm *comm, int exit_code) __attribute__((noreturn));

int comm_rank(const struct comm *comm);
int comm_size(const struct comm *comm);
const char *comm_kind(const struct comm *comm); /* "self", "mpi", "nccl" */
/* Name and version of the library behind it, cut to one line of at most bytes - 1; "none" for one rank alone. */
void comm_library(const struct comm *comm, char *text, size_t bytes);

/* Collective. Ranks with one colour form a communicator, ordered by key. `name` appears in messages ("tp", "cp", ...). */
int comm_split(struct comm *comm, int colour, int key, const char *name, struct comm **out);
void comm_free(struct comm *comm);

/* Collective, before the first collective on a stream. From now on the streams and the memory of *comm's collectives are this backend's.
 * "cuda" and several ranks: *comm becomes a communicator of NCCL, which owns the one before (free the new one only). Otherwise nothing
 * changes. The thread is the one that opened the backend. Errors: STATUS_USAGE when what comm_start was asked for cannot serve this
 * device, or only some ranks have a GPU. */
int comm_use_device(struct comm **comm, struct backend *backend);
/* Waits of the host for this backend's device are watched like all others of this process, until the backend is closed, which is before
 * comm_finish: the deadline holds for them, and a failure of NCCL ends them. CPU backends and lone ranks: nothing to do. */
int comm_watch_device(struct comm *world, struct backend *backend);

/* Device memory that collectives of this communicator may use: windows that NCCL knows on all ranks, or the backend's workspace. Zeroed.
 * Collective where the communicator is NCCL's (the largest `bytes` of all ranks counts); there comm_release comes after the last work
 * on it, as backend_free does. */
int comm_alloc(struct comm *comm, struct backend *backend, size_t bytes, void *pointer);
void comm_release(struct comm *comm, struct backend *backend, void *pointer);

/* In stream order, in place or not (from may equal to). `what` (static text) and the current step name the operation in messages.
 * Results of a sum are the same bits on all ranks. What a maximum or minimum makes of a NaN is the library's choice. */
int comm_all_reduce(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to, int64_t count,
                    enum comm_dtype dtype, enum comm_op op);
/* to = [rank][bytes]; `from` may be to + rank * bytes. */
int comm_all_gather(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to, int64_t bytes);
/* Rank r's part is bytes[r] long (host array of comm_size, copied) and lies at offsets[r] of `to`; bytes may be 0. */
int comm_all_gatherv(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to,
                     const int64_t *bytes, const int64_t *offsets);

/* ---- control: host memory, blocking, polled against the deadline ---------------------------------------------------- */
int comm_broadcast(struct comm *comm, const char *what, void *host, int64_t bytes, int root);
/* As comm_broadcast, but a rank that is not the root may wait for ever: the idle followers of a service. The root's process
 * must be alive: it is watched through heartbeats within the deadline. */
int comm_broadcast_idle(struct comm *comm, const char *what, void *host, int64_t bytes, int root);
int comm_gather_host(struct comm *comm, const char *what, const void *from, void *to, int64_t bytes); /* to: every rank */
int comm_reduce_host(struct comm *comm, const char *what, int64_t *values, int count, enum comm_op op); /* to every rank */
int comm_barrier(struct comm *comm, const char *what);

/* Collective. All ranks agree on their status: returns `status` if all succeeded, else on every rank the worst rank's code with
 * its error text, with "rank 2: " before it unless all ranks failed with the same text. */
int comm_agree(struct comm *comm, const char *what, int status);

/* The step that messages name; set by the engine's loop. */
void comm_set_step(struct comm *comm, int64_t step);
