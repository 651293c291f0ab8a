/* What one warp does with a block of up to 128 tokens for 16 query vectors: scores, weights, weighted values, in tensor cores with
 * sums in float. For attend_block.cu only.
 *
 * Queries are the A operand, tokens (scores) or channels (values) the 8 columns of B: a record's words, arranged as A fragments of 16
 * rows, are two B fragments of 8 rows as they stand, so a block is used from shared memory as it was copied. One AND makes a word a
 * pair of fp16 subnormals (page.cuh), exact; K's scales go into q, V's into p, zeros into float sums. What is rounded is split: q times
 * scale is two fp16 numbers (error 2^-22), p times scale is one (2^-11 of each weight). Both are multiplied by powers of two
 * beforehand, so that the largest lies near the top of fp16 and small ones survive.
 *
 * Lane 4 g + t holds rows g and g + 8 of a fragment (r = 0, 1); of q, the channels 32 j + 8 t .. + 7 of both rows, in the order of K's
 * columns in a page; of scores, tokens 8 n + 2 t, + 1. Scores are in units of log2(e). */
#pragma once

#include <float.h>

#include "kernels/cuda/attend.cuh"

enum {
    TOKEN_TILES = KV_BLOCK / 8,  /* B fragments of tokens */
    TOKEN_STEPS = KV_BLOCK / 16, /* k-steps over tokens */
    GROUP_STEPS = 4,             /* k-steps whose codes are taken together: 64 columns */
    SUBNORMAL = 24,              /* a code in the low bits of an fp16 number counts 2^-24 */
    TOP_EXPONENT = 13,           /* of the largest scale after normalizing; q adds 1, so A operands stay below 2^15 */
    Q_BOOST = 10,                /* q (below 4) as fp16: 2^10 above, so that the lower part is no subnormal */
    P_BOOST = 14,                /* the same for p (at most 1) */
    MIN_F16_EXPONENT = -24,
    MIN_Q_EXPONENT = -100,       /* a query of zeros: any exponent will do whose inverse is finite */
    MAX_Q_EXPONENT = 126,
};

#define M_NONE (-FLT_MAX)        /* the max of no scores: finite, so that no inf - inf arises */
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

/* Rows of 16 bits in shared memory, padded. K is read 16 bytes a lane, two rows at a time: 64 bytes more than a multiple of 128.
 * V is read by ldmatrix, eight rows at a time: 16 more. */
__host__ __device__ constexpr int k_row_bytes(int d) { return 2 * d + 64; }
__host__ __device__ constexpr int v_row_bytes(int d) { return 2 * d + 16; }

struct block_piece {         /* one block in shared memory, the same for all lanes */
    const uint8_t *k, *v;    /* codes as in a record, or unpacked (attend_unpack.cuh), or padded rows; rows that do not count are 0 */
    const uint4 *k_parameters, *v_parameters; /* of codes */
    int k_bits, v_bits;
    bool masked;             /* tokens begin .. end-1 count, and in the current block those up to a row's own position */
    bool current;
    int begin, end;
    const float *mean;       /* [KV_BLOCK][D] of this KV head; NULL: none */
    const float *turn;       /* [cos, sin][D/2] of the angles of the block's first position; with mean */
};

struct block_vector {  /* of a query vector, in shared memory: read by the four lanes of its row only */
    const void *q;     /* as given; NULL: beyond the last vector */
    int visible;       /* tokens of the current block that it sees */
    float inverse;     /* 2^-exponent */
    float factor;      /* 2^exponent times the scale of scores and log2(e) */
};

struct warp_queries {
    float4 *parts;                /* shared, this warp's: [k-step D/16][r 2][lane]: four channels of q or qH, divided by 2^exponent */
    struct block_vector *vectors; /* shared, this warp's [16]: row r of the lane is vector g + 8 r */
    int lane;
};

template <int D> struct warp_sums { /* shifted by m; l and z are a lane's own share of the row */
    float y[D / 8][4];
    float m[2], l[2];
    float z[2];        /* sum of p times V's zero: to be added to all channels */
};

/* The compiler may move no load across: left alone it brings them forward until accumulators no longer fit the registers. */
__device__ static inline void hold_loads(void) { __syncwarp(); }

