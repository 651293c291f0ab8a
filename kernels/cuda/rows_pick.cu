/* Exact prefill's way in and out: residual rows between chunk order and position order, each rank its own. Meaning:
 * kernels/cpu/rows_pick.c. Plain copies: a block moves a slice of one row, 16 bytes a thread where rows begin on 16 bytes. */
#include "kernels/cuda/device.cuh"

enum {
    THREADS = 256,
    MAX_GRID_Y = 65535, /* CUDA's limit */
};

/* The local row of a position on its owner; *rank says who that is. */
__device__ static inline int64_t local_row(int64_t position, int cp, int64_t chunk, int *rank) {
    int64_t index = position / chunk; /* of the 2 cp chunks */
    bool second = index >= cp;
    *rank = (int)(second ? 2 * cp - 1 - index : index);
    return position % chunk + (second ? chunk : 0);
}

/* V: float or float4; width counts in V. In bounds: i < count, k < width; a row of `from` is read only where this rank owns the
 * position, and then lies in 0 .. 2 chunk - 1. */
template <typename V> static __global__ void rows_pick_kernel(struct rows_pick_args args, int64_t width) {
    int64_t i = blockIdx.x, k = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (k >= width)
        return;
    int rank;
    int64_t row = local_row(args.first + i, args.cp_size, args.chunk, &rank);
    V value = {};
    if (rank == args.cp_rank)
        value = ((const V *)args.from)[row * width + k];
    ((V *)args.to)[i * width + k] = value;
}

/* The same with `from` in position order and `to` in chunk order. */
template <typename V> static __global__ void rows_put_kernel(struct rows_put_args args, int64_t width) {
    int64_t i = blockIdx.x, k = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (k >= width)
        return;
    int rank;
    int64_t row = local_row(args.first + i, args.cp_size, args.chunk, &rank);
    if (rank == args.cp_rank)
        ((V *)args.to)[row * width + k] = ((const V *)args.from)[i * width + k];
}

/* Launches the kernel for rows of float4, or that for rows of float. */
static int launch_rows(const struct cuda_launch *launch, const struct rows_pick_args *args, const char *what,
                       void (*vectors)(struct rows_pick_args, int64_t), void (*scalars)(struct rows_pick_args, int64_t)) {
    const int64_t values = sizeof(float4) / sizeof(float);
    if (args->count <= 0 || args->width <= 0)
        return STATUS_OK;
    if (args->chunk <= 0 || args->cp_size <= 0)
        FAIL(STATUS_USAGE, "%s: chunks of %lld rows on %d ranks", what, (long long)args->chunk, args->cp_size);
    bool vector = args->width % values == 0 && ((uintptr_t)args->from | (uintptr_t)args->to) % sizeof(float4) == 0;
    int64_t width = vector ? args->width / values : args->width, slices = ceil_div(width, THREADS);
    if (args->count > INT32_MAX || slices > MAX_GRID_Y)
        FAIL(STATUS_USAGE, "%s: %lld rows of %lld are too many for one launch", what, (long long)args->count, (long long)args->width);
    dim3 grid((unsigned)args->count, (unsigned)slices);
    (vector ? vectors : scalars)<<<grid, THREADS, 0, cuda_stream_of(launch)>>>(*args, width);
    CHECK_LAUNCH(what);
    return STATUS_OK;
}

extern "C" int cuda_rows_pick(const struct cuda_launch *launch, const struct rows_pick_args *args) {
    return launch_rows(launch, args, "rows_pick", rows_pick_kernel<float4>, rows_pick_kernel<float>);
}

extern "C" int cuda_rows_put(const struct cuda_launch *launch, const struct rows_put_args *args) {
    return launch_rows(launch, args, "rows_put", rows_put_kernel<float4>, rows_put_kernel<float>);
}
