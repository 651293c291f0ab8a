/* The first seam: where memory lies and in what order work runs. Everything above it is written once for every device.
 *
 * A backend is a table of functions behind these calls. `cpu` runs each launch at once on the calling thread;
 * `cpu-async` (tests) runs every stream on a worker thread with random delays and keeps device memory unreadable outside
 * of operations, so what passes on it survives a GPU; `cuda` follows. The rules that make that possible:
 *
 *  - Device memory is touched only by operations (ops.h) and by the copies below, never by the host directly.
 *  - Work on one stream runs in order; between streams only events order it. A launch copies its argument struct.
 *  - Between record_begin and record_end launches are not run but kept; graph_replay runs them again with the same
 *    arguments. So whatever changes between steps lies in device memory (struct step_input), never in an argument.
 *  - A failure inside a stream is kept, later work on it is dropped, and the next sync or wait returns it.
 *  - Host buffers given to copies live until the copy has run (sync or event); MEMORY_HOST is made for them. */
#pragma once

#include "kernels/base.h"

#ifdef __cplusplus
extern "C" {
#endif

enum memory {
    MEMORY_WEIGHTS,   /* device: model weights and tables that never change */
    MEMORY_WORKSPACE, /* device: what a step or a prefill overwrites */
    MEMORY_CACHE,     /* device: pages, 16-bit blocks, S and P, page tables, per-sequence state */
    MEMORY_HOST,      /* host, readable by copies at full speed (pinned on a GPU) */
    MEMORY_COUNT,
};

struct backend;
struct stream;
struct event;
struct graph;

struct backend_options {
    int n_threads;      /* CPU: threads of one operation; 0: as many as the process is bound to */
    uint64_t seed;      /* cpu-async: of the random delays */
    bool profile;       /* keep the time of each kind of work: backend_profile */
    int device;         /* cuda: which of backend_n_devices */
};

/* Whether this build has a backend of this name, with devices or without. */
bool backend_has(const char *name);

/* Devices of a backend that this process can use: 1 for "cpu" and "cpu-async"; GPUs for "cuda", 0 without a driver or in a build without CUDA. */
int backend_n_devices(const char *name);

/* What one of them is. */
struct backend_device {
    char name[64];      /* "NVIDIA H100 80GB HBM3" */
    char pci[16];       /* "0000:1b:00.0"; "" for a CPU */
    int64_t bytes;      /* memory of its own; 0 for a CPU */
    int architecture;   /* compute capability times ten; 0 for a CPU */
};
int backend_find_device(const char *name, int device, struct backend_device *out);

/* `name`: "cpu", "cpu-async" or "cuda". Errors: STATUS_USAGE for another name or one that is not there, naming those that are. */
int backend_open(const char *name, const struct backend_options *options, struct backend **out);
void backend_close(struct backend *backend);

const char *backend_name(const struct backend *backend);
/* A launch may return before the work is done, so a result is read one step late without waiting. */
bool backend_is_async(const struct backend *backend);
int backend_n_threads(const struct backend *backend);

/* Time that streams spent since the backend was opened: `launches` by enum op_id (n of them), and in calls (collectives, their waiting
 * for other ranks included) and copies. All 0 unless opened with `profile`. */
struct backend_time {
    int64_t n, ns;
};
struct backend_times {
    struct backend_time calls, copies;
};
void backend_profile(const struct backend *backend, struct backend_times *times, struct backend_time *launches, int n);

/* 64-byte aligned, zeroed. Errors: STATUS_MEMORY with purpose and size. backend_used counts live bytes by purpose. */
int backend_alloc(struct backend *backend, enum memory purpose, size_t bytes, void *pointer);
void backend_free(struct backend *backend, void *pointer);
size_t backend_used(const struct backend *backend, enum memory purpose);

/* Adds to backend_used what another library allocated on the device for this purpose (negative: gave back). */
void backend_count(struct backend *backend, enum memory purpose, int64_t bytes);
/* Bytes of the device's own memory that nobody has taken; -1 for a CPU: the host's memory is shared out by dist/place. */
int64_t backend_free_bytes(const struct backend *backend);

/* Who is told when the host waits for a device: `begin` once a wait has lasted some milliseconds, then `poll` again and again, which may
 * end the wait by a failure, and `end`. NULL: nobody. A CPU backend's waits are those of its communicators, which watch themselves. */
struct backend_watch {
    void *context;
    void (*begin)(void *context, const char *what);
    int (*poll)(void *context);
    void (*end)(void *context);
};
void backend_set_watch(struct backend *backend, const struct backend_watch *watch);

int stream_open(struct backend *backend, struct stream **out);
void stream_close(struct stream *stream);
struct backend *stream_backend(struct stream *stream);

/* Runs operation `op` (enum op_id) after all earlier work of the stream. Use the typed op_... functions of ops.h. */
int stream_launch(struct stream *stream, int op, const void *args, size_t args_bytes);

/* Runs a host function in stream order, device memory readable: how communicators on CPU join a stream.
 * `function` returns a status; `args` is copied (at most STREAM_MAX_ARGS bytes). */
enum { STREAM_MAX_ARGS = 512 };
int stream_call(struct stream *stream, int (*function)(void *args), const void *args, size_t args_bytes);

/* For libraries that enqueue work themselves: the stream as they know it (a cudaStream_t; NULL on a CPU), ready to take work: part of the
 * recording under way, if there is one. Errors: the stream's kept failure. stream_keep keeps what they returned, and returns it. */
int stream_native(struct stream *stream, void **native);
int stream_keep(struct stream *stream, int status);
/* What a library enqueues next sees all that earlier work of the stream wrote, even if its kernels do not wait for that as they should. */
int stream_fence(struct stream *stream);

/* Yardsticks of a device (kernels/rates.h). stream_read adds the sum of all 32-bit words of `data`, each read once from memory, to
 * *sum, modulo 2^32; both are device memory, data and bytes multiples of 16. Errors: STATUS_USAGE on a CPU.
 * stream_peer_attend runs attention by the vendor's library; *done is false, with nothing run, where there is none or it refuses the shape. */
int stream_read(struct stream *stream, const void *data, size_t bytes, uint32_t *sum);
struct peer_attention;
int stream_peer_attend(struct stream *stream, const struct peer_attention *args, bool *done);

int stream_copy_in(struct stream *stream, void *device, const void *host, size_t bytes);
int stream_copy_out(struct stream *stream, void *host, const void *device, size_t bytes);
int stream_copy(struct stream *stream, void *to_device, const void *from_device, size_t bytes);
int stream_zero(struct stream *stream, void *device, size_t bytes);

/* Waits for all work of the stream; returns its first failure (and keeps it). */
int stream_sync(struct stream *stream);

int event_open(struct backend *backend, struct event **out);
void event_close(struct event *event);
int event_record(struct event *event, struct stream *stream);
int stream_wait(struct stream *stream, struct event *event); /* later work of the stream waits for the event */
int event_sync(struct event *event);                         /* the host waits; returns a failure of its stream */

/* Recording covers every stream of the backend: launches, calls, copies, events and waits between begin and end. */
int backend_record_begin(struct backend *backend);
int backend_record_end(struct backend *backend, struct graph **out);
int graph_replay(struct graph *graph);
/* Replays once, then n times in a row, and waits: seconds[i] is the device's time for the i-th of them, from the end of the one before it
 * to its own. `stream` is the one that the recording began on. The host enqueues replays ahead of the device, so a replay should last
 * longer than enqueuing one: some tens of microseconds. On a CPU it is the clock's time. */
int graph_time(struct graph *graph, struct stream *stream, int n, double *seconds);
int graph_n_nodes(const struct graph *graph);
void graph_close(struct graph *graph);

#ifdef __cplusplus
}
#endif
