#!/usr/bin/env bash
# Installs what building and running need on Debian 12, Ubuntu 24.04 and their kin; does nothing, at once, when all is there.
#   launch/install.sh [package...]        only these instead of the whole list
# Asks nothing. Needs root or sudo without a password only if something is missing. Other systems: install what the list names.
set -euo pipefail

# a|b: either will do; the first is what gets installed
packages=(
    gcc libc6-dev make cmake pkg-config
    libopenmpi-dev openmpi-bin
    'libopenblas-dev|libopenblas-openmp-dev|libopenblas-pthread-dev' libhwloc-dev
    libjansson-dev libpcre2-dev libutf8proc-dev libssl-dev
    python3 python3-pip # launch/model.sh fetches models that lie in Python wheels
    util-linux
)
[ $# -eq 0 ] || packages=("$@")

fail() { echo "install.sh: $*" >&2; exit 1; }

command -v dpkg-query >/dev/null || fail "this is no Debian or Ubuntu: install by hand what stands for ${packages[*]}"
have=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p')

missing=()
for package in "${packages[@]}"; do
    grep --quiet --line-regexp --extended-regexp "$package" <<<"$have" || missing+=("${package%%|*}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null && sudo --non-interactive true 2>/dev/null ||
        fail "missing: ${missing[*]}; run as root: apt-get install ${missing[*]}"
    as_root=(sudo --non-interactive)
fi
echo "install.sh: installing with apt-get: ${missing[*]}" >&2

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1
}
apt update || fail "apt-get update failed: $(tail -n 1 "$log")"
apt install --yes --no-install-recommends "${missing[@]}" || fail "apt-get install failed: $(grep '^E:' "$log" | head -n 1)"
