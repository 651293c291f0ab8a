#!/usr/bin/env bash
# kvlinc bench from outside, at tiny sizes: the table has its parts, and the CSV the same rows in one form. No number is judged but for its
# sign: a bench is never a timed test.
#   test_bench.sh KVLINC [MPIRUN RANKS]
set -uo pipefail

kvlinc=$1
mpirun=${2:-}
ranks=${3:-1}
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
start=("$kvlinc")
[ -z "$mpirun" ] || start=("$mpirun" -np "$ranks" "$kvlinc")
export KVLINC_QUIET=1 OMP_NUM_THREADS=1

fail() { echo "test_bench.sh: $1" >&2; cat "$work/output" "$work/errors" >&2; exit 1; }

# Without a model: a shape, made-up weights, a cache of random pages; contexts and batches that do not fit are named and left out.
shape=$(dirname "$0")/shape.conf
"${start[@]}" bench decode --model "$shape" --random-weights --caches fp16,kvlinc --contexts 300,64K --batches 1,3 --steps 3 --repeats 1 \
    --cache-memory 8M --csv "$work/random.csv" >"$work/output" 2>"$work/errors" </dev/null || fail "bench with random weights failed"
python3 - "$work/random.csv" "$ranks" <<'PYTHON' || fail "the rows with random weights are not as they should be"
import csv, sys
with open(sys.argv[1], newline="") as file:
    rows = {(row["cache"], int(row["batch"]), int(row["tokens"])): row for row in csv.DictReader(file) if row["section"] == "decode"}
fit = {("fp16", 1, 300), ("fp16", 3, 300), ("kvlinc", 1, 300), ("kvlinc", 3, 300)}
left_out = {("fp16", 1, 65536), ("kvlinc", 3, 65536)}
(fit if int(sys.argv[2]) > 1 else left_out).add(("kvlinc", 1, 65536)) # 10 MiB of pages, 8 MiB on each rank
if int(sys.argv[2]) == 1: # not one sequence of that length: its batch of 3 is not tried
    left_out.discard(("kvlinc", 3, 65536))
assert set(rows) == fit | left_out, rows.keys()
for key, row in rows.items():
    assert (row["ms"] == "") == (key in left_out) == row["note"].startswith("left out: "), row
    if key in fit:
        assert row["unit"] == "tokens/s" and abs(float(row["rate"]) * float(row["ms"]) / 1000 / key[1] - 1) < 1e-6, row
        assert float(row["bytes"]) > 2 * 800e3 and row["of"] == "read" and float(row["share"]) > 0, row # 16 bits of 0.8M parameters
        predicted, measured = float(row["predicted_ms"]), float(row["ms"])
        assert abs(float(row["predicted_ratio"]) * measured / predicted - 1) < 1e-6 and measured / 100 < predicted < 100 * measured, row
    else:
        assert row["predicted_ms"] == row["predicted_ratio"] == "", row
assert all(float(rows[c, 1, 300]["predicted_ms"]) < float(rows[c, 3, 300]["predicted_ms"]) for c in ("fp16", "kvlinc")), rows
assert "does not fit" in rows["fp16", 1, 65536]["note"], rows
assert all(float(rows[c, 1, 300]["bytes"]) < float(rows[c, 3, 300]["bytes"]) for c in ("fp16", "kvlinc")), rows
PYTHON
grep --quiet "^decode .*, plan said [0-9.]* ms, [0-9]* % \(less\|more\)$" "$work/output" || fail "the table has no prediction"
"${start[@]}" bench prefill --model "$shape" --random-weights --caches kvlinc --prompts 100,700 --repeats 1 --csv "$work/prompts.csv" \
    >"$work/output" 2>"$work/errors" </dev/null || fail "bench prefill with random weights failed"
python3 - "$work/prompts.csv" <<'PYTHON' || fail "the predictions of prompts are not as they should be"
import csv, sys
with open(sys.argv[1], newline="") as file:
    rows = {(row["item"], int(row["tokens"])): row for row in csv.DictReader(file) if row["section"] == "prefill"}
