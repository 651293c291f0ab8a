/* Ranks over MPI, in host memory: the only file that includes mpi.h.
 *
 * One primitive moves everything: an exchange, in which every rank of a communicator sends one part to, and receives one part
 * from, each other rank, by nonblocking point-to-point messages that are polled. Its decisions:
 *
 *  - No MPI collective is used. So nothing blocks inside the library, counts are 64-bit (parts are cut into chunks), and a sum is
 *    ours: every element is added in rank order by one rank, or by all in the same order. Same bits everywhere, on every MPI.
 *  - Communicators are lists of world ranks with a number of their own, used as the tag. Splitting is one exchange; a number is
 *    new to all its members, so no two communicators that share two ranks share a number.
 *  - Three duplicates of the world keep apart what may run at the same time: streams, control, watchdog.
 *  - A wait spins for as long as a small message takes, then yields its core, then sleeps: ranks may be more than cores.
 *  - A library with MPI_THREAD_SERIALIZED only gets its calls one at a time; since none blocks, that is safe. */
#include "dist/comm_impl.h"
#include "dist/comm_watch.h"
#include "dist/shard.h"

#include <mpi.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One message at most; far below MPI's 2^31 - 1, and large enough that its overhead is nothing. */
static const int64_t CHUNK_BYTES = (int64_t)256 << 20;
/* Up to here a reduction gathers all vectors on all ranks (one round of messages); above, each rank reduces one slice (two
 * rounds, but 2 instead of n-1 vectors' worth of traffic). */
static const int64_t SMALL_REDUCE_BYTES = 32 << 10;
/* A large reduction runs in pieces of this size, which bounds the scratch memory. */
static const int64_t PIECE_BYTES = 4 << 20;
static const int64_t SLICE_UNIT = 64; /* elements: slices begin on cache lines */

static const double SPIN_SECONDS = 10e-6;  /* some times the latency of a small message; more costs others their turn */
static const double YIELD_SECONDS = 2e-3;  /* longer than any peer needs to get its turn on a shared core */
static const int LONGEST_SLEEP_US = 1000;  /* under 2 % of the waits that reach it */

struct outgoing { /* one message of the watchdog under way */
    MPI_Request request;
    struct watch_message message;
    struct outgoing *next;
};

/* What all communicators of the process share. */
struct mpi_state {
    struct comm_shared shared;
    MPI_Comm stream, control, watchdog;
    _Atomic bool serialized;
    _Atomic unsigned next_ticket, serving;
    int64_t chunk_bytes;
    double deadline, spin_seconds;
    int next_id; /* of a communicator; changed by the controlling thread only */
    int largest_id;
    struct watch_peer *peers;
    struct outgoing *outgoing;
};

struct part {
    const char *send;
    char *receive;
    int64_t send_bytes, receive_bytes;
};

/* Streams and control each have their own, since they may run at the same time on two threads. */
struct channel {
    MPI_Comm mpi;
    struct part *parts;    /* [size] */
    MPI_Request *requests; /* [2 * size] */
};

struct comm_mpi {
    struct comm base;
    struct mpi_state *state;
    int id;
    int *world_ranks; /* [size] */
    struct channel stream, control;
    char *scratch;        /* for reductions: gathered vectors, or the slices of one piece */
    const void **sources; /* [size] */
};

static const struct comm_functions mpi_functions;

static struct comm_mpi *mpi_of(struct comm *comm) { return (struct comm_mpi *)comm; }

/* ---- one call at a time, where the library wants that --------------------------------------------------------------------- */

/* A ticket lock: a thread that polls must not keep another one out. Returns whether a turn was taken. */
static bool enter(struct mpi_state *state) {
    if (!state->serialized)
        return false;
    unsigned ticket = atomic_fetch_add(&state->next_ticket, 1);
    while (atomic_load(&state->serving) != ticket)
        sched_yield();
    return true;
}

static void leave(struct mpi_state *state, bool turn) {
    if (turn)
        atomic_fetch_add(&state->serving, 1);
}

