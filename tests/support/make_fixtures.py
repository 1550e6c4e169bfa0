"""Makes the golden fixtures of the test suite from transformers, in float32 on the CPU.

    python -m tests.support.make_fixtures [--out DIR]  # torch==2.13.*, transformers==5.23.*

The suite reads the files this writes and needs neither package. Weights and layer inputs hold only
float16 values and are stored as float16; what was computed from them is stored as float32.

A model file, `next_*.npz` and `qwen3_*.npz`:
    config                       config.json, one string
    weights/<name>               the tensors `save_pretrained` writes, one per expert and projection
    case/<case>/input_ids        (B, T)
    case/<case>/attention_mask   (B, T), where there is padding
    case/<case>/positions        (P,) the columns whose logits are kept
    case/<case>/logits           (B, P, vocab); means nothing at a padded position
    case/<case>/labels           (B, T) unshifted, -100 ignored; then also:
    case/<case>/loss             () next-token loss, plus router_aux_loss_coef * aux_loss
    case/<case>/aux_loss         () load balancing loss, if there are experts
    grad/<name>                  d loss / d weight in the one case with labels

`next_mtp.npz` is such a file with `mtp.*` weights as well and one case,
    case/mtp/input_ids           (1, T)
    case/mtp/logits_k1, _k2      (1, T - k, vocab) what step k of multi-token prediction says

`layers.npz` holds single layers, all with batch first:
    <layer>/config               config.json of the model the layer is part of
    <layer>/weights/<name>       what follows the layer in the names of that model
    <layer>/in/<argument>, <layer>/out/<result>
in which a `gated_delta_net_*` also gives its cache, conv_state (B, channels, W) with channels q|k|v
and the last W inputs, recurrent_state (B, H, K, V), and `delta_rule` is the bare recurrence,
out/chunk and out/recurrent, each with its final ..._state: no config or weights, and keys and
queries that are already of about unit length.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next
from transformers.utils import logging

from tests.support.paths import FIXTURES
from tests.support.reference import (
    EXPERTS,
    LINEAR_THEN_FULL,
    NEXT,
    SHARED,
    build,
    causal_bias,
    model_fixture,
    published,
    set_weights,
)
from tests.support.reference_layers import layers


def next_4layer():
    """The published shape in small: 3 linear layers, a full one, two value heads per key head."""
    config = Qwen3NextConfig(**NEXT)
    lengths = [1, 63, 64, 65, 130]
    return model_fixture(Qwen3NextForCausalLM, config, 161, lengths, padded=[70, 65, 20])


def next_8layer():
    """What the published model does not use: dense layers, tied embeddings, top-k as it is."""
    config = Qwen3NextConfig(**NEXT | dict(
        hidden_size=24, num_hidden_layers=8, num_key_value_heads=1, linear_num_key_heads=1,
        linear_key_head_dim=12, linear_value_head_dim=8, linear_conv_kernel_dim=2, num_experts=6,
        norm_topk_prob=False, mlp_only_layers=[1], decoder_sparse_step=2, tie_word_embeddings=True,
        rms_norm_eps=1e-3, rope_parameters=NEXT["rope_parameters"] | {"rope_theta": 1e5},
    ))  # fmt: skip
    return model_fixture(Qwen3NextForCausalLM, config, 12, [1, 65, 130])


def next_ratio1():
    """As many value heads as key heads, and one expert per token, weighted by its probability."""
    config = Qwen3NextConfig(**NEXT | LINEAR_THEN_FULL | dict(
        linear_num_key_heads=3, linear_num_value_heads=3, num_experts=4, num_experts_per_tok=1,
        norm_topk_prob=False,
    ))  # fmt: skip
    return model_fixture(Qwen3NextForCausalLM, config, 3, [64, 130])


def next_grads():
    """Gradients of every parameter, through more than one chunk and a padded row."""
    rope = NEXT["rope_parameters"] | {"partial_rotary_factor": 0.5}
    config = Qwen3NextConfig(**NEXT | dict(
        vocab_size=61, hidden_size=24, head_dim=8, num_experts=4, moe_intermediate_size=6,
        shared_expert_intermediate_size=8, linear_key_head_dim=6, linear_value_head_dim=4,
        rope_parameters=rope, output_router_logits=True, router_aux_loss_coef=0.01,
    ))  # fmt: skip
    return model_fixture(Qwen3NextForCausalLM, config, 4, [], train=[70, 66])


def qwen3_dense():
    config = Qwen3Config(**SHARED | dict(
        num_hidden_layers=3, hidden_size=24, tie_word_embeddings=True, rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    ))  # fmt: skip
    return model_fixture(Qwen3ForCausalLM, config, 5, [1, 40], train=[20, 13])


def qwen3_moe():
    config = Qwen3MoeConfig(**SHARED | EXPERTS | dict(
        num_hidden_layers=3, hidden_size=24, num_experts=4, moe_intermediate_size=6,
        mlp_only_layers=[1], output_router_logits=True, router_aux_loss_coef=0.01,
    ))  # fmt: skip
    return model_fixture(Qwen3MoeForCausalLM, config, 6, [1, 40], train=[20, 13])


def next_mtp():
    """Two steps of multi-token prediction over a decoder layer that the library itself has."""
    rng = np.random.default_rng(8)
    config = Qwen3NextConfig(**NEXT | LINEAR_THEN_FULL)
    model = build(Qwen3NextForCausalLM, config, rng)
    width, norm = config.hidden_size, qwen3_next.Qwen3NextRMSNorm
    head = torch.nn.ModuleDict({
        "fc": torch.nn.Linear(2 * width, width, bias=False),
        "pre_fc_norm_embedding": norm(width),
        "pre_fc_norm_hidden": norm(width),
        "norm": norm(width),
        "layers": torch.nn.ModuleList([qwen3_next.Qwen3NextDecoderLayer(config, 1)]),
    }).eval()  # fmt: skip
    head.config = config
    set_weights(head, rng)
    text, weights = published(model)
    for name, tensor in head.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")) or "shared" in name:
            weights[f"mtp.{name}"] = tensor.numpy()
            continue
        base, kind = name.rsplit(".", 1)
        for e, expert in enumerate(tensor):
            parts = expert.chunk(2) if kind == "gate_up_proj" else [expert]
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            for part, tensor in zip(names, parts):
                weights[f"mtp.{base}.{e}.{part}.weight"] = tensor.numpy()

    length = 30
    input_ids = torch.from_numpy(rng.integers(0, config.vocab_size, (1, length)))
    hidden = model.model(input_ids, use_cache=False).last_hidden_state
    arrays = {"config": np.array(text), "case/mtp/input_ids": input_ids}
    arrays |= {f"weights/{name}": array.astype(np.float16) for name, array in weights.items()}
    for step in (1, 2):
        rest = length - step
        embedded = model.model.embed_tokens(input_ids[:, step:])
        x = [head["pre_fc_norm_embedding"](embedded), head["pre_fc_norm_hidden"](hidden[:, :rest])]
        x = head["fc"](torch.cat(x, dim=-1))
        rotary = model.model.rotary_emb(x, torch.arange(rest)[None])
        hidden = head["norm"](head["layers"][0](x, rotary, attention_mask=causal_bias(rest)))
        arrays[f"case/mtp/logits_k{step}"] = model.lm_head(hidden)
    return arrays


def to_numpy(key, value):
    """The array as it is stored: inputs as float16, which loses nothing, and indices as int32."""
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"A fixture should be finite. Received: {key}")
    if value.dtype == np.int64:
        return value.astype(np.int32)
    return value.astype(np.float16) if "/in/" in key and value.dtype == np.float32 else value


def main():
    parser = argparse.ArgumentParser(description="Makes the golden fixtures of the test suite.")
    parser.add_argument("--out", type=Path, default=FIXTURES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fixtures = (
        next_4layer, next_8layer, next_ratio1, next_grads, next_mtp, qwen3_dense, qwen3_moe, layers,
    )  # fmt: skip
    for fixture in fixtures:
        arrays = {key: to_numpy(key, value) for key, value in fixture().items()}
        path = out / f"{fixture.__name__}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
