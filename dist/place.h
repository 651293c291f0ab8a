/* Where a rank runs: binds this process to cores and memory through hwloc, unless the launcher already did. */
#pragma once

#include "dist/comm.h"

enum { PLACE_DEVICE_BYTES = 96 }; /* of a device's description in the table */

struct place {
    char host[64];
    char cores[128];    /* list of processing units, "0-3" */
    char memory[64];    /* list of NUMA nodes */
    int n_cores;        /* cores this rank may use */
    int local_rank, local_size; /* among the ranks of this host */
    bool bound_by_launcher;
    bool shared;        /* more ranks than cores on this host: they take turns */
    int64_t memory_bytes; /* what this rank may use: the host's memory or the cgroup's limit, divided by local_size */
};

/* Collective. Ranks of a host split its allowed cores evenly, neighbours sharing a NUMA node, and bind to them; with fewer cores
 * than ranks, or when a launcher has bound this rank already, nothing is changed. */
int place_bind(struct comm *world, struct place *out);

/* The pure part: of `n_cores` allowed cores in locality order, those of local rank r of n. */
void place_cores(int n_cores, int n, int r, int *begin, int *end);

/* Collective, after place_bind. Which of the n GPUs that this process sees (their PCI ids, "0000:1b:00.0") this rank takes: every rank of a
 * host gets one of its own, near its cores where the machine tells. A rank that sees exactly one takes that one. Errors, on all ranks:
 * STATUS_USAGE when a host has fewer GPUs than ranks, or two of its ranks would share one. */
int place_choose_device(struct comm *world, const struct place *place, int n, const char (*pci)[16], int *device);

/* Collective. One line per rank on rank 0: rank, (dp, tp, cp), host, cores, memory, device. Malloced text on rank 0, NULL elsewhere. */
int place_table(struct comm *world, const struct place *place, int dp_rank, int tp_rank, int cp_rank, const char *device,
                char **text);
