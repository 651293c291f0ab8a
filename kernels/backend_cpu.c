/* The CPU backends. `cpu` runs work at once on the calling thread. `cpu-async` gives each stream a worker thread that runs its
 * queue with random delays, and keeps device memory inaccessible while no operation runs, so that a host access, a missing event or
 * a host argument that changes is found without a GPU. Memory, recording and streams are common to both. */
#include <cblas.h>
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kernels/ops.h"
#include "kernels/work.h"

enum {
    ALIGNMENT = 64,
    MAP_FROM = 1 << 20,   /* bytes from which a block is mapped: zero without a touch, so a cache costs what is written to it */
    DELAY_EVERY = 8,      /* cpu-async: one piece of work in so many waits, memory closed */
    DELAY_MAX_US = 60,    /* longest delay */
    ERROR_TEXT = 2048,
};

/* cpu-async's device memory is one reservation of addresses, so that one mprotect opens or closes all of it. */
static const size_t ARENA_BYTES = (size_t)64 << 30;

void openblas_set_num_threads(int n);

struct block { /* one allocation */
    struct block *next;
    void *pointer;
    size_t bytes;
    enum memory purpose;
};

struct cpu_backend {
    struct backend base;
    int n_threads;
    uint64_t seed;
    pthread_mutex_t lock; /* everything below */
    struct block *blocks;
    size_t used[MEMORY_COUNT];
    struct cpu_graph *recording;
    bool profile;
    struct backend_times times;                /* under `lock`, as the next */
    struct backend_time launches[OP_COUNT];
    /* cpu-async */
    unsigned char *arena;
    size_t arena_used;
    int n_open; /* operations running: the arena is readable while > 0 */
    int n_streams;
};

struct cpu_stream {
    struct stream base;
    int status; /* first failure; later work is dropped */
    char error[ERROR_TEXT];
    /* cpu-async: a queue and its worker */
    bool has_worker;
    pthread_t worker;
    pthread_mutex_t lock;
    pthread_cond_t change;
    struct work_list queue, running;
    bool busy, stop;
    uint64_t random;
};

struct cpu_event {
    struct event base;
    pthread_mutex_t lock;
    pthread_cond_t change;
    uint64_t n_recorded, n_reached;
    int status;
    char error[ERROR_TEXT];
};

struct cpu_graph {
    struct graph base;
    struct work_list list;
};

static struct cpu_backend *backend_of(const struct backend *b) { return (struct cpu_backend *)(uintptr_t)b; }
static struct cpu_stream *stream_of(struct stream *s) { return (struct cpu_stream *)s; }
static struct cpu_event *event_of(struct event *e) { return (struct cpu_event *)e; }

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static bool in_arena(const struct cpu_backend *b, enum memory purpose) { return b->arena && purpose != MEMORY_HOST; }

/* Opens or closes the arena as operations come and go. */
static void arena_enter(struct cpu_backend *b, int change) {
    pthread_mutex_lock(&b->lock);
    int before = b->n_open;
    b->n_open += change;
    if (b->arena && b->arena_used && (before == 0) != (b->n_open == 0))
        mprotect(b->arena, b->arena_used, b->n_open ? PROT_READ | PROT_WRITE : PROT_NONE);
    pthread_mutex_unlock(&b->lock);
}

static void *arena_take(struct cpu_backend *b, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    bytes = (bytes + page - 1) / page * page;
    if (b->arena_used + bytes > ARENA_BYTES)
        return NULL;
    void *memory = b->arena + b->arena_used;
    b->arena_used += bytes;
    if (mprotect(memory, bytes, b->n_open ? PROT_READ | PROT_WRITE : PROT_NONE) != 0)
        return NULL;
    return memory; /* fresh anonymous memory: zero */
}

/* Bytes before a mapped block of `rounded` bytes: it ends where its pages end, and the page after it is closed, so that writing
 * beyond it is found as it is found around small blocks. */
static size_t map_slack(size_t rounded) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (page - rounded % page) % page;
}

