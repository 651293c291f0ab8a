#!/usr/bin/env bash
# kvlinc bench from outside, at tiny sizes: the table has its parts, and the CSV the same rows in one form. No number is judged but for its
# sign: a bench is never a timed test.
#   test_bench.sh KVLINC [MPIRUN RANKS]
set -uo pipefail

kvlinc=$1
mpirun=${2:-}
ranks=${3:-1}
[ -n "${KVLINC_TEST_MODEL:-}" ] || { echo "test_bench.sh: KVLINC_TEST_MODEL is not set" >&2; exit 77; }
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
start=("$kvlinc")
[ -z "$mpirun" ] || start=("$mpirun" -np "$ranks" "$kvlinc")
export KVLINC_QUIET=1 OMP_NUM_THREADS=1

fail() { echo "test_bench.sh: $1" >&2; cat "$work/output" "$work/errors" >&2; exit 1; }

"${start[@]}" bench --model "$KVLINC_TEST_MODEL" --caches kivi,kvlinc --contexts 20,300 --batches 1,2 --prompts 40,270 --steps 2 --repeats 1 \
    --profile --csv "$work/rows.csv" >"$work/output" 2>"$work/errors" </dev/null || fail "bench failed"

python3 - "$work/rows.csv" "$work/output" "$ranks" <<'PYTHON' || fail "the table or the CSV is not well formed"
import csv, sys
path, output, ranks = sys.argv[1], open(sys.argv[2]).read().splitlines(), int(sys.argv[3])
columns = "section item cache batch tokens ms best_ms rate unit bytes flop share of note".split()
with open(path, newline="") as file:
    lines = list(csv.reader(file))
assert lines[0] == columns, lines[0]
assert all(len(line) == len(columns) for line in lines), "a line with another number of fields"
rows = [dict(zip(columns, line)) for line in lines[1:]]
for row in rows:
    for name in "batch tokens ms best_ms rate bytes flop share".split():
        assert row[name] == "" or float(row[name]) > 0, (name, row)
    assert not row["best_ms"] or float(row["best_ms"]) <= float(row["ms"]), row

def of(section, **fields):
    return [row for row in rows if row["section"] == section and all(row[k] == str(v) for k, v in fields.items())]

machine = {row["item"]: row["note"] for row in of("machine")}
assert set(machine) >= {"program", "time", "system", "cpu", "flags", "memory", "ranks", "mpi", "blas"}, machine
assert machine["ranks"].startswith(f"{ranks}, ") and "OpenBLAS" in machine["blas"], machine
items = [row["item"] for row in of("rates")]
for wanted in ("read,", "copy,", "sgemm ", "qkv ", "gate,up ") + (("all-reduce,", "all-gather,") if ranks > 1 else ()):
    assert any(item.startswith(wanted) for item in items), (wanted, items)
for cache in ("kivi", "hadv"): # kvlinc without a calibration runs as hadv
    for tokens in (20, 300):
        for batch in (1, 2):
            row, = of("decode", cache=cache, tokens=tokens, batch=batch)
            assert row["unit"] == "tokens/s" and abs(float(row["rate"]) * float(row["ms"]) / 1000 / batch - 1) < 1e-6, row
            assert float(row["bytes"]) > 200e6 and row["of"] == "read", row # 16-bit weights of 135M parameters
    few, many = (float(of("decode", cache=cache, tokens=n, batch=1)[0]["bytes"]) for n in (20, 300))
    assert few < many, (few, many)
    for tokens in (40, 270):
        for kind in ("exact", "cached"):
            row, = of("prefill", cache=cache, tokens=tokens, item=kind)
            assert 2.0 * 100e6 * tokens < float(row["flop"]) < 3.0 * 120e6 * tokens + 2 * 60e6, row
    assert len([row for row in of("memory", cache=cache) if "peak" in row["item"]]) == ranks
assert of("profile", item="matmul", tokens=300), "no profile"
shown = [line.split()[0] for line in output if line.split()[:1] and line.split()[0] in {"machine", "rates", "decode", "prefill", "profile", "memory"}]
assert shown == [row["section"] for row in rows], "table and CSV differ in their rows"
PYTHON

"${start[@]}" bench rates --repeats 1 >"$work/output" 2>"$work/errors" </dev/null || fail "bench rates without a model failed"
grep --quiet "sgemm" "$work/output" || fail "no sgemm in bench rates"
"${start[@]}" bench decode >"$work/output" 2>"$work/errors" </dev/null
[ $? = 2 ] || fail "bench decode without a model: the exit code is not 2"
grep --quiet "model" "$work/errors" || fail "bench decode without a model does not say so"
"${start[@]}" bench --model "$KVLINC_TEST_MODEL" --contexts 1K,x >"$work/output" 2>"$work/errors" </dev/null
[ $? = 2 ] || fail "a wrong list: the exit code is not 2"
[ "$(grep --count "contexts" "$work/errors")" = 1 ] || fail "a wrong list is not said once"
exit 0
