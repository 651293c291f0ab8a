#!/usr/bin/env bash
# The plain build, silent unless something is wrong.
#   launch/build.sh [FOLDER [cmake option...]]        FOLDER: build (below the root of the clone)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$root/${1:-build}
[ $# -eq 0 ] || shift

log=$(mktemp)
trap 'rm -f "$log"' EXIT
[ -f "$folder/CMakeCache.txt" ] || echo "build.sh: building in $folder" >&2
if ! { cmake -S "$root" -B "$folder" "$@" && cmake --build "$folder" --parallel "$(nproc)"; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "build.sh: the build in $folder failed" >&2
    exit 1
fi
