/* The GPU's operations: one launcher for each row of OPS in ops.h, in the .cu file of that name or its family's, with what
 * kernels/cpu/<same stem>.c does as its meaning. Called by kernels/backend_cuda.c only.
 *
 * A launcher checks its preconditions, computes the grid, launches on the given stream and checks the launch. It allocates
 * nothing, waits for nothing, reads no environment and keeps no state, so it may be captured into a graph. All pointers in the
 * arguments are device memory; what lies there (rows, positions, flush events) is read by kernels only. So a grid is made for the
 * largest case that the arguments allow, and kernels leave early. */
#pragma once

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

struct cuda_blas; /* cuBLASLt: kernels/cuda/blas.c */
struct cuda_dnn;  /* cuDNN, found at run time: kernels/cuda/dnn.c; NULL where it is not there */

/* Operations that may run side by side, one's beginning beside the end of another, take turns in parts of scratch and exchange. */
enum { CUDA_TURNS = 3 };

/* Device scratch of one stream. What an operation leaves there the next one of the stream may overwrite. */
#define CUDA_TURN_BYTES ((size_t)32 << 20)
#define CUDA_SCRATCH_BYTES (CUDA_TURNS * CUDA_TURN_BYTES)

/* Counters of one stream, by which the blocks of a kernel find out who is last. 0 between kernels: the last one leaves them so. */
enum { CUDA_COUNTERS = 1 << 17 };

/* Exchange of one stream and turn: words by which warps of a kernel hand each other numbers. All bits are set between kernels; whoever takes a
 * number sets them again. */
#define CUDA_EXCHANGE_BYTES ((size_t)36 << 20)

struct cuda_launch {
    void *stream;        /* cudaStream_t */
    void *scratch;       /* 256-byte aligned, CUDA_SCRATCH_BYTES */
    int *counters;       /* CUDA_COUNTERS */
    uint8_t *exchange;   /* CUDA_TURNS times CUDA_EXCHANGE_BYTES */
    int previous;        /* enum op_id of the operation that was enqueued right before; OP_COUNT: something else was */
    int turn;            /* 0 .. CUDA_TURNS - 1, from operation to operation */
    int n_sms;           /* multiprocessors of the device */
    int architecture;    /* 80, 90, 100: compute capability times ten */
    struct cuda_blas *blas;
    struct cuda_dnn *dnn;
};

#define CUDA_OP(name) int cuda_##name(const struct cuda_launch *launch, const struct name##_args *args);
OPS(CUDA_OP)
#undef CUDA_OP

int cuda_fence(const struct cuda_launch *launch);

#ifdef __cplusplus
}
#endif
