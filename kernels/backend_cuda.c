/* The GPU behind the first seam: memory, streams, events and graphs of the CUDA runtime; operations are the launchers of
 * kernels/cuda/. One backend is one device, used by one host thread.
 *
 *  - A recording is a stream capture. It begins on the first stream that is used; every other one that is used joins by an event, and
 *    all meet again at the end, so a recording covers all streams as it does on the CPU.
 *  - The host never blocks inside the driver: waits are polled, so that a watch (dist's watchdog) can end one that does not.
 *  - The first failure of a stream is kept. Errors of the device itself stay with the process: whatever comes after fails too.
 *
 * Nothing here needs a driver before a backend is opened: a build with CUDA runs on the CPU of any machine. */
#include <cuda_runtime_api.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/backend_impl.h"
#include "kernels/cuda/blas.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/dnn.h"
#include "kernels/cuda/rates.h"

enum {
    ERROR_TEXT = 2048,
    MAX_STREAMS = 8,     /* of a backend; the engine uses two */
    SPIN_US = 2000,      /* a wait keeps its core for as long as a step may take, and is then told to the watch, */
    REST_US = 50,        /* which is asked this often */
    TIMED_AT_ONCE = 64,  /* replays enqueued before the host waits: far from what fills a stream's queue */
};

struct block { /* one allocation */
    struct block *next;
    void *pointer;
    size_t bytes;
    enum memory purpose;
};

struct cuda_stream {
    struct stream base;
    cudaStream_t stream;
    struct cuda_launch launch;
    int index;           /* in backend.streams */
    bool captured;       /* part of the recording under way */
    cudaEvent_t join;    /* orders this stream around recordings and replays */
    int status;          /* first failure; later work is dropped */
    char error[ERROR_TEXT];
};

struct cuda_event {
    struct event base;
    cudaEvent_t event;   /* what hosts and replays see */
    cudaEvent_t inner;   /* the same moment within the recording `captured_by` */
    const struct cuda_graph *captured_by;
    struct cuda_stream *recorded_on;
};

struct cuda_graph {
    struct graph base;
    struct cuda_stream *origin; /* NULL: nothing was recorded */
    bool joined[MAX_STREAMS];   /* the other streams it works on */
    cudaGraphExec_t exec;
    size_t n_nodes;
};

struct cuda_backend {
    struct backend base;
    struct backend_device device;
    int index, n_sms;
    struct cuda_blas *blas;
    struct cuda_dnn *dnn;
    struct block *blocks;
    int64_t used[MEMORY_COUNT];
    struct cuda_stream *streams[MAX_STREAMS];
    struct cuda_graph *recording;
    cudaEvent_t fork;
    struct backend_watch watch;
};

static struct cuda_backend *backend_of(const struct backend *b) { return (struct cuda_backend *)(uintptr_t)b; }
static struct cuda_stream *stream_of(struct stream *s) { return (struct cuda_stream *)s; }
static struct cuda_event *event_of(struct event *e) { return (struct cuda_event *)e; }

#define TRY_CUDA(call, what)                                                                                            \
    do {                                                                                                                \
        cudaError_t cuda_error_ = (call);                                                                               \
        if (cuda_error_ != cudaSuccess)                                                                                 \
            FAIL(STATUS_FAILED, "CUDA: %s: %s", (what), cudaGetErrorString(cuda_error_));                               \
    } while (0)

static int (*const launchers[OP_COUNT])(const struct cuda_launch *, const void *);

/* ---- devices --------------------------------------------------------------------------------------------------------- */

int backend_cuda_n_devices(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError(); /* no driver or no device is an answer, not an error to be met later */
        return 0;
    }
    return n;
}

int backend_cuda_find_device(int device, struct backend_device *out) {
    struct cudaDeviceProp p;
    if (device < 0 || device >= backend_cuda_n_devices())
        FAIL(STATUS_USAGE, "GPU %d: this process sees %d", device, backend_cuda_n_devices());
    TRY_CUDA(cudaGetDeviceProperties(&p, device), "reading a GPU's properties");
    *out = (struct backend_device){.bytes = (int64_t)p.totalGlobalMem, .architecture = 10 * p.major + p.minor};
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, p.name);
    TRY_CUDA(cudaDeviceGetPCIBusId(out->pci, sizeof out->pci, device), "reading a GPU's PCI id");
    return STATUS_OK;
}

