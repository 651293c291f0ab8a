/* One K or V part of a block between 16-bit rows and its place in a page record: what flush, flush_exact and their states share.
 *
 * The arithmetic is kernels/page.h's, operation by operation (intrinsics that round once, no fma), so records hold the same codes,
 * scales and zeros as the CPU's. A CTA encodes one part: the rows are staged in shared memory once, for K the channels' and for V the
 * tokens' ranges are found there, and each thread then gathers whole 32-bit words in the order of memory, so stores are coalesced
 * whatever the layout. Parts are multiples of 16 bytes, so a record has no padding. */
#pragma once

#include <float.h>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/page.cuh"

enum {
    ENCODE_THREADS = 256, /* two a token, and a whole number of them for each pair of channels */
    ENCODE_VECTOR = 8,    /* 16-bit values in a 16-byte access */
    ENCODE_PAD = 4,       /* values after each staged row: rows begin two banks apart, so the gathering of K has no conflicts */
};

/* ---- preconditions -------------------------------------------------------------------------------------------------- */

static inline bool encode_bits_ok(int bits) { return bits == 2 || bits == 4 || bits == 8 || bits == 16; }

/* What every kernel on records takes for granted. */
static inline int encode_check_format(const struct page_format *f, const char *op) {
    if (f->head_dim != 64 && f->head_dim != 128)
        FAIL(STATUS_USAGE, "cuda %s: head dim 64 or 128, got %d", op, f->head_dim);
    if (f->window != DTYPE_F16 && f->window != DTYPE_BF16)
        FAIL(STATUS_USAGE, "cuda %s: a cache of f16 or bf16, got %s", op, dtype_name(f->window));
    if (!encode_bits_ok(f->k_bits) || !encode_bits_ok(f->v_bits))
        FAIL(STATUS_USAGE, "cuda %s: 2, 4, 8 or 16 bits, got %d for K and %d for V", op, f->k_bits, f->v_bits);
    return STATUS_OK;
}

static inline bool encode_aligned(const void *pointer) { return ((uintptr_t)pointer & 15) == 0; }

static inline int encode_check_cache(const struct cache_layout *layout, const struct cache_layer *layer, const char *op) {
    TRY(encode_check_format(&layer->format, op));
    if (layout->head_dim != layer->format.head_dim)
        FAIL(STATUS_USAGE, "cuda %s: head dim %d in the layout, %d in the format", op, layout->head_dim, layer->format.head_dim);
    if (layout->cp_size < 1 || layout->n_kv_heads < 1 || layout->n_kv_heads > 65535 || layout->n_slots < 1)
        FAIL(STATUS_USAGE, "cuda %s: cp %d, %d KV heads, %d slots", op, layout->cp_size, layout->n_kv_heads, layout->n_slots);
    if (layout->sink < 0 || layout->sink > KV_BLOCK || (layout->sink > 0 && !layer->sink))
        FAIL(STATUS_USAGE, "cuda %s: sink %d (0 to %d, with a store)", op, layout->sink, KV_BLOCK);
    if (!encode_aligned(layer->pages) || !encode_aligned(layer->window) || !encode_aligned(layer->sink) || layer->page_stride % 16 != 0)
        FAIL(STATUS_USAGE, "cuda %s: pages, slots and sink must lie at multiples of 16 bytes", op);
    return STATUS_OK;
}

/* ---- where things lie ----------------------------------------------------------------------------------------------- */

/* Sink tokens at the start of a block. */
__device__ static inline int encode_first(const struct cache_layout *layout, int64_t block) { return block == 0 ? layout->sink : 0; }

/* Part (0: K, 1: V) of a block's 16-bit slot: [KV_BLOCK][head_dim]. */
template <typename T>
__device__ static inline T *encode_slot(const struct cache_layout *layout, const struct cache_layer *layer, int seq, int64_t block,
                                        int head, int part) {
    int64_t slot = block / layout->cp_size % layout->n_slots;
    int64_t index = ((int64_t)seq * layout->n_slots + slot) * layout->n_kv_heads + head;
    return (T *)layer->window + (index * 2 + part) * KV_BLOCK * layout->head_dim;
}

__device__ static inline uint8_t *encode_record(const struct cache_layer *layer, int64_t page, int head) {
    return layer->pages + page * layer->page_stride + (int64_t)head * page_record_size(&layer->format);
}

/* Part of a head's sink store: [sink][head_dim]; only where there is a sink. */
template <typename T>
__device__ static inline T *encode_sink(const struct cache_layout *layout, const struct cache_layer *layer, int seq, int head, int part) {
    int64_t index = ((int64_t)seq * layout->n_kv_heads + head) * 2 + part;
    return (T *)layer->sink + index * layout->sink * layout->head_dim;
}

