/* Placement without ranks: the arithmetic exhaustively, shares on machines made up in hwloc's words, the decision whether
 * a launcher has bound the ranks, who takes which GPU, and memory limits in made-up control groups. */
#include "dist/place_impl.h"
#include "test.h"

#include <sys/stat.h>
#include <unistd.h>

static void test_cores(void) {
    for (int n_cores = 0; n_cores <= 40; n_cores++)
        for (int n = 1; n <= 40; n++) {
            int at = 0, least = 1000, most = 0;
            for (int r = 0; r < n; r++) {
                int begin, end;
                place_cores(n_cores, n, r, &begin, &end);
                CHECK(begin == at && end >= begin, "%d cores, rank %d of %d: %d to %d", n_cores, r, n, begin, end);
                least = end - begin < least ? end - begin : least;
                most = end - begin > most ? end - begin : most;
                at = end;
            }
            CHECK(at == n_cores && most - least <= 1, "%d cores, %d ranks", n_cores, n);
        }
}

static void test_machines(void) {
    static const struct {
        const char *machine, *mask;
        int n, r;
        const char *cores, *memory;
        int n_cores;
        bool shared;
    } rows[] = {
        {"numa:2 core:4 pu:2", NULL, 1, 0, "0-15", "0-1", 8, false},
        {"numa:2 core:4 pu:2", NULL, 2, 0, "0-7", "0", 4, false},
        {"numa:2 core:4 pu:2", NULL, 2, 1, "8-15", "1", 4, false},
        {"numa:2 core:4 pu:2", NULL, 3, 0, "0-5", "0", 3, false},
        {"numa:2 core:4 pu:2", NULL, 3, 1, "6-11", "0-1", 3, false},
        {"numa:2 core:4 pu:2", NULL, 3, 2, "12-15", "1", 2, false},
        {"numa:2 core:4 pu:2", NULL, 4, 3, "12-15", "1", 2, false},
        {"numa:2 core:4 pu:2", NULL, 8, 5, "10-11", "1", 1, false},
        {"numa:2 core:4 pu:2", NULL, 16, 5, "5", "0", 1, false},  /* threads of a core when cores do not suffice */
        {"numa:2 core:4 pu:2", NULL, 9, 0, "0-1", "0", 1, false},
        {"numa:2 core:4 pu:2", NULL, 9, 8, "15", "1", 1, false},
        {"numa:2 core:4 pu:2", NULL, 17, 3, "0-15", "0-1", 8, true},
        {"numa:2 core:4 pu:2", "4-11", 2, 0, "4-7", "0", 2, false}, /* a set given by taskset or a control group */
        {"numa:2 core:4 pu:2", "4-11", 2, 1, "8-11", "1", 2, false},
        {"numa:2 core:4 pu:2", "0,2,4,6", 2, 1, "4,6", "0", 2, false}, /* one thread of each core */
        {"numa:2 core:4 pu:2", "0-1", 2, 1, "1", "0", 1, false},
        {"numa:2 core:4 pu:2", "0", 2, 1, "0", "0", 1, true},
        {"package:1 core:1 pu:2", NULL, 2, 1, "1", "0", 1, false},
        {"package:2 numa:2 core:2 pu:1", NULL, 4, 2, "4-5", "2", 2, false},
        {"pu:3", NULL, 2, 0, "0-1", "0", 2, false},
        /* cores numbered across the packages, as many machines do: locality order, not number order */
        {"package:2 core:2 pu:1(indexes=0,2,1,3)", NULL, 2, 0, "0,2", "0", 2, false},
        {"package:2 core:2 pu:1(indexes=0,2,1,3)", NULL, 2, 1, "1,3", "0", 2, false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct place p;
        REQUIRE(place_plan(rows[i].machine, rows[i].mask, rows[i].n, rows[i].r, &p));
        CHECK(strcmp(p.cores, rows[i].cores) == 0, "row %zu: cores %s, not %s", i, p.cores, rows[i].cores);
        CHECK(strcmp(p.memory, rows[i].memory) == 0, "row %zu: memory %s, not %s", i, p.memory, rows[i].memory);
        CHECK(p.n_cores == rows[i].n_cores, "row %zu: %d cores, not %d", i, p.n_cores, rows[i].n_cores);
        CHECK(p.shared == rows[i].shared, "row %zu: shared %d", i, p.shared);
    }
    struct place p;
    CHECK_FAILS(place_plan("no machine", NULL, 1, 0, &p), STATUS_FAILED, "no machine");
}

static struct place_member member(uint64_t hash, int units, int cores, int machine) {
    return (struct place_member){.mask_hash = hash, .mask_units = units, .mask_cores = cores, .machine_units = machine};
}

static void test_bound(void) {
    struct place_member whole[] = {member(1, 8, 4, 8), member(1, 8, 4, 8)};
    struct place_member apart[] = {member(1, 4, 2, 8), member(2, 4, 2, 8)};
    struct place_member given[] = {member(1, 4, 2, 8), member(1, 4, 2, 8)}; /* taskset before mpirun */
    struct place_member single[] = {member(1, 1, 1, 8), member(1, 1, 1, 8)};
    struct place_member tiny[] = {member(1, 1, 1, 1), member(1, 1, 1, 1)};
    CHECK(!place_is_bound(whole, 2) && !place_is_bound(whole, 1));
    CHECK(place_is_bound(apart, 2));
    CHECK(!place_is_bound(given, 2));
    CHECK(place_is_bound(given, 1));
    CHECK(place_is_bound(single, 2));
    CHECK(!place_is_bound(tiny, 2));
}

/* ---- GPUs ---------------------------------------------------------------------------------------------------------------------- */

/* `sees`: letters of the GPUs that each rank sees, in its order, capital where one is near; `takes`: what each rank gets, or `words`. */
static void check_match(const char *const *sees, const char *takes, const char *words) {
    enum { MOST = 8 };
    struct place_gpus ranks[MOST] = {0};
    int n = 0, chosen[MOST];
    for (; sees[n]; n++) {
        ranks[n].rank = 10 + n;
        snprintf(ranks[n].host, sizeof ranks[n].host, "node7");
        for (const char *at = sees[n]; *at; at++) {
            int letter = *at & 31, i = ranks[n].n++;
            ranks[n].near[i] = *at < 'a';
            /* one id, written in both ways */
            snprintf(ranks[n].pci[i], sizeof ranks[n].pci[i], n % 2 ? "0000:%02x:00.0" : "0000:%02X:00.0", 0xa0 + letter);
        }
    }
    if (words) {
        CHECK_FAILS(place_match_gpus(ranks, n, chosen), STATUS_USAGE, words);
        return;
    }
    REQUIRE(place_match_gpus(ranks, n, chosen));
    for (int r = 0; r < n; r++) {
        char got = chosen[r] >= 0 && chosen[r] < ranks[r].n ? (char)((sees[r][chosen[r]] & 31) + 'a' - 1) : '-';
        CHECK(got == takes[r], "rank %d of %d sees %s and takes %c, not %c", r, n, sees[r], got, takes[r]);
    }
}

static void test_gpus(void) {
    check_match((const char *const[]){"a", NULL}, "a", NULL);
    check_match((const char *const[]){"abcd", NULL}, "a", NULL);
    check_match((const char *const[]){"abCd", NULL}, "c", NULL);
    check_match((const char *const[]){"abcd", "abcd", "abcd", NULL}, "abc", NULL);           /* nothing is known: in order */
    check_match((const char *const[]){"ABCD", "ABCD", "ABCD", "ABCD", NULL}, "abcd", NULL);
    check_match((const char *const[]){"abCD", "abCD", "ABcd", "ABcd", NULL}, "cdab", NULL);  /* two sockets */
    check_match((const char *const[]){"Abcd", "Abcd", "abcd", NULL}, "abc", NULL);           /* both want the first */
    check_match((const char *const[]){"ab", "Ab", NULL}, "ba", NULL);                        /* a near one is kept for its rank */
    check_match((const char *const[]){"a", "b", "c", NULL}, "abc", NULL);                    /* one made visible to each */
    check_match((const char *const[]){"ABC", "a", "ABC", NULL}, "bac", NULL);                /* who has no choice comes first */
    check_match((const char *const[]){"ba", "ab", NULL}, "ba", NULL);                        /* an order of its own on each rank */
    check_match((const char *const[]){"", NULL}, NULL, "host node7: 1 rank but 0 GPUs; start one rank a GPU");
    check_match((const char *const[]){"ab", "ab", "ab", "ab", NULL}, NULL, "host node7: 4 ranks but 2 GPUs; start one rank a GPU");
    check_match((const char *const[]){"a", "a", NULL}, NULL, "host node7: 2 ranks but 1 GPU; start one rank a GPU");
    check_match((const char *const[]){"abc", "a", "a", NULL}, NULL, "host node7: ranks 11 and 12 would share GPU 0000:A1:00.0");
    check_match((const char *const[]){"abc", "", "abc", NULL}, NULL, "host node7: no GPU is left for rank 11: it sees 0");
    check_match((const char *const[]){"Abc", "ab", "ab", NULL}, NULL, "host node7: no GPU is left for rank 12: it sees 2");
}

/* ---- control groups ------------------------------------------------------------------------------------------------------------ */

static char root[64];

static void put(const char *path, const char *text) {
    char full[512];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (char *at = full + strlen(root) + 1; (at = strchr(at, '/')); at++) {
        *at = '\0';
        mkdir(full, 0700);
        *at = '/';
    }
    FILE *file = fopen(full, "w");
    CHECK(file != NULL, "%s", full);
    if (file) {
        fputs(text, file);
        fclose(file);
    }
}

static void test_memory(void) {
    snprintf(root, sizeof root, "/tmp/kvlinc-place-XXXXXX");
    CHECK(mkdtemp(root) != NULL);
    CHECK(place_memory_limit(root) == INT64_MAX, "without control groups");
    put("/proc/self/cgroup", "0::/system/job/step\n");
    put("/sys/fs/cgroup/system/job/step/memory.max", "max\n");
    CHECK(place_memory_limit(root) == INT64_MAX, "max");
    put("/sys/fs/cgroup/system/job/memory.max", "5000000000\n");
    CHECK(place_memory_limit(root) == 5000000000, "a limit above the process");
    put("/sys/fs/cgroup/system/job/step/memory.max", "3000000000\n");
    CHECK(place_memory_limit(root) == 3000000000, "the least of all levels");
    put("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/outside/abc\n3:cpuset:/x\n0::/\n");
    CHECK(place_memory_limit(root) == INT64_MAX, "other groups");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000000\n");
    CHECK(place_memory_limit(root) == 2000000000, "a container's limit at the top of its mount");
    put("/sys/fs/cgroup/memory/outside/abc/memory.limit_in_bytes", "1000000000\n");
    CHECK(place_memory_limit(root) == 1000000000, "version 1");
    put("/sys/fs/cgroup/unified/memory.max", "900000000\n");
    CHECK(place_memory_limit(root) == 900000000, "version 2 beside version 1");
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", root);
    CHECK(system(command) == 0);
}

int main(void) {
    test_cores();
    test_machines();
    test_bound();
    test_gpus();
    test_memory();
    return test_report();
}