__device__ static inline float power2(int n) { return __int_as_float((n + 127) << 23); }

__device__ static inline int exponent_of(float x, int low, int high) {
    return min(max((__float_as_int(x) >> 23 & 255) - 127, low), high);
}

__device__ static inline float fast_exp2(float x) { /* 2 units in the last place; 0 from -126 down */
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Over the four lanes of a row. */
__device__ static inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ static inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <typename T> __device__ constexpr bool window_is_f16() { return false; }
template <> __device__ constexpr bool window_is_f16<__half>() { return true; }

/* c += A B: A 16 x 16 (a), B 16 x 8 (b0, b1). */
template <typename T> __device__ static inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ inline void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two numbers of type T in a word, x below y, and back. */
template <typename T> __device__ static inline uint32_t pack(float x, float y);
template <> __device__ inline uint32_t pack<__half>(float x, float y) {
    __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
}
template <> __device__ inline uint32_t pack<__nv_bfloat16>(float x, float y) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
}
template <typename T> __device__ static inline float2 unpack(uint32_t word);
template <> __device__ inline float2 unpack<__half>(uint32_t word) { return __half22float2(*reinterpret_cast<__half2 *>(&word)); }
template <> __device__ inline float2 unpack<__nv_bfloat16>(uint32_t word) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&word));
}

/* Rounds two numbers and leaves what was rounded away. */
template <typename T> __device__ static inline uint32_t take(float &x, float &y) {
    uint32_t word = pack<T>(x, y);
    float2 taken = unpack<T>(word);
    x -= taken.x;
    y -= taken.y;
    return word;
}

/* ---- codes ---------------------------------------------------------------------------------------------------------- */

/* A lane's words of four k-steps u .. u + 3, u a multiple of 4, brought to where code_fragment expects them. */
template <int BITS> struct code_words {
    uint4 w[BITS == 8 ? 2 : 1];
};

template <int BITS> __device__ static inline code_words<BITS> code_load(const uint4 *codes, int u, int lane) {
    code_words<BITS> words;
    if (BITS == 2) {
        words.w[0] = codes[u / 8 * WARP + lane];
        if (u & 4) {
            words.w[0].x >>= 8, words.w[0].y >>= 8;
            words.w[0].z >>= 8, words.w[0].w >>= 8;
        }
    } else if (BITS == 4) {
        words.w[0] = codes[u / 4 * WARP + lane];
    } else {
        words.w[0] = codes[u / 2 * WARP + lane];
        words.w[BITS == 8] = codes[(u / 2 + 1) * WARP + lane];
    }
    return words;
}

/* Step i = 0..3 counts 2^code_exponent too much. */
template <int BITS> __device__ static constexpr int code_exponent(int i) { return BITS == 2 ? 2 * i : BITS == 4 ? 4 * (i % 2) : 0; }

template <int BITS> __device__ static inline uint32_t code_pair(uint32_t word, int i) {
    if (BITS == 2)
        return word & 0x00030003u << 2 * i;
    if (BITS == 4)
        return (i < 2 ? word : word >> 8) & 0x000f000fu << 4 * (i % 2);
    return (i % 2 ? word >> 8 : word) & 0x00ff00ffu;
}

/* Step i of the words for the 16 rows of a tile: c0 += a times rows 0-7, c1 += a times rows 8-15. */
template <int BITS>
__device__ static inline void code_mma(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const code_words<BITS> &words, int i) {
    const uint4 &w = words.w[BITS == 8 ? i / 2 : 0];
    mma<__half>(c0, a, code_pair<BITS>(w.x, i), code_pair<BITS>(w.z, i));
    mma<__half>(c1, a, code_pair<BITS>(w.y, i), code_pair<BITS>(w.w, i));
}

/* ---- queries ---------------------------------------------------------------------------------------------------------- */

template <typename T> __device__ static inline float4 load_four(const T *at) {
    uint2 words = *reinterpret_cast<const uint2 *>(at);
    float2 a = unpack<T>(words.x), b = unpack<T>(words.y);
    return make_float4(a.x, a.y, b.x, b.y);
}

/* v = H v over the D channels of a row, of which this lane has D/4 (v[8 j + e] is channel 32 j + 8 t + e): bits 0-2 of a channel's number
 * and those from 5 on are places in v, bits 3 and 4 are the lane's. */
