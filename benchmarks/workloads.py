"""What is measured: the models, the rows of the table and the points of the scaling curves."""

import json
from pathlib import Path
from typing import NamedTuple

VARIANTS = Path(__file__).resolve().parents[1] / "variants"

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "intermediate_size": 1024,
    "max_position_embeddings": 32768,
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
MANY_EXPERTS = {
    **MODEL,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
NO_ATTENTION = {**MODEL, "full_attention_interval": None, "layer_types": ["linear_attention"] * 4}
# As wide, every layer attention as in Qwen3-MoE: no output gate and no shared expert.
QWEN3_MOE = {
    **MODEL,
    "full_attention_interval": 1,
    "attention_type": "group_query_attention",
    "normalization_type": "rms_norm",
    "partial_rotary_factor": 1.0,
    "shared_expert_intermediate_size": 0,
}
# The first layer encodes, two think, the last one, with the attention, decodes.
ETD = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 1}
THINKING = {**MODEL, "etd": {**ETD, "adaptive_depth": False}}
ADAPTIVE = {**MODEL, "etd": {**ETD, "adaptive_depth": True}}
WITHOUT_THINK_BLOCK = {**MODEL, "num_layers": 2, "full_attention_interval": 2}
# The variant `small`, six of its twelve layers think once: without routers, and with them.
SMALL = {
    **json.loads((VARIANTS / "small.json").read_text()),
    "etd": {
        "n_encoder_layers": 3,
        "n_think_layers": 6,
        "n_decoder_layers": 3,
        "max_think_iterations": 1,
        "adaptive_depth": False,
    },
}
# The published layers, four of them: what devices send one another follows from their shapes.
PUBLISHED = {**json.loads((VARIANTS / "80b_a3b.json").read_text()), "num_layers": 4}
# One of them, of either kind, with few words: what is measured is the layer.
ONE_LAYER = {**PUBLISHED, "num_layers": 1, "vocab_size": 1024}
ONE_DELTANET = {
    **ONE_LAYER,
    "full_attention_interval": None,
    "layer_types": ["linear_attention"],
}
ONE_ATTENTION = {**ONE_LAYER, "full_attention_interval": 1}
ONE_OF_EACH = {**ONE_LAYER, "num_layers": 2, "full_attention_interval": 2}
ROUTED = {**SMALL, "etd": {**SMALL["etd"], "use_layer_router": True}}
MODELS = {
    "model": MODEL,
    "many_experts": MANY_EXPERTS,
    "no_attention": NO_ATTENTION,
    "qwen3_moe": QWEN3_MOE,
    "thinking": THINKING,
    "adaptive": ADAPTIVE,
    "without_think_block": WITHOUT_THINK_BLOCK,
    "small": SMALL,
    "routed": ROUTED,
    "published": PUBLISHED,
    "one_deltanet": ONE_DELTANET,
    "one_attention": ONE_ATTENTION,
    "one_of_each": ONE_OF_EACH,
}

EVERYONE = ("ours-jax", "ours-tensorflow", "keras_hub-jax", "keras_hub-tensorflow", "transformers")
ON_JAX = ("ours-jax", "ours-tensorflow", "keras_hub-jax", "transformers")
WITHOUT_KERAS_HUB = ("ours-jax", "ours-tensorflow", "transformers")
OURS = ("ours-jax", "ours-tensorflow")
# Measured where it is installed, see README.md.
LLAMA = "llama_cpp"
FLA = "fla"
TRANSFORMERS_FLA = "transformers-fla"  # transformers with its kernels for the DeltaNet layers
ON_GPU = ("ours-jax", "transformers", TRANSFORMERS_FLA, FLA)
KERAS = ("ours-jax", "ours-tensorflow", "keras_hub-jax", "keras_hub-tensorflow")
# What a user waits for before the first result: measured by the first call, with compilation.
FIRST_CALLS = ("first_predict", "first_fit", "first_generate")
# Read from a program that never runs: simulated devices have no times of their own.
NOT_TIMED = ("step_on_devices",)
DEVICES = 64