static void *map_zeros(size_t rounded) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), slack = map_slack(rounded);
    unsigned char *memory = mmap(NULL, slack + rounded + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    mprotect(memory + slack + rounded, page, PROT_NONE);
    return memory + slack;
}

static void unmap(void *pointer, size_t rounded) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), slack = map_slack(rounded);
    munmap((unsigned char *)pointer - slack, slack + rounded + page);
}

static size_t round_block(size_t bytes) {
    size_t rounded = (bytes ? bytes : 1) + ALIGNMENT - 1;
    return rounded - rounded % ALIGNMENT;
}

static const char *purpose_name(enum memory purpose) {
    static const char *const names[MEMORY_COUNT] = {"weights", "workspace", "cache", "host buffers"};
    return names[purpose];
}

static int cpu_alloc(struct backend *backend, enum memory purpose, size_t bytes, void **pointer) {
    struct cpu_backend *b = backend_of(backend);
    struct block *block;
    TRY(base_alloc(&block, 1, sizeof *block));
    size_t rounded = round_block(bytes);
    pthread_mutex_lock(&b->lock);
    if (in_arena(b, purpose)) {
        block->pointer = arena_take(b, rounded);
    } else if (bytes >= MAP_FROM) {
        block->pointer = map_zeros(rounded);
    } else if (posix_memalign(&block->pointer, ALIGNMENT, rounded) == 0) {
        memset(block->pointer, 0, rounded);
    } else {
        block->pointer = NULL;
    }
    if (block->pointer) {
        block->bytes = bytes;
        block->purpose = purpose;
        block->next = b->blocks;
        b->blocks = block;
        b->used[purpose] += bytes;
    }
    pthread_mutex_unlock(&b->lock);
    *pointer = block->pointer;
    if (!block->pointer) {
        free(block);
        FAIL(STATUS_MEMORY, "out of memory: %zu bytes for %s on the CPU", bytes, purpose_name(purpose));
    }
    return STATUS_OK;
}

static void release(struct cpu_backend *b, struct block *block) {
    if (in_arena(b, block->purpose))
        madvise(block->pointer, block->bytes, MADV_DONTNEED); /* the addresses are not used again */
    else if (block->bytes >= MAP_FROM)
        unmap(block->pointer, round_block(block->bytes));
    else
        free(block->pointer);
    b->used[block->purpose] -= block->bytes;
    free(block);
}

static void cpu_free(struct backend *backend, void *pointer) {
    struct cpu_backend *b = backend_of(backend);
    pthread_mutex_lock(&b->lock);
    for (struct block **at = &b->blocks; *at; at = &(*at)->next)
        if ((*at)->pointer == pointer) {
            struct block *block = *at;
            *at = block->next;
            release(b, block);
            break;
        }
    pthread_mutex_unlock(&b->lock);
}

static size_t cpu_used(const struct backend *backend, enum memory purpose) { return backend_of(backend)->used[purpose]; }

/* ---- running work -------------------------------------------------------------------------------------------------- */

static void stream_keep_error(struct cpu_stream *s, int status) {
    if (s->status == STATUS_OK) {
        s->status = status;
        strncpy(s->error, base_error(), sizeof s->error - 1);
    }
}

static void event_reach(struct cpu_event *e, const struct cpu_stream *s) {
    pthread_mutex_lock(&e->lock);
    e->n_reached++;
    if (s->status < 0 && e->status == STATUS_OK) {
        e->status = s->status;
        memcpy(e->error, s->error, sizeof e->error);
    }
    pthread_cond_broadcast(&e->change);
    pthread_mutex_unlock(&e->lock);
}

static int event_wait_for(struct cpu_event *e, uint64_t count) {
    pthread_mutex_lock(&e->lock);
    while (e->n_reached < count)
        pthread_cond_wait(&e->change, &e->lock);
    int status = e->status;
    pthread_mutex_unlock(&e->lock);
    return status;
}

static int64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* work_run, its time noted. */
static int run_timed(struct cpu_backend *b, struct work *work) {
    int64_t start = clock_ns();
    int status = work_run(work);
    int64_t ns = clock_ns() - start;
    struct backend_time *time = work->kind == WORK_OP     ? &b->launches[work->what.op]
                                : work->kind == WORK_CALL ? &b->times.calls
                                                          : &b->times.copies;
    pthread_mutex_lock(&b->lock);
    time->n++;
    time->ns += ns;
    pthread_mutex_unlock(&b->lock);
    return status;
}

