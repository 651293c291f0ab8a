/* y = x w^T: the dense layers. Two ways, chosen by the number of rows alone.
 *
 * Few rows (decoding): the weights are read once from memory and everything else hides behind that, so tiles of W_TILE weight
 * rows times up to X_TILE rows of x are dotted in registers, widening each 16-bit weight on the way. Every sum runs over k in the
 * same order whatever the tile, so a row's result depends neither on the other rows nor on the threads.
 * Many rows (prompts): panels of weights are widened to float on the stack and handed to sgemm. Panels are fixed, threads take
 * whole panels. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/simd.h"

enum {
    W_TILE = 4,            /* weight rows of a register tile */
    X_TILE = V16_REGISTERS >= 32 ? 4 : 1,    /* rows of x of a register tile: the sums stay in registers */
    MANY_ROWS = V16_REGISTERS >= 32 ? 48 : 12, /* from here on widening and sgemm win (measured: fp16, 2048 x 2048) */
    PANEL_ROWS = 256,      /* weight rows of a panel */
    PANEL_DEPTH = 512,     /* of n_in; the panel takes 512 KiB of stack and stays in the second-level cache */
    MANY_ROWS_BLOCK = 512, /* rows of x of one sgemm: parallelism where the matrix has few panels */
    PARALLEL_MIN = 1 << 15, /* weights below which waking other threads costs more than it saves */
};

/* n_w (4 or 1) x n_x dot products of length n; sums[j][i] of weight row i with row j of x. Constant arguments make it registers. */
SIMD_INLINE void dot_tile(enum dtype dtype, int n_w, int n_x, const uint8_t *w, size_t w_bytes, const float *x, int64_t ldx,
                          int64_t n, float sums[X_TILE][W_TILE]) {
    struct v16 acc[W_TILE][X_TILE];
    size_t dtype_size = dtype == DTYPE_F32 ? 4 : 2;
    int64_t k = 0;
    for (int i = 0; i < n_w; i++)
        for (int j = 0; j < n_x; j++)
            acc[i][j] = v16_set(0.0f);
    for (; k + V16 <= n; k += V16) {
        struct v16 row[X_TILE];
        for (int j = 0; j < n_x; j++)
            row[j] = v16_load(x + j * ldx + k);
        for (int i = 0; i < n_w; i++) {
            struct v16 weight = v16_load_as(dtype, w + (size_t)i * w_bytes, k);
            /* The next strip: rows are too short for the hardware to see it coming. */
            __builtin_prefetch(w + (size_t)i * w_bytes + (size_t)k * dtype_size + (size_t)n_w * w_bytes);
            for (int j = 0; j < n_x; j++)
                acc[i][j] = v16_fma(weight, row[j], acc[i][j]);
        }
    }
    if (k < n)
        for (int i = 0; i < n_w; i++)
            for (int j = 0; j < n_x; j++)
                acc[i][j] = v16_fma(v16_load_tail(dtype, w + (size_t)i * w_bytes, k, (int)(n - k)),
                                    v16_load_tail(DTYPE_F32, x + j * ldx, k, (int)(n - k)), acc[i][j]);
    if (n_w == W_TILE)
        for (int j = 0; j < n_x; j++)
            v16_sum4(acc[0][j], acc[1][j], acc[2][j], acc[3][j], sums[j]);
    else
        for (int j = 0; j < n_x; j++)
            sums[j][0] = v16_sum(acc[0][j]);
}

SIMD_INLINE void dot_tile_rows(enum dtype dtype, int n_w, int n_x, const uint8_t *w, size_t w_bytes, const float *x, int64_t ldx,
                               int64_t n, float sums[X_TILE][W_TILE]) {
    switch (n_x) {
    case 1: dot_tile(dtype, n_w, 1, w, w_bytes, x, ldx, n, sums); break;
    case 2: dot_tile(dtype, n_w, X_TILE < 2 ? X_TILE : 2, w, w_bytes, x, ldx, n, sums); break;
    case 3: dot_tile(dtype, n_w, X_TILE < 3 ? X_TILE : 3, w, w_bytes, x, ldx, n, sums); break;
    default: dot_tile(dtype, n_w, X_TILE, w, w_bytes, x, ldx, n, sums);
    }
}

