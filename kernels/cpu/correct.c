/* phi, the sums a flushed block adds to S and P, and C_n, C_d of a decode step.
 *
 * All three are products of a few rows with a small matrix that lies in the second-level cache, so there is one such product: each
 * output is summed in ascending order of the inner index, whatever the tiling, and a row's result does not depend on its neighbours. */
#include "kernels/cpu/correct.h"

#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/page.h"
#include "kernels/cpu/simd.h"

enum {
    TILE_ROWS = 4, /* x TILE_VECTORS sums at once: enough of them to hide the latency of an addition, and all in registers */
    TILE_VECTORS = V16_REGISTERS >= 16 ? 2 : 1,
};

/* Columns o .. o + 16 n_vectors - 1 of product() for n_rows <= TILE_ROWS rows; inlined for each pair of counts. */
SIMD_INLINE void product_tile(int n_rows, int n_vectors, const float *x, int64_t row_step, int64_t step, int n_k, const float *w,
                              int n_out, float *out) {
    struct v16 sum[TILE_ROWS][TILE_VECTORS];
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_vectors; j++)
            sum[i][j] = v16_set(0);
    for (int k = 0; k < n_k; k++) {
        for (int j = 0; j < n_vectors; j++) {
            struct v16 column = v16_load(w + (int64_t)k * n_out + V16 * j);
            for (int i = 0; i < n_rows; i++)
                sum[i][j] = v16_fma(v16_set(x[i * row_step + k * step]), column, sum[i][j]);
        }
    }
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_vectors; j++)
            v16_store(out + (int64_t)i * n_out + V16 * j, sum[i][j]);
}

SIMD_INLINE void product_rows(int n_rows, const float *x, int64_t row_step, int64_t step, int n_k, const float *w, int n_out,
                              float *out) {
    int o = 0;
    for (; o + V16 * TILE_VECTORS <= n_out; o += V16 * TILE_VECTORS)
        product_tile(n_rows, TILE_VECTORS, x, row_step, step, n_k, w + o, n_out, out + o);
    for (; o + V16 <= n_out; o += V16)
        product_tile(n_rows, 1, x, row_step, step, n_k, w + o, n_out, out + o);
    for (; o < n_out; o++) {
        for (int i = 0; i < n_rows; i++) {
            float sum = 0;
            for (int k = 0; k < n_k; k++)
                sum += x[i * row_step + k * step] * w[(int64_t)k * n_out + o];
            out[(int64_t)i * n_out + o] = sum;
        }
    }
}

/* out[i][o] = sum_k x[i * row_step + k * step] w[k][o]. */
static void product(int n_rows, const float *x, int64_t row_step, int64_t step, int n_k, const float *w, int n_out, float *out) {
    for (int i = 0; i < n_rows; i += TILE_ROWS) {
        const float *rows = x + i * row_step;
        float *to = out + (int64_t)i * n_out;
        switch (n_rows - i) {
        case 1: product_rows(1, rows, row_step, step, n_k, w, n_out, to); break;
        case 2: product_rows(2, rows, row_step, step, n_k, w, n_out, to); break;
        case 3: product_rows(3, rows, row_step, step, n_k, w, n_out, to); break;
        default: product_rows(TILE_ROWS, rows, row_step, step, n_k, w, n_out, to);
        }
    }
}

static void softmax(float *x, int n) {
    float max = x[0], sum = 0;
    int i = 0;
    for (int j = 1; j < n; j++)
        max = x[j] > max ? x[j] : max;
    for (; i + V16 <= n; i += V16)
        v16_store(x + i, v16_exp(v16_sub(v16_load(x + i), v16_set(max))));
    for (; i < n; i++)
        x[i] = simd_exp(x[i] - max);
    for (int j = 0; j < n; j++)
        sum += x[j];
    for (int j = 0; j < n; j++)
        x[j] /= sum;
}

void cpu_correct_features(const float *w, int d, int features, const float *x, int n, float *phi) {
    int half = features / 2;
    float logits[TILE_ROWS * KV_MAX_FEATURES / 2];
    for (int i = 0; i < n; i += TILE_ROWS) {
        int n_rows = n - i < TILE_ROWS ? n - i : TILE_ROWS;
        for (int part = 0; part < 2; part++) {
            product(n_rows, x + (int64_t)i * d, d, 1, d, w + (int64_t)part * d * half, half, logits);
            for (int r = 0; r < n_rows; r++) {
                softmax(logits + r * half, half);
                memcpy(phi + (int64_t)(i + r) * features + part * half, logits + r * half, (size_t)half * sizeof *phi);
            }
        }
    }
}

