"""The options of a distillation, and which stage they are for."""

from typing import Any

from qwen3_next.config import CrossArchTransferConfig
from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    POSITIVE,
    integer,
    is_list_of,
    number,
    one_of,
    require,
    shown,
)
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.transfer.distill.distillation_stages import Alignment, Logits
from qwen3_next.transfer.distill.frozen_teacher import require_same_layers

SHARE = number("0 to 1", lambda value: 0 <= value <= 1)
BY_CONFIG = ("temperature", "alpha")
# Those whose default says no, and not that nothing was given.
RULES = {"layer_weight": NOT_NEGATIVE, "train_input_norms": BOOLEAN}
OPTIONS = {
    "logits": (*BY_CONFIG, "layer_weight"),
    "alignment": ("layers", "train_input_norms"),
}


def stage_of(
    teacher: Qwen3Next | None,
    student: Qwen3Next,
    config: Any,
    stage: str,
    options: dict[str, Any],
) -> Alignment | Logits:
    """The stage that the arguments of a `DistillationTrainer` describe.

    Raises:
        ValueError: an option out of range, of another stage, or given twice.
    """
    require(one_of(OPTIONS), "stage", stage)
    for name, rule in RULES.items():
        require(rule, name, options[name])
    shared = _of_config(config, {name: options[name] for name in BY_CONFIG})
    for name in sum((names for other, names in OPTIONS.items() if other != stage), ()):
        value = options[name]
        if value if name in RULES else value is not None:
            raise ValueError(
                f"`{name}` is not for stage={stage!r}. Received: {name}={shown(value)}"
            )
    if stage == "alignment":
        layers = options["layers"]
        return _alignment(teacher, student, layers, options["train_input_norms"])
    require(POSITIVE, "temperature", shared["temperature"])
    require(SHARE, "alpha", shared["alpha"])
    if options["layer_weight"] and student.config.etd is not None:
        raise ValueError(
            "`layer_weight` must be 0 for a student with a think loop, which runs layers more than "
            f"once. Received: layer_weight={options['layer_weight']}, etd={student.config.etd}"
        )
    return Logits(**shared, layer_weight=options["layer_weight"])


def _of_config(config, given):
    """Temperature and share of the teacher: given, of a configuration, or by default."""
    if config is None:
        default = {"temperature": 2.0, "alpha": 0.5}
        return {name: default[name] if value is None else value for name, value in given.items()}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"Give a `config` or `{name}`, not both. Received: {name}={value}, {config=}"
            )
    if not isinstance(config, CrossArchTransferConfig):
        raise ValueError(f"`config` must be a CrossArchTransferConfig. Received: {config=}")
    alpha = config.distillation_alpha if config.use_distillation else 0.0
    return {"temperature": config.distillation_temperature, "alpha": alpha}


def _alignment(teacher, student, layers, train_input_norms):
    count = student.config.num_layers
    if layers is None and teacher is not None:
        require_same_layers(teacher, student)
        kinds = zip(teacher.config.layer_types, student.config.layer_types, strict=True)
        layers = [place for place, (taught, own) in enumerate(kinds) if taught != own]
    fits = is_list_of(layers, integer(0, count - 1).fits) and len(set(layers)) == len(layers) > 0
    if not fits:
        raise ValueError(
            f"`layers` must be distinct numbers of layers, 0 to {count - 1}, at least one; those "
            f"whose mixers differ in kind by default, with a teacher. Received: layers={layers}"
        )
    return Alignment(tuple(sorted(layers)), train_input_norms)