template <int D> __device__ static inline void row_hadamard(float (&v)[D / 4], int lane) {
#pragma unroll
    for (int step = 1; step < D / 4; step *= 2)
#pragma unroll
        for (int i = 0; i < D / 4; i++)
            if (!(i & step)) {
                float a = v[i], b = v[i + step];
                v[i] = a + b;
                v[i + step] = a - b;
            }
#pragma unroll
    for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int i = 0; i < D / 4; i++) {
            float other = __shfl_xor_sync(0xffffffffu, v[i], step);
            v[i] = lane & step ? other - v[i] : v[i] + other;
        }
#pragma unroll
    for (int i = 0; i < D / 4; i++)
        v[i] *= D == 64 ? 0.125f : 0.08838834764831845f;
}

/* Puts q, or qH, normalized into parts. */
template <int D, typename T> __device__ static void queries_prepare(warp_queries &queries, bool rotate, float scale) {
    int lane = queries.lane, t = lane % 4;
#pragma unroll 1
    for (int r = 0; r < 2; r++) {
        struct block_vector *vector = &queries.vectors[lane / 4 + 8 * r];
        const T *q = (const T *)vector->q;
        float v[D / 4], big = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            float4 x = q ? load_four(q + i / 2 * 32 + 8 * t + i % 2 * 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            v[4 * i] = x.x, v[4 * i + 1] = x.y, v[4 * i + 2] = x.z, v[4 * i + 3] = x.w;
        }
#pragma unroll
        for (int i = 0; i < D / 4; i++)
            big = fmaxf(big, fabsf(v[i]));
        if (rotate) {
            row_hadamard<D>(v, lane);
#pragma unroll
            for (int i = 0; i < D / 4; i++)
                big = fmaxf(big, fabsf(v[i]));
        }
        int exponent = exponent_of(quad_max(big), MIN_Q_EXPONENT, MAX_Q_EXPONENT);
        float inverse = power2(-exponent);
        if (t == 0) {
            vector->inverse = inverse;
            vector->factor = power2(exponent) * (scale * LOG2_E);
        }
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            queries.parts[(i * 2 + r) * WARP + lane] =
                make_float4(v[4 * i] * inverse, v[4 * i + 1] * inverse, v[4 * i + 2] * inverse, v[4 * i + 3] * inverse);
    }
    __syncwarp();
}

/* ---- scores: s[n][..] of tokens 8 n .. 8 n + 7; unit s + shift is the score in units of log2(e) ------------------------ */

struct score_units { /* of the lane's two rows */
    float unit[2], shift[2];
};

__device__ static inline void scores_scale(float (&s)[TOKEN_TILES][4], float factor) {
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[n][e] *= factor;
}

/* Four channels of a row at k-step `step`, turned back by the block's first position: R_-jG q. */
template <int D, typename T>
__device__ static inline float4 query_turned(const T *row, int step, int t, const float *turn) {
    int c = step / 2 * 32 + 8 * t + step % 2 * 4;
    bool low = step < D / 32; /* the pair's first half */
    if (!row)
        return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 own = load_four(row + c), other = load_four(row + (low ? c + D / 2 : c - D / 2));
    float4 cosine = *reinterpret_cast<const float4 *>(turn + c % (D / 2));
    float4 sine = *reinterpret_cast<const float4 *>(turn + D / 2 + c % (D / 2));
    float sign = low ? 1.0f : -1.0f;
    return make_float4(own.x * cosine.x + sign * other.x * sine.x, own.y * cosine.y + sign * other.y * sine.y,
                       own.z * cosine.z + sign * other.z * sine.z, own.w * cosine.w + sign * other.w * sine.w);
}

