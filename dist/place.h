/* Where a rank runs: binds this process to cores and memory through hwloc, unless the launcher already did. */
#pragma once

#include "dist/comm.h"

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

/* Collective. One line per rank on rank 0: rank, (dp, tp, cp), host, cores, memory, device. Malloced text on rank 0, NULL elsewhere. */
int place_table(struct comm *world, const struct place *place, int dp_rank, int tp_rank, int cp_rank, const char *device,
                char **text);
