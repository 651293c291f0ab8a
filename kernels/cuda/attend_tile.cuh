/* The arithmetic of decoding: one warp, one tile (a page or a slice of 16-bit tokens), up to eight query heads.
 *
 * K is the A operand of the first product (16 tokens x 16 channels), V transposed that of the second (16 channels x 16 tokens), and the
 * columns of B are query heads. Scales stay outside: K's go into q once per page, V's into p, zero-points into one product of the page
 * and one sum. Codes enter as fp16 subnormals, code * 2^-24 * 2^(place in its byte), for the price of one AND; the place is taken off the
 * other operand and 2^24 comes back in the fp32 result.
 *
 * q times scale is split into high + low fp16 parts. With at most four heads (SPLIT) the high parts stand in columns 0-3 and
 * the low parts in 4-7 of the same product; afterwards columns 0-3 go on with the first half of the page's tokens and 4-7
 * with the second half, as if they were heads of their own, and are joined when the piece is written. Otherwise two products.
 *
 * A sum of a page is taken relative to the page's own max, p times scale normalized by a power of two so that it stays clear of fp16's
 * small end; one fp32 factor per column then adds it to the running sums. So a million keys far below the max keep their mass. */
#pragma once

#include "kernels/cuda/attend_mma.cuh"
#include "kernels/cuda/page.cuh"

enum {
    TILE_COLUMNS = 8,                 /* of B */
    TILE_STEPS = KV_BLOCK / 16,       /* token tiles of a page */
    CODE_CHAINS = 2,                  /* sums of products side by side: 2 or 4 */
    Q_TOP = 7,                        /* largest q of a head lies in [2^7, 2^8) */
    K_SCALE_TOP = 5,                  /* largest scale of K in [2^5, 2^6): products below 2^14, their places down to 2^-6 of that */
    P_TOP = 13,                       /* largest scale of V in [2^13, 2^14), and p <= 1 */
    F16_BIAS = 15,
    SUBNORMAL_SHIFT = 24,             /* fp16 subnormals count in 2^-24 */
};

template <typename T> HOST_DEVICE constexpr bool dtype_is_half();
template <> HOST_DEVICE constexpr bool dtype_is_half<__half>() { return true; }
template <> HOST_DEVICE constexpr bool dtype_is_half<__nv_bfloat16>() { return false; }

/* B fragments of q for every step of 16 channels (page.cuh: the order of K's columns), of this lane's head. */
template <int D> struct tile_query {
    uint32_t high[D / 16][2], low[D / 16][2]; /* low: only where q is not exact in fp16 */
    float unit[2];                            /* of this lane's two columns: a sum of products 1 is this score, in powers of two */
};

/* Running sums of this lane's two columns 2 t, 2 t + 1. l and zero: this lane's tokens only. */
template <int D> struct tile_sums {
    float y[D / 16][4]; /* channels 16 j + g and 16 j + g + 8 */
    float m[2];         /* of base 2 */
    float l[2], zero[2]; /* sum of p, sum of p * V's zero-point */
};

template <int D> __device__ __forceinline__ void sums_clear(struct tile_sums<D> &sums) {
#pragma unroll
    for (int j = 0; j < D / 16; j++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            sums.y[j][r] = 0.0f;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        sums.m[e] = -INFINITY;
        sums.l[e] = sums.zero[e] = 0.0f;
    }
}

/* Column of B that this lane loads: heads of columns 4-7 are those of 0-3 again where SPLIT. */
template <bool SPLIT> __device__ __forceinline__ int lane_head(int lane) { return SPLIT ? lane / 4 % 4 : lane / 4; }
/* With SPLIT: lanes whose B column holds low parts, and lanes whose C columns hold a page's second half. */
__device__ __forceinline__ bool lane_is_low(int lane) { return lane >= 16; }
__device__ __forceinline__ bool lane_is_second(int lane) { return lane % 4 >= 2; }

/* ---- queries -------------------------------------------------------------------------------------------------------- */

