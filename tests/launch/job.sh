# What the tests of whole jobs share; sourced. `job` is the process that leads the job's session, `work` the test's folder, where the
# job's standard error goes to `errors`; `kvlinc` the program, as /proc names it.
job=
failed=0

# Every process of the job: a launcher gives each rank a process group of its own, but all share the session.
processes() {
    cat /proc/[0-9]*/stat 2>/dev/null | awk -v session="$job" '{ pid = $1; sub(/^.*\) /, ""); if ($4 == session && $1 != "Z") print pid }'
}

rank() { # number: its process
    local pid
    for pid in $(processes); do
        [ "$(readlink "/proc/$pid/exe")" = "$kvlinc" ] || continue
        tr '\0' '\n' <"/proc/$pid/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$1" && echo "$pid"
    done 2>/dev/null
}

kill_job() { # signal
    local pids
    pids=$(processes)
    # shellcheck disable=SC2086
    [ -n "$pids" ] && kill "-$1" $pids 2>/dev/null
}

end_test() {
    [ -z "$job" ] || kill_job KILL || true
    rm -rf "$work"
}
trap end_test EXIT

fail() {
    echo "$(basename "$0"): failed: $*" >&2
    [ ! -s "$work/errors" ] || tail -n 12 "$work/errors" | sed 's/^/    /' >&2
    failed=1
}
