#!/usr/bin/env bash
# The real program: a batch over two ranks is killed with SIGKILL again and again, whole job at a time, and started again until it is done.
# Every row must be there exactly once and equal to the row of an undisturbed run. Then an orderly stop (TERM: exit code 75), rows
# that fail, changed settings, a full disk, a second process. Needs the real model: KVLINC_TEST_MODEL.
#   test_batch.sh KVLINC MPIRUN
set -uo pipefail
unset KVLINC_QUIET # the summaries are checked

kvlinc=$1
mpirun=$2
model=${KVLINC_TEST_MODEL:-}
[ -n "$model" ] || { echo "test_batch.sh: KVLINC_TEST_MODEL is not set" >&2; exit 77; }
for tool in python3 setsid flock; do
    command -v "$tool" >/dev/null || { echo "test_batch.sh: $tool is not installed" >&2; exit 77; }
done
work=$(mktemp --directory)
# shellcheck source=tests/launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

python3 - "$work/in.jsonl" <<'PYTHON'
import json, sys
words = "the quick brown fox jumps over a lazy dog while seven wizards read old books about rivers and stones".split()
with open(sys.argv[1], "w") as out:
    for i in range(12):
        text = " ".join(words[(i * 7 + k * 3) % len(words)] for k in range(5 + 9 * (i % 5)))
        row = {"custom_id": f"row {i}", "prompt": text, "max_tokens": 6 + i % 9}
        if i % 4 == 1:
            row.update(temperature=0, logprobs=2, echo=True)
        if i % 4 == 2:
            row = {"custom_id": f"row {i}", "method": "POST", "url": "/v1/chat/completions",
                   "body": {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "n": 2, "logprobs": True}}
        if i == 3:
            row["frob"] = 1
        out.write((json.dumps(row) if i != 7 else "{not json") + "\n")
PYTHON

# The job in a session of its own.
start() { # ranks output options...
    local ranks=$1 output=$2
    shift 2
    setsid "$mpirun" -np "$ranks" "$kvlinc" batch --model "$model" --cache kivi --context 512 --max-batch 3 \
        --input "$work/in.jsonl" --output "$output" "$@" >"$work/output" 2>"$work/errors" </dev/null &
    job=$!
}
finish() { # expected exit code
    local got=0
    wait "$job" || got=$?
    job=
    [ "$got" = "$1" ] || fail "exit code $got, expected $1"
}
says() { grep -qF -- "$1" "$work/errors" || fail "no word of '$1'"; }

# Compares two outputs as sets of rows; a row that is there twice, or half, is a difference. --partial: A may lack rows.
same() {
    python3 - "$@" <<'PYTHON'
import json, sys
def read(path):
    rows = {}
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        assert row["custom_id"] not in rows, f"{row['custom_id']} stands twice in {path}"
        body = row["response"] and row["response"]["body"]
        if body:
            del body["created"], body["timings"]
        rows[row["custom_id"]] = row
    return rows
def near(a, b, where): # log-probabilities of 16-bit sums in another order
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            near(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            near(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, (int, float)):
        assert abs(a - b) <= 0.02, f"{where}: {a} and {b}"
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"
a, b = read(sys.argv[1]), read(sys.argv[2])
partial = "--partial" in sys.argv
assert a.keys() <= b.keys() and (partial or len(a) == len(b)), f"rows {sorted(a)} and {sorted(b)}"
for name in a:
    near(a[name], b[name], name)
PYTHON
}

start 2 "$work/plain.jsonl"
finish 0
[ "$(wc -l <"$work/plain.jsonl")" = 12 ] || fail "$(wc -l <"$work/plain.jsonl") rows of 12"
[ "$(grep -c '"response":null' "$work/plain.jsonl")" = 2 ] || fail "two rows cannot be served"

# Killed while the model is loaded, then soon after each run has added to the file: no run gets far, each goes on where the last one fell.
n_lines() { if [ -f "$1" ]; then wc -l <"$1"; else echo 0; fi; }
kills=0
for delay in load 0 0.03 0.1 0.2; do
    before=$(n_lines "$work/killed.jsonl")
    start 2 "$work/killed.jsonl"
    if [ "$delay" = load ]; then
        sleep 0.4
    else
        while [ "$(n_lines "$work/killed.jsonl")" -le "$before" ] && kill -0 "$job" 2>/dev/null; do sleep 0.02; done
        sleep "$delay"
    fi
    kill_job KILL && kills=$((kills + 1))
    wait "$job" 2>/dev/null
    while [ -n "$(processes)" ]; do sleep 0.1; done
    job=
    [ -f "$work/killed.jsonl" ] || continue
    # a line that a kill has cut has no end
    python3 -c 'import sys; t = open(sys.argv[1], "rb").read(); open(sys.argv[2], "wb").write(t[:t.rfind(b"\n") + 1])' \
        "$work/killed.jsonl" "$work/whole.jsonl"
    same "$work/whole.jsonl" "$work/plain.jsonl" --partial || fail "rows after kill $kills"
done
[ "$kills" -gt 2 ] || fail "only $kills runs were killed"
start 2 "$work/killed.jsonl"
finish 0
same "$work/killed.jsonl" "$work/plain.jsonl" || fail "a run that was killed $kills times differs"

# An orderly end: TERM to the ranks, as a scheduler sends it.
start 2 "$work/stopped.jsonl"
while [ ! -s "$work/stopped.jsonl" ] && kill -0 "$job" 2>/dev/null; do sleep 0.05; done
ranks=$(for pid in $(processes); do tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q "^[^ ]*kvlinc batch" && echo "$pid"; done)
# shellcheck disable=SC2086
kill -TERM $ranks
finish 75
says "nothing is lost"
start 1 "$work/stopped.jsonl" # other ranks, the same rows
finish 0
says "skipped"
same "$work/stopped.jsonl" "$work/plain.jsonl" || fail "a run that was stopped differs"

# What has changed is said, and nothing is touched.
cp "$work/plain.jsonl" "$work/copy.jsonl"
start 2 "$work/plain.jsonl" --cache fp16
finish 2
says "has changed"
cmp -s "$work/plain.jsonl" "$work/copy.jsonl" || fail "a refused output was changed"

# Rows that failed are tried again when asked, and stand there once.
start 2 "$work/plain.jsonl" --retry-errors
finish 0
says "0 answered and 2 failed now, 10 skipped"
same "$work/plain.jsonl" "$work/copy.jsonl" || fail "retried rows differ"

if [ -w /dev/full ]; then
    start 2 /dev/full
    finish 1
    says "No space left"
fi
start 2 "$work/none/out.jsonl"
finish 1
says "cannot be opened for writing"

exec 9>>"$work/locked.jsonl"
flock 9
start 2 "$work/locked.jsonl"
finish 1
says "another process is writing this file"
exit $failed
