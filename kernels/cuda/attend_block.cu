/* Attention over the cache for a prompt that is fed through it: many rows of one sequence in a step, all in one block, so all see the
 * same pages. A run's query vectors of one KV head (vector i: row i / group, head i % group) are cut into tiles of 64, one CTA each;
 * a block is copied to shared memory once per tile and used by its four warps, 16 vectors each (attend_block.cuh); 2-bit pages are unpacked
 * there for the four warps together where the device can use them so (attend_unpack.cuh).
 *
 * Pages are split over several CTAs when tiles do not fill the GPU; the last split takes the sink and the 16-bit blocks too. The
 * splits' sums go to scratch, and the last CTA to arrive adds them in order, so the bits do not depend on timing. What runs there are
 * stands in device memory: the grid is made for one run of all rows, and a CTA takes every gridDim.x-th tile that it finds. */
#include "kernels/cuda/attend_unpack.cuh"

enum {
    BLOCK_WARPS = 4,
    BLOCK_THREADS = BLOCK_WARPS * WARP,
    WARP_VECTORS = 16, /* rows of an MMA */
    BLOCK_VECTORS = BLOCK_WARPS * WARP_VECTORS,
    CTAS_PER_SM = 2,   /* what registers and shared memory allow */
    MAX_SPLITS = 16,
    ROWS_COST = 2,     /* pages that a 16-bit block is worth: it is copied while nothing else is done */
    MASK_WORDS = STEP_MAX_ROWS / 32,
    COPY_BYTES = 16,   /* of one cp.async */
};

/* ---- which rows ---------------------------------------------------------------------------------------------------- */

struct block_tile {
    int row, n_rows; /* the run */
    int first, n;    /* vectors; n = 0: no such tile */
    int n_tiles;     /* of the step */
};

/* First bit set at or after `bit` in MASK_WORDS words; STEP_MAX_ROWS if there is none. */
__device__ static inline int next_bit(const uint32_t *words, int bit) {
    if (bit >= STEP_MAX_ROWS)
        return STEP_MAX_ROWS;
    int word = bit / 32;
    uint32_t rest = words[word] & ~0u << bit % 32;
    while (!rest && ++word < MASK_WORDS)
        rest = words[word];
    return rest ? word * 32 + __ffs((int)rest) - 1 : STEP_MAX_ROWS;
}

/* The `slot`-th tile of the step, by all threads of a CTA: attend_run_length and a running sum, 32 rows at a time. */
__device__ static void tile_find(const struct attend_args &args, int slot, struct block_tile *tile) {
    __shared__ uint32_t begins[MASK_WORDS]; /* bit: the row begins a run, or is beyond the step's rows */
    __shared__ uint32_t heads[MASK_WORDS];  /* bit: the row begins a run that is not padding */
    const struct step_input *in = args.in;
    int n_rows = min(attend_n_rows(&args), (int)STEP_MAX_ROWS), group = args.n_heads / args.layout.n_kv_heads;
    __syncthreads(); /* nobody reads the tile before any more */
    for (int row = threadIdx.x; row < STEP_MAX_ROWS; row += BLOCK_THREADS) {
        bool begin = row >= n_rows || row == 0 || !attend_same_run(in, row, row - 1);
        uint32_t mask = __ballot_sync(0xffffffffu, begin), real = __ballot_sync(0xffffffffu, row < n_rows && in->row[row].seq >= 0);
        if (row % 32 == 0) {
            begins[row / 32] = mask;
            heads[row / 32] = mask & real;
        }
    }
    if (threadIdx.x == 0)
        tile->n = 0;
    __syncthreads();
    int before = 0;
    for (int word = 0; word * 32 < n_rows && threadIdx.x < WARP; word++) {
        int row = word * 32 + threadIdx.x, length = heads[word] >> threadIdx.x & 1 ? next_bit(begins, row + 1) - row : 0;
        int n_vectors = length < ATTEND_BLOCK_ROWS ? 0 : length * group;
        int n_tiles = (n_vectors + BLOCK_VECTORS - 1) / BLOCK_VECTORS, upto = n_tiles;
        for (int step = 1; step < WARP; step *= 2) {
            int lower = __shfl_up_sync(0xffffffffu, upto, step);
            upto += (int)threadIdx.x >= step ? lower : 0;
        }
        int index = slot - before - (upto - n_tiles);
        if (index >= 0 && index < n_tiles) {
            tile->row = row;
            tile->n_rows = length;
            tile->first = index * BLOCK_VECTORS;
            tile->n = min((int)BLOCK_VECTORS, n_vectors - index * BLOCK_VECTORS);
        }
        before += __shfl_sync(0xffffffffu, upto, WARP - 1);
    }
    if (threadIdx.x == 0)
        tile->n_tiles = before;
    __syncthreads();
}

