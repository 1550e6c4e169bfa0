"""Functions that build models by name."""

import math
from typing import Any

from qwen3_next import variants
from qwen3_next.checkpoints.presets import preset_config
from qwen3_next.config import ETDConfig, MTPConfig, Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, one_of, require, shown
from qwen3_next.models.backbone import Qwen3NextBackbone
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.tasks.classifier import Qwen3NextClassifier
from qwen3_next.tasks.language_model import Qwen3Next

PUBLISHED = "hf://Qwen/Qwen3-Next-80B-A3B-Instruct"


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
    _refuse_options_of_other_task(task_type, options)
    if task_type == "classification":
        if num_labels is None:
            raise ValueError("Classification needs `num_labels`. Received: num_labels=None")
        return Qwen3NextClassifier.from_variant(variant, num_labels=num_labels, **options)
    if num_labels is not None:
        raise ValueError(f"`num_labels` is for classification. Received: {num_labels=}")
    return Qwen3Next.from_variant(variant, **options)


def _refuse_options_of_other_task(task_type, options):
    own: type[ConfiguredModel] = Qwen3Next
    other: type[ConfiguredModel] = Qwen3NextClassifier
    if task_type == "classification":
        own, other = other, own
    for name in options:
        if name in other.constructor_options() and name not in own.constructor_options():
            raise ValueError(
                f"`{name}` is an argument of `{other.__name__}` and not of `{own.__name__}`. "
                f"Received: {name}={shown(options[name])}, {task_type=}"
            )


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


def wrap_transformer_with_etd(
    model: Qwen3Next | Qwen3NextClassifier,
    config: ETDConfig | None = None,
    *,
    freeze_backbone: bool = False,
    name: str | None = None,
) -> Qwen3Next | Qwen3NextClassifier:
    """A model whose middle layers think, with the trained weights of another.

    Embedding, layers, norm, head and MTP modules are those of `model`, not copies: what trains one
    model trains the other. With one iteration both give the same outputs.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier` without a think loop.
        config: `ETDConfig`. Defaults to a quarter of the layers that encode, a half that think and
            a quarter that decode.
        freeze_backbone: Whether to freeze what is shared but for MTP modules, in `model`, too. A
            language model only.
        name: Name of the new model.

    Returns:
        A model of the class of `model`.

    Raises:
        ValueError: no such model, one that thinks already, layer counts that do not sum to its
            layers, or nothing left to train.

    Example:

    ```python
    from qwen3_next import ETDConfig, Qwen3Next, wrap_transformer_with_etd

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=4)
    thinking = wrap_transformer_with_etd(model, ETDConfig(1, 2, 1, max_think_iterations=3))
    assert thinking.backbone.decoder_layers[0] is model.backbone.decoder_layers[0]
    ```

    Reference: Encode, Think, Decode, arXiv 2510.07358.
    """
    if not isinstance(model, Qwen3Next | Qwen3NextClassifier):
        raise ValueError(
            "A think loop needs a `Qwen3Next` or a `Qwen3NextClassifier`. "
            f"Received: model of type {type(model).__name__}"
        )
    if model.config.etd is not None:
        raise ValueError(
            f"`model` has a think loop already. Received: model.config.etd={model.config.etd}"
        )
    if config is None:
        config = ETDConfig.from_ratio(model.config.num_layers, 0.25, 0.5, 0.25)
    fields = model.config.replace(etd=config)
    backbone = Qwen3NextBackbone(
        fields.replace(mtp=None),
        gradient_checkpointing=model.gradient_checkpointing,
        base=model.backbone,
        name="model",
        dtype=model.dtype_policy,
    )
    options: dict[str, Any] = {
        "gradient_checkpointing": model.gradient_checkpointing,
        "backbone": backbone,
        "name": name,
        "dtype": model.dtype_policy,
    }
    if isinstance(model, Qwen3Next):
        shared = {"lm_head": model.lm_head, "mtp_modules": model.mtp_modules or None}
        return Qwen3Next(fields, freeze_backbone=freeze_backbone, **shared, **options)
    if freeze_backbone:
        raise ValueError(
            "`freeze_backbone` is for language models. "
            f"Received: {freeze_backbone=}, model of type {type(model).__name__}"
        )
    options |= {"num_labels": model.num_labels, "pad_token_id": model.pad_token_id}
    return Qwen3NextClassifier(fields, score=model.score, **options)


