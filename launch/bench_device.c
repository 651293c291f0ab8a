/* The device of the parts that need no engine: opened once for them and closed before an engine opens its own. */
#include "launch/bench.h"

#include <string.h>

#include "engine/device.h"

static bool is_listed(const struct bench *b, const char *cache) {
    for (int i = 0; i < b->n_caches; i++)
        if (strcmp(b->caches[i], cache) == 0)
            return true;
    return false;
}

int bench_device_open(struct bench *b) {
    const struct options *o = b->options;
    struct comm *world = b->run->world;
    char text[PLACE_DEVICE_BYTES];
    struct device_request request = {.device = o->engine.device, .comm = o->engine.comm, .cpu_only = "", .backend.n_threads = b->n_threads};
    if (request.device && strcmp(request.device, "cpu-async") == 0)
        request.device = "cpu"; /* its memory is read by threads here, which that one forbids */
    if (is_listed(b, "f32"))
        request.cpu_only = "cache f32";
    else if (o->profile)
        request.cpu_only = "keeping the time of each kind of work";
    TRY(device_open(world, &b->run->place, &request, &b->device.backend, text, sizeof text));
    TRY(comm_agree(world, "opening the device", stream_open(b->device.backend, &b->device.stream)));
    TRY(comm_split(world, 0, comm_rank(world), "bench", &b->device.comm));
    TRY(comm_use_device(&b->device.comm, b->device.backend));
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "machine", .item = "device", .note = text});
    return STATUS_OK;
}

void bench_device_close(struct bench *b) {
    stream_close(b->device.stream);
    if (b->device.comm)
        comm_free(b->device.comm);
    backend_close(b->device.backend);
    b->device = (struct bench_device){0};
}

bool bench_on_gpu(const struct bench *b) { return strcmp(backend_name(b->device.backend), "cuda") == 0; }

int bench_record(const struct bench *b, int (*enqueue)(void *context), void *context, struct graph **out) {
    *out = NULL;
    TRY(enqueue(context));
    TRY(stream_sync(b->device.stream));
    TRY(backend_record_begin(b->device.backend));
    int status = enqueue(context), ended = backend_record_end(b->device.backend, out);
    if (status == STATUS_OK)
        return ended;
    if (ended == STATUS_OK)
        graph_close(*out);
    *out = NULL;
    return status;
}

int bench_replicate(const struct bench *b, void *memory, size_t part, size_t bytes) {
    for (size_t filled = part, next; filled < bytes; filled += next) {
        next = bytes - filled < filled ? bytes - filled : filled;
        TRY(stream_copy(b->device.stream, (uint8_t *)memory + filled, memory, next));
    }
    return STATUS_OK;
}

int bench_upload(const struct bench *b, void *device, const void *host, size_t bytes) {
    TRY(stream_copy_in(b->device.stream, device, host, bytes));
    return stream_sync(b->device.stream);
}

/* A xorshift generator started by a hash of the seed: millions of values in milliseconds. */
void bench_random(uint64_t seed, float *x, int64_t n) {
    uint64_t state = base_hash(base_hash(BASE_HASH, seed), 1) | 1;
    for (int64_t i = 0; i < n; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        x[i] = (float)(state >> 40) * 0x1p-22f - 2.0f;
    }
}

struct calls {
    int (*call)(void *context);
    void *context;
    int n;
};

static int enqueue_calls(void *context) {
    const struct calls *calls = context;
    for (int i = 0; i < calls->n; i++)
        TRY(calls->call(calls->context));
    return STATUS_OK;
}

int bench_time_calls(struct bench *b, int (*call)(void *context), void *context, int calls, int n, double *seconds, double *best) {
    struct calls all = {call, context, calls};
    struct graph *graph = NULL;
    double times[BENCH_MAX_REPEATS];
    n = (int)min_i64(n, BENCH_MAX_REPEATS);
    int status = bench_record(b, enqueue_calls, &all, &graph);
    status = comm_agree(b->run->world, "bench", status);
    if (status == STATUS_OK)
        status = graph_time(graph, b->device.stream, n, times);
    graph_close(graph);
    TRY(comm_agree(b->run->world, "bench", status));
    *seconds = bench_median(times, n) / calls;
    *best = times[0] / calls;
    return STATUS_OK;
}