/* The i-th pair of code word `word`, 0 <= i < 16 / bits: page_code_place turned round. In K channel and channel + 1 of a token, in
 * V token and token + 1 of a channel; the first at bit bits * i, the second 16 higher. For all words of a part (KV_BLOCK * D * bits / 32)
 * u runs over 0 .. D/2 - 1, all pairs of tiles and steps, so token < KV_BLOCK and channel < D, neighbours included. */
struct encode_pair {
    int token, channel;
};
template <int D, bool IS_K> __device__ static inline struct encode_pair encode_pair_of(int bits, int word, int i) {
    const int n_steps = IS_K ? D / 16 : KV_BLOCK / 16;
    int reg = word % 4, lane = word / 4 % 32, u = word / 128 * (16 / bits) + i;
    int row = u / n_steps * 16 + lane / 4 + reg % 2 * 8, step = u % n_steps;
    struct encode_pair pair;
    pair.token = IS_K ? row : step * 16 + lane % 4 * 2 + reg / 2 * 8;
    pair.channel = IS_K ? step / 2 * 32 + lane % 4 * 8 + step % 2 * 4 + reg / 2 * 2 : row;
    return pair;
}

/* ---- the quantizer, as kernels/cpu/page.c ------------------------------------------------------------------------------ */

/* cpu_page_widen: NaN as 0, infinities as the largest float. */
template <typename T> __device__ static inline float encode_widen(T value) {
    float x = device_widen(value);
    x = x == x ? x : 0.0f;
    return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

/* fp16 of a value clamped to what fp16 holds; never -0. */
__device__ static inline __half encode_parameter(float x) {
    __half h = __float2half_rn(fminf(fmaxf(x, -PAGE_MAX_SCALE), PAGE_MAX_SCALE));
    return __half_as_ushort(h) == 0x8000 ? __ushort_as_half(0) : h;
}

__device__ static inline unsigned encode_code(float x, float scale, float zero, float top) {
    if (scale == 0.0f)
        return 0;
    float q = __fdiv_rn(__fsub_rn(x, zero), scale);
    return __float2uint_rn(fminf(fmaxf(q, 0.0f), top));
}

__device__ static inline float encode_decode(unsigned code, float scale, float zero) {
    return __fadd_rn(__fmul_rn((float)code, scale), zero);
}

/* ---- encoding a part ----------------------------------------------------------------------------------------------------- */

template <typename T, int D> struct encode_shared {
    alignas(16) T rows[KV_BLOCK * (D + ENCODE_PAD)];
    float low[2 * ENCODE_THREADS], high[2 * ENCODE_THREADS]; /* K: [groups of tokens][D] */
    float scale[KV_BLOCK], zero[KV_BLOCK];                   /* K: by channel, V: by token */
};

/* Scale and zero of a group whose values lie in min .. max (`empty`: it has none), to the record and to shared memory. */
template <typename T, int D>
__device__ static inline void encode_finish(struct encode_shared<T, D> *s, int group, bool empty, float min, float max, float top,
                                            uint8_t *scale_at, uint8_t *zero_at) {
    __half none = __ushort_as_half(0);
    __half scale = empty ? none : encode_parameter(__fdiv_rn(__fsub_rn(max, min), top));
    __half zero = empty ? none : encode_parameter(min);
    *(__half *)scale_at = scale;
    *(__half *)zero_at = zero;
    s->scale[group] = __half2float(scale);
    s->zero[group] = __half2float(zero);
}

/* A thread runs over the tokens of two neighbouring channels that are `groups` apart: pair < D/2, group * D + channel < 2 threads. */
template <typename T, int D>
__device__ static void encode_ranges_k(struct encode_shared<T, D> *s, int first, float top, uint8_t *parameters) {
    const int pairs = D / 2, groups = ENCODE_THREADS / pairs;
    int pair = threadIdx.x % pairs, group = threadIdx.x / pairs, c = threadIdx.x;
    float low[2] = {FLT_MAX, FLT_MAX}, high[2] = {-FLT_MAX, -FLT_MAX};
    for (int t = first + group; t < KV_BLOCK; t += groups) {
        for (int e = 0; e < 2; e++) {
            float x = encode_widen(s->rows[t * (D + ENCODE_PAD) + 2 * pair + e]);
            low[e] = fminf(low[e], x);
            high[e] = fmaxf(high[e], x);
        }
    }
    for (int e = 0; e < 2; e++) {
        s->low[group * D + 2 * pair + e] = low[e];
        s->high[group * D + 2 * pair + e] = high[e];
    }
    __syncthreads();
    if (c < D) {
        float min = s->low[c], max = s->high[c];
        for (int g = 1; g < groups; g++) {
            min = fminf(min, s->low[g * D + c]);
            max = fmaxf(max, s->high[g * D + c]);
        }
        uint8_t *at = parameters + page_k_parameter(c);
        encode_finish(s, c, first == KV_BLOCK, min, max, top, at, at + 8);
    }
}

/* Two neighbouring threads share a token, each every other pair of channels: token < 128. */
template <typename T, int D>
__device__ static void encode_ranges_v(struct encode_shared<T, D> *s, int first, float top, uint8_t *parameters) {
    int token = threadIdx.x / 2;
    float min = FLT_MAX, max = -FLT_MAX;
    for (int c = threadIdx.x % 2 * 2; c < D; c += 4) {
        for (int e = 0; e < 2; e++) {
            float x = encode_widen(s->rows[token * (D + ENCODE_PAD) + c + e]);
            min = fminf(min, x);
            max = fmaxf(max, x);
        }
    }
    min = fminf(min, __shfl_xor_sync(0xffffffffu, min, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    if (threadIdx.x % 2 == 0) {
        uint8_t *at = parameters + page_v_parameter(token);
        encode_finish(s, token, token < first, min, max, top, at, at + 2);
    }
}

template <typename T, int D, bool IS_K>
__device__ static void encode_codes(const struct encode_shared<T, D> *s, int first, int bits, float top, uint32_t *codes) {
    for (int w = threadIdx.x; w < KV_BLOCK * D * bits / 32; w += ENCODE_THREADS) {
        uint32_t word = 0;
        for (int i = 0; i < 16 / bits; i++) {
            struct encode_pair pair = encode_pair_of<D, IS_K>(bits, w, i);
            for (int e = 0; e < 2; e++) {
                int token = pair.token + (IS_K ? 0 : e), channel = pair.channel + (IS_K ? e : 0), group = IS_K ? channel : token;
                float x = encode_widen(s->rows[token * (D + ENCODE_PAD) + channel]);
                unsigned code = token < first ? 0 : encode_code(x, s->scale[group], s->zero[group], top);
                word |= code << (bits * i + 16 * e);
            }
        }
        codes[w] = word;
    }
}

/* Rows [KV_BLOCK][D] -> one part of a record, every byte of it, and the rows before `first` -> sink [first][D]. For all threads of a CTA
 * of ENCODE_THREADS; ends with a barrier. Accesses of 16 bytes: vector i < KV_BLOCK * D / 8 of the rows, of a 16-bit part, of the sink. */
template <typename T, int D, bool IS_K>
__device__ static void encode_part(struct encode_shared<T, D> *s, const T *rows, int first, int bits, uint8_t *part, T *sink) {
    const int row_vectors = D / ENCODE_VECTOR;
    for (int i = threadIdx.x; i < KV_BLOCK * row_vectors; i += ENCODE_THREADS) {
        uint4 x = ((const uint4 *)rows)[i];
        int row = i / row_vectors;
        if (row < first)
            ((uint4 *)sink)[i] = x;
        if (bits == 16) {
            ((uint4 *)part)[i] = row < first ? make_uint4(0, 0, 0, 0) : x;
        } else {
            uint2 *to = (uint2 *)(s->rows + row * (D + ENCODE_PAD) + i % row_vectors * ENCODE_VECTOR); /* rows are multiples of 8 bytes */
            to[0] = make_uint2(x.x, x.y);
            to[1] = make_uint2(x.z, x.w);
        }
    }
    __syncthreads();
    if (bits == 16)
        return;
    float top = (float)((1 << bits) - 1);
    uint8_t *parameters = part + page_codes_bytes(D, bits);
    if (IS_K)
        encode_ranges_k<T, D>(s, first, top, parameters);
    else
        encode_ranges_v<T, D>(s, first, top, parameters);
    __syncthreads();
    encode_codes<T, D, IS_K>(s, first, bits, top, (uint32_t *)part);
    __syncthreads();
}

/* K or V (part 0 or 1) of one KV head of a block into its record and, for block 0, the sink store. */
template <typename T, int D>
__device__ static void encode_block(struct encode_shared<T, D> *s, const struct cache_layout *layout, const struct cache_layer *layer,
                                    int seq, int64_t block, int64_t page, int head, int part, const T *rows) {
    int first = encode_first(layout, block);
    uint8_t *record = encode_record(layer, page, head);
    T *sink = first > 0 ? encode_sink<T>(layout, layer, seq, head, part) : NULL;
    if (part == 0)
        encode_part<T, D, true>(s, rows, first, layer->format.k_bits, record, sink);
    else
        encode_part<T, D, false>(s, rows, first, layer->format.v_bits, record + page_v_offset(&layer->format), sink);
}
