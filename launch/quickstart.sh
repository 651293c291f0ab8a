#!/usr/bin/env bash
# From a fresh clone to text: installs what is missing, builds, fetches a small real model (98 MB), and lets it summarize a page
# on 4 ranks that share one sequence (cp = 4) with a 2-bit cache.
#   launch/quickstart.sh [--name value...]        further options of kvlinc generate; they win over those below
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ranks=4

launch/install.sh
launch/build.sh
model=$(launch/model.sh smollm2-135m)
exec launch/mpirun.sh -np $ranks build/kvlinc generate --model "$model" --cp $ranks --cache kvlinc --chat \
    --prompt-file configs/prompts/lighthouse.txt --max-tokens 160 --temperature 0.3 --seed 1 "$@"
