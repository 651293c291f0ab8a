/* RMSNorm's factor of one vector, for the residual stream (dense.c) and for the heads of q and k (rope.c). */
#pragma once

#include <math.h>
#include <stdint.h>

/* Mean of squares, summed in double over eight lanes. */
static inline float norm_mean_square(const float *x, int64_t n) {
    double lane[8] = {0};
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
        for (int j = 0; j < 8; j++)
            lane[j] += (double)x[k + j] * (double)x[k + j];
    for (; k < n; k++)
        lane[0] += (double)x[k] * (double)x[k];
    double sum = ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
    return (float)(sum / (double)n);
}

static inline float norm_factor(const float *x, int64_t n, float eps) { return 1.0f / sqrtf(norm_mean_square(x, n) + eps); }
