"""Single layers of the transformers library and what they compute, as arrays."""

import numpy as np
import torch
from transformers import DynamicCache, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from tests.support.reference import (
    LINEAR_THEN_FULL,
    NEXT,
    build,
    causal_bias,
    check_routing_margin,
    half_values,
    published,
)


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
