/* Exact prefill's way in and out: residual rows between chunk order and position order, each rank its own. */
#include <string.h>

#include "kernels/cpu/cpu.h"

/* The local row of a position on its owner; *rank says who that is. */
static int64_t local_row(int64_t position, int cp, int64_t chunk, int *rank) {
    int64_t index = position / chunk; /* of the 2 cp chunks */
    bool second = index >= cp;
    *rank = (int)(second ? 2 * cp - 1 - index : index);
    return position % chunk + (second ? chunk : 0);
}

void cpu_rows_pick(const struct rows_pick_args *args) {
    for (int64_t i = 0; i < args->count; i++) {
        int rank;
        int64_t row = local_row(args->first + i, args->cp_size, args->chunk, &rank);
        float *to = args->to + i * args->width;
        if (rank == args->cp_rank)
            memcpy(to, args->from + row * args->width, (size_t)args->width * sizeof *to);
        else
            memset(to, 0, (size_t)args->width * sizeof *to);
    }
}

void cpu_rows_put(const struct rows_put_args *args) {
    for (int64_t i = 0; i < args->count; i++) {
        int rank;
        int64_t row = local_row(args->first + i, args->cp_size, args->chunk, &rank);
        if (rank == args->cp_rank)
            memcpy(args->to + row * args->width, args->from + i * args->width, (size_t)args->width * sizeof *args->to);
    }
}
