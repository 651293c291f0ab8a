/* What every .cu file begins with: the check after a launch, loads and roundings by window type, warp reductions. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/cuda/cuda.h"

enum { WARP = 32 };

/* After <<<>>>: a wrong grid, too much shared memory or an earlier failure of the device. */
#define CHECK_LAUNCH(what)                                                                                              \
    do {                                                                                                                \
        cudaError_t launch_error_ = cudaGetLastError();                                                                 \
        if (launch_error_ != cudaSuccess)                                                                               \
            FAIL(STATUS_FAILED, "CUDA: %s: %s", (what), cudaGetErrorString(launch_error_));                             \
    } while (0)

static inline cudaStream_t cuda_stream_of(const struct cuda_launch *launch) { return (cudaStream_t)launch->stream; }

/* *live, but never more than the buffer has. */
__device__ static inline int64_t device_live_rows(int64_t n_rows, const int32_t *live) {
    return live && *live < n_rows ? *live : n_rows;
}

__device__ static inline float device_widen(__half x) { return __half2float(x); }
__device__ static inline float device_widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ static inline float device_widen(float x) { return x; }

/* Round to nearest even; values beyond the range become infinities, as dtype_narrow. */
template <typename T> __device__ static inline T device_narrow(float x);
template <> __device__ inline __half device_narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 device_narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline float device_narrow<float>(float x) { return x; }

/* Programmatic dependent launch. A kernel that is launched by launch_early is brought up while the one in front of it still runs. Every
 * thread block of it calls wait_for_earlier before it ends, and before it reads what the kernel in front writes or writes what that one
 * reads. It calls let_later_begin after that, never before: so a kernel knows, even before it waits, that everything older than the
 * one right in front of it is done. Launched otherwise, both do nothing.
 *
 * Read before the wait is what no operation of a step writes: weights (with biases, norms, frequencies), the step's input (*live is part
 * of it) and the sequences' parameters. Uploads are ordered in full; a kernel that makes such data has another one between it and the
 * first that reads them. What the kernel in front may write is read by plain loads: for the compiler a load through __ldg has no
 * place of its own, and may move in front of the wait. */
__device__ static inline void wait_for_earlier(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ static inline void let_later_begin(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#ifdef __CUDACC__
/* Launches a kernel that keeps to these rules, `cluster` blocks along x in a cluster. Devices before 9.0 launch it as any other, and have
 * no clusters: 1. */
template <typename... P, typename... A>
static inline cudaError_t launch_early_clusters(const struct cuda_launch *launch, void (*kernel)(P...), dim3 grid, unsigned threads,
                                                size_t shared, unsigned cluster, const A &...args) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = cuda_stream_of(launch);
    config.attrs = attributes;
    config.numAttrs = launch->architecture < 90 ? 0 : cluster > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... P, typename... A>
static inline cudaError_t launch_early(const struct cuda_launch *launch, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared,
                                       const A &...args) {
    return launch_early_clusters(launch, kernel, grid, threads, shared, 1, args...);
}
#endif

__device__ static inline float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ static inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}
