"""Golden encodings from the `tokenizers` library: tokenizer.py MODEL.gguf > tokenizer.json

SmolLM2's own tokenizer is rebuilt from the vocabulary and merges of the GGUF file with the settings of its tokenizer.json,
and small tokenizers of other make are trained on a text of this script. Cases hold ids, or for long ones their number
and the 64-bit FNV-1a hash of their little-endian 32-bit values.
"""
import importlib.metadata
import json
import platform
import random
import struct
import sys
import unicodedata

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS_ONLY = 400  # ids of a case longer than this are hashed

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.", "", " ", "a", "Hello, world!", "hello", " hello", "  hello", "hello  ",
    "Zażółć gęślą jaźń — Příliš žluťoučký kůň úpěl ďábelské ódy.", "naïve café Ångström coöperate", "ﬁ ﬂ ﬀ ﬆ ﬃ",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m", "e\u0301\u0302\u0303\u0304\u0305\u0306x", "ÀÉÎÕÜ ß ẞ ſ ŉ ǅ Ǆ ǆ",
    "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί. ΐ ΰ ᾳ ῷ", "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "الثعلب البني السريع يقفز فوق الكلب الكسول ١٢٣٤٥ ۱۲۳", "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ", "שלום עולם בְּרֵאשִׁית בָּרָא אֱלֹהִים", "नमस्ते दुनिया क्षत्रिय १२३",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง ๑๒๓", "敏捷的棕色狐狸跳过了懒狗。", "吾輩は猫である。名前はまだ無い。カタカナ ﾊﾝｶｸ", "다람쥐 헌 쳇바퀴에 타고파", "한국어 (jamo)",
    "ქართული ენა ᲥᲐᲠᲗᲣᲚᲘ", "தமிழ் மொழி க்ஷ ௧௨௩ ௰", "Հայերեն", "ελληνικά", "አማርኛ ፩፪፫ ፲", "ᠮᠣᠩᠭᠣᠯ\u180eᠪᠢᠴᠢᠭ", "ខ្មែរ ១២៣", "မြန်မာ ၁၂၃", "বাংলা ১২৩", "ગુજરાતી",
    "ਪੰਜਾਬੀ", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "සිංහල", "ລາວ", "བོད་ཡིག ༡༢༣ ༪", "ᏣᎳᎩ", "ᐃᓄᒃᑎᑐᑦ", "𐍈𐌰𐌹", "𓀀𓂀 𒀀𒁀 𝔸𝕓𝒸 𝟘𝟙", "Tiếng Việt có dấu",
    "int main(void) { return x->y[0] << 3 | 0xFF; } // done\n", "def f(x):\n    return {k: v for k, v in x.items() if v != None}\n",
    "\tif err != nil {\n\t\treturn nil, fmt.Errorf(\"bad: %w\", err)\n\t}\n", "<div class=\"a b\">&nbsp;<br/></div>", "SELECT * FROM t WHERE a='b' -- c",
    "let v: Vec<&'a str> = s.split(\"::\").collect();", "for (i=0;i<10;i++)a[i]+=b[i]**2;", "#!/bin/sh\nset -e\necho \"$HOME\" | sed 's/a/b/g' && exit 1\n",
    "λx.λy.x y ∀x∈ℝ: ∃y≥x ∑∫√∞≠≈", "\\begin{align} x^2 &= \\frac{1}{2} \\\\ \\end{align}", "{\"a\": [1, 2.5e-3, null, true]}",
    "😀 😃😄 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☺ ✈️ 1️⃣ #️⃣ 🧑🏿‍🚀", "🫠🪿", "👩‍❤️‍💋‍👩👩‍❤️‍💋‍👩", "\U0001f1e9\U0001f1ea\U0001f1e9", "text😀text 😀text😀 text",
    "a\tb\t\tc", "a\u00a0b\u00a0\u00a0c", "a\u2003b\u2003\u2003 c", "a\u200bb\u200b \u200bc", "a\u200db\u200cc\ufeffd\u2060e", "a\r\nb\r\n\r\nc\r\rd\n\re",
    "a   b    c     d", "a\n\n\nb\n\n\n\n c", "trailing   ", "trailing\n", "trailing \n \n", "   \n\t  \n  x", "\n", "\n\n", " \n", "\n ", "\t", "  ", "   ",
    "x\u0085y\u0085 \u0085z", "x\u180ey \u180e z", "x\u2028y\u2029z\u2028 ", "x\u1680y\u202fz\u205fw\u3000v\u3000\u3000u", "\u00a0", "\u00a0 \u00a0x", "\x0b\x0c x\x0b",
    "\u200b", "\u2007 8", "a \u00adb", "½ cup", "x² + y³ = z⁴", "Ⅷ ⅷ ↀ ①②⑳ ㊿ 〇 〡〢 三百", "٣٤ ०१ ໑ 𝟗 ０１２", "10^6", "3.14159", "1,000,000.00", "0x1F 1e-9 1_000",
    "abc123def456", "123", " 123", "1 2  3   4", "a1b2c3", "2023-11-05T12:34:56Z", "192.168.0.1:8080", "v2.0.1-rc3", "¹²³₁₂₃ ¼½¾ ⅓", "12½3", " ½", "  7", "\n7\n\n8",
    "it's we'll I'd they've you're I'm don't", "IT'S WE'LL I'D THEY'VE YOU'RE I'M DON'T", "'s 'S 't 'T 'll 'LL 'Ll '", "it’s we’ll", "''s'''t", "'ſ 'ſx x'ſ 'K", " 's x 's",
    "l'été d'accord qu'il", "rock'n'roll 'tis 'twas", "'re're've'm'd'q",
    "\x00", "a\x00b", "\x01\x02\x03 \x07\x08", "\x1b[31mred\x1b[0m", "\x7f\x80\x9f", "\x04\x06\x13\x14\x16\x1d lost bytes", "\ufffd\ufffe\uffff", "\U0010ffff\U000e0001\U000f0000",
    "\u0300 \u0300a", "\ue000\uf8ff", "___", "a_b __init__ ‿ a‿b", "!!!???...", "...", "…", "-----", "=====", "*****", "~~~ ``` \"\"\"", "«guillemets» „Anführung“ 「括弧」", "¿Qué? ¡Sí!",
    "$100 €50 £20 ¥1000 ₿ 50% 20‰", "© ® ™ § ¶ † ‡ • ‣", "a@b.com https://example.org/path?q=1&r=%20#frag", "C:\\Users\\x\\file.txt", "#tag @user",
    "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|>b", "<|im_start|><|im_end|><|endoftext|>", "<|im_start|", "|im_start|>", "<|im_start|>>", "<<|im_start|>",
    " <|im_end|> ", "x <|im_start|>  y", "<repo_name>a<file_sep>b<filename>c<reponame>", "<|IM_START|>", "<|im_start|>system\n<|im_end|", "5<|im_end|>5", "<empty_output><jupyter_code>1",
    "<|im_<|im_start|>start|>", "Ġ Ċ ĉ Ā", "Ġhello Ċ", "supercalifragilisticexpialidocious antidisestablishmentarianism", "aAaAaA BbBb cCcC", "ﷺ ﷽ ꧁ ꧂",
]


