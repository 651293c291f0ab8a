#!/usr/bin/env bash
# launch/compare.sh and launch/pytorch_decode.py where there is no GPU: what is refused, the table from canned rows of both programs, and,
# where python3 has PyTorch, its steps against float64.
set -uo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/check.sh"
exits() { # exits CODE command...
    local code=$1 got=0
    shift
    "$@" >"$work/output" 2>"$work/errors" </dev/null || got=$?
    [ "$got" = "$code" ] || { echo "exit code $got, expected $code: $*" >&2; cat "$work/output" "$work/errors" >&2; return 1; }
}
said() { grep --quiet --fixed-strings -- "$1" "$work/errors" || { echo "not said: $1" >&2; cat "$work/errors" >&2; return 1; }; }
prints() { grep --quiet --extended-regexp -- "$1" "$work/output" || { echo "not printed: $1" >&2; cat "$work/output" >&2; return 1; }; }
compare() { "$root/launch/compare.sh" "$@"; }
decode() { python3 "$root/launch/pytorch_decode.py" "$@"; }
shape=$root/tests/launch/shape.conf

# Stand-ins for both programs: they write down what they were called with, and a table.
header=$(sed -n 's/.*"\(section,item,[a-z_,]*\)\\n".*/\1/p' "$root/launch/bench_table.c")
check "the columns of kvlinc are known" test -n "$header"
cat >"$work/kvlinc" <<SCRIPT
#!/usr/bin/env bash
[ "\$1" != --version ] || { echo "devices: \${KVLINC_STUB_DEVICES:-cpu cuda}"; exit 0; }
echo "\$*" >"$work/kvlinc.called"
while [ "\$1" != --csv ]; do shift; done
cp "$work/ours" "\$2"
SCRIPT
cat >"$work/python" <<SCRIPT
#!/usr/bin/env bash
case "\$*" in "-c import torch") exit \${STUB_TORCH:-0} ;; "-c import sys, torch"*) exit \${STUB_GPU:-0} ;; esac
echo "\$*" >"$work/python.called"
while [ "\$1" != --csv ]; do shift; done
cp "$work/theirs" "\$2"
SCRIPT
chmod +x "$work/kvlinc" "$work/python"
export KVLINC=$work/kvlinc KVLINC_PYTHON=$work/python
cat >"$work/ours" <<ROWS
$header
machine,gpu,,,,,,,,,,,,,,an H
decode,step,fp16,1,4096,8,7.9,125,tokens/s,1e10,,0.9,read,8.1,1.01,"weights, cache"
decode,step,fp16,8,131072,,,,,,,,,,,"left out: 3 sequences fit into the cache at once"
decode,step,kivi,1,4096,4,3.9,250,tokens/s,5e9,,0.8,read,,,
decode,step,kivi,8,131072,10,9.9,800,tokens/s,5e9,,0.8,read,,,
decode,layer,kivi,1,4096,0.1,0.1,,,,,,,,,
ROWS
cat >"$work/theirs" <<ROWS
$header
machine,pytorch,,,,,,,,,,,,,,torch
decode,PyTorch cuDNN folded,bf16,1,4096,10,9.9,100,tokens/s,1e10,,,,,,"compiled pieces; flash 11 ms"
decode,PyTorch,bf16,8,131072,,,,,,,,,,,left out: out of memory
ROWS

check "the comparison" exits 0 compare --model "$shape" --contexts 4K,128K --batches 1,8 --caches fp16,kivi --steps 7
check "... PyTorch and each cache in one line" prints '^ +1 +4096 +10\.000 +cuDNN folded +8\.000 \(1\.25x\) +4\.000 \(2\.50x, 2\.00x\)$'
check "... what did not fit has no number" prints '^ +8 +131072 +- +- +10\.000 \(-, -\)$'
check "... but a reason" prints '^fp16, batch 8, 131072 tokens: left out: 3 sequences'
check "... on both sides" prints '^PyTorch, batch 8, 131072 tokens: left out: out of memory$'
check "... and only those" test "$(grep --count 'left out' "$work/output")" = 2
check "kvlinc gets the sizes" grep --quiet -- "--random-weights --caches fp16,kivi --contexts 4K,128K --batches 1,8 --steps 7" \
    "$work/kvlinc.called"
check "PyTorch gets the same" grep --quiet -- "--model $shape --contexts 4K,128K --batches 1,8 --dtype bf16 --steps 7" "$work/python.called"
check "files that are kept" exits 0 compare --model "$shape" --contexts 4K --keep "$work/kept"
check "... stay" cmp "$work/kept/kvlinc.csv" "$work/ours"

check "no shape is a usage error" exits 2 compare --contexts 4K
check "a shape that is not there" exits 2 compare --model /nowhere.conf --contexts 4K
check "... is named" said /nowhere.conf
check "no contexts is a usage error" exits 2 compare --model "$shape"
check "an unknown option is a usage error" exits 2 compare --model "$shape" --colour red
check "... that is named" said "unknown option --colour"
check "an option without a value is a usage error" exits 2 compare --model
STUB_TORCH=1 check "without PyTorch" exits 1 compare --model "$shape" --contexts 4K
check "... it is said" said "has no PyTorch"
STUB_GPU=1 check "without a GPU" exits 1 compare --model "$shape" --contexts 4K
check "... it is said" said "finds no GPU"
KVLINC_STUB_DEVICES=cpu check "a build without CUDA" exits 1 compare --model "$shape" --contexts 4K
check "... is said" said "without CUDA"
KVLINC=/nowhere/kvlinc check "no program" exits 1 compare --model "$shape" --contexts 4K
check "... is said" said "there is no program /nowhere/kvlinc"

check "a wrong list is a usage error" exits 2 decode --model "$shape" --contexts 1K,x
check "... that says it" said "'x', expected a positive number"
check "a shape that is not there is an input error" exits 2 decode --model /nowhere.conf
sed '/^heads/d' "$shape" >"$work/short.conf"
check "a shape that lacks a field is an input error" exits 2 decode --model "$work/short.conf"
check "... that names it" said "heads is missing"
if ! python3 -c 'import torch' 2>/dev/null; then
    check "without PyTorch it ends" exits 1 decode --model "$shape"
    check "... and says so" said "this needs PyTorch"
    exit $failed
fi
sed 's/^shape = llama/shape = qwen3/' "$shape" >"$work/qwen3.conf"
for conf in "$shape" "$work/qwen3.conf"; do
    check "PyTorch's steps are right, $conf" exits 0 decode --model "$conf" --device cpu --dtype fp32 --check
    check "... in some way" prints "tokens agree"
done
check "rows" exits 0 decode --model "$shape" --device cpu --contexts 16,1K --batches 1,3 --steps 2 --csv "$work/rows.csv"
check "... have kvlinc's columns" test "$(head -1 "$work/rows.csv")" = "$header"
check "... four of them" test "$(grep --count '^decode,PyTorch' "$work/rows.csv")" = 4
exit $failed