/* n with top * 2^n in [2^Q_TOP, 2^(Q_TOP + 1)); -121 <= n <= 118. */
__device__ __forceinline__ int query_exponent(float top) { return Q_TOP + 127 - max(__float_as_int(top) >> 23 & 255, 16); }

/* This lane's channels 32 j + 8 t + i of its head at x[8 j + i]; 0 for a head that is not there. */
template <int D, typename T> __device__ __forceinline__ void query_read(const T *q, bool there, int lane, float (&x)[D / 4]) {
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        uint4 words = there ? *(const uint4 *)(q + 32 * j + 8 * (lane % 4)) : make_uint4(0, 0, 0, 0);
        const uint32_t pair[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 two = widen_pair<T>(pair[i]);
            x[8 * j + 2 * i] = two.x;
            x[8 * j + 2 * i + 1] = two.y;
        }
    }
}

/* x -> x H. Bits 0-2 and 5, 6 of a channel are within the lane, bits 3 and 4 are t. */
template <int D> __device__ __forceinline__ void query_rotate(float (&x)[D / 4], int lane) {
#pragma unroll
    for (int span = 1; span < D / 4; span *= 2)
#pragma unroll
        for (int i = 0; i < D / 4; i++)
            if (!(i & span)) {
                float a = x[i], b = x[i + span];
                x[i] = a + b;
                x[i + span] = a - b;
            }
    const float norm = D == 64 ? 0.125f : 0.08838834764831845f; /* 1 / sqrt(D) */
#pragma unroll
    for (int span = 1; span < 4; span *= 2)
#pragma unroll
        for (int i = 0; i < D / 4; i++) {
            float other = __shfl_xor_sync(0xffffffffu, x[i], span);
            x[i] = lane & span ? other - x[i] : x[i] + other;
        }
#pragma unroll
    for (int i = 0; i < D / 4; i++)
        x[i] *= norm;
}

/* Power of two that brings the head's largest value up; the same in all lanes of the head. */
template <int D> __device__ __forceinline__ int query_normalize(float (&x)[D / 4]) {
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 4; i++)
        top = fmaxf(top, fabsf(x[i]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    int exponent = query_exponent(top);
    float factor = power_of_2(exponent);
#pragma unroll
    for (int i = 0; i < D / 4; i++)
        x[i] *= factor;
    return exponent;
}

/* High and low fp16 parts of x as B fragments. */
template <int D>
__device__ __forceinline__ void query_split(const float (&x)[D / 4], uint32_t (&high)[D / 16][2], uint32_t (&low)[D / 16][2]) {
#pragma unroll
    for (int s = 0; s < D / 16; s++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = 4 * s + 2 * r;
            high[s][r] = narrow_pair<__half>(x[i], x[i + 1]);
            float2 back = widen_pair<__half>(high[s][r]);
            low[s][r] = narrow_pair<__half>(x[i] - back.x, x[i + 1] - back.y);
        }
}

/* What a column of C is worth, from what this lane's head is worth: columns 2 t, 2 t + 1 are the heads of lanes 8 t, 8 t + 4. */
__device__ __forceinline__ void query_units(float unit, int lane, float (&out)[2]) {
    out[0] = __shfl_sync(0xffffffffu, unit, lane % 4 * 8);
    out[1] = __shfl_sync(0xffffffffu, unit, lane % 4 * 8 + 4);
}

/* q for encoded keys. q: this lane's head; scale: of a score, in powers of two. */
template <int D, typename T, bool PLUS>
__device__ __forceinline__ void query_for_codes(const T *q, bool there, int lane, float scale, bool rotate, struct tile_query<D> &query) {
    float x[D / 4];
    query_read<D, T>(q, there, lane, x);
    if (PLUS && rotate)
        query_rotate<D>(x, lane);
    float unit = scale * power_of_2(-query_normalize<D>(x));
    query_split<D>(x, query.high, query.low);
    query_units(unit, lane, query.unit);
}

/* q for rows of the window's type: as it is. */
template <int D, typename T>
__device__ __forceinline__ void query_for_rows(const T *q, bool there, int lane, float scale, struct tile_query<D> &query) {
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        uint4 words = there ? *(const uint4 *)(q + 32 * j + 8 * (lane % 4)) : make_uint4(0, 0, 0, 0);
        query.high[2 * j][0] = words.x;
        query.high[2 * j][1] = words.y;
        query.high[2 * j + 1][0] = words.z;
        query.high[2 * j + 1][1] = words.w;
    }
    query.unit[0] = query.unit[1] = scale;
}

