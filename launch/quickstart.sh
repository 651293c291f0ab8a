#!/usr/bin/env bash
# From a fresh clone to text: installs what is missing, builds, fetches a small real model (98 MB), and lets it summarize a page
# on ranks that share one sequence (cp) with a 2-bit cache: one rank a GPU, up to four, where this machine has GPUs and the build could
# use them; else 4 ranks on the CPU.
#   launch/quickstart.sh [--name value...]        further options of kvlinc generate; they win over those below
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/install.sh
launch/build.sh
model=$(launch/model.sh smollm2-135m)

ranks=4
device=cpu
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)
if [ "$gpus" -gt 0 ]; then
    if build/kvlinc --version | grep -q '^devices:.*cuda'; then
        device=cuda
        [ "$gpus" -ge $ranks ] || ranks=$gpus
    else
        echo "quickstart.sh: there are $gpus GPUs here, but the build found no CUDA toolkit, cuBLAS or NCCL: running on the CPU" >&2
    fi
fi
exec launch/mpirun.sh -np $ranks build/kvlinc generate --model "$model" --device $device --cp $ranks --cache kvlinc --chat \
    --prompt-file configs/prompts/lighthouse.txt --max-tokens 160 --temperature 0.3 --seed 1 "$@"