/* ---- blocks to shared memory ------------------------------------------------------------------------------------------ */

__device__ static inline void copy_async(uint8_t *to, const uint8_t *from) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(address), "l"(from) : "memory");
}
__device__ static inline void copy_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N> __device__ static inline void copy_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }

__device__ static inline void stage_bytes(uint8_t *to, const uint8_t *from, int bytes) {
#pragma unroll 1
    for (int i = (int)threadIdx.x * COPY_BYTES; i < bytes; i += BLOCK_THREADS * COPY_BYTES)
        copy_async(to + i, from + i);
}

/* The first n of KV_BLOCK rows of D 16-bit values, row_bytes apart; the others become 0. */
template <int D> __device__ static inline void stage_rows(uint8_t *to, int row_bytes, const uint8_t *from, int n) {
    constexpr int n_copies = D * 2 / COPY_BYTES;
#pragma unroll 4
    for (int i = threadIdx.x; i < KV_BLOCK * n_copies; i += BLOCK_THREADS) {
        int row = i / n_copies, at = i % n_copies * COPY_BYTES;
        if (row < n)
            copy_async(to + row * row_bytes + at, from + row * D * 2 + at);
        else
            *reinterpret_cast<uint4 *>(to + row * row_bytes + at) = make_uint4(0, 0, 0, 0);
    }
}

/* Bytes of K's and V's part of a page in shared memory. */
__host__ __device__ constexpr int staged_k_bytes(int d, int bits) {
    return bits == 16 ? KV_BLOCK * k_row_bytes(d) : KV_BLOCK * d * bits / 8 + 4 * d;
}
__host__ __device__ constexpr int staged_v_bytes(int d, int bits) {
    return bits == 16 ? KV_BLOCK * v_row_bytes(d) : KV_BLOCK * d * bits / 8 + 4 * KV_BLOCK;
}

/* Shared memory: q of the warps, then room for one block in 16 bit, which is room for two pages of codes; then cos and sin of one page. */
__host__ __device__ constexpr int shared_q_bytes(int d) { return BLOCK_VECTORS * d * 4; }
__host__ __device__ constexpr int shared_stage_bytes(int d) { return staged_k_bytes(d, 16) + staged_v_bytes(d, 16); }
__host__ __device__ constexpr int shared_bytes(int d) {
    return shared_q_bytes(d) + shared_stage_bytes(d) + d * (int)sizeof(float);
}

/* ---- one tile ------------------------------------------------------------------------------------------------------ */

template <int D> struct tile_state { /* of a thread; all but queries and sums are the same in the CTA */
    const struct attend_args *args;
    struct attend_view view;
    int kv_head;
    bool busy;      /* this warp has vectors */
    uint8_t *stage;
    float *turn;    /* [cos, sin][D/2] */
    warp_queries queries;
    warp_sums<D> sums;
};

/* Starts copying page `page` of the store. K_BITS, V_BITS: 0 where they are known at run time only. */
template <int D, int K_BITS, int V_BITS> __device__ static inline void page_stage(const tile_state<D> &state, int page, uint8_t *to) {
    const struct page_format &format = state.args->layer.format;
    const int k_bits = K_BITS ? K_BITS : format.k_bits, v_bits = V_BITS ? V_BITS : format.v_bits, k_bytes = staged_k_bytes(D, k_bits);
    const uint8_t *record = attend_page_at(state.args, page, state.kv_head);
    const uint8_t *v = record + page_v_offset(&format);
    if (k_bits == 16)
        stage_rows<D>(to, k_row_bytes(D), record, KV_BLOCK);
    else
        stage_bytes(to, record, k_bytes);
    if (v_bits == 16)
        stage_rows<D>(to + k_bytes, v_row_bytes(D), v, KV_BLOCK);
    else
        stage_bytes(to + k_bytes, v, staged_v_bytes(D, v_bits));
    copy_commit();
}

