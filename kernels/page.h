/* What a page is, seen from above: one block of KV_BLOCK tokens of one layer, encoded, for all KV heads of a rank.
 *
 * A page holds one record per KV head, back to back, each page_record_bytes long. Nothing above the backend looks
 * inside a record. Codes of b bits follow DESIGN's quantizer: scale = (max - min) / (2^b - 1), zero = min, both rounded to
 * fp16, code = round_half_even((x - zero) / scale) clamped, against the rounded scale and zero. A group whose scale rounds to
 * 0 is constant (scale 0, codes 0, zero = its min). KIVI (2402.02750): keys per channel over the block, values per token over the head.
 *
 * Bit by bit, for every backend: values are widened to float, and all arithmetic is in float, each operation rounded once (no fma, no
 * reciprocal). A NaN is read as 0, an infinity as the largest float of its sign. Scale and zero are clamped to +-PAGE_MAX_SCALE before they
 * are rounded to fp16, so values beyond fp16's range saturate and nothing stored or decoded is infinite or NaN. A scale or zero
 * of -0 is stored as +0. Decoded value: float(code) * scale + zero. Sink tokens enter no range; their codes, and in V their scale and zero,
 * are 0, as are the scale and zero of a channel of which every token is a sink token; in 16 bits their rows are 0. */
#pragma once

#include "kernels/dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KV_BLOCK = 128,        /* G: quantization group, cache block and unit of ownership, tokens */
    KV_MAX_HEAD_DIM = 128,
    KV_MAX_FEATURES = 512, /* D: features of the correction */
};

struct page_format {
    int head_dim;       /* 64 or 128 */
    int k_bits, v_bits; /* 2, 4, 8, or 16: kept in the window's type as they are */
    enum dtype window;  /* type of the 16-bit blocks: F16, BF16, or F32 (oracle tests on CPU) */
};

/* Bytes of one record (one KV head, K and V), a multiple of 16. Exact: this is what is allocated. */
size_t page_record_bytes(const struct page_format *format);

/* Largest finite value of the scale and zero of fp16: ranges beyond are clamped to it, so no code is computed from an infinity. */
#define PAGE_MAX_SCALE 65504.0f

#ifdef __cplusplus
}
#endif
