#!/usr/bin/env bash
# kvlinc bench decode and PyTorch's decode step (launch/pytorch_decode.py), one after the other on the same GPU, and their ratios:
#   launch/compare.sh --model configs/models/llama-3.1-8b.conf --contexts 4K,32K,128K --batches 1,8 --caches fp16,kivi
# Further options: --steps N, --dtype fp16|bf16 (PyTorch's weights and cache), --keep FOLDER (both CSV files stay there).
# Weights are random on both sides and so are the caches. KVLINC names another program than build/kvlinc, KVLINC_PYTHON a Python that has
# PyTorch; CUDA_VISIBLE_DEVICES picks the GPU. Exit codes: 0 done, 1 failed, 2 usage.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kvlinc=${KVLINC:-$root/build/kvlinc}
python=${KVLINC_PYTHON:-python3}
fail() { echo "compare.sh: $2" >&2; exit "$1"; }

model='' contexts='' batches=1 caches=fp16,kivi,kvlinc steps='' dtype=bf16 keep=''
while [ $# -gt 0 ]; do
    [[ $1 == --* && $# -ge 2 ]] || fail 2 "'$1': expected --name value; see the head of $0"
    case $1 in
        --model|--contexts|--batches|--caches|--steps|--dtype|--keep) printf -v "${1#--}" %s "$2" ;;
        *) fail 2 "unknown option $1; known: --model --contexts --batches --caches --steps --dtype --keep" ;;
    esac
    shift 2
done
[ -n "$model" ] || fail 2 "--model is missing: a shape such as configs/models/llama-3.1-8b.conf"
[ -f "$model" ] || fail 2 "--model: there is no file $model"
[ -n "$contexts" ] || fail 2 "--contexts is missing: a list such as 4K,32K,128K"
[ -x "$kvlinc" ] || fail 1 "there is no program $kvlinc: build it with launch/build.sh, or name it in KVLINC"
"$kvlinc" --version | grep -q '^devices:.*cuda' || fail 1 "$kvlinc was built without CUDA: there is nothing to compare"
"$python" -c 'import torch' 2>/dev/null || fail 1 "$python has no PyTorch: pip install torch, or name a Python that has it in KVLINC_PYTHON"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail 1 "PyTorch finds no GPU"

work=$keep
if [ -z "$work" ]; then
    work=$(mktemp --directory)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work" || fail 1 "cannot make the folder $work"
"$kvlinc" bench decode --device cuda --model "$model" --random-weights --caches "$caches" --contexts "$contexts" --batches "$batches" \
    ${steps:+--steps "$steps"} --csv "$work/kvlinc.csv" >&2 || fail 1 "kvlinc bench failed"
"$python" "$root/launch/pytorch_decode.py" --model "$model" --contexts "$contexts" --batches "$batches" --dtype "$dtype" \
    ${steps:+--steps "$steps"} --csv "$work/pytorch.csv" || fail 1 "pytorch_decode.py failed"

echo "Milliseconds a step, $(basename "$model" .conf); in brackets how many times faster than PyTorch$(
    [[ ,$caches, != *,fp16,* ]] || echo " and than kvlinc's own fp16 cache")"
python3 - "$work/kvlinc.csv" "$work/pytorch.csv" <<'PYTHON'
import csv, sys

def read(path, wanted):
    """(batch, tokens) and cache to row, in the file's order."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["section"] == "decode" and wanted(row["item"])]
    return {(int(row["batch"]), int(row["tokens"]), row["cache"]): row for row in rows}

ours = read(sys.argv[1], lambda item: item == "step")
theirs = {key[:2]: row for key, row in read(sys.argv[2], lambda item: item.startswith("PyTorch")).items()}
caches = list(dict.fromkeys(cache for _, _, cache in ours))
cases = list(dict.fromkeys([key[:2] for key in ours] + list(theirs)))

def ms(row):
    return float(row["ms"]) if row and row["ms"] else None

def times(slow, fast):
    return f"{slow / fast:.2f}x" if slow and fast else "-"

def cell(case, cache):
    own = ms(ours.get((*case, cache)))
    ratios = [times(ms(theirs.get(case)), own)]
    if "fp16" in caches and cache != "fp16":
        ratios.append(times(ms(ours.get((*case, "fp16"))), own))
    return f"{own:.3f} ({', '.join(ratios)})" if own else "-"

def line(*words):
    print("{:>5} {:>8}  {:>9}  {:<26}".format(*words[:4]) + "".join(f"  {word:>22}" for word in words[4:]))

line("batch", "tokens", "PyTorch", "attention", *caches)
for case in cases:
    row = theirs.get(case)
    time, way = (f"{ms(row):.3f}", row["item"].removeprefix("PyTorch ")) if ms(row) else ("-", "")
    line(*case, time, way, *[cell(case, cache) for cache in caches])
for (batch, tokens, cache), row in {**ours, **{(*case, "PyTorch"): row for case, row in theirs.items()}}.items():
    if not ms(row):
        print(f"{cache}, batch {batch}, {tokens} tokens: {row['note']}")
PYTHON
