/* A page of 2-bit codes used by four warps at once, on Hopper (sm_90a): the codes are unpacked once for 64 query vectors, to two
 * matrices of fp16 subnormals in shared memory, and multiplied by the tensor cores' asynchronous products (wgmma), which reach rates
 * that mma.sync does not. For attend_block.cu only; other devices and formats use attend_block.cuh, from which all that is not a
 * product comes: rows of A and of the sums lie in a warp's registers as they do there.
 *
 * A matrix has N rows (K: tokens, V: channels) and k-steps of 16 columns, cut into pieces of 8 rows x 8 columns (16 bytes a row), 128
 * bytes in a row: the layout that descriptors call "no swizzle". Piece (rows 8 n .., columns 8 k ..) is number k * N / 8 + n. A lane's
 * word of a record, which is a fragment of mma.m16n8k16 (page.cuh), is then word `lane` of a piece: all banks, no conflicts.
 *
 * Two CTAs share a multiprocessor, and nothing keeps them in step: the tensor cores work for one while the other unpacks, scales
 * queries or takes exponentials. */
#pragma once

#include "kernels/cuda/attend_block.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BLOCK_HAS_WARPGROUPS true
#else
#define BLOCK_HAS_WARPGROUPS false
#endif

enum {
    PIECE_BYTES = 128,
    GROUP_WARPS = 4,   /* of a warpgroup */
    CHUNK_STEPS = 8,   /* k-steps of a chunk of 2-bit codes */
};

/* Does a page of these bits come unpacked? */
template <int K_BITS, int V_BITS> __host__ __device__ constexpr bool block_unpacks() {
    return BLOCK_HAS_WARPGROUPS && K_BITS == 2 && V_BITS == 2;
}

/* ---- the instructions ------------------------------------------------------------------------------------------------ */

/* Products run by themselves, which the compiler does not know: what they use is made before this place, what they made is read
 * behind it. */
