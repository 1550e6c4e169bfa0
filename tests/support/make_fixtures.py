"""Makes the golden fixtures of the test suite from transformers, in float32 on the CPU.

    python tests/make_fixtures.py [--out DIR]      # needs torch==2.13.* and transformers==5.23.*

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
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import (
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next
from transformers.utils import logging

KEPT_POSITIONS = 16
# Where the k-th and (k+1)-th expert are closer than this, adding float32 numbers in another order
# may choose otherwise, and a correct model would then disagree with the fixture.
MIN_ROUTING_MARGIN = 5e-5

SHARED = dict(
    vocab_size=71, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=40, max_position_embeddings=512,
)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True)
NEXT = SHARED | EXPERTS | dict(
    shared_expert_intermediate_size=12, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=12, linear_conv_kernel_dim=4,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
)  # fmt: skip
LINEAR_THEN_FULL = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])


def half_values(rng, shape, mean=0.0, std=1.0):
    """Normal numbers that float16 holds exactly, as float32."""
    return torch.from_numpy(rng.normal(mean, std, shape).astype(np.float16).astype(np.float32))


def set_weights(model, rng):
    """Replaces every weight so that each one shows in the output; the default ones would not."""
    for name, weight in model.named_parameters():
        neutral, std = 0.0, 0.2
        if name.endswith("A_log"):
            # From a memory of a few hundred tokens to one of a single token.
            values = np.linspace(np.log(0.01), np.log(2.0), weight.numel())
            weight.data = torch.from_numpy(rng.permutation(values).astype(np.float16)).float()
            continue
        if "norm" in name and weight.ndim == 1:
            gated = "linear_attn.norm" in name
            neutral = 0.0 if model.config.model_type == "qwen3_next" and not gated else 1.0
        elif name.endswith("dt_bias") or "conv1d" in name or "embed_tokens" in name:
            std = 0.5
        elif name.endswith("mlp.gate.weight"):
            std = 0.4
        weight.data = half_values(rng, weight.shape, neutral, std)


def build(model_class, config, rng):
    model = model_class._from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    set_weights(model, rng)
    return model


def published(model):
    """The config.json and the tensors that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(file)
    return json.dumps(config, sort_keys=True), dict(sorted(tensors.items()))


def published_gradients(model):
    """The gradients under the names of the published weights, which they take the place of."""
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    if missing:
        raise ValueError(f"Every parameter should have a gradient. Received none for: {missing}")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.grad)
    return published(model)[1]


def check_routing_margin(name, router_logits, top_k, mask):
    real = slice(None) if mask is None else mask.reshape(-1).bool()
    for logits in router_logits:
        best = logits[real].softmax(-1).sort(descending=True).values
        margin = (best[:, top_k - 1] - best[:, top_k]).min().item()
        if margin < MIN_ROUTING_MARGIN:
            raise ValueError(
                f"{name}: two experts should be {MIN_ROUTING_MARGIN:.0e} or more apart, change the "
                f"seed. Received margin={margin:.1e}"
            )


def run_case(model, name, input_ids, mask=None, labels=None):
    """One forward pass, and a backward pass if there are labels, as {key: array}."""
    routed = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    output = model(
        input_ids=input_ids, attention_mask=mask, labels=labels, use_cache=False, **routed
    )
    if routed:
        check_routing_margin(name, output.router_logits, model.config.num_experts_per_tok, mask)
    length = input_ids.shape[1]
    positions = np.unique(np.linspace(0, length - 1, KEPT_POSITIONS).round().astype(np.int32))
    case = {"input_ids": input_ids, "positions": positions, "logits": output.logits[:, positions]}
    if mask is not None:
        case["attention_mask"] = mask
    if labels is not None:
        output.loss.backward()
        case |= {"labels": labels, "loss": output.loss}
        if routed:
            case["aux_loss"] = output.aux_loss
    return {f"case/{name}/{key}": value for key, value in case.items()}