static int check(int code, const struct comm_mpi *comm, const char *what) {
    if (code == MPI_SUCCESS)
        return STATUS_OK;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    FAIL(STATUS_FAILED, "%s (%s): MPI: %s", what, comm->base.name, text);
}

/* ---- waiting ----------------------------------------------------------------------------------------------------------------- */

static void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void rest(double waited) {
    if (waited < YIELD_SECONDS) {
        sched_yield();
        return;
    }
    double sleep_us = waited * 1e6 / 64;
    usleep(sleep_us < LONGEST_SLEEP_US ? (useconds_t)sleep_us : (useconds_t)LONGEST_SLEEP_US);
}

/* `idle_root`: world rank for whom this wait may last for ever; -1: the deadline holds. */
static int wait_all(struct comm_mpi *comm, struct channel *channel, int n, const char *what, int idle_root) {
    struct mpi_state *state = comm->state;
    struct watch_wait wait = {.what = what, .comm = comm->base.name, .idle_root = idle_root};
    bool watched = false;
    int done = 0, code = MPI_SUCCESS;
    double begin = base_seconds();
    while (n > 0) {
        bool turn = enter(state);
        code = MPI_Testall(n, channel->requests, &done, MPI_STATUSES_IGNORE);
        leave(state, turn);
        if (done || code != MPI_SUCCESS)
            break;
        double waited = base_seconds() - begin;
        if (waited < state->spin_seconds) {
            pause_core();
            continue;
        }
        if (!watched && waited > YIELD_SECONDS) {
            watch_enter(state->shared.watch, &wait);
            watched = true;
        }
        rest(waited);
    }
    if (watched)
        watch_leave(state->shared.watch, &wait);
    return check(code, comm, what);
}

/* ---- moving bytes ------------------------------------------------------------------------------------------------------------ */

static int post_receive(struct comm_mpi *comm, struct channel *channel, int from, char *data, int64_t bytes, int *n) {
    bool turn = enter(comm->state);
    int code = MPI_Irecv(data, (int)bytes, MPI_BYTE, comm->world_ranks[from], comm->id, channel->mpi, &channel->requests[*n]);
    leave(comm->state, turn);
    *n += code == MPI_SUCCESS;
    return code;
}

static int post_send(struct comm_mpi *comm, struct channel *channel, int to, const char *data, int64_t bytes, int *n) {
    bool turn = enter(comm->state);
    int code = MPI_Isend(data, (int)bytes, MPI_BYTE, comm->world_ranks[to], comm->id, channel->mpi, &channel->requests[*n]);
    leave(comm->state, turn);
    *n += code == MPI_SUCCESS;
    return code;
}

/* Every rank sends parts[r].send to each r and receives parts[r].receive from it; this rank's own entry is not looked at, and
 * empty parts are no messages. Ranks start with different partners. */
static int exchange(struct comm_mpi *comm, struct channel *channel, const char *what) {
    int size = comm->base.size, rank = comm->base.rank;
    int64_t chunk = comm->state->chunk_bytes;
    for (int64_t at = 0;; at += chunk) {
        int n = 0, code = MPI_SUCCESS;
        for (int i = 1; i < size && code == MPI_SUCCESS; i++) {
            int from = (rank + size - i) % size;
            const struct part *part = &channel->parts[from];
            if (at < part->receive_bytes)
                code = post_receive(comm, channel, from, part->receive + at, min_i64(chunk, part->receive_bytes - at), &n);
        }
        for (int i = 1; i < size && code == MPI_SUCCESS; i++) {
            int to = (rank + i) % size;
            const struct part *part = &channel->parts[to];
            if (at < part->send_bytes)
                code = post_send(comm, channel, to, part->send + at, min_i64(chunk, part->send_bytes - at), &n);
        }
        TRY(check(code, comm, what));
        if (n == 0)
            return STATUS_OK;
        TRY(wait_all(comm, channel, n, what, -1));
    }
}

