/* The inner loops of attention over one block for a few query heads at once, out of registers.
 *
 * code_dot: out[h][o] = sum_i coef[h][i] * code(i, o) over the code matrix of a page (kernels/cpu/page.h); serves keys (i: channels,
 * o: tokens) and values (i: tokens, o: channels). One mask and conversion per 16 codes (and a shift where V16_FIELD_IN_PLACE is 0)
 * is shared by all heads; everything that varies by bits or width is a constant of one of the instances below. In place, a
 * field at bit `b` counts 2^b times as much; b = (row of the word) * step + (group) * bits, so one power of two comes off the
 * coefficients beforehand and one off the sums at the end, both exactly.
 * row_scores, row_values: the same two sums over plain rows of F32, F16 or BF16. */
#pragma once

#include "kernels/cpu/page.h"
#include "kernels/cpu/simd.h"

enum {
    DOT_HEADS = 4,                              /* heads of one register tile */
    DOT_GROUPS = V16_REGISTERS >= 32 ? 4 : 1,   /* vectors of 16 outputs of one register tile */
    DOT_STRIDE = KV_BLOCK,                      /* floats from head to head of coef and out; KV_MAX_HEAD_DIM is no larger */
};

/* Columns 16 g0 .. of a matrix with n_i rows and 16 n_g columns. A word vector holds 32/bits pairs: several rows where rows are
 * short, part of a row where they are long; `period` rows fill whole words. */
SIMD_INLINE void code_dot_tile(int bits, int n_g, int g0, int n_heads, int n_i, const uint32_t *codes, const float *coef, float *out) {
    const int per_word = 32 / bits, period = per_word > n_g ? per_word / n_g : 1, words = period * n_g / per_word;
    struct v16 acc[DOT_HEADS][DOT_GROUPS];
    for (int h = 0; h < n_heads; h++)
        for (int g = 0; g < DOT_GROUPS; g++)
            acc[h][g] = v16_set(0.0f);
    for (int i = 0; i < n_i; i += period, codes += words * PAGE_LANES) {
#pragma GCC unroll 8
        for (int r = 0; r < period; r++) {
#pragma GCC unroll 4
            for (int g = 0; g < DOT_GROUPS; g++) {
                int e = r * n_g + g0 + g;
                struct v16 code = v16_field(w16_load(codes + e / per_word * PAGE_LANES), bits * (e % per_word), bits);
#pragma GCC unroll 4
                for (int h = 0; h < n_heads; h++)
                    acc[h][g] = v16_fma(v16_set(coef[h * DOT_STRIDE + i + r]), code, acc[h][g]);
            }
        }
    }
    for (int h = 0; h < n_heads; h++)
        for (int g = 0; g < DOT_GROUPS; g++) {
            float factor = 1.0f / (float)(1u << (bits * ((g0 + g) % per_word)));
            v16_store(out + h * DOT_STRIDE + (g0 + g) * V16, V16_FIELD_IN_PLACE ? v16_mul(acc[h][g], v16_set(factor)) : acc[h][g]);
        }
}

/* Takes the power of two of each row within its word off the coefficients. */
SIMD_INLINE void code_dot_prepare(int bits, int n_g, int n_heads, int n_i, float *coef) {
    const int per_word = 32 / bits, period = per_word > n_g ? per_word / n_g : 1;
    float factor[V16];
    if (!V16_FIELD_IN_PLACE || period == 1)
        return;
    for (int i = 0; i < V16; i++)
        factor[i] = 1.0f / (float)(1u << (bits * n_g * (i % period)));
    for (int h = 0; h < n_heads; h++)
        for (int i = 0; i < n_i; i += V16)
            v16_store(coef + h * DOT_STRIDE + i, v16_mul(v16_load(coef + h * DOT_STRIDE + i), v16_load(factor)));
}

SIMD_INLINE void code_dot_width(int bits, int n_g, int n_heads, int n_i, const uint32_t *codes, float *coef, float *out) {
    code_dot_prepare(bits, n_g, n_heads, n_i, coef);
#pragma GCC unroll 8
    for (int g0 = 0; g0 < n_g; g0 += DOT_GROUPS)
        switch (n_heads) {
        case 1: code_dot_tile(bits, n_g, g0, 1, n_i, codes, coef, out); break;
        case 2: code_dot_tile(bits, n_g, g0, 2, n_i, codes, coef, out); break;
        case 3: code_dot_tile(bits, n_g, g0, 3, n_i, codes, coef, out); break;
        default: code_dot_tile(bits, n_g, g0, DOT_HEADS, n_i, codes, coef, out);
        }
}

