/* The GPU's layout of a page record: its own secret, shared only by the files that encode (flush.cu), read (attend.cu,
 * attend_block.cu) and unpack. Sizes are those of kernels/page.c.
 *
 * A record is a K part and then a V part. A part of 16 bits is plain rows [KV_BLOCK][d] of the window's type. A part of
 * b = 2, 4, 8 bits is codes, then parameters, arranged so that a warp loads the A fragments of mma.m16n8k16 as they are:
 * lane l reads 16 contiguous bytes, and one AND makes a word of them a pair of fp16 subnormals (code * 2^(b p) * 2^-24).
 *
 *  - The matrix is cut into tiles of 16 rows (K: tokens, V: channels) and k-steps of 16 columns (K: channels, V: tokens).
 *    Element (row i, column k) of a tile and k-step belongs to lane 4 (i % 8) + (k % 8) / 2, register (i / 8) + 2 (k / 8), half k % 2:
 *    the A fragment of the PTX manual.
 *  - Steps are numbered u = tile * n_steps + step. A 32-bit word holds the pairs of P = 16 / b successive steps of one lane and
 *    register: step u lies in chunk u / P at bit b (u % P) (low half) and 16 + b (u % P) (high half). A chunk is
 *    [lane 32][register 4] words, 512 bytes.
 *  - Columns of K are channels in an order that lets 16-bit rows be read 16 bytes a lane, with the same registers of q: channel
 *    c stands in step 2 (c / 32) + (c % 8) / 4, column 2 t + e (e = c % 4 < 2) or 8 + 2 t + e - 2 (e >= 2), t = (c % 32) / 8.
 *    So lane t = lane % 4 has, of q, channels 32 j + 8 t .. 32 j + 8 t + 7 for j = 0 .. d/32 - 1: step 2j the first four, 2j+1 the last.
 *    Rows of K (tokens), rows of V (channels) and columns of V (tokens) are in order.
 *  - Parameters of K: [step d/16][t 4]{scale of its four channels, e = 0..3; zero of the same} fp16, 16 bytes a lane and step.
 *    Parameters of V: [step 8][g 8]{scale, zero of token 16 step + g; scale, zero of token 16 step + g + 8} fp16, 8 bytes.
 *  - Three bits will be a 2-bit plane and a 1-bit plane of this shape. */
#pragma once

#include "kernels/page.h"

enum { PAGE_CHUNK_BYTES = 512 };

HOST_DEVICE static inline int page_codes_bytes(int d, int bits) { return KV_BLOCK * d * bits / 8; }

/* Bytes of the K part; the V part begins there. */
HOST_DEVICE static inline int page_v_offset(const struct page_format *f) {
    if (f->k_bits == 16)
        return KV_BLOCK * f->head_dim * 2; /* F16 and BF16 only on GPUs */
    return page_codes_bytes(f->head_dim, f->k_bits) + 4 * f->head_dim;
}

/* As page_record_bytes, for kernels. */
HOST_DEVICE static inline int page_record_size(const struct page_format *f) {
    int v = f->v_bits == 16 ? KV_BLOCK * f->head_dim * 2 : page_codes_bytes(f->head_dim, f->v_bits) + 4 * KV_BLOCK;
    return (page_v_offset(f) + v + 15) / 16 * 16;
}

/* Step and column of channel c in K. */
HOST_DEVICE static inline void page_k_column(int c, int *step, int *column) {
    int t = c % 32 / 8, e = c % 4;
    *step = 2 * (c / 32) + c % 8 / 4;
    *column = e < 2 ? 2 * t + e : 8 + 2 * t + e - 2;
}

/* Index of the 32-bit word of the codes, and bit, of row `row` (whole matrix), step `step` of n_steps and column `column` of 16. */
HOST_DEVICE static inline void page_code_place(int bits, int n_steps, int row, int step, int column, int *word, int *bit) {
    int u = row / 16 * n_steps + step, per_word = 16 / bits;
    int lane = row % 8 * 4 + column % 8 / 2, reg = row % 16 / 8 + 2 * (column / 8);
    *word = (u / per_word * 32 + lane) * 4 + reg;
    *bit = 16 * (column % 2) + bits * (u % per_word);
}

/* Byte offset, from the start of the parameters, of the scale of channel c of K (its zero: 8 bytes on). */
HOST_DEVICE static inline int page_k_parameter(int c) {
    int t = c % 32 / 8, step = 2 * (c / 32) + c % 8 / 4;
    return (step * 4 + t) * 16 + c % 4 * 2;
}

/* The same for token `token` of V (its zero: 2 bytes on). */
HOST_DEVICE static inline int page_v_parameter(int token) {
    return (token / 16 * 8 + token % 8) * 8 + token % 16 / 8 * 4;
}
