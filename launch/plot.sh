#!/usr/bin/env bash
# A plot, SVG, of what `kvlinc bench attention --csv` or `kvlinc bench decode --csv` wrote: time against context, a line for each cache and
# for cuDNN, and how much faster each is than the best in 16 bit at the same batch and context. Needs gnuplot.
#   launch/plot.sh CSV OUT.svg
set -euo pipefail

fail() { echo "plot.sh: $1" >&2; exit "$2"; }
[ $# = 2 ] || fail "two arguments are needed: plot.sh CSV OUT.svg" 2
csv=$1
out=$2
[ -r "$csv" ] || fail "$csv: no such file, or it cannot be read" 2
command -v gnuplot >/dev/null || fail "gnuplot is missing: install it (Debian, Ubuntu: apt-get install gnuplot-nox)" 1
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT

# Fields of a line of CSV; a field in quotes may hold commas, and quotes twice. Then one file for each line of the plot, numbered, and
# `series`: number and title of each, whether there are figures of a speed-up, and the axis' name.
awk -v work="$work" '
function split_csv(line, field,    n, text, quoted, i, c) {
    n = 1; text = ""; quoted = 0
    for (i = 1; i <= length(line); i++) {
        c = substr(line, i, 1)
        if (c == "\"" && quoted && substr(line, i + 1, 1) == "\"") { text = text c; i++ }
        else if (c == "\"") quoted = !quoted
        else if (c == "," && !quoted) { field[n++] = text; text = "" }
        else text = text c
    }
    field[n] = text
    return n
}
function has(name) { return f[column[name]] }
NR == 1 {
    n = split_csv($0, f)
    for (i = 1; i <= n; i++) column[f[i]] = i
    split("section item cache batch tokens ms note", wanted, " ")
    for (i = 1; i in wanted; i++) if (!(wanted[i] in column)) { print "no column " wanted[i] > (work "/wrong"); exit }
    next
}
{ split_csv($0, f) }
has("section") == "machine" && has("item") == "device" { title = has("note") }
has("ms") == "" { next }
has("section") == "attention" && (has("item") == "to the output" || has("item") ~ /^cuDNN/) {
    add("attention", has("item") ~ /^cuDNN/ ? has("item") : has("cache"), 1000 * has("ms"))
}
has("section") == "decode" { add("decode", has("cache"), has("ms")) }
function add(kind, name, value,    place) {
    place = has("batch") SUBSEP has("tokens")
    batches[kind, has("batch")] = 1
    if (!((kind, name, place) in measured)) order[kind, ++count[kind]] = name SUBSEP place
    measured[kind, name, place] = value
    exact = name ~ /^(fp16|bf16|cuDNN.*)$/
    if (exact && (!((kind, place) in best) || value < best[kind, place])) best[kind, place] = value
}
END {
    kind = count["attention"] ? "attention" : "decode"
    for (key in batches) { split(key, part, SUBSEP); if (part[1] == kind) n_batches++ }
    for (i = 1; i <= count[kind]; i++) {
        split(order[kind, i], part, SUBSEP)
        place = part[2] SUBSEP part[3]
        name = n_batches > 1 ? part[1] ", batch " part[2] : part[1]
        if (!(name in number)) { number[name] = ++lines; print lines "\t" name > (work "/series") }
        value = measured[kind, part[1], place]
        ratio = (kind, place) in best ? best[kind, place] / value : 0
        if (ratio) faster = 1
        print part[3], value, ratio ? ratio : "NaN" > (work "/" number[name])
    }
    print kind > (work "/kind")
    print title > (work "/title")
    if (faster) print "" > (work "/faster")
}' "$csv"
[ ! -e "$work/wrong" ] || fail "$csv: $(cat "$work/wrong"): not what kvlinc bench --csv writes" 2
[ -s "$work/series" ] || fail "$csv: no row of attention or decode that was measured" 2

lines() { # column: what gnuplot draws
    local number name rest=
    while IFS=$'\t' read -r number name; do
        sort -n "$work/$number" >"$work/$number.sorted"
        printf "%s'%s' using 1:%s with linespoints title '%s'" "$rest" "$work/$number.sorted" "$1" "${name//\'/}"
        rest=', '
    done <"$work/series"
}
panels=1
[ ! -e "$work/faster" ] || panels=2
name="microseconds, attention of one layer"
[ "$(cat "$work/kind")" = attention ] || name="milliseconds a step"
tics=
for ((tokens = 1; tokens <= 1 << 30; tokens *= 2)); do
    label=$(numfmt --to=iec $tokens)
    tics+="'${label/.0/}' $tokens, "
done
{
    echo "set terminal svg size $((panels * 640)),480 background 'white'; set output '$work/plot.svg'"
    echo "set multiplot layout 1,$panels title '$(tr -d \' <"$work/title")' noenhanced; set key top left noenhanced; set grid"
    echo "set logscale xy; set xtics (${tics%, }); set xlabel 'context, tokens'; set ylabel '$name'"
    echo "plot $(lines 2)"
    if [ $panels = 2 ]; then
        echo "unset logscale y; set yrange [0:*]; set ylabel 'times as fast as the best in 16 bit'; plot $(lines 3)"
    fi
    echo "unset multiplot"
} >"$work/plot.gp"
gnuplot "$work/plot.gp" || fail "gnuplot could not draw $csv" 1
cp "$work/plot.svg" "$out"