#define CODE_DOT_INSTANCES(X) X(2, 4) X(2, 8) X(4, 4) X(4, 8) X(8, 4) X(8, 8)
#define CODE_DOT_DEFINE(bits, n_g)                                                                                                 \
    static __attribute__((noinline)) void code_dot_##bits##_##n_g(int n_heads, int n_i, const uint32_t *codes, float *coef,        \
                                                                  float *out) {                                                    \
        code_dot_width(bits, n_g, n_heads, n_i, codes, coef, out);                                                                 \
    }
CODE_DOT_INSTANCES(CODE_DOT_DEFINE)
#undef CODE_DOT_DEFINE

/* n_o: 64 or 128 columns; n_heads at most DOT_HEADS; `coef` is scratch afterwards. */
static inline void code_dot(int bits, int n_o, int n_heads, int n_i, const uint32_t *codes, float *coef, float *out) {
#define CODE_DOT_CALL(b, n_g)                             \
    if (bits == (b) && n_o == (n_g) * PAGE_LANES) {       \
        code_dot_##b##_##n_g(n_heads, n_i, codes, coef, out); \
        return;                                           \
    }
    CODE_DOT_INSTANCES(CODE_DOT_CALL)
#undef CODE_DOT_CALL
}

/* out[h][t] = coef[h] . rows[t] for tokens 0 .. n-1 of d values; up to three entries beyond n - 1 are overwritten. */
SIMD_INLINE void row_scores_tile(enum dtype dtype, int n_heads, int n, int d, const void *rows, const float *coef, float *out) {
    for (int t = 0; t < n; t += 4) {
        struct v16 acc[DOT_HEADS][4];
        int64_t at[4];
        for (int j = 0; j < 4; j++)
            at[j] = (int64_t)(t + j < n ? t + j : n - 1) * d; /* rows beyond n may not even be written yet */
        for (int h = 0; h < n_heads; h++)
            for (int j = 0; j < 4; j++)
                acc[h][j] = v16_set(0.0f);
        for (int c = 0; c < d; c += V16)
            for (int j = 0; j < 4; j++) {
                struct v16 row = v16_load_as(dtype, rows, at[j] + c);
                for (int h = 0; h < n_heads; h++)
                    acc[h][j] = v16_fma(v16_load(coef + h * DOT_STRIDE + c), row, acc[h][j]);
            }
        for (int h = 0; h < n_heads; h++)
            v16_sum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3], out + h * DOT_STRIDE + t);
    }
}

/* out[h][c] = sum over tokens 0 .. n-1 of coef[h][t] * rows[t][c]. */
SIMD_INLINE void row_values_tile(enum dtype dtype, int n_heads, int n, int d, const void *rows, const float *coef, float *out) {
    for (int c = 0; c < d; c += DOT_GROUPS * V16) {
        struct v16 acc[DOT_HEADS][DOT_GROUPS];
        for (int h = 0; h < n_heads; h++)
            for (int g = 0; g < DOT_GROUPS; g++)
                acc[h][g] = v16_set(0.0f);
        for (int t = 0; t < n; t++)
            for (int g = 0; g < DOT_GROUPS; g++) {
                struct v16 row = v16_load_as(dtype, rows, (int64_t)t * d + c + g * V16);
                for (int h = 0; h < n_heads; h++)
                    acc[h][g] = v16_fma(v16_set(coef[h * DOT_STRIDE + t]), row, acc[h][g]);
            }
        for (int h = 0; h < n_heads; h++)
            for (int g = 0; g < DOT_GROUPS; g++)
                v16_store(out + h * DOT_STRIDE + c + g * V16, acc[h][g]);
    }
}

#define ROW_DOT_HEADS(tile, dtype)                                                  \
    switch (n_heads) {                                                              \
    case 1: tile(dtype, 1, n, d, rows, coef, out); break;                           \
    case 2: tile(dtype, 2, n, d, rows, coef, out); break;                           \
    case 3: tile(dtype, 3, n, d, rows, coef, out); break;                           \
    default: tile(dtype, DOT_HEADS, n, d, rows, coef, out);                         \
    }
#define ROW_DOT_DEFINE(name)                                                                                            \
    static inline void name(enum dtype dtype, int n_heads, int n, int d, const void *rows, const float *coef, float *out) { \
        if (dtype == DTYPE_F16) {                                                                                       \
            ROW_DOT_HEADS(name##_tile, DTYPE_F16)                                                                       \
        } else if (dtype == DTYPE_BF16) {                                                                               \
            ROW_DOT_HEADS(name##_tile, DTYPE_BF16)                                                                      \
        } else {                                                                                                        \
            ROW_DOT_HEADS(name##_tile, DTYPE_F32)                                                                       \
        }                                                                                                               \
    }
ROW_DOT_DEFINE(row_scores)
ROW_DOT_DEFINE(row_values)
#undef ROW_DOT_DEFINE
#undef ROW_DOT_HEADS
