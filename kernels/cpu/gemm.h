/* The one place that includes BLAS: single-precision products of row-major matrices, on the calling thread (the backend sets
 * OpenBLAS to one thread; operations split their work themselves). c = a b + beta c. */
#pragma once

#include <cblas.h>
#include <stdbool.h>
#include <stdint.h>

struct gemm_matrix {
    const float *data;
    int64_t stride;   /* floats from row to row as it lies in memory */
    bool transposed;  /* used as the transpose of what lies there */
};

static inline void gemm(int64_t m, int64_t n, int64_t k, struct gemm_matrix a, struct gemm_matrix b, float beta, float *c,
                        int64_t c_stride) {
    cblas_sgemm(CblasRowMajor, a.transposed ? CblasTrans : CblasNoTrans, b.transposed ? CblasTrans : CblasNoTrans, (blasint)m,
                (blasint)n, (blasint)k, 1.0f, a.data, (blasint)a.stride, b.data, (blasint)b.stride, beta, c, (blasint)c_stride);
}
