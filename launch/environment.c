/* The one reader of environment variables; values that make no sense count as not set. */
#include "launch/environment.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/blas.h"

/* A whole number of at least `least` at the start of the variable (OMP_NUM_THREADS may be a list), else `other`. */
static int read_number(const char *name, int least, int other) {
    const char *text = getenv(name);
    if (!text)
        return other;
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || (*end && *end != ',') || value < least || value > 1 << 24)
        return other;
    return (int)value;
}

void environment_read(struct environment *out) {
    memset(out, 0, sizeof *out);
    out->threads = read_number("OMP_NUM_THREADS", 1, 0);
    out->columns = read_number("COLUMNS", 1, 0);
    out->quiet = read_number("KVLINC_QUIET", 0, 0) != 0;
    const char *terminal = getenv("TERM");
    out->dumb_terminal = !terminal || strcmp(terminal, "dumb") == 0;
    static const char *const ranks[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"};
    out->launcher_rank = -1;
    for (size_t i = 0; i < sizeof ranks / sizeof ranks[0] && out->launcher_rank < 0; i++)
        out->launcher_rank = read_number(ranks[i], 0, -1);
}

void environment_prepare(char **argv) {
    const char *core = blas_better_core();
    if (!core || getenv("OPENBLAS_CORETYPE"))
        return;
    char path[PATH_MAX]; /* by its own path: /proc/self/exe would make "exe" the name that ps and top show */
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length <= 0 || setenv("OPENBLAS_CORETYPE", core, 0) != 0)
        return;
    path[length] = '\0';
    execv(path, argv);
}
