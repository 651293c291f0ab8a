/* The tests' few words: checks that print where they failed, a hash for inputs, a seedless way to any slice.
 * A test is a plain main that ends with `return test_report();`: 0 passed, 1 failed, 77 skipped. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"

enum { TEST_SKIP = 77, TEST_MAX_SHOWN = 20 };

static long test_n_checks;
static long test_n_failed;

#define CHECK(condition, ...)                                                        \
    do {                                                                             \
        test_n_checks++;                                                             \
        if (!(condition) && test_n_failed++ < TEST_MAX_SHOWN) {                      \
            fprintf(stderr, "%s:%d: failed: %s:", __FILE__, __LINE__, #condition);   \
            fprintf(stderr, " " __VA_ARGS__);                                        \
            fputc('\n', stderr);                                                     \
        }                                                                            \
    } while (0)

/* A call that must succeed; the test cannot go on without it. */
#define REQUIRE(call)                                                                                  \
    do {                                                                                               \
        int require_status_ = (call);                                                                  \
        if (require_status_ < 0) {                                                                     \
            fprintf(stderr, "%s:%d: %s: status %d: %s\n", __FILE__, __LINE__, #call, require_status_, base_error()); \
            exit(1);                                                                                   \
        }                                                                                              \
    } while (0)

/* A call that must fail with this status and an error text that holds `words`; the error is cleared. */
#define CHECK_FAILS(call, code, words)                                                                 \
    do {                                                                                               \
        int fails_status_ = (call);                                                                    \
        CHECK(fails_status_ == (code), "status %d, text '%s'", fails_status_, base_error());           \
        CHECK(strstr(base_error(), (words)) != NULL, "text '%s' lacks '%s'", base_error(), (words));   \
        base_clear_error();                                                                            \
    } while (0)

static inline int test_report(void) {
    if (test_n_failed) {
        fprintf(stderr, "%ld of %ld checks failed\n", test_n_failed, test_n_checks);
        return 1;
    }
    if (test_n_checks == 0) {
        fprintf(stderr, "no check was made\n");
        return 1;
    }
    return 0;
}

/* A well-mixed 64-bit hash of (seed, index): any rank can make any slice of an input. */
static inline uint64_t test_hash(uint64_t seed, uint64_t index) {
    uint64_t z = seed * 0x9e3779b97f4a7c15u + index * 0xd1342543de82ef95u + 0x2545f4914f6cdd1du;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in [-1, 1), exact in float. */
static inline float test_uniform(uint64_t seed, uint64_t index) {
    return (float)((double)(int64_t)(test_hash(seed, index) >> 40) / (double)(1 << 23) - 1.0);
}

/* Standard normal. */
static inline float test_normal(uint64_t seed, uint64_t index) {
    double u = ((double)(test_hash(seed, 2 * index) >> 11) + 0.5) / 9007199254740992.0;
    double v = (double)(test_hash(seed, 2 * index + 1) >> 11) / 9007199254740992.0;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

/* A file of the tests' source folder, such as "golden/quantizer.bin": KVLINC_TESTS is set by the build. */
#ifdef KVLINC_TESTS
#define TEST_FILE(name) KVLINC_TESTS "/" name
#endif
