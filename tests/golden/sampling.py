#!/usr/bin/env python3
"""Writes sampling.golden: the tokens that transformers' logits processors leave, for hash-made logits. Usage: sampling.py > sampling.golden

A case whose set could depend on rounding (a token at a threshold within MARGIN) is replaced by the next seed's.
"""
import numpy as np
import torch
import transformers
from transformers.generation import logits_process as lp

MASK = (1 << 64) - 1
MARGIN = 1e-5


def test_hash(seed, index):  # tests/test.h
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def logits_of(seed, vocab):  # rig_logit of tests/kernels/sample_rig.h
    u = np.array([(test_hash(seed, i) >> 40) / (1 << 23) - 1.0 for i in range(vocab)], dtype=np.float32)
    return u * u * u * np.float32(16)


def left(logits, prompt, temperature, top_k, top_p, min_p, repetition):
    ids = torch.tensor([prompt], dtype=torch.long)
    x = torch.tensor(logits)[None]
    if repetition != 1:
        x = lp.RepetitionPenaltyLogitsProcessor(repetition)(ids, x)
    if temperature != 1:
        x = lp.TemperatureLogitsWarper(temperature)(ids, x)
    margins = []
    if top_k:
        s = torch.sort(x[0], descending=True).values
        if top_k < len(s):
            margins.append(float(s[top_k - 1] - s[top_k]))
        x = lp.TopKLogitsWarper(top_k)(ids, x)
    if top_p < 1:
        mass = torch.softmax(x[0].double(), 0).sort(descending=True).values.cumsum(0)
        margins.append(float((mass - top_p).abs().min()))
        x = lp.TopPLogitsWarper(top_p)(ids, x)
    if min_p > 0:
        margins.append(float((x[0].double() - x[0].max() - np.log(min_p)).abs().min()))
        x = lp.MinPLogitsWarper(min_p)(ids, x)
    return torch.isfinite(x[0]).nonzero()[:, 0].tolist(), min(margins, default=1)


CASES = [  # vocabulary, temperature, top_k, top_p, min_p, repetition penalty, prompt length
    (1000, 1.0, 1, 1.0, 0.0, 1.0, 0),
    (1000, 1.0, 40, 1.0, 0.0, 1.0, 0),
    (1000, 1.0, 2000, 1.0, 0.0, 1.0, 0),
    (1000, 0.7, 999, 1.0, 0.0, 1.0, 0),
    (1000, 1.0, 0, 0.9, 0.0, 1.0, 0),
    (1000, 1.5, 0, 0.5, 0.0, 1.0, 0),
    (1000, 3.0, 0, 0.99, 0.0, 1.0, 0),
    (1000, 0.3, 0, 0.01, 0.0, 1.0, 0),
    (1000, 1.0, 0, 1.0, 0.05, 1.0, 0),
    (1000, 2.0, 0, 1.0, 0.3, 1.0, 0),
    (1000, 1.0, 0, 1.0, 1e-6, 1.0, 0),
    (1000, 1.3, 50, 0.8, 0.0, 1.0, 0),
    (1000, 2.5, 50, 0.8, 0.1, 1.0, 0),
    (1000, 2.5, 7, 0.95, 0.02, 1.2, 300),
    (1000, 0.8, 100, 0.95, 0.001, 1.8, 500),
    (4099, 2.2, 0, 0.9, 0.0, 0.7, 2000),
    (4099, 4.0, 600, 0.9, 0.01, 1.1, 1000),
    (37, 1.1, 5, 0.9, 0.05, 1.3, 20),
    (2, 1.0, 0, 0.6, 0.0, 1.0, 0),
    (1, 1.0, 3, 0.5, 0.5, 1.0, 0),
]

print(f"# transformers {transformers.__version__} torch {torch.__version__} numpy {np.__version__}")
print("# seed vocabulary temperature top_k top_p min_p repetition n_prompt (ids: hash(seed + 1000000, i) mod vocabulary) n_left ids...")
for number, (vocab, temperature, top_k, top_p, min_p, repetition, n_prompt) in enumerate(CASES):
    for seed in range(100 * number + 1, 100 * number + 100):
        prompt = [test_hash(seed + 1000000, i) % vocab for i in range(n_prompt)]
        ids, margin = left(logits_of(seed, vocab), prompt, temperature, top_k, top_p, min_p, repetition)
        if margin > MARGIN:
            break
    else:
        raise SystemExit(f"case {number}: no seed without a near tie")
    print(seed, vocab, temperature, top_k, top_p, min_p, repetition, n_prompt, len(ids), *ids)
