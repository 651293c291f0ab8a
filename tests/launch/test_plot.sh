#!/usr/bin/env bash
# launch/plot.sh on small CSVs as kvlinc bench writes them: an SVG with the lines asked for, and what is refused. Skipped without gnuplot,
# but for the message that says so.
#   test_plot.sh
set -uo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/check.sh"
plot() { # plot CODE arguments...
    local code=$1 got=0
    shift
    "$root/launch/plot.sh" "$@" >"$work/output" 2>"$work/errors" || got=$?
    [ "$got" = "$code" ] || { echo "exit code $got, expected $code: plot.sh $*" >&2; return 1; }
}
says() { grep --quiet --fixed-strings -- "$1" "$work/errors"; }
shows() { grep --quiet --fixed-strings -- ">$1<" "$work/plot.svg"; }
shows_not() { ! shows "$1"; }

head="section,item,cache,batch,tokens,ms,best_ms,rate,unit,bytes,flop,share,of,predicted_ms,predicted_ratio,note"
cat >"$work/attention.csv" <<CSV
$head
machine,device,,,,,,,,,,,,,,"cuda 0: a card, of ""eighty"" GB"
rates,"read, 8.00 GiB a rank",,,,2.8,2.8,3000,GB/s,8589934592,,,,,,
attention,cuDNN,fp16,1,4096,0.0131,0.0131,1280,GB/s,16777216,,0.42,read,,,"13.10 us, error 1.0e-04"
attention,cuDNN,fp16,1,131072,0.18,0.18,2980,GB/s,536870912,,0.98,read,,,"180.00 us, error 1.0e-04"
attention,to the output,fp16,1,4096,0.014,0.014,1198,GB/s,16777216,,0.39,read,,,"14.00 us, error 1.0e-04"
attention,to the output,fp16,1,131072,0.19,0.19,2826,GB/s,536870912,,0.93,read,,,"190.00 us, error 1.0e-04"
attention,"prefill, exact",fp16,1,131072,230,230,600,TFLOP/s,,1.4e14,,,,,"230000.00 us, error 1.0e-04"
attention,to the output,kvlinc,1,4096,0.005,0.005,600,GB/s,3000000,,0.2,read,,,"5.00 us, 2.62 x the best in 16 bit, error 1.0e-03"
attention,"attend, correct",kvlinc,1,4096,0.003,0.003,1000,GB/s,3000000,,0.3,read,,,"3.00 us, error 1.0e-03"
attention,to the output,kvlinc,1,131072,0.029,0.029,2600,GB/s,75497472,,0.86,read,,,"29.00 us, 6.21 x the best in 16 bit, error 1.0e-03"
CSV
cat >"$work/decode.csv" <<CSV
$head
machine,device,,,,,,,,,,,,,,cpu
decode,step,kivi,1,1024,8.1,8,123,tokens/s,1,,0.5,read,8,0.98,x
decode,step,kivi,1,4096,8.5,8,117,tokens/s,1,,0.5,read,8,0.94,x
decode,step,kivi,4,4096,9.5,9,421,tokens/s,1,,0.5,read,9,0.94,x
decode,step,kivi,4,1048576,,,,,,,,,,,left out: 1 sequences fit into the cache at once
CSV

mkdir "$work/bin"
for tool in bash dirname; do
    ln -s "$(command -v $tool)" "$work/bin/$tool"
done
PATH=$work/bin check "without gnuplot" plot 1 "$work/attention.csv" "$work/plot.svg"
check "... is said" says "gnuplot is missing"
check "no CSV" plot 2 "$work/nothing.csv" "$work/plot.svg"
check "... is named" says "$work/nothing.csv"
check "no arguments" plot 2
[ "$failed" = 0 ] || exit 1
command -v gnuplot >/dev/null || { echo "test_plot.sh: gnuplot is not here" >&2; exit 77; }

check "attention" plot 0 "$work/attention.csv" "$work/plot.svg"
for title in cuDNN fp16 kvlinc "microseconds, attention of one layer" "times as fast as the best in 16 bit" 4K; do
    check "... shows $title" shows "$title"
done
check "... and no batch" shows_not "kvlinc, batch 1"
check "... is XML" python3 -c 'import sys, xml.dom.minidom; xml.dom.minidom.parse(sys.argv[1])' "$work/plot.svg"
check "decode" plot 0 "$work/decode.csv" "$work/plot.svg"
for title in "kivi, batch 1" "kivi, batch 4" "milliseconds a step"; do
    check "... shows $title" shows "$title"
done
check "... without 16 bit no speed-up" shows_not "times as fast as the best in 16 bit"
check "nothing measured" plot 2 <(grep --invert-match '^decode.*read' "$work/decode.csv") "$work/other.svg"
check "... is said" says "no row of attention or decode"
echo "a,b" >"$work/other.csv"
check "another CSV" plot 2 "$work/other.csv" "$work/other.svg"
check "... is said" says "no column section"
check "... nothing is written" [ ! -e "$work/other.svg" ]

[ "$failed" = 0 ] && echo "test_plot.sh: passed"
exit "$failed"
