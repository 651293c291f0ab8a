/* Who started this process, by the environment that launchers leave behind. It has to be known before MPI_Init, since a
 * process that nobody launched must not need MPI at all: so this one file of dist/ reads the environment.
 *
 * A launcher of MPI comes before Slurm: mpirun starts its own helpers with srun, and what it starts inherits their variables,
 * which count nodes then. In an sbatch script itself Slurm says one task (or nothing) for the step, whatever was allocated. */
#include "dist/comm_impl.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A whole non-negative number, or -1. */
static int number_of(const char *variable) {
    const char *text = getenv(variable);
    if (!text || !*text)
        return -1;
    char *end;
    long value = strtol(text, &end, 10);
    return *end || value < 0 || value > INT32_MAX ? -1 : (int)value;
}

/* Whether any variable of a process manager is there: PMI_FD, PMIX_NAMESPACE, PALS_APID and the like. */
static bool has_process_manager(void) {
    for (char **at = environ; *at; at++)
        if (strncmp(*at, "PMI", 3) == 0 || strncmp(*at, "PALS_", 5) == 0)
            return true;
    return false;
}

void comm_find_launcher(struct comm_launcher *out) {
    static const struct {
        const char *name, *size, *rank;
        bool connects; /* always; otherwise a process manager's variables say so */
    } launchers[] = {
        {"mpirun of Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", true},
        {"mpirun of MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", true},
        {"a launcher with PMI", "PMI_SIZE", "PMI_RANK", true},
        {"mpirun of MPICH or Intel MPI", "MPI_LOCALNRANKS", "MPI_LOCALRANKID", true},
        {"srun of Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", false},
    };
    *out = (struct comm_launcher){.rank = -1};
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++) {
        int size = number_of(launchers[i].size), rank = number_of(launchers[i].rank);
        if (size < 1)
            continue;
        bool connects = launchers[i].connects || has_process_manager();
        *out = (struct comm_launcher){launchers[i].name, launchers[i].size, size, rank, connects};
        return;
    }
    int rank = number_of("PMIX_RANK");
    if (rank >= 0)
        *out = (struct comm_launcher){"a launcher with PMIx", "PMIX_RANK", 0, rank, true};
}
