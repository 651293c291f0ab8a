/* Causal attention of a prompt in 16 bit, by tiles of query vectors and pieces of keys (flash.h). Tiles differ in how far back they
 * see, so threads take them one at a time, the longest first; a tile is always the same work, whoever does it. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/simd.h"

/* Float view of n rows of d values: widened into `scratch`, or as they are. */
static const float *widen_rows(enum dtype dtype, const void *rows, int64_t first, int n, int d, float *scratch) {
    int64_t at = first * d;
    if (dtype == DTYPE_F32)
        return (const float *)rows + at;
    simd_widen(dtype, (const uint8_t *)rows + dtype_bytes(dtype, at), scratch, (int64_t)n * d);
    return scratch;
}

/* Vectors `first` .. first + n - 1 of a KV head: vector i is head i % group of row i / group. */
static void exact_tile(const struct attend_exact_args *a, int kv_head, int64_t first, int n) {
    _Alignas(64) float key_scratch[FLASH_KEYS * KV_MAX_HEAD_DIM], value_scratch[FLASH_KEYS * KV_MAX_HEAD_DIM];
    struct flash f;
    int d = a->head_dim, group = a->n_heads / a->n_kv_heads, head = kv_head * group;
    size_t kv_bytes = dtype_bytes(a->dtype, a->n * d);
    const uint8_t *k = (const uint8_t *)a->kv + (size_t)kv_head * 2 * kv_bytes, *v = k + kv_bytes;
    int64_t lowest = a->first + first / group, highest = a->first + (first + n - 1) / group;
    flash_begin(&f, d, n);
    for (int i = 0; i < n; i++) {
        int64_t vector = first + i;
        flash_set_query(&f, i, a->dtype, a->q, (vector / group * a->n_heads + head + vector % group) * d, a->scale);
    }
    for (int64_t begin = 0; begin <= highest; begin += FLASH_KEYS) {
        int n_keys = (int)min_i64(FLASH_KEYS, highest + 1 - begin);
        const float *keys = widen_rows(a->dtype, k, begin, n_keys, d, key_scratch);
        const float *values = widen_rows(a->dtype, v, begin, n_keys, d, value_scratch);
        float visible[FLASH_MAX_VECTORS];
        for (int i = 0; i < f.n; i++)
            visible[i] = (float)(a->first + (first + min_i64(i, n - 1)) / group + 1 - begin);
        flash_add(&f, (struct gemm_matrix){keys, d, false}, values, n_keys, begin + n_keys > lowest + 1 ? visible : NULL);
    }
    flash_end(&f);
    for (int i = 0; i < n; i++) {
        int64_t vector = first + i;
        float *out = a->out + (vector / group * a->n_heads + head + vector % group) * d;
        float inverse = 1.0f / f.total_l[i];
        for (int c = 0; c < d; c++)
            out[c] = f.total_y[(int64_t)i * d + c] * inverse;
    }
}

void cpu_attend_exact(const struct attend_exact_args *args) {
    int64_t n_vectors = args->n_rows * (args->n_heads / args->n_kv_heads);
    int64_t n_tiles = ceil_div(n_vectors, flash_vectors(args->head_dim));
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t t = n_tiles - 1; t >= 0; t--)
        for (int kv_head = 0; kv_head < args->n_kv_heads; kv_head++) {
            int64_t first = n_vectors * t / n_tiles, end = n_vectors * (t + 1) / n_tiles;
            exact_tile(args, kv_head, first, (int)(end - first));
        }
}
