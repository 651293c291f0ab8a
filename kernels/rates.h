/* What the machine itself does at best, beside which kvlinc bench puts what the program does: streaming reads, copies and plain
 * single-precision matrix products, on the CPU threads of the calling process, and what a GPU's own library makes of attention. No
 * operation of the program uses these. */
#pragma once

#include "kernels/dtype.h"

/* Reads every byte once, `n_threads` threads each their own piece, the same ones as rates_fill. The result depends on the bytes, so that
 * no read can be left out. `data` is 64-byte aligned, bytes a multiple of 64. */
uint64_t rates_read(const void *data, size_t bytes, int n_threads);
void rates_copy(void *to, const void *from, size_t bytes, int n_threads);
/* Writes it, so that each thread's piece lies in memory that is near it. */
void rates_fill(void *data, size_t bytes, int n_threads);

/* Plain sgemm [m][k] x [n][k]^T, one product for each thread with matrices of its own: what the BLAS library gives without any waiting. */
struct rates_gemm;
int rates_gemm_open(int n_threads, int64_t m, int64_t n, int64_t k, struct rates_gemm **out);
void rates_gemm_run(struct rates_gemm *gemm);
void rates_gemm_close(struct rates_gemm *gemm);

/* The BLAS library in one line: name, version, kernels chosen for this machine. */
const char *rates_blas(void);

/* Attention as the vendor's library does it: stream_peer_attend. Of one new token in each of `batch` sequences of n tokens, or (n_rows > 0)
 * of the last n_rows tokens of one sequence, causal, as attend_exact has them. The first call of a shape prepares it and is not recorded;
 * at most eight shapes are in use by graphs. */
struct peer_attention {
    int batch, n_heads, n_kv_heads, head_dim;
    int64_t n;
    int64_t n_rows;    /* 0: one new token in each sequence */
    enum dtype dtype; /* F16 or BF16, of all that follows */
    float scale;
    bool grouped;      /* the query heads of a KV head are given as so many rows of one head: the same result, another kernel perhaps */
    const void *q;     /* [batch or n_rows][n_heads][d] */
    const void *k, *v; /* [batch][n_kv_heads][n][d]; with n_rows in one array, [n_kv_heads][K, V][n][d] */
    void *out;         /* [batch or n_rows][n_heads][d] */
};
