"""What all models share: construction from a configuration or a variant, and checked inputs."""

from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import PATH, Rule, require, shown
from qwen3_next.layers.ops.checks import require_floatx
from qwen3_next.models.decisions import with_decisions
from qwen3_next.models.inputs import check_token_ids, require_inputs
from qwen3_next.models.placement import check_placement
from qwen3_next.models.strategies import require_mirrored_strategy
from qwen3_next.models.trainable_layers import FIELD, set_trainable_by_layer, trainable_by_layer
from qwen3_next.models.values import require_values, values_needed

_FLOATING = "`dtype` must be a policy of floating-point types"
_FIELDS = Rule(
    "a dict from names to values",
    lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
)
_SIGNATURE = Rule(
    "a list of one input, a `keras.InputSpec` or a dict of them",
    lambda value: (
        isinstance(value, list | tuple)
        and len(value) == 1
        and all(hasattr(spec, "shape") and hasattr(spec, "dtype") for spec in _specs(value))
        and not any(isinstance(spec, np.ndarray | np.generic) for spec in _specs(value))
    ),
)


class ConfiguredModel(keras.Model):
    """A model described by a `Qwen3NextConfig`, whose weights exist once it is constructed."""

    built: bool
    config: Qwen3NextConfig

    def __init__(self, config=None, *, name=None, dtype=None, **fields):
        require_floatx()
        require_mirrored_strategy(type(self).__name__)
        if config is not None and fields:
            raise ValueError(
                "Give a `config` or its fields as keyword arguments, not both. "
                f"Received: config={config}, fields={sorted(fields)}"
            )
        if config is None:
            config = Qwen3NextConfig.from_dict(fields)
        elif not isinstance(config, Qwen3NextConfig):
            raise ValueError(f"`config` must be a Qwen3NextConfig. Received: {config=}")
        # Inputs are cast by hand: Keras would cast the float32 tensors of a cache as well.
        super().__init__(name=name, dtype=_policy(dtype), autocast=False)
        self.config = config

    def refuse_mtp(self) -> None:
        """Raises `ValueError` for a configuration with multi-token prediction."""
        if self.config.mtp is not None:
            raise ValueError(
                f"{type(self).__name__} has no use for multi-token prediction: it belongs to a "
                f"`Qwen3Next`. Give `mtp=None`. Received: mtp={self.config.mtp}"
            )

    @classmethod
    def from_variant(
        cls, variant: str, *, name: str | None = None, dtype: Any = None, **options: Any
    ) -> Self:
        """Builds the model called `variant` with random weights.

        Args:
            variant: One of `qwen3_next.variants.names()`.
            name, dtype: As for the constructor.
            **options: Fields of `Qwen3NextConfig` to replace, or other constructor arguments.

        Raises:
            ValueError: an unknown variant or field, or a value out of range.
        """
        own = {key: options.pop(key) for key in cls.constructor_options() if key in options}
        config = Qwen3NextConfig.from_variant(variant, **options)
        return cls(config, name=name, dtype=dtype, **own)

    @staticmethod
    def constructor_options() -> tuple[str, ...]:
        """Constructor arguments that are not fields of the configuration."""
        return ("gradient_checkpointing",)

    def __call__(self, inputs, *args, route=None, branch=None, **kwargs):
        require_inputs(inputs)
        check_placement(self)  # compiled steps come here as well: other places are traced anew
        inputs = with_decisions(self.config, inputs, route, branch)
        check_token_ids(inputs, self.config.vocab_size)
        with values_needed(self):
            return super().__call__(inputs, *args, **kwargs)

    def get_weights(self) -> list[np.ndarray]:
        require_values(self.weights)
        return super().get_weights()

    def export(
        self,
        filepath: str | Path,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.export`, with a default signature: token ids alone.

        On TensorFlow they are `(batch, tokens)` of any size. Elsewhere shapes are fixed, and the
        default is `(1, max_position_embeddings)`: pad on the right, which changes no logits before.

        Raises:
            ValueError: no path, for a SavedModel that of a file, a signature that is not that of
                one input, on JAX one without a number of tokens, LiteRT, whose converter asks for
                the gradients of what is served, and whatever on torch, which cannot trace the
                model.
        """
        require(PATH, "filepath", filepath)
        backend = keras.backend.backend()
        if backend == "torch" or format == "litert":
            raise ValueError(
                "`export` needs JAX or TensorFlow, where a file of the model can be loaded, and "
                f"writes no LiteRT. Received: {format=}, {backend=}"
            )
        path = Path(filepath)
        files = [p for p in (path, *path.parents) if p.exists() and not p.is_dir()]
        if format == "tf_saved_model" and files:
            raise ValueError(
                f"`filepath` must be a directory. Received: {shown(filepath)}, where {files[0]} "
                "is a file"
            )
        if input_signature is None:
            dynamic = backend == "tensorflow"
            shape = (None, None) if dynamic else (1, self.config.max_position_embeddings)
            input_signature = [keras.InputSpec(shape=shape, dtype="int32")]
        require(_SIGNATURE, "input_signature", input_signature)
        shapes = [tuple(spec.shape or ()) for spec in _specs(input_signature)]
        if backend == "jax" and any(None in shape[1:] for shape in shapes):
            raise ValueError(
                "On JAX `input_signature` must fix all dims but the first. "
                f"Received: input_signature={shown(input_signature)}"
            )
        if backend != "tensorflow" or format != "tf_saved_model":
            super().export(filepath, format, verbose, input_signature, **kwargs)
            return
        import tensorflow as tf

        # What is served has no gradients: those of the ops need inputs of known shapes.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        archive = keras.export.ExportArchive()
        archive.track_and_add_endpoint("serve", self, input_signature, **kwargs)
        archive.write_out(filepath, options=options, verbose=verbose is not False)

    def quantize(self, mode: Any = None, **kwargs: Any) -> None:
        """Refused: the fused loss and the routed experts read weights as they are."""
        raise ValueError(f"{type(self).__name__} cannot be quantized. Received: {mode=}")

    @property
    def dtype_policy(self) -> Any:
        """Dtype policy of all layers, as it was given at construction."""
        return super().dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, value: Any) -> None:
        # Layers keep the policy they were made with, and weights their dtype.
        raise ValueError(
            f"{type(self).__name__} takes its dtype policy at construction: give `dtype=` there. "
            f"Received: dtype_policy={shown(value)}"
        )

    def output_shape_of(self, batch: int | None, length: int | None) -> tuple:
        """Shape of the output for token ids `(batch, length)`, where either may be `None`."""
        raise NotImplementedError

    def compute_output_spec(self, inputs, training=None, **others):
        # Said outright: JAX cannot trace the routing of an unknown number of tokens.
        if others:
            raise ValueError(f"A symbolic call takes inputs alone. Received also: {sorted(others)}")
        token_ids = inputs["token_ids"] if isinstance(inputs, dict) else inputs
        shape = self.output_shape_of(*token_ids.shape)
        return keras.KerasTensor(shape, dtype=self.output_dtype)

    def compute_output_shape(self, input_shape: Any) -> tuple:
        if isinstance(input_shape, dict):
            input_shape = input_shape["token_ids"]
        return self.output_shape_of(*input_shape)

    @property
    def output_dtype(self) -> str:
        return self.compute_dtype

    def get_config(self) -> dict:
        base = super().get_config()
        own = {"name": base["name"], "dtype": base["dtype"], FIELD: trainable_by_layer(self)}
        return {**self.config.to_dict(), **own}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        require(_FIELDS, "config", config)
        config = dict(config)
        flags = config.pop(FIELD, None)  # files of before have none
        missing = Qwen3NextConfig.missing_from(config)
        if missing:  # a default would stand for another model
            raise ValueError(
                f"A saved configuration holds every field. Received: one without {missing}"
            )
        model = cls(**config)
        if flags is not None:
            set_trainable_by_layer(model, flags)
        return model


def _specs(signature):
    """The parts of the one input of a signature."""
    return [*signature[0].values()] if isinstance(signature[0], dict) else [signature[0]]


def _policy(dtype):
    """The dtype policy that a name, a policy or a saved one stands for."""
    try:
        policy = keras.dtype_policies.get(dtype)
    except Exception as error:  # whatever Keras meets on its way through a damaged one
        raise ValueError(f"{_FLOATING}. Received: dtype={shown(dtype)}") from error
    if not isinstance(policy, keras.dtype_policies.DTypePolicy) or not _is_floating(policy):
        raise ValueError(f"{_FLOATING}. Received: dtype={shown(dtype)}")
    return policy


def _is_floating(policy):
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return all(map(_is_floating, [policy.default_policy, *policy.values()]))
    dtypes = policy.variable_dtype, policy.compute_dtype
    return policy.quantization_mode is None and all("float" in dtype for dtype in dtypes)