assert set(rows) == {(item, n) for item in ("exact", "cached") for n in (100, 700)}, rows.keys()
for row in rows.values():
    predicted, measured = float(row["predicted_ms"]), float(row["ms"])
    assert abs(float(row["predicted_ratio"]) * measured / predicted - 1) < 1e-6 and measured / 100 < predicted < 100 * measured, row
predicted = {key: float(row["predicted_ms"]) for key, row in rows.items()}
assert all(predicted[item, 100] < predicted[item, 700] for item in ("exact", "cached")), predicted
assert predicted["exact", 100] == predicted["cached", 100], predicted # within the window both are steps
PYTHON
"${start[@]}" bench decode --model "$shape" --repeats 1 >"$work/output" 2>"$work/errors" </dev/null
[ $? = 2 ] || fail "a shape without --random-weights: the exit code is not 2"
grep --quiet -- "--random-weights" "$work/errors" || fail "a shape without --random-weights: the message does not name the option"

# Attention and collectives by themselves, without a model. Results are checked by the program: a wrong one is a failure.
"${start[@]}" bench attention --heads 6 --kv-heads 2 --head-dim 64 --contexts 1,129,1000 --batches 1,2 --caches kvlinc,k4v4 --steps 2 --repeats 1 \
    --csv "$work/attention.csv" >"$work/output" 2>"$work/errors" </dev/null || fail "bench attention failed"
python3 - "$work/attention.csv" <<'PYTHON' || fail "the rows of attention are not as they should be"
import csv, sys
with open(sys.argv[1], newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["section"] == "attention"]
expected = {(item, cache, batch, tokens) for cache, last in (("fp16", "attend"), ("kvlinc", "attend, correct"), ("k4v4", "attend"))
            for item in ("to the output", last) for batch in ("1", "2") for tokens in ("1", "129", "1000")}
assert {(row["item"], row["cache"], row["batch"], row["tokens"]) for row in rows} == expected and len(rows) == len(expected), rows
for row in rows:
    assert float(row["best_ms"]) <= float(row["ms"]) and row["of"] == "read" and " us" in row["note"], row
    assert ("16 bit" in row["note"]) == (row["cache"] != "fp16"), row
of = {(row["cache"], row["batch"], row["tokens"]): float(row["bytes"]) for row in rows}
assert of["fp16", "1", "1000"] == 1000 * 2 * 2 * 2 * 64 and of["fp16", "2", "129"] == 2 * 129 * 2 * 2 * 2 * 64, of
assert of["k4v4", "1", "1000"] == 6 * 2 * (128 * 64 + 4 * 64 + 4 * 128) + (1000 - 6 * 128) * 2 * 2 * 2 * 64, of
PYTHON
# Prompts too, where they are asked for; heads are the model's. Operations: 4 d for each head, row and token that it sees.
"${start[@]}" bench attention --model "$shape" --random-weights --contexts 1 --prompts 100,300 --caches fp16,kvlinc --steps 1 --repeats 1 \
    --csv "$work/prompts.csv" >"$work/output" 2>"$work/errors" </dev/null || fail "bench attention with prompts failed"
python3 - "$work/prompts.csv" <<'PYTHON' || fail "the rows of attention of prompts are not as they should be"
import csv, sys
with open(sys.argv[1], newline="") as file:
    rows = {(row["item"], row["cache"], int(row["tokens"])): row for row in csv.DictReader(file) if row["item"].startswith("prefill")}
assert set(rows) == {("prefill, exact", "fp16", 100), ("prefill, exact", "fp16", 300), ("prefill, cached", "fp16", 128),
                     ("prefill, cached", "fp16", 384), ("prefill, cached, correct", "kvlinc", 128),
                     ("prefill, cached, correct", "kvlinc", 384)}, rows.keys()
