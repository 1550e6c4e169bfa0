"""From a Qwen3 to the hybrid: the functions that users call."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from qwen3_next.checkpoints.presets import PresetWeights, preset_weights
from qwen3_next.config import CrossArchTransferConfig, ETDConfig, HybridAttentionConfig, MTPConfig
from qwen3_next.config.model_config import LINEAR
from qwen3_next.config.validation import BOOLEAN, require
from qwen3_next.layers.initializers import weights_to_be_loaded
from qwen3_next.models.weight_table import weight_table
from qwen3_next.tasks.factories import wrap_model_with_mtp, wrap_transformer_with_etd
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.transfer.conversion.deltanet_calibration import (
    calibrate_deltanets,
    check_calibration,
)
from qwen3_next.transfer.conversion.hybrid_conversion import (
    INITIALISED,
    TRANSFORMED,
    HybridConversion,
    hybrid_config,
)
from qwen3_next.transfer.conversion.transfer_report import TransferReport
from qwen3_next.transfer.growth.sparse_upcycling import upcycle_dense_to_moe
from qwen3_next.transfer.named_weights import NamedWeights, assign

Source = str | Path | Qwen3Next


def transfer_qwen3_to_hybrid(
    source: Source | None = None,
    config: CrossArchTransferConfig | None = None,
    calibration: Any = None,
    *,
    dtype: Any = None,
    name: str | None = None,
    progress: bool = True,
    **fields: Any,
) -> Qwen3Next:
    """A hybrid with the weights of a Qwen3 or Qwen3-MoE.

    The layers that `config.hybrid_attention` names become Gated DeltaNets, all others keep their
    attention with full rotary dims, its norms and all weights. What became of every weight is in
    the model's `coverage_report`. A directory is read one weight at a time; with `calibration` the
    source runs, and is loaded as well.

    Args:
        source: `Qwen3Next`, a directory or `"hf://owner/name"`; `None` for
            `config.source_model`.
        config: `CrossArchTransferConfig`. Defaults to `CrossArchTransferConfig()`.
        calibration: Token ids `(N, T)`, or a dict with `"padding_mask"`, on which the Gated
            DeltaNets are fitted to the source; `None` for what can be said without.
        dtype: Dtype policy of the new model, `None` for that of a loaded source, or Keras'.
        name: Name of the new model.
        progress: Whether to show progress bars and print the report.
        **fields: Fields of `Qwen3NextConfig` to replace, see `hybrid_config`.

    Returns:
        `Qwen3Next`. The source is left as it is.

    Raises:
        ValueError: a source of another family, layers or heads that cannot be mapped, an option
            that needs calibration tokens and has none, calibration tokens that are all padding or
            more in a row than the source takes.

    Example:

    ```python
    from qwen3_next import CrossArchTransferConfig, Qwen3Next, transfer_qwen3_to_hybrid

    qwen3 = {
        "attention_type": "group_query_attention", "normalization_type": "rms_norm",
        "partial_rotary_factor": 1.0, "full_attention_interval": 1, "num_experts": 0,
    }
    teacher = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=4, head_dim=16, **qwen3
    )
    config = CrossArchTransferConfig(hybrid_attention={"gate_bias": True})
    hybrid = transfer_qwen3_to_hybrid(teacher, config)
    assert hybrid.config.layer_types.count("linear_attention") == 3
    ```
    """
    config = CrossArchTransferConfig() if config is None else config
    if not isinstance(config, CrossArchTransferConfig):
        raise ValueError(f"`config` must be a CrossArchTransferConfig. Received: config={config!r}")
    require(BOOLEAN, "progress", progress)
    source = config.source_model if source is None else source
    _check_options(config, calibration)
    with _opened(source, calibration, progress) as (weights, teacher):
        fitted = hybrid_config(weights.config, config, **fields)
        check_calibration(calibration, weights.config)
        if calibration is not None and LINEAR not in fitted.layer_types:
            raise ValueError(
                "`calibration` must be None where no layer is converted: nothing would read it. "
                f"Received: layer_types={fitted.layer_types}"
            )
        conversion = HybridConversion(weights.config, fitted, config, weights.read)
        if dtype is None and teacher is not None:
            dtype = teacher.dtype_policy
        model = _converted(conversion, dtype, name, progress)
        unused = {p: _why_unused(p) for p in weights.paths if p not in conversion.used}
    choices = conversion.choices()
    if teacher is not None and calibration is not None:
        choices |= calibrate_deltanets(
            teacher, model, calibration, config.hybrid_attention, progress=progress
        )
    paths = conversion.paths
    if config.num_experts:
        model = upcycle_dense_to_moe(
            model,
            config.num_experts,
            config.num_experts_per_tok,
            config.expert_init_noise,
            seed=config.seed,
            name=name,
        )
        paths = _with_experts(paths, model)
        noise = f" with noise of {config.expert_init_noise:g}" if config.expert_init_noise else ""
        choices["experts"] = f"copies of the dense network{noise}"
    found = {kind: tuple(listed) for kind, listed in paths.items()}
    report = TransferReport(**found, unused={**weights.unused, **unused}, choices=choices)
    model.coverage_report = report
    if progress:
        print(f"{model.name}: {report}")
    return model


def create_hybrid_from_qwen3(
    source: Source,
    config: HybridAttentionConfig | CrossArchTransferConfig | None = None,
    calibration: Any = None,
    **options: Any,
) -> Qwen3Next:
    """`transfer_qwen3_to_hybrid` with everything copied, three Gated DeltaNets to one attention.

    Args:
        source: `Qwen3Next`, a directory or `"hf://owner/name"`.
        config: `HybridAttentionConfig`, or a whole `CrossArchTransferConfig`. Defaults to
            `HybridAttentionConfig()`.
        calibration, **options: As for `transfer_qwen3_to_hybrid`.

    Example:

    ```python
    from qwen3_next import HybridAttentionConfig, Qwen3Next, create_hybrid_from_qwen3

    qwen3 = {
        "attention_type": "group_query_attention", "normalization_type": "rms_norm",
        "partial_rotary_factor": 1.0, "full_attention_interval": 1, "num_experts": 0,
    }
    teacher = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=4, head_dim=16, **qwen3
    )
    hybrid = create_hybrid_from_qwen3(teacher)
    assert hybrid.get_layer_stats()["deltanet_layers"] == 3
    ```
    """
    transfer = config
    if config is None or isinstance(config, HybridAttentionConfig):
        transfer = CrossArchTransferConfig(hybrid_attention=config or HybridAttentionConfig())
    if not isinstance(transfer, CrossArchTransferConfig):
        raise ValueError(
            "`config` must be a HybridAttentionConfig or a CrossArchTransferConfig. "
            f"Received: config={config!r}"
        )
    return transfer_qwen3_to_hybrid(source, transfer, calibration, **options)


def create_full_hybrid_model(
    source: Source,
    use_etd: bool = True,
    use_mtp: bool = True,
    *,
    config: HybridAttentionConfig | CrossArchTransferConfig | None = None,
    calibration: Any = None,
    etd: ETDConfig | None = None,
    mtp: MTPConfig | None = None,
    **options: Any,
) -> Qwen3Next:
    """A hybrid made from a Qwen3, with a think loop and multi-token prediction.

    Args:
        source: `Qwen3Next`, a directory or `"hf://owner/name"`.
        use_etd: Whether layers think.
        use_mtp: Whether the model predicts several tokens ahead.
        config: `HybridAttentionConfig` or `CrossArchTransferConfig` of the conversion.
        calibration, **options: As for `transfer_qwen3_to_hybrid`.
        etd: `ETDConfig`. Defaults to a quarter of the layers that encode, a half that think and a
            quarter that decode.
        mtp: `MTPConfig`. Defaults to `MTPConfig()`.

    Example:

    ```python
    from qwen3_next import Qwen3Next, create_full_hybrid_model

    qwen3 = {
        "attention_type": "group_query_attention", "normalization_type": "rms_norm",
        "partial_rotary_factor": 1.0, "full_attention_interval": 1, "num_experts": 0,
    }
    teacher = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=4, head_dim=16, **qwen3
    )
    model = create_full_hybrid_model(teacher)
    assert model.config.etd is not None and model.config.mtp is not None
    ```
    """
    for flag, value, given in (("use_etd", use_etd, etd), ("use_mtp", use_mtp, mtp)):
        require(BOOLEAN, flag, value)
        if given is not None and not value:
            raise ValueError(
                f"`{flag.removeprefix('use_')}` needs `{flag}=True`. "
                f"Received: {flag}=False with {given}"
            )
    model = create_hybrid_from_qwen3(source, config, calibration, **options)
    report = model.coverage_report
    if use_etd:
        model = wrap_transformer_with_etd(model, etd, name=model.name)
    if use_mtp:
        model = wrap_model_with_mtp(model, mtp, name=model.name)
    model.coverage_report = report
    return model


def _why_unused(path):
    if "q_norm" in path or "k_norm" in path:
        return "norms of queries and keys, which Gated DeltaNets do without"
    return "not copied, as the configuration says"


def _check_options(config, calibration):
    hybrid = config.hybrid_attention
    needing = {
        "decay_init": "attention_distance",
        "output_gate_init": "least_squares",
        "output_projection_init": "least_squares",
    }
    for name, value in needing.items():
        if calibration is None and getattr(hybrid, name) == value:
            raise ValueError(
                f"`{name}={value!r}` needs `calibration` tokens. Received: calibration=None"
            )
    is_read = hybrid.output_projection_init == "least_squares"
    is_read = is_read or hybrid.output_gate_init in (None, "least_squares")
    is_read = is_read or hybrid.decay_init != "half_life"
    if calibration is not None and not (is_read and config.copy_attention_weights):
        raise ValueError(
            "`calibration` must be None where nothing would read it: without "
            "`copy_attention_weights`, or with `decay_init`, `output_gate_init` and "
            f"`output_projection_init` that need no tokens. Received: {config=}"
        )


@contextlib.contextmanager
def _opened(source, calibration, progress) -> Iterator[tuple[PresetWeights, Qwen3Next | None]]:
    """The weights of a source, and the source itself where it is loaded."""
    if isinstance(source, Qwen3Next):
        own = NamedWeights(source)
        yield PresetWeights(source.config, tuple(own), own.__getitem__, {}), source
    elif isinstance(source, str | Path):
        with preset_weights(Qwen3Next, source) as weights:
            teacher = None
            if calibration is not None:
                teacher = Qwen3Next.from_preset(source, progress=progress)
            yield weights, teacher
    else:
        raise ValueError(
            "`source` must be a Qwen3Next, a directory or 'hf://owner/name', or be named by "
            f"`source_model` in `config`. Received: source of type {type(source).__name__}"
        )


def _with_experts(paths, model):
    """What became of the weights of a model whose dense networks were copied into experts."""
    rows = {row.path: row for row in weight_table(model.config)}
    found = {kind: [path for path in listed if path in rows] for kind, listed in paths.items()}
    known = {path for listed in found.values() for path in listed}
    dense_was_new = any("/mlp/" in path for path in paths[INITIALISED])
    for path in rows.keys() - known:
        new = dense_was_new or rows[path].part == "router"
        found[INITIALISED if new else TRANSFORMED].append(path)
    return found


def _converted(conversion, dtype, name, progress):
    rows = weight_table(conversion.config)
    with weights_to_be_loaded():
        model = Qwen3Next(conversion.config, dtype=dtype, name=name)
    variables = {variable.path: variable for variable in model.weights}
    bar = keras.utils.Progbar(len(rows), unit_name="weight") if progress else None
    for row in rows:
        assign(variables[row.path], conversion.array(row))
        if bar is not None:
            bar.add(1)
    return model
