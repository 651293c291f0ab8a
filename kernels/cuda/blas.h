/* Large dense products through cuBLASLt, behind plain C. The plan of a product (descriptors and the algorithm that the library's
 * heuristic names) is made once per shape and kept, so that a repeated product costs one launch. Everything here is host work: it may be
 * called while a stream is captured. One host thread at a time. */
#pragma once

#include "kernels/dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

struct cuda_blas;

/* For the current device. The library keeps code for it, and no scratch memory: that comes with each product. */
int cuda_blas_open(struct cuda_blas **out);
void cuda_blas_close(struct cuda_blas *blas);

/* y[i][o] = bias[o] + sum_k x[i ldx + k] w[o ldw + k], sums in float, without TF32 for DTYPE_F32. The same call gives the same bits. */
struct blas_product {
    enum dtype dtype; /* of x and w: F32, F16 or BF16 */
    int64_t n_rows, n_out, n_in;
    const void *x; /* [n_rows][ldx] */
    int64_t ldx;
    const void *w; /* [n_out][ldw] */
    int64_t ldw;
    const float *bias; /* [n_out], 16-byte aligned; or NULL */
    float *y;          /* [n_rows][ldy] */
    int64_t ldy;
    void *workspace; /* 256-byte aligned; overwritten */
    size_t workspace_bytes;
    void *stream; /* cudaStream_t */
};

/* Errors: STATUS_FAILED with the library's words, or when it has no algorithm for the shape and alignment. */
int cuda_blas_product(struct cuda_blas *blas, const struct blas_product *product);

#ifdef __cplusplus
}
#endif
