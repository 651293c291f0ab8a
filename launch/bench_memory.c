/* What a rank takes from the system beside what its engine allocated. Resident pages are private (ours, libraries' and MPI's), of mapped
 * files (the program, libraries, the model's file as far as it is still in memory), or shared between processes (MPI's buffers). */
#include <stdlib.h>
#include <string.h>

#include "launch/bench.h"
#include "launch/units.h"

enum { PEAK, PRIVATE, FILES, SHARED, N_KINDS, LINE_BYTES = 256 };

void bench_memory_reset(void) {
    FILE *file = fopen("/proc/self/clear_refs", "we");
    if (!file)
        return;
    fputs("5\n", file); /* proc(5): reset the peak resident set size */
    fclose(file);
}

/* Bytes from /proc/self/status; 0 where the system does not say. */
static void read_status(int64_t bytes[N_KINDS]) {
    static const char *const names[N_KINDS] = {"VmHWM:", "RssAnon:", "RssFile:", "RssShmem:"};
    char line[LINE_BYTES];
    FILE *file = fopen("/proc/self/status", "re");
    memset(bytes, 0, N_KINDS * sizeof *bytes);
    while (file && fgets(line, sizeof line, file))
        for (int i = 0; i < N_KINDS; i++)
            if (strncmp(line, names[i], strlen(names[i])) == 0)
                bytes[i] = strtoll(line + strlen(names[i]), NULL, 10) * 1024;
    if (file)
        fclose(file);
}

static void add_allocated(struct bench *b) {
    const struct engine *engine = b->run->engine;
    struct engine_memory m;
    engine_memory(engine, &m);
    const struct {
        const char *item;
        int64_t bytes;
    } parts[] = {{"weights, all ranks", m.weights}, {"workspace, all ranks", m.workspace}, {"cache, all ranks", m.cache},
                 {"largest rank, allocated", m.largest_rank}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        bench_add(b, (struct bench_row){.section = "memory", .item = parts[i].item, .cache = engine_cache_name(engine),
                                        .bytes = (double)parts[i].bytes});
}

static void add_rank(struct bench *b, int rank, const int64_t bytes[N_KINDS]) {
    struct engine_memory m;
    char item[32], note[128], private[UNITS_TEXT], files[UNITS_TEXT], shared[UNITS_TEXT];
    engine_memory(b->run->engine, &m);
    snprintf(item, sizeof item, "rank %d, peak resident", rank);
    snprintf(note, sizeof note, "at the end %s private, %s files, %s shared", units_bytes(bytes[PRIVATE], private),
             units_bytes(bytes[FILES], files), units_bytes(bytes[SHARED], shared));
    bench_add(b, (struct bench_row){.section = "memory", .item = item, .cache = engine_cache_name(b->run->engine),
                                    .bytes = (double)bytes[PEAK], .share = (double)bytes[PEAK] / (double)m.largest_rank,
                                    .of = "allocated", .note = note});
}

int bench_memory(struct bench *b) {
    struct comm *world = b->run->world;
    int64_t own[N_KINDS], *all;
    int n = comm_size(world);
    read_status(own);
    TRY(comm_agree(world, "bench", base_alloc(&all, (size_t)n, sizeof own)));
    int status = comm_gather_host(world, "memory in use", own, all, sizeof own);
    if (status == STATUS_OK && b->run->root) {
        add_allocated(b);
        for (int i = 0; i < n; i++)
            add_rank(b, i, all + (int64_t)i * N_KINDS);
    }
    free(all);
    return status;
}
