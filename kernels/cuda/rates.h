/* The launcher behind stream_read. */
#pragma once

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* *sum += the sum of all 32-bit words of `data`, modulo 2^32. `data` and `bytes` are multiples of 16. */
int cuda_read(const struct cuda_launch *launch, const void *data, size_t bytes, uint32_t *sum);

#ifdef __cplusplus
}
#endif
