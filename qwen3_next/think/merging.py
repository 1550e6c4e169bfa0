"""One LoRA expert built into the weights of a model."""

from typing import Any

import numpy as np
from keras import ops

from qwen3_next.checkpoints.interchange import require_no_other_weights
from qwen3_next.config.lora_expert_config import BLOCK_OUTPUT, LoRAExpertConfig
from qwen3_next.config.validation import integer, require
from qwen3_next.models.trainable_layers import FIELD, set_trainable_like
from qwen3_next.models.values import require_values
from qwen3_next.tasks.task import Task


def merge_lora_expert(model: Task, expert: int) -> Any:
    """A copy of a model with one of its LoRA experts in the weights, and none beside them.

        W' = W + (alpha / rank) A_n B_n

    for every projection that the expert changes. It gives the logits that the model gives with
    `branch=expert`. The model itself stays as it is, and what is frozen in it is so in the copy.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier` with LoRA experts.
        expert: Number n of the expert.

    Returns:
        A model of the same class.

    Raises:
        ValueError: a model without LoRA experts, or with LoRA of Keras beside them; a number out of
            range, or experts of the output of layers, which has no weight to merge them into.

    Example:

    ```python
    from qwen3_next import ETDConfig, Qwen3Next, merge_lora_expert

    model = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=3, num_experts=0,
        etd=ETDConfig(1, 1, 1, max_think_iterations=2, use_lora_experts=True),
    )
    merged = merge_lora_expert(model, expert=2)
    assert not merged.config.etd.use_lora_experts
    ```
    """
    etd = model.config.etd if isinstance(model, Task) else None
    if etd is None or not etd.use_lora_experts:
        raise ValueError(
            "`model` must be a Qwen3Next or a Qwen3NextClassifier with LoRA experts, "
            f"`ETDConfig(use_lora_experts=True)`. Received: model={model!r}"
        )
    require_values(model.weights)
    require_no_other_weights("model", model)
    require(integer(0, etd.num_lora_experts - 1), "expert", expert)
    if BLOCK_OUTPUT in (etd.lora_expert.target_modules or ()):
        raise ValueError(
            f"Experts of {BLOCK_OUTPUT!r} change what a layer returns, which has no weight. "
            f"Received: target_modules={etd.lora_expert.target_modules}"
        )
    without = {
        "use_lora_experts": False,
        "num_lora_experts": type(etd).num_lora_experts,
        "lora_expert": LoRAExpertConfig(),
        "expert_warmup_steps": type(etd).expert_warmup_steps,
    }
    config = model.config.replace(etd=etd.replace(**without))
    fields = {**model.get_config(), **config.to_dict()}
    del fields[FIELD]  # it names experts as well
    if fields.get("freeze_backbone"):
        fields["freeze_backbone"] = config.learns_beside_backbone
    merged = type(model).from_config(fields)
    set_trainable_like(merged, model)
    values = {variable.path: variable for variable in model.weights}
    for variable in merged.weights:
        variable.assign(ops.copy(values[variable.path].value))
    loop = model.backbone.think_loop
    for layer, experts in zip(merged.backbone.think_loop.layers, loop.experts):
        projections = layer.mixer.projections()
        for name, one in experts.items():
            kernel = projections[name].kernel
            delta = ops.cast(one.merged(expert), kernel.dtype)
            kernel.assign(kernel + ops.reshape(delta, np.shape(kernel)))
    return merged