/* Runs one piece on this thread. `arena`: open device memory around it. */
static void perform(struct work *work) {
    struct cpu_stream *s = stream_of(work->stream);
    struct cpu_backend *b = backend_of(s->base.backend);
    uint64_t count;
    int status;
    switch (work->kind) {
    case WORK_EVENT_RECORD:
        event_reach(event_of(work->what.event), s);
        return;
    case WORK_EVENT_WAIT:
        memcpy(&count, work->args, sizeof count);
        if (event_wait_for(event_of(work->what.event), count) < 0 && s->status == STATUS_OK) {
            struct cpu_event *e = event_of(work->what.event);
            s->status = e->status;
            memcpy(s->error, e->error, sizeof s->error);
        }
        return;
    default:
        if (s->status < 0)
            return;
        arena_enter(b, 1);
        status = b->profile ? run_timed(b, work) : work_run(work);
        arena_enter(b, -1);
        if (status < 0)
            stream_keep_error(s, status);
    }
}

static void random_delay(struct cpu_stream *s) {
    s->random = s->random * 6364136223846793005u + 1442695040888963407u;
    unsigned draw = (unsigned)(s->random >> 33);
    if (draw % DELAY_EVERY == 0)
        usleep(draw / DELAY_EVERY % DELAY_MAX_US);
}

