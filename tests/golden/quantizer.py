"""Golden values of the quantizer, by PyTorch: codes, scales, zeros and decoded values of many groups.

Run: python quantizer.py > quantizer.golden. Inputs come from a hash of integers that the C test computes as well, so only checksums
are stored, and everything for a few cases. A checksum is FNV-1a over words (of 64 bits: xor a word, multiply): codes in
[token][channel] order, scale bits then zero bits, bits of the decoded floats in [token][channel] order.
"""
import sys

import numpy as np
import torch

BLOCK = 128
KINDS = ["normal", "constant", "tiny", "outlier", "overflow", "denormal", "ties", "zeros", "special", "scaled"]
WINDOWS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
FLT_MAX = float(np.finfo(np.float32).max)


def test_hash(seed, index):
    """tests/test.h's hash of (seed, index); index is an array."""
    with np.errstate(over="ignore"):
        index = np.asarray(index, dtype=np.uint64)
        z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + index * np.uint64(0xD1342543DE82EF95) + np.uint64(0x2545F4914F6CDD1D)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def bell(u):
    """Roughly normal, sigma about 1.15: a sum of four 16-bit fields, so that it is exact in float32."""
    fields = sum(((u >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return (fields - 131070) / 32768.0


def make_values(kind, part, window, bits, seed, d):
    """Values [BLOCK][d] of the window's type; `key` numbers the group, `other` runs inside it."""
    t, c = np.meshgrid(np.arange(BLOCK), np.arange(d), indexing="ij")
    key, other = (c, t) if part == "K" else (t, c)
    u = test_hash(seed, t * d + c)
    g = test_hash(seed + 1000003, key)
    normal = bell(u)
    mod = lambda n: (u % np.uint64(n)).astype(np.int64)
    half = window == "f16"
    if kind == "normal":
        x = normal
    elif kind == "constant":
        flat = ((g >> np.uint64(48)).astype(np.int64) - 32768) / 1024.0
        x = np.where(key % 3 == 0, flat, np.where(key % 3 == 1, 0.0, normal))
    elif kind == "tiny":
        x = key % 2 + mod(8) * np.exp2(-(20.0 + key % 12))
    elif kind == "outlier":
        x = normal * np.where(c == 5, 1000.0, 1.0)
    elif kind == "overflow":
        wide = normal * np.exp2(14.0 + mod(4 if half else 118))
        x = np.select([key % 4 == 0, key % 4 == 1], [np.where(normal < 0, -FLT_MAX, FLT_MAX), normal * 7e4], wide)
    elif kind == "denormal":
        x = (mod(2047) - 1023) * np.exp2(-24.0 if half else -(149.0 - key % 130))
    elif kind == "ties":
        top = 2**bits - 1
        m = np.select([other % 16 == 0, other % 16 == 1], [0, 2 * top], mod(2 * top + 1))
        x = (m * 0.5 - key % 8) * np.exp2(key % 5 - 2.0)
    elif kind == "zeros":
        low = np.select([key % 3 == 0, key % 3 == 1], [-0.0, -1e-9], np.where(mod(5) == 0, 1.0, 0.0))
        x = np.select([mod(3) == 0, mod(3) == 1], [-0.0, 0.0], low)
    elif kind == "special":
        x = np.select([mod(64) == 0, mod(64) == 1, mod(64) == 2], [np.nan, np.inf, -np.inf], normal)
        x = np.select([key % 16 == 3, key % 16 == 5, (key % 16 == 7) & (mod(2) == 0)], [np.nan, np.inf, np.nan], x)
    else:
        x = normal * np.exp2(key % 40 - 20.0)
    if half and kind != "special":
        x = np.clip(x, -65504.0, 65504.0)
    with np.errstate(over="ignore"):
        return torch.from_numpy(x.astype(np.float32)).to(WINDOWS[window])


def quantize(values, bits, part, first):
    """codes [BLOCK][d], scale and zero (float16, one per group), decoded float32 [BLOCK][d]."""
    x = torch.nan_to_num(values.float(), nan=0.0, posinf=FLT_MAX, neginf=-FLT_MAX)
    dim, d, top = (0 if part == "K" else 1), x.shape[1], float(2**bits - 1)
    codes = torch.zeros_like(x)
    scale = torch.zeros(d if part == "K" else BLOCK, dtype=torch.float16)
    zero = torch.zeros_like(scale)
    if first < BLOCK:
        x = x[first:]
        low, high = x.amin(dim), x.amax(dim)
        s = ((high - low) / torch.tensor(top)).clamp(-65504.0, 65504.0).half()
        z = low.clamp(-65504.0, 65504.0).half()
        z = torch.where(z == 0, torch.zeros_like(z), z)
        s = torch.where(s == 0, torch.zeros_like(s), s)
        groups = slice(None) if part == "K" else slice(first, None)
        scale[groups], zero[groups] = s, z
        s, z = s.float().unsqueeze(dim), z.float().unsqueeze(dim)
        q = torch.round(torch.clamp((x - z) / torch.where(s == 0, torch.ones_like(s), s), 0.0, top))
        codes[first:] = torch.where(s == 0, torch.zeros_like(q), q)
    decoded = codes * scale.float().unsqueeze(dim) + zero.float().unsqueeze(dim)
    return codes.to(torch.uint8), scale, zero, decoded


def fnv(words):
    h = 0xCBF29CE484222325
    for w in words:
        h = ((h ^ w) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def f16_bits(t):
    return [b & 0xFFFF for b in t.view(torch.int16).tolist()]


FULL = {("f16", 64, 2, "K", "normal", 16), ("bf16", 64, 4, "V", "outlier", 0), ("f32", 64, 8, "K", "ties", 0), ("f32", 64, 2, "V", "overflow", 16)}


def main():
    print(f"# quantizer.py: torch {torch.__version__}, numpy {np.__version__}, python {sys.version.split()[0]}")
    print("# case window d bits part kind first seed codes params decoded")
    seed = 0
    for window in WINDOWS:
        for d in (64, 128):
            for bits in (2, 4, 8):
                for part in "KV":
                    for kind in KINDS:
                        for first in (0, 16, 128) if kind == "normal" else (0, 16):
                            seed += 1
                            values = make_values(kind, part, window, bits, seed, d)
                            codes, scale, zero, decoded = quantize(values, bits, part, first)
                            assert torch.isfinite(decoded).all()
                            params = f16_bits(scale) + f16_bits(zero)
                            codes = codes.flatten().tolist()
                            words = [w & 0xFFFFFFFF for w in decoded.contiguous().view(torch.int32).flatten().tolist()]
                            sums = f"{fnv(codes):016x} {fnv(params):016x} {fnv(words):016x}"
                            print(f"case {window} {d} {bits} {part} {KINDS.index(kind)} {first} {seed} {sums}")
                            if (window, d, bits, part, kind, first) in FULL:
                                print("full", "".join(f"{c:02x}" for c in codes), "".join(f"{p:04x}" for p in params))


if __name__ == "__main__":
    main()