/* All rows of x against the weight rows out .. out + n_w - 1. */
SIMD_INLINE void few_rows_strip(const struct matmul_args *a, enum dtype dtype, int n_w, int64_t n_rows, int64_t out) {
    size_t w_bytes = dtype_bytes(dtype, a->n_in);
    const uint8_t *w = (const uint8_t *)a->w + (size_t)out * w_bytes;
    for (int64_t row = 0; row < n_rows; row += X_TILE) {
        float sums[X_TILE][W_TILE];
        int n_x = (int)min_i64(X_TILE, n_rows - row);
        dot_tile_rows(dtype, n_w, n_x, w, w_bytes, a->x + row * a->ldx, a->ldx, a->n_in, sums);
        for (int j = 0; j < n_x; j++)
            for (int i = 0; i < n_w; i++)
                a->y[(row + j) * a->ldy + out + i] = a->bias ? a->bias[out + i] + sums[j][i] : sums[j][i];
    }
}

SIMD_INLINE void few_rows(const struct matmul_args *a, enum dtype dtype, int64_t n_rows) {
    int64_t n_full = a->n_out / W_TILE, n_strips = n_full + a->n_out % W_TILE; /* the last few one by one */
#pragma omp parallel for if (a->n_in * a->n_out >= PARALLEL_MIN) schedule(static)
    for (int64_t s = 0; s < n_strips; s++) {
        if (s < n_full)
            few_rows_strip(a, dtype, W_TILE, n_rows, s * W_TILE);
        else
            few_rows_strip(a, dtype, 1, n_rows, n_full * W_TILE + s - n_full);
    }
}

static void few_rows_f32(const struct matmul_args *a, int64_t n_rows) { few_rows(a, DTYPE_F32, n_rows); }
static void few_rows_f16(const struct matmul_args *a, int64_t n_rows) { few_rows(a, DTYPE_F16, n_rows); }
static void few_rows_bf16(const struct matmul_args *a, int64_t n_rows) { few_rows(a, DTYPE_BF16, n_rows); }

/* One panel: weight rows `out` and on, for rows `row` and on of x; n_in in pieces that are summed in order. */
static void many_rows_panel(const struct matmul_args *a, int64_t row, int64_t n_rows, int64_t out, int64_t n_out) {
    _Alignas(64) float panel[PANEL_ROWS * PANEL_DEPTH];
    float *y = a->y + row * a->ldy + out;
    size_t w_bytes = dtype_bytes(a->dtype, a->n_in);
    for (int64_t k = 0; k < a->n_in; k += PANEL_DEPTH) {
        int64_t depth = min_i64(PANEL_DEPTH, a->n_in - k);
        const uint8_t *w = (const uint8_t *)a->w + (size_t)out * w_bytes + dtype_bytes(a->dtype, k);
        struct gemm_matrix x = {a->x + row * a->ldx + k, a->ldx, false}, weights = {panel, PANEL_DEPTH, true};
        if (a->dtype == DTYPE_F32)
            weights = (struct gemm_matrix){(const float *)(const void *)w, a->n_in, true};
        else
            for (int64_t i = 0; i < n_out; i++)
                simd_widen(a->dtype, w + (size_t)i * w_bytes, panel + i * PANEL_DEPTH, depth);
        gemm(n_rows, n_out, depth, x, weights, k ? 1.0f : 0.0f, y, a->ldy);
    }
    if (a->bias)
        for (int64_t i = 0; i < n_rows; i++)
            for (int64_t o = 0; o < n_out; o++)
                y[i * a->ldy + o] += a->bias[out + o];
}

static void many_rows(const struct matmul_args *a, int64_t n_rows) {
    int64_t n_panels = ceil_div(a->n_out, PANEL_ROWS), n_blocks = ceil_div(n_rows, MANY_ROWS_BLOCK);
    /* Panels of equal size, in whole sixteens. */
    int64_t panel = round_up(ceil_div(a->n_out, n_panels), 16), block = round_up(ceil_div(n_rows, n_blocks), 16);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t p = 0; p < n_panels; p++)
        for (int64_t b = 0; b < n_blocks; b++) {
            int64_t out = p * panel, row = b * block;
            if (out < a->n_out && row < n_rows)
                many_rows_panel(a, row, min_i64(block, n_rows - row), out, min_i64(panel, a->n_out - out));
        }
}

void cpu_matmul(const struct matmul_args *args) {
    int64_t n_rows = cpu_live_rows(args->n_rows, args->live);
    if (n_rows >= MANY_ROWS)
        many_rows(args, n_rows);
    else if (args->dtype == DTYPE_F32)
        few_rows_f32(args, n_rows);
    else if (args->dtype == DTYPE_F16)
        few_rows_f16(args, n_rows);
    else
        few_rows_bf16(args, n_rows);
}
