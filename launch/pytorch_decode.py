#!/usr/bin/env python3
"""What kvlinc bench decode is measured against: a decode step in PyTorch, as fast as plain PyTorch gets it.

    launch/pytorch_decode.py --model configs/models/llama-3.1-8b.conf --contexts 4K,32K --batches 1,8 [--csv FILE]

A static cache [batch][kv_head][tokens][head_dim] for each layer, fused QKV and gate/up projections, F.scaled_dot_product_attention,
LM head and argmax, all in one CUDA graph; what lies between the products goes through torch.compile where that works. Attention is
tried with every backend of SDPA, asked for grouped heads and with the heads of a group folded into query rows (which reads K and V
once in every backend); the fastest step counts, the others are in its note. Weights and cache are random 16-bit numbers, each bigger
than the L2 cache. A step is the last of `tokens` tokens: its position is fixed, so that attention needs no mask, which would cost time.
The median is over replays that follow each other without a gap: host work is free here, unlike in kvlinc's figure.

The columns are those of kvlinc bench --csv. --check compares the steps with an independent computation in float64 instead.
Exit codes: 0 done, 1 failed, 2 usage or input.
"""

import argparse
import csv
import math
import statistics
import sys
import time
import warnings
from types import SimpleNamespace

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    torch = None
    missing = error

COLUMNS = ("section item cache batch tokens ms best_ms rate unit bytes flop share of predicted_ms predicted_ratio note").split()
DTYPES = ("fp16", "bf16", "fp32")
WARM_STEPS = 3
CHECK_TOKENS, CHECK_BATCH = 12, 2
REFERENCE_ROWS = 1 << 16  # keys that the check of a backend widens at once
WORST_ATTENTION = 0.05    # of the largest output: what 16-bit probabilities and outputs may do


def fail(code, text):
    print(f"pytorch_decode.py: {text}", file=sys.stderr)
    sys.exit(code)


def note(text):
    print(f"pytorch_decode.py: {text}", file=sys.stderr, flush=True)


# ---- options --------------------------------------------------------------------------------------------------------

def size(word):
    """128 or 4K"""
    digits, unit = (word[:-1], word[-1]) if word[-1:] in ("K", "M") else (word, "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"'{word}', expected a positive number such as 128, 4K or 1M")
    return int(digits) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit]


def sizes(text):
    return [size(word) for word in text.split(",")]


def read_options():
    parser = argparse.ArgumentParser(description="A decode step in PyTorch: static cache, CUDA graph, the fastest attention.")
    parser.add_argument("--model", required=True, metavar="FILE", help="a shape of configs/models")
    parser.add_argument("--contexts", type=sizes, default=[128, 1024, 4096], metavar="LIST", help="tokens of a sequence (128,1K,4K)")
    parser.add_argument("--batches", type=sizes, default=[1], metavar="LIST", help="sequences that decode at once (1)")
    parser.add_argument("--steps", type=size, default=100, metavar="N", help="replays of which the median counts (100)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and cache (bf16); fp32 is for --check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for tests: no graph, no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--check", action="store_true", help="compare the steps with a computation in float64; for tiny shapes")
    parser.add_argument("--csv", metavar="FILE", help="where the rows go (standard output)")
    return parser.parse_args()


