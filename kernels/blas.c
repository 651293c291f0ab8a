/* Second-guessing OpenBLAS by what the CPU itself says it can do. */
#include "kernels/blas.h"

#include <cblas.h>
#include <stddef.h>
#include <string.h>

const char *blas_core(void) { return openblas_get_corename(); }

const char *blas_better_core(void) {
#if defined(__x86_64__)
    /* the kernels that know no AVX */
    static const char *const old[] = {"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Atom", "Generic", "Katmai", "Coppermine"};
    const char *core = blas_core();
    for (size_t i = 0; i < sizeof old / sizeof *old; i++)
        if (strcmp(core, old[i]) == 0) {
            if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
                return "SkylakeX";
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "Haswell" : NULL;
        }
#endif
    return NULL;
}
