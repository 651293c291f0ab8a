"""Tiny random Llama, Qwen2 and Qwen3 models and what transformers says of them: tiny_models.py

writes beside itself tiny/NAME/ (config.json, tokenizer.json and safetensors, as transformers' save_pretrained and the tokenizers
library write them; Qwen2 and Qwen3 as model.gguf too, written with the gguf package and its names, whose order of rows is Hugging
Face's for these architectures) and tiny_models.json: token ids, log-probabilities and greedy continuations of each model after it was
loaded again, in float32 (scores.py). Needs torch, transformers, safetensors, tokenizers, gguf, accelerate (transformers wants it to
read GGUF). No download.
"""

import json
import pathlib
import shutil

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

import scores

HERE = pathlib.Path(__file__).resolve().parent
STD = 0.3       # of the weights: scores of several units, so that attention chooses
CONTEXT = 1024
LENGTHS = [(1, True), (5, True), (129, False), (300, True), (700, False)]  # tokens, whether continued
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=256)
DEFAULT = dict(rope_type="default", rope_theta=10000.0)
# name: dtype, head_dim, query heads, KV heads, hidden, intermediate, layers, vocabulary, tied, rope, shard size
MODELS = {
    "mha-d64-f32-tied": (torch.float32, 64, 3, 3, 33, 44, 2, 301, True, DEFAULT, "5GB"),
    "gqa3-d64-f16-tied": (torch.float16, 64, 6, 2, 42, 90, 2, 333, True, LLAMA3, "5GB"),
    "gqa8-d64-bf16-untied-sharded": (torch.bfloat16, 64, 8, 1, 32, 52, 2, 317, False, DEFAULT, "60KB"),
    "gqa4-d128-f32-untied-sharded": (torch.float32, 128, 4, 1, 16, 57, 2, 309, False, LLAMA3, "100KB"),
    "gqa5-d128-bf16-tied": (torch.bfloat16, 128, 5, 1, 25, 71, 3, 341, True, DEFAULT, "5GB"),
    "qwen3-gqa2-d64-bf16-untied": (torch.bfloat16, 64, 4, 2, 20, 38, 2, 323, False, DEFAULT, "5GB"),
    "qwen2-gqa3-d64-bf16-tied": (torch.bfloat16, 64, 6, 2, 28, 42, 2, 313, True, DEFAULT | dict(rope_theta=1e6), "5GB"),
}
CLASSES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
GGUF_ARCHS = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def arch_of(name):
    return next((arch for arch in CLASSES if name.startswith(arch)), "llama")


def tokenizer():
    """Bytes and a few merges; the models' vocabularies are larger, as padded ones are."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("i", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|begin|>", "<|end|>"])
    return tok


def add_tokenizer(writer, config):
    """The folder's tokenizer, with unused tokens up to the rows of the embedding."""
    fields = json.loads(tokenizer().to_str())
    words = {**fields["model"]["vocab"], **{token["content"]: token["id"] for token in fields["added_tokens"]}}
    tokens = sorted(words, key=words.get)
    special, n_unused = len(fields["added_tokens"]), config.vocab_size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"<|unused {i}|>" for i in range(n_unused)])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - special) + [gguf.TokenType.CONTROL] * special
                           + [gguf.TokenType.UNUSED] * n_unused)
    writer.add_token_merges([" ".join(pair) for pair in fields["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def write_gguf(path, model, arch):
    """A Qwen2 or Qwen3 model, its matrices in their own type; read again by transformers."""
    config = model.config
    names = gguf.get_tensor_name_map(GGUF_ARCHS[arch], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else gguf.GGMLQuantizationType.BF16
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(gguf_name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = AutoModelForCausalLM.from_pretrained(path.parent, config=config, gguf_file=path.name, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), again[name]), name


def make(name, folder, seed):
    dtype, head_dim, heads, kv_heads, hidden, intermediate, layers, vocab, tied, rope, shard = MODELS[name]
    torch.manual_seed(seed)
    make_config, make_model = CLASSES.get(arch_of(name), (LlamaConfig, LlamaForCausalLM))
    config = make_config(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=CONTEXT,
                         tie_word_embeddings=tied, rope_parameters=rope, initializer_range=STD, rms_norm_eps=1e-5,
                         bos_token_id=260, eos_token_id=261)
    model = make_model(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.copy_(1 + STD * torch.randn_like(parameter))
        if parameter_name.endswith(".bias"):
            parameter.copy_(torch.randn_like(parameter))
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    if arch_of(name) in GGUF_ARCHS:
        write_gguf(folder / "model.gguf", model, arch_of(name))
    for file in folder.iterdir():
        file.chmod(0o644)


def main():
    scores.use_exact_float32()
    rows = []
    for seed, name in enumerate(MODELS):
        folder = HERE / "tiny" / name
        make(name, folder, seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(100 + seed)
        prompts = []
        for length, with_greedy in LENGTHS:
            ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
            prompts.append(scores.prompt(model, f"{length} tokens", ids, with_greedy))
        gguf_file = {"gguf": f"golden/tiny/{name}/model.gguf"} if arch_of(name) in GGUF_ARCHS else {}
        rows.append({"folder": f"golden/tiny/{name}", **gguf_file, "prompts": prompts})
        print(name, sum(f.stat().st_size for f in folder.iterdir()), [f.name for f in folder.iterdir()])
    packages = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy")
    head = {"made_by": "tests/golden/tiny_models.py", "made_with": scores.made_with(*packages)}
    (HERE / "tiny_models.json").write_text(json.dumps({**head, "models": rows}, separators=(",", ":")) + "\n")


main()