/* The device of this backend becomes the thread's: a process may have several backends. */
static int use_device(const struct cuda_backend *b) {
    TRY_CUDA(cudaSetDevice(b->index), "using a GPU");
    return STATUS_OK;
}

/* ---- memory ---------------------------------------------------------------------------------------------------------- */

static const char *purpose_name(enum memory purpose) {
    static const char *const names[MEMORY_COUNT] = {"weights", "workspace", "cache", "host buffers"};
    return names[purpose];
}

static int fail_memory(const struct cuda_backend *b, enum memory purpose, size_t bytes) {
    size_t left = 0, total = 0;
    (void)cudaGetLastError();
    (void)cudaMemGetInfo(&left, &total);
    if (purpose == MEMORY_HOST)
        FAIL(STATUS_MEMORY, "out of memory: %zu bytes of pinned host memory", bytes);
    FAIL(STATUS_MEMORY, "out of memory: %zu bytes for %s on GPU %d (%s), of which %zu of %zu bytes are free", bytes,
         purpose_name(purpose), b->index, b->device.name, left, total);
}

static int cuda_alloc(struct backend *backend, enum memory purpose, size_t bytes, void **pointer) {
    struct cuda_backend *b = backend_of(backend);
    struct block *block;
    size_t rounded = bytes ? bytes : 1;
    *pointer = NULL;
    TRY(use_device(b));
    TRY(base_alloc(&block, 1, sizeof *block));
    cudaError_t error = purpose == MEMORY_HOST ? cudaMallocHost(&block->pointer, rounded) : cudaMalloc(&block->pointer, rounded);
    if (error != cudaSuccess) {
        free(block);
        return fail_memory(b, purpose, bytes);
    }
    if (purpose == MEMORY_HOST) {
        memset(block->pointer, 0, rounded);
    } else {
        error = cudaMemset(block->pointer, 0, rounded);
        if (error == cudaSuccess)
            error = cudaDeviceSynchronize(); /* the streams do not wait for the default one */
    }
    block->bytes = bytes;
    block->purpose = purpose;
    block->next = b->blocks;
    b->blocks = block;
    b->used[purpose] += (int64_t)bytes;
    *pointer = block->pointer;
    TRY_CUDA(error, "zeroing memory");
    return STATUS_OK;
}

static void release(struct cuda_backend *b, struct block *block) {
    if (block->purpose == MEMORY_HOST)
        (void)cudaFreeHost(block->pointer);
    else
        (void)cudaFree(block->pointer);
    b->used[block->purpose] -= (int64_t)block->bytes;
    free(block);
}

static void cuda_free(struct backend *backend, void *pointer) {
    struct cuda_backend *b = backend_of(backend);
    for (struct block **at = &b->blocks; *at; at = &(*at)->next)
        if ((*at)->pointer == pointer) {
            struct block *block = *at;
            *at = block->next;
            release(b, block);
            return;
        }
}

static size_t cuda_used(const struct backend *backend, enum memory purpose) { return (size_t)backend_of(backend)->used[purpose]; }

static void cuda_count(struct backend *backend, enum memory purpose, int64_t bytes) { backend_of(backend)->used[purpose] += bytes; }

static int64_t cuda_free_bytes(const struct backend *backend) {
    size_t left = 0, total = 0;
    (void)use_device(backend_of(backend));
    return cudaMemGetInfo(&left, &total) == cudaSuccess ? (int64_t)left : 0;
}

/* ---- recording ------------------------------------------------------------------------------------------------------- */

/* Makes `s` part of the recording under way, if there is one. */
static int join_recording(struct cuda_stream *s) {
    struct cuda_backend *b = backend_of(s->base.backend);
    struct cuda_graph *g = b->recording;
    if (!g || s->captured)
        return STATUS_OK;
    if (!g->origin) {
        TRY_CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeRelaxed), "beginning a recording");
        g->origin = s;
        s->captured = true;
        TRY_CUDA(cudaEventRecord(b->fork, s->stream), "beginning a recording");
        return STATUS_OK;
    }
    TRY_CUDA(cudaStreamWaitEvent(s->stream, b->fork, cudaEventWaitDefault), "adding a stream to a recording");
    s->captured = true;
    g->joined[s->index] = true;
    return STATUS_OK;
}

