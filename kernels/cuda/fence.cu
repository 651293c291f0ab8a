/* A kernel that does nothing, for stream_fence: it begins when all earlier work of the stream has ended and its writes are seen by all,
 * and a kernel that is launched programmatically after it can begin early only with respect to it. */
#include "kernels/cuda/device.cuh"

static __global__ void fence_kernel(void) {}

extern "C" int cuda_fence(const struct cuda_launch *launch) {
    fence_kernel<<<1, 1, 0, cuda_stream_of(launch)>>>();
    CHECK_LAUNCH("fence");
    return STATUS_OK;
}
