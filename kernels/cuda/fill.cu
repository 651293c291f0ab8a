/* Made-up numbers for measurements. Meaning: kernels/cpu/fill.c. A block takes whole rows in turn, so that a value's place needs no
 * division; compiled without fused products (kernels/fill.h). */
#include "kernels/cuda/device.cuh"
#include "kernels/fill.h"

enum {
    THREADS = 256,
    BLOCKS_PER_SM = 8, /* 2048 threads fill a multiprocessor */
};

/* In bounds: r < n_rows, c < n_columns. */
template <typename T> static __global__ void __launch_bounds__(THREADS) fill_random_kernel(struct fill_random_args args) {
    for (int64_t r = blockIdx.x; r < args.n_rows; r += gridDim.x) {
        T *row = (T *)args.data + r * args.n_columns;
        uint64_t at = (uint64_t)(args.first + r * args.stride);
        for (int64_t c = threadIdx.x; c < args.n_columns; c += THREADS)
            row[c] = device_narrow<T>(fill_random_value(args.seed, at + (uint64_t)c, args.low, args.high));
    }
}

template <typename T> static int fill_random(const struct cuda_launch *launch, const struct fill_random_args *args) {
    unsigned grid = (unsigned)min_i64(args->n_rows, (int64_t)launch->n_sms * BLOCKS_PER_SM);
    fill_random_kernel<T><<<grid, THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("fill_random");
    return STATUS_OK;
}

extern "C" int cuda_fill_random(const struct cuda_launch *launch, const struct fill_random_args *args) {
    if (args->n_rows <= 0 || args->n_columns <= 0)
        return STATUS_OK;
    switch (args->dtype) {
    case DTYPE_F32: return fill_random<float>(launch, args);
    case DTYPE_F16: return fill_random<__half>(launch, args);
    case DTYPE_BF16: return fill_random<__nv_bfloat16>(launch, args);
    default: FAIL(STATUS_USAGE, "fill_random: values of %s, expected F32, F16 or BF16", dtype_name(args->dtype));
    }
}
