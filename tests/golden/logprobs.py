"""Golden log-probabilities of a real model: logprobs.py MODEL.gguf > logprobs.json or logprobs_qwen2.json

MODEL.gguf: SmolLM2-135M-Instruct.Q4_1.gguf or qwen2.5-coder-0.5b-instruct-q4_k_m.gguf, dequantized and computed by transformers in
float32 (scores.py). Needs torch, transformers, accelerate (transformers wants it to read GGUF), gguf, tokenizers. Prompts are texts
of this script and of the standard library of the Python that runs it; the golden file holds their token ids. Of the second model, a
larger one, only some prompts are computed.
"""

import inspect
import json
import pathlib
import pydoc_data.topics
import shutil
import sys
import textwrap

import gguf
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

import scores

PROSE = ("The lighthouse keeper climbed the stairs every evening, lamp in hand, and wrote down what the sea had done that day. "
         "Some nights it had done nothing at all, and he wrote that too, because an empty page would have been a lie.")
CHAT = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France, and what is it known for?<|im_end|>\n<|im_start|>assistant\n")
SCRIPTS = [
    "Der Fluss ist breit, und über die Brücke führt eine alte Straße.", "Le fleuve est large et un vieux chemin mène au pont.",
    "Река широка, и старая дорога ведёт через мост.", "Ο ποταμός είναι πλατύς και ένας παλιός δρόμος οδηγεί στη γέφυρα.",
    "النهر واسع والطريق القديم يعبر الجسر.", "הנהר רחב והדרך הישנה עוברת על הגשר.", "नदी चौड़ी है और पुरानी सड़क पुल से होकर जाती है।",
    "河很宽，一条旧路通过桥。", "川は広く、古い道が橋を渡っている。", "강은 넓고 오래된 길이 다리를 건넌다.", "แม่น้ำกว้างและถนนเก่าข้ามสะพาน",
    "Rzeka jest szeroka, a stara droga prowadzi przez most.", "Nehir geniştir ve eski yol köprüden geçer.", "🌊🌉 1234567890 ½ ≤ ∞",
]
C_CODE = textwrap.dedent("""\
    /* A ring of bytes: one writer, one reader. */
    struct ring { unsigned char *bytes; size_t size, read, written; };

    static size_t ring_put(struct ring *r, const void *from, size_t n) {
        size_t room = r->size - (r->written - r->read);
        if (n > room)
            n = room;
        for (size_t i = 0; i < n; i++)
            r->bytes[(r->written + i) % r->size] = ((const unsigned char *)from)[i];
        r->written += n;
        return n;
    }

    int main(int argc, char **argv) {
        struct ring r = {.bytes = malloc(64), .size = 64};
        for (int i = 1; i < argc; i++)
            printf("%zu of %zu\\n", ring_put(&r, argv[i], strlen(argv[i])), strlen(argv[i]));
        free(r.bytes);
        return 0;
    }
    """)


QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PROMPTS = ("chat", "scripts 127")


def tokenizer(fields, arch):
    """SmolLM2's or Qwen2's own settings, which transformers does not take from the GGUF file."""
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types) if kind == 3])
    if arch == "qwen2":
        tok.normalizer = normalizers.NFC()
        first = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=arch != "qwen2")])
    tok.decoder = decoders.ByteLevel()
    return tok


def json_text():
    rows = [{"station": i, "name": f"buoy-{i:03d}", "position": [54.0 + i / 7, -3.5 - i / 9], "active": i % 3 != 0, "note": None}
            for i in range(40)]
    return json.dumps({"made": "2024-02-29", "rows": rows}, indent=1)


def prompts():
    """name, text, number of tokens (None: all), whether it is continued"""
    prose = pydoc_data.topics.topics
    yield "one token", "<|im_start|>", 1, True
    yield "two tokens", "Once upon", 2, True
    yield "prose", PROSE, None, True
    yield "chat", CHAT, None, True
    yield "scripts 127", " ".join(SCRIPTS), 127, False
    yield "C 128", C_CODE, 128, True
    yield "JSON 129", json_text(), 129, True
    yield "prose 255", prose["strings"], 255, False
    yield "C 256", C_CODE, 256, True
    yield "JSON 257", json_text(), 257, True
    yield "scripts 600", "\n".join(SCRIPTS + SCRIPTS[::-1]), 600, True
    yield "prose 1500", prose["objects"] + prose["naming"] + prose["dynamic-features"], 1500, True
    yield "Python 4000", inspect.getsource(textwrap) + inspect.getsource(shutil), 4000, False


def main():
    scores.use_exact_float32()
    path = pathlib.Path(sys.argv[1]).resolve()
    fields = gguf.GGUFReader(path).fields
    arch = fields["general.architecture"].contents()
    tok = tokenizer(fields, arch)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    for name, text, count, with_greedy in prompts():
        if arch == "qwen2" and name not in QWEN2_PROMPTS:
            continue
        ids = tok.encode(text, add_special_tokens=False).ids
        assert count is None or len(ids) >= count, (name, len(ids))
        rows.append(scores.prompt(model, name, ids[:count], with_greedy))
        print(name, len(rows[-1]["ids"]), file=sys.stderr)
    versions = scores.made_with("torch", "transformers", "accelerate", "gguf", "tokenizers", "numpy")
    json.dump({"made_by": "tests/golden/logprobs.py", "model": path.name, "made_with": versions, "prompts": rows}, sys.stdout,
              separators=(",", ":"))
    print()


main()