def read_shape(path):
    """The fields of a shape file that a step needs: model_shape.c reads the same file, and more strictly."""
    fields = {}
    try:
        lines = open(path, encoding="utf-8").read().splitlines()
    except OSError as error:
        fail(2, f"{path}: {error.strerror}")
    for line in lines:
        name, equals, value = line.partition("#")[0].partition("=")
        if equals:
            fields[name.strip()] = value.strip()
    kinds = {"shape": str, "hidden": int, "layers": int, "heads": int, "kv_heads": int, "head_dim": int, "inner": int, "vocab": int,
             "rms_eps": float, "rope_theta": float, "tied_head": {"yes": True, "no": False}.__getitem__,
             "qkv_bias": {"yes": True, "no": False}.__getitem__}
    shape = SimpleNamespace()
    for name, kind in kinds.items():
        if name not in fields:
            fail(2, f"{path}: {name} is missing: expected a shape such as configs/models/llama-3.1-8b.conf")
        try:
            setattr(shape, name, kind(fields[name]))
        except (ValueError, KeyError):
            fail(2, f"{path}: {name}: '{fields[name]}' is not understood")
    if shape.heads % shape.kv_heads:
        fail(2, f"{path}: {shape.heads} query heads, expected a multiple of the {shape.kv_heads} KV heads")
    shape.qk_norm = shape.shape == "qwen3"
    return shape


# ---- model and cache ------------------------------------------------------------------------------------------------

def random_tensor(device, dtype, low, high, *sizes):
    return torch.empty(sizes, device=device, dtype=dtype).uniform_(low, high)


def make_model(shape, device, dtype):
    """Random weights of the size that kvlinc's are made up with."""
    def matrix(*sizes):
        return random_tensor(device, dtype, -0.035, 0.035, *sizes)

    def norm(n):
        return random_tensor(device, dtype, 0.9, 1.1, n)

    d, width = shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layers = [SimpleNamespace(attn_norm=norm(shape.hidden), mlp_norm=norm(shape.hidden), qkv=matrix(width, shape.hidden),
                              qkv_bias=matrix(width) if shape.qkv_bias else None,
                              q_norm=norm(d) if shape.qk_norm else None, k_norm=norm(d) if shape.qk_norm else None,
                              o=matrix(shape.hidden, shape.heads * d), gate_up=matrix(2 * shape.inner, shape.hidden),
                              down=matrix(shape.hidden, shape.inner)) for _ in range(shape.layers)]
    embed = matrix(shape.vocab, shape.hidden)
    return SimpleNamespace(shape=shape, device=device, dtype=dtype, layers=layers, embed=embed, final_norm=norm(shape.hidden),
                           head=embed if shape.tied_head else matrix(shape.vocab, shape.hidden))


def make_cache(model, batch, n):
    """K and V of each layer, normally distributed: attention that chooses."""
    s = model.shape
    return [[torch.empty(batch, s.kv_heads, n, s.head_dim, device=model.device, dtype=model.dtype).normal_() for _ in range(2)]
            for _ in model.layers]


def read_bytes(model, batch, n):
    """What a step has to read: the weights once, of an embedding of its own a row for each token, and the cache."""
    s = model.shape
    tensors = [t for layer in model.layers for t in vars(layer).values() if t is not None] + [model.final_norm, model.head]
    values = sum(t.numel() for t in tensors) + (0 if s.tied_head else batch * s.hidden)
    return (values + batch * n * s.kv_heads * s.head_dim * 2 * s.layers) * model.embed.element_size()


# ---- a step ---------------------------------------------------------------------------------------------------------

def add_norm(x, y, weight, eps):
    x = x + y
    return x, F.rms_norm(x, weight.shape, weight, eps)