class Row(NamedTuple):
    """`task` on `model` (or a single op), by some contenders; `size` says how large."""

    name: str
    task: str
    size: dict
    contenders: tuple = EVERYONE
    model: str = "model"
    quick: bool = False
    curve: str | None = None
    gpu: bool = False


def everything():
    """All rows of this module."""
    yield from rows()
    yield from qwen3_moe()
    yield from speculation()
    yield from thinking()
    yield from adaptive_thinking()
    yield from routes()
    yield from conversion()
    yield from devices()
    yield from on_gpu()
    yield from curves()


def rows():
    size = {"batch": 1, "length": 1024}
    yield Row("prefill 1 x 1024", "prefill", size, (*EVERYONE, LLAMA), quick=True)
    # KerasHub unrolls its chunks: at 4096 tokens its program takes minutes to compile.
    few = WITHOUT_KERAS_HUB
    yield Row("prefill 1 x 4096", "prefill", {"batch": 1, "length": 4096}, (*few, LLAMA))
    for lengths in ((1024,) * 4, (1024, 256, 256, 256)):
        name = f"prompts of {', '.join(map(str, lengths))} tokens"
        yield Row(name, "read_prompts", {"lengths": lengths}, few)
    yield Row("train step 1 x 1024", "train", {"batch": 1, "length": 1024})
    size = {"batch": 1, "length": 4096}
    yield Row("train step 1 x 4096", "train", size, few)
    size = {**size, "gradient_checkpointing": True}
    yield Row("train step 1 x 4096, gradient checkpointing", "train", size, few)
    size = {"batch": 1, "length": 16, "new": 128}
    yield Row("decode, batch 1", "decode", size, (*EVERYONE, LLAMA))
    yield Row("decode, batch 8", "decode", {"batch": 8, "length": 16, "new": 64}, ON_JAX)
    for dtype in ("mixed_bfloat16", "bfloat16"):
        size = {"batch": 1, "length": 16, "new": 128, "dtype": dtype}
        yield Row(f"decode, batch 1, {dtype}", "decode", size, OURS)
    for task in FIRST_CALLS:
        size = {"batch": 1, "length": 1024}
        if task == "first_generate":
            size = {"batch": 1, "length": 16, "new": 16}
        name = f"first call of `{task.removeprefix('first_')}`"
        yield Row(name, task, size, KERAS, quick=True)
        yield Row(f"{name}, programs kept", task, {**size, "kept": True}, KERAS)
    for task, what in (("prefill", "prefill"), ("train", "train step")):
        for length, who in ((1024, few), (256, ON_JAX)):
            name = f"512 experts: {what} 1 x {length}"
            size = {"batch": 1, "length": length}
            yield Row(name, task, size, who, "many_experts")
    size = {"batch": 1, "length": 16, "new": 32}
    yield Row("512 experts: decode, batch 1", "decode", size, ON_JAX, "many_experts")
    size = {"batch": 32, "length": 16, "new": 16}
    yield Row("512 experts: decode, batch 32", "decode", size, few, "many_experts")
    for length in (1024, 4096, 8192):
        size = {"length": length, "heads": 16, "dim": 128}
        who = ON_JAX if length <= 4096 else few
        quick = length == 1024
        yield Row(f"delta rule forward, T = {length}", "delta_rule", size, who, quick=quick)
        name = f"delta rule forward + backward, T = {length}"
        yield Row(name, "delta_rule_grad", size, who)
    size = {"tokens": 1024, "width": 512, "experts": 64, "chosen": 8, "inner": 256}
    yield Row("MoE block, 1024 tokens, 64 experts", "moe", size, ON_JAX, quick=True)
    yield Row("MoE block forward + backward", "moe_grad", size, ON_JAX)
    yield Row("MoE block, 1 token", "moe", {**size, "tokens": 1}, ON_JAX)
    size = {"tokens": 512, "width": 512, "vocab": 151_936}
    yield Row("loss forward + backward, vocabulary 151,936", "loss", size, few)
    # What no form of the layers can be faster than.
    for what, size in (
        ("prefill 1 x 1024", {"batch": 1, "length": 1024}),
        ("prefill 1 x 4096", {"batch": 1, "length": 4096}),
        ("train step 1 x 1024", {"batch": 1, "length": 1024, "backward": True}),
    ):
        yield Row(f"products with kernels alone: {what}", "products", size, few)


