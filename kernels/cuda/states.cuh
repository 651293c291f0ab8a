/* What one flushed block adds to S and P of a KV head (KVLinC, 2510.05373, eq. 6 and Algorithm 1), as cpu_correct_block: with
 * E = K - K^q the sums over its tokens of phi_k(E)^T V^q and of phi_k(E).
 *
 * A CTA makes a slice: up to STATES_WIDTH features of one half of phi, all channels. Both products are 128 x 128 x d in fp32 on CUDA cores,
 * 8 x 8 (d = 64: 8 x 4) results a thread, operands in shared memory: E and then phi in one buffer, W and then V in the other. Softmax
 * runs over a whole half; where that is wider than a slice, the other slices' logits are computed too, for their maximum and sum only.
 * Every sum has one order, over the tokens of a block ascending, so the bits do not depend on who computes a block. */
#pragma once

#include "kernels/cuda/encode.cuh"

enum {
    STATES_THREADS = 256,  /* 16 x 16 tiles of results */
    STATES_SIDE = 16,      /* threads along each side of a tile */
    STATES_WIDTH = 128,    /* features of a slice */
    STATES_PER_THREAD = 8, /* tokens, and features, of a thread */
    STATES_PAD = 4,        /* floats after a row of E or phi: keeps 16-byte alignment, neighbouring rows in other banks */
    STATES_FEATURES_UNIT = 32, /* features come in multiples of it (a calibration's rule): halves are multiples of 16 */
};

static inline bool states_are_on(const struct cache_layer *layer) {
    return layer->features > 0 && layer->states && layer->phi_k && layer->phi_q;
}

static inline int states_check(const struct cache_layer *layer, const char *op) {
    if (layer->features % STATES_FEATURES_UNIT != 0 || layer->features > KV_MAX_FEATURES)
        FAIL(STATUS_USAGE, "cuda %s: features a multiple of %d up to %d, got %d", op, STATES_FEATURES_UNIT, KV_MAX_FEATURES,
             layer->features);
    if (!encode_aligned(layer->states) || !encode_aligned(layer->phi_k) || !encode_aligned(layer->phi_q))
        FAIL(STATUS_USAGE, "cuda %s: states and phi must lie at multiples of 16 bytes", op);
    return STATUS_OK;
}

/* Floats of the states of one sequence and KV head: S, then P. */
HOST_DEVICE static inline int64_t states_count(const struct cache_layer *layer) {
    return (int64_t)layer->features * layer->format.head_dim + layer->features;
}

static inline int states_n_slices(const struct cache_layer *layer) {
    return 2 * (int)ceil_div(layer->features / 2, STATES_WIDTH);
}

/* E [KV_BLOCK][D] or phi [KV_BLOCK][STATES_WIDTH], padded; W [D][STATES_WIDTH] or V [KV_BLOCK][D]. */
template <int D> struct states_shared {
    float rows[KV_BLOCK * (STATES_WIDTH + STATES_PAD)];
    float other[KV_BLOCK * D];
};
static_assert((int)KV_BLOCK == (int)STATES_WIDTH, "W and V have the same size");

/* Which features: `half` of phi, and of its width features those from `begin` on. */
struct states_slice {
    int half, begin, width;
};
__device__ static inline struct states_slice states_slice_of(const struct cache_layer *layer, int slice) {
    struct states_slice s;
    int width = layer->features / 2, n = (width + STATES_WIDTH - 1) / STATES_WIDTH;
    s.half = slice / n;
    s.begin = slice % n * STATES_WIDTH;
    s.width = width;
    return s;
}

/* One KV head of one block. */
template <typename T> struct states_block {
    const T *k, *v; /* [KV_BLOCK][D] */
    const uint8_t *record;
    int head, first;
};