/* ---- codes ---------------------------------------------------------------------------------------------------------- */

/* log2 of bits, so that divisions are shifts also where bits are not a constant. */
__device__ __forceinline__ int bits_log2(int bits) { return bits == 2 ? 1 : bits == 4 ? 2 : 3; }

/* c[k][n] += codes times b[n], rows 16 tiles[k] .. of a matrix of N_STEPS steps. codes: this lane's 16 bytes of chunk 0. The chunk of step
 * u is u / (16 / bits) < rows / 16 * N_STEPS * bits / 16: within the codes. Each sum is a chain of products, and a product takes long: K
 * chains run side by side, in the order written here. */
template <int K, int N_STEPS, int N>
__device__ __forceinline__ void code_product(int log2_bits, const uint8_t *codes, const int (&tiles)[K], const uint32_t (&b)[N][N_STEPS][2],
                                             float (&c)[K][N][4]) {
    const int log2_word = 4 - log2_bits, log2_byte = 3 - log2_bits, bits = 1 << log2_bits; /* log2 of steps in a word, in a byte */
    uint4 words[K];
#pragma unroll
    for (int s = 0; s < N_STEPS; s++)
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int u = tiles[k] * N_STEPS + s, within = u & ((1 << log2_word) - 1);
            if (s == 0 || within == 0)
                words[k] = *(const uint4 *)(codes + (u >> log2_word) * PAGE_CHUNK_BYTES);
            const int shift = 8 * (within >> log2_byte); /* bytes of a half; what falls out of the upper half is masked away */
            const uint32_t mask = ((1u << bits) - 1) * 0x00010001u << bits * (u & ((1 << log2_byte) - 1));
            uint32_t a0 = words[k].x >> shift & mask, a1 = words[k].y >> shift & mask, a2 = words[k].z >> shift & mask,
                     a3 = words[k].w >> shift & mask;
#pragma unroll
            for (int n = 0; n < N; n++)
                mma_add<__half>(c[k][n], a0, a1, a2, a3, b[n][s][0], b[n][s][1]);
        }
}

/* Largest of the fp16 numbers >= 0 that the lanes hold (in the halves that `halves` selects): its biased exponent, at least 1. */
__device__ __forceinline__ int scale_exponent(__half2 top, bool both_halves) {
    uint32_t word = bits_of(top);
    uint32_t most = both_halves ? max(word & 0xffffu, word >> 16) : word & 0xffffu;
    return max((int)(__reduce_max_sync(0xffffffffu, most) >> 10), 1);
}

/* ---- scores of a page's encoded keys ------------------------------------------------------------------------------- */

/* What pages leave out of their keys: mean[o] . turned q, turned q = R_-jG q as fp16 parts. NULL: nothing. */
template <int D> struct tile_mean {
    const float *rows;        /* [KV_BLOCK][D] */
    uint32_t high[D / 16][2], low[D / 16][2];
    float unit[2];
};