static int cuda_record_begin(struct backend *backend) {
    struct cuda_backend *b = backend_of(backend);
    if (b->recording)
        FAIL(STATUS_FAILED, "a recording is already running");
    TRY(base_alloc(&b->recording, 1, sizeof *b->recording));
    b->recording->base.backend = backend;
    return STATUS_OK;
}

static void cuda_graph_close(struct graph *graph) {
    struct cuda_graph *g = (struct cuda_graph *)graph;
    if (g->exec)
        (void)cudaGraphExecDestroy(g->exec);
    free(g);
}

/* Ends the capture of all streams; *captured may be NULL only on failure. */
static int end_capture(struct cuda_backend *b, struct cuda_graph *g, cudaGraph_t *captured) {
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < MAX_STREAMS; i++) {
        struct cuda_stream *s = b->streams[i];
        if (s && s->captured && s != g->origin && error == cudaSuccess) {
            error = cudaEventRecord(s->join, s->stream);
            if (error == cudaSuccess)
                error = cudaStreamWaitEvent(g->origin->stream, s->join, cudaEventWaitDefault);
        }
        if (s)
            s->captured = false;
    }
    cudaError_t end = cudaStreamEndCapture(g->origin->stream, captured);
    TRY_CUDA(error, "joining the streams of a recording");
    TRY_CUDA(end, "ending a recording");
    return STATUS_OK;
}

static int instantiate(struct cuda_graph *g, cudaGraph_t captured) {
    cudaError_t error = cudaGraphGetNodes(captured, NULL, &g->n_nodes);
    if (error == cudaSuccess)
        error = cudaGraphInstantiate(&g->exec, captured, 0);
    (void)cudaGraphDestroy(captured);
    TRY_CUDA(error, "making a graph of a recording");
    TRY_CUDA(cudaGraphUpload(g->exec, g->origin->stream), "sending a graph to the GPU");
    return STATUS_OK;
}

static int cuda_record_end(struct backend *backend, struct graph **out) {
    struct cuda_backend *b = backend_of(backend);
    struct cuda_graph *g = b->recording;
    cudaGraph_t captured = NULL;
    *out = NULL;
    if (!g)
        FAIL(STATUS_FAILED, "no recording is running");
    b->recording = NULL;
    int status = g->origin ? end_capture(b, g, &captured) : STATUS_OK;
    if (status == STATUS_OK && captured)
        status = instantiate(g, captured);
    else if (captured)
        (void)cudaGraphDestroy(captured);
    if (status < 0) {
        (void)cudaGetLastError();
        cuda_graph_close(&g->base);
        return status;
    }
    *out = &g->base;
    return STATUS_OK;
}

static int kept_failure(const struct cuda_stream *s) { return s->status < 0 ? base_fail_text(s->status, s->error) : STATUS_OK; }

static int keep(struct cuda_stream *s, int status) {
    if (status < 0 && s->status == STATUS_OK) {
        s->status = status;
        snprintf(s->error, sizeof s->error, "%s", base_error());
    }
    return status;
}

/* Before any work: what failed before, the device, and the recording. */
static int enter(struct cuda_stream *s) {
    TRY(kept_failure(s));
    TRY(use_device(backend_of(s->base.backend)));
    s->launch.previous = OP_COUNT;
    return join_recording(s);
}

static int replay(struct cuda_graph *g) {
    struct cuda_backend *b = backend_of(g->base.backend);
    cudaStream_t origin = g->origin->stream;
    for (int i = 0; i < MAX_STREAMS; i++)
        if (g->joined[i] && b->streams[i]) {
            TRY_CUDA(cudaEventRecord(b->streams[i]->join, b->streams[i]->stream), "replaying a graph");
            TRY_CUDA(cudaStreamWaitEvent(origin, b->streams[i]->join, cudaEventWaitDefault), "replaying a graph");
        }
    TRY_CUDA(cudaGraphLaunch(g->exec, origin), "replaying a graph");
    for (int i = 0; i < MAX_STREAMS; i++)
        if (g->joined[i] && b->streams[i]) {
            TRY_CUDA(cudaEventRecord(g->origin->join, origin), "replaying a graph");
            TRY_CUDA(cudaStreamWaitEvent(b->streams[i]->stream, g->origin->join, cudaEventWaitDefault), "replaying a graph");
        }
    return STATUS_OK;
}

