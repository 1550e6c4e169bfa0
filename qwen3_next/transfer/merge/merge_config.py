"""Merges that are described by a file, as mergekit describes them.

    merge_method: ties                  one of `METHODS`
    base_model: path/to/base
    models:
      - model: path/to/coder
        parameters: {weight: 1.0, density: 0.3}
      - model: path/to/poet
        parameters: {weight: {experts: 0.2, "*": 0.8}}
    parameters: {density: 0.5, normalize: true, lambda: 1.0}
    dtype: bfloat16

What a model does not say of itself is looked up in the `parameters` of the merge.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwen3_next.checkpoints.interchange import table_of
from qwen3_next.checkpoints.presets import preset_config
from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    PATH,
    Rule,
    integer,
    one_of,
    require,
    shown,
)
from qwen3_next.models.weight_table import weight_table
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.merge.dare import LINEAR, TIES, merge_dare
from qwen3_next.transfer.merge.karcher import merge_karcher
from qwen3_next.transfer.merge.merge_amounts import ANY, DENSITY, FRACTION, by_model, by_weight
from qwen3_next.transfer.merge.merge_recipes import amount_of, read_recipe, require_keys
from qwen3_next.transfer.merge.mergeable import require_same_function
from qwen3_next.transfer.merge.slerp import merge_slerp
from qwen3_next.transfer.merge.task_arithmetic import merge_linear, merge_task_arithmetic
from qwen3_next.transfer.merge.ties import merge_ties
from qwen3_next.transfer.named_weights import require_model


class Method(NamedTuple):
    """How a merge method reads a recipe.

    Attributes:
        merge: The function.
        base: Whether it merges into a base model.
        of_models: Parameters of each model, as the recipe calls them.
        of_merge: Parameters of the merge, and what the function calls them.
        needed: Those of the latter that have no default.
        weight: What the weight of a model must be.
    """

    merge: Callable[..., Any]
    base: bool
    of_models: tuple[str, ...]
    of_merge: dict[str, str]
    needed: tuple[str, ...] = ()
    weight: Rule = ANY


_SUM = {"normalize": "normalize", "lambda": "scale"}
_DROP = {**_SUM, "rescale": "rescale", "seed": "seed"}
_BOTH = ("weight", "density")
_WEIGHT = ("weight",)
_linear, _ties = (functools.partial(merge_dare, combine=name) for name in (LINEAR, TIES))
METHODS = {
    "linear": Method(merge_linear, False, _WEIGHT, {"normalize": "normalize"}),
    "slerp": Method(merge_slerp, False, (), {"t": "t"}, ("t",)),
    "karcher": Method(merge_karcher, False, _WEIGHT, {}, weight=NOT_NEGATIVE),
    "task_arithmetic": Method(merge_task_arithmetic, True, _WEIGHT, _SUM),
    "ties": Method(merge_ties, True, _BOTH, _SUM, weight=NOT_NEGATIVE),
    "dare_linear": Method(_linear, True, _BOTH, _DROP),
    "dare_ties": Method(_ties, True, _BOTH, _DROP, weight=NOT_NEGATIVE),
}
_RULES = {"normalize": BOOLEAN, "rescale": BOOLEAN, "scale": ANY, "seed": integer(0)}
_PLURAL = {"weight": "weights", "density": "density"}
_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype")
_MODELS = Rule(
    "None or a dict from names to models", lambda value: value is None or isinstance(value, dict)
)
_TEXT = Rule("None or the name of a dtype", lambda value: value is None or isinstance(value, str))


def merge_from_config(
    recipe: str | Path | Mapping[str, Any],
    models: dict[str, Task] | None = None,
    model_class: type[Task] = Qwen3Next,
    progress: bool = True,
) -> Any:
    """The model that a recipe describes: which models to merge, by which method, and how.

    `merge_method` is one of `linear`, `slerp`, `karcher`, `task_arithmetic`, `ties`, `dare_linear`
    and `dare_ties`; see `merge_linear` and the others. The last four need a `base_model`; with
    `slerp` it is the first of two models. `parameters` of each model are `weight` and, of `ties`
    and the `dare`s, `density`. Those of the merge are `t` (`slerp`), `normalize`, `lambda` (with a
    base), `rescale` and `seed` (`dare`s), and what holds for all models that do not say otherwise.

    A number may be a list along the decoder layers, a dict by part or path as for the functions, or
    a list of `filter` and `value` as mergekit has it, where a filter is a piece of the path.

    The configurations of all models are compared, and the numbers checked, before weights are read.

    Args:
        recipe: A JSON or YAML file, or what such a file holds. YAML needs PyYAML.
        models: Models that are loaded already, by the name they have in the recipe. All other names
            are presets, see `Task.from_preset`.
        model_class: What presets are loaded as, `Qwen3Next` or `Qwen3NextClassifier`.
        progress: Whether to report on loading them.

    Returns:
        A model of the class and configuration of the base, or of the first model. Its dtype policy
        is theirs, which for presets is the recipe's `dtype` if there is one.

    Raises:
        ValueError: a recipe with unknown, missing or wrong entries, or models that cannot be
            merged.

    Example:

    ```python
    from qwen3_next import Qwen3Next, merge_from_config

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    names = ("base", "coder", "poet")
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "coder", "parameters": {"weight": 1.0}},
            {"model": "poet", "parameters": {"weight": [0.2, 0.8], "density": 0.5}},
        ],
        "parameters": {"density": 0.3},
    }
    merged = merge_from_config(
        recipe, models={name: Qwen3Next.from_variant("tiny", **sizes) for name in names}
    )
    merged.save_to_preset("merged")
    ```
    """
    fields = _checked_fields(recipe)
    require(_MODELS, "models", models)
    require(BOOLEAN, "progress", progress)
    method = METHODS[fields["merge_method"]]
    given = dict(models or {})
    names, arguments = _arguments(method, fields)
    _check_models(names, given, model_class, fields.get("dtype"))
    configs = {n: given[n].config if n in given else preset_config(n) for n in names}
    require_same_function(configs)
    _check_numbers(method, arguments, _rows(given.get(names[0]), model_class, configs[names[0]]))
    for name in names:
        if name not in given:
            given[name] = model_class.from_preset(
                name, dtype=fields.get("dtype"), progress=progress
            )
    loaded = [given[name] for name in names]
    if method.merge is merge_slerp:
        return merge_slerp(loaded[0], loaded[1], **arguments)
    if method.base:
        return method.merge(loaded[0], loaded[1:], **arguments)
    return method.merge(loaded, **arguments)


def named_models(recipe: str | Path | Mapping[str, Any]) -> list[str]:
    """Names of the models that a recipe merges, the base or first one leading."""
    fields = _checked_fields(recipe)
    return _arguments(METHODS[fields["merge_method"]], fields)[0]


def _checked_fields(recipe):
    fields = dict(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)
    require_keys("recipe", fields, _KEYS, needed=("merge_method", "models"))
    require(one_of(METHODS), "merge_method", fields["merge_method"])
    require(_TEXT, "dtype", fields.get("dtype"))
    return fields


def _arguments(method, fields):
    """Names of the models, the base or first one leading, and the arguments of the merge."""
    shared = fields.get("parameters") or {}
    require_keys("parameters", shared, (*method.of_merge, *method.of_models), method.needed)
    entries = _entries(method, fields)
    arguments = {
        known: amount_of(name, shared[name])
        for name, known in method.of_merge.items()
        if name in shared
    }
    for name in method.of_models:
        values = []
        for model, own in entries:
            if name not in own and name not in shared:
                raise ValueError(f"`parameters` must have {name!r}. Received: none for {model!r}")
            values.append(amount_of(name, own[name] if name in own else shared[name]))
        arguments[_PLURAL[name]] = values
    base = [str(fields["base_model"])] if method.base else []
    return [*base, *(model for model, _ in entries)], arguments


def _entries(method, fields):
    """Name and own parameters of the models that are merged, without the base."""
    listed, base = fields["models"], fields.get("base_model")
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(f"`models` must be a list of models. Received: models={shown(listed)}")
    entries = []
    for index, entry in enumerate(listed):
        require_keys(f"models[{index}]", entry, ("model", "parameters"), ("model",))
        require(PATH, f"models[{index}].model", entry["model"])
        own = entry.get("parameters") or {}
        require_keys(f"models[{index}].parameters", own, method.of_models)
        entries.append((str(entry["model"]), own))
    if method.merge is merge_slerp:
        return _two_ends(entries, base)
    if method.base != (base is not None):
        what = "have" if method.base else "not have"
        raise ValueError(
            f"A recipe with merge_method={fields['merge_method']!r} must {what} a `base_model`. "
            f"Received: base_model={shown(base)}"
        )
    if method.base:
        require(PATH, "base_model", base)
        # mergekit's files list the base among the models, with nothing to say of it.
        entries = [entry for entry in entries if entry != (str(base), {})]
        if not entries:
            raise ValueError(f"`models` must have another one than {base!r}. Received: {listed}")
    return entries


def _two_ends(entries, base):
    names = [name for name, _ in entries]
    if len(entries) != 2 or (base is not None and str(base) not in names):
        raise ValueError(
            "slerp must have two `models`, one of them the `base_model` if that is given; "
            f"`karcher` takes more. Received: models={names}, base_model={shown(base)}"
        )
    return entries[::-1] if base is not None and str(base) == names[1] else entries


def _check_models(names, models, model_class, dtype):
    if not (isinstance(model_class, type) and issubclass(model_class, Task)):
        raise ValueError(
            "`model_class` must be Qwen3Next or Qwen3NextClassifier. "
            f"Received: model_class={shown(model_class)}"
        )
    unused = sorted(set(models) - set(names), key=str)
    if unused:
        raise ValueError(f"All `models` must be in the recipe, {names}. Received also: {unused}")
    for name, model in models.items():
        require_model(f"models[{name!r}]", model)
    if dtype is not None and names[0] in models and models[names[0]].dtype_policy.name != dtype:
        raise ValueError(
            f"`dtype` must be the dtype policy of {names[0]!r}, which is loaded already: "
            f"{models[names[0]].dtype_policy.name!r}. Received: dtype={dtype!r}"
        )


def _rows(model, model_class, config):
    """The weight table of a model that is loaded, or will be one of a class."""
    if model is not None:
        return table_of(model)
    # No number depends on how many labels there are.
    return weight_table(config, 1 if "num_labels" in model_class.constructor_options() else None)


def _check_numbers(method, arguments, rows):
    """Refuses here what the function would refuse once all models are loaded."""
    for name, value in arguments.items():
        if name in _PLURAL.values():
            rule = DENSITY if name == "density" else method.weight
            by_model(name, value, len(value), rows, rule)
        elif name == "t":
            by_weight(name, value, rows, FRACTION)
        else:
            require(_RULES[name], name, value)
