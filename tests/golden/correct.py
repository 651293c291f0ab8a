"""Golden values of the correction (KVLinC), by PyTorch in float64: S, P after several flushed blocks, then C_n, C_d of two query rows.

Run: python correct.py > correct.golden. Inputs come from a hash that the C test computes as well; K^q and V^q from quantizer.py. Of S every
SAMPLEth entry is stored. zk, zq: the largest sum of |x_c W_cj|, and vmax: the largest |V|, from which the test derives its tolerance.
"""
import sys

import numpy as np
import torch

from quantizer import BLOCK, WINDOWS, bell, quantize, test_hash

SAMPLE = 5
# window d features n_kv_heads n_heads k_bits v_bits sink n_blocks gate per_head exact_v
CASES = [
    ("f32", 64, 64, 2, 4, 2, 2, 0, 3, 0, 0, 0),
    ("f16", 64, 40, 2, 6, 2, 4, 16, 2, 1, 1, 0),
    ("bf16", 128, 64, 1, 5, 2, 2, 16, 3, 0, 0, 1),
    ("f16", 128, 256, 1, 3, 4, 2, 128, 2, 1, 0, 0),
    ("f32", 64, 512, 1, 1, 2, 8, 0, 1, 0, 0, 0),
    ("f16", 64, 64, 3, 3, 16, 16, 0, 1, 0, 0, 0),
]


def bells(seed, *shape):
    n = int(np.prod(shape))
    return torch.from_numpy(bell(test_hash(seed, np.arange(n)))).reshape(*shape)


def phi(x, w):
    return torch.cat([torch.softmax(x @ w[0], -1), torch.softmax(x @ w[1], -1)], -1)


def line(word, values):
    print(word, " ".join(f"{v:.10e}" for v in values.flatten().tolist()))


def run(number, window, d, features, n_kv_heads, n_heads, k_bits, v_bits, sink, n_blocks, gate, per_head, exact_v):
    seed, n, half = 100 * (number + 1), n_blocks * BLOCK, features // 2
    kind = WINDOWS[window]
    channel = torch.exp2(torch.arange(d, dtype=torch.float64) % 3)
    k = (bells(seed, n_kv_heads, n, d) * channel).float().to(kind)
    v = bells(seed + 1, n_kv_heads, n, d).float().to(kind)
    q = bells(seed + 2, 2, n_heads, d).float().to(kind).double()
    w_k = (bells(seed + 3, n_kv_heads, 2, d, half) / 4).double()
    w_q = (bells(seed + 4, n_heads if per_head else n_kv_heads, 2, d, half) / 4).double()
    gates = bells(seed + 5, n_kv_heads) if gate else torch.ones(n_kv_heads, dtype=torch.float64)
    print("case", window, d, features, n_kv_heads, n_heads, k_bits, v_bits, sink, n_blocks, gate, per_head, exact_v, seed)
    group, zk, zq = n_heads // n_kv_heads, 0.0, 0.0
    c_n, c_d = torch.zeros(2, n_heads, d, dtype=torch.float64), torch.zeros(2, n_heads, dtype=torch.float64)
    absolute = torch.zeros(2, n_heads, dtype=torch.float64)
    for h in range(n_kv_heads):
        s, p = torch.zeros(features, d, dtype=torch.float64), torch.zeros(features, dtype=torch.float64)
        for j in range(n_blocks):
            first = sink if j == 0 else 0
            rows_k, rows_v = (x[h, j * BLOCK : (j + 1) * BLOCK] for x in (k, v))
            k_q = rows_k if k_bits == 16 else quantize(rows_k, k_bits, "K", first)[3]
            v_q = rows_v if exact_v or v_bits == 16 else quantize(rows_v, v_bits, "V", first)[3]
            error = (rows_k.double() - k_q.double())[first:]
            f = phi(error, w_k[h]) * gates[h]
            s += f.T @ v_q.double()[first:]
            p += f.sum(0)
            if first < BLOCK:
                zk = max(zk, (error.abs() @ w_k[h].abs()).max().item())
        for head in range(h * group, (h + 1) * group):
            w = w_q[head if per_head else h]
            f = phi(q[:, head], w)
            zq = max(zq, (q[:, head].abs() @ w.abs()).max().item())
            c_n[:, head], c_d[:, head] = f @ s, f @ p
            absolute[:, head] = f @ p.abs()
        line("S", s.flatten()[::SAMPLE])
        line("P", p)
    line("C_n", c_n)
    line("C_d", c_d)
    line("bound", torch.tensor([zk, zq, v.double().abs().max().item() * 2]))
    assert torch.allclose(absolute, c_d.abs())  # phi is positive: the gate's sign is the whole sum's


def main():
    print(f"# correct.py: torch {torch.__version__}, numpy {np.__version__}, python {sys.version.split()[0]}")
    for number, case in enumerate(CASES):
        run(number, *case)


if __name__ == "__main__":
    main()
