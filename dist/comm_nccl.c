/* Ranks over NCCL, in the memory of GPUs: the only file that includes nccl.h.
 *
 *  - A communicator of NCCL stands over one in host memory (comm_mpi), owns it and leaves all control operations to it.
 *  - Collectives are put on the caller's stream, so that a recording takes them in as it does kernels.
 *  - The watchdog, a thread of its own, knows of every call into NCCL, so one that does not return ends the job. (A communicator that does
 *    not block would be polled instead; in NCCL 2.28 it hands out no symmetric windows and starts a thread for each collective.)
 *  - Memory for collectives is a symmetric window: of one size and registered on all ranks, which halves the time of a small sum.
 *    Where NCCL has no windows (no direct access between the GPUs), it is plain memory of NCCL's.
 *  - NVLink multicast (NVLS) is off unless the environment says otherwise: it needs a fabric manager that allows multicast, which
 *    virtual machines and shared hosts often do not have, and where it is half there it stops the GPUs. */
#include "dist/comm_impl.h"

#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WINDOW_UNIT = 2 << 20, /* bytes: NCCL's memory comes in pages of the GPU, of this size on all of them */
    WORD_BYTES = 4,        /* what NCCL's kernels on windows can tell apart */
};
static const double START_SECONDS = 30;   /* beyond the deadline: NCCL looks for GPUs and networks and connects all ranks */
static const double END_SECONDS = 10;     /* a call that frees what this rank alone has, and cannot be polled */

struct window { /* one allocation */
    struct window *next;
    void *memory;
    int64_t bytes;
    ncclWindow_t handle; /* NULL: plain memory */
};

struct comm_nccl {
    struct comm base;
    struct comm *inner;      /* the same ranks, in host memory */
    struct backend *backend;
    struct comm_nccl *next;  /* in comm_shared.wrapped */
    ncclComm_t nccl;
    int device;
    struct window *windows;
    bool plain;              /* NCCL has no windows here */
    bool fences;             /* its kernels on windows do not wait for earlier work: see needs_fences */
    bool broken;             /* a call failed: nothing can be expected of the others */
};

static const struct comm_functions nccl_functions;

static struct comm_nccl *nccl_of(struct comm *comm) { return (struct comm_nccl *)comm; }

/* ---- calls into NCCL ----------------------------------------------------------------------------------------------------- */

static int fail_nccl(struct comm_nccl *comm, ncclResult_t result, const char *what) {
    const char *more = ncclGetLastError(comm->nccl);
    comm->broken = true;
    FAIL(STATUS_FAILED, "%s (%s) on rank %d at step %lld: NCCL: %s%s%s", what, comm->base.name, comm->base.world_rank,
         (long long)comm->base.shared->step, ncclGetErrorString(result), more && *more ? ": " : "", more ? more : "");
}

static ncclResult_t ask_state(const struct comm_nccl *comm) {
    ncclResult_t state = ncclSuccess, asked = ncclCommGetAsyncError(comm->nccl, &state);
    return asked == ncclSuccess ? state : asked;
}

/* Every call stands between these two. `wait` is the caller's and known to the watchdog meanwhile; `extra`: seconds beyond the deadline. */
static void call_begin(struct comm_nccl *comm, struct watch_wait *wait, const char *what, double extra) {
    *wait = (struct watch_wait){.what = what, .comm = comm->base.name, .idle_root = -1, .extra = extra};
    watch_enter(comm->base.shared->watch, wait);
}

/* `result`: of the call. */
static int call_end(struct comm_nccl *comm, struct watch_wait *wait, ncclResult_t result) {
    watch_leave(comm->base.shared->watch, wait);
    return result == ncclSuccess ? STATUS_OK : fail_nccl(comm, result, wait->what);
}

