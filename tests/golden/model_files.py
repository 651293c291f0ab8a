"""Golden values for the model-file tests, made by torch, transformers, safetensors and gguf.

    python model_files.py MODEL.gguf      (MODEL.gguf: SmolLM2-135M-Instruct.Q4_1.gguf)

writes beside itself model_files.json (dequantized blocks, inverse frequencies, rows of the real model in Hugging Face's
order, fingerprint) and model_files/: one tiny random Llama model in bfloat16 as a sharded folder, saved by transformers,
and the same model as GGUF, written by the gguf package. No download. (transformers wants accelerate to read GGUF.)
"""

import hashlib
import importlib.metadata
import json
import math
import pathlib
import shutil
import sys

import gguf
import numpy as np
import safetensors
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = pathlib.Path(__file__).resolve().parent
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)


def bits(array):
    """float32 values as unsigned integers, so that nothing is lost in the text."""
    return np.ascontiguousarray(array, dtype=np.float32).view(np.uint32).ravel().tolist()


def blocks():
    rng = np.random.default_rng(5)
    out = {}
    for name, n_scales in (("Q8_0", 1), ("Q4_0", 1), ("Q4_1", 2)):
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (6, size), dtype=np.uint8)
        scales = rng.standard_normal((6, n_scales)).astype(np.float16)
        scales[0, 0] = np.float16(6e-8)  # the smallest subnormal
        scales[1, 0] = np.float16(-0.0)
        raw[:, : 2 * n_scales] = scales.view(np.uint8).reshape(6, -1)
        values = gguf.dequantize(raw, kind).astype(np.float32)
        assert values.shape == (6, block)
        out[name] = {"bytes": raw.tobytes().hex(), "bits": bits(values)}
    for name, place, n_scales in (("Q5_0", 0, 1), ("Q5_1", 0, 2), ("Q4_K", 0, 2), ("Q5_K", 0, 2), ("Q6_K", 208, 1)):
        kind = gguf.GGMLQuantizationType[name]
        raw = rng.integers(0, 256, (6, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        raw[3], raw[4] = 255, 0  # every field at its ends
        scales = rng.standard_normal((6, n_scales)).astype(np.float16)
        scales[:3, 0] = 6e-8, -0.0, 65504  # the smallest subnormal and the largest number
        raw[:, place : place + 2 * n_scales] = scales.view(np.uint8).reshape(6, -1)
        out[name] = {"bytes": raw.tobytes().hex(), "bits": bits(gguf.dequantize(raw, kind))}
    return out


def type_sizes():
    return [[int(kind), kind.name, *size] for kind, size in gguf.GGML_QUANT_SIZES.items()]


def frequencies():
    out = []
    base = dict(vocab_size=256, hidden_size=512, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                max_position_embeddings=131072)
    for head_dim in (64, 128):
        for theta in (10000.0, 100000.0, 500000.0, 1e6):
            for scaling in (dict(rope_type="default"), dict(rope_type="linear", factor=4.0), LLAMA3,
                            LLAMA3 | dict(factor=32.0)):
                fields = base | dict(head_dim=head_dim, rope_parameters=scaling | dict(rope_theta=theta))
                config = LlamaConfig(**fields)
                inv_freq = LlamaRotaryEmbedding(config).inv_freq
                text = json.loads(config.to_json_string(use_diff=False))
                new = {k: text[k] for k in fields}
                new["model_type"] = "llama"
                old = {k: v for k, v in new.items() if k != "rope_parameters"}
                old["rope_theta"] = theta
                old["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
                out.append({"new": new, "old": old, "bits": bits(inv_freq.numpy())})
    return out


def norms_hash(state, n_layers):
    sha = hashlib.sha256()
    for layer in range(n_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sha.update(state[f"model.layers.{layer}.{norm}.weight"].float().numpy().tobytes())
    sha.update(state["model.norm.weight"].float().numpy().tobytes())
    return sha.hexdigest()


def real_model(path):
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    rows = []
    for name, indices in (
        ("model.layers.0.self_attn.q_proj.weight", (0, 1, 31, 32, 63, 64, 575)),
        ("model.layers.17.self_attn.k_proj.weight", (2, 33, 62, 100, 191)),
        ("model.layers.3.self_attn.v_proj.weight", (5,)),
        ("model.layers.29.self_attn.o_proj.weight", (7,)),
        ("model.layers.11.mlp.gate_proj.weight", (1535,)),
        ("model.layers.11.mlp.up_proj.weight", (3,)),
        ("model.layers.12.mlp.down_proj.weight", (575,)),
        ("model.embed_tokens.weight", (0, 49151)),
        ("model.layers.5.input_layernorm.weight", (0,)),
        ("model.layers.5.post_attention_layernorm.weight", (0,)),
        ("model.norm.weight", (0,)),
    ):
        for row in indices:
            values = state[name] if state[name].dim() == 1 else state[name][row]
            rows.append({"name": name, "row": row, "bits": bits(values.numpy())})
    config = model.config
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": rows,
        "fingerprint": norms_hash(state, config.num_hidden_layers),
        "inv_freq": bits(LlamaRotaryEmbedding(config).inv_freq.numpy()),
    }


def permute(weight, n_heads):
    """GGUF's order of a llama file's Q and K rows: the inverse of what transformers does when it reads one."""
    rows = weight.shape[0]
    return weight.reshape(n_heads, 2, rows // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def divisors(config):
    """rope_freqs.weight of a Llama 3 model: 1 where a frequency is kept, the factor where it is divided by it."""
    rope = config.rope_parameters
    plain = rope["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    smooth = np.clip(smooth, 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in plain:
        return plain[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(path, config, state):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tensor("rope_freqs.weight", divisors(config))
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if "q_proj" in name:
            values = permute(values, config.num_attention_heads)
        if "k_proj" in name:
            values = permute(values, config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_model(folder):
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=131072,
                         rope_parameters=LLAMA3 | dict(rope_theta=500000.0), bos_token_id=1, eos_token_id=[2, 5],
                         tie_word_embeddings=False)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(folder, max_shard_size="50KB")
    state = model.state_dict()
    write_gguf(folder / "tiny.gguf", config, state)
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), again[name]), name
    return {
        "fingerprint": norms_hash(state, config.num_hidden_layers),
        "inv_freq": bits(LlamaRotaryEmbedding(config).inv_freq.numpy()),
        "tensors": {name: {"shape": list(tensor.shape), "bits": bits(tensor.float().numpy()[:1] if tensor.dim() > 1
                    else tensor.float().numpy()),
                    "sha256": hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()}
                    for name, tensor in state.items()},
    }


def main():
    golden = {
        "made_with": {"python": sys.version.split()[0], "torch": torch.__version__.split("+")[0],
                      "transformers": transformers.__version__, "safetensors": safetensors.__version__,
                      "gguf": importlib.metadata.version("gguf"), "numpy": np.__version__,
                      "accelerate": importlib.metadata.version("accelerate")},
        "blocks": blocks(),
        "type_sizes": type_sizes(),
        "frequencies": frequencies(),
        "tiny": tiny_model(HERE / "model_files"),
        "real": real_model(pathlib.Path(sys.argv[1])),
    }
    (HERE / "model_files.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


main()
