/* Encodes and decodes page records: the only place where codes, scales and zeros are computed (page.h has the rules).
 *
 * A group is one row of a matrix [groups][length]: V as it is, K transposed. So one routine quantizes both, and since the code
 * matrix of either part is that same matrix row by row, one routine packs both. Nothing here depends on the number of threads. */
#include "kernels/cpu/page.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd.h"

enum { BLOCK_VALUES = KV_BLOCK * KV_MAX_HEAD_DIM };

/* Whole vectors, each type by its own instructions. */
static void widen(enum dtype dtype, const void *values, float *out, int64_t n) {
    switch (dtype) {
    case DTYPE_F16:
        for (int64_t i = 0; i < n; i += V16)
            v16_store(out + i, v16_load_as(DTYPE_F16, values, i));
        break;
    case DTYPE_BF16:
        for (int64_t i = 0; i < n; i += V16)
            v16_store(out + i, v16_load_as(DTYPE_BF16, values, i));
        break;
    default:
        memcpy(out, values, (size_t)n * sizeof *out);
    }
}

void cpu_page_widen(const struct page_format *format, const void *values, float *out, int64_t n) {
    widen(format->window, values, out, n);
    for (int64_t i = 0; i < n; i++) {
        float x = out[i] == out[i] ? out[i] : 0.0f;
        x = x > FLT_MAX ? FLT_MAX : x;
        out[i] = x < -FLT_MAX ? -FLT_MAX : x;
    }
}

/* fp16 of a value clamped to what fp16 holds; -0 becomes +0, which min and max leave open for a group that holds both. */
static uint16_t clamp_to_f16(float x) {
    x = x > PAGE_MAX_SCALE ? PAGE_MAX_SCALE : x;
    x = x < -PAGE_MAX_SCALE ? -PAGE_MAX_SCALE : x;
    uint16_t bits = dtype_to_f16(x);
    return bits == 0x8000 ? 0 : bits;
}

/* Lanes side by side, because the compiler may not reorder one running minimum. */
static void find_range(const float *x, int n, float *min, float *max) {
    float low[PAGE_LANES], high[PAGE_LANES];
    for (int l = 0; l < PAGE_LANES; l++)
        low[l] = high[l] = x[0];
    for (int i = 0; i + PAGE_LANES <= n; i += PAGE_LANES) {
        for (int l = 0; l < PAGE_LANES; l++) {
            low[l] = x[i + l] < low[l] ? x[i + l] : low[l];
            high[l] = x[i + l] > high[l] ? x[i + l] : high[l];
        }
    }
    for (int i = n - n % PAGE_LANES; i < n; i++) {
        low[0] = x[i] < low[0] ? x[i] : low[0];
        high[0] = x[i] > high[0] ? x[i] : high[0];
    }
    *min = low[0];
    *max = high[0];
    for (int l = 1; l < PAGE_LANES; l++) {
        *min = low[l] < *min ? low[l] : *min;
        *max = high[l] > *max ? high[l] : *max;
    }
}

/* Codes of the n >= 1 values of a group. */
static void quantize_group(const float *x, int n, int bits, uint8_t *code, uint16_t *scale, uint16_t *zero) {
    float top = (float)((1 << bits) - 1);
    float min, max;
    find_range(x, n, &min, &max);
    *scale = clamp_to_f16((max - min) / top);
    *zero = clamp_to_f16(min);
    if (*scale == 0) {
        memset(code, 0, (size_t)n);
        return;
    }
    float s = dtype_from_f16(*scale), z = dtype_from_f16(*zero);
    for (int i = 0; i < n; i++) {
        float q = (x[i] - z) / s;
        q = q > 0.0f ? q : 0.0f;
        q = q < top ? q : top;
        code[i] = (uint8_t)(int)rintf(q);
    }
}

/* The words of a code matrix, row by row (page.h has the layout): entry e of word vector w are the 16 codes from 16 (w * 32/b + e). */
static void pack_codes(const uint8_t *code, int n, int bits, uint8_t *to) {
    int per_word = 32 / bits;
    for (int w = 0; w < n / (PAGE_LANES * per_word); w++) {
        uint32_t words[PAGE_LANES] = {0};
        const uint8_t *from = code + (size_t)w * PAGE_LANES * (size_t)per_word;
        for (int e = 0; e < per_word; e++)
            for (int l = 0; l < PAGE_LANES; l++)
                words[l] |= (uint32_t)from[e * PAGE_LANES + l] << (bits * e);
        memcpy(to + (size_t)w * sizeof words, words, sizeof words);
    }
}

static void unpack_codes(const uint32_t *words, int n, int bits, uint8_t *code) {
    int per_word = 32 / bits;
    uint32_t mask = (1u << bits) - 1;
    for (int w = 0; w < n / (PAGE_LANES * per_word); w++)
        for (int e = 0; e < per_word; e++)
            for (int l = 0; l < PAGE_LANES; l++)
                code[(w * per_word + e) * PAGE_LANES + l] =
                    (uint8_t)(words[w * PAGE_LANES + l] >> (bits * e) & mask);
}