static int gather_on(struct comm_mpi *comm, struct channel *channel, const char *what, const void *from, char *to, int64_t bytes) {
    for (int r = 0; r < comm->base.size; r++)
        channel->parts[r] = (struct part){from, to + r * bytes, bytes, bytes};
    char *own = to + comm->base.rank * bytes;
    if (own != from)
        memcpy(own, from, (size_t)bytes);
    return exchange(comm, channel, what);
}

static int mpi_gather(struct comm *base, const char *what, const void *from, void *to, int64_t bytes) {
    struct comm_mpi *comm = mpi_of(base);
    return gather_on(comm, &comm->control, what, from, to, bytes);
}

static int mpi_all_gather(struct comm *base, const char *what, const void *from, void *to, int64_t bytes) {
    struct comm_mpi *comm = mpi_of(base);
    return gather_on(comm, &comm->stream, what, from, to, bytes);
}

static int mpi_all_gatherv(struct comm *base, const char *what, const void *from, void *to, const int64_t *bytes,
                           const int64_t *offsets, int first, int n) {
    struct comm_mpi *comm = mpi_of(base);
    int rank = base->rank;
    bool mine = rank >= first && rank < first + n;
    int64_t own_bytes = mine ? bytes[rank - first] : 0;
    for (int r = 0; r < base->size; r++) {
        bool theirs = r >= first && r < first + n;
        comm->stream.parts[r] = (struct part){from, theirs ? (char *)to + offsets[r - first] : NULL, own_bytes,
                                              theirs ? bytes[r - first] : 0};
    }
    if (own_bytes > 0 && (char *)to + offsets[rank - first] != from)
        memcpy((char *)to + offsets[rank - first], from, (size_t)own_bytes);
    return exchange(comm, &comm->stream, what);
}

static int reduce_small(struct comm_mpi *comm, const char *what, const void *from, void *to, int64_t count, enum comm_dtype dtype,
                        enum comm_op op) {
    int64_t bytes = count * comm_dtype_bytes(dtype);
    for (int r = 0; r < comm->base.size; r++) {
        char *theirs = comm->scratch + r * bytes;
        comm->stream.parts[r] = (struct part){from, theirs, bytes, bytes};
        comm->sources[r] = r == comm->base.rank ? from : theirs;
    }
    TRY(exchange(comm, &comm->stream, what));
    comm_reduce(to, comm->sources, comm->base.size, count, dtype, op);
    return STATUS_OK;
}

/* Slice r of all ranks goes to rank r, which reduces it; then the slices are gathered. */
static int reduce_large(struct comm_mpi *comm, const char *what, const char *from, char *to, int64_t count, enum comm_dtype dtype,
                        enum comm_op op) {
    int size = comm->base.size, rank = comm->base.rank;
    int64_t width = comm_dtype_bytes(dtype);
    struct range own = shard_range(count, SLICE_UNIT, size, rank);
    int64_t own_bytes = range_size(own) * width;
    for (int r = 0; r < size; r++) {
        struct range theirs = shard_range(count, SLICE_UNIT, size, r);
        char *slot = comm->scratch + r * own_bytes;
        comm->stream.parts[r] = (struct part){from + theirs.begin * width, slot, range_size(theirs) * width, own_bytes};
        comm->sources[r] = r == rank ? from + own.begin * width : slot;
    }
    TRY(exchange(comm, &comm->stream, what));
    comm_reduce(to + own.begin * width, comm->sources, size, range_size(own), dtype, op);
    for (int r = 0; r < size; r++) {
        struct range theirs = shard_range(count, SLICE_UNIT, size, r);
        comm->stream.parts[r] = (struct part){to + own.begin * width, to + theirs.begin * width, own_bytes, range_size(theirs) * width};
    }
    return exchange(comm, &comm->stream, what);
}

static int mpi_all_reduce(struct comm *base, const char *what, const void *from, void *to, int64_t count, enum comm_dtype dtype,
                          enum comm_op op) {
    struct comm_mpi *comm = mpi_of(base);
    int64_t width = comm_dtype_bytes(dtype), piece = PIECE_BYTES / width;
    if (count * width <= SMALL_REDUCE_BYTES)
        return reduce_small(comm, what, from, to, count, dtype, op);
    for (int64_t at = 0; at < count; at += piece)
        TRY(reduce_large(comm, what, (const char *)from + at * width, (char *)to + at * width, min_i64(piece, count - at), dtype, op));
    return STATUS_OK;
}