def fnv(ids):
    h = 0xcbf29ce484222325
    for byte in struct.pack(f"<{len(ids)}i", *ids):
        h = (h ^ byte) * 0x100000001b3 & (1 << 64) - 1
    return f"{h:016x}"


def assigned_ranges():
    """All code points that Unicode 14 assigns (that of this Python, and of PCRE2 10.42), private use and surrogates left out."""
    ranges, first = [], None
    for code in range(0x110001):
        inside = code < 0x110000 and unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
        if inside and first is None:
            first = code
        elif not inside and first is not None:
            ranges.append([first, code - 1])
            first = None
    return ranges


def character_text(code):
    c = chr(code)
    return f"a{c}b {c} {c}{c}1{c}'{c}\n{c}"


def random_texts(ranges, rng):
    codes = [code for low, high in ranges for code in range(low, high + 1)]
    common = " \n\t'.,-_<|>0123456789abcdeABCDE\u00a0é中😀"
    texts = []
    for i in range(60):
        n = rng.randrange(1, 40)
        pool = codes if i % 3 == 0 else [c for c in codes if c < 0x600] if i % 3 == 1 else [ord(c) for c in common]
        texts.append("".join(chr(rng.choice(pool) if rng.random() < 0.7 else ord(rng.choice(common))) for _ in range(n)))
    return texts


