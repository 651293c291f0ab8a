/* Where a rank's time goes, by operation: what the backend counted between two moments, largest first. The rest is scheduling, plans on
 * their way and, on an asynchronous device, waiting. */
#include <stdlib.h>

#include "launch/bench.h"

static const char *const op_names[OP_COUNT] = {
#define OP_NAME(name) [OP_##name] = #name,
    OPS(OP_NAME)
#undef OP_NAME
};

struct entry {
    const char *name;
    struct backend_time time;
};

void bench_profile_read(const struct bench *b, struct bench_profile *out) {
    engine_profile(b->run->engine, &out->times, out->launches, OP_COUNT);
}

static struct entry difference(const char *name, const struct backend_time *begin, const struct backend_time *end) {
    return (struct entry){name, {end->n - begin->n, end->ns - begin->ns}};
}

static int longer_first(const void *a, const void *b) {
    int64_t x = ((const struct entry *)a)->time.ns, y = ((const struct entry *)b)->time.ns;
    return (x < y) - (x > y);
}

static void add(struct bench *b, const struct bench_row *of, const char *name, double ms, double calls, double all_ms) {
    char note[64] = "";
    if (calls > 0)
        snprintf(note, sizeof note, "%.4g calls of %.4g us", calls, ms * 1e3 / calls);
    bench_add(b, (struct bench_row){.section = "profile", .item = name, .cache = of->cache, .batch = of->batch, .tokens = of->tokens,
                                    .ms = ms, .share = ms / all_ms, .of = of->item, .note = note[0] ? note : NULL});
}

void bench_profile_add(struct bench *b, const struct bench_profile *begin, const struct bench_profile *end, const struct bench_row *of,
                       int n, double seconds) {
    struct entry entries[OP_COUNT + 2];
    double all_ms = seconds * 1e3 / n, left = all_ms;
    if (!b->options->profile)
        return;
    for (int i = 0; i < OP_COUNT; i++)
        entries[i] = difference(op_names[i], &begin->launches[i], &end->launches[i]);
    entries[OP_COUNT] = difference("collectives", &begin->times.calls, &end->times.calls);
    entries[OP_COUNT + 1] = difference("copies", &begin->times.copies, &end->times.copies);
    qsort(entries, OP_COUNT + 2, sizeof *entries, longer_first);
    for (int i = 0; i < OP_COUNT + 2 && entries[i].time.n > 0; i++) {
        double ms = (double)entries[i].time.ns * 1e-6 / n;
        left -= ms;
        add(b, of, entries[i].name, ms, (double)entries[i].time.n / n, all_ms);
    }
    if (left > 0)
        add(b, of, "(outside)", left, 0, all_ms);
}
