/* The public face of communicators: argument checks, stream order, ranks that are alone, and the control operations that
 * need no library of their own. What moves bytes between ranks is in the library's table (comm_impl.h). */
#include "dist/comm_impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- start and end ---------------------------------------------------------------------------------------------------- */

static int start_mpi(const char *asked, double deadline, int *argc, char ***argv, const struct comm_launcher *launcher,
                     struct comm **world) {
#ifdef KVLINC_WITH_MPI
    return comm_mpi_start(asked, deadline, argc, argv, launcher, world);
#else
    (void)asked, (void)deadline, (void)argc, (void)argv, (void)world;
    if (launcher->size > 1)
        FAIL(STATUS_USAGE, "%s started %d ranks (%s=%d), but this program was built without MPI: build it with -DWITH_MPI=ON, "
             "or start one rank", launcher->name, launcher->size, launcher->variable, launcher->size);
    FAIL(STATUS_USAGE, "comm = mpi: this program was built without MPI: build it with -DWITH_MPI=ON");
#endif
}

int comm_start(const char *name, double deadline_seconds, int *argc, char ***argv, struct comm **world) {
    struct comm_launcher launcher;
    comm_find_launcher(&launcher);
    *world = NULL;
    if (!(deadline_seconds > 0))
        FAIL(STATUS_USAGE, "deadline = %g: must be a positive number of seconds", deadline_seconds);
    bool launched = launcher.name && launcher.size != 1;
    bool any = strcmp(name, "auto") == 0 || strcmp(name, "nccl") == 0;
    if (strcmp(name, "self") == 0 || (any && !launched))
        return comm_self_start(name, world);
    if (strcmp(name, "mpi") == 0 || any)
        return start_mpi(name, deadline_seconds, argc, argv, &launcher, world);
    FAIL(STATUS_USAGE, "comm = %s: there are auto, mpi, nccl and self", name);
}

void comm_finish(struct comm *world) {
    if (world)
        world->functions->finish(world);
}

void comm_abort(struct comm *comm, int exit_code) { comm->functions->abort(comm, exit_code); }

int comm_rank(const struct comm *comm) { return comm->rank; }
int comm_size(const struct comm *comm) { return comm->size; }
const char *comm_kind(const struct comm *comm) { return comm->functions->kind; }

void comm_library(const struct comm *comm, char *text, size_t bytes) {
    comm->functions->library(comm, text, bytes);
    text[strcspn(text, "\r\n")] = '\0';
}

int comm_split(struct comm *comm, int colour, int key, const char *name, struct comm **out) {
    *out = NULL;
    return comm->functions->split(comm, colour, key, name, out);
}

void comm_free(struct comm *comm) {
    if (comm)
        comm->functions->free(comm);
}

void comm_set_step(struct comm *comm, int64_t step) {
    comm->shared->step = step;
    comm->functions->set_step(comm, step);
}

/* ---- devices ------------------------------------------------------------------------------------------------------------ */

/* Ranks that disagree would wait for each other in different libraries. */
static int check_device(struct comm *comm, const struct backend *backend, bool cuda) {
    const char *asked = comm->shared->asked, *device = backend_name(backend);
    int64_t both[2] = {cuda, !cuda};
    TRY(comm_reduce_host(comm, "choosing the device", both, 2, COMM_MAX));
    if (both[0] && both[1])
        FAIL(STATUS_USAGE, "some ranks of %s run on device cuda and some do not: this one on device %s", comm->name, device);
    if (!cuda && strcmp(asked, "nccl") == 0)
        FAIL(STATUS_USAGE, "comm = nccl moves memory of GPUs only, and device = %s has none: leave comm out, or take device = cuda",
             device);
    if (cuda && comm->size > 1 && strcmp(asked, "mpi") == 0)
        FAIL(STATUS_USAGE, "device = cuda needs comm = nccl between ranks: comm = mpi moves memory of the host only");
    return STATUS_OK;
}