def padding_mask(side, real_lengths):
    length = max(real_lengths)
    left = torch.stack([(torch.arange(length) >= length - real).int() for real in real_lengths])
    return left if side == "left" else left.flip(1)


def model_fixture(model_class, config, seed, lengths, padded=None, train=None):
    """Cases of the given lengths, one a padding side if `padded`, and the gradients of `train`.

    `padded` and `train` are the numbers of real tokens of each row; `train` is padded on the right.
    """
    rng = np.random.default_rng(seed)
    model = build(model_class, config, rng)
    text, weights = published(model)
    arrays = {"config": np.array(text)}
    arrays |= {f"weights/{name}": tensor.astype(np.float16) for name, tensor in weights.items()}

    def tokens(batch, length):
        return torch.from_numpy(rng.integers(0, config.vocab_size, (batch, length)))

    for length in lengths:
        batch = 2 if length < 64 else 1
        arrays |= run_case(model, f"length_{length}", tokens(batch, length))
    for side in ("left", "right") if padded else ():
        mask = padding_mask(side, padded)
        arrays |= run_case(model, f"{side}_padded", tokens(*mask.shape), mask)
    if train:
        mask = padding_mask("right", train)
        input_ids = tokens(*mask.shape)
        ignored = (mask == 0) | torch.from_numpy(rng.random(mask.shape) < 0.2)
        labels = input_ids.masked_fill(ignored, -100)
        arrays |= run_case(model, "train", input_ids, mask, labels)
        arrays |= {f"grad/{name}": tensor for name, tensor in published_gradients(model).items()}
    return arrays


def next_4layer():
    """The published shape in small: three linear layers, a full one, two value heads a key head."""
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
    """As many value heads as key heads, and one expert a token, weighted by its probability."""
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


def causal_bias(length):
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]


def layer_fixture(model, prefix, inputs, outputs):
    """The arrays of one layer; `prefix` is its place in the model, None if it has no weights."""
    config, weights = published(model)
    arrays = {"config": np.array(config)}
    for name, tensor in weights.items():
        if prefix is not None and name.startswith(prefix + "."):
            arrays[f"weights/{name.removeprefix(prefix + '.')}"] = tensor.astype(np.float16)
    arrays |= {f"in/{name}": value for name, value in inputs.items()}
    return arrays | {f"out/{name}": value for name, value in outputs.items()}


def gated_delta_net(model, x):
    cache = DynamicCache(config=model.config)
    outputs = {"hidden_states": model.model.layers[0].linear_attn(x, cache_params=cache)}
    outputs["conv_state"] = cache.get_conv_state(0, state_idx=0)
    outputs["recurrent_state"] = cache.get_recurrent_state(0, state_idx=0)
    return layer_fixture(model, "model.layers.0.linear_attn", {"hidden_states": x}, outputs)


def small_layers(model, rng):
    """Norms, feed-forward blocks, rotary embedding and attention."""
    config, first, full = model.config, model.model.layers[0], model.model.layers[1]
    x = half_values(rng, (2, 6, config.hidden_size))
    heads = half_values(rng, (2, 6, config.linear_num_value_heads, config.linear_value_head_dim))
    gate = half_values(rng, heads.shape)

    def of_hidden_states(layer, prefix):
        return layer_fixture(model, prefix, {"hidden_states": x}, {"hidden_states": layer(x)})

    yield "rms_norm", of_hidden_states(first.input_layernorm, "model.layers.0.input_layernorm")
    yield "mlp", of_hidden_states(first.mlp.shared_expert, "model.layers.0.mlp.shared_expert")

    gated = first.linear_attn.norm(heads, gate)
    inputs = {"hidden_states": heads, "gate": gate}
    prefix = "model.layers.0.linear_attn.norm"
    yield "gated_rms_norm", layer_fixture(model, prefix, inputs, {"hidden_states": gated})

    router_logits, _, chosen = first.mlp.gate(x)
    check_routing_margin("sparse_moe", [router_logits], config.num_experts_per_tok, None)
    outputs = {"hidden_states": first.mlp(x), "router_logits": router_logits, "chosen": chosen}
    yield "sparse_moe", layer_fixture(model, "model.layers.0.mlp", {"hidden_states": x}, outputs)

    # Positions that are neither 0 .. T-1 nor the same in both rows.
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 100, 3, 3, 250, 511]])
    q = half_values(rng, (2, 6, config.num_attention_heads, config.head_dim))
    k = half_values(rng, (2, 6, config.num_key_value_heads, config.head_dim))
    cos, sin = model.model.rotary_emb(x, position_ids)
    turned = qwen3_next.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    inputs = {"query": q, "key": k, "position_ids": position_ids}
    outputs = {"query": turned[0], "key": turned[1], "cos": cos, "sin": sin}
    yield "rotary", layer_fixture(model, None, inputs, outputs)

    x = half_values(rng, (2, 20, config.hidden_size))
    position_ids = torch.stack([torch.arange(20), torch.arange(20) + 9])
    output, _ = full.self_attn(x, model.model.rotary_emb(x, position_ids), causal_bias(20))
    inputs = {"hidden_states": x, "position_ids": position_ids}
    prefix = "model.layers.1.self_attn"
    yield "attention", layer_fixture(model, prefix, inputs, {"hidden_states": output})