/* A binomial tree: relative rank v receives from v without its lowest bit, then sends to v + 2^k below that bit. Only the wait for
 * the first chunk may be idle. */
static int mpi_broadcast(struct comm *base, const char *what, void *host, int64_t bytes, int root, bool idle) {
    struct comm_mpi *comm = mpi_of(base);
    struct channel *channel = &comm->control;
    int size = base->size, v = (base->rank - root + size) % size;
    int64_t chunk = comm->state->chunk_bytes;
    for (int64_t at = 0; at < bytes; at += chunk) {
        char *data = (char *)host + at;
        int64_t length = min_i64(chunk, bytes - at);
        int n = 0, code, below = 1;
        if (v != 0) {
            below = v & -v;
            code = post_receive(comm, channel, ((v & (v - 1)) + root) % size, data, length, &n);
            TRY(check(code, comm, what));
            TRY(wait_all(comm, channel, n, what, idle && at == 0 ? comm->world_ranks[root] : -1));
        } else {
            while (below < size)
                below *= 2;
        }
        n = 0;
        for (int k = below / 2; k > 0; k /= 2)
            if (v + k < size) {
                code = post_send(comm, channel, (v + k + root) % size, data, length, &n);
                TRY(check(code, comm, what));
            }
        TRY(wait_all(comm, channel, n, what, -1));
    }
    return STATUS_OK;
}

/* ---- communicators ----------------------------------------------------------------------------------------------------------- */

static void mpi_free(struct comm *base) {
    struct comm_mpi *comm = mpi_of(base);
    free(comm->world_ranks);
    free(comm->stream.parts);
    free(comm->stream.requests);
    free(comm->control.parts);
    free(comm->control.requests);
    free(comm->scratch);
    free(comm->sources);
    free(comm);
}

static int channel_init(struct channel *channel, MPI_Comm mpi, int size) {
    channel->mpi = mpi;
    TRY(base_alloc(&channel->parts, (size_t)size, sizeof *channel->parts));
    return base_alloc(&channel->requests, 2 * (size_t)size, sizeof *channel->requests);
}

static int mpi_new(struct mpi_state *state, int id, const char *name, int rank, int size, const int *world_ranks, struct comm **out) {
    struct comm_mpi *comm;
    int status;
    TRY(base_alloc(&comm, 1, sizeof *comm));
    comm->base = (struct comm){.functions = &mpi_functions, .shared = &state->shared, .rank = rank, .size = size,
                               .world_rank = world_ranks[rank]};
    snprintf(comm->base.name, sizeof comm->base.name, "%s", name);
    comm->state = state;
    comm->id = id;
    TRY_GOTO(base_alloc(&comm->world_ranks, (size_t)size, sizeof *comm->world_ranks));
    memcpy(comm->world_ranks, world_ranks, (size_t)size * sizeof *world_ranks);
    TRY_GOTO(channel_init(&comm->stream, state->stream, size));
    TRY_GOTO(channel_init(&comm->control, state->control, size));
    TRY_GOTO(base_alloc(&comm->sources, (size_t)size, sizeof *comm->sources));
    if (size > 1) {
        /* Slices of a piece may be one unit larger than its even share. Untouched memory costs nothing. */
        int64_t large = PIECE_BYTES + size * SLICE_UNIT * (int64_t)sizeof(uint64_t);
        TRY_GOTO(base_alloc(&comm->scratch, 1, (size_t)max_i64(large, size * SMALL_REDUCE_BYTES)));
    }
    *out = &comm->base;
    return STATUS_OK;
fail:
    mpi_free(&comm->base);
    return status;
}

struct member {
    int colour, key, rank, world_rank, next_id;
};

static int compare_members(const void *a, const void *b) {
    const struct member *x = a, *y = b;
    if (x->colour != y->colour)
        return x->colour < y->colour ? -1 : 1;
    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    return x->rank < y->rank ? -1 : x->rank > y->rank;
}

