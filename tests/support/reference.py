"""Models of the transformers library with weights that show, and what they compute, as arrays."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

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
    """Cases of the given lengths, one per padding side if `padded`, and the gradients of `train`.

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


def causal_bias(length):
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
