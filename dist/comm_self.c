/* One rank alone, without any library. comm.c answers for communicators of one rank, so little is left to do here. */
#include "dist/comm_impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const struct comm_functions self_functions;

static int self_new(struct comm_shared *shared, const char *name, struct comm **out) {
    struct comm *comm;
    TRY(base_alloc(&comm, 1, sizeof *comm));
    comm->functions = &self_functions;
    comm->shared = shared;
    comm->size = 1;
    snprintf(comm->name, sizeof comm->name, "%s", name);
    *out = comm;
    return STATUS_OK;
}

static void self_library(const struct comm *comm, char *text, size_t bytes) {
    (void)comm;
    snprintf(text, bytes, "none");
}

static void self_free(struct comm *comm) { free(comm); }

static void self_finish(struct comm *world) {
    free(world->shared);
    free(world);
}

__attribute__((noreturn)) static void self_abort(struct comm *comm, int exit_code) {
    (void)comm;
    fflush(stdout);
    _exit(exit_code);
}

static int self_split(struct comm *comm, int colour, int key, const char *name, struct comm **out) {
    (void)colour, (void)key;
    return self_new(comm->shared, name, out);
}

static void self_set_step(struct comm *comm, int64_t step) { (void)comm, (void)step; }

static const struct comm_functions self_functions = {
    .kind = "self",
    .library = self_library,
    .finish = self_finish,
    .abort = self_abort,
    .split = self_split,
    .free = self_free,
    .set_step = self_set_step,
};

int comm_self_start(const char *asked, struct comm **world) {
    struct comm_shared *shared;
    TRY(base_alloc(&shared, 1, sizeof *shared));
    snprintf(shared->asked, sizeof shared->asked, "%s", asked);
    int status = self_new(shared, "world", world);
    if (status < 0)
        free(shared);
    return status;
}