/* The angles of page `local`'s first position. */
template <int D> __device__ static inline void page_turn(const tile_state<D> &state, int local) {
    const struct attend_args *args = state.args;
    int64_t block = state.view.first_owned + (int64_t)local * args->layout.cp_size;
    int i = threadIdx.x;
    if (i < D / 2)
        sincosf((float)(block * KV_BLOCK) * args->layer.inv_freq[i], &state.turn[D / 2 + i], &state.turn[i]);
}

/* What pages of local order have in common, and what page `local` has of its own. */
template <int D, bool MEAN> __device__ static inline block_piece pages_piece(const tile_state<D> &state) {
    const struct cache_layer *layer = &state.args->layer;
    block_piece piece = {.k = NULL, .v = NULL, .k_parameters = NULL, .v_parameters = NULL};
    piece.k_bits = layer->format.k_bits;
    piece.v_bits = layer->format.v_bits;
    piece.end = KV_BLOCK;
    piece.turn = state.turn;
    piece.mean = MEAN && layer->mean ? layer->mean + (int64_t)state.kv_head * KV_BLOCK * D : NULL;
    return piece;
}
template <int D> __device__ static inline void page_begin(const tile_state<D> &state, int local, block_piece &piece) {
    piece.begin = attend_page_begin(state.args, &state.view, local);
    piece.masked = piece.begin > 0;
}

/* Pages begin .. end-1 of local order, the next one on its way where two fit. */
template <int D, typename T, int K_BITS, int V_BITS, bool MEAN>
__device__ static inline void tile_pages(tile_state<D> &state, int begin, int end) {
    const struct attend_args *args = state.args;
    const struct page_format &format = args->layer.format;
    int bytes = staged_k_bytes(D, format.k_bits) + staged_v_bytes(D, format.v_bits), staged = begin;
    int n_stages = 2 * bytes <= shared_stage_bytes(D) ? 2 : 1;
    block_piece piece = pages_piece<D, MEAN>(state);
    queries_prepare<D, T>(state.queries, args->layer.rotate_k, args->scale);
    for (int local = begin; local < end; local++) {
        for (; staged < end && staged < local + n_stages; staged++)
            page_stage<D, K_BITS, V_BITS>(state, attend_page_id(args, &state.view, staged),
                                          state.stage + (staged - begin) % n_stages * bytes);
        if (MEAN && piece.mean)
            page_turn(state, local);
        if (staged > local + 1)
            copy_wait<1>();
        else
            copy_wait<0>();
        __syncthreads();
        piece.k = state.stage + (local - begin) % n_stages * bytes;
        piece.v = piece.k + staged_k_bytes(D, format.k_bits);
        piece.k_parameters = reinterpret_cast<const uint4 *>(piece.k + page_codes_bytes(D, format.k_bits));
        piece.v_parameters = reinterpret_cast<const uint4 *>(piece.v + page_codes_bytes(D, format.v_bits));
        page_begin(state, local, piece);
        if (state.busy && piece.begin < KV_BLOCK)
            warp_attend<D, T, K_BITS, V_BITS, MEAN>(piece, state.queries, state.sums);
        __syncthreads();
    }
}

/* The same with each page unpacked for all warps. While it is used, the next one is on its way. */
template <int D, typename T, bool MEAN> __device__ static inline void tile_pages_unpacked(tile_state<D> &state, int begin, int end) {
    static_assert(unpacked_bytes(D) + staged_k_bytes(D, 2) + staged_v_bytes(D, 2) <= shared_stage_bytes(D), "one page and the next");
    const struct attend_args *args = state.args;
    uint8_t *record = state.stage + unpacked_bytes(D);
    block_piece piece = pages_piece<D, MEAN>(state);
    if (begin < end)
        page_stage<D, 2, 2>(state, attend_page_id(args, &state.view, begin), record);
    queries_prepare<D, T>(state.queries, args->layer.rotate_k, args->scale);
#pragma unroll 1
    for (int local = begin; local < end; local++) {
        int next = local + 1 < end ? attend_page_id(args, &state.view, local + 1) : 0; /* read early: the copy waits for it */
        copy_wait<0>();
        __syncthreads(); /* the page is here, and nobody uses the one before */
        page_unpack<D>(record, state.stage, threadIdx.x / WARP, state.queries.lane, piece);
        if (MEAN && piece.mean)
            page_turn(state, local);
        products_see_stores();
        __syncthreads();
        if (local + 1 < end)
            page_stage<D, 2, 2>(state, next, record);
        page_begin(state, local, piece);
        if (piece.begin < KV_BLOCK)
            group_attend<D, T, MEAN>(piece, state.queries, state.sums);
    }
    __syncthreads();
}