template <int N> __device__ static inline void hold_sums(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+f"(c[n][e])::"memory");
}
template <int N> __device__ static inline void hold_operands(uint32_t (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+r"(a[n][e])::"memory");
}

/* Registers written so far are there for the products that follow. */
__device__ static inline void products_begin(void) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/* Waits for all products. */
__device__ static inline void products_end(void) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

/* Shared memory written by plain stores can be read by products, behind a barrier. */
__device__ static inline void products_see_stores(void) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* k-step 0 of a matrix of n_rows rows; the next one is matrix_step further. PTX manual, "matrix descriptor": address, distance of
 * pieces along k, distance along the rows, all in units of 16 bytes. */
__device__ static inline uint64_t matrix_descriptor(const uint8_t *matrix, int n_rows) {
    uint64_t address = (uint32_t)__cvta_generic_to_shared(matrix) >> 4, along_k = n_rows / 8 * PIECE_BYTES >> 4;
    return (address & 0x3fff) | along_k << 16 | (uint64_t)(PIECE_BYTES >> 4) << 32;
}
__device__ static constexpr int matrix_step(int n_rows) { return 2 * (n_rows / 8 * PIECE_BYTES >> 4); }

#define FOUR(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SIXTEEN(c, n) FOUR(c, n), FOUR(c, (n) + 1), FOUR(c, (n) + 2), FOUR(c, (n) + 3)

/* c += A B^T: A 64 x 16, of which a warp holds 16 rows (a), B a k-step of 8 N rows. */
__device__ static inline void product_add(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
                 "{%32,%33,%34,%35}, %36, add, 1, 1, 0;\n"
                 "}"
                 : SIXTEEN(c, 0), SIXTEEN(c, 4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
#endif
}
__device__ static inline void product_add(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
                 "{%64,%65,%66,%67}, %68, add, 1, 1, 0;\n"
                 "}"
                 : SIXTEEN(c, 0), SIXTEEN(c, 4), SIXTEEN(c, 8), SIXTEEN(c, 12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
#endif
}

/* ---- unpacking ------------------------------------------------------------------------------------------------------- */

/* Codes of N_ROWS x N_COLUMNS to a matrix, by the four warps: chunks warp, warp + 4, .. Places stay where they are: code_exponent. */
template <int N_ROWS, int N_COLUMNS>
__device__ static inline void matrix_unpack(const uint8_t *codes, uint8_t *matrix, int warp, int lane) {
    constexpr int n_steps = N_COLUMNS / 16, n_chunks = N_ROWS / 16 * n_steps / CHUNK_STEPS, column = N_ROWS / 8 * PIECE_BYTES;
#pragma unroll
    for (int i = 0; i < n_chunks; i += GROUP_WARPS) {
        const int chunk = i + warp, tile = chunk * CHUNK_STEPS / n_steps;
        const uint4 words = reinterpret_cast<const uint4 *>(codes)[chunk * WARP + lane];
        uint8_t *to = matrix + 2 * tile * PIECE_BYTES + 4 * lane;
#pragma unroll
        for (int u = 0; u < CHUNK_STEPS; u++) {
            uint8_t *at = to + u / n_steps * 2 * PIECE_BYTES + u % n_steps * 2 * column;
            const int shift = u / GROUP_STEPS * 8, place = u % GROUP_STEPS;
            *reinterpret_cast<uint32_t *>(at) = code_pair<2>(words.x >> shift, place);
            *reinterpret_cast<uint32_t *>(at + PIECE_BYTES) = code_pair<2>(words.y >> shift, place);
            *reinterpret_cast<uint32_t *>(at + column) = code_pair<2>(words.z >> shift, place);
            *reinterpret_cast<uint32_t *>(at + column + PIECE_BYTES) = code_pair<2>(words.w >> shift, place);
        }
    }
}

/* Shared memory of a page: both matrices, its parameters, and the next page as it is copied. */
__host__ __device__ constexpr int matrix_bytes(int d) { return KV_BLOCK * d * 2; }
__host__ __device__ constexpr int unpacked_bytes(int d) { return 2 * matrix_bytes(d) + 4 * d + 4 * KV_BLOCK; }

/* A record at `record` to the matrices and parameters at `to`; piece says where they are. By all threads of the CTA. */
template <int D> __device__ static inline void page_unpack(const uint8_t *record, uint8_t *to, int warp, int lane, block_piece &piece) {
    constexpr int codes = KV_BLOCK * D * 2 / 8, n_k = 4 * D / 16, n_v = 4 * KV_BLOCK / 16; /* 16 bytes of parameters */
    uint4 *parameters = reinterpret_cast<uint4 *>(to + 2 * matrix_bytes(D));
    const int thread = warp * WARP + lane;
    if (thread < n_k + n_v) {
        const uint8_t *from = record + codes + (thread < n_k ? 0 : codes);
        parameters[thread] = reinterpret_cast<const uint4 *>(from)[thread];
    }
    matrix_unpack<KV_BLOCK, D>(record, to, warp, lane);
    matrix_unpack<D, KV_BLOCK>(record + codes + 4 * D, to + matrix_bytes(D), warp, lane);
    piece.k = to;
    piece.v = to + matrix_bytes(D);
    piece.k_parameters = parameters;
    piece.v_parameters = parameters + n_k;
}

/* ---- products -------------------------------------------------------------------------------------------------------- */

/* scores_codes of a matrix. */
template <int D, bool MEAN>
__device__ static inline score_units scores_matrix(const block_piece &piece, const warp_queries &queries, float (&s)[TOKEN_TILES][4]) {
    const uint64_t keys = matrix_descriptor(piece.k, KV_BLOCK);
    int lane = queries.lane, up = TOP_EXPONENT - scale_exponent_k<D>(piece.k_parameters, lane % 4);
    float dot[2] = {0.0f, 0.0f};
    if (MEAN && piece.mean)
        scores_scale(s, power2(up - SUBNORMAL));
    hold_sums(s);
#pragma unroll
    for (int first = 0; first < D / 16; first += GROUP_STEPS) { /* the second group is made while products of the first run */
        uint32_t high[GROUP_STEPS][4], low[GROUP_STEPS][4];
#pragma unroll
        for (int i = 0; i < GROUP_STEPS; i++) {
            hold_loads();
            uint4 p = piece.k_parameters[(first + i) * 4 + lane % 4];
            float unit = power2(up - code_exponent<2>(i));
#pragma unroll
            for (int r = 0; r < 2; r++)
                query_scaled(queries.parts[((first + i) * 2 + r) * WARP + lane], p, unit, dot[r], high[i], low[i], r);
        }
        hold_operands(high);
        hold_operands(low);
        products_begin();
#pragma unroll
        for (int i = 0; i < GROUP_STEPS; i++) {
            product_add(s, high[i], keys + (first + i) * matrix_step(KV_BLOCK));
            product_add(s, low[i], keys + (first + i) * matrix_step(KV_BLOCK));
        }
    }
    products_end();
    hold_sums(s);
    return codes_units(queries, up, dot);
}

/* values_codes of a matrix. */
template <int D>
__device__ static inline void values_matrix(const block_piece &piece, int lane, const float (&s)[TOKEN_TILES][4], const float (&add)[2],
                                            warp_sums<D> &sums) {
    const uint64_t values = matrix_descriptor(piece.v, D);
    uint32_t a[TOKEN_STEPS][4];
    float c[D / 8][4] = {}, down = weights_scaled<D, 2>(piece.v_parameters, lane, s, add, sums, a);
    hold_operands(a);
    hold_sums(c);
    products_begin();
#pragma unroll
    for (int step = 0; step < TOKEN_STEPS; step++)
        product_add(c, a[step], values + step * matrix_step(D));
    products_end();
    hold_sums(c);
    sums_add(sums, 0, c, add[0] * down, add[1] * down);
}

/* warp_attend of an unpacked page; by all warps of a warpgroup together. */
template <int D, typename T, bool MEAN>
__device__ static inline void group_attend(const block_piece &piece, const warp_queries &queries, warp_sums<D> &sums) {
    float s[TOKEN_TILES][4] = {}, add[2];
    if (MEAN && piece.mean)
        scores_mean<D, T>(piece, queries, s);
    score_units units = scores_matrix<D, MEAN>(piece, queries, s);
    if (piece.masked)
        scores_mask(piece, queries, s);
    scores_to_weights<D>(units, s, sums, add);
    values_matrix<D>(piece, queries.lane, s, add, sums);
}