/* R_-jG q of this lane's head, block j. The angle is what rope computes; its reduction is exact to 1e-9. */
template <int D, typename T, bool SPLIT>
__device__ __forceinline__ void mean_prepare(const T *q, bool there, int lane, float scale, const float *inv_freq, int block,
                                           struct tile_mean<D> &mean) {
    float x[D / 4];
    query_read<D, T>(q, there, lane, x);
    float unit = scale * power_of_2(-query_normalize<D>(x));
#pragma unroll
    for (int i = 0; i < D / 8; i++) { /* channel c and c + D/2 lie D/8 apart in the lane */
        float angle = (float)(block * KV_BLOCK) * inv_freq[32 * (i / 8) + 8 * (lane % 4) + i % 8], sine, cosine;
        double turns = (double)angle * 0.31830988618379067; /* in units of pi */
        turns -= 2.0 * rint(0.5 * turns);
        sincospif((float)turns, &sine, &cosine);
        float a = x[i], b = x[i + D / 8];
        x[i] = a * cosine + b * sine;
        x[i + D / 8] = b * cosine - a * sine;
    }
    query_split<D>(x, mean.high, mean.low);
    if (SPLIT)
#pragma unroll
        for (int s = 0; s < D / 16; s++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                mean.high[s][r] = lane_is_low(lane) ? mean.low[s][r] : mean.high[s][r];
    query_units(unit, lane, mean.unit);
}

/* c += mean of tokens 16 tile .. times turned q, in units of `factor`. Reads rows 16 tile + g and + 8, below KV_BLOCK. */
template <int D, bool SPLIT>
__device__ __forceinline__ void mean_add(const struct tile_mean<D> &mean, int tile, int lane, const float (&factor)[2], float (&c)[4]) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const float *row = mean.rows + (16 * tile + lane / 4) * D + lane % 4 * 8;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float4 four = *(const float4 *)(row + r * 8 * D + 32 * (s / 2) + 4 * (s % 2));
            high[r] = narrow_pair<__half>(four.x, four.y);
            high[r + 2] = narrow_pair<__half>(four.z, four.w);
            float2 first = widen_pair<__half>(high[r]), second = widen_pair<__half>(high[r + 2]);
            low[r] = narrow_pair<__half>(four.x - first.x, four.y - first.y);
            low[r + 2] = narrow_pair<__half>(four.z - second.x, four.w - second.y);
        }
        mma_add<__half>(sum, high[0], high[1], high[2], high[3], mean.high[s][0], mean.high[s][1]);
        mma_add<__half>(sum, low[0], low[1], low[2], low[3], mean.high[s][0], mean.high[s][1]);
        if (!SPLIT)
            mma_add<__half>(sum, high[0], high[1], high[2], high[3], mean.low[s][0], mean.low[s][1]);
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
        c[r] += sum[r] * (mean.unit[r % 2] / factor[r % 2]);
}

/* q times K's scale as B fragments: b[0] (SPLIT: high parts in columns 0-3, low parts in 4-7), b[1] the low parts otherwise. Returns what
 * the products are worth (factor) and q . zero (offset) of this lane's columns: score = sum * factor + offset. */
template <int D, bool SPLIT, bool PLUS>
__device__ __forceinline__ void code_queries(int log2_bits, const uint8_t *parameters, int lane, const struct tile_query<D> &query,
                                           uint32_t (&b)[SPLIT ? 1 : 2][D / 16][2], float (&factor)[2], float (&offset)[2]) {
    const int log2_byte = 3 - log2_bits, bits = 1 << log2_bits;
    const uint4 *lane_parameters = (const uint4 *)parameters + lane % 4; /* of step s: 4 s further */
    uint32_t scale[D / 16][2];
    __half2 top = as_half2(0);
    float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        uint4 four = lane_parameters[4 * s];
        scale[s][0] = four.x;
        scale[s][1] = four.y;
        top = __hmax2(top, __hmax2(as_half2(four.x), as_half2(four.y)));
        mma_add<__half>(zero, four.z, four.z, four.w, four.w, query.high[s][0], query.high[s][1]); /* all rows alike */
        if (PLUS)
            mma_add<__half>(zero, four.z, four.z, four.w, four.w, query.low[s][0], query.low[s][1]);
    }
    /* Up to 2^15: a power of two that fp16 holds. Down: at least 2^-16 with the place taken off, a subnormal that is exact. */
    const int exponent = min(K_SCALE_TOP + F16_BIAS - scale_exponent(top, true), 15);
    const uint32_t low_lane = SPLIT && !lane_is_low(lane) ? 0 : 0xffffffffu;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        __half2 norm = __float2half2_rn(power_of_2(exponent - bits * (s & ((1 << log2_byte) - 1))));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            __half2 q = as_half2(query.high[s][r]), k = __hmul2(as_half2(scale[s][r]), norm);
            uint32_t high = bits_of(__hmul2(q, k));
            __half2 low = __hfma2(q, k, __hneg2(as_half2(high & low_lane))); /* what high lacks; high itself where low_lane is 0 */
            if (PLUS)
                low = __hfma2(as_half2(query.low[s][r] & low_lane), k, low);
            b[0][s][r] = SPLIT ? bits_of(low) : high;
            if (!SPLIT)
                b[SPLIT ? 0 : 1][s][r] = bits_of(low);
        }
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        factor[e] = query.unit[e] * power_of_2(SUBNORMAL_SHIFT - exponent);
        offset[e] = zero[e] * query.unit[e];
    }
}

