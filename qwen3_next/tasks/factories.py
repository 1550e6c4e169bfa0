"""Functions that build models by name."""

from qwen3_next.config import MTPConfig, Qwen3NextConfig
from qwen3_next.tasks.classifier import Qwen3NextClassifier
from qwen3_next.tasks.language_model import Qwen3Next


def create_qwen3_next(variant, task_type="generation", num_labels=None, **options):
    """Builds a model for a task.

    Args:
        variant: One of `qwen3_next.variants.names()`.
        task_type: `"generation"` for a `Qwen3Next`, `"classification"` for a
            `Qwen3NextClassifier`.
        num_labels: Number of classes, for classification only.
        **options: Fields of `Qwen3NextConfig` to replace, or constructor arguments.

    Raises:
        ValueError: an unknown variant, task or field, or `num_labels` that does not fit the task.
    """
    if task_type not in ("generation", "classification"):
        raise ValueError(
            f"`task_type` must be 'generation' or 'classification'. Received: {task_type=}"
        )
    if task_type == "classification":
        if num_labels is None:
            raise ValueError("Classification needs `num_labels`. Received: num_labels=None")
        return Qwen3NextClassifier.from_variant(variant, num_labels=num_labels, **options)
    if num_labels is not None:
        raise ValueError(f"`num_labels` is for classification. Received: {num_labels=}")
    return Qwen3Next.from_variant(variant, **options)


def create_qwen3_next_with_advanced_features(
    variant,
    num_experts=None,
    experts_per_token=None,
    normalization_type=None,
    attention_type=None,
    ffn_type=None,
):
    """Keyword arguments for `Qwen3Next(**config)`: a variant with some of its choices changed.

    Arguments left at `None` keep the variant's choice.

    Raises:
        ValueError: an unknown variant or a value out of range.
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


def wrap_model_with_mtp(model, config=None, *, freeze_backbone=False, name=None):
    """A model with new modules for multi-token prediction that shares the backbone of another.

    The embedding, the layers and the language-model head are those of `model`, not copies: what
    trains one model trains the other.

    Args:
        model: `Qwen3Next` without such modules.
        config: `MTPConfig`. Defaults to `MTPConfig()`.
        freeze_backbone: Whether to freeze what is shared, in `model`, too.
        name: Name of the new model.

    Returns:
        `Qwen3Next`.

    Raises:
        ValueError: `model` is no language model, or has modules already.
    """
    if not isinstance(model, Qwen3Next):
        raise ValueError(
            "Multi-token prediction needs a language model, a `Qwen3Next`. "
            f"Received: model of type {type(model).__name__}"
        )
    if model.config.mtp is not None:
        raise ValueError(
            "`model` has modules for multi-token prediction already. "
            f"Received: model.config.mtp={model.config.mtp}"
        )
    config = MTPConfig() if config is None else config
    return Qwen3Next(
        model.config.replace(mtp=config),
        gradient_checkpointing=model.gradient_checkpointing,
        freeze_backbone=freeze_backbone,
        backbone=model,
        name=name,
        dtype=model.dtype_policy,
    )
