#!/usr/bin/env bash
# Runs all GPU tests on a machine that has GPUs, without network and without building: from a build made here or elsewhere.
#   tests/gpu.sh [--build FOLDER] [--model FILE] [--under COMMAND] [name...]      all, or those whose name holds one of these words
# FOLDER: build. It must have been made with -DKVLINC_TESTS_FOLDER=tests if it was made elsewhere (and -DWITH_NATIVE=OFF for another CPU).
# COMMAND: runs each program that needs no ranks, such as 'compute-sanitizer --tool memcheck --error-exitcode 9'.
# FILE: the real model (launch/model.sh smollm2-135m); tests that need it fail without one.
# A test that is skipped fails: on a GPU machine there is nothing to skip but tests of more ranks than GPUs, which are counted apart.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
build=build
model=${KVLINC_TEST_MODEL:-}
words=()
under=()
while [ $# -gt 0 ]; do
    case $1 in
        --build) build=${2:?gpu.sh: --build needs a folder}; shift 2 ;;
        --under) read -ra under <<<"${2:?gpu.sh: --under needs a command}"; shift 2 ;;
        --model) model=${2:?gpu.sh: --model needs a file}; shift 2 ;;
        --*) echo "gpu.sh: unknown option $1" >&2; exit 2 ;;
        *) words+=("$1"); shift ;;
    esac
done
list=$build/tests/gpu_tests
[ -s "$list" ] || { echo "gpu.sh: $list is not there or empty: build with -DWITH_CUDA=ON" >&2; exit 2; }
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
[ "$gpus" -gt 0 ] || { echo "gpu.sh: nvidia-smi finds no GPU" >&2; exit 2; }
nvidia-smi --list-gpus | sed 's/ (UUID.*//'
export KVLINC_QUIET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
[ -z "$model" ] || export KVLINC_TEST_MODEL=$model

wanted() { # wanted NAME: is it one of those asked for?
    local word
    [ ${#words[@]} -gt 0 ] || return 0
    for word in "${words[@]}"; do
        case $1 in *"$word"*) return 0 ;; esac
    done
    return 1
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0
failed=()
too_large=()
# The list is read through descriptor 3: programs under mpirun read standard input.
while read -r name ranks needs_model program arguments <&3; do
    wanted "$name" || continue
    [ ${#under[@]} = 0 ] || [ "$ranks" = 0 ] || continue
    if [ "$ranks" -gt "$gpus" ]; then
        too_large+=("$name")
        continue
    fi
    if [ "$needs_model" = TRUE ] && [ -z "$model" ]; then
        echo "FAILED  $name: needs --model"
        failed+=("$name")
        continue
    fi
    command=("${under[@]}" "$build/tests/$program")
    [ "$ranks" = 0 ] || command=(launch/mpirun.sh -np "$ranks" "${command[@]}")
    case $program in */*) command=("$program" "$build/kvlinc" launch/mpirun.sh) ;; esac # a script, which starts ranks itself
    begin=$(date +%s%N)
    # shellcheck disable=SC2086
    timeout --kill-after=10 "${KVLINC_TEST_SECONDS:-300}" "${command[@]}" $arguments >"$log" 2>&1 </dev/null
    code=$?
    seconds=$(awk -v ns=$(($(date +%s%N) - begin)) 'BEGIN { printf "%.1f", ns / 1e9 }')
    if [ $code = 0 ]; then
        passed=$((passed + 1))
        echo "passed  $name ($seconds s)"
        [ -z "${KVLINC_TEST_VERBOSE:-}" ] || sed 's/^/    /' "$log"
    else
        failed+=("$name")
        echo "FAILED  $name: exit code $code$([ $code = 77 ] && echo ', skipped') ($seconds s)"
        tail -n 40 "$log" | sed 's/^/    /'
    fi
done 3<"$list"

echo "gpu.sh: $passed passed, ${#failed[@]} failed${failed[*]:+ (${failed[*]})}, ${#too_large[@]} need more than $gpus GPU(s)${too_large[*]:+ (${too_large[*]})}"
[ ${#failed[@]} = 0 ] && [ "$passed" -gt 0 ]