/* n tokens in 16 bit: rows of K, those of V behind them at `v`. */
template <int D, typename T>
__device__ static inline void tile_rows(tile_state<D> &state, const uint8_t *k, const uint8_t *v, int n, bool current) {
    uint8_t *to = state.stage;
    stage_rows<D>(to, k_row_bytes(D), k, n);
    stage_rows<D>(to + staged_k_bytes(D, 16), v_row_bytes(D), v, n);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    block_piece piece = {.k = to, .v = to + staged_k_bytes(D, 16)};
    piece.k_bits = piece.v_bits = 16;
    piece.masked = current || n < KV_BLOCK;
    piece.current = current;
    piece.end = n;
    if (state.busy)
        warp_attend<D, T, 16, 16, false>(piece, state.queries, state.sums);
    __syncthreads();
}

/* The sink and the 16-bit blocks up to the run's last row, with q as it was given. */
template <int D, typename T> __device__ static inline void tile_window(tile_state<D> &state) {
    const struct attend_args *args = state.args;
    const struct attend_view *view = &state.view;
    int n_sink = attend_sink_tokens(args, view);
    if (args->layer.rotate_k)
        queries_prepare<D, T>(state.queries, false, args->scale);
    if (n_sink > 0) {
        const uint8_t *k = attend_sink_rows(args, view, state.kv_head);
        tile_rows<D, T>(state, k, k + (int64_t)n_sink * D * 2, n_sink, false);
    }
    for (int block = view->window; block <= view->position / KV_BLOCK; block += args->layout.cp_size) {
        const uint8_t *k = attend_window_rows(args, view, block, state.kv_head);
        int n = attend_window_tokens(view->position, block);
        tile_rows<D, T>(state, k, k + KV_BLOCK * D * 2, n, block == view->position / KV_BLOCK);
    }
}

/* First page of a split; of split n_splits: all. The last one takes as many fewer as its 16-bit blocks are worth. */
template <int D> __device__ static inline int split_begin(const tile_state<D> &state, int split, int n_splits) {
    const struct attend_view *view = &state.view;
    int last = view->position / KV_BLOCK, n_blocks = attend_sink_tokens(state.args, view) > 0;
    if (view->window <= last)
        n_blocks += (last - view->window) / state.args->layout.cp_size + 1;
    return min(view->n_pages, (view->n_pages + ROWS_COST * n_blocks) * split / n_splits); /* at most 2^24 pages */
}

/* Where the sums of (tile, KV head, split) lie: [BLOCK_VECTORS][D + 4]: Y, m (M_NONE: no token), l. */
__host__ __device__ static inline int64_t split_floats(int d) { return (int64_t)BLOCK_VECTORS * (d + 4); }
__device__ static inline float *split_sums(float *scratch, int slot, int kv_head, int n_kv_heads, int n_splits, int split, int d) {
    return scratch + (((int64_t)slot * n_kv_heads + kv_head) * n_splits + split) * split_floats(d);
}

/* Record of vector i of the tile. */
__device__ static inline float *tile_record(const struct attend_args *args, const struct block_tile &tile, int kv_head, int i) {
    int group = args->n_heads / args->layout.n_kv_heads;
    return attend_record(args, tile.row + (tile.first + i) / group, kv_head * group + (tile.first + i) % group);
}