/* Asked while the host waits for the device. */
static int poll_all(const struct comm_shared *shared) {
    for (struct comm_nccl *comm = (struct comm_nccl *)shared->wrapped; comm; comm = comm->next) {
        ncclResult_t state = ask_state(comm);
        if (state != ncclSuccess && state != ncclInProgress)
            return fail_nccl(comm, state, shared->last_what ? shared->last_what : "waiting for the GPU");
    }
    return STATUS_OK;
}

/* ---- collectives --------------------------------------------------------------------------------------------------------- */

/* The stream as NCCL knows it, and what messages say of it from now on. */
static int open_stream(struct comm_nccl *comm, struct stream *stream, const char *what, cudaStream_t *out) {
    struct comm_shared *shared = comm->base.shared;
    void *native;
    TRY(stream_native(stream, &native));
    if (comm->fences && !comm->plain)
        TRY(stream_fence(stream));
    *out = native;
    shared->last_what = what;
    memcpy(shared->last_comm, comm->base.name, sizeof shared->last_comm);
    return STATUS_OK;
}

static int nccl_all_reduce(struct comm *base, struct stream *stream, const char *what, const void *from, void *to, int64_t count,
                           enum comm_dtype dtype, enum comm_op op) {
    static const ncclDataType_t types[] = {[COMM_FLOAT] = ncclFloat, [COMM_INT32] = ncclInt32, [COMM_UINT64] = ncclUint64,
                                           [COMM_BYTE] = ncclUint8};
    static const ncclRedOp_t ops[] = {[COMM_SUM] = ncclSum, [COMM_MAX] = ncclMax, [COMM_MIN] = ncclMin};
    struct comm_nccl *comm = nccl_of(base);
    struct watch_wait wait;
    cudaStream_t native;
    TRY(open_stream(comm, stream, what, &native));
    call_begin(comm, &wait, what, 0);
    ncclResult_t result = ncclAllReduce(from, to, (size_t)count, types[dtype], ops[op], comm->nccl, native);
    return stream_keep(stream, call_end(comm, &wait, result));
}

/* Parts of one size, one after the other: ncclAllGather's, in one kernel and through windows. Of parts that are no whole words NCCL 2.28
 * gets some bytes wrong in windows. */
static bool is_even(const int64_t *bytes, const int64_t *offsets, int n) {
    for (int r = 0; r < n; r++)
        if (bytes[r] != bytes[0] || offsets[r] != offsets[0] + r * bytes[0])
            return false;
    return bytes[0] % WORD_BYTES == 0;
}

/* Part r of all from rank r. */
static ncclResult_t broadcast_parts(struct comm_nccl *comm, cudaStream_t native, const void *from, char *to, const int64_t *bytes,
                                    const int64_t *offsets) {
    ncclResult_t first = ncclGroupStart();
    for (int r = 0; r < comm->base.size; r++) {
        char *part = to + offsets[r];
        if (bytes[r] == 0)
            continue;
        ncclResult_t result = ncclBroadcast(r == comm->base.rank ? from : part, part, (size_t)bytes[r], ncclUint8, r, comm->nccl, native);
        if (first == ncclSuccess)
            first = result;
    }
    ncclResult_t last = ncclGroupEnd();
    return first == ncclSuccess ? last : first;
}

static int nccl_all_gatherv(struct comm *base, struct stream *stream, const char *what, const void *from, void *to, const int64_t *bytes,
                            const int64_t *offsets) {
    struct comm_nccl *comm = nccl_of(base);
    struct watch_wait wait;
    cudaStream_t native;
    ncclResult_t result;
    int64_t total = 0;
    for (int r = 0; r < base->size; r++)
        total += bytes[r];
    if (total == 0)
        return STATUS_OK;
    TRY(open_stream(comm, stream, what, &native));
    call_begin(comm, &wait, what, 0);
    if (is_even(bytes, offsets, base->size))
        result = ncclAllGather(from, (char *)to + offsets[0], (size_t)bytes[0], ncclUint8, comm->nccl, native);
    else
        result = broadcast_parts(comm, native, from, to, bytes, offsets);
    return stream_keep(stream, call_end(comm, &wait, result));
}