/* s = (R_-jG q) . mean, both in two fp16 parts; the product of the lower ones is left out. Means beyond fp16's range become infinite. */
template <int D, typename T>
__device__ static void scores_mean(const block_piece &piece, const warp_queries &queries, float (&s)[TOKEN_TILES][4]) {
    int g = queries.lane / 4, t = queries.lane % 4;
#pragma unroll
    for (int first = 0; first < D / 16; first += GROUP_STEPS) {
        uint32_t high[GROUP_STEPS][4], low[GROUP_STEPS][4];
#pragma unroll
        for (int i = 0; i < GROUP_STEPS; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const struct block_vector *vector = &queries.vectors[g + 8 * r];
                float4 x = query_turned<D>((const T *)vector->q, first + i, t, piece.turn);
                float unit = vector->inverse * (float)(1 << Q_BOOST);
                x.x *= unit, x.y *= unit, x.z *= unit, x.w *= unit;
                high[i][r] = take<__half>(x.x, x.y), high[i][r + 2] = take<__half>(x.z, x.w);
                low[i][r] = pack<__half>(x.x, x.y), low[i][r + 2] = pack<__half>(x.z, x.w);
            }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
            for (int i = 0; i < GROUP_STEPS; i++) {
                const float *at = piece.mean + (8 * n + g) * D + (first + i) / 2 * 32 + 8 * t + i % 2 * 4;
                float4 x = __ldg(reinterpret_cast<const float4 *>(at));
                uint32_t b0 = take<__half>(x.x, x.y), b1 = take<__half>(x.z, x.w);
                mma<__half>(s[n], high[i], b0, b1);
                mma<__half>(s[n], low[i], b0, b1);
                mma<__half>(s[n], high[i], pack<__half>(x.x, x.y), pack<__half>(x.z, x.w));
            }
    }
    scores_scale(s, 1.0f / (float)(1 << Q_BOOST));
}

/* Four channels' products with their scales in two fp16 parts, and with their zeros into `dot`. */
__device__ static inline void query_scaled(float4 q, uint4 parameters, float unit, float &dot, uint32_t (&high)[4], uint32_t (&low)[4],
                                           int r) {
    float2 s01 = unpack<__half>(parameters.x), s23 = unpack<__half>(parameters.y);
    float2 z01 = unpack<__half>(parameters.z), z23 = unpack<__half>(parameters.w);
    float x0 = q.x * (s01.x * unit), x1 = q.y * (s01.y * unit), x2 = q.z * (s23.x * unit), x3 = q.w * (s23.y * unit);
    dot += q.x * z01.x;
    dot += q.y * z01.y;
    dot += q.z * z23.x;
    dot += q.w * z23.y;
    high[r] = take<__half>(x0, x1), high[r + 2] = take<__half>(x2, x3);
    low[r] = pack<__half>(x0, x1), low[r + 2] = pack<__half>(x2, x3);
}

/* The larger of each of two fp16 numbers >= 0. */
__device__ static inline uint32_t larger_pair(uint32_t a, uint32_t b) {
    __half2 pair = __hmax2(*reinterpret_cast<__half2 *>(&a), *reinterpret_cast<__half2 *>(&b));
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* Exponent of the largest of K's scales. */
template <int D> __device__ static inline int scale_exponent_k(const uint4 *parameters, int t) {
    uint32_t big = 0;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint4 p = parameters[step * 4 + t];
        big = larger_pair(big, larger_pair(p.x, p.y));
    }
    float2 two = unpack<__half>(big);
    return exponent_of(quad_max(fmaxf(two.x, two.y)), MIN_F16_EXPONENT, 15);
}

/* What `up` and the subnormals put into sums of products is taken out, and the zeros' products (dot) are added. */
__device__ static inline score_units codes_units(const warp_queries &queries, int up, const float (&dot)[2]) {
    score_units units;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float factor = queries.vectors[queries.lane / 4 + 8 * r].factor;
        units.unit[r] = power2(SUBNORMAL - up) * factor;
        units.shift[r] = quad_sum(dot[r]) * factor;
    }
    return units;
}

