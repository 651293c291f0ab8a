/* Conversions between number formats. _Float16 gives the compiler's own correctly rounded conversion (F16C where the
 * target has it); bfloat16 is the upper half of a float, rounded to nearest even. */
#include "kernels/dtype.h"

#include <string.h>

enum {
    BLOCK = 32,                       /* values of a block in GGUF's formats without K, of a run with one scale in Q4_K and Q5_K */
    SUPER_BLOCK = DTYPE_MOST_BLOCK,   /* values of a block in GGUF's K formats */
    N_RUNS = SUPER_BLOCK / BLOCK,
    SCALES_BYTES = 12,                /* Q4_K and Q5_K: N_RUNS scales and as many minima, 6 bits each */
    HIGH_BITS_BYTES = SUPER_BLOCK / 8, /* Q5_K */
};

static const struct {
    const char *name;
    int block;
    size_t bytes;
} formats[DTYPE_COUNT] = {
    [DTYPE_F32] = {"F32", 1, 4},       [DTYPE_F16] = {"F16", 1, 2},
    [DTYPE_BF16] = {"BF16", 1, 2},     [DTYPE_I32] = {"I32", 1, 4},
    [DTYPE_Q4_0] = {"Q4_0", BLOCK, 18}, [DTYPE_Q4_1] = {"Q4_1", BLOCK, 20},
    [DTYPE_Q8_0] = {"Q8_0", BLOCK, 34}, [DTYPE_Q5_0] = {"Q5_0", BLOCK, 22},
    [DTYPE_Q5_1] = {"Q5_1", BLOCK, 24}, [DTYPE_Q4_K] = {"Q4_K", SUPER_BLOCK, 144},
    [DTYPE_Q5_K] = {"Q5_K", SUPER_BLOCK, 176}, [DTYPE_Q6_K] = {"Q6_K", SUPER_BLOCK, 210},
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

/* Nibbles placed as in widen_nibbles; bit i of `high` is bit 4 of value i. */
static void widen_fives(const uint8_t *high, const uint8_t *quants, int minus, float scale, float offset, float *dst) {
    uint32_t bits;
    memcpy(&bits, high, sizeof bits);
    for (int i = 0; i < BLOCK / 2; i++) {
        int first = (quants[i] & 15) | (int)(bits >> i & 1) << 4;
        int second = quants[i] >> 4 | (int)(bits >> (i + BLOCK / 2) & 1) << 4;
        dst[i] = (float)(first - minus) * scale + offset;
        dst[i + BLOCK / 2] = (float)(second - minus) * scale + offset;
    }
}

/* Scale and minimum of run `run`: those of runs 0 to 3 are the low 6 bits of bytes 0 to 3 and 4 to 7; of the others, bytes 8 to 11 hold
 * the low 4 bits (scale in the low nibble), and the top bits of bytes 0 to 3 and 4 to 7 the high 2. */
static void unpack_scale(const uint8_t *packed, int run, int *scale, int *minimum) {
    if (run < 4) {
        *scale = packed[run] & 63;
        *minimum = packed[run + 4] & 63;
        return;
    }
    *scale = (packed[run + 4] & 15) | packed[run - 4] >> 6 << 4;
    *minimum = packed[run + 4] >> 4 | packed[run] >> 6 << 4;
}

/* Q4_K and, with `high`, Q5_K. Runs 2i and 2i + 1 are the low and the high nibbles of the same 32 bytes; bit r of high[i] is bit 4 of
 * value i of run r. */
static void widen_runs(const uint8_t *block, const uint8_t *high, const uint8_t *quants, float *dst) {
    float d = dtype_from_f16(load_u16(block)), m = dtype_from_f16(load_u16(block + 2));
    for (int run = 0; run < N_RUNS; run++) {
        int scale, minimum;
        unpack_scale(block + 4, run, &scale, &minimum);
        float of_run = d * (float)scale, least = m * (float)minimum;
        const uint8_t *nibbles = quants + run / 2 * BLOCK;
        for (int i = 0; i < BLOCK; i++) {
            int q = nibbles[i] >> (run % 2 * 4) & 15;
            if (high)
                q |= (high[i] >> run & 1) << 4;
            dst[run * BLOCK + i] = (float)q * of_run - least;
        }
    }
}

/* Each half of a block is four rows of 32 values: nibbles of rows 0 and 2 share 32 bytes, of rows 1 and 3 the next 32; the two high bits
 * of the four rows share one byte. Every 16 values have a scale. */
static void widen_sixes(const uint8_t *block, float *dst) {
    enum { HALF = SUPER_BLOCK / 2, SCALED = 16 };
    const uint8_t *low = block, *high = block + SUPER_BLOCK / 2, *scales = high + SUPER_BLOCK / 4;
    float d = dtype_from_f16(load_u16(scales + SUPER_BLOCK / SCALED));
    for (int value = 0; value < SUPER_BLOCK; value++) {
        int half = value / HALF, row = value % HALF / BLOCK, i = value % BLOCK;
        int nibble = low[half * HALF / 2 + row % 2 * BLOCK + i] >> (row / 2 * 4) & 15;
        int top = high[half * BLOCK + i] >> (2 * row) & 3;
        dst[value] = (d * (float)(int8_t)scales[value / SCALED]) * (float)((nibble | top << 4) - 32);
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
    case DTYPE_Q5_0:
        widen_fives(block + 2, block + 6, 16, d, -0.0f, dst); /* adding -0 leaves every value, and 0 its sign */
        break;
    case DTYPE_Q5_1:
        widen_fives(block + 4, block + 8, 0, d, dtype_from_f16(load_u16(block + 2)), dst);
        break;
    case DTYPE_Q4_K:
        widen_runs(block, NULL, block + 4 + SCALES_BYTES, dst);
        break;
    case DTYPE_Q5_K:
        widen_runs(block, block + 4 + SCALES_BYTES, block + 4 + SCALES_BYTES + HIGH_BITS_BYTES, dst);
        break;
    case DTYPE_Q6_K:
        widen_sixes(block, dst);
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
        for (int64_t i = 0; i < n / formats[dtype].block; i++)
            widen_block(dtype, bytes + (size_t)i * formats[dtype].bytes, dst + i * formats[dtype].block);
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
