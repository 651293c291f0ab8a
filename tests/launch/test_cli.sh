#!/usr/bin/env bash
# The binary from outside, as far as no model is needed: help, versions, wrong commands and options; under a launcher each is said once,
# soon, and with exit code 2.
#   test_cli.sh KVLINC [MPIRUN]
set -uo pipefail

kvlinc=$1
mpirun=${2:-}
. "$(dirname "${BASH_SOURCE[0]}")/check.sh"
exits() {
    local code=$1 got=0
    shift
    timeout 60 "$@" >"$work/output" 2>"$work/errors" </dev/null || got=$?
    [ "$got" = "$code" ] || { echo "exit code $got, expected $code: $*" >&2; cat "$work/errors" >&2; return 1; }
}
says_once() { # in standard error
    local n
    n=$(grep --count --fixed-strings -- "$1" "$work/errors")
    [ "$n" = 1 ] || { echo "said $n times: $1" >&2; cat "$work/errors" >&2; return 1; }
}
prints() { grep --quiet --fixed-strings -- "$1" "$work/output" || { cat "$work/output" >&2; return 1; }; }

check "--version" exits 0 "$kvlinc" --version
check "... is printed" prints "kvlinc "
check "--help" exits 0 "$kvlinc" --help
for command in generate batch inspect plan; do
    check "... lists $command" prints "    $command "
    check "$command --help" exits 0 "$kvlinc" $command --help
    check "... is printed" prints "--model PATH"
    check "--help of all" exits 0 "$kvlinc" --help
done

launchers=("")
[ -z "$mpirun" ] || launchers+=("$mpirun -np 4")
for launcher in "${launchers[@]}"; do
    # shellcheck disable=SC2086
    run() { local code=$1; shift; exits "$code" $launcher "$kvlinc" "$@"; }
    check "an unknown command ($launcher)" run 2 serf
    check "... is named" says_once "kvlinc: unknown command 'serf'"
    check "... beside those that exist" says_once "    generate "
    check "an unknown option ($launcher)" run 2 generate --cahce kivi
    check "... is named with the nearest" says_once "kvlinc: unknown option --cahce; the nearest is --cache"
    check "a value that is not allowed ($launcher)" run 2 batch --cache kvlink
    check "... names those that are" says_once "'kvlink' is not allowed: one of fp16"
    check "no model ($launcher)" run 2 generate --prompt x
    check "... is said" says_once "kvlinc: option --model is needed"
    check "no prompt ($launcher)" run 2 generate --model "$work/nothing.gguf"
    check "... is said" says_once "kvlinc: one of --prompt and --prompt-file is needed"
    check "a missing model ($launcher)" run 2 generate --model "$work/nothing.gguf" --prompt x
    check "... is named" says_once "$work/nothing.gguf"
    check "a missing prompt file ($launcher)" run 2 generate --model "$work/nothing.gguf" --prompt-file "$work/no.txt"
    check "... is named" says_once "kvlinc: prompt file $work/no.txt: No such file or directory"
    check "a missing config file ($launcher)" run 2 inspect --config "$work/no.conf"
    check "... is named" says_once "kvlinc: config file $work/no.conf: No such file or directory"
    check "inspect of a missing model ($launcher)" run 2 inspect --model "$work/nothing.gguf"
    check "... is named" says_once "$work/nothing.gguf"
done

if [ -n "${KVLINC_TEST_MODEL:-}" ]; then
    check "inspect" exits 0 "$kvlinc" inspect --model "$KVLINC_TEST_MODEL" --tp 3 --cp 2 --tensors --json
    check "... is JSON with what the file holds" python3 - "$work/output" <<'PYTHON'
import json, sys
facts = json.load(open(sys.argv[1]))
assert facts["architecture"] == "llama" and facts["format"] == "gguf", facts
assert (facts["layers"], facts["query_heads"], facts["kv_heads"], facts["head_dim"]) == (30, 9, 3, 64)
assert len(facts["tensor_list"]) == facts["tensors"] == sum(t["tensors"] for t in facts["types"])
assert facts["parameters"] == 134515008, facts["parameters"]
assert facts["tokenizer"]["ids"] == 49152 and len(facts["tokenizer"]["hash"]) == 64 and facts["tokenizer"]["chat"]
assert len(facts["ranks"]) == 6
# norms (32 bit) stand on all ranks, Q, K and V (16 bit) on both cp ranks of each tp slice; everything else is there once
norms = facts["ranks"][0]["norms_bytes"] // 4
qkv = 30 * 576 * (9 + 3 + 3) * 64
assert sum(r["matrices_bytes"] for r in facts["ranks"]) // 2 == facts["parameters"] - norms + qkv
assert [r["kv_heads"] for r in facts["ranks"]] == ["0-0", "0-0", "1-1", "1-1", "2-2", "2-2"]
PYTHON
    check "a layout that does not divide" exits 2 "$kvlinc" inspect --model "$KVLINC_TEST_MODEL" --tp 2
    check "... is refused" says_once "kvlinc: "
    check "the text form" exits 0 "$kvlinc" inspect --model "$KVLINC_TEST_MODEL"
    check "... names the fingerprint" prints "fingerprint"
fi
exit $failed