/* s += q . key for K in codes. */
template <int D, int BITS, bool MEAN>
__device__ static inline score_units scores_codes(const block_piece &piece, const warp_queries &queries, float (&s)[TOKEN_TILES][4]) {
    const uint4 *codes = reinterpret_cast<const uint4 *>(piece.k);
    const uint4 *parameters = piece.k_parameters;
    int lane = queries.lane, up = TOP_EXPONENT - scale_exponent_k<D>(parameters, lane % 4);
    float dot[2] = {0.0f, 0.0f};
    if (MEAN && piece.mean)
        scores_scale(s, power2(up - SUBNORMAL));
#pragma unroll
    for (int first = 0; first < D / 16; first += GROUP_STEPS) {
        uint32_t high[GROUP_STEPS][4], low[GROUP_STEPS][4];
#pragma unroll
        for (int i = 0; i < GROUP_STEPS; i++) {
            hold_loads();
            uint4 p = parameters[(first + i) * 4 + lane % 4];
            float unit = power2(up - code_exponent<BITS>(i));
#pragma unroll
            for (int r = 0; r < 2; r++)
                query_scaled(queries.parts[((first + i) * 2 + r) * WARP + lane], p, unit, dot[r], high[i], low[i], r);
        }
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES / 2; tile++) {
            if (tile % 2 == 0)
                hold_loads();
            code_words<BITS> words = code_load<BITS>(codes, tile * (D / 16) + first, lane);
#pragma unroll
            for (int i = 0; i < GROUP_STEPS; i++) {
                code_mma<BITS>(s[2 * tile], s[2 * tile + 1], high[i], words, i);
                code_mma<BITS>(s[2 * tile], s[2 * tile + 1], low[i], words, i);
            }
        }
    }
    return codes_units(queries, up, dot);
}

/* s += q . key for K in 16 bit, where q is exact: encoded keys alone are rotated. */
template <int D, typename T>
__device__ static inline score_units scores_rows(const block_piece &piece, const warp_queries &queries, float (&s)[TOKEN_TILES][4]) {
    int lane = queries.lane, g = lane / 4, t = lane % 4;
    const float boost = (float)(1 << Q_BOOST);
#pragma unroll
    for (int first = 0; first < D / 16; first += GROUP_STEPS) {
        uint32_t a[GROUP_STEPS][4];
#pragma unroll
        for (int i = 0; i < GROUP_STEPS; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float4 x = queries.parts[((first + i) * 2 + r) * WARP + lane];
                x.x *= boost, x.y *= boost, x.z *= boost, x.w *= boost;
                a[i][r] = take<T>(x.x, x.y), a[i][r + 2] = take<T>(x.z, x.w);
            }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
            for (int i = 0; i < GROUP_STEPS; i += 2) {
                const uint8_t *at = piece.k + (8 * n + g) * k_row_bytes(D) + ((first + i) / 2 * 32 + 8 * t) * 2;
                uint4 b = *reinterpret_cast<const uint4 *>(at);
                mma<T>(s[n], a[i], b.x, b.y);
                mma<T>(s[n], a[i + 1], b.z, b.w);
            }
    }
    return {{queries.vectors[g].factor / boost, queries.vectors[g + 8].factor / boost}, {0.0f, 0.0f}};
}

/* ---- weights ------------------------------------------------------------------------------------------------------ */

__device__ static inline void scores_mask(const block_piece &piece, const warp_queries &queries, float (&s)[TOKEN_TILES][4]) {
    int end[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
        end[r] = piece.current ? min(piece.end, queries.vectors[queries.lane / 4 + 8 * r].visible) : piece.end;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int token = 8 * n + 2 * (queries.lane % 4) + e % 2;
            if (token < piece.begin || token >= end[e / 2])
                s[n][e] = -INFINITY;
        }
}

/* y = y old. Maxima settle early: most blocks have nothing to do here. */
template <int D> __device__ static inline void sums_rescale(warp_sums<D> &sums, const float (&old)[2]) {
    if (__all_sync(0xffffffffu, old[0] == 1.0f && old[1] == 1.0f))
        return;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            sums.y[n][e] *= old[e / 2];
}

/* Scores to weights e^(score - top of this block) in place; all sums move on to the new max. What this block adds to y and z is to be
 * multiplied by `add`. The largest score is where s is largest: units are positive. */
