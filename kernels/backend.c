/* The first seam's front: finds a backend by name and calls through its table. */
#include "kernels/backend_impl.h"

#include <stdio.h>
#include <string.h>

static const struct backend_table *const tables[] = {
    &backend_cpu_table,
    &backend_cpu_async_table,
#ifdef KVLINC_WITH_CUDA
    &backend_cuda_table,
#endif
};

static const struct backend_table *find(const char *name) {
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (strcmp(name, tables[i]->name) == 0)
            return tables[i];
    return NULL;
}

int backend_open(const char *name, const struct backend_options *options, struct backend **out) {
    const struct backend_table *table = find(name);
    if (table)
        return table->open(options, out);
    if (strcmp(name, "cuda") == 0)
        FAIL(STATUS_USAGE, "device cuda: this program was built without CUDA: build it with -DWITH_CUDA=ON; devices: cpu");
    FAIL(STATUS_USAGE, "device '%s' is not known; devices: cpu, cpu-async, cuda", name);
}

bool backend_has(const char *name) { return find(name) != NULL; }

int backend_n_devices(const char *name) {
    const struct backend_table *table = find(name);
#ifdef KVLINC_WITH_CUDA
    if (table == &backend_cuda_table)
        return backend_cuda_n_devices();
#endif
    return table ? 1 : 0;
}

int backend_find_device(const char *name, int device, struct backend_device *out) {
    *out = (struct backend_device){0};
#ifdef KVLINC_WITH_CUDA
    if (find(name) == &backend_cuda_table)
        return backend_cuda_find_device(device, out);
#endif
    if (device != 0 || !find(name))
        FAIL(STATUS_USAGE, "device %s %d: there is no such device", name, device);
    snprintf(out->name, sizeof out->name, "%s", name);
    return STATUS_OK;
}

void backend_close(struct backend *backend) {
    if (backend)
        backend->table->close(backend);
}

const char *backend_name(const struct backend *backend) { return backend->table->name; }

bool backend_is_async(const struct backend *backend) { return backend->table->async; }

int backend_n_threads(const struct backend *backend) { return backend->table->n_threads(backend); }

void backend_profile(const struct backend *backend, struct backend_times *times, struct backend_time *launches, int n) {
    backend->table->profile(backend, times, launches, n);
}

int backend_alloc(struct backend *backend, enum memory purpose, size_t bytes, void *pointer) {
    void *memory = NULL;
    int status = backend->table->alloc(backend, purpose, bytes, &memory);
    memcpy(pointer, &memory, sizeof memory);
    return status;
}

void backend_free(struct backend *backend, void *pointer) {
    if (pointer)
        backend->table->free(backend, pointer);
}

size_t backend_used(const struct backend *backend, enum memory purpose) {
    return backend->table->used(backend, purpose);
}

void backend_count(struct backend *backend, enum memory purpose, int64_t bytes) {
    if (backend->table->count)
        backend->table->count(backend, purpose, bytes);
}

int64_t backend_free_bytes(const struct backend *backend) {
    return backend->table->free_bytes ? backend->table->free_bytes(backend) : -1;
}

void backend_set_watch(struct backend *backend, const struct backend_watch *watch) {
    if (backend->table->set_watch)
        backend->table->set_watch(backend, watch);
}

int stream_open(struct backend *backend, struct stream **out) { return backend->table->stream_open(backend, out); }

void stream_close(struct stream *stream) {
    if (stream)
        stream->backend->table->stream_close(stream);
}

struct backend *stream_backend(struct stream *stream) { return stream->backend; }

int stream_launch(struct stream *stream, int op, const void *args, size_t args_bytes) {
    return stream->backend->table->launch(stream, op, args, args_bytes);
}

int stream_call(struct stream *stream, int (*function)(void *), const void *args, size_t args_bytes) {
    return stream->backend->table->call(stream, function, args, args_bytes);
}

int stream_native(struct stream *stream, void **native) {
    *native = NULL;
    return stream->backend->table->native ? stream->backend->table->native(stream, native) : STATUS_OK;
}

int stream_keep(struct stream *stream, int status) {
    return stream->backend->table->keep ? stream->backend->table->keep(stream, status) : status;
}

int stream_fence(struct stream *stream) {
    return stream->backend->table->fence ? stream->backend->table->fence(stream) : STATUS_OK;
}

int stream_read(struct stream *stream, const void *data, size_t bytes, uint32_t *sum) {
    if (!stream->backend->table->read)
        FAIL(STATUS_USAGE, "device %s: reading is measured on GPUs only", stream->backend->table->name);
    return stream->backend->table->read(stream, data, bytes, sum);
}

int stream_peer_attend(struct stream *stream, const struct peer_attention *args, bool *done) {
    *done = false;
    return stream->backend->table->peer_attend ? stream->backend->table->peer_attend(stream, args, done) : STATUS_OK;
}

int stream_copy_in(struct stream *stream, void *device, const void *host, size_t bytes) {
    return stream->backend->table->copy(stream, device, host, bytes);
}

int stream_copy_out(struct stream *stream, void *host, const void *device, size_t bytes) {
    return stream->backend->table->copy(stream, host, device, bytes);
}

int stream_copy(struct stream *stream, void *to_device, const void *from_device, size_t bytes) {
    return stream->backend->table->copy(stream, to_device, from_device, bytes);
}

int stream_zero(struct stream *stream, void *device, size_t bytes) {
    return stream->backend->table->zero(stream, device, bytes);
}

int stream_sync(struct stream *stream) { return stream->backend->table->stream_sync(stream); }

int event_open(struct backend *backend, struct event **out) { return backend->table->event_open(backend, out); }

void event_close(struct event *event) {
    if (event)
        event->backend->table->event_close(event);
}

int event_record(struct event *event, struct stream *stream) {
    return event->backend->table->event_record(event, stream);
}

int stream_wait(struct stream *stream, struct event *event) {
    return stream->backend->table->stream_wait(stream, event);
}

int event_sync(struct event *event) { return event->backend->table->event_sync(event); }

int backend_record_begin(struct backend *backend) { return backend->table->record_begin(backend); }

int backend_record_end(struct backend *backend, struct graph **out) { return backend->table->record_end(backend, out); }

int graph_replay(struct graph *graph) { return graph->backend->table->graph_replay(graph); }

int graph_time(struct graph *graph, struct stream *stream, int n, double *seconds) {
    return graph->backend->table->graph_time(graph, stream, n, seconds);
}

int graph_n_nodes(const struct graph *graph) { return graph->backend->table->graph_n_nodes(graph); }

void graph_close(struct graph *graph) {
    if (graph)
        graph->backend->table->graph_close(graph);
}
