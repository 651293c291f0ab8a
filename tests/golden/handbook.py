"""The study's losses in compact form: handbook.py STUDY.json > handbook.json

STUDY.json holds token ids and losses of three windows of 2048 tokens of Debian's `debian-handbook` (English), computed for
SmolLM2-135M-Instruct by a PyTorch emulation that shares no code with this project: float32, token by token, the window rule of this
project's caches. This script keeps the methods that the tests run and rounds to 3 decimals.
"""

import json
import sys

METHODS = ["fp16", "kivi", "hadv", "hadv sink16", "kivi k4v4", "kivi k2v4"]


def main():
    with open(sys.argv[1]) as file:
        study = json.load(file)
    about = ("Negative log-likelihood (natural log, in thousandths) of every token of three windows of SmolLM2-135M-Instruct by cache: "
             "nll[method][window][i] belongs to ids[window][i+1]. From an independent PyTorch emulation in float32 of token-by-token "
             "decoding under the same window rule. Text: debian-handbook, English.")
    nll = {method: [[round(1000 * value) for value in window] for window in study["nll"][method]] for method in METHODS}
    json.dump({"made_by": "tests/golden/handbook.py", "about": about, "ids": study["ids"], "nll": nll}, sys.stdout, separators=(",", ":"))
    print()


main()