/* Vector r of this lane's row pair: its sums to `y`, its m (times LN_2) and l to the caller's places. */
template <int D>
__device__ static inline void sums_write(const warp_sums<D> &sums, int r, int lane, float *y) {
    float zero = quad_sum(sums.z[r]);
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        float *at = y + 8 * n + 2 * (lane % 4);
        if (y)
            *reinterpret_cast<float2 *>(at) = make_float2(sums.y[n][2 * r] + zero, sums.y[n][2 * r + 1] + zero);
    }
}

/* m in units of log2(e), M_NONE for no token, as the record has it. */
__device__ static inline float record_max(float m) { return m == M_NONE ? -INFINITY : m * LN_2; }

template <int D>
__device__ static inline void tile_finish(const tile_state<D> &state, const struct block_tile &tile, int warp, float *sums) {
    int lane = state.queries.lane;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = warp * WARP_VECTORS + lane / 4 + 8 * r;
        bool real = i < tile.n;
        float l = quad_sum(state.sums.l[r]), m = state.sums.m[r];
        float *y = NULL;
        if (real)
            y = sums ? sums + (int64_t)i * (D + 4) : tile_record(state.args, tile, state.kv_head, i);
        sums_write<D>(state.sums, r, lane, y);
        if (!real || lane % 4)
            continue;
        if (sums)
            *reinterpret_cast<float2 *>(y + D) = make_float2(m, l);
        else
            attend_finish_record(state.args, y, record_max(m), l);
    }
}

/* ---- splits ---------------------------------------------------------------------------------------------------------- */

/* True in the last of the n CTAs that come here: it sees what they all wrote, and the counter is 0 again. */
__device__ static bool split_arrive(int *counter, int n) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        int before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        last = before + 1 == n;
        if (last)
            *counter = 0;
    }
    __syncthreads();
    return last;
}