static int cuda_graph_replay(struct graph *graph) {
    struct cuda_graph *g = (struct cuda_graph *)graph;
    if (!g->origin)
        return STATUS_OK;
    if (backend_of(graph->backend)->recording)
        FAIL(STATUS_FAILED, "a graph cannot be replayed within a recording");
    TRY(enter(g->origin));
    return keep(g->origin, replay(g));
}

static int cuda_graph_n_nodes(const struct graph *graph) { return (int)((const struct cuda_graph *)graph)->n_nodes; }

/* ---- work ------------------------------------------------------------------------------------------------------------ */

static int cuda_launch_op(struct stream *stream, int op, const void *args, size_t args_bytes) {
    struct cuda_stream *s = stream_of(stream);
    int previous = s->launch.previous;
    (void)args_bytes;
    TRY(enter(s));
    s->launch.previous = previous;
    int status = launchers[op](&s->launch, args);
    s->launch.previous = op;
    s->launch.turn = (s->launch.turn + 1) % CUDA_TURNS;
    return keep(s, status);
}

static int cuda_call(struct stream *stream, int (*function)(void *), const void *args, size_t args_bytes) {
    (void)stream, (void)function, (void)args, (void)args_bytes;
    FAIL(STATUS_USAGE, "a host function cannot run in a GPU's stream: device = cuda needs comm = nccl");
}

static int copy(struct cuda_stream *s, void *to, const void *from, size_t bytes) {
    TRY_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, s->stream), "copying");
    return STATUS_OK;
}

static int cuda_copy(struct stream *stream, void *to, const void *from, size_t bytes) {
    struct cuda_stream *s = stream_of(stream);
    TRY(enter(s));
    return bytes ? keep(s, copy(s, to, from, bytes)) : STATUS_OK;
}

static int zero(struct cuda_stream *s, void *device, size_t bytes) {
    TRY_CUDA(cudaMemsetAsync(device, 0, bytes, s->stream), "zeroing");
    return STATUS_OK;
}

static int cuda_zero(struct stream *stream, void *device, size_t bytes) {
    struct cuda_stream *s = stream_of(stream);
    TRY(enter(s));
    return bytes ? keep(s, zero(s, device, bytes)) : STATUS_OK;
}

/* ---- waiting --------------------------------------------------------------------------------------------------------- */

/* Polls one of stream and event. The watch, if any, is told of waits that last and may end them. */
static int wait_for(struct cuda_backend *b, cudaStream_t stream, cudaEvent_t event) {
    const struct backend_watch *watch = b->watch.begin ? &b->watch : NULL;
    double begin = base_seconds();
    bool told = false;
    int status = STATUS_OK;
    for (;;) {
        cudaError_t state = event ? cudaEventQuery(event) : cudaStreamQuery(stream);
        if (state != cudaErrorNotReady) {
            if (told)
                watch->end(watch->context);
            TRY_CUDA(state, "running work of the GPU");
            return status;
        }
        if ((base_seconds() - begin) * 1e6 < SPIN_US) {
            sched_yield(); /* at once back where nobody else wants the core */
            continue;
        }
        if (watch && !told) {
            watch->begin(watch->context, "work of the GPU");
            told = true;
        }
        status = watch ? watch->poll(watch->context) : STATUS_OK;
        if (status < 0) {
            watch->end(watch->context);
            return status;
        }
        usleep(REST_US);
    }
}

static int cuda_stream_sync(struct stream *stream) {
    struct cuda_stream *s = stream_of(stream);
    TRY(kept_failure(s));
    return keep(s, wait_for(backend_of(s->base.backend), s->stream, NULL));
}

static int cuda_event_sync(struct event *event) {
    struct cuda_event *e = event_of(event);
    struct cuda_stream *s = e->recorded_on;
    if (!s)
        return STATUS_OK;
    TRY(kept_failure(s));
    return keep(s, wait_for(backend_of(e->base.backend), NULL, e->event));
}

/* ---- timing ---------------------------------------------------------------------------------------------------------- */