void cpu_correct_block(const struct cache_layer *layer, int head, const void *k, const void *v, int first, const uint8_t *record,
                       float *sums) {
    const struct page_format *format = &layer->format;
    int d = format->head_dim, features = layer->features, n = KV_BLOCK - first;
    float values[KV_BLOCK * KV_MAX_HEAD_DIM], error[KV_BLOCK * KV_MAX_HEAD_DIM], phi[KV_BLOCK * KV_MAX_FEATURES];
    cpu_page_widen(format, k, error, (int64_t)KV_BLOCK * d);
    cpu_page_decode_k(format, record, values);
    for (int i = first * d; i < KV_BLOCK * d; i++)
        error[i] -= values[i];
    cpu_correct_features(layer->phi_k + (int64_t)head * d * features, d, features, error + first * d, n, phi);
    if (layer->gate) {
        for (int i = 0; i < n * features; i++)
            phi[i] *= layer->gate[head];
    }
    if (layer->states_exact_v)
        cpu_page_widen(format, v, values, (int64_t)KV_BLOCK * d);
    else
        cpu_page_decode_v(format, record, values);
    product(features, phi, 1, features, n, values + first * d, d, sums);
    float *p = sums + (int64_t)features * d;
    memset(p, 0, (size_t)features * sizeof *p);
    for (int t = 0; t < n; t++)
        for (int f = 0; f < features; f++)
            p[f] += phi[t * features + f];
}

void cpu_correct_add(const struct cache_layer *layer, const float *sums, float *states) {
    int64_t n = cpu_correct_n_states(layer);
    for (int64_t i = 0; i < n; i++)
        states[i] += sums[i];
}

/* TILE_ROWS query heads at most, from `head` on, of one row and KV head. */
static void correct_heads(const struct correct_args *args, int row, int head, int n_heads, int kv_head, const float *states) {
    const struct cache_layer *layer = &args->layer;
    int d = layer->format.head_dim, features = layer->features;
    int64_t first_head = (int64_t)row * args->n_heads + head;
    float q[TILE_ROWS * KV_MAX_HEAD_DIM], phi[TILE_ROWS * KV_MAX_FEATURES], c_n[TILE_ROWS * KV_MAX_HEAD_DIM];
    const uint8_t *q_bytes = (const uint8_t *)args->q + dtype_bytes(layer->format.window, first_head * d);
    dtype_widen(layer->format.window, q_bytes, q, (int64_t)n_heads * d);
    int64_t w_floats = (int64_t)d * features;
    if (layer->phi_q_per_head) {
        for (int i = 0; i < n_heads; i++)
            cpu_correct_features(layer->phi_q + (head + i) * w_floats, d, features, q + i * d, 1, phi + i * features);
    } else {
        cpu_correct_features(layer->phi_q + kv_head * w_floats, d, features, q, n_heads, phi);
    }
    product(n_heads, phi, features, 1, features, states, d, c_n);
    const float *p = states + w_floats;
    for (int i = 0; i < n_heads; i++) {
        float *record = args->partial + (first_head + i) * args->stride;
        float c_d = 0;
        for (int f = 0; f < features; f++)
            c_d += phi[i * features + f] * p[f];
        memcpy(record + d, c_n + i * d, (size_t)d * sizeof *record);
        record[partial_tail(d, true) + 2] = c_d;
    }
}

/* A row without a sequence has no states: its correction is 0, so that nothing stale reaches the merge. */
static void clear_heads(const struct correct_args *args, int row, int head, int n_heads) {
    int d = args->layer.format.head_dim;
    for (int i = 0; i < n_heads; i++) {
        float *record = args->partial + ((int64_t)row * args->n_heads + head + i) * args->stride;
        memset(record + d, 0, (size_t)d * sizeof *record);
        record[partial_tail(d, true) + 2] = 0;
    }
}

void cpu_correct(const struct correct_args *args) {
    const struct cache_layer *layer = &args->layer;
    if (!cpu_correct_is_on(layer))
        return;
    int n_rows = (int)min_i64(args->n_rows, args->in->n_rows), n_kv_heads = args->layout.n_kv_heads;
    int group = args->n_heads / n_kv_heads;
    int64_t n_states = cpu_correct_n_states(layer);
#pragma omp parallel for schedule(static)
    for (int item = 0; item < n_rows * n_kv_heads; item++) {
        int row = item / n_kv_heads, kv_head = item % n_kv_heads;
        int32_t seq = args->in->row[row].seq;
        if (seq < 0) {
            clear_heads(args, row, kv_head * group, group);
            continue;
        }
        const float *states = layer->states + ((int64_t)seq * n_kv_heads + kv_head) * n_states;
        for (int h = 0; h < group; h += TILE_ROWS)
            correct_heads(args, row, kv_head * group + h, (int)min_i64(TILE_ROWS, group - h), kv_head, states);
    }
}
