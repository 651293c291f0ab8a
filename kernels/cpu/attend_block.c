/* Attention over the cache of many rows of one sequence (a prompt that is fed through the cache): all see the same pages, so each is
 * unpacked to float once per tile of query vectors and the rest is matrix products (flash.h). Agrees with attend.c to float
 * rounding. Tiles of (row, head) pairs are spread over threads; a tile is always the same work. */
#include "kernels/cpu/attend.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/simd.h"

/* out[i][o] = code(i, o) * scale[i] + zero[i]; the constants make the fields' places constants. */
SIMD_INLINE void unpack_codes(int bits, int n_g, int n_i, const struct cpu_page_part *part, float *out) {
    const int per_word = 32 / bits;
    float scale[KV_BLOCK], zero[KV_BLOCK];
    simd_widen(DTYPE_F16, part->scale, scale, n_i);
    simd_widen(DTYPE_F16, part->zero, zero, n_i);
    for (int first = 0; first < n_i * n_g; first += per_word) {
        struct w16 words = w16_load(part->codes + (int64_t)(first / per_word) * PAGE_LANES);
#pragma GCC unroll 16
        for (int e = 0; e < per_word; e++) {
            float unit = V16_FIELD_IN_PLACE ? 1.0f / (float)(1u << (bits * e)) : 1.0f;
            struct v16 code = v16_field(words, bits * e, bits);
            int i = (first + e) / n_g;
            v16_store(out + (int64_t)(first + e) * V16, v16_fma(code, v16_set(scale[i] * unit), v16_set(zero[i])));
        }
    }
}

static void unpack_part(const uint8_t *bytes, int d, int bits, int n_i, int n_o, float *out) {
    struct cpu_page_part part = cpu_page_part_of(bytes, d, bits, n_i);
#define UNPACK(b, n_g)                              \
    if (bits == (b) && n_o == (n_g) * V16) {        \
        unpack_codes(b, n_g, n_i, &part, out);      \
        return;                                     \
    }
    UNPACK(2, 4) UNPACK(2, 8) UNPACK(4, 4) UNPACK(4, 8) UNPACK(8, 4) UNPACK(8, 8)
#undef UNPACK
}

/* Query vectors `first` .. of the run: vector i is head i % group of row i / group. */
struct tile {
    const struct attend_args *args;
    struct attend_view view; /* of the run's last row */
    int64_t row;             /* first row of the run */
    int group;
    int64_t first;
    int n;
};

/* keys[c * channel + t * token] = H keys. */
static void rotate_keys(int d, int channel, int token, float *keys) {
    if (channel == 1) {
        for (int t = 0; t < KV_BLOCK; t++)
            attend_rotate(keys + t * token, d);
        return;
    }
    for (int span = 1; span < d; span *= 2)
        for (int c = 0; c < d; c++)
            for (int t = 0; t < KV_BLOCK && !(c & span); t++) {
                float *at = keys + c * channel + t, a = at[0], b = at[span * channel];
                at[0] = a + b;
                at[span * channel] = a - b;
            }
    for (int i = 0; i < d * KV_BLOCK; i++)
        keys[i] *= 1.0f / sqrtf((float)d);
}

/* keys[c * channel + t * token] += R_jG mean[t]. */
static void add_means(const struct attend_args *args, int kv_head, int64_t block, int channel, int token, float *keys) {
    const float *mean = attend_mean_of(args, kv_head);
    int d = args->layout.head_dim, half = d / 2;
    for (int i = 0; i < half; i++) {
        float angle = (float)(block * KV_BLOCK) * args->layer.inv_freq[i], cosine = cosf(angle), sine = sinf(angle);
        for (int t = 0; t < KV_BLOCK; t++) {
            float a = mean[t * d + i], b = mean[t * d + i + half];
            keys[i * channel + t * token] += a * cosine - b * sine;
            keys[(i + half) * channel + t * token] += b * cosine + a * sine;
        }
    }
}

/* A page's keys become those that the query as it is given meets: (q H) . k = q . (H k), (R_-jG q) . mean = q . (R_jG mean). */
static void whole_keys(const struct attend_args *args, int kv_head, int64_t block, bool by_channel, float *keys) {
    int d = args->layout.head_dim, channel = by_channel ? KV_BLOCK : 1, token = by_channel ? 1 : d;
    if (args->layer.rotate_k)
        rotate_keys(d, channel, token, keys);
    if (args->layer.mean)
        add_means(args, kv_head, block, channel, token, keys);
}