/* One replay ahead of the first event keeps the device busy until the host has enqueued what is timed. */
static int time_replays(struct cuda_graph *g, cudaEvent_t *events, int n, double *seconds) {
    cudaStream_t stream = g->origin->stream;
    TRY(replay(g));
    TRY_CUDA(cudaEventRecord(events[0], stream), "timing a graph");
    for (int i = 0; i < n; i++) {
        TRY(replay(g));
        TRY_CUDA(cudaEventRecord(events[i + 1], stream), "timing a graph");
    }
    TRY(wait_for(backend_of(g->base.backend), stream, NULL));
    for (int i = 0; i < n; i++) {
        float ms = 0;
        TRY_CUDA(cudaEventElapsedTime(&ms, events[i], events[i + 1]), "timing a graph");
        seconds[i] = 1e-3 * (double)ms;
    }
    return STATUS_OK;
}

static int cuda_graph_time(struct graph *graph, struct stream *stream, int n, double *seconds) {
    struct cuda_graph *g = (struct cuda_graph *)graph;
    cudaEvent_t events[TIMED_AT_ONCE + 1] = {0};
    int status = STATUS_OK;
    if (g->origin != stream_of(stream) || backend_of(graph->backend)->recording)
        FAIL(STATUS_USAGE, "a graph is timed on the stream that its recording began on, outside of recordings");
    TRY(enter(g->origin));
    for (int i = 0; i <= TIMED_AT_ONCE && status == STATUS_OK; i++)
        if (cudaEventCreate(&events[i]) != cudaSuccess)
            status = base_fail(STATUS_FAILED, __FILE__, __LINE__, "CUDA: making events: %s", cudaGetErrorString(cudaGetLastError()));
    for (int first = 0; first < n && status == STATUS_OK; first += TIMED_AT_ONCE)
        status = keep(g->origin, time_replays(g, events, (int)min_i64(TIMED_AT_ONCE, n - first), seconds + first));
    for (int i = 0; i <= TIMED_AT_ONCE; i++)
        if (events[i])
            (void)cudaEventDestroy(events[i]);
    return status;
}

/* ---- events ---------------------------------------------------------------------------------------------------------- */

static int record(struct cuda_event *e, struct cuda_stream *s) {
    const struct cuda_graph *recording = backend_of(s->base.backend)->recording;
    e->captured_by = recording;
    if (!recording) {
        TRY_CUDA(cudaEventRecord(e->event, s->stream), "recording an event");
        return STATUS_OK;
    }
    TRY_CUDA(cudaEventRecord(e->inner, s->stream), "recording an event");
    TRY_CUDA(cudaEventRecordWithFlags(e->event, s->stream, cudaEventRecordExternal), "recording an event");
    return STATUS_OK;
}

static int cuda_event_record(struct event *event, struct stream *stream) {
    struct cuda_stream *s = stream_of(stream);
    event_of(event)->recorded_on = s; /* also of a stream that failed: whoever waits learns it */
    TRY(enter(s));
    return keep(s, record(event_of(event), s));
}

static int wait_event(struct cuda_stream *s, struct cuda_event *e) {
    const struct cuda_graph *recording = backend_of(s->base.backend)->recording;
    if (recording && e->captured_by == recording)
        TRY_CUDA(cudaStreamWaitEvent(s->stream, e->inner, cudaEventWaitDefault), "waiting for an event");
    else
        TRY_CUDA(cudaStreamWaitEvent(s->stream, e->event, recording ? cudaEventWaitExternal : cudaEventWaitDefault),
                 "waiting for an event");
    return STATUS_OK;
}

static int cuda_stream_wait(struct stream *stream, struct event *event) {
    struct cuda_stream *s = stream_of(stream);
    struct cuda_event *e = event_of(event);
    TRY(enter(s));
    if (!e->recorded_on)
        return STATUS_OK;
    if (e->recorded_on->status < 0) {
        base_fail_text(e->recorded_on->status, e->recorded_on->error);
        return keep(s, e->recorded_on->status);
    }
    return keep(s, wait_event(s, e));
}

static int event_make(struct cuda_event *e) {
    TRY(use_device(backend_of(e->base.backend)));
    TRY_CUDA(cudaEventCreateWithFlags(&e->event, cudaEventDisableTiming), "making an event");
    TRY_CUDA(cudaEventCreateWithFlags(&e->inner, cudaEventDisableTiming), "making an event");
    return STATUS_OK;
}