/* to[token][channel] = value, or -= value, of all codes of a part. Pitch in floats; each element belongs to one thread. */
template <int D, bool IS_K>
__device__ static void states_decode(const uint8_t *part, int bits, float *to, int pitch, bool subtract) {
    const uint8_t *parameters = part + page_codes_bytes(D, bits);
    unsigned mask = (1u << bits) - 1;
    for (int w = threadIdx.x; w < KV_BLOCK * D * bits / 32; w += STATES_THREADS) {
        uint32_t word = ((const uint32_t *)part)[w];
        for (int i = 0; i < 16 / bits; i++) {
            struct encode_pair pair = encode_pair_of<D, IS_K>(bits, w, i);
            for (int e = 0; e < 2; e++) {
                int token = pair.token + (IS_K ? 0 : e), channel = pair.channel + (IS_K ? e : 0);
                const uint8_t *scale = parameters + (IS_K ? page_k_parameter(channel) : page_v_parameter(token));
                const uint8_t *zero = scale + (IS_K ? 8 : 2);
                float x = encode_decode(word >> (bits * i + 16 * e) & mask, __half2float(*(const __half *)scale),
                                        __half2float(*(const __half *)zero));
                float *at = to + token * pitch + channel;
                *at = subtract ? __fsub_rn(*at, x) : x;
            }
        }
    }
}

/* Rows of 16 bits [KV_BLOCK][D] to float, as the quantizer reads them (`clean`) or as they are. */
template <typename T, int D> __device__ static void states_widen(const T *rows, bool clean, float *to, int pitch) {
    for (int i = threadIdx.x; i < KV_BLOCK * D / ENCODE_VECTOR; i += STATES_THREADS) {
        alignas(16) T x[ENCODE_VECTOR];
        float y[ENCODE_VECTOR];
        *(uint4 *)x = ((const uint4 *)rows)[i];
        for (int j = 0; j < ENCODE_VECTOR; j++)
            y[j] = clean ? encode_widen(x[j]) : device_widen(x[j]);
        float4 *out = (float4 *)(to + i / (D / ENCODE_VECTOR) * pitch + i % (D / ENCODE_VECTOR) * ENCODE_VECTOR);
        out[0] = make_float4(y[0], y[1], y[2], y[3]);
        out[1] = make_float4(y[4], y[5], y[6], y[7]);
    }
}

/* rows = E: [KV_BLOCK][D], pitch D + STATES_PAD. Ends with a barrier. */
template <typename T, int D>
__device__ static void states_load_error(const struct page_format *f, const struct states_block<T> *b, float *rows) {
    const int pitch = D + STATES_PAD;
    states_widen<T, D>(b->k, true, rows, pitch);
    __syncthreads();
    if (f->k_bits < 16) {
        states_decode<D, true>(b->record, f->k_bits, rows, pitch, true);
    } else {
        for (int i = threadIdx.x; i < KV_BLOCK * D; i += STATES_THREADS) {
            float *at = rows + i / D * pitch + i % D;
            *at = __fsub_rn(*at, device_widen(((const T *)b->record)[i]));
        }
    }
    __syncthreads();
}

/* v [KV_BLOCK][D]: V^q, or V itself. Ends with a barrier. */
template <typename T, int D>
__device__ static void states_load_v(const struct cache_layer *layer, const struct states_block<T> *b, float *v) {
    const uint8_t *part = b->record + page_v_offset(&layer->format);
    if (layer->states_exact_v)
        states_widen<T, D>(b->v, true, v, D);
    else if (layer->format.v_bits == 16)
        states_widen<T, D>((const T *)part, false, v, D);
    else
        states_decode<D, false>(part, layer->format.v_bits, v, D, false);
    __syncthreads();
}

/* w [D][STATES_WIDTH] = columns begin .. of W [D][width]; 0 beyond. Width and begin are multiples of 16: a float4 is inside or outside.
 * Ends with a barrier. */
template <int D> __device__ static void states_load_w(const float *from, int width, int begin, float *w) {
    const int row_vectors = STATES_WIDTH / 4;
    for (int i = threadIdx.x; i < D * row_vectors; i += STATES_THREADS) {
        int c = i / row_vectors, f = begin + i % row_vectors * 4;
        float4 x = make_float4(0, 0, 0, 0);
        if (f < width)
            x = *(const float4 *)(from + c * width + f);
        ((float4 *)w)[i] = x;
    }
    __syncthreads();
}

/* a += x y for one row of a thread's tile: y of N columns. */
template <int N> __device__ static inline void states_fma(float x, const float (&y)[N], float (&a)[N]) {
    for (int j = 0; j < N; j++)
        a[j] = fmaf(x, y[j], a[j]);
}

__device__ static inline void states_read4(const float *from, float *to) {
    float4 x = *(const float4 *)from;
    to[0] = x.x;
    to[1] = x.y;
    to[2] = x.z;
    to[3] = x.w;
}

