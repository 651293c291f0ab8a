/* Sixteen floats at a time: the only place of the CPU's operations that names an instruction set. AVX-512F where the target has
 * it, AVX2 with FMA and F16C, else plain C that any compiler can vectorize. Every path computes the same thing up to the
 * rounding of v16_fma (fused or not). Loads and stores need no alignment. */
#pragma once

#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels/dtype.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#endif

#define SIMD_INLINE static inline __attribute__((always_inline))

enum { V16 = 16 };

#if defined(__AVX512F__)

enum { V16_REGISTERS = 32 }; /* how many struct v16 the registers hold */
struct v16 { __m512 r; };   /* 16 floats */
struct w16 { __m512i r; };  /* 16 words of 32 bits */

SIMD_INLINE struct v16 v16_set(float x) { return (struct v16){_mm512_set1_ps(x)}; }
SIMD_INLINE struct v16 v16_load(const float *p) { return (struct v16){_mm512_loadu_ps(p)}; }
SIMD_INLINE void v16_store(float *p, struct v16 a) { _mm512_storeu_ps(p, a.r); }
SIMD_INLINE struct v16 v16_load_f16(const void *p) {
    return (struct v16){_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)p))};
}
SIMD_INLINE struct v16 v16_load_bf16(const void *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u *)p));
    return (struct v16){_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
SIMD_INLINE struct v16 v16_add(struct v16 a, struct v16 b) { return (struct v16){_mm512_add_ps(a.r, b.r)}; }
SIMD_INLINE struct v16 v16_sub(struct v16 a, struct v16 b) { return (struct v16){_mm512_sub_ps(a.r, b.r)}; }
SIMD_INLINE struct v16 v16_mul(struct v16 a, struct v16 b) { return (struct v16){_mm512_mul_ps(a.r, b.r)}; }
SIMD_INLINE struct v16 v16_div(struct v16 a, struct v16 b) { return (struct v16){_mm512_div_ps(a.r, b.r)}; }
SIMD_INLINE struct v16 v16_fma(struct v16 a, struct v16 b, struct v16 c) { return (struct v16){_mm512_fmadd_ps(a.r, b.r, c.r)}; }
SIMD_INLINE struct v16 v16_max(struct v16 a, struct v16 b) { return (struct v16){_mm512_max_ps(a.r, b.r)}; }
SIMD_INLINE struct v16 v16_min(struct v16 a, struct v16 b) { return (struct v16){_mm512_min_ps(a.r, b.r)}; }
SIMD_INLINE struct v16 v16_if_less(struct v16 a, struct v16 b, struct v16 yes, struct v16 no) {
    return (struct v16){_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ), no.r, yes.r)};
}
SIMD_INLINE struct v16 v16_round(struct v16 a) {
    return (struct v16){_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SIMD_INLINE struct v16 v16_scale2(struct v16 a, struct v16 n) { return (struct v16){_mm512_scalef_ps(a.r, n.r)}; }
SIMD_INLINE float v16_sum(struct v16 a) { return _mm512_reduce_add_ps(a.r); }
SIMD_INLINE float v16_top(struct v16 a) { return _mm512_reduce_max_ps(a.r); }
/* out[j] = sum of the j-th argument. */
SIMD_INLINE void v16_sum4(struct v16 a, struct v16 b, struct v16 c, struct v16 d, float *out) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.r, b.r), _mm512_unpackhi_ps(a.r, b.r));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.r, d.r), _mm512_unpackhi_ps(c.r, d.r));
    __m512 four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(four), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