/* Adds up the splits of every vector in order. sums: of split 0; factors: shared memory, [n_splits][BLOCK_VECTORS]. */
template <int D>
__device__ static void tile_merge(const struct attend_args *args, const struct block_tile &tile, int kv_head, const float *sums,
                                  int n_splits, float *factors) {
    constexpr int n_quads = D / 4; /* four channels a thread */
    int thread = threadIdx.x;
    if (thread < tile.n) {
        const float *tail = sums + thread * (D + 4) + D;
        float m = M_NONE, l = 0.0f;
        for (int split = 0; split < n_splits; split++)
            m = fmaxf(m, tail[split * split_floats(D)]);
        for (int split = 0; split < n_splits; split++) {
            float2 part = *reinterpret_cast<const float2 *>(tail + split * split_floats(D));
            float factor = fast_exp2(part.x - m); /* where no split has a token 1, and all sums are 0 */
            factors[split * BLOCK_VECTORS + thread] = factor;
            l += factor * part.y;
        }
        attend_finish_record(args, tile_record(args, tile, kv_head, thread), record_max(m), l);
    }
    __syncthreads();
#pragma unroll 2
    for (int at = thread; at < tile.n * n_quads; at += BLOCK_THREADS) {
        int i = at / n_quads, c = at % n_quads * 4;
        const float *from = sums + i * (D + 4) + c;
        float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int split = 0; split < n_splits; split++) {
            float4 part = *reinterpret_cast<const float4 *>(from + split * split_floats(D));
            float factor = factors[split * BLOCK_VECTORS + i];
            y.x += factor * part.x, y.y += factor * part.y, y.z += factor * part.z, y.w += factor * part.w;
        }
        *reinterpret_cast<float4 *>(tile_record(args, tile, kv_head, i) + c) = y;
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

/* Queries of the tile and what each of them sees of the current block. */
template <int D, typename T>
__device__ static inline void tile_vectors(const struct attend_args &args, const struct block_tile &tile, int position, int kv_head,
                                           struct block_vector *vectors) {
    int group = args.n_heads / args.layout.n_kv_heads;
    if (threadIdx.x < BLOCK_VECTORS) {
        int i = tile.first + threadIdx.x, row = tile.row + i / group;
        bool real = i < tile.first + tile.n;
        int64_t at = ((int64_t)row * args.n_heads + kv_head * group + i % group) * D;
        vectors[threadIdx.x].q = real ? (const T *)args.q + at : NULL;
        vectors[threadIdx.x].visible = real ? args.in->row[row].position - position / KV_BLOCK * KV_BLOCK + 1 : KV_BLOCK;
    }
    __syncthreads();
}

/* One split of one tile. */
template <int D, typename T, int K_BITS, int V_BITS, bool MEAN>
__device__ static inline void tile_attend(const struct attend_args &args, const struct block_tile &tile, int split, int n_splits,
                                          uint8_t *shared, struct block_vector *vectors, float *sums) {
    int warp = threadIdx.x / WARP;
    tile_state<D> state;
    state.args = &args;
    state.view = attend_view_of(&args, &args.in->row[tile.row + tile.n_rows - 1]);
    state.kv_head = blockIdx.y;
    state.busy = warp * WARP_VECTORS < tile.n;
    state.stage = shared + shared_q_bytes(D);
    state.turn = reinterpret_cast<float *>(state.stage + shared_stage_bytes(D));
    state.queries.parts = reinterpret_cast<float4 *>(shared) + warp * (WARP_VECTORS * D / 4);
    state.queries.vectors = vectors + warp * WARP_VECTORS;
    state.queries.lane = threadIdx.x % WARP;
    tile_vectors<D, T>(args, tile, state.view.position, state.kv_head, vectors);
    sums_clear(state.sums);
    int begin = split_begin(state, split, n_splits), end = split_begin(state, split + 1, n_splits);
    if constexpr (block_unpacks<K_BITS, V_BITS>())
        tile_pages_unpacked<D, T, MEAN>(state, begin, end);
    else
        tile_pages<D, T, K_BITS, V_BITS, MEAN>(state, begin, end);
    if (split == n_splits - 1)
        tile_window<D, T>(state);
    tile_finish(state, tile, warp, sums);
}

/* Why all accesses are in bounds. Rows: tile_find gives rows below attend_n_rows only, and a vector of the tile is a row of its run
 * (i / group < n_rows since i < n_rows * group), so q, positions and records are those of live rows. Cache: attend_view_of counts what
 * this rank owns up to the run's last position; a page's parts are read to page_record_size, sink and window rows to the tokens
 * that the last row sees. Shared memory: two pages fit shared_stage_bytes where two are used, one always does (staged_k_bytes and
 * staged_v_bytes grow with the bits), as does an unpacked one beside the next; a warp's queries are 16 D floats of the 64 D. Scratch and
 * counters: slot < n_tiles <= most_tiles, for which choose_splits allows no more than fit.
 *
 * Of the kernel in front only the scratch, the counters and other rows' records matter; but before the wait no more is read than any kernel
 * may (device.cuh). */
template <int D, typename T, int K_BITS, int V_BITS, bool MEAN>
static __global__ void __launch_bounds__(BLOCK_THREADS, CTAS_PER_SM)
    attend_block_kernel(const __grid_constant__ struct attend_args args, int n_splits, float *scratch, int *arrived) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ struct block_tile tile;
    __shared__ struct block_vector vectors[BLOCK_VECTORS];
    int kv_head = blockIdx.y, split = blockIdx.z, n_kv_heads = args.layout.n_kv_heads;
    tile_find(args, blockIdx.x, &tile);
    wait_for_earlier();
    let_later_begin();
    for (int slot = blockIdx.x; slot < tile.n_tiles; slot += gridDim.x) {
        if (slot != blockIdx.x)
            tile_find(args, slot, &tile);
        float *first = split_sums(scratch, slot, kv_head, n_kv_heads, n_splits, 0, D);
        tile_attend<D, T, K_BITS, V_BITS, MEAN>(args, tile, split, n_splits, shared, vectors,
                                                n_splits > 1 ? first + split * split_floats(D) : NULL);
        if (n_splits > 1 && split_arrive(arrived + (int64_t)slot * n_kv_heads + kv_head, n_splits))
            tile_merge<D>(&args, tile, kv_head, first, n_splits, reinterpret_cast<float *>(shared));
    }
}

/* ---- launch -------------------------------------------------------------------------------------------------------- */

/* Most tiles that runs of at least ATTEND_BLOCK_ROWS rows of n_rows can make: each run rounds up once. */
static int64_t most_tiles(int n_rows, int group) { return (int64_t)n_rows * group / BLOCK_VECTORS + n_rows / ATTEND_BLOCK_ROWS; }