int comm_use_device(struct comm **comm, struct backend *backend) {
    bool cuda = strcmp(backend_name(backend), "cuda") == 0;
    TRY(check_device(*comm, backend, cuda));
    if (!cuda || (*comm)->size == 1)
        return STATUS_OK;
#ifdef KVLINC_WITH_CUDA
    return comm_nccl_wrap(comm, backend);
#else
    FAIL(STATUS_USAGE, "device = cuda: this program was built without NCCL: build it with -DWITH_CUDA=ON");
#endif
}

/* What the device is at is known by what was put on its streams last; a graph that runs again puts nothing. */
static void begin_device_wait(void *context, const char *what) {
    struct comm_shared *shared = context;
    if (shared->last_what)
        snprintf(shared->device_what, sizeof shared->device_what, "%s; last collective enqueued: %s", what, shared->last_what);
    else
        snprintf(shared->device_what, sizeof shared->device_what, "%s", what);
    snprintf(shared->device_comm, sizeof shared->device_comm, "%s", shared->last_what ? shared->last_comm : "no collective");
    shared->device_wait = (struct watch_wait){.what = shared->device_what, .comm = shared->device_comm, .idle_root = -1};
    watch_enter(shared->watch, &shared->device_wait);
}

static int poll_device_wait(void *context) {
    const struct comm_shared *shared = context;
    return shared->poll ? shared->poll(shared) : STATUS_OK;
}

static void end_device_wait(void *context) {
    struct comm_shared *shared = context;
    watch_leave(shared->watch, &shared->device_wait);
}

int comm_watch_device(struct comm *world, struct backend *backend) {
    struct backend_watch watch = {world->shared, begin_device_wait, poll_device_wait, end_device_wait};
    if (world->size > 1) /* alone, a long wait is long work */
        backend_set_watch(backend, &watch);
    return STATUS_OK;
}

int comm_alloc(struct comm *comm, struct backend *backend, size_t bytes, void *pointer) {
    void *memory = NULL;
    if (!comm->functions->alloc)
        return backend_alloc(backend, MEMORY_WORKSPACE, bytes, pointer);
    int status = comm->functions->alloc(comm, backend, bytes, &memory);
    memcpy(pointer, &memory, sizeof memory);
    return status;
}

void comm_release(struct comm *comm, struct backend *backend, void *pointer) {
    if (pointer && comm->functions->release)
        comm->functions->release(comm, backend, pointer);
    else
        backend_free(backend, pointer);
}

/* ---- collectives on a stream ------------------------------------------------------------------------------------------- */

struct reduce_call {
    struct comm *comm;
    const char *what;
    const void *from;
    void *to;
    int64_t count;
    enum comm_dtype dtype;
    enum comm_op op;
};

static int run_reduce(void *args) {
    const struct reduce_call *call = args;
    return call->comm->functions->all_reduce(call->comm, call->what, call->from, call->to, call->count, call->dtype, call->op);
}

int comm_all_reduce(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to, int64_t count,
                    enum comm_dtype dtype, enum comm_op op) {
    if (count < 0 || dtype == COMM_BYTE)
        FAIL(STATUS_USAGE, "%s: an all-reduce of %lld %s", what, (long long)count, dtype == COMM_BYTE ? "bytes" : "elements");
    if (count == 0)
        return STATUS_OK;
    if (comm->size == 1)
        return from == to ? STATUS_OK : stream_copy(stream, to, from, (size_t)(count * comm_dtype_bytes(dtype)));
    if (comm->functions->enqueue_all_reduce)
        return comm->functions->enqueue_all_reduce(comm, stream, what, from, to, count, dtype, op);
    struct reduce_call call = {comm, what, from, to, count, dtype, op};
    return stream_call(stream, run_reduce, &call, sizeof call);
}

