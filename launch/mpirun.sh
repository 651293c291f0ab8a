#!/bin/sh
# Starts a program on N ranks of this machine (or of the Slurm allocation) with what Open MPI needs on small machines:
#   launch/mpirun.sh [-np N] program args...        N: as many as there are cores
# The program binds its ranks to cores by itself. What is added is said in one line; KVLINC_QUIET=1 leaves that out.
# TERM asks the ranks for an orderly end (mpirun itself would kill them); a second one ends the job at once. The exit code is the
# program's; 1 where a signal ended a rank.
set -eu

fail() { echo "mpirun.sh: $2" >&2; exit "$1"; }

# Cores that may be used: hardware threads of one core count once, as they do for mpirun.
allowed=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
cores=$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l) || cores=0
if [ "$cores" -lt 1 ] || [ "$cores" -gt "$allowed" ]; then cores=$allowed; fi

ranks=$cores
while [ $# -gt 0 ]; do
    case $1 in
        -np|-n) [ $# -ge 2 ] || fail 2 "$1 needs a number"; ranks=$2; shift 2 ;;
        --) shift; break ;;
        -*) fail 2 "unknown option $1; usage: mpirun.sh [-np N] program args..." ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail 2 "usage: mpirun.sh [-np N] program args..."
case $ranks in ''|*[!0-9]*|0) fail 2 "-np $ranks: not a number of ranks" ;; esac

mpirun=$(command -v mpirun || command -v mpirun.openmpi || command -v mpiexec) ||
    fail 1 "mpirun is not installed (Debian and Ubuntu: apt-get install openmpi-bin)"

# CMA, the direct copy between processes, is forbidden in many containers and complains about every message then.
single_copy_forbidden() {
    scope=$(cat /proc/sys/kernel/yama/ptrace_scope 2>/dev/null || echo 0)
    [ "$scope" -ge 2 ] && return 0
    filter=$(sed -n 's/^Seccomp:[[:space:]]*//p' /proc/self/status)
    capabilities=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
    # CAP_SYS_PTRACE is bit 19: bit 3 of the fifth hexadecimal digit from the right
    digit=$(printf %s "$capabilities" | tail -c 5 | head -c 1)
    [ "${filter:-0}" = 2 ] && case $digit in [89a-fA-F]) false ;; *) true ;; esac
}

options=""
added=""
version=$("$mpirun" --version 2>/dev/null | sed -n 's/^[^0-9]*\(Open MPI\|OpenRTE\|Open RTE\)[^0-9]*\([0-9]*\).*/\2/p' | head -n 1)
if [ -n "$version" ]; then
    crowd=--oversubscribe
    shared=vader
    options="--bind-to none --mca btl_base_warn_component_unused 0"
    if [ "$version" -ge 5 ]; then
        crowd="--map-by slot:OVERSUBSCRIBE"
        shared=sm
    fi
    # Ranks of one machine need no network; what its interfaces look like must not matter.
    if [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] && [ -z "${OMPI_MCA_btl_tcp_if_include:-}${OMPI_MCA_btl_tcp_if_exclude:-}" ]; then
        options="$options --mca btl_tcp_if_include lo"
    fi
    if [ "$(id -u)" = 0 ]; then
        options="$options --allow-run-as-root"
        added="$added; as root"
    fi
    # Inside a Slurm allocation the slots are its tasks.
    if [ "$ranks" -gt "${SLURM_NTASKS:-$cores}" ]; then
        options="$options $crowd --mca mpi_yield_when_idle 1"
        added="$added; more ranks than the $cores cores: they take turns"
    fi
    if single_copy_forbidden; then
        options="$options --mca btl_${shared}_single_copy_mechanism none"
        added="$added; no direct copies between processes (not permitted here)"
    fi
fi
# A program that is not told would start a thread for every core in every rank, until it has bound itself.
if [ "$ranks" -gt 1 ] && [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ]; then
    threads=$((cores / ranks))
    [ "$threads" -ge 1 ] || threads=1
    for name in OMP_NUM_THREADS OPENBLAS_NUM_THREADS; do
        eval "given=\${$name:-}"
        [ -z "$given" ] || continue
        export "$name=$threads"
        added="$added; $name=$threads"
    done
fi
[ -n "${KVLINC_QUIET:-}" ] || echo "mpirun.sh: $ranks rank$([ "$ranks" = 1 ] || echo s)$added" >&2

job=""
asked=""
end_job() {
    [ -n "$job" ] || exit 1
    if [ -z "$asked" ]; then kill -USR1 "$job"; else kill -TERM "$job"; fi 2>/dev/null
    asked=yes
}
trap end_job TERM
trap '[ -z "$job" ] || kill -USR1 "$job" 2>/dev/null' USR1
trap '[ -z "$job" ] || kill -HUP "$job" 2>/dev/null' HUP
trap : INT # from the keyboard it reaches mpirun as well

# A background process would have no standard input; and it must not outlive this script.
die_with_us=""
! setpriv --pdeathsig TERM true 2>/dev/null || die_with_us="setpriv --pdeathsig TERM"
exec 3<&0
# shellcheck disable=SC2086
$die_with_us "$mpirun" $options -np "$ranks" "$@" <&3 3<&- &
job=$!
while :; do
    code=0
    wait "$job" || code=$?
    kill -0 "$job" 2>/dev/null || break # gone; otherwise a trap has ended the wait
done
[ "$code" -le 128 ] || code=1
exit "$code"