template <int D>
__device__ static inline void scores_to_weights(const score_units &units, float (&s)[TOKEN_TILES][4], warp_sums<D> &sums,
                                                float (&add)[2]) {
    float old[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
            top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = fmaxf(fmaf(quad_max(top), units.unit[r], units.shift[r]), M_NONE);
        float shift = units.shift[r] - top;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            s[n][2 * r] = fast_exp2(fmaf(s[n][2 * r], units.unit[r], shift));
            s[n][2 * r + 1] = fast_exp2(fmaf(s[n][2 * r + 1], units.unit[r], shift));
            sum += s[n][2 * r] + s[n][2 * r + 1];
        }
        float m = fmaxf(sums.m[r], top);
        old[r] = fast_exp2(sums.m[r] - m);
        add[r] = fast_exp2(top - m);
        sums.m[r] = m;
        sums.l[r] = sums.l[r] * old[r] + sum * add[r];
        sums.z[r] *= old[r];
    }
    sums_rescale<D>(sums, old);
}

/* ---- values ------------------------------------------------------------------------------------------------------- */

/* y += c add for 8 N channels from 8 n on. */
template <int D, int N>
__device__ static inline void sums_add(warp_sums<D> &sums, int n, const float (&c)[N][4], float add0, float add1) {
#pragma unroll
    for (int k = 0; k < N; k++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            sums.y[n + k][e] += c[k][e] * (e < 2 ? add0 : add1);
}

/* Exponent of the largest of V's scales. A lane's 16 bytes of a step: scale and zero of tokens 2t, 2t + 8, 2t + 1, 2t + 9. */
__device__ static inline int scale_exponent_v(const uint4 *parameters, int t) {
    uint32_t big = 0;
#pragma unroll
    for (int step = 0; step < TOKEN_STEPS; step++) {
        uint4 p = parameters[step * 4 + t];
        big = larger_pair(big, larger_pair(larger_pair(p.x, p.y), larger_pair(p.z, p.w)));
    }
    return exponent_of(quad_max(unpack<__half>(big).x), MIN_F16_EXPONENT, 15);
}

/* p (in s) times V's scales, in fp16: the A operand of sum p v, to be multiplied by the power of two returned. The zeros' part goes to
 * sums.z. */
template <int D, int BITS>
__device__ static inline float weights_scaled(const uint4 *parameters, int lane, const float (&s)[TOKEN_TILES][4], const float (&add)[2],
                                              warp_sums<D> &sums, uint32_t (&a)[TOKEN_STEPS][4]) {
    int up = TOP_EXPONENT - scale_exponent_v(parameters, lane % 4);
    float zero[2] = {0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < TOKEN_STEPS; step++) {
        uint4 p = parameters[step * 4 + lane % 4];
        float2 t0 = unpack<__half>(p.x), t8 = unpack<__half>(p.y), t1 = unpack<__half>(p.z), t9 = unpack<__half>(p.w);
        float unit = power2(up - code_exponent<BITS>(step % GROUP_STEPS));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float p0 = s[2 * step][2 * r], p1 = s[2 * step][2 * r + 1], p8 = s[2 * step + 1][2 * r], p9 = s[2 * step + 1][2 * r + 1];
            a[step][r] = pack<__half>(p0 * (t0.x * unit), p1 * (t1.x * unit));
            a[step][r + 2] = pack<__half>(p8 * (t8.x * unit), p9 * (t9.x * unit));
            zero[r] += p0 * t0.y + p1 * t1.y + p8 * t8.y + p9 * t9.y;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
        sums.z[r] += zero[r] * add[r];
    return power2(SUBNORMAL - up);
}

/* Adds sum p v for V in codes; p in s. */
template <int D, int BITS>
__device__ static inline void values_codes(const block_piece &piece, int lane, const float (&s)[TOKEN_TILES][4], const float (&add)[2],
                                           warp_sums<D> &sums) {
    const uint4 *codes = reinterpret_cast<const uint4 *>(piece.v);
    uint32_t a[TOKEN_STEPS][4];
    float down = weights_scaled<D, BITS>(piece.v_parameters, lane, s, add, sums, a);
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
        float c[4][4] = {};
#pragma unroll
        for (int first = 0; first < TOKEN_STEPS; first += GROUP_STEPS) {
            code_words<BITS> w0 = code_load<BITS>(codes, n / 2 * TOKEN_STEPS + first, lane);
            code_words<BITS> w1 = code_load<BITS>(codes, (n / 2 + 1) * TOKEN_STEPS + first, lane);
#pragma unroll
            for (int i = 0; i < GROUP_STEPS; i++) {
                code_mma<BITS>(c[0], c[1], a[first + i], w0, i);
                code_mma<BITS>(c[2], c[3], a[first + i], w1, i);
            }
        }
        sums_add(sums, n, c, add[0] * down, add[1] * down);
    }
}

/* Four 8 x 8 matrices, each transposed: lane l gives the address of row l % 8 of matrix l / 8. */
__device__ static inline uint4 load_matrices_transposed(const uint8_t *row) {
    uint4 w;
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(address) : "memory");
    return w;
}