/* Scores of a page: s[i] of token tile i, or where SPLIT of tile i in columns 0-3 and i + 4 in columns 4-7. */
template <int D, bool SPLIT, bool PLUS>
__device__ __forceinline__ void code_scores(int log2_bits, const uint8_t *part, int lane, const struct tile_query<D> &query,
                                          const struct tile_mean<D> &mean, float (&s)[SPLIT ? 4 : 8][4], float (&factor)[2],
                                          float (&offset)[2]) {
    uint32_t b[SPLIT ? 1 : 2][D / 16][2];
    const uint8_t *codes = part + lane * 16;
    code_queries<D, SPLIT, PLUS>(log2_bits, part + (KV_BLOCK * D / 8 << log2_bits), lane, query, b, factor, offset);
    constexpr int PARTS = SPLIT ? 1 : 2, CHAINS = SPLIT ? CODE_CHAINS : 1, EACH = SPLIT ? CHAINS / 2 : 1; /* tiles i .. i + EACH - 1 */
#pragma unroll
    for (int i = 0; i < (SPLIT ? 4 : 8); i += EACH) {
        float c[CHAINS][PARTS][4] = {};
        int tiles[CHAINS];
#pragma unroll
        for (int k = 0; k < CHAINS; k++)
            tiles[k] = i + k % EACH + k / EACH * 4;
        code_product<CHAINS, D / 16, PARTS>(log2_bits, codes, tiles, b, c);
#pragma unroll
        for (int k = 0; k < CHAINS; k++)
            if (PLUS && mean.rows)
                mean_add<D, SPLIT>(mean, tiles[k], lane, factor, c[k][0]);
#pragma unroll
        for (int k = 0; k < EACH; k++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                if (SPLIT) { /* high + low: each lane keeps one tile's part and gets the other part of it from two lanes away */
                    const float first = c[k][0][r], second = c[CHAINS - EACH + k][0][r];
                    const float keep = lane_is_second(lane) ? second : first, give = lane_is_second(lane) ? first : second;
                    s[i + k][r] = keep + __shfl_xor_sync(0xffffffffu, give, 2);
                } else {
                    s[i + k][r] = c[k][0][r] + c[k][PARTS - 1][r];
                }
            }
    }
}

/* ---- scores of rows in 16 bit ------------------------------------------------------------------------------------- */

/* c = K q of 16 rows, `stride` bytes apart. */
template <int D, typename T>
__device__ __forceinline__ void row_product(const uint8_t *rows, int stride, int lane, const struct tile_query<D> &query, float (&c)[4]) {
    const uint8_t *row = rows + lane / 4 * stride + lane % 4 * 16;
#pragma unroll
    for (int r = 0; r < 4; r++)
        c[r] = 0.0f;
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        uint4 x = *(const uint4 *)(row + 64 * j), y = *(const uint4 *)(row + 8 * stride + 64 * j);
        mma_add<T>(c, x.x, y.x, x.y, y.y, query.high[2 * j][0], query.high[2 * j][1]);
        mma_add<T>(c, x.z, y.z, x.w, y.w, query.high[2 * j + 1][0], query.high[2 * j + 1][1]);
    }
}