static int mpi_split(struct comm *base, int colour, int key, const char *name, struct comm **out) {
    struct comm_mpi *comm = mpi_of(base);
    struct mpi_state *state = comm->state;
    struct member mine = {colour, key, base->rank, base->world_rank, state->next_id}, *all;
    int *ranks = NULL, n = 0, rank = 0, id = 0, status;
    TRY(base_alloc(&all, (size_t)base->size, sizeof *all));
    TRY_GOTO(base_alloc(&ranks, (size_t)base->size, sizeof *ranks));
    TRY_GOTO(comm_gather_host(base, name, &mine, all, sizeof mine));
    qsort(all, (size_t)base->size, sizeof *all, compare_members);
    for (int r = 0; r < base->size; r++) {
        id = all[r].next_id > id ? all[r].next_id : id;
        if (all[r].colour != colour)
            continue;
        if (all[r].rank == base->rank)
            rank = n;
        ranks[n++] = all[r].world_rank;
    }
    if (id > state->largest_id)
        FAIL_GOTO(STATUS_FAILED, "%s: more than %d communicators were made", name, state->largest_id);
    state->next_id = id + 1;
    TRY_GOTO(mpi_new(state, id, name, rank, n, ranks, out));
fail:
    free(all);
    free(ranks);
    return status;
}

static void mpi_set_step(struct comm *base, int64_t step) { watch_set_step(mpi_of(base)->state->shared.watch, step); }

void comm_mpi_set_limits(struct comm *world, int64_t chunk_bytes, bool serialized) {
    struct mpi_state *state = mpi_of(world)->state;
    if (chunk_bytes > 0)
        state->chunk_bytes = chunk_bytes;
    state->serialized = serialized;
}

/* ---- the watchdog's messages -------------------------------------------------------------------------------------------------- */

static void link_send(void *context, int to, const struct watch_message *message) {
    struct mpi_state *state = context;
    bool turn = enter(state);
    for (struct outgoing **at = &state->outgoing; *at;) {
        struct outgoing *one = *at;
        int done = 0;
        MPI_Test(&one->request, &done, MPI_STATUS_IGNORE);
        if (done) {
            *at = one->next;
            free(one);
        } else {
            at = &one->next;
        }
    }
    struct outgoing *one = malloc(sizeof *one);
    if (one) {
        one->message = *message;
        if (MPI_Isend(&one->message, sizeof one->message, MPI_BYTE, to, 0, state->watchdog, &one->request) == MPI_SUCCESS) {
            one->next = state->outgoing;
            state->outgoing = one;
        } else {
            free(one);
        }
    }
    leave(state, turn);
}

/* The message is small and already here when it is received, so this does not block. */
static bool link_receive(void *context, struct watch_message *message) {
    struct mpi_state *state = context;
    int there = 0;
    MPI_Status from;
    bool turn = enter(state);
    bool received = MPI_Iprobe(MPI_ANY_SOURCE, 0, state->watchdog, &there, &from) == MPI_SUCCESS && there &&
                    MPI_Recv(message, sizeof *message, MPI_BYTE, from.MPI_SOURCE, 0, state->watchdog, MPI_STATUS_IGNORE) == MPI_SUCCESS;
    leave(state, turn);
    return received;
}

/* Takes no turn: whoever has it may never give it back. */
static void link_end_job(void *context, int exit_code) {
    (void)context;
    MPI_Abort(MPI_COMM_WORLD, exit_code);
}

/* ---- start and end -------------------------------------------------------------------------------------------------------------- */

__attribute__((noreturn)) static void mpi_abort(struct comm *base, int exit_code) {
    static const double ABORT_SECONDS = 5;
    struct guard guard;
    (void)base;
    guard_start(&guard, ABORT_SECONDS, exit_code, NULL);
    fflush(stdout);
    if (guard.running)
        MPI_Abort(MPI_COMM_WORLD, exit_code);
    _exit(exit_code);
}

