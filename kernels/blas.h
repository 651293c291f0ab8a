/* Which kernels the BLAS library runs. OpenBLAS chooses them by the CPU's model number when it is loaded; a model that is newer than the
 * library gets those of an SSE machine, several times slower than what the CPU can do. */
#pragma once

/* The library's name for the kernels in use, such as "SkylakeX". */
const char *blas_core(void);

/* A better choice for this CPU, to be put into OPENBLAS_CORETYPE before the library is loaded; NULL when the choice is fine. */
const char *blas_better_core(void);