/* The same arrangement of tiles and columns as code_scores; every column of a head holds the same sums. */
template <int D, typename T, bool SPLIT>
__device__ __forceinline__ void row_scores(const uint8_t *rows, int lane, const struct tile_query<D> &query, float (&s)[SPLIT ? 4 : 8][4]) {
#pragma unroll
    for (int i = 0; i < (SPLIT ? 4 : 8); i++) {
        row_product<D, T>(rows + i * 16 * 2 * D, 2 * D, lane, query, s[i]);
        if (SPLIT) {
            float c[4];
            row_product<D, T>(rows + (i + 4) * 16 * 2 * D, 2 * D, lane, query, c);
#pragma unroll
            for (int r = 0; r < 4; r++)
                s[i][r] = lane_is_second(lane) ? c[r] : s[i][r];
        }
    }
}

/* ---- scores to weights --------------------------------------------------------------------------------------------- */

/* s -> p = 2^(s * factor + offset - max of this tile), by column; -inf is a token that does not count. Moves m and l, and y and `zero` if
 * the max moved. Returns the factor by which sums over p join the running ones. */
template <int D, int N>
__device__ __forceinline__ void tile_weights(float (&s)[N][4], const float (&factor)[2], const float (&offset)[2],
                                             struct tile_sums<D> &sums,
                                           float (&gain)[2]) {
    float old[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float top = fmaxf(s[0][e], s[0][e + 2]), sum = 0.0f;
#pragma unroll
        for (int i = 1; i < N; i++)
            top = fmaxf(top, fmaxf(s[i][e], s[i][e + 2]));
#pragma unroll
        for (int lanes = 4; lanes < WARP; lanes *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lanes));
        const bool any = top > -INFINITY;
        const float m = fmaf(top, factor[e], offset[e]), both = fmaxf(sums.m[e], m), shift = any ? offset[e] - m : 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            s[i][e] = fast_exp2(fmaf(s[i][e], factor[e], shift));
            s[i][e + 2] = fast_exp2(fmaf(s[i][e + 2], factor[e], shift));
            sum += s[i][e] + s[i][e + 2];
        }
        old[e] = both == sums.m[e] ? 1.0f : fast_exp2(sums.m[e] - both);
        gain[e] = any ? fast_exp2(m - both) : 0.0f;
        sums.m[e] = both;
        sums.l[e] = fmaf(sum, gain[e], sums.l[e] * old[e]);
    }
    if (__any_sync(0xffffffffu, old[0] != 1.0f || old[1] != 1.0f)) {
        sums.zero[0] *= old[0];
        sums.zero[1] *= old[1];
#pragma unroll
        for (int j = 0; j < D / 16; j++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                sums.y[j][r] *= old[r % 2];
    }
}

/* ---- values --------------------------------------------------------------------------------------------------------- */

/* B fragments of the second product from weights in the layout of scores: step i, or where SPLIT step i from columns 0-3 and i + 4 from
 * columns 4-7, the other columns 0. w[i]: pairs of this lane's columns, rows g and g + 8. */
template <bool SPLIT, int N, int N_STEPS>
__device__ __forceinline__ void weight_fragments(const uint32_t (&w)[N][2], int lane, uint32_t (&b)[1][N_STEPS][2]) {
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t turned = matrix_transpose(w[i][r]);
            b[0][i][r] = turned;
            if (SPLIT && N_STEPS > N) {
                b[0][i][r] = lane_is_low(lane) ? 0 : turned;
                b[0][N_STEPS > N ? i + N : i][r] = lane_is_low(lane) ? turned : 0;
            }
        }
}