def long_texts():
    """(unit, times): long pieces, where merging must not be quadratic."""
    units = ["a", " ", "\n", "ab", "!", "é", "中", "😀", "-=", "\t ", "hello", "1", "\u00a0", "'s", " \n", "ee\u0301", "aaaab", ".\n"]
    return [(u, 3000 // len(u)) for u in units] + [("a", 200001), (" ", 200001), ("abc", 70001), ("中文", 30001)]


def record(case, key, ids, always_hash=False):
    if always_hash or len(ids) > WORDS_ONLY:
        case[key + "_n"], case[key + "_fnv"] = len(ids), fnv(ids)
    else:
        case[key] = ids


def encode_case(tok, text, case, always_hash=False):
    tok.encode_special_tokens = False
    parsed = tok.encode(text, add_special_tokens=False).ids
    record(case, "ids", parsed, always_hash)
    added = tok.encode(text, add_special_tokens=True).ids
    tok.encode_special_tokens = True
    plain = tok.encode(text, add_special_tokens=False).ids
    tok.encode_special_tokens = False
    if plain != parsed:
        record(case, "plain", plain, always_hash)
    if added != parsed:
        record(case, "added", added, always_hash)
    return case


def all_cases(tok, texts, ranges, brief):
    cases = [encode_case(tok, t, {"text": t} if not brief else {"index": i}, brief) for i, t in enumerate(texts)]
    cases += [encode_case(tok, u * n, {"text": u, "times": n}) for u, n in long_texts()]
    every = [id for low, high in ranges for code in range(low, high + 1)
             for id in tok.encode(character_text(code), add_special_tokens=False).ids]
    return {"cases": cases, "every_n": len(every), "every_fnv": fnv(every)}


def smollm2(path):
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == 3])
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok


def train(pre, special, size, alphabet=None, unk=None):
    tok = Tokenizer(models.BPE(unk_token=unk))
    tok.pre_tokenizer = pre
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    tok.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet,
                                                           show_progress=False, limit_alphabet=len(alphabet) or None))
    return tok


def template(tok, begin, end):
    pieces = ([begin] if begin else []) + ["$A"] + ([end] if end else [])
    return processors.TemplateProcessing(single=" ".join(pieces), pair=None,
                                         special_tokens=[(t, tok.token_to_id(t)) for t in (begin, end) if t])


def edit(tok, change):
    """The tokenizer after a change of its JSON."""
    data = json.loads(tok.to_str())
    change(data)
    return Tokenizer.from_str(json.dumps(data))


