"""KerasHub's Qwen3.5-MoE: the same layers, every expert computed for every token."""

import importlib

import keras

from benchmarks.contenders import Work, delta_rule_inputs, moe_inputs, relative_error, token_ids
from benchmarks.contenders.keras_work import fit, forward, gradient, predict


def build(config):
    import keras_hub

    interval = config["full_attention_interval"]
    backbone = keras_hub.models.Qwen3_5MoeBackbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_layers"],
        num_query_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        hidden_dim=config["hidden_size"],
        moe_intermediate_dim=config["moe_intermediate_size"],
        shared_expert_intermediate_size=config["shared_expert_intermediate_size"],
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        layer_types=[
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(config["num_layers"])
        ],
        partial_rotary_factor=config["partial_rotary_factor"],
        rope_max_wavelength=config["rope_theta"],
        layer_norm_epsilon=config["rms_norm_eps"],
        tie_word_embeddings=config["tie_word_embeddings"],
        linear_num_key_heads=config["linear_num_key_heads"],
        linear_num_value_heads=config["linear_num_value_heads"],
        linear_key_head_dim=config["linear_key_head_dim"],
        linear_value_head_dim=config["linear_value_head_dim"],
        linear_conv_kernel_dim=config["linear_conv_kernel_dim"],
        router_aux_loss_coefficient=config["router_aux_loss_coef"],
    )
    return keras_hub.models.Qwen3_5MoeCausalLM(backbone)


def _inputs(token_ids):
    return {"token_ids": token_ids, "padding_mask": keras.ops.ones_like(token_ids)}


def prefill(config, batch, length):
    model = build(config)
    return forward(lambda x: model(_inputs(x)), model.variables, token_ids(config, batch, length))


def train(config, batch, length):
    model = _compiled(config)
    ids = token_ids(config, batch, length + 1)
    inputs, labels = _inputs(ids[:, :-1]), ids[:, 1:]
    return Work(lambda: model.train_on_batch(inputs, labels))


def first_predict(config, batch, length):
    model = build(config)
    return predict(model, _inputs(token_ids(config, batch, length)))


def first_fit(config, batch, length):
    ids = token_ids(config, batch, length + 1)
    return fit(_compiled(config), _inputs(ids[:, :-1]), ids[:, 1:])


def _compiled(config):
    model = build(config)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Without this the task's own defaults would add a metric that ours does not compute.
    model.compile(keras.optimizers.AdamW(1e-4), loss=loss, weighted_metrics=[])
    return model


def decode(config, batch, length, new):
    model = build(config)
    model.compile(sampler="greedy")
    ids = token_ids(config, batch, length + new)
    mask = (keras.ops.arange(length + new) < length) & keras.ops.ones((batch, 1), "bool")
    inputs = {"token_ids": ids, "padding_mask": keras.ops.cast(mask, "int32")}
    return Work(lambda: model.generate(inputs, stop_token_ids=None), units=batch * new)


first_generate = decode


def _rule(*inputs):
    module = "keras_hub.src.models.qwen3_5.qwen3_5_gated_delta_net"
    return importlib.import_module(module)._chunk_gated_delta_rule(*inputs)[0]


def delta_rule(length, heads, dim):
    inputs = delta_rule_inputs(length, heads, dim)
    work = forward(_rule, [], *inputs)

    def error():
        from tests.support import oracles

        return relative_error(work.run(), oracles.gated_delta_rule(*inputs)[0])

    return work._replace(error=error)


def delta_rule_grad(length, heads, dim):
    return gradient(_rule, [], *delta_rule_inputs(length, heads, dim))


def _block(tokens, width, experts, chosen, inner):
    """Their experts under their router; the shared expert, always there, is made one wide."""
    module = importlib.import_module("keras_hub.src.models.qwen3_5_moe.qwen3_5_moe_decoder")
    rows = moe_inputs(tokens, width, experts, chosen, inner)[0][None]
    layer = module.Qwen3_5MoeSparseMoeBlock(width, inner, 1, experts, chosen)
    layer.build(rows.shape)

    def first(x):
        output = layer(x)
        return output[0] if isinstance(output, tuple) else output

    return first, layer.variables, rows


def moe(**size):
    return forward(*_block(**size))


def moe_grad(**size):
    return gradient(*_block(**size))
