"""Functions that build models by name."""

from typing import Any

from qwen3_next.config import MTPConfig, Qwen3NextConfig
from qwen3_next.config.validation import one_of, require
from qwen3_next.tasks.classifier import Qwen3NextClassifier
from qwen3_next.tasks.language_model import Qwen3Next


def create_qwen3_next(
    variant: str, task_type: str = "generation", num_labels: int | None = None, **options: Any
) -> Qwen3Next | Qwen3NextClassifier:
    """Builds a model for a task.

    Args:
        variant: One of `qwen3_next.variants.names()`.
        task_type: `"generation"` for a `Qwen3Next`, `"classification"` for a
            `Qwen3NextClassifier`.
        num_labels: Number of classes, for classification only.
        **options: Fields of `Qwen3NextConfig` to replace, or constructor arguments.

    Raises:
        ValueError: an unknown variant, task or field, or `num_labels` that does not fit the task.

    Example:

    ```python
    from qwen3_next import create_qwen3_next

    small = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1}
    model = create_qwen3_next("tiny", task_type="classification", num_labels=2, **small)
    assert model.num_labels == 2
    ```
    """
    require(one_of(("generation", "classification")), "task_type", task_type)
    if task_type == "classification":
        if num_labels is None:
            raise ValueError("Classification needs `num_labels`. Received: num_labels=None")
        return Qwen3NextClassifier.from_variant(variant, num_labels=num_labels, **options)
    if num_labels is not None:
        raise ValueError(f"`num_labels` is for classification. Received: {num_labels=}")
    return Qwen3Next.from_variant(variant, **options)


def create_qwen3_next_with_advanced_features(
    variant: str,
    num_experts: int | None = None,
    experts_per_token: int | None = None,
    normalization_type: str | None = None,
    attention_type: str | None = None,
    ffn_type: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `Qwen3Next(**config)`: a variant with some of its choices changed.

    Arguments left at `None` keep the variant's choice.

    Raises:
        ValueError: an unknown variant or a value out of range.

    Example:

    ```python
    from qwen3_next import Qwen3NextConfig, create_qwen3_next_with_advanced_features

    fields = create_qwen3_next_with_advanced_features("tiny", num_experts=8, experts_per_token=2)
    assert Qwen3NextConfig(**fields).num_experts_per_tok == 2
    ```
    """
    changes = {
        "num_experts": num_experts,
        "num_experts_per_tok": experts_per_token,
        "normalization_type": normalization_type,
        "attention_type": attention_type,
        "ffn_type": ffn_type,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    return Qwen3NextConfig.from_variant(variant, **changes).to_dict()


def wrap_model_with_mtp(
    model: Qwen3Next,
    config: MTPConfig | None = None,
    *,
    freeze_backbone: bool = False,
    name: str | None = None,
) -> Qwen3Next:
    """A model with new MTP modules that shares the backbone and the head of another.

    The embedding, the layers and the language-model head are those of `model`, not copies: what
    trains one model trains the other.

    Args:
        model: `Qwen3Next` without MTP modules.
        config: `MTPConfig`. Defaults to `MTPConfig()`.
        freeze_backbone: Whether to freeze what is shared, in `model`, too.
        name: Name of the new model.

    Returns:
        `Qwen3Next`.

    Raises:
        ValueError: `model` is no language model, or has MTP modules already.

    Example:

    ```python
    from qwen3_next import MTPConfig, Qwen3Next, wrap_model_with_mtp

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=1)
    wrapped = wrap_model_with_mtp(model, MTPConfig(num_predict_tokens=3), freeze_backbone=True)
    assert wrapped.backbone is model.backbone
    ```
    """
    if not isinstance(model, Qwen3Next):
        raise ValueError(
            "Multi-token prediction needs a language model, a `Qwen3Next`. "
            f"Received: model of type {type(model).__name__}"
        )
    if model.config.mtp is not None:
        raise ValueError(
            f"`model` has MTP modules already. Received: model.config.mtp={model.config.mtp}"
        )
    config = MTPConfig() if config is None else config
    return Qwen3Next(
        model.config.replace(mtp=config),
        gradient_checkpointing=model.gradient_checkpointing,
        freeze_backbone=freeze_backbone,
        backbone=model.backbone,
        lm_head=model.lm_head,
        name=name,
        dtype=model.dtype_policy,
    )