/* x[i][j] = E[ty + 16 i] . W column (4 tx + j % 4 + 64 (j / 4)): rows below KV_BLOCK, columns below STATES_WIDTH. */
template <int D>
__device__ static void states_logits(const float *rows, const float *w, float (&x)[STATES_PER_THREAD][STATES_PER_THREAD]) {
    int tx = threadIdx.x % STATES_SIDE, ty = threadIdx.x / STATES_SIDE;
    for (int i = 0; i < STATES_PER_THREAD; i++)
        for (int j = 0; j < STATES_PER_THREAD; j++)
            x[i][j] = 0;
#pragma unroll 1
    for (int c = 0; c < D; c += 4) {
        float a[STATES_PER_THREAD][4];
#pragma unroll
        for (int i = 0; i < STATES_PER_THREAD; i++)
            states_read4(rows + (ty + STATES_SIDE * i) * (D + STATES_PAD) + c, a[i]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float b[STATES_PER_THREAD];
            states_read4(w + (c + k) * STATES_WIDTH + 4 * tx, b);
            states_read4(w + (c + k) * STATES_WIDTH + 64 + 4 * tx, b + 4);
#pragma unroll
            for (int i = 0; i < STATES_PER_THREAD; i++)
                states_fma(a[i][k], b, x[i]);
        }
    }
}

/* Largest, and sum of e^(x - max), over the slice's features of token ty + 16 i, known to the 16 threads of the token. Joins what
 * other slices of the half gave: on return x holds e^(x - max), 0 beyond the half. */
