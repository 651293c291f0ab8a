/* The reference of a reduction, value by value: what the tests of communicators hold libraries against. */
#pragma once

#include "dist/comm.h"
#include "test.h"

#define COMBINE(TYPE, SUM)                                                                   \
    do {                                                                                     \
        TYPE a, b, c;                                                                        \
        memcpy(&a, sum, sizeof a);                                                           \
        memcpy(&b, value, sizeof b);                                                         \
        c = op == COMM_SUM ? (SUM) : op == COMM_MAX ? (a > b ? a : b) : (a < b ? a : b);     \
        memcpy(sum, &c, sizeof c);                                                           \
    } while (0)

/* *sum = *sum op *value. Integers wrap. */
static inline void combine_value(char *sum, const char *value, enum comm_dtype dtype, enum comm_op op) {
    if (dtype == COMM_FLOAT)
        COMBINE(float, a + b);
    else if (dtype == COMM_INT32)
        COMBINE(int32_t, (int32_t)((uint32_t)a + (uint32_t)b));
    else
        COMBINE(uint64_t, a + b);
}