def qwen3_moe():
    """Layers of attention alone, which llama.cpp has had for longest."""
    for what, size in (
        ("prefill 1 x 1024", {"batch": 1, "length": 1024}),
        ("prefill 1 x 4096", {"batch": 1, "length": 4096}),
        ("decode, batch 1", {"batch": 1, "length": 16, "new": 128}),
    ):
        task = what.split()[0].rstrip(",")
        yield Row(f"Qwen3-MoE: {what}", task, size, (*OURS, LLAMA), "qwen3_moe")
    for sequences in (1, 8):
        packed = f", {sequences} sequences packed" if sequences > 1 else ""
        size = {"batch": 1, "length": 4096, "sequences": sequences}
        yield Row(f"Qwen3-MoE: train step 1 x 4096{packed}", "train", size, OURS, "qwen3_moe")


def speculation():
    """Trained models, plainly and with drafts: the demo's with one to four per step, and one with
    a vocabulary as large as the published one."""
    for lookahead in range(5):
        what = f"{lookahead} drafts per step" if lookahead else "plain"
        size = {"lookahead": lookahead, "new": 128}
        yield Row(f"trained demo model, {what}", "speculate", size, ("ours-jax",))
    large = {"new": 128, "vocab_size": 151_936, "steps": 120}
    for what, size in (
        ("plain", {"lookahead": 0}),
        ("3 drafts per step from all words", {"lookahead": 3, "draft_vocabulary": "all"}),
        ("3 drafts per step from the frequent words", {"lookahead": 3}),
    ):
        yield Row(f"151,936 words, {what}", "speculate_large", {**size, **large}, ("ours-jax",))


def thinking():
    """Every kind of work with k iterations of the think block, and without that block."""
    sizes = {
        "prefill 1 x 1024": ("prefill", {"batch": 1, "length": 1024}),
        "train step 1 x 1024": ("train", {"batch": 1, "length": 1024}),
        "decode, batch 1": ("decode", {"batch": 1, "length": 16, "new": 128}),
    }
    for what, (task, size) in sizes.items():
        yield Row(f"think loop: {what}, no block", task, size, OURS, "without_think_block")
        for k in (1, 2, 4):
            name, quick = f"think loop: {what}, k = {k}", (task, k) == ("prefill", 2)
            yield Row(name, task, {**size, "think_iterations": k}, OURS, "thinking", quick)


def adaptive_thinking():
    """Decoding of four prompts at adaptive depth, and at fixed ones beside it."""
    size = {"batch": 4, "length": 16, "new": 64}
    for k in (1, 4):
        fixed = {**size, "think_iterations": k}
        yield Row(f"think loop: decode, batch 4, k = {k}", "decode", fixed, OURS, "thinking")
    for prompts in ("easy", "hard", "easy and hard"):
        name, adaptive = f"think loop: decode, batch 4, {prompts}", {**size, "prompts": prompts}
        adaptive["think_iterations"] = 4
        yield Row(name, "decode", adaptive, OURS, "adaptive", quick=prompts == "easy")


def routes():
    """Reading and writing without layer routers, with them, and past half of the think layers."""
    half = [0, 1] * 3
    for what, size in (
        ("read 1 x 1024", {"batch": 1, "length": 1024}),
        ("decode, batch 1", {"batch": 1, "length": 16, "new": 64}),
    ):
        task = what.split()[0].rstrip(",")
        for kind, model, extra in (
            ("no routers", "small", {}),
            ("routers asked", "routed", {"asks": True}),
            ("half skipped", "routed", {"route": half}),
        ):
            yield Row(f"routes: {what}, {kind}", task, {**size, **extra}, OURS, model)


