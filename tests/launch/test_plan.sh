#!/usr/bin/env bash
# kvlinc plan from outside: every machine of configs/clusters, text and JSON say the same, what does not fit, what is refused.
#   test_plan.sh KVLINC
set -uo pipefail

kvlinc=$(realpath "$1")
. "$(dirname "${BASH_SOURCE[0]}")/check.sh"
cd "$root" || exit 1
plan() { # plan CODE arguments...
    local code=$1 got=0
    shift
    timeout 60 "$kvlinc" plan "$@" >"$work/output" 2>"$work/errors" </dev/null || got=$?
    [ "$got" = "$code" ] || { echo "exit code $got, expected $code: plan $*" >&2; cat "$work/output" "$work/errors" >&2; return 1; }
}
prints() { grep --quiet --extended-regexp -- "$1" "$work/output" || { echo "not printed: $1" >&2; cat "$work/output" >&2; return 1; }; }
says() { grep --quiet --fixed-strings -- "$1" "$work/errors" || { echo "not said: $1" >&2; cat "$work/errors" >&2; return 1; }; }
holds() { # holds EXPRESSION: of Python, about the answer `a`
    python3 - "$work/output" "$1" <<'PYTHON' || { echo "not true: $1" >&2; cat "$work/output" >&2; return 1; }
import json, sys
a = json.load(open(sys.argv[1]))
sys.exit(not eval(sys.argv[2]))
PYTHON
}

cat >"$work/shape.conf" <<'SHAPE'
shape = llama
hidden = 4096
layers = 32
heads = 32
kv_heads = 8
head_dim = 128
inner = 14336
vocab = 128256
context = 131072
rms_eps = 1e-5
tied_head = no
qkv_bias = no
rope = default
rope_theta = 500000
SHAPE
shape=$work/shape.conf

for file in configs/clusters/*.conf; do
    name=$(basename "$file" .conf)
    check "$name" plan 0 --model "$shape" --cluster "$name"
    check "... says from what" prints "^note +predicted from the rates in .*$name.conf, .* nothing was measured"
    check "... says what is assumed" prints "^assumed +[a-z]"
    check "... says why" prints "^why +tp [0-9]+ x cp [0-9]+ takes"
    check "... as JSON" plan 0 --model "$shape" --cluster "$name" --json
    check "... which answers" holds 'a["fits"] and not a["measured_here"] and a["tp"] * a["cp"] == a["gpus"]'
    check "... in parts that add up" holds \
        'all(abs(sum(v for k, v in t.items() if k.endswith("_ms") and k != "token_ms") / t["token_ms"] - 1) < 2e-3 for t in a["time"])'
    check "... with the fastest" holds 'min(t["token_ms"] for t in a["time"]) == a["token_ms"] and len(a["time"]) == 4'
    check "... and bytes that add up" holds 'all(m["total_bytes"] == sum(m[k + "_bytes"] for k in
        ("weights", "workspace", "prefill", "pages", "window", "states", "tables")) for m in a["memory_of_each_gpu"])'
    check "$name, by its path" plan 0 --model "$shape" --rates "$file"
done
for model in configs/models/*.conf; do
    grep --quiet '^shape' "$model" || continue
    check "$model" plan 0 --model "$model" --cluster h200-8 --max-batch 4
done
check "10M tokens on 512 GPUs" plan 0 --model "$shape" --cluster h200-512 --context 10000000 --json
check "... beyond what the model was made for" holds '"131072" in a["warning"]'
check "... and on fewer" holds '[g["gpus"] for g in a["by_gpus"]][-1] == 512 and all(g["tp"] * g["cp"] == g["gpus"] for g in a["by_gpus"])'
check "caches" plan 0 --model "$shape" --cluster h200-8 --gpus 1 --cache kivi --k-bits 4 --window 256 --sink 16 --max-batch 8 --json
check "... are one layout" holds 'len(a["time"]) == 1 and a["cache"] == "kivi" and "by_gpus" not in a'
check "a layout" plan 0 --model "$shape" --cluster h200-8 --tp 2 --cp 2 --merge fused --json
check "... is kept" holds '(a["tp"], a["cp"], a["gpus"], a["merge"]) == (2, 2, 4, "fused")'
check "without adapters" plan 0 --model "$shape" --cluster h200-8 --features 0 --json
check "... kvlinc runs as hadv" holds 'a["cache"] == "hadv"'

check "too much" plan 1 --model "$shape" --cluster h100-8 --gpus 1 --cache fp16 --context 1000000 --json
check "... says so" holds 'not a["fits"] and a["smallest_gpus"] > 1 and a["memory_of_each_gpu"][0]["lacking_bytes"] > 0'
n=$(sed -n 's/.*"smallest_gpus": \([0-9]*\).*/\1/p' "$work/output")
check "... and how many GPUs would do" says "the smallest number of GPUs that would do is $n,"
check "... which they do" plan 0 --model "$shape" --cluster h100-8 --gpus "$n" --cache fp16 --context 1000000
check "... and one less not" plan 1 --model "$shape" --cluster h100-8 --gpus $((n - 1)) --cache fp16 --context 1000000
check "too much for any" plan 1 --model "$shape" --cluster h100-8 --cache fp16 --context 2000000000 --max-batch 256
check "... is said" says "up to 4096 GPUs none would do"

check "no machine" plan 2 --model "$shape"
check "... is said" says "one of --rates FILE and --cluster NAME is needed"
check "two machines" plan 2 --model "$shape" --cluster h200-8 --rates configs/clusters/h200-8.conf
check "an unknown cluster" plan 2 --model "$shape" --cluster abacus
check "... lists the known" says "unknown cluster 'abacus'; known: h100-8, h200-512, h200-64, h200-8"
check "a path is no name" plan 2 --model "$shape" --cluster ../clusters/h200-8
check "no model" plan 2 --cluster h200-8
check "... is said" says "option --model is needed"
check "a missing model" plan 2 --cluster h200-8 --model "$work/nothing.conf"
check "... is named" says "$work/nothing.conf"
check "a missing file of rates" plan 2 --model "$shape" --rates "$work/nothing"
check "... is named" says "$work/nothing: No such file"
check "a shape is no file of rates" plan 2 --model "$shape" --rates "$shape"
check "... is said with its line" says "shape.conf: 1: shape: no rate is called that"
sed 's/^read_rate.*/read_rate = fast/' configs/clusters/h200-8.conf >"$work/bad.conf"
check "a wrong rate" plan 2 --model "$shape" --rates "$work/bad.conf"
check "... is said" says "read_rate: 'fast' is not a positive number"
check "more GPUs than there are" plan 2 --model "$shape" --cluster h200-8 --gpus 16
check "... is said" says "16 GPUs: configs/clusters/h200-8.conf is of a machine with 8"
check "a layout that cannot be" plan 2 --model "$shape" --cluster h200-8 --tp 3
check "... is explained" says "layout dp=1 tp=3"
check "a cache of the CPU" plan 2 --model "$shape" --cluster h200-8 --cache f32
check "... is said" says "cache f32 is for the CPU"
check "a batch beyond a step" plan 2 --model "$shape" --cluster h200-8 --max-batch 257
check "... is said" says "allowed are 1 to 256"
check "an option of others" plan 2 --model "$shape" --cluster h200-8 --device cuda
check "... is said" says "option --device is not of plan"

[ "$failed" = 0 ] && echo "test_plan.sh: passed"
exit "$failed"
