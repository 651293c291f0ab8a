/* The CPU's layout of a page record: its own secret, shared only by the files that encode (flush.c), read (attend.c) and unpack.
 *
 * A record is a K part and then a V part. A part of 16 bits is plain rows [KV_BLOCK][d] of the window's type. A part of b = 2, 4, 8
 * bits is a code matrix, then fp16 scales, then fp16 zeros. Both code matrices are code[i][o] with the index that attention sums over
 * first: K is [channel][token] (score of token o = sum over channels i), V is [token][channel]. So one inner loop serves both:
 * 16 neighbouring o share a vector of 16 words of 32 bits, lane L for o = 16 g + L, and a word holds the codes of 32/b successive
 * (i, g) pairs: pair e = i * (n_o / 16) + g sits in word vector e / (32/b), at bit b * (e % (32/b)). Unpacking 16 codes is one
 * shift and one mask, and lanes never move. Scales and zeros: K per channel [d], V per token [KV_BLOCK]. */
#pragma once

#include "kernels/page.h"

enum { PAGE_LANES = 16 }; /* words side by side: one AVX-512 register, two of AVX2, four of NEON */

static inline size_t cpu_page_codes_bytes(int d, int bits) { return (size_t)KV_BLOCK * (size_t)d * (size_t)bits / 8; }

/* Bytes of the K part (groups = d) or the V part (groups = KV_BLOCK). */
static inline size_t cpu_page_part_bytes(const struct page_format *f, int bits, int groups) {
    if (bits == 16)
        return dtype_bytes(f->window, (int64_t)KV_BLOCK * f->head_dim);
    return cpu_page_codes_bytes(f->head_dim, bits) + 2 * sizeof(uint16_t) * (size_t)groups;
}

static inline size_t cpu_page_v_offset(const struct page_format *f) {
    return cpu_page_part_bytes(f, f->k_bits, f->head_dim);
}

/* Where pair (i, o) of a code matrix with n_o columns lies: index of its 32-bit word and its bit. */
static inline void cpu_page_code_place(int bits, int n_o, int i, int o, size_t *word, int *bit) {
    int per_word = 32 / bits;
    int e = i * (n_o / PAGE_LANES) + o / PAGE_LANES;
    *word = (size_t)(e / per_word) * PAGE_LANES + (size_t)(o % PAGE_LANES);
    *bit = bits * (e % per_word);
}

/* One part of b <= 8 bits, taken apart. groups: number of scales. */
struct cpu_page_part {
    const uint32_t *codes;
    const uint16_t *scale, *zero; /* fp16 */
};
static inline struct cpu_page_part cpu_page_part_of(const uint8_t *part, int d, int bits, int groups) {
    struct cpu_page_part p;
    const uint8_t *scales = part + cpu_page_codes_bytes(d, bits);
    p.codes = (const uint32_t *)(const void *)part;
    p.scale = (const uint16_t *)(const void *)scales;
    p.zero = p.scale + groups;
    return p;
}

/* Quantizer and its inverse. rows: KV_BLOCK rows of head_dim values of the window's type, back to back; tokens before `first` are
 * sink tokens. Each call writes the K part or the V part of `record` whole, every byte of it; the two are disjoint. */
void cpu_page_encode_k(const struct page_format *format, const void *rows, int first, uint8_t *record);
void cpu_page_encode_v(const struct page_format *format, const void *rows, int first, uint8_t *record);

/* One part of a record -> float [KV_BLOCK][head_dim]. */
void cpu_page_decode_k(const struct page_format *format, const uint8_t *record, float *k);
void cpu_page_decode_v(const struct page_format *format, const uint8_t *record, float *v);

/* n values (a multiple of 16) of the window's type as the quantizer reads them: widened, NaN as 0, infinities as the largest float. */
void cpu_page_widen(const struct page_format *format, const void *values, float *out, int64_t n);