static void cuda_event_close(struct event *event) {
    struct cuda_event *e = event_of(event);
    if (e->event)
        (void)cudaEventDestroy(e->event);
    if (e->inner)
        (void)cudaEventDestroy(e->inner);
    free(e);
}

static int cuda_event_open(struct backend *backend, struct event **out) {
    struct cuda_event *e;
    TRY(base_alloc(&e, 1, sizeof *e));
    e->base.backend = backend;
    int status = event_make(e);
    if (status < 0) {
        cuda_event_close(&e->base);
        return status;
    }
    *out = &e->base;
    return STATUS_OK;
}

/* ---- streams --------------------------------------------------------------------------------------------------------- */

static void cuda_stream_close(struct stream *stream) {
    struct cuda_stream *s = stream_of(stream);
    struct cuda_backend *b = backend_of(s->base.backend);
    if (s->stream)
        (void)cudaStreamDestroy(s->stream);
    if (s->join)
        (void)cudaEventDestroy(s->join);
    backend_free(&b->base, s->launch.scratch);
    backend_free(&b->base, s->launch.counters);
    backend_free(&b->base, s->launch.exchange);
    if (b->streams[s->index] == s)
        b->streams[s->index] = NULL;
    free(s);
}

static int stream_make(struct cuda_backend *b, struct cuda_stream *s) {
    TRY(use_device(b));
    TRY_CUDA(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking), "making a stream");
    TRY_CUDA(cudaEventCreateWithFlags(&s->join, cudaEventDisableTiming), "making a stream");
    TRY(backend_alloc(&b->base, MEMORY_WORKSPACE, CUDA_SCRATCH_BYTES, &s->launch.scratch));
    TRY(backend_alloc(&b->base, MEMORY_WORKSPACE, CUDA_COUNTERS * sizeof *s->launch.counters, &s->launch.counters));
    TRY(backend_alloc(&b->base, MEMORY_WORKSPACE, CUDA_TURNS * CUDA_EXCHANGE_BYTES, &s->launch.exchange));
    TRY_CUDA(cudaMemsetAsync(s->launch.exchange, 0xff, CUDA_TURNS * CUDA_EXCHANGE_BYTES, s->stream), "making a stream");
    s->launch.previous = OP_COUNT;
    s->launch.stream = s->stream;
    s->launch.n_sms = b->n_sms;
    s->launch.architecture = b->device.architecture;
    s->launch.blas = b->blas;
    s->launch.dnn = b->dnn;
    return STATUS_OK;
}

static int cuda_stream_open(struct backend *backend, struct stream **out) {
    struct cuda_backend *b = backend_of(backend);
    struct cuda_stream *s;
    int index = 0;
    while (index < MAX_STREAMS && b->streams[index])
        index++;
    if (index == MAX_STREAMS)
        FAIL(STATUS_FAILED, "a GPU backend has at most %d streams", MAX_STREAMS);
    TRY(base_alloc(&s, 1, sizeof *s));
    s->base.backend = backend;
    s->index = index;
    b->streams[index] = s;
    int status = stream_make(b, s);
    if (status < 0) {
        cuda_stream_close(&s->base);
        return status;
    }
    *out = &s->base;
    return STATUS_OK;
}

static int cuda_native(struct stream *stream, void **native) {
    TRY(enter(stream_of(stream)));
    *native = stream_of(stream)->stream;
    return STATUS_OK;
}

static int cuda_keep(struct stream *stream, int status) { return keep(stream_of(stream), status); }

static int cuda_stream_fence(struct stream *stream) {
    struct cuda_stream *s = stream_of(stream);
    TRY(enter(s));
    return keep(s, cuda_fence(&s->launch));
}

static int cuda_stream_read(struct stream *stream, const void *data, size_t bytes, uint32_t *sum) {
    struct cuda_stream *s = stream_of(stream);
    TRY(enter(s));
    return keep(s, cuda_read(&s->launch, data, bytes, sum));
}

static int cuda_stream_peer_attend(struct stream *stream, const struct peer_attention *args, bool *done) {
    struct cuda_stream *s = stream_of(stream);
    TRY(enter(s));
    return keep(s, cuda_dnn_peer_attend(&s->launch, args, done));
}

/* ---- opening --------------------------------------------------------------------------------------------------------- */

