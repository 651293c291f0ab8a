/* Everything that is read from environment variables, in one place and once.
 *
 *   OMP_NUM_THREADS                  threads of a rank, unless --threads says otherwise
 *   KVLINC_QUIET                     1: as --quiet
 *   COLUMNS, TERM                    width of the terminal; a dumb one gets plain progress lines
 *   OPENBLAS_CORETYPE                which kernels OpenBLAS runs; set by environment_prepare where the library misjudges the CPU
 *   OMPI_COMM_WORLD_RANK, PMIX_RANK, PMI_RANK, SLURM_PROCID
 *                                    which rank a launcher made this, for messages before MPI has started
 *
 * The scripts read KVLINC_CACHE, XDG_CACHE_HOME and HOME (launch/model.sh). */
#pragma once

#include "kernels/base.h"

struct environment {
    int threads;       /* 0: not set */
    int columns;       /* 0: not set */
    int launcher_rank; /* -1: not started by a launcher */
    bool quiet;
    bool dumb_terminal;
};

void environment_read(struct environment *out);

/* First thing in main. Where OpenBLAS has chosen kernels that are far below the CPU (blas.h), sets OPENBLAS_CORETYPE and starts this
 * program anew, since the library reads it only when it is loaded. Returns when there is nothing to do, or if that fails. */
void environment_prepare(char **argv);