static void state_free(struct mpi_state *state) {
    watch_close(state->shared.watch);
    while (state->outgoing) {
        struct outgoing *one = state->outgoing;
        state->outgoing = one->next;
        MPI_Wait(&one->request, MPI_STATUS_IGNORE); /* small, and all peers are alive: at once */
        free(one);
    }
    MPI_Comm *duplicates[] = {&state->stream, &state->control, &state->watchdog};
    for (int i = 0; i < 3; i++)
        if (*duplicates[i] != MPI_COMM_NULL)
            MPI_Comm_free(duplicates[i]);
    free(state->peers);
    free(state);
}

/* Rank 0 may still be writing results while the others are done, so they wait for it as idle ones. MPI_Finalize cannot be polled:
 * a guard stands beside it. */
static void mpi_finish(struct comm *base) {
    struct comm_mpi *comm = mpi_of(base);
    struct mpi_state *state = comm->state;
    struct guard guard;
    int64_t done = 1;
    if (comm_broadcast_idle(base, "the end of the run", &done, sizeof done, 0) < 0 || comm_barrier(base, "the end of the run") < 0)
        mpi_abort(base, 1);
    watch_stop(state->shared.watch);
    guard_start(&guard, state->deadline, 1, "MPI_Finalize does not return: a rank was stopped or lost at the end of the run");
    struct watch_message late;
    while (link_receive(state, &late))
        ;
    mpi_free(base);
    state_free(state);
    MPI_Finalize();
    guard_stop(&guard);
}

/* Ranks of a launcher that belongs to another MPI each believe to be alone. Callable before MPI_Init. */
static int fail_alone(const struct comm_launcher *launcher) {
    char library[MPI_MAX_LIBRARY_VERSION_STRING] = "", started[64];
    int length = 0;
    MPI_Get_library_version(library, &length);
    library[strcspn(library, ",\n")] = '\0';
    if (launcher->size > 1)
        snprintf(started, sizeof started, "%d ranks (%s=%d)", launcher->size, launcher->variable, launcher->size);
    else
        snprintf(started, sizeof started, "several ranks (%s=%d)", launcher->variable, launcher->rank);
    FAIL(STATUS_USAGE, "%s started %s, but the MPI library of this program (%s) sees only 1: every rank would run alone. "
         "Start it with `srun --mpi=pmix`, or with the mpirun that belongs to this library", launcher->name, started, library);
}

static int check_world(const struct comm_launcher *launcher, int size) {
    bool alone = size == 1 && (launcher->size > 1 || (launcher->size == 0 && launcher->rank > 0));
    return alone ? fail_alone(launcher) : STATUS_OK;
}

/* Host and process of every rank, for messages; and how long a wait may keep its core. */
static int learn_peers(struct comm_mpi *world) {
    struct mpi_state *state = world->state;
    struct watch_peer mine = {.pid = getpid()};
    gethostname(mine.host, sizeof mine.host - 1);
    TRY(comm_gather_host(&world->base, "the start of the run", &mine, state->peers, sizeof mine));
    int n_here = 0;
    for (int r = 0; r < world->base.size; r++)
        n_here += strcmp(state->peers[r].host, mine.host) == 0;
    state->spin_seconds = n_here <= sysconf(_SC_NPROCESSORS_ONLN) ? SPIN_SECONDS : 0;
    return STATUS_OK;
}

static int start_world(struct mpi_state *state, int rank, int size, struct comm **out) {
    int status, *ranks = NULL, *largest_tag = NULL, found = 0;
    MPI_Comm *duplicates[] = {&state->stream, &state->control, &state->watchdog};
    for (int i = 0; i < 3; i++) {
        if (MPI_Comm_dup(MPI_COMM_WORLD, duplicates[i]) != MPI_SUCCESS)
            FAIL_GOTO(STATUS_FAILED, "MPI: cannot duplicate the world communicator");
        MPI_Comm_set_errhandler(*duplicates[i], MPI_ERRORS_RETURN);
    }
    MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &largest_tag, &found);
    state->largest_id = found ? *largest_tag : INT16_MAX;
    TRY_GOTO(base_alloc(&state->peers, (size_t)size, sizeof *state->peers));
    TRY_GOTO(base_alloc(&ranks, (size_t)size, sizeof *ranks));
    for (int r = 0; r < size; r++)
        ranks[r] = r;
    struct watch_link link = {state, link_send, link_receive, link_end_job};
    TRY_GOTO(watch_open(&link, rank, size, state->deadline, state->peers, &state->shared.watch));
    TRY_GOTO(mpi_new(state, state->next_id++, "world", rank, size, ranks, out));
    TRY_GOTO(learn_peers(mpi_of(*out)));
