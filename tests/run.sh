#!/usr/bin/env bash
# Installs what is missing, builds, fetches the small real model and runs the tests, then those without a model once more with
# address and undefined-behaviour sanitizers.
#   tests/run.sh [name...]        all, or those whose name holds one of these words
# KVLINC_SKIP_SANITIZERS=1 leaves the second build out. The exit code is 0 when everything passed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/install.sh
launch/build.sh build
KVLINC_TEST_MODEL=${KVLINC_TEST_MODEL:-$(launch/model.sh smollm2-135m)}
export KVLINC_TEST_MODEL KVLINC_QUIET=1
# Several tests share the cores: one thread each, and nobody spins for another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# The program corrects OpenBLAS where it misjudges the CPU (kernels/blas.h); the test programs are told here.
OPENBLAS_CORETYPE=${OPENBLAS_CORETYPE:-$(build/kvlinc --version | sed -n 's/^BLAS kernels: //p')}
export OPENBLAS_CORETYPE

names=()
[ $# -eq 0 ] || names=(--tests-regex "$(IFS='|'; echo "$*")")

log=$(mktemp --directory)
trap 'rm -rf "$log"' EXIT
failed=0
# run FOLDER TITLE ctest-argument...: everything as it comes, the closing lines once more at the end
run() {
    local folder=$1 title=$2
    shift 2
    echo "run.sh: $title"
    ctest --test-dir "$folder" --output-on-failure --parallel "$(nproc)" "${names[@]}" "$@" 2>&1 | tee "$log/last" || failed=1
    { echo "$title:"; sed -n '/tests passed\|^No tests/,$p' "$log/last"; } >>"$log/summary"
}

none=()
[ $# -eq 0 ] || none=(--no-tests=error)
run build "all tests" "${none[@]}"
if [ -z "${KVLINC_SKIP_SANITIZERS:-}" ]; then
    launch/build.sh build-asan -DSANITIZE=address,undefined -DWITH_CUDA=OFF # the CPU code is the same
    run build-asan "sanitizers, one process" --label-regex unit
    export ASAN_OPTIONS=detect_leaks=0 # MPI libraries keep memory until the process ends
    run build-asan "sanitizers, ranks" --label-regex ranks --exclude-regex cpu-async
fi
echo
cat "$log/summary"
[ $failed = 0 ] || echo "run.sh: there were failures" >&2
exit $failed
