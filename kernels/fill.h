/* The made-up number of a (seed, index), for all backends: one hash, then arithmetic that rounds once an operation. Files that include
 * this are compiled without fused products, so that CPU and GPU get the same bits. */
#pragma once

#include <stdint.h>

#include "kernels/base.h"

/* Uniform in [low, high], 2^24 steps. */
HOST_DEVICE static inline float fill_random_value(uint64_t seed, uint64_t index, float low, float high) {
    uint64_t z = seed * 0x9e3779b97f4a7c15u + index * 0xd1342543de82ef95u + 0x2545f4914f6cdd1du;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u; /* splitmix64's finalizer */
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    float unit = (float)(uint32_t)((z ^ (z >> 31)) >> 40) * 0x1p-24f; /* exact */
    return low + (high - low) * unit;
}
