#!/usr/bin/env bash
# The real program with the real model on GPUs: text and log-probabilities against the CPU's, the refusals that a user meets, a batch that is
# killed and goes on, a killed and a stopped rank; and that nothing stays on the GPU. Needs the real model: KVLINC_TEST_MODEL.
#   test_gpu.sh KVLINC MPIRUN RANKS        RANKS: GPUs to use
set -uo pipefail
unset KVLINC_QUIET

kvlinc=$(readlink -f "$1")
mpirun=$2
ranks=$3
model=${KVLINC_TEST_MODEL:-}
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ')
[ "$gpus" -ge "$ranks" ] || { echo "test_gpu.sh: $ranks ranks, $gpus GPUs" >&2; exit 77; }
[ -n "$model" ] || { echo "test_gpu.sh: KVLINC_TEST_MODEL is not set" >&2; exit 77; }
work=$(mktemp --directory)
# shellcheck source=tests/launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
says() { grep -qE -- "$1" "$work/errors" || fail "no word of '$1'"; }
run() { # expected exit code, ranks, arguments...
    local code=$1 n=$2 got=0
    shift 2
    timeout 120 "$mpirun" -np "$n" "$kvlinc" "$@" --model "$model" >"$work/output" 2>"$work/errors" </dev/null || got=$?
    [ "$got" = "$code" ] || fail "exit code $got, expected $code: -np $n $*"
}

# ---- what is refused, in one clear message
run 2 $((gpus + 1)) generate --device cuda --prompt x
says "$((gpus + 1)) ranks.*$gpus GPU"
run 2 1 generate --device cuda --cache f32 --prompt x
says "cache f32.*CPU"
CUDA_VISIBLE_DEVICES='' run 2 1 generate --device cuda --prompt x
says "no GPU that this process can use"
CUDA_VISIBLE_DEVICES='' run 0 1 generate --prompt x --max-tokens 2
says "device cpu"
run 2 1 generate --device cpu --comm nccl --prompt x
says "comm = nccl"
if [ "$ranks" -gt 1 ]; then
    run 2 "$ranks" generate --device cuda --comm mpi --prompt x
    says "comm = mpi|comm = nccl"
fi

# ---- auto takes the GPUs, and says so
run 0 "$ranks" generate --prompt "Once upon a time" --max-tokens 8
says "cuda [0-9]+: NVIDIA"

# ---- the same rows on CPU and GPU: log-probabilities close, cached and exact, every layout
python3 - "$work/in.jsonl" <<'PYTHON'
import json, sys
words = "the quick brown fox jumps over a lazy dog while seven wizards read old books about rivers and stones".split()
with open(sys.argv[1], "w") as out:
    for i in range(6):
        text = " ".join(words[(i * 7 + k * 3) % len(words)] for k in range(20 + 90 * (i % 4)))
        row = {"custom_id": str(i), "prompt": text, "max_tokens": 12, "temperature": 0, "logprobs": 0, "echo": True, "ignore_eos": True,
               "prefill": ["exact", "cached"][i % 2]}
        out.write(json.dumps(row) + "\n")
PYTHON
batch() { # output, ranks, device, options...
    local output=$1 n=$2 device=$3
    shift 3
    run 0 "$n" batch --device "$device" --input "$work/in.jsonl" --output "$output" --context 1024 --max-batch 4 "$@"
}
compare() { # expected, got, most mean difference
    python3 - "$@" <<'PYTHON' || fail "$2 is not $1"
import json, sys
def read(path):
    rows = [json.loads(line) for line in open(path)]
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"] for row in rows}
expected, got, most = read(sys.argv[1]), read(sys.argv[2]), float(sys.argv[3])
assert expected.keys() == got.keys(), (expected.keys(), got.keys())
worst = 0
for key, a in expected.items():
    b = got[key]
    assert len(a) == len(b), (key, len(a), len(b))
    d = [abs(x - y) for x, y in zip(a[1:-12], b[1:-12])] # the prompt: answers may part at a near-tie
    mean = sum(d) / len(d)
    worst = max(worst, mean)
    assert mean <= most, f"row {key}: mean difference {mean}, at most {most}"
print(f"{sys.argv[2]}: mean difference at most {worst:.2g}")
PYTHON
}
batch "$work/cpu" 1 cpu --cache fp16
batch "$work/gpu" 1 cuda --cache fp16
compare "$work/cpu" "$work/gpu" 0.004
if [ "$ranks" -gt 1 ]; then
    for merge in allreduce fused gather; do
        batch "$work/gpu-$merge" "$ranks" cuda --cache fp16 --cp "$ranks" --merge $merge
        compare "$work/cpu" "$work/gpu-$merge" 0.004
    done
fi
for cache in kivi hadv; do
    for bits in 2 4; do
        batch "$work/$cache-$bits" "$ranks" cuda --cache $cache --k-bits $bits --v-bits $bits --sink 16
    done
done

# ---- killed with SIGKILL, whole job, and started again: every row once, and as in an undisturbed run
start() { # output
    setsid "$mpirun" -np "$ranks" "$kvlinc" batch --model "$model" --device cuda --cache kivi --context 1024 --max-batch 2 --deadline 5 \
        --input "$work/long.jsonl" --output "$1" >"$work/output" 2>"$work/errors" </dev/null &
    job=$!
}
for i in $(seq 40); do
    echo "{\"custom_id\": \"$i\", \"prompt\": \"$i rivers\", \"max_tokens\": 60, \"seed\": 1, \"ignore_eos\": true}"
done >"$work/long.jsonl"
start "$work/whole"
wait "$job" || fail "an undisturbed batch: $?"
for n in 3 10; do
    start "$work/killed"
    for ((i = 0; i < 400; i++)); do
        [ "$(cat "$work/killed" 2>/dev/null | wc -l)" -ge $n ] && break
        sleep 0.05
    done
    kill_job KILL
    wait "$job" 2>/dev/null
    job=
done
start "$work/killed"
wait "$job" || fail "a batch that goes on: $?"
job=
python3 - "$work/whole" "$work/killed" <<'PYTHON' || fail "a batch that was killed differs"
import json, sys
def read(path):
    rows = [json.loads(line) for line in open(path)]
    assert len(rows) == 40 == len({row["custom_id"] for row in rows}), len(rows)
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
a, b = read(sys.argv[1]), read(sys.argv[2])
assert a == b, [key for key in a if a[key] != b[key]]
PYTHON

# ---- a rank that is stopped, a rank that is killed
if [ "$ranks" -gt 1 ]; then
    for signal in STOP KILL; do
        rm -f "$work/$signal"
        start "$work/$signal"
        for ((i = 0; i < 400; i++)); do
            [ -s "$work/$signal" ] && break
            sleep 0.05
        done
        kill -$signal "$(rank 1)"
        begin=$SECONDS
        got=0
        wait "$job" || got=$?
        [ $got = 1 ] || fail "rank 1 gets $signal: exit code $got"
        [ $((SECONDS - begin)) -le 16 ] || fail "rank 1 gets $signal: the end took $((SECONDS - begin)) s"
        if [ $signal = STOP ]; then
            says "rank 1 .* does not answer"
            says "at step [0-9]"
        fi
        kill_job KILL
        job=
    done
fi
sleep 1
left=$(nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null)
[ -z "$left" ] || fail "processes stay on the GPU: $left"
exit $failed
