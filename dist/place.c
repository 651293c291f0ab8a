/* Where a rank runs: the only file that includes hwloc.h.
 *
 * The ranks of a host cut its cores, in hwloc's order of locality, into equal runs. Whole cores go to one rank as long as there are
 * enough; with more ranks than cores, but not than hardware threads, a rank gets hardware threads; beyond that nothing is bound.
 * What "its cores" are is what this process may run on: control groups and taskset count. Memory is not bound: a bound process
 * touches its pages first, so they come from its own NUMA nodes, and unlike a strict policy that cannot run out on a node while
 * another one is empty. */
#include "dist/place_impl.h"

#include <hwloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

void place_cores(int n_cores, int n, int r, int *begin, int *end) {
    int each = n_cores / n, more = n_cores % n;
    *begin = each * r + (r < more ? r : more);
    *end = *begin + each + (r < more);
}

/* ---- the machine ---------------------------------------------------------------------------------------------------------- */

/* `devices`: with GPUs and what they hang on, which takes longer to find. */
static int machine_open(const char *synthetic, bool devices, hwloc_topology_t *out) {
    if (hwloc_topology_init(out) != 0)
        FAIL(STATUS_FAILED, "hwloc: cannot make a topology");
    if (devices)
        hwloc_topology_set_io_types_filter(*out, HWLOC_TYPE_FILTER_KEEP_IMPORTANT);
    if ((!synthetic || hwloc_topology_set_synthetic(*out, synthetic) == 0) && hwloc_topology_load(*out) == 0)
        return STATUS_OK;
    hwloc_topology_destroy(*out);
    FAIL(STATUS_FAILED, "hwloc: cannot read %s", synthetic ? synthetic : "this machine's topology");
}

/* Objects of a type that a set touches, and the part of the set that the runs [begin, end) of them cover. Some machines do not
 * tell their cores; then a hardware thread is one. */
static int count_objects(hwloc_topology_t machine, hwloc_const_bitmap_t set, hwloc_obj_type_t type, int begin, int end,
                         hwloc_bitmap_t covered) {
    int n = 0;
    if (covered)
        hwloc_bitmap_zero(covered);
    for (hwloc_obj_t at = NULL; (at = hwloc_get_next_obj_by_type(machine, type, at));) {
        if (!hwloc_bitmap_intersects(at->cpuset, set))
            continue;
        if (covered && n >= begin && n < end)
            hwloc_bitmap_or(covered, covered, at->cpuset);
        n++;
    }
    if (covered)
        hwloc_bitmap_and(covered, covered, set);
    if (n == 0 && type == HWLOC_OBJ_CORE)
        return count_objects(machine, set, HWLOC_OBJ_PU, begin, end, covered);
    return n;
}

static int count_cores(hwloc_topology_t machine, hwloc_const_bitmap_t set) {
    return count_objects(machine, set, HWLOC_OBJ_CORE, 0, 0, NULL);
}

/* The share of local rank r of n; all of `mask` and false when there is not enough for everybody. */
static bool find_share(hwloc_topology_t machine, hwloc_const_bitmap_t mask, int n, int r, hwloc_bitmap_t share) {
    static const hwloc_obj_type_t types[] = {HWLOC_OBJ_CORE, HWLOC_OBJ_PU};
    for (int i = 0; i < 2; i++) {
        int begin, end, n_objects = count_objects(machine, mask, types[i], 0, 0, NULL);
        if (n > n_objects)
            continue;
        place_cores(n_objects, n, r, &begin, &end);
        count_objects(machine, mask, types[i], begin, end, share);
        return true;
    }
    hwloc_bitmap_copy(share, mask);
    return false;
}

static void describe(hwloc_topology_t machine, hwloc_const_bitmap_t set, struct place *out) {
    hwloc_bitmap_t nodes = hwloc_bitmap_alloc();
    hwloc_bitmap_list_snprintf(out->cores, sizeof out->cores, set);
    if (nodes && hwloc_cpuset_to_nodeset(machine, set, nodes) == 0)
        hwloc_bitmap_list_snprintf(out->memory, sizeof out->memory, nodes);
    hwloc_bitmap_free(nodes);
    out->n_cores = count_cores(machine, set);
}