static void *work_loop(void *stream) {
    struct cpu_stream *s = stream;
    omp_set_num_threads(backend_of(s->base.backend)->n_threads);
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (s->queue.n == 0 && !s->stop)
            pthread_cond_wait(&s->change, &s->lock);
        if (s->queue.n == 0)
            break;
        struct work_list list = s->queue;
        s->queue = (struct work_list){0};
        s->busy = true;
        pthread_mutex_unlock(&s->lock);
        struct work work;
        for (size_t at = 0; work_list_next(&list, &at, &work);) {
            random_delay(s);
            perform(&work);
        }
        work_list_free(&list);
        base_clear_error(); /* the stream keeps the text */
        pthread_mutex_lock(&s->lock);
        s->busy = false;
        pthread_cond_broadcast(&s->change);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* Events are counted when they are submitted, so a wait knows which reaching it waits for. */
static void count_event(struct work *work) {
    if (work->kind != WORK_EVENT_RECORD && work->kind != WORK_EVENT_WAIT)
        return;
    struct cpu_event *e = event_of(work->what.event);
    pthread_mutex_lock(&e->lock);
    if (work->kind == WORK_EVENT_RECORD)
        e->n_recorded++;
    else
        memcpy(work->args, &e->n_recorded, sizeof e->n_recorded);
    pthread_mutex_unlock(&e->lock);
}

static int submit(struct work *work) {
    struct cpu_stream *s = stream_of(work->stream);
    struct cpu_backend *b = backend_of(s->base.backend);
    if (b->recording)
        return work_list_add(&b->recording->list, work);
    count_event(work);
    if (!s->has_worker) {
        perform(work);
        return s->status < 0 ? base_fail_text(s->status, s->error) : STATUS_OK;
    }
    pthread_mutex_lock(&s->lock);
    int status = work_list_add(&s->queue, work);
    pthread_cond_broadcast(&s->change);
    pthread_mutex_unlock(&s->lock);
    return status;
}

static int cpu_launch(struct stream *stream, int op, const void *args, size_t args_bytes) {
    struct work work;
    TRY(work_make(&work, WORK_OP, stream, args, args_bytes));
    work.what.op = op;
    return submit(&work);
}

static int cpu_call(struct stream *stream, int (*function)(void *), const void *args, size_t args_bytes) {
    struct work work;
    TRY(work_make(&work, WORK_CALL, stream, args, args_bytes));
    work.what.function = function;
    return submit(&work);
}

static int cpu_copy(struct stream *stream, void *to, const void *from, size_t bytes) {
    struct work_copy copy = {to, from, bytes};
    struct work work;
    TRY(work_make(&work, WORK_COPY, stream, &copy, sizeof copy));
    return submit(&work);
}

static int cpu_zero(struct stream *stream, void *device, size_t bytes) {
    struct work_copy copy = {device, NULL, bytes};
    struct work work;
    TRY(work_make(&work, WORK_ZERO, stream, &copy, sizeof copy));
    return submit(&work);
}

static int submit_event(enum work_kind kind, struct stream *stream, struct event *event) {
    uint64_t count = 0;
    struct work work;
    TRY(work_make(&work, kind, stream, &count, sizeof count));
    work.what.event = event;
    return submit(&work);
}

static int cpu_event_record(struct event *event, struct stream *stream) {
    return submit_event(WORK_EVENT_RECORD, stream, event);
}

static int cpu_stream_wait(struct stream *stream, struct event *event) {
    return submit_event(WORK_EVENT_WAIT, stream, event);
}

static int cpu_event_sync(struct event *event) {
    struct cpu_event *e = event_of(event);
    pthread_mutex_lock(&e->lock);
    uint64_t count = e->n_recorded;
    pthread_mutex_unlock(&e->lock);
    int status = event_wait_for(e, count);
    return status < 0 ? base_fail_text(status, e->error) : STATUS_OK;
}

static int cpu_stream_sync(struct stream *stream) {
    struct cpu_stream *s = stream_of(stream);
    if (s->has_worker) {
        pthread_mutex_lock(&s->lock);
        while (s->busy || s->queue.n)
            pthread_cond_wait(&s->change, &s->lock);
        pthread_mutex_unlock(&s->lock);
    }
    return s->status < 0 ? base_fail_text(s->status, s->error) : STATUS_OK;
}

/* ---- objects ------------------------------------------------------------------------------------------------------- */

static int cpu_stream_open(struct backend *backend, struct stream **out) {
    struct cpu_backend *b = backend_of(backend);
    struct cpu_stream *s;
    TRY(base_alloc(&s, 1, sizeof *s));
    s->base.backend = backend;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->change, NULL);
    s->random = b->seed + 977 * (uint64_t)++b->n_streams;
    if (backend->table->async) {
        if (pthread_create(&s->worker, NULL, work_loop, s) != 0) {
            free(s);
            FAIL(STATUS_FAILED, "cannot start a worker thread for a stream");
        }
        s->has_worker = true;
    }
    *out = &s->base;
    return STATUS_OK;
}

static void cpu_stream_close(struct stream *stream) {
    struct cpu_stream *s = stream_of(stream);
    if (s->has_worker) {
        pthread_mutex_lock(&s->lock);
        s->stop = true;
        pthread_cond_broadcast(&s->change);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->worker, NULL);
    }
    work_list_free(&s->queue);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->change);
    free(s);
}

static int cpu_event_open(struct backend *backend, struct event **out) {
    struct cpu_event *e;
    TRY(base_alloc(&e, 1, sizeof *e));
    e->base.backend = backend;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->change, NULL);
    *out = &e->base;
    return STATUS_OK;
}

static void cpu_event_close(struct event *event) {
    struct cpu_event *e = event_of(event);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->change);
    free(e);
}

static int cpu_record_begin(struct backend *backend) {
    struct cpu_backend *b = backend_of(backend);
    if (b->recording)
        FAIL(STATUS_FAILED, "a recording is already running");
    TRY(base_alloc(&b->recording, 1, sizeof *b->recording));
    b->recording->base.backend = backend;
    return STATUS_OK;
}

static int cpu_record_end(struct backend *backend, struct graph **out) {
    struct cpu_backend *b = backend_of(backend);
    if (!b->recording)
        FAIL(STATUS_FAILED, "no recording is running");
    *out = &b->recording->base;
    b->recording = NULL;
    return STATUS_OK;
}

static int cpu_graph_replay(struct graph *graph) {
    struct cpu_graph *g = (struct cpu_graph *)graph;
    struct work work;
    for (size_t at = 0; work_list_next(&g->list, &at, &work);)
        TRY(submit(&work));
    return STATUS_OK;
}

