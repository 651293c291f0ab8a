"""What transformers says of token ids, for the scripts beside this file: log-probabilities and greedy continuations.

Everything runs in float32 on the CPU with transformers' plain ("eager") attention; log-softmax is taken in float64 of the
float32 logits. Numbers are rounded to 6 decimals, a hundredth of the tightest bound that is tested.
"""

import importlib.metadata
import platform

import torch

GREEDY_TOKENS = 64


def made_with(*packages):
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def use_exact_float32():
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def rounded(values):
    return [round(float(v), 6) for v in values]


def prompt_logprobs(model, ids):
    """Of ids[1:], each given those before it."""
    if len(ids) < 2:
        return []
    logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    assert logits.dtype == torch.float32
    out = []
    for at, target in enumerate(ids[1:]):
        out.append(logits[at].double().log_softmax(-1)[target])
    return rounded(out)


def greedy(model, ids):
    """The likeliest token, GREEDY_TOKENS times (end tokens too): ids, log-probabilities, logit of the best less that of the second."""
    new, logprobs, margins, cache, step = [], [], [], None, torch.tensor([ids])
    for _ in range(GREEDY_TOKENS):
        result = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = result.logits[0, -1].double(), result.past_key_values
        best = logits.topk(2)
        new.append(int(best.indices[0]))
        logprobs.append(logits.log_softmax(-1)[new[-1]])
        margins.append(best.values[0] - best.values[1])
        step = torch.tensor([[new[-1]]])
    return {"ids": new, "logprobs": rounded(logprobs), "margins": rounded(margins)}


def prompt(model, name, ids, with_greedy):
    row = {"name": name, "ids": ids, "logprobs": prompt_logprobs(model, ids)}
    if with_greedy:
        row["greedy"] = greedy(model, ids)
    return row