def conversion():
    """From a checkpoint of a Qwen3 to a hybrid, with the memory that it takes."""
    yield Row("convert a Qwen3 checkpoint of 1 GiB", "convert", {"mebibytes": 1024}, OURS)


def devices():
    """A train step of the published layers on several devices; each row has 4096 tokens."""
    for mesh, fsdp, batch in (
        ("data=8", False, 8),
        ("data=8", True, 8),
        ("expert=8", False, 8),
        ("data=2,expert=4", False, 8),
        ("data=4,expert=2", True, 8),
        ("data=2,expert=2,tensor=2", False, 8),
        ("data=8,expert=8", False, DEVICES),
        ("data=8,expert=8", True, DEVICES),
    ):
        name = f"devices: {mesh}{' with FSDP' if fsdp else ''}, {batch} x 4096"
        size = {"mesh": mesh, "fsdp": fsdp, "batch": batch, "length": 4096}
        quick = mesh == "expert=8"
        yield Row(name, "step_on_devices", size, ("ours-jax",), "published", quick)


def on_gpu():
    """The published layers in bfloat16 on one GPU, where there is one."""
    pair = ("ours-jax", "transformers")
    delta_rule = {"length": 8192, "key_heads": 16, "heads": 32, "dim": 128}
    attention = {"length": 8192, "heads": 16, "groups": 2, "dim": 256}
    moe = {"width": 2048, "experts": 512, "chosen": 10, "inner": 512, "shared": 512}
    for what, task, size, who in (
        ("delta rule 1 x 8192", "delta_rule", delta_rule, (*pair, FLA)),
        ("attention 1 x 8192", "attention", attention, pair),
        ("512 experts, 8192 tokens", "moe", {"tokens": 8192, **moe}, pair),
    ):
        yield Row(f"GPU: {what}, forward", task, size, who, gpu=True)
        size = {**size, "backward": True}
        yield Row(f"GPU: {what}, forward + backward", task, size, who, gpu=True)
    for tokens in (1, 16):
        name = f"GPU: 512 experts, {tokens} token{'s' * (tokens > 1)}, forward"
        yield Row(name, "moe", {"tokens": tokens, **moe}, pair, gpu=True)
    with_fla = (*pair, TRANSFORMERS_FLA)
    size = {"batch": 1, "length": 8192}
    for what, model, who in (
        ("DeltaNet layer", "one_deltanet", with_fla),
        ("attention layer", "one_attention", pair),
    ):
        yield Row(f"GPU: {what} 1 x 8192, forward", "prefill", size, who, model, gpu=True)
        name = f"GPU: {what} 1 x 8192, forward + backward"
        yield Row(name, "gradients", size, who, model, gpu=True)
    # transformers decodes no model without an attention layer.
    for what, model, who in (
        ("attention layer", "one_attention", pair),
        ("DeltaNet and attention layer", "one_of_each", with_fla),
    ):
        for batch in (1, 8):
            size = {"batch": batch, "length": 16, "new": 64}
            yield Row(f"GPU: {what}, decode, batch {batch}", "decode", size, who, model, gpu=True)


def curves():
    """Points of the scaling curves; `curve` names the line they belong to."""
    for length in (256, 1024, 4096, 16384):
        size = {"batch": 1, "length": length}
        who = ("ours-jax", "transformers") if length <= 4096 else ("ours-jax",)
        yield Row(f"prefill, T = {length}", "prefill", size, who, curve="time against T")
        yield Row(
            f"prefill without attention layers, T = {length}",
            "prefill",
            size,
            ("ours-jax",),
            "no_attention",
            curve="time against T, no attention layers",
        )
    for experts in (8, 32, 128, 512):
        size = {"tokens": 1024, "width": 512, "experts": experts, "chosen": 8, "inner": 128}
        who = ("ours-jax", "keras_hub-jax") if experts <= 128 else ("ours-jax",)
        yield Row(f"MoE block, E = {experts}", "moe", size, who, curve="time against E")