/* Codes [groups][length], then scales and zeros. */
static void write_part(const uint8_t *code, const uint16_t *scale, const uint16_t *zero, int d, int bits, int groups,
                       uint8_t *part) {
    size_t scale_bytes = sizeof *scale * (size_t)groups;
    pack_codes(code, KV_BLOCK * d, bits, part);
    part += cpu_page_codes_bytes(d, bits);
    memcpy(part, scale, scale_bytes);
    memcpy(part + scale_bytes, zero, scale_bytes);
}

static void copy_rows(const struct page_format *format, const void *rows, int first, uint8_t *part) {
    size_t row_bytes = dtype_bytes(format->window, format->head_dim);
    size_t skipped = (size_t)first * row_bytes;
    memset(part, 0, skipped);
    memcpy(part + skipped, (const uint8_t *)rows + skipped, (size_t)KV_BLOCK * row_bytes - skipped);
}

void cpu_page_encode_k(const struct page_format *format, const void *rows, int first, uint8_t *record) {
    int d = format->head_dim;
    float x[BLOCK_VALUES], channel[KV_BLOCK];
    uint8_t code[BLOCK_VALUES];
    uint16_t scale[KV_MAX_HEAD_DIM] = {0}, zero[KV_MAX_HEAD_DIM] = {0};
    if (format->k_bits == 16) {
        copy_rows(format, rows, first, record);
        return;
    }
    cpu_page_widen(format, rows, x, (int64_t)KV_BLOCK * d);
    memset(code, 0, (size_t)KV_BLOCK * (size_t)d);
    for (int c = 0; c < d && first < KV_BLOCK; c++) {
        for (int t = first; t < KV_BLOCK; t++)
            channel[t] = x[t * d + c];
        quantize_group(channel + first, KV_BLOCK - first, format->k_bits, code + c * KV_BLOCK + first, &scale[c], &zero[c]);
    }
    write_part(code, scale, zero, d, format->k_bits, d, record);
}

void cpu_page_encode_v(const struct page_format *format, const void *rows, int first, uint8_t *record) {
    int d = format->head_dim;
    uint8_t *part = record + cpu_page_v_offset(format);
    float x[BLOCK_VALUES];
    uint8_t code[BLOCK_VALUES];
    uint16_t scale[KV_BLOCK] = {0}, zero[KV_BLOCK] = {0};
    if (format->v_bits == 16) {
        copy_rows(format, rows, first, part);
        return;
    }
    cpu_page_widen(format, rows, x, (int64_t)KV_BLOCK * d);
    memset(code, 0, (size_t)first * (size_t)d);
    for (int t = first; t < KV_BLOCK; t++)
        quantize_group(x + t * d, d, format->v_bits, code + t * d, &scale[t], &zero[t]);
    write_part(code, scale, zero, d, format->v_bits, KV_BLOCK, part);
}

void cpu_page_decode_k(const struct page_format *format, const uint8_t *record, float *k) {
    int d = format->head_dim;
    uint8_t code[BLOCK_VALUES];
    float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
    if (format->k_bits == 16) {
        widen(format->window, record, k, (int64_t)KV_BLOCK * d);
        return;
    }
    struct cpu_page_part part = cpu_page_part_of(record, d, format->k_bits, d);
    unpack_codes(part.codes, KV_BLOCK * d, format->k_bits, code);
    dtype_widen(DTYPE_F16, part.scale, scale, d);
    dtype_widen(DTYPE_F16, part.zero, zero, d);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++)
            k[t * d + c] = (float)code[c * KV_BLOCK + t] * scale[c] + zero[c];
}

void cpu_page_decode_v(const struct page_format *format, const uint8_t *record, float *v) {
    int d = format->head_dim;
    const uint8_t *bytes = record + cpu_page_v_offset(format);
    uint8_t code[BLOCK_VALUES];
    float scale[KV_BLOCK], zero[KV_BLOCK];
    if (format->v_bits == 16) {
        widen(format->window, bytes, v, (int64_t)KV_BLOCK * d);
        return;
    }
    struct cpu_page_part part = cpu_page_part_of(bytes, d, format->v_bits, KV_BLOCK);
    unpack_codes(part.codes, KV_BLOCK * d, format->v_bits, code);
    dtype_widen(DTYPE_F16, part.scale, scale, KV_BLOCK);
    dtype_widen(DTYPE_F16, part.zero, zero, KV_BLOCK);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++)
            v[t * d + c] = (float)code[t * d + c] * scale[t] + zero[t];
}

void cpu_unpack(const struct unpack_args *args) {
    cpu_page_decode_k(&args->format, args->record, args->k);
    cpu_page_decode_v(&args->format, args->record, args->v);
}
