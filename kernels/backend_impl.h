/* Inside the first seam: the table of functions that each backend fills in. Only kernels/backend*.c include this. */
#pragma once

#include "kernels/backend.h"

struct backend_table {
    const char *name;
    bool async;
    int (*open)(const struct backend_options *options, struct backend **out);
    void (*close)(struct backend *backend);
    int (*n_threads)(const struct backend *backend);
    void (*profile)(const struct backend *backend, struct backend_times *times, struct backend_time *launches, int n);
    int (*alloc)(struct backend *backend, enum memory purpose, size_t bytes, void **pointer);
    void (*free)(struct backend *backend, void *pointer);
    size_t (*used)(const struct backend *backend, enum memory purpose);
    /* The next ones only where the device is not the host: NULL for a CPU. */
    void (*count)(struct backend *backend, enum memory purpose, int64_t bytes);
    int64_t (*free_bytes)(const struct backend *backend);
    void (*set_watch)(struct backend *backend, const struct backend_watch *watch);
    int (*native)(struct stream *stream, void **native);
    int (*keep)(struct stream *stream, int status);
    int (*fence)(struct stream *stream);
    int (*read)(struct stream *stream, const void *data, size_t bytes, uint32_t *sum);
    int (*peer_attend)(struct stream *stream, const struct peer_attention *args, bool *done);

    int (*stream_open)(struct backend *backend, struct stream **out);
    void (*stream_close)(struct stream *stream);
    int (*launch)(struct stream *stream, int op, const void *args, size_t args_bytes);
    int (*call)(struct stream *stream, int (*function)(void *), const void *args, size_t args_bytes);
    int (*copy)(struct stream *stream, void *to, const void *from, size_t bytes); /* in, out or on the device */
    int (*zero)(struct stream *stream, void *device, size_t bytes);
    int (*stream_sync)(struct stream *stream);
    int (*event_open)(struct backend *backend, struct event **out);
    void (*event_close)(struct event *event);
    int (*event_record)(struct event *event, struct stream *stream);
    int (*stream_wait)(struct stream *stream, struct event *event);
    int (*event_sync)(struct event *event);
    int (*record_begin)(struct backend *backend);
    int (*record_end)(struct backend *backend, struct graph **out);
    int (*graph_replay)(struct graph *graph);
    int (*graph_time)(struct graph *graph, struct stream *stream, int n, double *seconds);
    int (*graph_n_nodes)(const struct graph *graph);
    void (*graph_close)(struct graph *graph);
};

/* What every backend's objects begin with. */
struct backend {
    const struct backend_table *table;
};
struct stream {
    struct backend *backend;
};
struct event {
    struct backend *backend;
};
struct graph {
    struct backend *backend;
};

extern const struct backend_table backend_cpu_table;
extern const struct backend_table backend_cpu_async_table;
extern const struct backend_table backend_cuda_table;

/* backend_n_devices and backend_find_device of "cuda". */
int backend_cuda_n_devices(void);
int backend_cuda_find_device(int device, struct backend_device *out);