def create_qwen3_next_model(
    variant_or_preset: str,
    use_etd: bool = True,
    use_mtp: bool = True,
    freeze_backbone: bool = False,
    **options: Any,
) -> Qwen3Next:
    """A language model with a think loop and multi-token prediction, from a variant or a preset.

    The defaults are a quarter of the layers that encode, a half that think, at most 3 times up to a
    confidence of 0.85, and a quarter that decode; and 4 tokens ahead at a loss weight of 0.3.
    Prints the share of parameters that train.

    Args:
        variant_or_preset: One of `qwen3_next.variants.names()` for random weights, else what
            `Qwen3Next.from_preset` reads.
        use_etd: Whether layers think; `etd=` replaces the configuration above.
        use_mtp: Whether the model predicts several tokens ahead; `mtp=` likewise.
        freeze_backbone: Whether only what is new trains.
        **options: Fields of `Qwen3NextConfig` to replace, or constructor arguments.

    Raises:
        ValueError: an unknown name or option, or nothing left to train.

    Example:

    ```python
    from qwen3_next import create_qwen3_next_model

    small = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "dtype": "float32"}
    model = create_qwen3_next_model("tiny", use_mtp=False, **small)
    assert model.config.etd.get_layer_ranges()["think"] == (1, 3)
    ```
    """
    for name, value in (("use_etd", use_etd), ("use_mtp", use_mtp)):
        require(BOOLEAN, name, value)
    for name, use in (("etd", use_etd), ("mtp", use_mtp)):
        if name in options and not use:
            raise ValueError(f"`{name}` needs `use_{name}=True`. Received: use_{name}=False")
    is_variant = variant_or_preset in variants.names()
    if use_mtp:
        mtp = MTPConfig(num_predict_tokens=4, mtp_loss_weight=0.3, speculation_lookahead=3)
        options = {"mtp": mtp, **options}
    if use_etd and "etd" not in options:
        options["etd"] = _default_etd(variant_or_preset, is_variant, options)
    build = Qwen3Next.from_variant if is_variant else Qwen3Next.from_preset
    model = build(variant_or_preset, freeze_backbone=freeze_backbone, **options)
    print(f"{model.name}: {_trainable_share(model)}")
    return model


def create_qwen3_next_efficient(variant_or_preset: str = PUBLISHED, **options: Any) -> Qwen3Next:
    """`create_qwen3_next_model` for little compute: a frozen backbone, at most 2 iterations up to a
    confidence of 0.8, layer routers, 2 LoRA experts of rank 8, 3 tokens ahead.

    Args:
        variant_or_preset, **options: As for `create_qwen3_next_model`.

    Example:

    ```python
    from qwen3_next import create_qwen3_next_efficient

    small = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_experts": 0}
    model = create_qwen3_next_efficient("tiny", **small)
    assert model.config.etd.max_think_iterations == 2
    ```
    """
    return _with_depth(variant_or_preset, (2, 0.8), (2, 8), 3, {"freeze_backbone": True, **options})


def create_qwen3_next_performance(variant_or_preset: str = PUBLISHED, **options: Any) -> Qwen3Next:
    """`create_qwen3_next_model` for quality: everything trains, at most 5 iterations up to a
    confidence of 0.95, layer routers, 8 LoRA experts of rank 32, 4 tokens ahead.

    Args:
        variant_or_preset, **options: As for `create_qwen3_next_model`.

    Example:

    ```python
    from qwen3_next import create_qwen3_next_performance

    small = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_experts": 0}
    model = create_qwen3_next_performance("tiny", **small)
    assert model.config.etd.max_think_iterations == 5
    ```
    """
    return _with_depth(variant_or_preset, (5, 0.95), (8, 32), 4, options)


def _with_depth(variant_or_preset, depth, experts, tokens, options):
    if options.get("use_etd", True) and "etd" not in options:
        is_variant = variant_or_preset in variants.names()
        etd = _default_etd(variant_or_preset, is_variant, options)
        (iterations, threshold), (number, rank) = depth, experts
        options["etd"] = etd.replace(
            max_think_iterations=iterations,
            confidence_threshold=threshold,
            use_layer_router=True,
            use_lora_experts=True,
            num_lora_experts=number,
            lora_expert={"rank": rank, "alpha": 2.0 * rank},
        )
    if options.get("use_mtp", True) and "mtp" not in options:
        options["mtp"] = MTPConfig(
            num_predict_tokens=tokens, mtp_loss_weight=0.3, speculation_lookahead=3
        )
    return create_qwen3_next_model(variant_or_preset, **options)


def _default_etd(variant_or_preset, is_variant, options):
    if "num_layers" in options:
        num_layers = options["num_layers"]
    elif is_variant:
        num_layers = Qwen3NextConfig.from_variant(variant_or_preset).num_layers
    else:
        num_layers = preset_config(variant_or_preset).num_layers
    limits = {"max_think_iterations": 3, "confidence_threshold": 0.85}
    return ETDConfig.from_ratio(num_layers, 0.25, 0.5, 0.25, **limits)


def _trainable_share(model):
    total = sum(math.prod(v.shape) for v in model.weights)
    trains = sum(math.prod(v.shape) for v in model.trainable_weights)
    return f"{trains:,} of {total:,} parameters train ({100 * trains / total:.2f} %)"