struct gather_call {
    struct comm *comm;
    const char *what;
    const void *from;
    void *to;
    int64_t bytes;
};

static int run_gather(void *args) {
    const struct gather_call *call = args;
    return call->comm->functions->all_gather(call->comm, call->what, call->from, call->to, call->bytes);
}

int comm_all_gather(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to, int64_t bytes) {
    if (bytes < 0)
        FAIL(STATUS_USAGE, "%s: an all-gather of %lld bytes", what, (long long)bytes);
    if (bytes == 0)
        return STATUS_OK;
    if (comm->size == 1)
        return from == to ? STATUS_OK : stream_copy(stream, to, from, (size_t)bytes);
    if (comm->functions->enqueue_all_gather)
        return comm->functions->enqueue_all_gather(comm, stream, what, from, to, bytes);
    struct gather_call call = {comm, what, from, to, bytes};
    return stream_call(stream, run_gather, &call, sizeof call);
}

/* The table of parts travels inside the call, which is what a recorded stream keeps: nothing is allocated, and nothing has to
 * outlive the call. More ranks than fit are served by several calls, each for the parts of some of them. */
enum { PARTS_PER_CALL = 28 };

struct gatherv_call {
    struct comm *comm;
    const char *what;
    const void *from;
    void *to;
    int first, n;
    int64_t bytes[PARTS_PER_CALL], offsets[PARTS_PER_CALL];
};
_Static_assert(sizeof(struct gatherv_call) <= STREAM_MAX_ARGS, "a gatherv call must fit a stream's argument struct");

static int run_gatherv(void *args) {
    const struct gatherv_call *call = args;
    return call->comm->functions->all_gatherv(call->comm, call->what, call->from, call->to, call->bytes, call->offsets,
                                              call->first, call->n);
}

int comm_all_gatherv(struct comm *comm, struct stream *stream, const char *what, const void *from, void *to,
                     const int64_t *bytes, const int64_t *offsets) {
    for (int r = 0; r < comm->size; r++)
        if (bytes[r] < 0 || offsets[r] < 0)
            FAIL(STATUS_USAGE, "%s: rank %d's part is %lld bytes at %lld", what, r, (long long)bytes[r], (long long)offsets[r]);
    if (comm->size == 1) {
        char *place = (char *)to + offsets[0];
        return from == place || bytes[0] == 0 ? STATUS_OK : stream_copy(stream, place, from, (size_t)bytes[0]);
    }
    if (comm->functions->enqueue_all_gatherv)
        return comm->functions->enqueue_all_gatherv(comm, stream, what, from, to, bytes, offsets);
    for (int first = 0; first < comm->size; first += PARTS_PER_CALL) {
        struct gatherv_call call = {.comm = comm, .what = what, .from = from, .to = to, .first = first};
        int64_t total = 0;
        for (; call.n < PARTS_PER_CALL && first + call.n < comm->size; call.n++) {
            call.bytes[call.n] = bytes[first + call.n];
            call.offsets[call.n] = offsets[first + call.n];
            total += bytes[first + call.n];
        }
        if (total > 0)
            TRY(stream_call(stream, run_gatherv, &call, sizeof call));
    }
    return STATUS_OK;
}

/* ---- control ----------------------------------------------------------------------------------------------------------- */

static int broadcast(struct comm *comm, const char *what, void *host, int64_t bytes, int root, bool idle) {
    if (bytes < 0 || root < 0 || root >= comm->size)
        FAIL(STATUS_USAGE, "%s: a broadcast of %lld bytes from rank %d of %d", what, (long long)bytes, root, comm->size);
    if (comm->size == 1 || bytes == 0)
        return STATUS_OK;
    return comm->functions->broadcast(comm, what, host, bytes, root, idle);
}

int comm_broadcast(struct comm *comm, const char *what, void *host, int64_t bytes, int root) {
    return broadcast(comm, what, host, bytes, root, false);
}

