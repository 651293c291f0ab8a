/* Binding on this machine: ranks of a host get cores of their own as long as there are enough, and GPUs of their own or none, and the
 * table tells all of them. */
#include "dist/place.h"
#include "test.h"

#include <sched.h>

/* GPUs that no machine has, so nothing is near. */
static void test_devices(struct comm *world, const struct place *place) {
    enum { MOST = 16 };
    int size = comm_size(world), rank = comm_rank(world), device = -1, all[MOST];
    char pci[MOST][16], words[96];
    for (int i = 0; i < MOST; i++)
        snprintf(pci[i], sizeof pci[i], "00f0:%02x:00.0", i);
    const char(*ids)[16] = (const char(*)[16])pci;
    for (int n = size; n <= size + 1; n++) {
        REQUIRE(place_choose_device(world, place, n, ids, &device));
        REQUIRE(comm_gather_host(world, "devices", &device, all, sizeof device));
        for (int r = 0; r < size; r++)
            CHECK(all[r] == r, "rank %d of %d takes GPU %d of %d", r, size, all[r], n);
    }
    REQUIRE(place_choose_device(world, place, 1, ids + rank, &device)); /* one made visible to each */
    CHECK(device == 0, "rank %d takes GPU %d of 1", rank, device);
    snprintf(words, sizeof words, "%d rank%s but %d GPU%s; start one rank a GPU", size, size == 1 ? "" : "s", size - 1,
             size == 2 ? "" : "s");
    CHECK_FAILS(place_choose_device(world, place, size - 1, ids, &device), STATUS_USAGE, words);
    REQUIRE(comm_barrier(world, "after a refusal"));
}

int main(int argc, char **argv) {
    struct comm *world;
    struct place place;
    char *table;
    cpu_set_t before, after, sets[16];
    REQUIRE(comm_start("auto", 60, &argc, &argv, &world));
    int size = comm_size(world), rank = comm_rank(world);
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    REQUIRE(place_bind(world, &place));
    CHECK(sched_getaffinity(0, sizeof after, &after) == 0);
    REQUIRE(comm_gather_host(world, "affinity", &after, sets, sizeof after));
    CHECK(place.local_size == size && place.local_rank == rank, "%d of %d", place.local_rank, place.local_size);
    CHECK(place.n_cores >= 1 && place.cores[0] && place.host[0], "%d cores: %s", place.n_cores, place.cores);
    CHECK(place.memory_bytes > 1 << 20 && place.memory_bytes < (int64_t)1 << 50, "%lld bytes", (long long)place.memory_bytes);
    CHECK(place.shared == (size > CPU_COUNT(&before)), "shared %d", place.shared);
    if (place.shared || place.bound_by_launcher)
        CHECK(CPU_EQUAL(&before, &after));
    for (int r = 0; r < size && !place.shared && !place.bound_by_launcher; r++) {
        cpu_set_t common;
        CPU_AND(&common, &sets[r], &after);
        CHECK(CPU_COUNT(&common) == (r == rank ? CPU_COUNT(&after) : 0), "ranks %d and %d share cores", r, rank);
    }
    test_devices(world, &place);
    REQUIRE(place_table(world, &place, 0, 0, rank, "cpu", &table));
    CHECK((table != NULL) == (rank == 0));
    if (table) {
        int n_lines = 0;
        for (const char *at = table; (at = strchr(at, '\n')); at++)
            n_lines++;
        CHECK(n_lines == size + 1, "%s", table);
        CHECK(strstr(table, place.host) && strstr(table, place.cores), "%s", table);
        fputs(table, stdout);
    }
    free(table);
    comm_finish(world);
    return test_report();
}
