/* Conversions between number formats. _Float16 gives the compiler's own correctly rounded conversion (F16C where the
 * target has it); bfloat16 is the upper half of a float, rounded to nearest even. */
#include "kernels/dtype.h"

#include <string.h>

enum { BLOCK = 32 }; /* values of a block in GGUF's Q4_0, Q4_1 and Q8_0 */

static const struct {
    const char *name;
    int block;
    size_t bytes;
} formats[DTYPE_COUNT] = {
    [DTYPE_F32] = {"F32", 1, 4},       [DTYPE_F16] = {"F16", 1, 2},
    [DTYPE_BF16] = {"BF16", 1, 2},     [DTYPE_I32] = {"I32", 1, 4},
    [DTYPE_Q4_0] = {"Q4_0", BLOCK, 18}, [DTYPE_Q4_1] = {"Q4_1", BLOCK, 20},
    [DTYPE_Q8_0] = {"Q8_0", BLOCK, 34},
};

const char *dtype_name(enum dtype dtype) { return formats[dtype].name; }

int dtype_block(enum dtype dtype) { return formats[dtype].block; }

size_t dtype_bytes(enum dtype dtype, int64_t n) {
    return (size_t)(n / formats[dtype].block) * formats[dtype].bytes;
}

float dtype_from_f16(uint16_t bits) {
    _Float16 h;
    memcpy(&h, &bits, sizeof h);
    return (float)h;
}

uint16_t dtype_to_f16(float value) {
    _Float16 h = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &h, sizeof bits);
    return bits;
}

float dtype_from_bf16(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

uint16_t dtype_to_bf16(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(word >> 16 | 0x40u); /* quiet NaN */
    return (uint16_t)((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

static uint16_t load_u16(const uint8_t *bytes) {
    uint16_t bits;
    memcpy(&bits, bytes, sizeof bits);
    return bits;
}

/* Both 4-bit formats put value i of a block in the low nibble of byte i, value i + 16 in the high one. */
static void widen_nibbles(const uint8_t *quants, float scale, float offset, float *dst) {
    for (int i = 0; i < BLOCK / 2; i++) {
        dst[i] = (float)(quants[i] & 15) * scale + offset;
        dst[i + BLOCK / 2] = (float)(quants[i] >> 4) * scale + offset;
    }
}

static void widen_block(enum dtype dtype, const uint8_t *block, float *dst) {
    float d = dtype_from_f16(load_u16(block));
    switch (dtype) {
    case DTYPE_Q4_0:
        for (int i = 0; i < BLOCK / 2; i++) {
            dst[i] = (float)((block[2 + i] & 15) - 8) * d;
            dst[i + BLOCK / 2] = (float)((block[2 + i] >> 4) - 8) * d;
        }
        break;
    case DTYPE_Q4_1:
        widen_nibbles(block + 4, d, dtype_from_f16(load_u16(block + 2)), dst);
        break;
    default: /* DTYPE_Q8_0 */
        for (int i = 0; i < BLOCK; i++)
            dst[i] = (float)(int8_t)block[2 + i] * d;
    }
}

void dtype_widen(enum dtype dtype, const void *src, float *dst, int64_t n) {
    const uint8_t *bytes = src;
    switch (dtype) {
    case DTYPE_F32:
        memcpy(dst, src, (size_t)n * sizeof *dst);
        break;
    case DTYPE_F16:
        for (int64_t i = 0; i < n; i++)
            dst[i] = dtype_from_f16(load_u16(bytes + 2 * i));
        break;
    case DTYPE_BF16:
        for (int64_t i = 0; i < n; i++)
            dst[i] = dtype_from_bf16(load_u16(bytes + 2 * i));
        break;
    default:
        for (int64_t i = 0; i < n / BLOCK; i++)
            widen_block(dtype, bytes + (size_t)i * formats[dtype].bytes, dst + i * BLOCK);
    }
}

void dtype_narrow(enum dtype dtype, const float *src, void *dst, int64_t n) {
    uint8_t *bytes = dst;
    if (dtype == DTYPE_F32) {
        memcpy(dst, src, (size_t)n * sizeof *src);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits = dtype == DTYPE_F16 ? dtype_to_f16(src[i]) : dtype_to_bf16(src[i]);
        memcpy(bytes + 2 * i, &bits, sizeof bits);
    }
}