__device__ static void states_softmax(const struct states_slice *s, int begin, float (&x)[STATES_PER_THREAD][STATES_PER_THREAD],
                                      float (&max)[STATES_PER_THREAD], float (&sum)[STATES_PER_THREAD]) {
    int tx = threadIdx.x % STATES_SIDE;
#pragma unroll
    for (int i = 0; i < STATES_PER_THREAD; i++) {
        float top = -INFINITY, part = 0;
#pragma unroll
        for (int j = 0; j < STATES_PER_THREAD; j++) {
            if (begin + 4 * tx + j % 4 + j / 4 * 64 >= s->width)
                x[i][j] = -INFINITY;
            top = fmaxf(top, x[i][j]);
        }
        for (int offset = STATES_SIDE / 2; offset > 0; offset /= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
        top = fmaxf(top, max[i]);
#pragma unroll
        for (int j = 0; j < STATES_PER_THREAD; j++) {
            x[i][j] = expf(x[i][j] - top);
            part += x[i][j];
        }
        for (int offset = STATES_SIDE / 2; offset > 0; offset /= 2)
            part += __shfl_xor_sync(0xffffffffu, part, offset);
        sum[i] = sum[i] * expf(max[i] - top) + part;
        max[i] = top;
    }
}

/* rows: E -> phi of the slice, [KV_BLOCK][STATES_WIDTH], pitch STATES_WIDTH + STATES_PAD; 0 for sink tokens and beyond the half. Ends with
 * a barrier. */
template <int D>
__device__ static void states_phi(const struct cache_layer *layer, const struct states_slice *s, int head, int first,
                                  struct states_shared<D> *shared) {
    int tx = threadIdx.x % STATES_SIDE, ty = threadIdx.x / STATES_SIDE;
    const float *w = layer->phi_k + ((int64_t)head * 2 + s->half) * D * s->width; /* [D][width] */
    float gate = layer->gate ? layer->gate[head] : 1.0f;
    float x[STATES_PER_THREAD][STATES_PER_THREAD], max[STATES_PER_THREAD], sum[STATES_PER_THREAD];
    for (int i = 0; i < STATES_PER_THREAD; i++) {
        max[i] = -FLT_MAX; /* finite: e^(max - top) must not become a NaN */
        sum[i] = 0;
    }
    int n = (s->width + STATES_WIDTH - 1) / STATES_WIDTH, own = s->begin / STATES_WIDTH;
#pragma unroll 1
    for (int i = 1; i <= n; i++) { /* its own slice last */
        int begin = (own + i) % n * STATES_WIDTH;
        states_load_w<D>(w, s->width, begin, shared->other);
        states_logits<D>(shared->rows, shared->other, x);
        __syncthreads();
        states_softmax(s, begin, x, max, sum);
    }
#pragma unroll
    for (int i = 0; i < STATES_PER_THREAD; i++) {
        int token = ty + STATES_SIDE * i;
        float *to = shared->rows + token * (STATES_WIDTH + STATES_PAD) + 4 * tx;
#pragma unroll
        for (int j = 0; j < STATES_PER_THREAD; j++)
            x[i][j] = token < first ? 0.0f : x[i][j] / sum[i] * gate;
        *(float4 *)to = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
        *(float4 *)(to + 64) = make_float4(x[i][4], x[i][5], x[i][6], x[i][7]);
    }
    __syncthreads();
}

/* sum[i][j] = sum over tokens of phi[token][4 ty + i % 4 + 64 (i / 4)] V[token][4 tx + j % 4 + 64 (j / 4)]. */
template <int D>
__device__ static void states_product(const struct states_shared<D> *shared, float (&sum)[STATES_PER_THREAD][D / STATES_SIDE]) {
    int tx = threadIdx.x % STATES_SIDE, ty = threadIdx.x / STATES_SIDE;
    for (int i = 0; i < STATES_PER_THREAD; i++)
        for (int j = 0; j < D / STATES_SIDE; j++)
            sum[i][j] = 0;
#pragma unroll 4
    for (int t = 0; t < KV_BLOCK; t++) {
        float a[STATES_PER_THREAD], b[D / STATES_SIDE];
        const float *phi = shared->rows + t * (STATES_WIDTH + STATES_PAD) + 4 * ty;
        states_read4(phi, a);
        states_read4(phi + 64, a + 4);
        for (int j = 0; j < D / STATES_SIDE; j += 4)
            states_read4(shared->other + t * D + 4 * tx + j * STATES_SIDE, b + j);
#pragma unroll
        for (int i = 0; i < STATES_PER_THREAD; i++)
            states_fma(a[i], b, sum[i]);
    }
}

/* One block's sums of the slice into `to` (laid out as the states of a head): added, or stored. The same threads always write the same
 * entries, so blocks that one CTA adds one after the other need no order between threads. Only features below the half's width. */
template <int D>
__device__ static void states_write(const struct cache_layer *layer, const struct states_slice *s, const struct states_shared<D> *shared,
                                    const float (&sum)[STATES_PER_THREAD][D / STATES_SIDE], float *to, bool add) {
    int tx = threadIdx.x % STATES_SIDE, ty = threadIdx.x / STATES_SIDE, feature = s->half * s->width + s->begin;
#pragma unroll
    for (int i = 0; i < STATES_PER_THREAD; i++) {
        int f = 4 * ty + i % 4 + i / 4 * 64;
        if (s->begin + f >= s->width)
            continue;
#pragma unroll
        for (int j = 0; j < D / STATES_SIDE; j += 4) {
            float4 *at = (float4 *)(to + (int64_t)(feature + f) * D + 4 * tx + j * STATES_SIDE);
            float4 old = add ? *at : make_float4(0, 0, 0, 0);
            *at = make_float4(old.x + sum[i][j], old.y + sum[i][j + 1], old.z + sum[i][j + 2], old.w + sum[i][j + 3]);
        }
    }
    int f = threadIdx.x;
    if (f < STATES_WIDTH && s->begin + f < s->width) {
        float p = 0, *at = to + (int64_t)layer->features * D + feature + f;
#pragma unroll 8
        for (int t = 0; t < KV_BLOCK; t++)
            p += shared->rows[t * (STATES_WIDTH + STATES_PAD) + f];
        *at = add ? *at + p : p;
    }
}

/* A block's sums of one slice, added to or stored in `to`. For all threads of a CTA of STATES_THREADS; ends with a barrier. */
template <typename T, int D>
__device__ static void states_add_block(const struct cache_layer *layer, int slice, const struct states_block<T> *block,
                                        struct states_shared<D> *shared, float *to, bool add) {
    struct states_slice s = states_slice_of(layer, slice);
    float sum[STATES_PER_THREAD][D / STATES_SIDE];
    states_load_error<T, D>(&layer->format, block, shared->rows);
    states_phi<D>(layer, &s, block->head, block->first, shared);
    states_load_v<T, D>(layer, block, shared->other);
    states_product<D>(shared, sum);
    states_write<D>(layer, &s, shared, sum, to, add);
    __syncthreads();
}