int place_plan(const char *synthetic, const char *mask, int n, int r, struct place *out) {
    hwloc_topology_t machine;
    TRY(machine_open(synthetic, false, &machine));
    hwloc_bitmap_t set = hwloc_bitmap_dup(hwloc_topology_get_allowed_cpuset(machine)), share = hwloc_bitmap_alloc();
    int status = STATUS_OK;
    *out = (struct place){.local_rank = r, .local_size = n};
    if (!set || !share || (mask && hwloc_bitmap_list_sscanf(set, mask) != 0))
        FAIL_GOTO(STATUS_FAILED, "hwloc: no set of processing units: %s", mask ? mask : "all");
    out->shared = !find_share(machine, set, n, r, share);
    describe(machine, share, out);
fail:
    hwloc_bitmap_free(set);
    hwloc_bitmap_free(share);
    hwloc_topology_destroy(machine);
    return status;
}

/* ---- binding --------------------------------------------------------------------------------------------------------------- */

/* Different sets are a launcher's doing. Equal ones are so only if no rank could have a core of its own in them while the machine
 * has more: a set that taskset or a batch system gave to all of them is theirs to share. */
bool place_is_bound(const struct place_member *members, int n) {
    for (int i = 1; i < n; i++)
        if (members[i].mask_hash != members[0].mask_hash)
            return true;
    bool part = members[0].mask_units < members[0].machine_units;
    return part && (n == 1 || members[0].mask_cores == 1);
}

static uint64_t hash_set(hwloc_const_bitmap_t set) {
    uint64_t hash = BASE_HASH;
    for (int i = hwloc_bitmap_first(set); i >= 0; i = hwloc_bitmap_next(set, i))
        for (int byte = 0; byte < 4; byte++)
            hash = base_hash(hash, (uint64_t)i >> (8 * byte) & 0xff);
    return hash;
}

/* Collective. The ranks of this host, in rank order; local_rank and local_size are filled in. */
static int find_neighbours(struct comm *world, const struct place_member *mine, struct place_member *members, struct place *out) {
    TRY(comm_gather_host(world, "placement", mine, members, sizeof *mine));
    for (int r = 0; r < comm_size(world); r++) {
        if (strcmp(members[r].host, mine->host) != 0)
            continue;
        out->local_rank += r < mine->rank;
        members[out->local_size++] = members[r];
    }
    return STATUS_OK;
}

static void bind_share(hwloc_topology_t machine, hwloc_const_bitmap_t mask, hwloc_bitmap_t share, struct place *out) {
    out->shared = !find_share(machine, mask, out->local_size, out->local_rank, share);
    if (out->shared || hwloc_bitmap_isequal(mask, share))
        return;
    if (hwloc_set_cpubind(machine, share, HWLOC_CPUBIND_PROCESS) != 0) {
        log_warn("cannot bind to cores: this process runs where the system puts it");
        hwloc_bitmap_copy(share, mask);
    }
}

static int place_on(hwloc_topology_t machine, struct comm *world, struct place_member *members, hwloc_bitmap_t mask,
                    hwloc_bitmap_t share, struct place *out) {
    if (hwloc_get_cpubind(machine, mask, HWLOC_CPUBIND_PROCESS) != 0)
        hwloc_bitmap_copy(mask, hwloc_topology_get_allowed_cpuset(machine));
    /* A process that was never bound may be told about processors that are not there. */
    hwloc_bitmap_and(mask, mask, hwloc_topology_get_allowed_cpuset(machine));
    struct place_member mine = {.mask_hash = hash_set(mask), .mask_units = hwloc_bitmap_weight(mask),
                                .mask_cores = count_cores(machine, mask), .rank = comm_rank(world),
                                .machine_units = hwloc_bitmap_weight(hwloc_topology_get_allowed_cpuset(machine))};
    gethostname(mine.host, sizeof mine.host - 1);
    memcpy(out->host, mine.host, sizeof out->host);
    TRY(find_neighbours(world, &mine, members, out));
    out->bound_by_launcher = place_is_bound(members, out->local_size);
    if (out->bound_by_launcher) {
        hwloc_bitmap_copy(share, mask);
        int n_equal = 0;
        for (int i = 0; i < out->local_size; i++)
            n_equal += members[i].mask_hash == mine.mask_hash;
        out->shared = n_equal > mine.mask_cores;
    } else {
        bind_share(machine, mask, share, out);
    }
    describe(machine, share, out);
    int64_t memory = (int64_t)hwloc_get_root_obj(machine)->total_memory;
    if (memory <= 0)
        memory = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    out->memory_bytes = min_i64(memory, place_memory_limit("")) / out->local_size;
    return STATUS_OK;
}