static void cuda_close(struct backend *backend) {
    struct cuda_backend *b = backend_of(backend);
    cuda_dnn_close(b->dnn);
    cuda_blas_close(b->blas);
    if (b->fork)
        (void)cudaEventDestroy(b->fork);
    while (b->blocks) {
        struct block *block = b->blocks;
        b->blocks = block->next;
        release(b, block);
    }
    free(b);
}

static int open_device(struct cuda_backend *b) {
    enum { LEAST_ARCHITECTURE = 80 }; /* bf16 tensor cores and cp.async */
    TRY(backend_cuda_find_device(b->index, &b->device));
    if (b->device.architecture < LEAST_ARCHITECTURE)
        FAIL(STATUS_USAGE, "GPU %d (%s) has compute capability %d.%d; 8.0 is the least that is needed", b->index, b->device.name,
             b->device.architecture / 10, b->device.architecture % 10);
    TRY(use_device(b));
    TRY_CUDA(cudaDeviceGetAttribute(&b->n_sms, cudaDevAttrMultiProcessorCount, b->index), "reading a GPU's properties");
    TRY_CUDA(cudaEventCreateWithFlags(&b->fork, cudaEventDisableTiming), "opening a GPU");
    TRY(cuda_blas_open(&b->blas));
    return cuda_dnn_open(&b->dnn);
}

static int cuda_open(const struct backend_options *options, struct backend **out) {
    struct cuda_backend *b;
    if (backend_cuda_n_devices() == 0)
        FAIL(STATUS_USAGE, "device cuda: no GPU that this process can use (no driver, or no visible device)");
    if (options->profile)
        FAIL(STATUS_USAGE, "device cuda: the time of each kind of work is not kept on GPUs, where a step is one graph; use Nsight Systems");
    TRY(base_alloc(&b, 1, sizeof *b));
    b->base.table = &backend_cuda_table;
    b->index = options->device;
    int status = open_device(b);
    if (status < 0) {
        cuda_close(&b->base);
        return status;
    }
    *out = &b->base;
    return STATUS_OK;
}

static int cuda_n_threads(const struct backend *backend) {
    (void)backend;
    return 1;
}

static void cuda_profile(const struct backend *backend, struct backend_times *times, struct backend_time *launches, int n) {
    (void)backend;
    *times = (struct backend_times){0};
    memset(launches, 0, (size_t)n * sizeof *launches);
}

static void cuda_set_watch(struct backend *backend, const struct backend_watch *watch) {
    backend_of(backend)->watch = watch ? *watch : (struct backend_watch){0};
}

#define LAUNCH_OP(name)                                                                                                 \
    static int launch_##name(const struct cuda_launch *launch, const void *args) {                                      \
        return cuda_##name(launch, (const struct name##_args *)args);                                                   \
    }
OPS(LAUNCH_OP)
#undef LAUNCH_OP

static int (*const launchers[OP_COUNT])(const struct cuda_launch *, const void *) = {
#define OP_ENTRY(name) [OP_##name] = launch_##name,
    OPS(OP_ENTRY)
#undef OP_ENTRY
};

const struct backend_table backend_cuda_table = {
    .name = "cuda", .async = true, .open = cuda_open, .close = cuda_close, .n_threads = cuda_n_threads, .profile = cuda_profile,
    .alloc = cuda_alloc, .free = cuda_free, .used = cuda_used, .count = cuda_count, .free_bytes = cuda_free_bytes,
    .stream_open = cuda_stream_open, .stream_close = cuda_stream_close, .native = cuda_native, .keep = cuda_keep, .fence = cuda_stream_fence,
    .read = cuda_stream_read, .peer_attend = cuda_stream_peer_attend, .launch = cuda_launch_op, .call = cuda_call, .copy = cuda_copy,
    .zero = cuda_zero,
    .stream_sync = cuda_stream_sync, .event_open = cuda_event_open, .event_close = cuda_event_close,
    .event_record = cuda_event_record, .stream_wait = cuda_stream_wait, .event_sync = cuda_event_sync,
    .record_begin = cuda_record_begin, .record_end = cuda_record_end, .graph_replay = cuda_graph_replay,
    .graph_time = cuda_graph_time, .graph_n_nodes = cuda_graph_n_nodes, .graph_close = cuda_graph_close, .set_watch = cuda_set_watch,
};
