# What the script tests share; sourced. `root` is the project's folder, `work` a folder of the test's own, which goes with it; `failed`
# becomes 1 with the first check that fails.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
failed=0

check() { # check WHAT command...: what the command under test left in "$work/errors" is shown too
    local what=$1
    shift
    "$@" && return
    echo "$(basename "$0"): failed: $what" >&2
    [ ! -s "$work/errors" ] || cat "$work/errors" >&2
    failed=1
}
