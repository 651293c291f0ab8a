/* See flash.h. */
#include "kernels/cpu/flash.h"

#include "kernels/cpu/simd.h"

enum { FOLD_PIECES = 16 }; /* pieces whose sums are added up before they go to the totals */

void flash_begin(struct flash *f, int d, int n_vectors) {
    f->d = d;
    f->n = (int)round_up(n_vectors, V16);
    f->n_pieces = 0;
    memset(f->q, 0, (size_t)(d * f->n) * sizeof *f->q);
    memset(f->total_y, 0, (size_t)(d * f->n) * sizeof *f->total_y);
    for (int i = 0; i < f->n; i++) {
        f->m[i] = f->total_m[i] = -INFINITY;
        f->l[i] = f->total_l[i] = 0.0f;
    }
}

void flash_set_query(struct flash *f, int vector, enum dtype dtype, const void *q, int64_t i, float scale) {
    float lanes[V16];
    for (int c = 0; c < f->d; c += V16) {
        v16_store(lanes, v16_mul(v16_load_as(dtype, q, i + c), v16_set(scale)));
        for (int j = 0; j < V16; j++)
            f->q[(c + j) * f->n + vector] = lanes[j];
    }
}

/* Scores of 16 queries to weights in place; returns what their earlier sums are to be multiplied by. A max of -inf (nothing seen
 * yet) is replaced by a finite one before it is subtracted, so that no inf - inf arises. */
static struct v16 flash_weights(struct flash *f, int column, int n_keys) {
    float *s = f->s + column;
    int n = f->n;
    struct v16 old = v16_load(f->m + column), top = old, sum = v16_set(0.0f);
    for (int t = 0; t < n_keys; t++)
        top = v16_max(top, v16_load(s + (int64_t)t * n));
    struct v16 shift = v16_max(top, v16_set(-FLT_MAX));
    for (int t = 0; t < n_keys; t++) {
        struct v16 p = v16_exp(v16_sub(v16_load(s + (int64_t)t * n), shift));
        sum = v16_add(sum, p);
        v16_store(s + (int64_t)t * n, p);
    }
    struct v16 factor = v16_exp(v16_sub(old, shift));
    v16_store(f->m + column, top);
    v16_store(f->l + column, v16_fma(v16_load(f->l + column), factor, sum));
    return factor;
}

static void flash_mask(struct flash *f, int n_keys, const float *visible) {
    for (int column = 0; column < f->n; column += V16) {
        struct v16 end = v16_load(visible + column);
        for (int t = 0; t < n_keys; t++) {
            float *s = f->s + (int64_t)t * f->n + column;
            v16_store(s, v16_if_less(v16_set((float)t), end, v16_load(s), v16_set(-INFINITY)));
        }
    }
}

static void scale_rows(float *y, int d, const float *factor, int n) {
    for (int i = 0; i < n; i++)
        if (factor[i] != 1.0f)
            for (int c = 0; c < d; c += V16)
                v16_store(y + (int64_t)i * d + c, v16_mul(v16_load(y + (int64_t)i * d + c), v16_set(factor[i])));
}

/* Adds m, l, y to the totals and empties them. */
static void flash_fold(struct flash *f) {
    for (int i = 0; i < f->n && f->n_pieces; i++) {
        if (f->m[i] == -INFINITY)
            continue;
        float top = fmaxf(f->total_m[i], f->m[i]);
        float a = simd_exp(f->total_m[i] - top), b = simd_exp(f->m[i] - top);
        float *y = f->y + (int64_t)i * f->d, *total = f->total_y + (int64_t)i * f->d;
        for (int c = 0; c < f->d; c += V16)
            v16_store(total + c, v16_fma(v16_load(y + c), v16_set(b), v16_mul(v16_load(total + c), v16_set(a))));
        f->total_l[i] = f->total_l[i] * a + f->l[i] * b;
        f->total_m[i] = top;
        f->m[i] = -INFINITY;
        f->l[i] = 0.0f;
    }
    f->n_pieces = 0;
}

void flash_add(struct flash *f, struct gemm_matrix keys, const float *values, int n_keys, const float *visible) {
    float factor[FLASH_MAX_VECTORS];
    int n = f->n, d = f->d;
    if (f->n_pieces == FOLD_PIECES)
        flash_fold(f);
    gemm(n_keys, n, d, keys, (struct gemm_matrix){f->q, n, false}, 0.0f, f->s, n);
    if (visible)
        flash_mask(f, n_keys, visible);
    for (int column = 0; column < n; column += V16)
        v16_store(factor + column, flash_weights(f, column, n_keys));
    if (f->n_pieces)
        scale_rows(f->y, d, factor, n);
    gemm(n, d, n_keys, (struct gemm_matrix){f->s, n, true}, (struct gemm_matrix){values, d, false}, f->n_pieces ? 1.0f : 0.0f, f->y, d);
    f->n_pieces++;
}

void flash_end(struct flash *f) { flash_fold(f); }
