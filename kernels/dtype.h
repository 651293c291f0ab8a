/* Number formats as they stand in files and in memory, and how to widen them to float.
 *
 * F32, F16, BF16 are what the engine computes with; I32 is for tables; the block formats of GGUF are read once, at
 * load, and never computed with. Block formats run along a row: a row's length is a multiple of the block's. */
#pragma once

#include "kernels/base.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dtype {
    DTYPE_F32,
    DTYPE_F16,
    DTYPE_BF16,
    DTYPE_I32,
    DTYPE_Q4_0, /* GGUF: 32 values, fp16 scale d, 16 bytes of nibbles: (q - 8) d */
    DTYPE_Q4_1, /* GGUF: 32 values, fp16 d and m, 16 bytes: q d + m */
    DTYPE_Q8_0, /* GGUF: 32 values, fp16 d, 32 signed bytes: q d */
    DTYPE_Q5_0, /* GGUF: 32 values, fp16 d, 32 high bits, 16 bytes of nibbles: (q - 16) d */
    DTYPE_Q5_1, /* GGUF: 32 values, fp16 d and m, 32 high bits, 16 bytes of nibbles: q d + m */
    DTYPE_Q4_K, /* GGUF: 256 values, fp16 d and m, 8 pairs (s, t) of 6 bits, 128 bytes of nibbles: q d s - m t */
    DTYPE_Q5_K, /* GGUF: as Q4_K, with 256 high bits before the nibbles */
    DTYPE_Q6_K, /* GGUF: 256 values, 128 bytes of nibbles, 64 of high bit pairs, 16 signed bytes s, fp16 d: (q - 32) d s */
    DTYPE_COUNT,
};

const char *dtype_name(enum dtype dtype);

enum { DTYPE_MOST_BLOCK = 256 }; /* values of the longest block */

/* Values of one block: 1 for plain types, 32 or 256 for the block formats above. */
int dtype_block(enum dtype dtype);

/* Bytes of `n` values, n a multiple of dtype_block. */
size_t dtype_bytes(enum dtype dtype, int64_t n);

/* dst[i] = float(src[i]) for n values from the start of a row (n a multiple of dtype_block); I32 is not allowed. */
void dtype_widen(enum dtype dtype, const void *src, float *dst, int64_t n);

/* dst[i] = round_to_nearest_even(src[i]) into F32, F16 or BF16. Values beyond the range become infinities. */
void dtype_narrow(enum dtype dtype, const float *src, void *dst, int64_t n);

/* One value, IEEE binary16 and bfloat16, round to nearest even; NaN stays NaN. */
float dtype_from_f16(uint16_t bits);
uint16_t dtype_to_f16(float value);
float dtype_from_bf16(uint16_t bits);
uint16_t dtype_to_bf16(float value);

#ifdef __cplusplus
}
#endif
