/* The device that a test of ranks runs on: its first argument, "cpu" when there is none. On "cuda" rank r uses GPU r of this host. */
#pragma once

#include "dist/comm.h"
#include "test.h"

static inline bool device_is_gpu(const char *device) { return strcmp(device, "cuda") == 0; }

/* Collective. Ends the test as skipped where there are fewer GPUs than ranks; a machine with GPUs counts that as a failure (gpu.sh). */
static inline void device_require(struct comm *world, const char *device) {
    int n = backend_n_devices("cuda");
    if (!device_is_gpu(device) || n >= comm_size(world))
        return;
    if (comm_rank(world) == 0)
        fprintf(stderr, "skipped: %d ranks, %d GPUs\n", comm_size(world), n);
    comm_finish(world);
    exit(TEST_SKIP);
}

/* `gpu`: rank in the world; of one rank alone its place there too. */
static inline void device_open(const char *device, int gpu, uint64_t seed, struct backend **out) {
    REQUIRE(backend_open(device, &(struct backend_options){.n_threads = 1, .seed = seed, .device = device_is_gpu(device) ? gpu : 0}, out));
}

/* Collective. The same ranks once more, with collectives that run on the device. */
static inline struct comm *device_comm(struct comm *comm, struct backend *backend) {
    struct comm *own;
    REQUIRE(comm_split(comm, 0, comm_rank(comm), "test", &own));
    REQUIRE(comm_use_device(&own, backend));
    return own;
}
