/* A kernel that does nothing but wait, for stream_fence: it ends when all earlier work of the stream has ended and its writes are seen by
 * all. A kernel that is launched programmatically after it, and does not wait for itself, cannot begin before that: no thread here lets
 * it. That the kernel in front of it begins nothing early and ends with a fence of memory would not do: where nobody waits, CUDA promises
 * nothing of its writes. The fence itself is brought up early, so that it costs no more than its way through. */
#include "kernels/cuda/device.cuh"

static __global__ void fence_kernel(void) { wait_for_earlier(); }

extern "C" int cuda_fence(const struct cuda_launch *launch) {
    (void)launch_early(launch, fence_kernel, dim3(1), 1, 0);
    CHECK_LAUNCH("fence");
    return STATUS_OK;
}
