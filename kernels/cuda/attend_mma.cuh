/* Instructions that attend.cu's inner loops are made of: the products of a warp, the transpose of a fragment, and the copy of a tile to
 * shared memory that runs by itself (one bulk copy and an mbarrier from sm_90 on, 16 bytes a lane before). Fragments as in the PTX
 * manual, with g = lane / 4, t = lane % 4. */
#pragma once

#include "kernels/cuda/device.cuh"

/* c += A B, 16 x 16 times 16 x 8. A: rows g, g + 8; B: column g; c[0], c[1]: row g, columns 2 t, 2 t + 1; c[2], c[3]: row g + 8. */
template <typename T>
__device__ static inline void mma_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma_add<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_add<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                              uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Lane's pair of row g, columns 2 t and 2 t + 1, becomes that of column g, rows 2 t and 2 t + 1. */
__device__ static inline uint32_t matrix_transpose(uint32_t pair) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

/* Four 8 x 8 matrices of 16 bit, transposed while they are read: lane l names 16 bytes, row l % 8 of matrix l / 8. */
__device__ static inline uint4 matrix_load_transposed(const uint8_t *row) {
    uint4 out;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
    return out;
}

/* 2^x within two units in the last place; 0 from -126 down. */
__device__ static inline float fast_exp2(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

/* e^x, x <= 0, relative error 2^-22 + |x| 2^-24. */
__device__ static inline float fast_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

/* 2^n, -126 <= n <= 127. */
__device__ static inline float power_of_2(int n) { return __int_as_float((n + 127) << 23); }

/* Pairs of 16-bit numbers in a register, the first in the low half. */
__device__ static inline __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2 *>(&x); }
__device__ static inline uint32_t bits_of(__half2 x) { return *reinterpret_cast<uint32_t *>(&x); }
__device__ static inline uint32_t bits_of(__nv_bfloat162 x) { return *reinterpret_cast<uint32_t *>(&x); }

template <typename T> __device__ static inline float2 widen_pair(uint32_t pair);
template <> __device__ inline float2 widen_pair<__half>(uint32_t pair) { return __half22float2(as_half2(pair)); }
template <> __device__ inline float2 widen_pair<__nv_bfloat16>(uint32_t pair) {
    return make_float2(__int_as_float((int)(pair << 16)), __int_as_float((int)(pair & 0xffff0000u)));
}
template <typename T> __device__ static inline uint32_t narrow_pair(float first, float second);
template <> __device__ inline uint32_t narrow_pair<__half>(float first, float second) {
    return bits_of(__floats2half2_rn(first, second));
}
template <> __device__ inline uint32_t narrow_pair<__nv_bfloat16>(float first, float second) {
    return bits_of(__floats2bfloat162_rn(first, second));
}

/* A barrier of the CTA's n threads at which some wait and others, who have nothing to read behind it, only say that they came. */
__device__ static inline void barrier_wait(int n) { asm volatile("bar.sync 1, %0;" ::"r"(n) : "memory"); }
__device__ static inline void barrier_arrive(int n) { asm volatile("bar.arrive 1, %0;" ::"r"(n) : "memory"); }

/* ---- a stage of a warp's ring: filled by copies that run by themselves, then waited for ------------------------------- */

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* One arrival (with the bytes to come) completes a phase. */
__device__ static inline void stage_init(uint64_t *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((uint32_t)__cvta_generic_to_shared(barrier)) : "memory");
}
/* What was written to shared memory by plain stores comes before what later copies do. */
__device__ static inline void stage_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* By one lane: so many bytes will come in this phase. */
__device__ static inline void stage_expect(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"((uint32_t)__cvta_generic_to_shared(barrier)), "r"(bytes)
                 : "memory");
}
/* By one lane; addresses and bytes are multiples of 16. */
__device__ static inline void stage_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(bytes), "r"((uint32_t)__cvta_generic_to_shared(barrier))
                 : "memory");
}
__device__ static inline void stage_commit() {}
__device__ static inline void stage_wait(uint64_t *barrier, uint32_t parity, int n_stages) {
    (void)n_stages;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra.uni out;\n"
                 "bra.uni again;\n"
                 "out:\n"
                 "}" ::"r"((uint32_t)__cvta_generic_to_shared(barrier)),
                 "r"(parity)
                 : "memory");
}

#else

__device__ static inline void stage_init(uint64_t *barrier) { (void)barrier; }
__device__ static inline void stage_fence() {}
__device__ static inline void stage_expect(uint64_t *barrier, uint32_t bytes) { (void)barrier, (void)bytes; }
__device__ static inline void stage_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    (void)barrier;
    for (uint32_t i = 0; i < bytes; i += 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared((uint8_t *)to + i)),
                     "l"((const uint8_t *)from + i)
                     : "memory");
}
/* Closes one stage's copies; called for each stage in turn, also where it copies nothing. */
__device__ static inline void stage_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ static inline void stage_wait(uint64_t *barrier, uint32_t parity, int n_stages) {
    (void)barrier, (void)parity;
    if (n_stages == 1)
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    else if (n_stages == 2)
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    else
        asm volatile("cp.async.wait_group 2;" ::: "memory"); /* of three */
    __syncwarp();
}

#endif