def small_tokenizers():
    """name, tokenizer, its JSON, GGUF's word for its pre-tokenizer (or None)."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    sequence = pre_tokenizers.Sequence

    flags = train(sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]), ["<s>", "</s>", "<|a|>"], 420)
    flags.add_special_tokens([AddedToken("<l>", lstrip=True, special=True), AddedToken("<r>", rstrip=True, special=True),
                              AddedToken("<lr>", lstrip=True, rstrip=True, special=True), AddedToken("<|a|>b", special=True)])
    flags.add_tokens([AddedToken("word", single_word=True), AddedToken("  two", normalized=False), AddedToken("Éß", single_word=True),
                      AddedToken("<n", lstrip=True, normalized=True), AddedToken("a<l", normalized=True)])
    flags.post_processor = template(flags, "<s>", "</s>")
    yield "flags", flags, flags.to_str(), None

    strings = json.loads(flags.to_str())
    strings["model"]["merges"] = [" ".join(m) for m in strings["model"]["merges"]]
    assert Tokenizer.from_str(json.dumps(strings)).to_str() == flags.to_str()
    yield "merges as strings", flags, json.dumps(strings), None

    llama = train(sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), plain_bytes]), [], 400)

    def whole_words(data):
        data["model"]["ignore_merges"] = True
        for word in ("Ġhello", "Ġworld", "ĠZaÅ¼", "123", "jumps"):  # tokens that no merge leads to
            data["model"]["vocab"].setdefault(word, len(data["model"]["vocab"]))
    llama = edit(llama, whole_words)
    llama.add_special_tokens(["<|begin|>", "<|end|>"])
    llama.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template(llama, "<|begin|>", None)])
    yield "llama3", llama, llama.to_str(), "llama-bpe"

    qwen = train(sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), plain_bytes]), ["<|endoftext|>"], 400)
    qwen.normalizer = normalizers.NFC()
    qwen.add_tokens([AddedToken("cafe\u0301", normalized=True), AddedToken("nai\u0308ve", normalized=False)])
    qwen.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    yield "qwen2", qwen, qwen.to_str(), None

    gpt2 = train(byte_level, ["<|endoftext|>"], 500)
    yield "gpt2", gpt2, gpt2.to_str(), "gpt-2"

    for fuse in (False, True):
        unk = train(sequence([pre_tokenizers.Digits(individual_digits=False), byte_level]), ["<unk>"], 200, list("abcdefghijklmnop Ġ"), "<unk>")
        unk = edit(unk, lambda data, fuse=fuse: data["model"].update(fuse_unk=fuse))
        yield f"unk fuse={fuse}", unk, unk.to_str(), None


FLAG_TEXTS = [
    "a <l> b", "a  <l>b", "a<r>  b", "a <r>\n\t\u00a0b", " <lr> ", "x <lr> <lr> y", "<l><l> <l>", "<r> <l>", "a<l>", "<r>", " <r>", "<lr>",
    "word", "a word b", "aword", "worda", "word word", "wordword", "_word", "word_", "word.", "1word", "wordé", "word\u0301", "ⓐword", "wordⓐ", "word\u200d", "½word", "-word-",
    "  two", "   two", "  two  two", "a  two", "<r>  two", "Éß", "éÉß", "ÉßÉß", "Éß Éß", "É", "<|a|>", "<|a|>b", "<|a|>bb", "<|a|><|a|>b<|a", "a <n> <n", " <n", "a<l>", "a<l", "aa<l>",
    "<s>x</s>", "café", "cafe\u0301", "un cafe\u0301", "nai\u0308ve", "naïve", "xcafé", "e\u0301<|im_end|>e\u0301", "\u1100\u1161\u11a8", "\u212b", "\u0344", " hello world", "hello world 123 1234 12345",
    "zzz", "azzza", "ab1ab", "ÿÿ", "abc中文abc", "é", "a é b", "<unk>",
]

INVALID = ["80", "c3", "61c3", "c328", "e282", "e28261", "e2e282ac", "f09f98", "f09f9861", "f09f9880f09f", "eda080", "c080", "f4908080", "f8888080", "ff41fe", "41c3a9c3", "e0808061",
           "f0808061", "edbfbf", "f48fbfbf", "efbfbd", "20e4b8ad20e4b8", "fffffffe", "c3c3a9", "f0f09f9880", "e1a0c0", "f1808081c2", "00ff00"]


def all_pieces(ranges):
    """Characters per piece that each rule cuts from the text of every character, in the order of enum pretokenize_rule."""
    rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Digits(individual_digits=False)]
    rules += [pre_tokenizers.Split(Regex(regex), "isolated") for regex in (GPT2, LLAMA3, QWEN2)]
    rows = []
    for rule in rules:
        counts = [end - start for low, high in ranges for code in range(low, high + 1)
                  for _, (start, end) in rule.pre_tokenize_str(f"!{chr(code)}! " + character_text(code))]
        rows.append({"counts_n": len(counts), "counts_fnv": fnv(counts)})
    return rows


def main():
    rng = random.Random(20251)
    ranges = assigned_ranges()
    texts = SENTENCES + random_texts(ranges, rng)
    invalid = INVALID + [bytes(rng.choice(b"\x00A\x80\x9f\xa0\xbf\xc2\xc3\xe0\xe2\xed\xef\xf0\xf4\xf5\xff") for _ in range(rng.randrange(1, 16))).hex()
                         for _ in range(100)]
    tok = smollm2(sys.argv[1])
    out = {
        "made_by": "tests/golden/tokenizer.py",
        "versions": {"tokenizers": tokenizers.__version__, "gguf": importlib.metadata.version("gguf"), "python": platform.python_version(), "unicode": unicodedata.unidata_version},
        "ranges": ranges,
        "smollm2": all_cases(tok, texts, ranges, False),
        "pieces": all_pieces(ranges),
        "invalid": [],
        "small": [],
    }
    for hexes in invalid:
        text = bytes.fromhex(hexes).decode("utf-8", "replace")
        out["invalid"].append({"bytes": hexes, "text": text, "ids": tok.encode(text, add_special_tokens=False).ids})
    for name, small, text, pre in small_tokenizers():
        row = {"name": name, "pre": pre, "tokenizer": text, **all_cases(small, texts, ranges, True)}
        row["cases"] += [encode_case(small, t, {"text": t}) for t in FLAG_TEXTS]
        out["small"].append(row)
    json.dump(out, sys.stdout, ensure_ascii=True, separators=(",", ":"))
    print()


main()