for (item, cache, n), row in rows.items():
    seen = n * (n + 1) // 2 if "exact" in item else sum(range(n - 127, n + 1))
    assert float(row["flop"]) == 4 * 64 * 4 * seen, (row, seen)
    assert row["unit"] == "TFLOP/s" and abs(float(row["rate"]) * float(row["ms"]) * 1e9 / float(row["flop"]) - 1) < 1e-6, row
    if "cached" in item:
        exact = rows["prefill, exact", "fp16", {128: 100, 384: 300}[n]]
        assert row["of"] == "exact" and abs(float(row["share"]) * float(exact["rate"]) / float(row["rate"]) - 1) < 1e-6, row
PYTHON
grep --quiet " % of exact, " "$work/output" || fail "the share of the exact rate is not shown"
"${start[@]}" bench attention --model "$shape" --random-weights --heads 4 --contexts 1 >"$work/output" 2>"$work/errors" </dev/null
[ $? = 2 ] || fail "heads of a model and of an option: the exit code is not 2"
grep --quiet -- "--heads" "$work/errors" || fail "heads of a model and of an option: the message does not name the option"
"${start[@]}" bench attention --caches bf16 --contexts 1 --steps 1 --repeats 1 >"$work/output" 2>"$work/errors" </dev/null
[ $? = 2 ] || fail "bench attention with a cache of other blocks: the exit code is not 2"
code=0
"${start[@]}" bench collective --steps 2 --repeats 1 --csv "$work/collective.csv" >"$work/output" 2>"$work/errors" </dev/null || code=$?
if [ "$ranks" -gt 1 ]; then
    [ "$code" = 0 ] || fail "bench collective failed"
    [ "$(grep --count '^collective,' "$work/collective.csv")" = 18 ] || fail "bench collective has not its 18 rows"
else
    [ "$code" = 2 ] || fail "bench collective on one rank: the exit code is not 2"
    grep --quiet "two ranks" "$work/errors" || fail "bench collective on one rank does not say what it needs"
fi

[ -n "${KVLINC_TEST_MODEL:-}" ] || { echo "test_bench.sh: KVLINC_TEST_MODEL is not set" >&2; exit 77; }
"${start[@]}" bench --model "$KVLINC_TEST_MODEL" --caches kivi,kvlinc --contexts 20,300 --batches 1,2 --prompts 40,270 --steps 2 --repeats 1 \
    --profile --csv "$work/rows.csv" >"$work/output" 2>"$work/errors" </dev/null || fail "bench failed"

python3 - "$work/rows.csv" "$work/output" "$ranks" <<'PYTHON' || fail "the table or the CSV is not well formed"
import csv, sys
path, output, ranks = sys.argv[1], open(sys.argv[2]).read().splitlines(), int(sys.argv[3])
columns = "section item cache batch tokens ms best_ms rate unit bytes flop share of predicted_ms predicted_ratio note".split()
with open(path, newline="") as file:
    lines = list(csv.reader(file))
assert lines[0] == columns, lines[0]
assert all(len(line) == len(columns) for line in lines), "a line with another number of fields"
rows = [dict(zip(columns, line)) for line in lines[1:]]
for row in rows:
    for name in "batch tokens ms best_ms rate bytes flop share predicted_ms predicted_ratio".split():
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
            assert float(row["predicted_ms"]) > 0, row
            assert row["unit"] == "tokens/s" and abs(float(row["rate"]) * float(row["ms"]) / 1000 / batch - 1) < 1e-6, row
            assert float(row["bytes"]) > 200e6 and row["of"] == "read", row # 16-bit weights of 135M parameters
    few, many = (float(of("decode", cache=cache, tokens=n, batch=1)[0]["bytes"]) for n in (20, 300))
    assert few < many, (few, many)
    for tokens in (40, 270):
        for kind in ("exact", "cached"):
            row, = of("prefill", cache=cache, tokens=tokens, item=kind)
            assert float(row["predicted_ms"]) > 0, row
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
