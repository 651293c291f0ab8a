/* Philox4x32-10 against the known answers that come with Random123, and the noise made of it. */
#include "kernels/philox.h"
#include "test.h"

struct known {
    uint32_t counter[4], key[2], answer[4];
};

static const struct known KNOWN[] = { /* Random123's kat_vectors, philox4x32 10 */
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

static void test_known(void) {
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
        const struct known *k = &KNOWN[i];
        struct philox_block c = {k->counter[0], k->counter[1], k->counter[2], k->counter[3]};
        c = philox_block_of(c, k->key[0], k->key[1]);
        CHECK(c.w0 == k->answer[0] && c.w1 == k->answer[1] && c.w2 == k->answer[2] && c.w3 == k->answer[3],
              "vector %zu: %08x %08x %08x %08x", i, c.w0, c.w1, c.w2, c.w3);
    }
}

/* The key is the seed, low word first; the counter (id, position, choice, 0). */
static void test_layout(void) {
    struct philox_block c = {0x243f6a88, 0x05a308d3, 0x13198a2e, 0};
    c = philox_block_of(c, 0xa4093822, 0x299f31d0);
    uint64_t bits = philox_bits(0x299f31d0a4093822u, 0x13198a2e, 0x05a308d3, 0x243f6a88);
    CHECK(bits == ((uint64_t)c.w0 << 32 | c.w1), "%016llx", (unsigned long long)bits);
}

static void test_uniform_open(void) {
    CHECK(philox_uniform(0) == ldexp(1, -53), "%g", philox_uniform(0));
    CHECK(philox_uniform(UINT64_MAX) == 1 - ldexp(1, -53), "%.17g", philox_uniform(UINT64_MAX));
    CHECK(philox_uniform(UINT64_C(1) << 63) == 0.5 + ldexp(1, -53), "half");
    CHECK(isfinite(philox_gumbel(0)) && isfinite(philox_gumbel(UINT64_MAX)), "an end of the interval");
    CHECK(philox_gumbel(UINT64_MAX) < PHILOX_GUMBEL_MAX, "%.17g", philox_gumbel(UINT64_MAX));
    CHECK(philox_gumbel(UINT64_MAX) > 36.7, "%.17g", philox_gumbel(UINT64_MAX));
}

/* The bound holds at every highest bit, at random numbers, and at the ends of each run of equal high words. */
static void test_bound(void) {
    for (int shift = 0; shift < 64; shift++) {
        uint64_t ends[] = {~(UINT64_MAX >> shift), ~(UINT64_MAX >> shift) - 1, UINT64_MAX - (UINT64_C(1) << shift) + 1};
        for (int i = 0; i < 3; i++) {
            uint64_t bits = ends[i] | 0xffffffffu;
            CHECK(philox_gumbel(bits) < philox_gumbel_bound((uint32_t)(bits >> 32)), "%016llx", (unsigned long long)bits);
        }
    }
    for (uint64_t i = 0; i < 100000; i++) {
        uint64_t bits = test_hash(5, i);
        CHECK(philox_gumbel(bits) < philox_gumbel_bound((uint32_t)(bits >> 32)), "%016llx", (unsigned long long)bits);
    }
}

/* Mean (Euler's constant) and variance (pi^2/6) of the standard Gumbel distribution: within five standard errors of n draws; the
 * standard error of the variance follows from the fourth moment, 5.4 variances squared. */
static void test_moments(void) {
    enum { N = 400000 };
    const double variance = 1.6449340668482264;
    double sum = 0, squares = 0;
    for (int32_t i = 0; i < N; i++) {
        double g = philox_gumbel(philox_bits(77, i & 1, i / 1000, i % 1000)) - 0.57721566490153286;
        sum += g;
        squares += g * g;
    }
    CHECK(fabs(sum / N) < 5 * sqrt(variance / N), "mean off by %g", sum / N);
    CHECK(fabs(squares / N - variance) < 5 * variance * sqrt(4.4 / N), "variance %g", squares / N);
}

/* Noise of neighbours in each argument is uncorrelated: |r| within five standard errors, 1/sqrt(n). */
static void test_independence(void) {
    enum { N = 100000, WAYS = 5 };
    double dot[WAYS] = {0};
    for (int32_t i = 0; i < N; i++) {
        uint64_t seed = 1000 + (uint64_t)(i % 10);
        int32_t choice = i / 10 % 4 * 2, position = i / 40 % 50 * 2, id = i / 2000 * 2;
        double u = philox_uniform(philox_bits(seed, choice, position, id)) - 0.5;
        dot[0] += u * (philox_uniform(philox_bits(seed + 100, choice, position, id)) - 0.5);
        dot[1] += u * (philox_uniform(philox_bits(seed, choice + 1, position, id)) - 0.5);
        dot[2] += u * (philox_uniform(philox_bits(seed, choice, position + 1, id)) - 0.5);
        dot[3] += u * (philox_uniform(philox_bits(seed, choice, position, id + 1)) - 0.5);
        dot[4] += u * (philox_uniform(philox_bits(seed + (UINT64_C(1) << 32), choice, position, id)) - 0.5);
    }
    for (int way = 0; way < WAYS; way++)
        CHECK(fabs(dot[way] / N * 12) < 5 / sqrt(N), "way %d: correlation %g", way, dot[way] / N * 12);
}

int main(void) {
    test_known();
    test_layout();
    test_uniform_open();
    test_bound();
    test_moments();
    test_independence();
    return test_report();
}
