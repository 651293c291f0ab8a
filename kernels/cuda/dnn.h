/* cuDNN for the attention of long prompts, and for that beside which bench puts our own; through its C graph API and found at
 * run time: nothing links it, and where it is not there attend_exact.cu's own kernel does all. cuDNN compiles a kernel for each shape, which
 * is kept here. Which kernel is used and why is logged. One thread at a time. */
#pragma once

#include "kernels/cuda/cuda.h"
#include "kernels/rates.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Loads libcudnn.so.9. *out is NULL, with STATUS_OK, where it is not there or too old. Nothing is allocated on the device before the first
 * cuda_dnn_attend. */
int cuda_dnn_open(struct cuda_dnn **out);
void cuda_dnn_close(struct cuda_dnn *dnn);

/* "9.14.0". */
const char *cuda_dnn_version(const struct cuda_dnn *dnn);

/* Whether cuDNN can be expected to make up for the half second that compiling for a new shape takes: a large call, or a round length, which
 * comes again. It depends on the shape only, so that equal prompts give equal bits. */
bool cuda_dnn_pays(const struct attend_exact_args *args);

/* The operation by cuDNN, launch->dnn; arguments already checked, n_rows > 0. *done is false, with nothing launched, where it is left to
 * our own kernel: a shape that cuDNN refuses (logged once), `out` not at a multiple of 16, a shape that is new while the stream is
 * captured. The first call of a shape builds its plan and may allocate. Uses all of launch->scratch. The result is rounded to the 16-bit
 * type on its way to float. */
int cuda_dnn_attend(const struct cuda_launch *launch, const struct attend_exact_args *args, bool *done);

/* stream_peer_attend by launch->dnn. *done is false, with nothing launched, where there is none or cuDNN refuses the shape (logged once).
 * STATUS_USAGE for a shape that is new while the stream is captured: making its plan may allocate. Uses launch->scratch. */
int cuda_dnn_peer_attend(const struct cuda_launch *launch, const struct peer_attention *args, bool *done);

/* The operation by our own kernel, whatever launch->dnn is: for tests and comparisons. */
int cuda_attend_exact_own(const struct cuda_launch *launch, const struct attend_exact_args *args);

/* to[i] = from[i] for `count` values of type `dtype`, an even number; `from` and `to` at multiples of 4 and 8 bytes. */
int cuda_attend_exact_widen(const struct cuda_launch *launch, enum dtype dtype, const void *from, float *to, int64_t count);

#ifdef __cplusplus
}
#endif