static int nccl_all_gather(struct comm *base, struct stream *stream, const char *what, const void *from, void *to, int64_t bytes) {
    enum { MOST_RANKS = 1024 }; /* far beyond the GPUs that share one sequence */
    int64_t parts[MOST_RANKS], offsets[MOST_RANKS];
    if (base->size > MOST_RANKS)
        FAIL(STATUS_USAGE, "%s: %d ranks, at most %d gather", what, base->size, MOST_RANKS);
    for (int r = 0; r < base->size; r++) {
        parts[r] = bytes;
        offsets[r] = r * bytes;
    }
    return nccl_all_gatherv(base, stream, what, from, to, parts, offsets);
}

/* ---- memory ---------------------------------------------------------------------------------------------------------------- */

static int take_memory(struct comm_nccl *comm, struct window *window) {
    ncclResult_t result = ncclUnhandledCudaError;
    if (cudaSetDevice(comm->device) == cudaSuccess)
        result = ncclMemAlloc(&window->memory, (size_t)window->bytes);
    if (result != ncclSuccess) {
        window->memory = NULL;
        (void)cudaGetLastError();
        FAIL(STATUS_MEMORY, "out of memory: %lld bytes for a window of the communicator '%s': NCCL: %s", (long long)window->bytes,
             comm->base.name, ncclGetErrorString(result));
    }
    cudaError_t error = cudaMemset(window->memory, 0, (size_t)window->bytes);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(NULL); /* the backend's streams do not wait for this one */
    if (error != cudaSuccess)
        FAIL(STATUS_FAILED, "CUDA: zeroing a window of the communicator '%s': %s", comm->base.name, cudaGetErrorString(error));
    return STATUS_OK;
}

static void free_window(struct comm_nccl *comm, struct window *window) {
    /* With a failed communicator NCCL may still be working on it: it is left to the end of the process, which is near. */
    if (!comm->broken && window->handle)
        (void)ncclCommWindowDeregister(comm->nccl, window->handle);
    if (!comm->broken && window->memory)
        (void)ncclMemFree(window->memory);
    free(window);
}

/* Collective. A refusal is no failure as long as the communicator goes on working. */
static int register_window(struct comm_nccl *comm, struct window *window) {
    struct watch_wait wait;
    call_begin(comm, &wait, "registering a window", START_SECONDS);
    ncclResult_t result = ncclCommWindowRegister(comm->nccl, window->memory, (size_t)window->bytes, &window->handle,
                                                 NCCL_WIN_COLL_SYMMETRIC);
    if (result != ncclSuccess && ask_state(comm) == ncclSuccess) {
        window->handle = NULL;
        result = ncclSuccess;
    }
    int status = call_end(comm, &wait, result);
    if (status < 0)
        base_error_prefix("NCCL_WIN_ENABLE=0 in the environment lets NCCL do without windows: ");
    return status;
}

/* Collective. Once one rank has no window, nobody has one. */
static int agree_on_window(struct comm_nccl *comm, struct window *window) {
    int64_t there = window->handle != NULL;
    bool told = false;
    TRY(comm_reduce_host(&comm->base, "registering a window", &there, 1, COMM_MIN));
    if (there)
        return STATUS_OK;
    if (window->handle)
        (void)ncclCommWindowDeregister(comm->nccl, window->handle);
    window->handle = NULL;
    for (const struct comm_nccl *other = (struct comm_nccl *)comm->base.shared->wrapped; other; other = other->next)
        told |= other->plain;
    comm->plain = true;
    if (!told && comm->base.world_rank == 0)
        log_info("NCCL has no symmetric windows between these GPUs ('%s'): collectives take longer", comm->base.name);
    return STATUS_OK;
}