int place_bind(struct comm *world, struct place *out) {
    struct place_member *members = NULL;
    hwloc_topology_t machine = NULL;
    hwloc_bitmap_t mask = hwloc_bitmap_alloc(), share = hwloc_bitmap_alloc();
    *out = (struct place){0};
    int status = mask && share ? STATUS_OK : base_fail_text(STATUS_MEMORY, "hwloc: no memory for a set of cores");
    if (status == STATUS_OK)
        status = base_alloc(&members, (size_t)comm_size(world), sizeof *members);
    if (status == STATUS_OK)
        status = machine_open(NULL, false, &machine);
    /* All ranks go on together or none does: the rest is collective. */
    TRY_GOTO(comm_agree(world, "placement", status));
    TRY_GOTO(place_on(machine, world, members, mask, share, out));
fail:
    if (machine)
        hwloc_topology_destroy(machine);
    hwloc_bitmap_free(mask);
    hwloc_bitmap_free(share);
    free(members);
    return status;
}

/* ---- GPUs --------------------------------------------------------------------------------------------------------------------- */

static bool is_taken(const struct place_gpus *ranks, int n, const int *chosen, const char *pci) {
    for (int r = 0; r < n; r++)
        if (chosen[r] >= 0 && strcasecmp(ranks[r].pci[chosen[r]], pci) == 0)
            return true;
    return false;
}

/* The first free GPU of rank r, near ones only or any; -1: none. */
static int find_free(const struct place_gpus *ranks, int n, const int *chosen, int r, bool near) {
    for (int i = 0; i < ranks[r].n; i++)
        if ((!near || ranks[r].near[i]) && !is_taken(ranks, n, chosen, ranks[r].pci[i]))
            return i;
    return -1;
}

/* GPUs that the ranks see together. */
static int count_gpus(const struct place_gpus *ranks, int n) {
    int count = 0;
    for (int r = 0; r < n; r++)
        for (int i = 0; i < ranks[r].n; i++) {
            bool seen = false;
            for (int q = 0; q <= r && !seen; q++)
                for (int k = 0; k < (q < r ? ranks[q].n : i) && !seen; k++)
                    seen = strcasecmp(ranks[q].pci[k], ranks[r].pci[i]) == 0;
            count += !seen;
        }
    return count;
}

static int fail_shared(const struct place_gpus *ranks, int r, int q) {
    FAIL(STATUS_USAGE, "host %s: ranks %d and %d would share GPU %s, the only one that each of them sees; show each rank one of its own",
         ranks[r].host, ranks[q].rank, ranks[r].rank, ranks[r].pci[0]);
}

/* Those without a choice come first, then in rank order whoever has a free GPU near its cores, then the rest. */
int place_match_gpus(const struct place_gpus *ranks, int n, int *chosen) {
    int n_gpus = count_gpus(ranks, n);
    if (n_gpus < n)
        FAIL(STATUS_USAGE, "host %s: %d rank%s but %d GPU%s; start one rank a GPU", ranks[0].host, n, n == 1 ? "" : "s", n_gpus,
             n_gpus == 1 ? "" : "s");
    for (int r = 0; r < n; r++)
        chosen[r] = ranks[r].n == 1 ? 0 : -1;
    for (int r = 0; r < n; r++)
        for (int q = 0; q < r; q++)
            if (chosen[q] == 0 && chosen[r] == 0 && strcasecmp(ranks[q].pci[0], ranks[r].pci[0]) == 0)
                return fail_shared(ranks, r, q);
    for (int near = 1; near >= 0; near--)
        for (int r = 0; r < n; r++)
            if (chosen[r] < 0)
                chosen[r] = find_free(ranks, n, chosen, r, near);
    for (int r = 0; r < n; r++)
        if (chosen[r] < 0)
            FAIL(STATUS_USAGE, "host %s: no GPU is left for rank %d: it sees %d, all taken by other ranks; show each rank one of its own",
                 ranks[r].host, ranks[r].rank, ranks[r].n);
    return STATUS_OK;
}

/* Virtual machines often hide where a GPU hangs: then none is near, or all are. */
static void find_near(hwloc_topology_t machine, hwloc_bitmap_t cores, struct place_gpus *mine) {
    if (hwloc_get_cpubind(machine, cores, HWLOC_CPUBIND_PROCESS) != 0)
        return;
    for (int i = 0; i < mine->n; i++) {
        hwloc_obj_t gpu = hwloc_get_pcidev_by_busidstring(machine, mine->pci[i]);
        hwloc_obj_t at = gpu ? hwloc_get_non_io_ancestor_obj(machine, gpu) : NULL;
        mine->near[i] = at && hwloc_bitmap_intersects(at->cpuset, cores);
    }
}

