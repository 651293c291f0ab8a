/* The rig of the tests that hold the GPU's operations against the CPU's: every buffer exists twice, each with guard bands, poisoned
 * until it is filled; an operation is launched on both sides with arguments that differ in pointers only.
 *
 *     struct rig rig;
 *     rig_open(&rig);                                  skips the test where there is no GPU, and only there
 *     struct twin x = rig_make(&rig, bytes, host);     NULL: poison (0xff: NaN in every float type, -1 in integers)
 *     for (int side = 0; side < RIG_SIDES; side++)
 *         REQUIRE(op_add(rig.stream[side], &(struct add_args){..., .x = x.at[side], ...}));
 *     rig_expect_equal(&rig, &x, "add");               or rig_read and bounds of the test's own
 *     rig_close(&rig);                                 checks all guards */
#pragma once

#include "kernels/ops.h"
#include "test.h"

enum { RIG_CPU, RIG_CUDA, RIG_SIDES };
enum { RIG_GUARD = 512, RIG_MAX_TWINS = 256 };

struct twin {
    void *at[RIG_SIDES]; /* device pointers, 256-byte aligned */
    size_t bytes;
};

struct rig {
    struct backend *backend[RIG_SIDES];
    struct stream *stream[RIG_SIDES];
    struct twin twins[RIG_MAX_TWINS];
    int n_twins;
};

static inline void rig_open(struct rig *rig) {
    *rig = (struct rig){0};
    if (backend_n_devices("cuda") == 0) {
        fprintf(stderr, "skipped: no GPU here\n");
        exit(TEST_SKIP);
    }
    static const char *const names[RIG_SIDES] = {"cpu", "cuda"};
    for (int side = 0; side < RIG_SIDES; side++) {
        REQUIRE(backend_open(names[side], &(struct backend_options){.n_threads = 4}, &rig->backend[side]));
        REQUIRE(stream_open(rig->backend[side], &rig->stream[side]));
    }
}

/* Sends host data to one side. */
static inline void rig_send(struct rig *rig, int side, void *device, const void *host, size_t bytes) {
    REQUIRE(stream_copy_in(rig->stream[side], device, host, bytes));
    REQUIRE(stream_sync(rig->stream[side]));
}

/* Malloced copy of `bytes` of device memory of one side. */
static inline void *rig_fetch(struct rig *rig, int side, const void *device, size_t bytes) {
    void *host = malloc(bytes ? bytes : 1);
    if (!host)
        exit(1);
    REQUIRE(stream_copy_out(rig->stream[side], host, device, bytes));
    REQUIRE(stream_sync(rig->stream[side]));
    return host;
}

static inline void rig_fill(struct rig *rig, const struct twin *twin, const void *host) {
    for (int side = 0; side < RIG_SIDES; side++)
        rig_send(rig, side, twin->at[side], host, twin->bytes);
}

static inline void rig_poison(struct rig *rig, const struct twin *twin) {
    void *host = malloc(twin->bytes + 1);
    if (!host)
        exit(1);
    memset(host, 0xff, twin->bytes);
    rig_fill(rig, twin, host);
    free(host);
}

/* A new buffer on both sides, filled from `host` or poisoned, between guard bands. */
static inline struct twin rig_make(struct rig *rig, size_t bytes, const void *host) {
    struct twin twin = {.bytes = bytes};
    unsigned char guard[RIG_GUARD];
    memset(guard, 0xa5, sizeof guard);
    if (rig->n_twins == RIG_MAX_TWINS)
        exit(1);
    for (int side = 0; side < RIG_SIDES; side++) {
        unsigned char *memory;
        REQUIRE(backend_alloc(rig->backend[side], MEMORY_WORKSPACE, bytes + 2 * RIG_GUARD, &memory));
        twin.at[side] = memory + RIG_GUARD;
        rig_send(rig, side, memory, guard, RIG_GUARD);
        rig_send(rig, side, memory + RIG_GUARD + bytes, guard, RIG_GUARD);
    }
    if (host)
        rig_fill(rig, &twin, host);
    else
        rig_poison(rig, &twin);
    rig->twins[rig->n_twins++] = twin;
    return twin;
}

