/* Made-up numbers. Rows are spread over threads; a value depends on its place only. */
#include "kernels/fill.h"
#include "kernels/cpu/cpu.h"

enum {
    PIECE = 256,             /* values rounded at once */
    PARALLEL_MIN = 1 << 13,  /* values below which waking other threads costs more than it saves */
};

void cpu_fill_random(const struct fill_random_args *args) {
    uint8_t *data = args->data;
#pragma omp parallel for if (args->n_rows * args->n_columns >= PARALLEL_MIN) schedule(static)
    for (int64_t r = 0; r < args->n_rows; r++)
        for (int64_t c = 0; c < args->n_columns; c += PIECE) {
            float piece[PIECE];
            int64_t n = min_i64(PIECE, args->n_columns - c), at = args->first + r * args->stride + c;
            for (int64_t i = 0; i < n; i++)
                piece[i] = fill_random_value(args->seed, (uint64_t)(at + i), args->low, args->high);
            dtype_narrow(args->dtype, piece, data + dtype_bytes(args->dtype, r * args->n_columns + c), n);
        }
}