fail:
    free(ranks);
    return status;
}

static int start_library(const char *asked, double deadline_seconds, int *argc, char ***argv, const struct comm_launcher *launcher,
                         struct comm **world) {
    int given = MPI_THREAD_SINGLE, rank = 0, size = 0, status;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &given) != MPI_SUCCESS)
        FAIL(STATUS_FAILED, "MPI_Init_thread failed");
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    struct mpi_state *state = NULL;
    TRY_GOTO(check_world(launcher, size));
    if (given < MPI_THREAD_SERIALIZED)
        FAIL_GOTO(STATUS_FAILED, "this MPI library supports no threads: MPI_THREAD_SERIALIZED is the least that is needed");
    TRY_GOTO(base_alloc(&state, 1, sizeof *state));
    *state = (struct mpi_state){.stream = MPI_COMM_NULL, .control = MPI_COMM_NULL, .watchdog = MPI_COMM_NULL,
                                .serialized = given < MPI_THREAD_MULTIPLE, .chunk_bytes = CHUNK_BYTES,
                                .deadline = deadline_seconds};
    snprintf(state->shared.asked, sizeof state->shared.asked, "%s", asked);
    TRY_GOTO(start_world(state, rank, size, world));
    return STATUS_OK;
fail:
    *world = NULL;
    /* Alone there is nobody to wait for; with others, MPI_Finalize could wait for ever, and the launcher ends the job when this
     * process exits without it. */
    if (size == 1) {
        if (state)
            state_free(state);
        MPI_Finalize();
    }
    return status;
}

/* MPI_Init waits for all ranks and cannot be polled, and there is no watchdog before it has returned: a guard stands beside it,
 * the later the higher the rank, so that one of them speaks. */
int comm_mpi_start(const char *asked, double deadline_seconds, int *argc, char ***argv, const struct comm_launcher *launcher,
                   struct comm **world) {
    static const double LEAST_SECONDS = 10, AFTER_SECONDS = 0.5; /* a library may take seconds, whatever the deadline of steps is */
    static const int LATEST = 6;
    if (launcher->size > 1 && !launcher->connects) /* some libraries end every such process in MPI_Init, with a page of text each */
        return fail_alone(launcher);
    struct guard guard;
    char text[192];
    double seconds = deadline_seconds > LEAST_SECONDS ? deadline_seconds : LEAST_SECONDS;
    snprintf(text, sizeof text, "no progress for %.0f s in MPI_Init, before the first step; a rank did not start, was stopped, or its host "
             "is out of reach; the job ends", seconds);
    guard_start(&guard, seconds + AFTER_SECONDS * (double)max_i64(0, min_i64(launcher->rank, LATEST)), 1, text);
    int status = start_library(asked, deadline_seconds, argc, argv, launcher, world);
    guard_stop(&guard);
    return status;
}

static void mpi_library(const struct comm *comm, char *text, size_t bytes) {
    (void)comm;
    char whole[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0;
    MPI_Get_library_version(whole, &length);
    snprintf(text, bytes, "%s", whole);
}

static const struct comm_functions mpi_functions = {
    .kind = "mpi",
    .library = mpi_library,
    .finish = mpi_finish,
    .abort = mpi_abort,
    .split = mpi_split,
    .free = mpi_free,
    .set_step = mpi_set_step,
    .all_reduce = mpi_all_reduce,
    .all_gatherv = mpi_all_gatherv,
    .all_gather = mpi_all_gather,
    .broadcast = mpi_broadcast,
    .gather = mpi_gather,
};