/* `block`: of a page; -1: the piece's keys are whole. */
static void tile_piece(const struct tile *tile, const struct attend_piece *piece, int64_t block, const float *visible, struct flash *f) {
    _Alignas(64) float keys[KV_BLOCK * KV_MAX_HEAD_DIM], values[KV_BLOCK * KV_MAX_HEAD_DIM];
    enum dtype window = tile->args->layer.format.window;
    int d = f->d, n = piece->end - piece->begin;
    struct gemm_matrix k = {keys + piece->begin, KV_BLOCK, true}; /* codes: [channel][token] */
    if (n <= 0)
        return;
    if (piece->k_bits == 16) {
        simd_widen(window, piece->k, keys, (int64_t)piece->end * d);
        k = (struct gemm_matrix){keys + piece->begin * d, d, false};
    } else {
        unpack_part(piece->k, d, piece->k_bits, d, KV_BLOCK, keys);
    }
    if (block >= 0)
        whole_keys(tile->args, tile->view.kv_head, block, piece->k_bits < 16, keys);
    if (piece->v_bits == 16)
        simd_widen(window, piece->v, values, (int64_t)piece->end * d);
    else
        unpack_part(piece->v, d, piece->v_bits, KV_BLOCK, d, values);
    flash_add(f, k, values + piece->begin * d, n, visible);
}

static void tile_window(const struct tile *tile, struct flash *f) {
    const struct attend_view *view = &tile->view;
    int64_t current = view->position / KV_BLOCK;
    for (int64_t block = view->n_flushed; block <= current; block++) {
        float visible[FLASH_MAX_VECTORS];
        if (!cache_owns(&tile->args->layout, block, view->owner_offset))
            continue;
        for (int i = 0; i < f->n; i++) {
            int64_t row = tile->row + (tile->first + min_i64(i, tile->n - 1)) / tile->group;
            visible[i] = (float)(tile->args->in->row[row].position - block * KV_BLOCK + 1);
        }
        struct attend_piece piece = attend_window_at(view, block);
        tile_piece(tile, &piece, -1, block == current ? visible : NULL, f);
    }
}

static void tile_run(const struct tile *tile) {
    const struct attend_args *args = tile->args;
    struct flash f;
    int d = args->layout.head_dim, head = tile->view.kv_head * tile->group;
    flash_begin(&f, d, tile->n);
    for (int i = 0; i < tile->n; i++) {
        int64_t vector = tile->first + i, row = tile->row + vector / tile->group;
        flash_set_query(&f, i, args->layer.format.window, args->q, (row * args->n_heads + head + vector % tile->group) * d, args->scale);
    }
    for (int64_t page = 0; page < tile->view.n_pages; page++) {
        struct attend_piece piece = attend_page_at(&tile->view, page);
        tile_piece(tile, &piece, attend_page_block(&tile->view, page), NULL, &f);
    }
    struct attend_piece sink = attend_sink_of(&tile->view);
    tile_piece(tile, &sink, -1, NULL, &f);
    tile_window(tile, &f);
    flash_end(&f);
    for (int i = 0; i < tile->n; i++) {
        int64_t vector = tile->first + i, row = tile->row + vector / tile->group;
        float *record = attend_record(args, row, head + (int)(vector % tile->group));
        memcpy(record, f.total_y + (int64_t)i * d, (size_t)d * sizeof *record);
        attend_finish_record(args, record, f.total_m[i], f.total_l[i]);
    }
}

void attend_block(const struct attend_args *args, int64_t first, int64_t n_rows) {
    int n_kv_heads = args->layout.n_kv_heads, group = args->n_heads / n_kv_heads;
    int64_t n_vectors = n_rows * group, n_tiles = ceil_div(n_vectors, flash_vectors(args->layout.head_dim));
    const struct step_row *last = &args->in->row[first + n_rows - 1];
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t t = 0; t < n_tiles; t++)
        for (int kv_head = 0; kv_head < n_kv_heads; kv_head++) {
            struct tile tile = {.args = args, .view = attend_view_of(args, last, kv_head), .row = first, .group = group};
            tile.first = n_vectors * t / n_tiles;
            tile.n = (int)(n_vectors * (t + 1) / n_tiles - tile.first);
            tile_run(&tile);
        }
}
