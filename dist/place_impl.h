/* The parts of placement that need no ranks, for place.c and its tests. */
#pragma once

#include "dist/place.h"

/* What place_bind would give local rank r of n: cores, memory, n_cores and shared are filled in, nothing is bound. `synthetic`
 * describes a machine in hwloc's words ("numa:2 core:4 pu:2"; NULL: this one), `mask` the processing units that may be used
 * ("0-3,8"; NULL: all). */
int place_plan(const char *synthetic, const char *mask, int n, int r, struct place *out);

/* What a rank knows of itself before anything is bound. */
struct place_member {
    char host[64];
    uint64_t mask_hash; /* of the set of processing units it may run on */
    int mask_units, mask_cores, machine_units;
    int rank;
};
/* Whether the launcher has bound the n ranks of a host already. */
bool place_is_bound(const struct place_member *members, int n);

/* The GPUs that a rank sees. */
enum { PLACE_MAX_GPUS = 64, PLACE_PCI_BYTES = 16 };
struct place_gpus {
    char host[64];
    int rank, n;                               /* in the world; GPUs seen */
    char pci[PLACE_MAX_GPUS][PLACE_PCI_BYTES]; /* "0000:1b:00.0"; hexadecimal digits in either case */
    bool near[PLACE_MAX_GPUS];                 /* to cores of this rank, as far as the machine tells */
};
/* Which of its GPUs each of the n ranks of one host takes: an index in chosen[r]. The same on whoever computes it. */
int place_match_gpus(const struct place_gpus *ranks, int n, int *chosen);

/* Bytes that the control groups of this process allow (both versions, all levels); INT64_MAX: no limit. `root` comes before
 * "/proc/..." and "/sys/...": "" but in tests. */
int64_t place_memory_limit(const char *root);
