/* How fast a kernel can read memory: the limit that bench holds the program's kernels against. Every thread of a full grid has several
 * 16-byte loads under way that no cache keeps; the words are summed, so that no load can be left out and the caller can tell that all
 * was read. The sum is one of integers: the order of the atomic additions does not show. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/rates.h"

enum {
    READ_THREADS = 256,
    READ_BLOCKS_PER_SM = 8, /* 2,048 threads fill a multiprocessor */
    READ_LOADS = 4,         /* under way in each: 128 KiB a multiprocessor, three times what latency times bandwidth asks for */
};

__device__ static inline uint32_t read_words(uint4 x) { return x.x + x.y + x.z + x.w; }

static __global__ void __launch_bounds__(READ_THREADS, READ_BLOCKS_PER_SM) read_kernel(const uint4 *data, int64_t n, uint32_t *sum) {
    const int64_t step = (int64_t)READ_THREADS * READ_LOADS;
    uint32_t own = 0;
    for (int64_t first = blockIdx.x * step; first < n; first += gridDim.x * step) {
        const int64_t at = first + threadIdx.x;
        uint4 x[READ_LOADS];
#pragma unroll
        for (int i = 0; i < READ_LOADS; i++)
            x[i] = at + i * READ_THREADS < n ? __ldcs(data + at + i * READ_THREADS) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < READ_LOADS; i++)
            own += read_words(x[i]);
    }
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        own += __shfl_xor_sync(0xffffffffu, own, offset);
    if (threadIdx.x % WARP == 0)
        atomicAdd(sum, own);
}

extern "C" int cuda_read(const struct cuda_launch *launch, const void *data, size_t bytes, uint32_t *sum) {
    if ((uintptr_t)data % 16 || bytes % 16)
        FAIL(STATUS_USAGE, "read: %zu bytes at %p, multiples of 16 are wanted", bytes, data);
    if (bytes == 0)
        return STATUS_OK;
    const int64_t n = (int64_t)(bytes / 16), blocks = ceil_div(n, (int64_t)READ_THREADS * READ_LOADS);
    const int64_t most = (int64_t)launch->n_sms * READ_BLOCKS_PER_SM;
    read_kernel<<<(unsigned)min_i64(blocks, most), READ_THREADS, 0, cuda_stream_of(launch)>>>((const uint4 *)data, n, sum);
    CHECK_LAUNCH("read");
    return STATUS_OK;
}
