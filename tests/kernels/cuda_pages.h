/* Random pages for tests, the same contents in the CPU's layout and in the GPU's, made without either backend's encoder: what is
 * compared is then attention alone. */
#pragma once

#include "kernels/cpu/page.h"
#include "kernels/cuda/page.cuh"
#include "test.h"

/* A scale and a zero as an encoder would give for values of about [-2, 2], +-50 % from group to group. */
static inline void pages_parameters(uint64_t seed, int group, int bits, uint16_t *scale, uint16_t *zero) {
    float range = 3.0f + 1.5f * test_uniform(seed, 2 * (uint64_t)group);
    *scale = dtype_to_f16(range / (float)((1 << bits) - 1));
    *zero = dtype_to_f16(-0.5f * range + 0.5f * test_uniform(seed, 2 * (uint64_t)group + 1));
}

static inline uint16_t pages_narrow(enum dtype dtype, float x) {
    return dtype == DTYPE_F16 ? dtype_to_f16(x) : dtype_to_bf16(x);
}

/* Rows [KV_BLOCK][d] of the window's type; those before `begin` are 0, as the encoders leave them. */
static inline void pages_make_rows(const struct page_format *f, uint64_t seed, int begin, uint8_t *cpu_part, uint8_t *cuda_part) {
    for (int i = 0; i < KV_BLOCK * f->head_dim; i++) {
        float x = i < begin * f->head_dim ? 0.0f : 2.0f * test_uniform(seed, (uint64_t)i);
        uint16_t bits = pages_narrow(f->window, x);
        memcpy(cpu_part + 2 * i, &bits, sizeof bits);
        memcpy(cuda_part + 2 * i, &bits, sizeof bits);
    }
}

static inline void pages_put_code(uint8_t *part, int word, int bit, uint32_t code) {
    uint32_t x;
    memcpy(&x, part + 4 * (size_t)word, sizeof x);
    x |= code << bit;
    memcpy(part + 4 * (size_t)word, &x, sizeof x);
}

static inline void pages_put_half(uint8_t *at, uint16_t bits) { memcpy(at, &bits, sizeof bits); }

/* Scales and zeros of a part of codes: `groups` channels of K or tokens of V, those of V before `begin` 0. */
static inline void pages_make_parameters(const struct page_format *f, bool key, uint64_t seed, int begin, uint8_t *cpu_part,
                                         uint8_t *cuda_part) {
    int d = f->head_dim, bits = key ? f->k_bits : f->v_bits, groups = key ? d : KV_BLOCK;
    uint8_t *cpu = cpu_part + cpu_page_codes_bytes(d, bits), *cuda = cuda_part + page_codes_bytes(d, bits);
    for (int g = 0; g < groups; g++) {
        uint16_t scale = 0, zero = 0;
        if (key ? begin < KV_BLOCK : g >= begin)
            pages_parameters(seed, g, bits, &scale, &zero);
        pages_put_half(cpu + 2 * g, scale);
        pages_put_half(cpu + 2 * (groups + g), zero);
        int at = key ? page_k_parameter(g) : page_v_parameter(g);
        pages_put_half(cuda + at, scale);
        pages_put_half(cuda + at + (key ? 8 : 2), zero);
    }
}

/* The K part (key) or V part of a record: codes and parameters, or 16-bit rows, from (seed, index). Tokens before `begin` are sink tokens.
 * Both parts are written whole; they have the same size, that of cpu_page_part_bytes. */
static inline void pages_make_part(const struct page_format *f, bool key, uint64_t seed, int begin, uint8_t *cpu_part, uint8_t *cuda_part) {
    int d = f->head_dim, bits = key ? f->k_bits : f->v_bits;
    if (bits == 16) {
        pages_make_rows(f, seed, begin, cpu_part, cuda_part);
        return;
    }
    memset(cpu_part, 0, cpu_page_codes_bytes(d, bits));
    memset(cuda_part, 0, cpu_page_codes_bytes(d, bits));
    for (int token = begin; token < KV_BLOCK; token++)
        for (int c = 0; c < d; c++) {
            uint32_t code = (uint32_t)test_hash(seed + 1, (uint64_t)(token * d + c)) & ((1u << bits) - 1);
            size_t cpu_word;
            int word, bit, cpu_bit, step, column;
            if (key) {
                cpu_page_code_place(bits, KV_BLOCK, c, token, &cpu_word, &cpu_bit);
                page_k_column(c, &step, &column);
                page_code_place(bits, d / 16, token, step, column, &word, &bit);
            } else {
                cpu_page_code_place(bits, d, token, c, &cpu_word, &cpu_bit);
                page_code_place(bits, KV_BLOCK / 16, c, token / 16, token % 16, &word, &bit);
            }
            pages_put_code(cpu_part, (int)cpu_word, cpu_bit, code);
            pages_put_code(cuda_part, word, bit, code);
        }
    pages_make_parameters(f, key, seed + 2, begin, cpu_part, cuda_part);
}

/* A whole record in both layouts, page_record_bytes each. */
static inline void pages_make_record(const struct page_format *f, uint64_t seed, int begin, uint8_t *cpu_record, uint8_t *cuda_record) {
    memset(cpu_record, 0, page_record_bytes(f));
    memset(cuda_record, 0, page_record_bytes(f));
    pages_make_part(f, true, 8 * seed, begin, cpu_record, cuda_record);
    pages_make_part(f, false, 8 * seed + 4, begin, cpu_record + cpu_page_v_offset(f), cuda_record + page_v_offset(f));
}