/* Without a topology no GPU is near, and the order decides. */
static int describe_gpus(int n, const char (*pci)[16], struct place_gpus *mine) {
    hwloc_topology_t machine;
    if (n > PLACE_MAX_GPUS)
        FAIL(STATUS_USAGE, "host %s: %d GPUs; at most %d are expected", mine->host, n, PLACE_MAX_GPUS);
    mine->n = n;
    for (int i = 0; i < n; i++)
        snprintf(mine->pci[i], sizeof mine->pci[i], "%s", pci[i]);
    if (n < 2)
        return STATUS_OK;
    TRY(machine_open(NULL, true, &machine));
    hwloc_bitmap_t cores = hwloc_bitmap_alloc();
    if (cores)
        find_near(machine, cores, mine);
    hwloc_bitmap_free(cores);
    hwloc_topology_destroy(machine);
    return STATUS_OK;
}

int place_choose_device(struct comm *world, const struct place *place, int n, const char (*pci)[16], int *device) {
    int size = comm_size(world), n_here = 0, self = 0, status, *chosen = NULL;
    struct place_gpus *all = NULL, mine = {.rank = comm_rank(world)};
    *device = 0;
    memcpy(mine.host, place->host, sizeof mine.host);
    status = describe_gpus(n, pci, &mine);
    if (status == STATUS_OK)
        status = base_alloc(&all, (size_t)size, sizeof *all);
    if (status == STATUS_OK)
        status = base_alloc(&chosen, (size_t)size, sizeof *chosen);
    TRY_GOTO(comm_agree(world, "choosing GPUs", status));
    TRY_GOTO(comm_gather_host(world, "choosing GPUs", &mine, all, sizeof mine));
    for (int r = 0; r < size; r++) {
        if (strcmp(all[r].host, mine.host) != 0)
            continue;
        self = r == mine.rank ? n_here : self;
        all[n_here++] = all[r];
    }
    TRY_GOTO(comm_agree(world, "choosing GPUs", place_match_gpus(all, n_here, chosen)));
    *device = chosen[self];
fail:
    free(all);
    free(chosen);
    return status;
}

/* ---- the table --------------------------------------------------------------------------------------------------------------- */

struct row {
    struct place place;
    int dp, tp, cp;
    char device[PLACE_DEVICE_BYTES];
};

static int print_rows(const struct row *rows, int n, char **text) {
    int host = 4, cores = 5, memory = 6;
    for (int r = 0; r < n; r++) {
        host = (int)max_i64(host, (int64_t)strlen(rows[r].place.host));
        cores = (int)max_i64(cores, (int64_t)strlen(rows[r].place.cores));
        memory = (int)max_i64(memory, (int64_t)strlen(rows[r].place.memory));
    }
    size_t bytes;
    FILE *out = open_memstream(text, &bytes);
    if (!out)
        FAIL(STATUS_MEMORY, "placement: no memory for the table");
    fprintf(out, "rank  dp tp cp  %-*s  %-*s  %-*s       GiB  device\n", host, "host", cores, "cores", memory, "memory");
    for (int r = 0; r < n; r++) {
        const struct place *p = &rows[r].place;
        fprintf(out, "%4d  %2d %2d %2d  %-*s  %-*s  %-*s  %8.1f  %s%s%s\n", r, rows[r].dp, rows[r].tp, rows[r].cp, host, p->host, cores,
                p->cores, memory, p->memory, (double)p->memory_bytes / 1073741824.0, rows[r].device,
                p->bound_by_launcher ? ", bound by the launcher" : "", p->shared ? ", shares its cores" : "");
    }
    if (fclose(out) != 0)
        FAIL(STATUS_MEMORY, "placement: no memory for the table");
    return STATUS_OK;
}

int place_table(struct comm *world, const struct place *place, int dp_rank, int tp_rank, int cp_rank, const char *device,
                char **text) {
    struct row mine = {.place = *place, .dp = dp_rank, .tp = tp_rank, .cp = cp_rank}, *rows;
    *text = NULL;
    snprintf(mine.device, sizeof mine.device, "%s", device);
    TRY(base_alloc(&rows, (size_t)comm_size(world), sizeof *rows));
    int status = comm_gather_host(world, "placement table", &mine, rows, sizeof mine);
    if (status == STATUS_OK && comm_rank(world) == 0)
        status = print_rows(rows, comm_size(world), text);
    free(rows);
    return status;
}