static int nccl_alloc(struct comm *base, struct backend *backend, size_t bytes, void **pointer) {
    struct comm_nccl *comm = nccl_of(base);
    struct window *window = NULL;
    int64_t largest = (int64_t)(bytes ? bytes : 1);
    TRY(comm_reduce_host(base, "allocating a window", &largest, 1, COMM_MAX));
    int status = base_alloc(&window, 1, sizeof *window);
    if (status == STATUS_OK) {
        window->bytes = round_up(largest, WINDOW_UNIT);
        status = take_memory(comm, window);
    }
    TRY_GOTO(comm_agree(base, "allocating a window", status));
    if (!comm->plain) {
        TRY_GOTO(comm_agree(base, "registering a window", register_window(comm, window)));
        TRY_GOTO(agree_on_window(comm, window));
    }
    backend_count(backend, MEMORY_WORKSPACE, window->bytes);
    window->next = comm->windows;
    comm->windows = window;
    *pointer = window->memory;
    return STATUS_OK;
fail:
    if (window)
        free_window(comm, window);
    return status;
}

static void nccl_release(struct comm *base, struct backend *backend, void *pointer) {
    struct comm_nccl *comm = nccl_of(base);
    for (struct window **at = &comm->windows; *at; at = &(*at)->next)
        if ((*at)->memory == pointer) {
            struct window *window = *at;
            *at = window->next;
            backend_count(backend, MEMORY_WORKSPACE, -window->bytes);
            free_window(comm, window);
            return;
        }
    backend_free(backend, pointer); /* of the time before comm_use_device */
}

/* ---- start and end --------------------------------------------------------------------------------------------------------- */

/* Frees what NCCL has on this rank. These calls wait for threads and kernels of NCCL's and cannot be polled: a guard stands beside them. */
static void end_library(struct comm_nccl *comm) {
    struct watch_wait wait;
    struct guard guard;
    char text[2200];
    if (!comm->broken) {
        call_begin(comm, &wait, "the end of NCCL", 0);
        (void)call_end(comm, &wait, ncclCommFinalize(comm->nccl));
    }
    snprintf(text, sizeof text, "NCCL does not end the communicator '%s'%s%s", comm->base.name, comm->broken ? ", which failed: " : "",
             comm->broken ? base_error() : "");
    guard_start(&guard, END_SECONDS, 1, text);
    if (comm->broken)
        (void)ncclCommAbort(comm->nccl);
    else
        (void)ncclCommDestroy(comm->nccl);
    guard_stop(&guard);
}

/* Leaves the inner communicator. */
static void unwrap(struct comm_nccl *comm) {
    struct comm_shared *shared = comm->base.shared;
    struct comm_nccl *first = (struct comm_nccl *)shared->wrapped, **at = &first;
    while (*at && *at != comm)
        at = &(*at)->next;
    if (*at)
        *at = comm->next;
    shared->wrapped = (struct comm *)first;
    while (comm->windows)
        nccl_release(&comm->base, comm->backend, comm->windows->memory);
    if (comm->nccl)
        end_library(comm);
    free(comm);
}

/* From 2.28 to before 2.30.7 NCCL launches its kernels for symmetric windows programmatically, so that they begin before the kernel in
 * front of them has ended, and leaves out that they wait for its writes (NCCL's commit 2948185 restored it): now and then a rank sums
 * what its matrix product has not written yet. */
static bool needs_fences(void) {
    int version = 0;
    return ncclGetVersion(&version) != ncclSuccess || (version >= NCCL_VERSION(2, 28, 0) && version < NCCL_VERSION(2, 30, 7));
}

static int start(struct comm_nccl *comm) {
    static const char what[] = "the start of NCCL";
    struct watch_wait wait;
    ncclUniqueId id;
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    comm->fences = needs_fences();
    ncclResult_t result = cudaGetDevice(&comm->device) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
    memset(&id, 0, sizeof id);
    if (result == ncclSuccess && comm->base.rank == 0)
        result = ncclGetUniqueId(&id);
    TRY(comm_agree(comm->inner, what, result == ncclSuccess ? STATUS_OK : fail_nccl(comm, result, what)));
    TRY(comm_broadcast(comm->inner, what, &id, sizeof id, 0));
    call_begin(comm, &wait, what, START_SECONDS);
    int status = call_end(comm, &wait, ncclCommInitRank(&comm->nccl, comm->base.size, id, comm->base.rank));
    return comm_agree(comm->inner, what, status);
}