/* Adds a page's encoded values, weighed by p. */
template <int D, bool SPLIT>
__device__ __forceinline__ void code_values(int log2_bits, const uint8_t *part, int lane, const float (&p)[SPLIT ? 4 : 8][4],
                                          const float (&gain)[2], struct tile_sums<D> &sums) {
    constexpr int N = SPLIT ? 4 : 8;
    const int log2_byte = 3 - log2_bits, bits = 1 << log2_bits;
    /* of step i: 8 i further; (scale, zero) of tokens 16 i + g and 16 i + g + 8 */
    const uint2 *parameters = (const uint2 *)(part + (KV_BLOCK * D / 8 << log2_bits)) + lane / 4 + (SPLIT &&
                                                                                                    lane_is_second(lane) ? 4 * 8 : 0);
    uint2 both[N];
    __half2 top = as_half2(0);
#pragma unroll
    for (int i = 0; i < N; i++) {
        both[i] = parameters[8 * i];
        top = __hmax2(top, __hmax2(as_half2(both[i].x), as_half2(both[i].y)));
    }
    const int exponent = P_TOP + F16_BIAS - scale_exponent(top, false);
    uint32_t w[N][2], b[1][TILE_STEPS][2];
    float zero[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; i++) { /* step i + 4 has the same place in its byte */
        const float norm = power_of_2(exponent - bits * (i & ((1 << log2_byte) - 1)));
        float2 first = __half22float2(as_half2(both[i].x)), second = __half22float2(as_half2(both[i].y));
        float a = first.x * norm, c = second.x * norm;
        w[i][0] = narrow_pair<__half>(p[i][0] * a, p[i][1] * a);
        w[i][1] = narrow_pair<__half>(p[i][2] * c, p[i][3] * c);
#pragma unroll
        for (int e = 0; e < 2; e++)
            zero[e] = fmaf(p[i][e], first.y, fmaf(p[i][e + 2], second.y, zero[e]));
    }
    weight_fragments<SPLIT, N, TILE_STEPS>(w, lane, b);
    float worth[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        worth[e] = gain[e] * power_of_2(SUBNORMAL_SHIFT - exponent);
        sums.zero[e] = fmaf(zero[e], gain[e], sums.zero[e]);
    }
#pragma unroll
    for (int j = 0; j < D / 16; j += CODE_CHAINS) {
        float c[CODE_CHAINS][1][4] = {};
        int tiles[CODE_CHAINS];
#pragma unroll
        for (int k = 0; k < CODE_CHAINS; k++)
            tiles[k] = j + k;
        code_product<CODE_CHAINS, TILE_STEPS, 1>(log2_bits, part + lane * 16, tiles, b, c);
#pragma unroll
        for (int k = 0; k < CODE_CHAINS; k++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                sums.y[j + k][r] = fmaf(c[k][0][r], worth[r % 2], sums.y[j + k][r]);
    }
}

/* Adds values in 16 bit: N_STEPS times 16 rows, `stride` bytes apart. fp16: p * 2^14; bf16: p in high and low parts. */
template <int D, typename T, bool SPLIT, int N, int N_STEPS>
__device__ __forceinline__ void row_values(const uint8_t *rows, int stride, int lane, const float (&p)[N][4], const float (&gain)[2],
                                         struct tile_sums<D> &sums) {
    constexpr bool PARTS = !dtype_is_half<T>();
    const float norm = PARTS ? 1.0f : power_of_2(P_TOP + 1), worth[2] = {gain[0] / norm, gain[1] / norm};
    uint32_t w[N][2], rest[N][2], b[1][N_STEPS][2], b_rest[1][N_STEPS][2];
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float first = p[i][2 * r] * norm, second = p[i][2 * r + 1] * norm;
            w[i][r] = narrow_pair<T>(first, second);
            float2 back = widen_pair<T>(w[i][r]);
            rest[i][r] = narrow_pair<T>(first - back.x, second - back.y);
        }
    weight_fragments<SPLIT, N, N_STEPS>(w, lane, b);
    if (PARTS)
        weight_fragments<SPLIT, N, N_STEPS>(rest, lane, b_rest);
    const uint8_t *row = rows + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 16;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
        float c[4] = {};
#pragma unroll
        for (int s = 0; s < N_STEPS; s++) {
            uint4 a = matrix_load_transposed(row + s * 16 * stride + j * 32);
            mma_add<T>(c, a.x, a.y, a.z, a.w, b[0][s][0], b[0][s][1]);
            if (PARTS)
                mma_add<T>(c, a.x, a.y, a.z, a.w, b_rest[0][s][0], b_rest[0][s][1]);
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
            sums.y[j][r] = fmaf(c[r], worth[r % 2], sums.y[j][r]);
    }
}
