#!/usr/bin/env bash
# The real program on three ranks when something happens to it: TERM and USR1 to the launcher are an orderly end (75, nothing lost); a rank
# that is stopped, at work or while it starts, ends the job in time, and the message names rank, operation and step; so does a rank that is
# killed. Nothing stays behind. Needs the real model: KVLINC_TEST_MODEL.
#   test_signals.sh KVLINC MPIRUN
set -uo pipefail

kvlinc=$(readlink -f "$1")
mpirun=$2
model=${KVLINC_TEST_MODEL:-}
[ -n "$model" ] || { echo "test_signals.sh: KVLINC_TEST_MODEL is not set" >&2; exit 77; }
for tool in python3 setsid; do
    command -v "$tool" >/dev/null || { echo "test_signals.sh: $tool is not installed" >&2; exit 77; }
done
work=$(mktemp --directory)
# shellcheck source=tests/launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
waits=240 # quarters of a second, for everything that is waited for
until_true() {
    local i
    for ((i = 0; i < waits; i++)); do
        "$@" && return
        kill -0 "$job" 2>/dev/null || break
        sleep 0.25
    done
    fail "nothing came of: $*"
}
start() { # command options...: the job in a session of its own
    rm -f "$work/text"
    setsid "$mpirun" -np 3 "$kvlinc" "$@" --model "$model" --cache kivi --context 1024 --deadline 4 \
        >"$work/text" 2>"$work/errors" </dev/null &
    job=$!
}
batch() { start batch --input "$work/in.jsonl" --output "$work/out.jsonl" --max-batch 2; }
generate() { start generate --prompt "Once upon a time" --max-tokens 900 --ignore-eos; }
works() { [ -s "$work/text" ] || [ -s "$work/out.jsonl" ]; }
ends() { # what, exit code, seconds: from now
    local what=$1 code=$2 got=0 begin=$SECONDS
    ( sleep $(($3 + 20)); end_test ) & # a job that hangs must not hang the test
    local guard=$!
    wait "$job" || got=$?
    local i
    for ((i = 0; i < 20; i++)); do [ -n "$(processes)" ] || break; sleep 0.1; done
    [ -z "$(processes)" ] || fail "$what: processes stay behind: $(processes)"
    kill "$guard" 2>/dev/null
    [ "$got" = "$code" ] || fail "$what: exit code $got, expected $code"
    [ $((SECONDS - begin)) -le "$3" ] || fail "$what: the end took $((SECONDS - begin)) s of $3"
    job=
}
says() { grep -qE -- "$1" "$work/errors" || fail "no word of '$1'"; }
rows() { # of the output: valid lines, none twice
    [ -s "$work/out.jsonl" ] && python3 - "$work/out.jsonl" <<'PYTHON'
import json, sys
text = open(sys.argv[1], encoding="utf-8").read()
ids = [json.loads(line)["custom_id"] for line in text.splitlines()]
assert text.endswith("\n") and len(ids) == len(set(ids)), ids
PYTHON
}

for i in $(seq 60); do echo "{\"custom_id\": \"$i\", \"prompt\": \"$i rivers\", \"max_tokens\": 12, \"ignore_eos\": true}"; done >"$work/in.jsonl"

for signal in TERM USR1; do
    batch
    until_true works
    kill "-$signal" "$job"
    ends "$signal to the launcher" 75 15
    says "nothing is lost"
    rows || fail "the output after $signal"
    rm -f "$work/out.jsonl"
done

batch
until_true works
kill -STOP "$(rank 0)"
ends "rank 0 is stopped" 1 14
says "rank 0 .* does not answer.* waits? in '.*at step [0-9]"
rows || fail "the output after rank 0 was stopped"
rm -f "$work/out.jsonl"

generate
until_true works
kill -KILL "$(rank 2)"
ends "rank 2 is killed" 1 14
says "process rank 2 " # each launcher breaks this line elsewhere
says "signal 9"

generate
has_rank_1() { [ -n "$(rank 1)" ]; }
until_true has_rank_1
kill -STOP "$(rank 1)"
ends "rank 1 is stopped at its start" 1 20
says "no progress for .* s (in MPI_Init|.*rank 1 .* does not answer)"
exit $failed