int comm_nccl_wrap(struct comm **at, struct backend *backend) {
    struct comm *inner = *at;
    struct comm_nccl *comm;
    if (inner->functions == &nccl_functions)
        FAIL(STATUS_FAILED, "the communicator '%s' is NCCL's already", inner->name);
    TRY(base_alloc(&comm, 1, sizeof *comm));
    comm->base = *inner;
    comm->base.functions = &nccl_functions;
    comm->inner = inner;
    comm->backend = backend;
    int status = start(comm);
    if (status < 0) {
        comm->broken = true;
        unwrap(comm);
        return status;
    }
    comm->next = (struct comm_nccl *)inner->shared->wrapped;
    inner->shared->wrapped = &comm->base;
    inner->shared->poll = poll_all;
    *at = &comm->base;
    return STATUS_OK;
}

static void nccl_free(struct comm *base) {
    struct comm *inner = nccl_of(base)->inner;
    unwrap(nccl_of(base));
    inner->functions->free(inner);
}

/* The end of NCCL has a deadline; rank 0 may still be writing results. */
static void nccl_finish(struct comm *base) {
    struct comm *inner = nccl_of(base)->inner;
    int64_t done = 1;
    if (comm_broadcast_idle(inner, "the end of the run", &done, sizeof done, 0) < 0)
        nccl_of(base)->broken = true;
    unwrap(nccl_of(base));
    inner->functions->finish(inner);
}

static int nccl_split(struct comm *base, int colour, int key, const char *name, struct comm **out) {
    struct comm *inner = nccl_of(base)->inner;
    TRY(inner->functions->split(inner, colour, key, name, out));
    int status = (*out)->size > 1 ? comm_nccl_wrap(out, nccl_of(base)->backend) : STATUS_OK;
    if (status < 0) {
        (*out)->functions->free(*out);
        *out = NULL;
    }
    return status;
}

/* ---- what the inner communicator does --------------------------------------------------------------------------------------- */

static void nccl_library(const struct comm *base, char *text, size_t bytes) {
    const struct comm *inner = ((const struct comm_nccl *)base)->inner;
    char host[256] = "";
    int version = 0;
    (void)ncclGetVersion(&version);
    inner->functions->library(inner, host, sizeof host);
    snprintf(text, bytes, "NCCL %d.%d.%d; %s", version / 10000, version / 100 % 100, version % 100, host);
}

__attribute__((noreturn)) static void nccl_abort(struct comm *base, int exit_code) {
    comm_abort(nccl_of(base)->inner, exit_code);
}

static void nccl_set_step(struct comm *base, int64_t step) { comm_set_step(nccl_of(base)->inner, step); }

static int nccl_broadcast(struct comm *base, const char *what, void *host, int64_t bytes, int root, bool idle) {
    struct comm *inner = nccl_of(base)->inner;
    return inner->functions->broadcast(inner, what, host, bytes, root, idle);
}

static int nccl_gather(struct comm *base, const char *what, const void *from, void *to, int64_t bytes) {
    struct comm *inner = nccl_of(base)->inner;
    return inner->functions->gather(inner, what, from, to, bytes);
}

static const struct comm_functions nccl_functions = {
    .kind = "nccl",
    .library = nccl_library,
    .finish = nccl_finish,
    .abort = nccl_abort,
    .split = nccl_split,
    .free = nccl_free,
    .set_step = nccl_set_step,
    .enqueue_all_reduce = nccl_all_reduce,
    .enqueue_all_gather = nccl_all_gather,
    .enqueue_all_gatherv = nccl_all_gatherv,
    .alloc = nccl_alloc,
    .release = nccl_release,
    .broadcast = nccl_broadcast,
    .gather = nccl_gather,
};
