/* Four successive values of a row, which a thread of the small operations between two products reads and writes at once, and RMSNorm's
 * arithmetic on them, for the residual stream (dense.cu) and for the heads of q and k (rope.cu). Sums and products that round are
 * intrinsics that never fuse, so that one row has one value whatever the compiler likes. */
#pragma once

#include "kernels/cuda/device.cuh"

enum { QUAD = 4 };

template <typename T> struct alignas(QUAD * sizeof(T)) quad {
    T v[QUAD];
};

__device__ static inline double square_sum(quad<float> x) {
    double a = (double)x.v[0] * (double)x.v[0] + (double)x.v[2] * (double)x.v[2]; /* squares of floats are exact */
    double b = (double)x.v[1] * (double)x.v[1] + (double)x.v[3] * (double)x.v[3];
    return a + b;
}

/* What a vector of n values with this sum of squares is multiplied with. */
__device__ static inline float norm_factor(double squares, int64_t n, float eps) {
    float mean = (float)(squares / (double)n);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

__device__ static inline quad<float> norm_quad(quad<float> x, quad<float> weight, float factor) {
    for (int j = 0; j < QUAD; j++)
        x.v[j] = __fmul_rn(weight.v[j], __fmul_rn(x.v[j], factor));
    return x;
}