def decoder_layer(model, index, x):
    position_ids = torch.arange(x.shape[1])[None]
    layer = model.model.layers[index]
    mask = causal_bias(x.shape[1]) if layer.block_type == "full_attention" else None
    output = layer(x, model.model.rotary_emb(x, position_ids), attention_mask=mask)
    inputs = {"hidden_states": x, "position_ids": position_ids}
    return layer_fixture(model, f"model.layers.{index}", inputs, {"hidden_states": output})


def delta_rule(rng, batch=1, length=130, groups=2, heads=4, key_dim=6, value_dim=4):
    inputs = {
        "query": qwen3_next.l2norm(half_values(rng, (batch, length, groups, key_dim))),
        # A common part correlates the keys: unrelated ones would forgive a wrong inverse.
        "key": qwen3_next.l2norm(half_values(rng, (batch, length, groups, key_dim), mean=1.0)),
        "value": half_values(rng, (batch, length, heads, value_dim)),
        "g": -half_values(rng, (batch, length, heads), std=0.2).abs(),
        "beta": half_values(rng, (batch, length, heads)).sigmoid(),
        "initial_state": half_values(rng, (batch, heads, key_dim, value_dim)),
    }
    # One head forgets within a token: in a chunk its decay goes far below what exp can hold.
    inputs["g"][..., -1] *= 100
    inputs = {name: value.half().float() for name, value in inputs.items()}
    arrays = {f"in/{name}": value for name, value in inputs.items()}
    for form in ("chunk", "recurrent"):
        rule = getattr(qwen3_next, f"torch_{form}_gated_delta_rule")
        output, state = rule(**inputs, output_final_state=True)
        arrays |= {f"out/{form}": output, f"out/{form}_state": state}
    return arrays


def layers():
    rng = np.random.default_rng(7)
    fixtures = {}
    for key_heads, value_heads in ((3, 3), (2, 4), (1, 4)):
        config = Qwen3NextConfig(**NEXT | LINEAR_THEN_FULL | dict(
            hidden_size=24, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads
        ))  # fmt: skip
        model = build(Qwen3NextForCausalLM, config, rng)
        ratio = value_heads // key_heads
        x = half_values(rng, (1, 70, config.hidden_size))
        fixtures[f"gated_delta_net_ratio{ratio}"] = gated_delta_net(model, x)
        if ratio == 2:
            fixtures |= dict(small_layers(model, rng))
            fixtures["decoder_layer_linear"] = decoder_layer(model, 0, x)
            fixtures["decoder_layer_full"] = decoder_layer(model, 1, x[:, :20])
            fixtures["delta_rule"] = delta_rule(rng)
    return {
        f"{layer}/{key}": value
        for layer, arrays in fixtures.items()
        for key, value in arrays.items()
    }


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
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "fixtures")
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