/* The same for V in 16 bit: p is one fp16 number or two of bf16. */
template <int D, typename T>
__device__ static inline void values_rows(const block_piece &piece, int lane, float (&s)[TOKEN_TILES][4], const float (&add)[2],
                                          warp_sums<D> &sums) {
    constexpr int n_parts = window_is_f16<T>() ? 1 : 2;
    const float boost = (float)(1 << P_BOOST), down = 1.0f / boost;
    const uint8_t *row = piece.v + (lane / 8 % 2 * 8 + lane % 8) * v_row_bytes(D) + lane / 16 * 8 * 2;
    uint32_t a[n_parts][TOKEN_STEPS][4];
#pragma unroll
    for (int step = 0; step < TOKEN_STEPS; step++)
#pragma unroll
        for (int k = 0; k < 4; k++) { /* rows r = k % 2 of tokens 8 (2 step + k / 2) .. */
            float x = s[2 * step + k / 2][k % 2 * 2] * boost, y = s[2 * step + k / 2][k % 2 * 2 + 1] * boost;
#pragma unroll
            for (int part = 0; part < n_parts; part++)
                a[part][step][k] = take<T>(x, y);
        }
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
        float c[4][4] = {};
#pragma unroll
        for (int step = 0; step < TOKEN_STEPS; step++) {
            uint4 b0 = load_matrices_transposed(row + 16 * step * v_row_bytes(D) + 8 * n * 2);
            uint4 b1 = load_matrices_transposed(row + 16 * step * v_row_bytes(D) + (8 * n + 16) * 2);
#pragma unroll
            for (int part = 0; part < n_parts; part++) {
                mma<T>(c[0], a[part][step], b0.x, b0.y);
                mma<T>(c[1], a[part][step], b0.z, b0.w);
                mma<T>(c[2], a[part][step], b1.x, b1.y);
                mma<T>(c[3], a[part][step], b1.z, b1.w);
            }
        }
        sums_add(sums, n, c, add[0] * down, add[1] * down);
    }
}

/* ---- a block ------------------------------------------------------------------------------------------------------ */

template <int D> __device__ static inline void sums_clear(warp_sums<D> &sums) {
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            sums.y[n][e] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sums.m[r] = M_NONE;
        sums.l[r] = sums.z[r] = 0.0f;
    }
}

/* K_BITS, V_BITS: 0 where they are known at run time only. MEAN: piece.mean may be there. */
template <int D, typename T, int K_BITS, int V_BITS, bool MEAN>
__device__ static inline void warp_attend(const block_piece &piece, const warp_queries &queries, warp_sums<D> &sums) {
    float s[TOKEN_TILES][4] = {}, add[2];
    score_units units;
    if (MEAN && piece.mean)
        scores_mean<D, T>(piece, queries, s);
    switch (K_BITS ? K_BITS : piece.k_bits) {
    case 2: units = scores_codes<D, 2, MEAN>(piece, queries, s); break;
    case 4: units = scores_codes<D, 4, MEAN>(piece, queries, s); break;
    case 8: units = scores_codes<D, 8, MEAN>(piece, queries, s); break;
    default: units = scores_rows<D, T>(piece, queries, s);
    }
    if (piece.masked)
        scores_mask(piece, queries, s);
    scores_to_weights<D>(units, s, sums, add);
    switch (V_BITS ? V_BITS : piece.v_bits) {
    case 2: values_codes<D, 2>(piece, queries.lane, s, add, sums); break;
    case 4: values_codes<D, 4>(piece, queries.lane, s, add, sums); break;
    case 8: values_codes<D, 8>(piece, queries.lane, s, add, sums); break;
    default: values_rows<D, T>(piece, queries.lane, s, add, sums);
    }
}