/* As many as fill the GPU when all rows are one run of n_tiles, and as there is room for. */
static int choose_splits(const struct cuda_launch *launch, const struct attend_args *args, int64_t n_tiles) {
    int group = args->n_heads / args->layout.n_kv_heads;
    int64_t n = min_i64(MAX_SPLITS, (int64_t)CTAS_PER_SM * launch->n_sms / (n_tiles * args->layout.n_kv_heads));
    int64_t n_segments = most_tiles(args->n_rows, group) * args->layout.n_kv_heads;
    int64_t split_bytes = n_segments * split_floats(args->layout.head_dim) * (int64_t)sizeof(float);
    return n_segments > CUDA_COUNTERS ? 1 : (int)max_i64(1, min_i64(n, (int64_t)CUDA_SCRATCH_BYTES / split_bytes));
}

typedef void (*block_kernel)(struct attend_args args, int n_splits, float *scratch, int *arrived);

/* The presets have 2 bits; other pairs share a kernel. */
template <int D, typename T> static block_kernel choose_kernel(const struct cache_layer *layer) {
    if (layer->format.k_bits != 2 || layer->format.v_bits != 2)
        return attend_block_kernel<D, T, 0, 0, true>;
    return layer->mean ? attend_block_kernel<D, T, 2, 2, true> : attend_block_kernel<D, T, 2, 2, false>;
}

template <int D> static int block_launch(const struct cuda_launch *launch, const struct attend_args *args) {
    bool half = args->layer.format.window == DTYPE_F16;
    block_kernel kernel = half ? choose_kernel<D, __half>(&args->layer) : choose_kernel<D, __nv_bfloat16>(&args->layer);
    int n_kv_heads = args->layout.n_kv_heads;
    int64_t n_tiles = ceil_div((int64_t)args->n_rows * (args->n_heads / n_kv_heads), BLOCK_VECTORS);
    int n_splits = choose_splits(launch, args, n_tiles);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(D));
    if (error != cudaSuccess)
        FAIL(STATUS_FAILED, "CUDA: attend_block: %d bytes of shared memory: %s", shared_bytes(D), cudaGetErrorString(error));
    dim3 grid((unsigned)n_tiles, (unsigned)n_kv_heads, (unsigned)n_splits);
    (void)launch_early(launch, kernel, grid, BLOCK_THREADS, shared_bytes(D), *args, n_splits, (float *)launch->scratch, launch->counters);
    CHECK_LAUNCH("attend_block");
    return STATUS_OK;
}

static bool known_bits(int bits) { return bits == 2 || bits == 4 || bits == 8 || bits == 16; }

extern "C" int cuda_attend_block(const struct cuda_launch *launch, const struct attend_args *args) {
    const struct page_format *format = &args->layer.format;
    const struct cache_layout *layout = &args->layout;
    if (args->n_rows < ATTEND_BLOCK_ROWS)
        return STATUS_OK;
    if (args->n_rows > STEP_MAX_ROWS)
        FAIL(STATUS_USAGE, "attend: %d rows, a step has at most %d", args->n_rows, STEP_MAX_ROWS);
    if (format->window != DTYPE_F16 && format->window != DTYPE_BF16)
        FAIL(STATUS_USAGE, "attend: a GPU's cache holds f16 or bf16, not %s", dtype_name(format->window));
    if (layout->head_dim != 64 && layout->head_dim != 128)
        FAIL(STATUS_USAGE, "attend: head_dim %d, expected 64 or 128", layout->head_dim);
    if (!known_bits(format->k_bits) || !known_bits(format->v_bits))
        FAIL(STATUS_USAGE, "attend: %d bits for keys and %d for values, expected 2, 4, 8 or 16", format->k_bits, format->v_bits);
    if (layout->n_kv_heads < 1 || args->n_heads % layout->n_kv_heads)
        FAIL(STATUS_USAGE, "attend: %d query heads on %d KV heads", args->n_heads, layout->n_kv_heads);
    if (args->layer.mean && !args->layer.inv_freq)
        FAIL(STATUS_USAGE, "attend: mean keys without inv_freq");
    return layout->head_dim == 64 ? block_launch<64>(launch, args) : block_launch<128>(launch, args);
}
