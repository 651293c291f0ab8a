/* Rotary position embedding, where the model wants it after an RMSNorm of each head of q and k, and the one rounding of q, k and v to the
 * window's type. Computed as transformers does, product by product in float without fusing: out = x cos + rotate_half(x) sin. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/norm.h"

enum { MAX_HALF = KV_MAX_HEAD_DIM / 2, PARALLEL_MIN = 1 << 15 };

struct rotation {
    float cos[MAX_HALF], sin[MAX_HALF];
};

/* `x`, or its RMSNorm in `out` where there are weights. */
static const float *normalize(const float *x, const float *weight, int d, float eps, float *out) {
    if (!weight)
        return x;
    float factor = norm_factor(x, d, eps);
    for (int i = 0; i < d; i++)
        out[i] = weight[i] * (x[i] * factor);
    return out;
}

/* n heads from `heads` on; `weight` is of their norm, NULL for none. */
static void rotate_heads(const struct rope_args *args, const struct rotation *turn, const float *heads, int n, const float *weight,
                         uint8_t *out) {
    int d = args->head_dim, half = d / 2;
    size_t head_bytes = dtype_bytes(args->dtype, d);
    float normed[KV_MAX_HEAD_DIM], rotated[KV_MAX_HEAD_DIM];
    for (int h = 0; h < n; h++, heads += d, out += head_bytes) {
        const float *x = normalize(heads, weight, d, args->norm_eps, normed);
        for (int i = 0; i < half; i++) {
            rotated[i] = x[i] * turn->cos[i] + -x[i + half] * turn->sin[i];
            rotated[i + half] = x[i + half] * turn->cos[i] + x[i] * turn->sin[i];
        }
        dtype_narrow(args->dtype, rotated, out, d);
    }
}

void cpu_rope(const struct rope_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live);
    int64_t d = args->head_dim, q_width = args->n_heads * d, kv_width = args->n_kv_heads * d;
    int64_t width = q_width + 2 * kv_width;
    size_t q_bytes = dtype_bytes(args->dtype, q_width), kv_bytes = dtype_bytes(args->dtype, kv_width);
#pragma omp parallel for if (n * width >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *q = args->qkv + i * width, *k = q + q_width, *v = k + kv_width;
        struct rotation turn;
        for (int j = 0; j < d / 2; j++) {
            float angle = (float)args->positions[i] * args->inv_freq[j];
            turn.cos[j] = cosf(angle);
            turn.sin[j] = sinf(angle);
        }
        rotate_heads(args, &turn, q, args->n_heads, args->q_norm, (uint8_t *)args->q + (size_t)i * q_bytes);
        rotate_heads(args, &turn, k, args->n_kv_heads, args->k_norm, (uint8_t *)args->k + (size_t)i * kv_bytes);
        dtype_narrow(args->dtype, v, (uint8_t *)args->v + (size_t)i * kv_bytes, kv_width);
    }
}
