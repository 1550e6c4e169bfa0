"""A file for llama.cpp with the dimensions of a model and random weights, float32.

    python -m benchmarks.gguf_checkpoint FILE CONFIG

Written by a process of its own, so that the memory this takes is not counted as that of who reads
it. A model whose layers are all full attention is a `qwen3moe`, any other one a `qwen3next`.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"


def checkpoint(config):
    """The file of a model with this configuration, which is written where there is none."""
    text = json.dumps(config, sort_keys=True)
    path = BUILD / f"llama_cpp_{hashlib.sha256(text.encode()).hexdigest()[:12]}.gguf"
    if not path.exists():
        command = [sys.executable, "-m", "benchmarks.gguf_checkpoint", str(path), text]
        subprocess.run(command, cwd=BUILD.parent, check=True)
    return path


def architecture(config):
    """llama.cpp's name for the model; it knows no others of this project's."""
    full = config["full_attention_interval"] == 1
    rest = (
        config.get("attention_type", "gated_attention"),
        config.get("normalization_type", "zero_centered_rms_norm"),
        config["partial_rotary_factor"] == 1,
        config["shared_expert_intermediate_size"] > 0,
    )
    if full and rest == ("group_query_attention", "rms_norm", True, False):
        return "qwen3moe"
    same = config["linear_key_head_dim"] == config["linear_value_head_dim"]
    if not full and rest[:2] == ("gated_attention", "zero_centered_rms_norm") and rest[3] and same:
        return "qwen3next"
    raise ValueError(f"llama.cpp has no architecture for {config}")


def metadata(config):
    """Calls of `gguf.GGUFWriter`, `{method: argument}`."""
    head, heads = config["head_dim"], config["linear_num_value_heads"]
    found = {
        "add_context_length": config["max_position_embeddings"],
        "add_embedding_length": config["hidden_size"],
        "add_block_count": config["num_layers"],
        "add_feed_forward_length": config["intermediate_size"],
        "add_head_count": config["num_attention_heads"],
        "add_head_count_kv": config["num_key_value_heads"],
        "add_key_length": head,
        "add_value_length": head,
        "add_layer_norm_rms_eps": config["rms_norm_eps"],
        "add_rope_freq_base": config["rope_theta"],
        "add_rope_dimension_count": int(head * config["partial_rotary_factor"]),
        "add_expert_count": config["num_experts"],
        "add_expert_used_count": config["num_experts_per_tok"],
        "add_expert_feed_forward_length": config["moe_intermediate_size"],
        "add_vocab_size": config["vocab_size"],
        "add_tokenizer_model": "none",  # the work is given token ids
    }
    if architecture(config) == "qwen3moe":
        return found
    return found | {
        "add_expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        "add_full_attention_interval": config["full_attention_interval"],
        "add_ssm_conv_kernel": config["linear_conv_kernel_dim"],
        "add_ssm_state_size": config["linear_key_head_dim"],
        "add_ssm_group_count": config["linear_num_key_heads"],
        "add_ssm_time_step_rank": heads,
        "add_ssm_inner_size": heads * config["linear_value_head_dim"],
    }


def shapes(config):
    """Names and shapes of all tensors: rows are outputs, columns inputs."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    found = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        found["output.weight"] = (vocab, width)
    for layer in range(config["num_layers"]):
        linear = (layer + 1) % config["full_attention_interval"]
        mixer = _deltanet(config) if linear else _attention(config)
        parts = {"attn_norm.weight": (width,), **mixer, **_experts(config)}
        found |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return found


def _attention(config):
    width, head = config["hidden_size"], config["head_dim"]
    queries, pairs = (head * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    gate = 2 if architecture(config) == "qwen3next" else 1
    return {
        "attn_q.weight": (gate * queries, width),
        "attn_k.weight": (pairs, width),
        "attn_v.weight": (pairs, width),
        "attn_output.weight": (width, queries),
        "attn_q_norm.weight": (head,),
        "attn_k_norm.weight": (head,),
    }


def _deltanet(config):
    width, heads = config["hidden_size"], config["linear_num_value_heads"]
    values = heads * config["linear_value_head_dim"]
    mixed = values + 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return {
        "attn_qkv.weight": (mixed, width),
        "attn_gate.weight": (values, width),
        "ssm_conv1d.weight": (mixed, config["linear_conv_kernel_dim"]),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads,),
        "ssm_ba.weight": (2 * heads, width),
        "ssm_norm.weight": (config["linear_value_head_dim"],),
        "ssm_out.weight": (width, values),
    }


def _experts(config):
    width, experts = config["hidden_size"], config["num_experts"]
    inner, shared = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    norm = "post_attention_norm" if architecture(config) == "qwen3next" else "ffn_norm"
    found = {
        f"{norm}.weight": (width,),
        "ffn_gate_inp.weight": (experts, width),
        "ffn_gate_exps.weight": (experts, inner, width),
        "ffn_up_exps.weight": (experts, inner, width),
        "ffn_down_exps.weight": (experts, width, inner),
    }
    if not shared:
        return found
    return found | {
        "ffn_gate_inp_shexp.weight": (width,),
        "ffn_gate_shexp.weight": (shared, width),
        "ffn_up_shexp.weight": (shared, width),
        "ffn_down_shexp.weight": (width, shared),
    }


def values(name, shape, rng):
    """Norms scale by 1 and `ssm_a` is a decay, minus a positive number; the rest is normal."""
    import numpy as np

    if name.endswith("norm.weight"):
        return np.ones(shape, "float32")
    if name.endswith("ssm_a"):
        return -rng.uniform(1, 16, shape).astype("float32")
    return 0.02 * rng.standard_normal(shape, "float32")


def main():
    import gguf
    import numpy as np

    path, config = Path(sys.argv[1]), json.loads(sys.argv[2])
    path.parent.mkdir(exist_ok=True)
    # Under another name until it is whole: who is interrupted leaves nothing to be taken for one.
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, architecture(config))
    for method, value in metadata(config).items():
        getattr(writer, method)(value)
    rng = np.random.default_rng(0)
    for name, shape in shapes(config).items():
        writer.add_tensor(name, values(name, shape, rng))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


if __name__ == "__main__":
    main()