def turn(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def place(qkv, cos, sin, q_norm, k_norm, k_slot, v_slot, eps):
    """The turned queries; the token's key and value go to the cache."""
    batch, kv_heads, d = k_slot.shape
    q, k, v = qkv.view(batch, -1, d).split((qkv.shape[1] // d - 2 * kv_heads, kv_heads, kv_heads), 1)
    if q_norm is not None:
        q, k = F.rms_norm(q, (d,), q_norm, eps), F.rms_norm(k, (d,), k_norm, eps)
    k_slot.copy_(turn(k, cos, sin))
    v_slot.copy_(v)
    return turn(q, cos, sin)


def silu_mul(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


EAGER = SimpleNamespace(add_norm=add_norm, place=place, silu_mul=silu_mul, kind="eager")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def make_pieces(options, try_step):
    """What lies between the products: one kernel each if torch.compile works here (it needs Triton and a C compiler)."""
    if options.device != "cuda" or options.no_compile:
        return EAGER
    torch.compiler.reset()  # forgets other cases' sizes, of which it keeps few
    compiled = SimpleNamespace(kind="compiled", **{name: torch.compile(getattr(EAGER, name), dynamic=False)
                                                   for name in ("add_norm", "place", "silu_mul")})
    try:
        try_step(compiled)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler's many parts raise
        note(f"torch.compile does not work here ({first_line(error)}): the step runs without")
        return EAGER
    return compiled


def attend(q, k, v, way):
    """q [batch][heads][d] over k, v [batch][kv_heads][n][d]: every head sees all n tokens."""
    batch, heads, d = q.shape
    kv_heads = k.shape[1]
    with sdpa_kernel(way.backend):
        if way.folded:
            out = F.scaled_dot_product_attention(q.view(batch, kv_heads, heads // kv_heads, d), k, v)
        else:
            out = F.scaled_dot_product_attention(q.view(batch, heads, 1, d), k, v, enable_gqa=heads != kv_heads)
    return out.reshape(batch, heads * d)


def rope_turn(shape, position, device):
    """Cosines and sines of one position. Llama 3's scaling of the angles is left out: it costs no time."""
    angle = position * shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float64) / shape.head_dim)
    return angle.cos().float(), angle.sin().float()


def step(model, cache, n, rope, tokens, way, pieces):
    """Logits of the n-th token of each sequence, of which the cache has those before."""
    eps = model.shape.rms_eps
    x = F.embedding(tokens, model.embed)
    h = F.rms_norm(x, model.layers[0].attn_norm.shape, model.layers[0].attn_norm, eps)
    following = [layer.attn_norm for layer in model.layers[1:]] + [model.final_norm]
    for layer, (k, v), next_norm in zip(model.layers, cache, following):
        q = pieces.place(F.linear(h, layer.qkv, layer.qkv_bias), *rope, layer.q_norm, layer.k_norm, k[:, :, n - 1], v[:, :, n - 1], eps)
        a = attend(q, k[:, :, :n], v[:, :, :n], way)
        x, h = pieces.add_norm(x, F.linear(a, layer.o), layer.mlp_norm, eps)
        x, h = pieces.add_norm(x, F.linear(pieces.silu_mul(F.linear(h, layer.gate_up)), layer.down), next_norm, eps)
    return F.linear(h, model.head)


# ---- ways to attend -------------------------------------------------------------------------------------------------

def make_ways(shape):
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    forms = ("", " folded") if shape.heads != shape.kv_heads else ("",)
    return [SimpleNamespace(name=name + form, backend=backend, folded=bool(form)) for name, backend in backends.items() for form in forms]


def true_attention(q, k, v):
    """One head's output in float32, a slice of the keys at a time."""
    scores = torch.cat([part.float() @ q.float() for part in k.split(REFERENCE_ROWS)]) / math.sqrt(len(q))
    weights = scores.softmax(0).split(REFERENCE_ROWS)
    return sum(p @ part.float() for p, part in zip(weights, v.split(REFERENCE_ROWS)))


def works(model, cache, n, way):
    """Whether this way gives the right answer for these sizes; the last head of the last sequence stands for all."""
    k, v = (t[:, :, :n] for t in cache[0])
    q = torch.randn(len(k), model.shape.heads, model.shape.head_dim, device=model.device, dtype=model.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reasons why a backend cannot
            got = attend(q, k, v, way)[-1, -model.shape.head_dim:].float()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False  # no kernel for these sizes or this machine
    truth = true_attention(q[-1, -1], k[-1, -1], v[-1, -1])
    off = float((got - truth).abs().max() / truth.abs().max())
    if not off <= WORST_ATTENTION:
        note(f"{way.name}: off by {off:.3g} of the largest output, at most {WORST_ATTENTION}: not used")
    return off <= WORST_ATTENTION


def find_ways(model, cache, n):
    """Those that work; the plain computation only where nothing else does."""
    found = [way for way in make_ways(model.shape) if works(model, cache, n, way)]
    plain = SimpleNamespace(name="math", backend=SDPBackend.MATH, folded=model.shape.heads != model.shape.kv_heads)
    return found or [way for way in [plain] if works(model, cache, n, way)]


# ---- measuring ------------------------------------------------------------------------------------------------------

def time_graph(run, steps):
    """Milliseconds of each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_STEPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for _ in range(WARM_STEPS):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


def time_plain(run, steps):
    times = []
    for _ in range(WARM_STEPS + steps):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times[WARM_STEPS:]


def time_ways(model, batch, n, options):
    """Milliseconds of each step, by the name of the way to attend; and the pieces that the steps were made with."""
    cache = make_cache(model, batch, n)
    tokens = torch.zeros(batch, device=model.device, dtype=torch.int64)
    rope = rope_turn(model.shape, n - 1, model.device)
    ways, times = find_ways(model, cache, n), {}
    if not ways:
        return times, EAGER
    pieces = make_pieces(options, lambda tried: step(model, cache, n, rope, tokens, ways[0], tried))
    for way in ways:
        def run():
            tokens.copy_(step(model, cache, n, rope, tokens, way, pieces).argmax(-1))
        try:
            times[way.name] = (time_graph if model.device == "cuda" else time_plain)(run, options.steps)
        except RuntimeError as error:  # a backend that cannot be captured, or has no room beside the cache
            note(f"{way.name}, batch {batch}, {n} tokens: {first_line(error)}: not used")
    return times, pieces


def measure(model, batch, n, options):
    """A row of the table."""
    row = {"section": "decode", "item": "PyTorch", "cache": options.dtype, "batch": batch, "tokens": n}
    try:
        times, pieces = time_ways(model, batch, n, options)
    except torch.OutOfMemoryError:
        return row | {"note": "left out: out of memory"}
    if not times:
        return row | {"note": "left out: no attention works"}
    ms = {name: statistics.median(t) for name, t in times.items()}
    best = min(ms, key=ms.get)
    others = ", ".join(f"{name} {ms[name]:.4g} ms" for name in sorted(ms, key=ms.get) if name != best)
    return row | {"item": f"PyTorch {best}", "ms": ms[best], "best_ms": min(times[best]), "rate": batch / ms[best] * 1e3,
                  "unit": "tokens/s", "bytes": read_bytes(model, batch, n),
                  "note": f"{pieces.kind} pieces" + (f"; {others}" if others else "")}


def cudnn_version():
    """PyTorch refuses a cuDNN that it finds in LD_LIBRARY_PATH and was not built for."""
    try:
        return f"cuDNN {torch.backends.cudnn.version()}"
    except RuntimeError as error:
        return "no cuDNN (" + str(error).split(". ")[0] + ")"


def machine_row(options):
    words = [f"torch {torch.__version__}"]
    if options.device == "cuda":
        words += [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", cudnn_version()]
    return {"section": "machine", "item": "pytorch", "note": ", ".join(words)}


def write_table(model, options):
    try:
        out = open(options.csv, "w", newline="", encoding="utf-8") if options.csv else sys.stdout
    except OSError as error:
        fail(2, f"option csv: {options.csv}: {error.strerror}")
    with out:
        table = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerow(machine_row(options))
        for batch in options.batches:
            for n in options.contexts:
                row = measure(model, batch, n, options)
                row |= {name: f"{row[name]:.9g}" for name in ("ms", "best_ms", "rate", "bytes") if name in row}
                table.writerow(row)
                out.flush()
                if options.csv:
                    note(f"batch {batch}, {n} tokens: {row.get('ms', '-')} ms, {row['item']}, {row['note']}")
                if options.device == "cuda":
                    torch.cuda.empty_cache()


# ---- checking -------------------------------------------------------------------------------------------------------

def true_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def true_turn(x, theta):
    """x [token][d] as complex numbers (i, i + d/2), turned."""
    n, d = x.shape
    angle = torch.outer(torch.arange(n).double(), theta ** (-2 * torch.arange(d // 2).double() / d))
    z = torch.complex(x[:, :d // 2], x[:, d // 2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def true_layer(s, layer, x):
    n, d = len(x), s.head_dim
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    projected = true_norm(x, layer.attn_norm, s.rms_eps) @ layer.qkv.double().T
    if layer.qkv_bias is not None:
        projected = projected + layer.qkv_bias.double()
    heads = list(projected.split(d, -1))
    outputs = []
    for h in range(s.heads):
        group = h // (s.heads // s.kv_heads)
        q, k, v = heads[h], heads[s.heads + group], heads[s.heads + s.kv_heads + group]
        if s.qk_norm:
            q, k = true_norm(q, layer.q_norm, s.rms_eps), true_norm(k, layer.k_norm, s.rms_eps)
        scores = true_turn(q, s.rope_theta) @ true_turn(k, s.rope_theta).T / math.sqrt(d)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
    x = x + torch.cat(outputs, -1) @ layer.o.double().T
    gate, up = (true_norm(x, layer.mlp_norm, s.rms_eps) @ part.double().T for part in layer.gate_up.split(s.inner))
    return x + (gate * torch.sigmoid(gate) * up) @ layer.down.double().T


def true_logits(model, tokens):
    """Of all tokens of one sequence, without a cache, layer by layer in float64."""
    x = model.embed.double()[tokens]
    for layer in model.layers:
        x = true_layer(model.shape, layer, x)
    return true_norm(x, model.final_norm, model.shape.rms_eps) @ model.head.double().T


def check(model, options):
    """Decodes sequences token by token, in every way that works here."""
    bound = 1e-4 if model.dtype == torch.float32 else 0.05
    host = SimpleNamespace(**vars(model))
    host.layers = [SimpleNamespace(**{k: t if t is None else t.cpu() for k, t in vars(layer).items()}) for layer in model.layers]
    host.embed, host.head, host.final_norm = model.embed.cpu(), model.head.cpu(), model.final_norm.cpu()
    tokens = torch.randint(0, model.shape.vocab, (CHECK_BATCH, CHECK_TOKENS))
    truth = torch.stack([true_logits(host, row) for row in tokens])
    cache = make_cache(model, CHECK_BATCH, CHECK_TOKENS)
    ways = find_ways(model, cache, CHECK_TOKENS)
    if not ways:
        fail(1, "no attention works")

    def decode(n, way, pieces):
        return step(model, cache, n, rope_turn(model.shape, n - 1, model.device), tokens[:, n - 1].to(model.device), way, pieces)

    pieces = make_pieces(options, lambda tried: decode(1, ways[0], tried))
    for way in ways:
        for n in range(1, CHECK_TOKENS + 1):
            logits = decode(n, way, pieces)
            off = float((logits.cpu().double() - truth[:, n - 1]).abs().max() / truth.abs().max())
            if not off <= bound:
                fail(1, f"{way.name}, token {n}: logits off by {off:.3g} of the largest, at most {bound}")
        print(f"{way.name}, {pieces.kind} pieces: {CHECK_TOKENS} tokens agree")


def main():
    options = read_options()
    shape = read_shape(options.model)
    if torch is None:
        fail(1, f"this needs PyTorch ({missing}): pip install torch")
    if options.device == "cuda" and not torch.cuda.is_available():
        fail(1, "PyTorch finds no GPU (--device cpu is for tests)")
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    try:
        model = make_model(shape, options.device, dtype)
    except torch.OutOfMemoryError:
        fail(1, f"{options.model}: the weights do not fit into this GPU's memory")
    if options.check:
        check(model, options)
    else:
        write_table(model, options)


if __name__ == "__main__":
    main()