SIMD_INLINE struct w16 w16_load(const uint32_t *p) { return (struct w16){_mm512_loadu_si512(p)}; }
/* The field of `bits` bits at bit `bit` of every word, as floats; times 2^bit where V16_FIELD_IN_PLACE, which saves the shift. */
enum { V16_FIELD_IN_PLACE = 1 };
SIMD_INLINE struct v16 v16_field(struct w16 w, int bit, int bits) {
    return (struct v16){_mm512_cvtepu32_ps(_mm512_and_si512(w.r, _mm512_set1_epi32((int)(((1u << bits) - 1) << bit))))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

enum { V16_REGISTERS = 8 };
struct v16 { __m256 a, b; };
struct w16 { __m256i a, b; };

SIMD_INLINE struct v16 v16_set(float x) { return (struct v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SIMD_INLINE struct v16 v16_load(const float *p) { return (struct v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SIMD_INLINE void v16_store(float *p, struct v16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
SIMD_INLINE struct v16 v16_load_f16(const void *p) {
    const __m128i_u *half = (const __m128i_u *)p;
    return (struct v16){_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
SIMD_INLINE __m256 v8_bf16(const __m128i_u *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
SIMD_INLINE struct v16 v16_load_bf16(const void *p) {
    const __m128i_u *half = (const __m128i_u *)p;
    return (struct v16){v8_bf16(half), v8_bf16(half + 1)};
}
#define V16_BY_HALVES(name, intrinsic)                                                    \
    SIMD_INLINE struct v16 v16_##name(struct v16 x, struct v16 y) {                       \
        return (struct v16){_mm256_##intrinsic(x.a, y.a), _mm256_##intrinsic(x.b, y.b)};  \
    }
V16_BY_HALVES(add, add_ps)
V16_BY_HALVES(sub, sub_ps)
V16_BY_HALVES(mul, mul_ps)
V16_BY_HALVES(div, div_ps)
V16_BY_HALVES(max, max_ps)
V16_BY_HALVES(min, min_ps)
#undef V16_BY_HALVES
SIMD_INLINE struct v16 v16_fma(struct v16 x, struct v16 y, struct v16 z) {
    return (struct v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
SIMD_INLINE struct v16 v16_if_less(struct v16 x, struct v16 y, struct v16 yes, struct v16 no) {
    return (struct v16){_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
                        _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
SIMD_INLINE struct v16 v16_round(struct v16 x) {
    return (struct v16){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                        _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/* Two steps, so that results below the normal range are rounded once and not lost. */
SIMD_INLINE __m256 v8_scale2(__m256 x, __m256 n) {
    __m256i whole = _mm256_cvtps_epi32(n);
    __m256i first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
    __m256i bias = _mm256_set1_epi32(127);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23)));
}
SIMD_INLINE struct v16 v16_scale2(struct v16 x, struct v16 n) {
    return (struct v16){v8_scale2(x.a, n.a), v8_scale2(x.b, n.b)};
}
SIMD_INLINE __m128 v8_fold(__m256 x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
SIMD_INLINE void v16_sum4(struct v16 x, struct v16 y, struct v16 z, struct v16 w, float *out) {
    __m256 xy = _mm256_hadd_ps(_mm256_add_ps(x.a, x.b), _mm256_add_ps(y.a, y.b));
    __m256 zw = _mm256_hadd_ps(_mm256_add_ps(z.a, z.b), _mm256_add_ps(w.a, w.b));
    _mm_storeu_ps(out, v8_fold(_mm256_hadd_ps(xy, zw)));
}
SIMD_INLINE float v16_sum(struct v16 x) {
    __m128 four = v8_fold(_mm256_add_ps(x.a, x.b));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
SIMD_INLINE float v16_top(struct v16 x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
SIMD_INLINE struct w16 w16_load(const uint32_t *p) {
    const __m256i_u *half = (const __m256i_u *)p;
    return (struct w16){_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
enum { V16_FIELD_IN_PLACE = 0 }; /* words convert as signed numbers only: the highest field needs the shift */
SIMD_INLINE struct v16 v16_field(struct w16 w, int bit, int bits) {
    __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    return (struct v16){_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.a, bit), mask)),
                        _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.b, bit), mask))};
}

#else

enum { V16_REGISTERS = 4 };
struct v16 { float x[V16]; };
struct w16 { uint32_t x[V16]; };

#define V16_LANES(name, ...)            \
    struct v16 v16_result_;             \
    for (int i = 0; i < V16; i++)       \
        v16_result_.x[i] = __VA_ARGS__; \
    return v16_result_

SIMD_INLINE struct v16 v16_set(float x) { V16_LANES(set, x); }
SIMD_INLINE struct v16 v16_load(const float *p) { V16_LANES(load, p[i]); }
SIMD_INLINE void v16_store(float *p, struct v16 a) { memcpy(p, a.x, sizeof a.x); }
SIMD_INLINE struct v16 v16_load_f16(const void *p) {
    uint16_t h[V16];
    memcpy(h, p, sizeof h);
    V16_LANES(load_f16, dtype_from_f16(h[i]));
}
SIMD_INLINE struct v16 v16_load_bf16(const void *p) {
    uint16_t h[V16];
    memcpy(h, p, sizeof h);
    V16_LANES(load_bf16, dtype_from_bf16(h[i]));
}
SIMD_INLINE struct v16 v16_add(struct v16 a, struct v16 b) { V16_LANES(add, a.x[i] + b.x[i]); }
SIMD_INLINE struct v16 v16_sub(struct v16 a, struct v16 b) { V16_LANES(sub, a.x[i] - b.x[i]); }
SIMD_INLINE struct v16 v16_mul(struct v16 a, struct v16 b) { V16_LANES(mul, a.x[i] * b.x[i]); }
SIMD_INLINE struct v16 v16_div(struct v16 a, struct v16 b) { V16_LANES(div, a.x[i] / b.x[i]); }
SIMD_INLINE struct v16 v16_fma(struct v16 a, struct v16 b, struct v16 c) { V16_LANES(fma, a.x[i] * b.x[i] + c.x[i]); }
SIMD_INLINE struct v16 v16_max(struct v16 a, struct v16 b) { V16_LANES(max, a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
SIMD_INLINE struct v16 v16_min(struct v16 a, struct v16 b) { V16_LANES(min, a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
SIMD_INLINE struct v16 v16_if_less(struct v16 a, struct v16 b, struct v16 yes, struct v16 no) {
    V16_LANES(if_less, a.x[i] < b.x[i] ? yes.x[i] : no.x[i]);
}
SIMD_INLINE struct v16 v16_round(struct v16 a) { V16_LANES(round, rintf(a.x[i])); }
SIMD_INLINE struct v16 v16_scale2(struct v16 a, struct v16 n) { V16_LANES(scale2, ldexpf(a.x[i], (int)n.x[i])); }
#undef V16_LANES
SIMD_INLINE float v16_sum(struct v16 a) {
    for (int n = V16 / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            a.x[i] += a.x[i + n];
    return a.x[0];
}
SIMD_INLINE float v16_top(struct v16 a) {
    for (int i = 1; i < V16; i++)
        a.x[0] = a.x[0] > a.x[i] ? a.x[0] : a.x[i];
    return a.x[0];
}
SIMD_INLINE void v16_sum4(struct v16 a, struct v16 b, struct v16 c, struct v16 d, float *out) {
    out[0] = v16_sum(a);
    out[1] = v16_sum(b);
    out[2] = v16_sum(c);
    out[3] = v16_sum(d);
}
SIMD_INLINE struct w16 w16_load(const uint32_t *p) {
    struct w16 w;
    memcpy(w.x, p, sizeof w.x);
    return w;
}
enum { V16_FIELD_IN_PLACE = 0 };
SIMD_INLINE struct v16 v16_field(struct w16 w, int bit, int bits) {
    struct v16 f;
    for (int i = 0; i < V16; i++)
        f.x[i] = (float)(int32_t)(w.x[i] >> bit & ((1u << bits) - 1));
    return f;
}

#endif

/* Values i .. i+15 of an array of type F32, F16 or BF16. Fast where `dtype` is a constant. */
SIMD_INLINE struct v16 v16_load_as(enum dtype dtype, const void *p, int64_t i) {
    if (dtype == DTYPE_F32)
        return v16_load((const float *)p + i);
    const uint16_t *half = (const uint16_t *)p + i;
    return dtype == DTYPE_F16 ? v16_load_f16(half) : v16_load_bf16(half);
}

/* The same for the last n < 16 values of a row: nothing beyond them is read, the other lanes are 0. */
SIMD_INLINE struct v16 v16_load_tail(enum dtype dtype, const void *p, int64_t i, int n) {
    float lanes[V16] = {0};
    size_t bytes = dtype == DTYPE_F32 ? 4 : 2;
    memcpy(lanes, (const uint8_t *)p + (size_t)i * bytes, (size_t)n * bytes);
    return v16_load_as(dtype, lanes, 0);
}

/* dst[i] = float(src[i]), i < n: dtype_widen for F32, F16 and BF16 where speed counts. */
static inline void simd_widen(enum dtype dtype, const void *src, float *dst, int64_t n) {
    int64_t i = 0;
    if (dtype == DTYPE_F16)
        for (; i + V16 <= n; i += V16)
            v16_store(dst + i, v16_load_as(DTYPE_F16, src, i));
    else if (dtype == DTYPE_BF16)
        for (; i + V16 <= n; i += V16)
            v16_store(dst + i, v16_load_as(DTYPE_BF16, src, i));
    if (i < n)
        dtype_widen(dtype, (const uint8_t *)src + dtype_bytes(dtype, i), dst + i, n - i);
}

/* e^x within 2 units in the last place, over the whole range: exactly 0 from x = -104 down to -inf, infinity from x = 89 up, 1 at
 * 0; NaN stays NaN. x = n ln 2 + r with |r| <= ln(2)/2 (ln 2 in two parts, so that n ln2_high is exact); e^r = 1 + r + r^2 p(r),
 * p of degree 4 fitted for the least relative error (3e-9). */
SIMD_INLINE struct v16 v16_exp(struct v16 x) {
    const float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
    x = v16_max(v16_set(-104.0f), v16_min(v16_set(89.0f), x)); /* second operand: what comes out for NaN */
    struct v16 n = v16_round(v16_mul(x, v16_set(0x1.715476p+0f)));
    struct v16 r = v16_fma(n, v16_set(-ln2_high), x);
    r = v16_fma(n, v16_set(-ln2_low), r);
    struct v16 p = v16_set(0x1.6a23cep-10f);
    p = v16_fma(p, r, v16_set(0x1.123a20p-7f));
    p = v16_fma(p, r, v16_set(0x1.5558f2p-5f));
    p = v16_fma(p, r, v16_set(0x1.555492p-3f));
    p = v16_fma(p, r, v16_set(0x1.fffffcp-2f));
    p = v16_fma(v16_mul(r, r), p, r);
    return v16_scale2(v16_add(p, v16_set(1.0f)), n);
}

/* The same for one value: the same bits as any lane of v16_exp. */
SIMD_INLINE float simd_exp(float x) {
    float lanes[V16];
    v16_store(lanes, v16_exp(v16_set(x)));
    return lanes[0];
}
