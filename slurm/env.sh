# What differs from site to site: the only file here that a site edits. Source it before sbatch (partition and account are read when the
# job is submitted); the jobs source it again on the node.

# Where jobs go.
#export SBATCH_PARTITION=cpu
#export SBATCH_ACCOUNT=project

# What the build and the program need, where it does not come with the system.
#module load gcc openmpi hwloc openblas cmake

# Models fetched by launch/model.sh: on a file system that all nodes see. Fetch before the job, where there is a network.
#export KVLINC_CACHE=/scratch/$USER/kvlinc

# The program, and how Slurm starts its ranks (srun --mpi=list says what there is: pmix, else pmi2). A rank that dies is noticed by the
# others; Slurm must not kill ranks because the first of them has ended with exit code 75.
export KVLINC_PROGRAM=${KVLINC_PROGRAM:-build/kvlinc}
export KVLINC_SRUN=${KVLINC_SRUN:-srun --mpi=pmix --kill-on-bad-exit=0}

# How often a batch job that ran out of time puts itself back into the queue before it gives up.
export KVLINC_MAX_REQUEUE=${KVLINC_MAX_REQUEUE:-50}

# The network of MPI, where it picks a wrong one.
#export OMPI_MCA_btl_tcp_if_include=ib0

# Threads of a rank follow from its cores.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
