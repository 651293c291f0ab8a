/* The small dense operations between the matrix products: row lookup, norm, gated activation, residual sum. Rows are spread over
 * threads; within a row everything is done by one thread in a fixed order. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/norm.h"
#include "kernels/cpu/simd.h"

enum { PARALLEL_MIN = 1 << 15 }; /* values below which waking other threads costs more than it saves */

void cpu_step_begin(const struct step_begin_args *args) {
    const struct step_input *in = args->in;
    for (int i = 0; i < args->n_rows; i++) {
        const struct step_row *row = &in->row[i];
        bool live = i < in->n_rows && row->seq >= 0;
        args->tokens[i] = !live ? -1 : row->token >= 0 ? row->token : args->last_token[row->seq];
        args->positions[i] = live ? row->position : 0;
    }
}

void cpu_embed(const struct embed_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live);
    int64_t hidden = args->hidden;
    const uint8_t *table = args->table;
#pragma omp parallel for if (n * hidden >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        int64_t at = args->tokens[i] - args->vocab_begin;
        float *x = args->x + i * hidden;
        if (args->tokens[i] < 0 || at < 0 || at >= args->vocab_count)
            memset(x, 0, (size_t)hidden * sizeof *x);
        else
            simd_widen(args->dtype, table + dtype_bytes(args->dtype, at * hidden), x, hidden);
    }
}

void cpu_rmsnorm(const struct rmsnorm_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live);
    int64_t hidden = args->hidden;
#pragma omp parallel for if (n * hidden >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *x = args->x + (args->pick ? args->pick[i].row : i) * hidden;
        float *out = args->out + i * hidden;
        float factor = norm_factor(x, hidden, args->eps);
        for (int64_t k = 0; k < hidden; k++)
            out[k] = args->weight[k] * (x[k] * factor);
    }
}

void cpu_add_rmsnorm(const struct add_rmsnorm_args *args) {
    cpu_add(&(struct add_args){args->n_rows, args->live, args->hidden, args->x, args->y});
    cpu_rmsnorm(&(struct rmsnorm_args){args->n_rows, args->live, NULL, args->x, args->weight, args->eps, args->hidden, args->out});
}

static struct v16 silu_mul(struct v16 gate, struct v16 up) {
    struct v16 one = v16_set(1.0f);
    struct v16 denominator = v16_add(one, v16_exp(v16_sub(v16_set(0.0f), gate)));
    return v16_mul(v16_div(gate, denominator), up);
}

static void silu_mul_row(const float *gate, const float *up, float *out, int64_t n) {
    int64_t k = 0;
    for (; k + V16 <= n; k += V16)
        v16_store(out + k, silu_mul(v16_load(gate + k), v16_load(up + k)));
    if (k < n) {
        float lanes[V16];
        int rest = (int)(n - k);
        v16_store(lanes, silu_mul(v16_load_tail(DTYPE_F32, gate, k, rest), v16_load_tail(DTYPE_F32, up, k, rest)));
        memcpy(out + k, lanes, (size_t)rest * sizeof *out);
    }
}

void cpu_silu_mul(const struct silu_mul_args *args) {
    int64_t n_rows = cpu_live_rows(args->n_rows, args->live);
    int64_t n = args->n;
#pragma omp parallel for if (n_rows * n >= PARALLEL_MIN / 4) schedule(static)
    for (int64_t i = 0; i < n_rows; i++) {
        const float *gate = args->gate_up + i * 2 * n;
        silu_mul_row(gate, gate + n, args->out + i * n, n);
    }
}

void cpu_add(const struct add_args *args) {
    int64_t n = cpu_live_rows(args->n_rows, args->live) * args->hidden;
    float *x = args->x;
    const float *y = args->y;
#pragma omp parallel for simd if (n >= PARALLEL_MIN) schedule(static)
    for (int64_t i = 0; i < n; i++)
        x[i] += y[i];
}