/* Frees the buffers made since there were `n`, their guards checked. */
static inline void rig_drop(struct rig *rig, int n) {
    while (rig->n_twins > n) {
        struct twin *twin = &rig->twins[--rig->n_twins];
        for (int side = 0; side < RIG_SIDES; side++) {
            unsigned char *memory = (unsigned char *)twin->at[side] - RIG_GUARD;
            unsigned char *all = rig_fetch(rig, side, memory, twin->bytes + 2 * RIG_GUARD);
            int touched = 0;
            for (int i = 0; i < RIG_GUARD; i++)
                touched += (all[i] != 0xa5) + (all[RIG_GUARD + twin->bytes + (size_t)i] != 0xa5);
            CHECK(touched == 0, "%s wrote %d bytes outside of buffer %d of %zu bytes", side ? "cuda" : "cpu", touched, rig->n_twins,
                  twin->bytes);
            free(all);
            backend_free(rig->backend[side], memory);
        }
    }
}

static inline void rig_close(struct rig *rig) {
    rig_drop(rig, 0);
    for (int side = 0; side < RIG_SIDES; side++) {
        REQUIRE(stream_sync(rig->stream[side]));
        stream_close(rig->stream[side]);
        backend_close(rig->backend[side]);
    }
}

/* Grade 1: every byte the same on both sides. */
static inline void rig_expect_equal(struct rig *rig, const struct twin *twin, const char *what) {
    unsigned char *cpu = rig_fetch(rig, RIG_CPU, twin->at[RIG_CPU], twin->bytes);
    unsigned char *cuda = rig_fetch(rig, RIG_CUDA, twin->at[RIG_CUDA], twin->bytes);
    size_t n = 0, first = 0;
    for (size_t i = twin->bytes; i-- > 0;)
        if (cpu[i] != cuda[i]) {
            n++;
            first = i;
        }
    CHECK(n == 0, "%s: %zu of %zu bytes differ, the first at %zu: cpu %02x, cuda %02x", what, n, twin->bytes, first, cpu[first], cuda[first]);
    free(cpu);
    free(cuda);
}

/* Grade 2: n floats, each within bound(i, context); a NaN on one side only is a failure. Reports the worst share of the bound. */
static inline void rig_expect_close(struct rig *rig, const struct twin *twin, int64_t n, double (*bound)(int64_t i, void *context),
                                    void *context, const char *what) {
    float *cpu = rig_fetch(rig, RIG_CPU, twin->at[RIG_CPU], (size_t)n * sizeof *cpu);
    float *cuda = rig_fetch(rig, RIG_CUDA, twin->at[RIG_CUDA], (size_t)n * sizeof *cuda);
    double worst = 0;
    int64_t where = 0;
    for (int64_t i = 0; i < n; i++) {
        bool same = cpu[i] == cuda[i] || (cpu[i] != cpu[i] && cuda[i] != cuda[i]);
        double error = same ? 0 : fabs((double)cpu[i] - (double)cuda[i]) / bound(i, context);
        if (!(error <= worst)) {
            worst = error;
            where = i;
            if (error != error)
                break;
        }
    }
    CHECK(worst <= 1, "%s: entry %lld: cpu %g, cuda %g: %.3g times the bound", what, (long long)where, (double)cpu[where],
          (double)cuda[where], worst);
    free(cpu);
    free(cuda);
}

/* Grade 3: `again` launches on the GPU once more; the bits of the twin must not change. */
static inline void rig_expect_repeat(struct rig *rig, const struct twin *twin, int (*again)(struct stream *stream, const void *args),
                                     const void *cuda_args, const char *what) {
    unsigned char *before = rig_fetch(rig, RIG_CUDA, twin->at[RIG_CUDA], twin->bytes);
    for (int i = 0; i < 3; i++) {
        REQUIRE(again(rig->stream[RIG_CUDA], cuda_args));
        unsigned char *after = rig_fetch(rig, RIG_CUDA, twin->at[RIG_CUDA], twin->bytes);
        CHECK(memcmp(before, after, twin->bytes) == 0, "%s: run %d has other bits", what, i);
        free(after);
    }
    free(before);
}