int comm_broadcast_idle(struct comm *comm, const char *what, void *host, int64_t bytes, int root) {
    return broadcast(comm, what, host, bytes, root, true);
}

int comm_gather_host(struct comm *comm, const char *what, const void *from, void *to, int64_t bytes) {
    if (bytes < 0)
        FAIL(STATUS_USAGE, "%s: a gather of %lld bytes", what, (long long)bytes);
    if (bytes == 0)
        return STATUS_OK;
    if (comm->size == 1) {
        memmove(to, from, (size_t)bytes);
        return STATUS_OK;
    }
    return comm->functions->gather(comm, what, from, to, bytes);
}

static int64_t combine(int64_t a, int64_t b, enum comm_op op) {
    if (op == COMM_SUM)
        return (int64_t)((uint64_t)a + (uint64_t)b);
    return op == COMM_MAX ? max_i64(a, b) : min_i64(a, b);
}

int comm_reduce_host(struct comm *comm, const char *what, int64_t *values, int count, enum comm_op op) {
    if (comm->size == 1 || count == 0)
        return STATUS_OK;
    int64_t *all;
    TRY(base_alloc(&all, (size_t)comm->size * (size_t)count, sizeof *all));
    int status = comm_gather_host(comm, what, values, all, count * (int64_t)sizeof *all);
    for (int i = 0; status == STATUS_OK && i < count; i++) {
        values[i] = all[i];
        for (int r = 1; r < comm->size; r++)
            values[i] = combine(values[i], all[(int64_t)r * count + i], op);
    }
    free(all);
    return status;
}

int comm_barrier(struct comm *comm, const char *what) {
    int64_t nothing = 0;
    return comm_reduce_host(comm, what, &nothing, 1, COMM_SUM);
}

/* What this rank tells the others: with its number before it unless all say the same. A text that another agreement gave a rank keeps it. */
static void own_failure(const struct comm *comm, bool all_alike, char *text, size_t bytes) {
    const char *error = *base_error() ? base_error() : "failed without saying why";
    int rank, length = 0;
    if (all_alike || (sscanf(error, "rank %d: %n", &rank, &length) == 1 && length > 0))
        snprintf(text, bytes, "%s", error);
    else
        snprintf(text, bytes, "rank %d: %s", comm->world_rank, error);
}

struct verdict {
    int64_t status;
    uint64_t text; /* hash of the error text */
};

static struct verdict own_verdict(int status) {
    return (struct verdict){status < 0 ? status : STATUS_OK, base_hash_text(status < 0 ? base_error() : "")};
}

/* Of two failures the one nearer to the top of the list of codes is worse: a rank that was told to stop must not hide
 * another that failed. Of equals the lowest rank speaks. */
int comm_agree(struct comm *comm, const char *what, int status) {
    enum { TEXT_BYTES = 1900 };
    if (comm->size == 1)
        return status < 0 ? status : STATUS_OK;
    struct verdict mine = own_verdict(status), *all;
    TRY(base_alloc(&all, (size_t)comm->size, sizeof *all));
    int failed = comm_gather_host(comm, what, &mine, all, sizeof mine);
    int worst = -1;
    bool all_alike = true;
    for (int r = 0; failed == STATUS_OK && r < comm->size; r++) {
        all_alike &= all[r].status == all[0].status && all[r].text == all[0].text;
        if (all[r].status < 0 && (worst < 0 || all[r].status > all[worst].status))
            worst = r;
    }
    int code = worst < 0 ? STATUS_OK : (int)all[worst].status;
    free(all);
    TRY(failed);
    if (worst < 0)
        return STATUS_OK;
    char text[TEXT_BYTES] = "";
    if (comm->rank == worst)
        own_failure(comm, all_alike, text, sizeof text);
    TRY(comm_broadcast(comm, what, text, sizeof text, worst));
    base_clear_error();
    return base_fail_text(code, text);
}