static int cpu_graph_time(struct graph *graph, struct stream *stream, int n, double *seconds) {
    for (int i = -1; i < n; i++) {
        double start = base_seconds();
        TRY(cpu_graph_replay(graph));
        TRY(cpu_stream_sync(stream));
        if (i >= 0)
            seconds[i] = base_seconds() - start;
    }
    return STATUS_OK;
}

static int cpu_graph_n_nodes(const struct graph *graph) { return ((const struct cpu_graph *)graph)->list.n; }

static void cpu_graph_close(struct graph *graph) {
    struct cpu_graph *g = (struct cpu_graph *)graph;
    work_list_free(&g->list);
    free(g);
}

static int open_common(const struct backend_table *table, const struct backend_options *options, struct backend **out) {
    struct cpu_backend *b;
    TRY(base_alloc(&b, 1, sizeof *b));
    b->base.table = table;
    b->seed = options->seed;
    b->profile = options->profile;
    b->n_threads = options->n_threads > 0 ? options->n_threads : omp_get_num_procs();
    pthread_mutex_init(&b->lock, NULL);
    omp_set_num_threads(b->n_threads);
    openblas_set_num_threads(1); /* operations bring their own threads, each with panels of its own */
    if (table->async) {
        void *arena = mmap(NULL, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena == MAP_FAILED) {
            free(b);
            FAIL(STATUS_MEMORY, "cpu-async: cannot reserve %zu bytes of addresses", ARENA_BYTES);
        }
        b->arena = arena;
    }
    *out = &b->base;
    return STATUS_OK;
}

static int cpu_open(const struct backend_options *options, struct backend **out) {
    return open_common(&backend_cpu_table, options, out);
}

static int cpu_async_open(const struct backend_options *options, struct backend **out) {
    return open_common(&backend_cpu_async_table, options, out);
}

static void cpu_close(struct backend *backend) {
    struct cpu_backend *b = backend_of(backend);
    while (b->blocks) {
        struct block *block = b->blocks;
        b->blocks = block->next;
        release(b, block);
    }
    if (b->arena)
        munmap(b->arena, ARENA_BYTES);
    pthread_mutex_destroy(&b->lock);
    free(b);
}

static int cpu_n_threads(const struct backend *backend) { return backend_of(backend)->n_threads; }

static void cpu_profile(const struct backend *backend, struct backend_times *times, struct backend_time *launches, int n) {
    struct cpu_backend *b = backend_of(backend);
    pthread_mutex_lock(&b->lock);
    *times = b->times;
    for (int i = 0; i < n; i++)
        launches[i] = i < OP_COUNT ? b->launches[i] : (struct backend_time){0};
    pthread_mutex_unlock(&b->lock);
}

#define CPU_TABLE(table_name, is_async, opener)                                                                      \
    {                                                                                                                \
        .name = table_name, .async = is_async, .open = opener, .close = cpu_close, .n_threads = cpu_n_threads,       \
        .profile = cpu_profile,                                                                                      \
        .alloc = cpu_alloc, .free = cpu_free, .used = cpu_used, .stream_open = cpu_stream_open,                      \
        .stream_close = cpu_stream_close, .launch = cpu_launch, .call = cpu_call, .copy = cpu_copy,                  \
        .zero = cpu_zero, .stream_sync = cpu_stream_sync, .event_open = cpu_event_open,                              \
        .event_close = cpu_event_close, .event_record = cpu_event_record, .stream_wait = cpu_stream_wait,            \
        .event_sync = cpu_event_sync, .record_begin = cpu_record_begin, .record_end = cpu_record_end,                \
        .graph_replay = cpu_graph_replay, .graph_time = cpu_graph_time, .graph_n_nodes = cpu_graph_n_nodes,          \
        .graph_close = cpu_graph_close,                                                                              \
    }

const struct backend_table backend_cpu_table = CPU_TABLE("cpu", false, cpu_open);
const struct backend_table backend_cpu_async_table = CPU_TABLE("cpu-async", true, cpu_async_open);
