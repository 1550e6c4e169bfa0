"""What all models share: construction from a configuration, a variant or a preset, and checks."""

import keras

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.inputs import check_token_ids
from qwen3_next.interchange import export_hugging_face
from qwen3_next.preset import from_preset, save_to_preset

LOSSES_FROM_LOGITS = {
    "sparse_categorical_crossentropy": keras.losses.SparseCategoricalCrossentropy,
    "categorical_crossentropy": keras.losses.CategoricalCrossentropy,
    "binary_crossentropy": keras.losses.BinaryCrossentropy,
}


class ConfiguredModel(keras.Model):
    """A model described by a `Qwen3NextConfig`, whose weights exist once it is constructed."""

    def __init__(self, config=None, *, name=None, dtype=None, **fields):
        if config is not None and fields:
            raise ValueError(
                "Give a `config` or its fields as keyword arguments, not both. "
                f"Received: config={config}, fields={sorted(fields)}"
            )
        if config is None:
            config = Qwen3NextConfig.from_dict(fields)
        elif not isinstance(config, Qwen3NextConfig):
            raise ValueError(f"`config` must be a Qwen3NextConfig. Received: {config=}")
        # Inputs are cast by hand: Keras would cast the float32 tensors of a state as well.
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.config = config

    def refuse_mtp(self):
        """Raises `ValueError` for a configuration with multi-token prediction."""
        if self.config.mtp is not None:
            raise ValueError(
                f"{type(self).__name__} has no use for multi-token prediction: it belongs to a "
                f"`Qwen3Next`. Give `mtp=None`. Received: mtp={self.config.mtp}"
            )

    @classmethod
    def from_variant(cls, variant, *, name=None, dtype=None, **options):
        """Builds the model called `variant` with random weights.

        Args:
            variant: One of `qwen3_next.variants.names()`.
            name, dtype: As for the constructor.
            **options: Fields of `Qwen3NextConfig` to replace, or other constructor arguments.
        """
        own = {key: options.pop(key) for key in cls.constructor_options() if key in options}
        config = Qwen3NextConfig.from_variant(variant, **options)
        return cls(config, name=name, dtype=dtype, **own)

    @staticmethod
    def constructor_options():
        """Constructor arguments that are not fields of the configuration."""
        return ("gradient_checkpointing",)

    def __call__(self, inputs, *args, **kwargs):
        check_token_ids(inputs, self.config.vocab_size)
        return super().__call__(inputs, *args, **kwargs)

    def output_shape_of(self, batch, length):
        """Shape of the output for token ids `(batch, length)`, where either may be `None`."""
        raise NotImplementedError

    def compute_output_spec(self, inputs, training=None, **others):
        # Said outright: JAX cannot trace the routing of an unknown number of tokens.
        if others:
            raise ValueError(f"A symbolic call takes inputs alone. Received also: {sorted(others)}")
        token_ids = inputs["token_ids"] if isinstance(inputs, dict) else inputs
        shape = self.output_shape_of(*token_ids.shape)
        return keras.KerasTensor(shape, dtype=self.output_dtype)

    @property
    def output_dtype(self):
        return self.compute_dtype

    def get_config(self):
        base = super().get_config()
        return {**self.config.to_dict(), "name": base["name"], "dtype": base["dtype"]}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        return cls(**config)


class Task(ConfiguredModel):
    """A model with a head, ready for `compile`, `fit`, `evaluate` and `predict`.

    The models return logits, so the names of the cross-entropy losses mean them from logits.
    """

    @classmethod
    def from_preset(cls, preset, *, dtype=None, progress=True, **options):
        """Loads a model with its weights, in the published layout or as `save_to_preset` left it.

        What became of every tensor is then in the model's `coverage_report`.

        Args:
            preset: A directory, or `"hf://owner/name"`.
            dtype: Dtype policy of all layers. `None` for the saved one, or for published
                checkpoints Keras' default.
            progress: Whether to show a progress bar and print the coverage report.
            **options: Fields of `Qwen3NextConfig` to replace, or other constructor arguments.

        Raises:
            ValueError: a directory without a model, a setting that has no counterpart here, or a
                checkpoint that is damaged or does not fit.
        """
        return from_preset(cls, preset, dtype=dtype, progress=progress, **options)

    def save_to_preset(self, directory, max_shard_size="5GB"):
        """Writes configuration and weights to a directory that `from_preset` reads.

        Files of that name are replaced once everything is written.

        Args:
            directory: Where to write.
            max_shard_size: Size of a file, a string such as `"5GB"` or a number of bytes.
        """
        save_to_preset(self, directory, max_shard_size)

    def export_to_transformers(self, directory, dtype=None, max_shard_size="5GB"):
        """Writes `config.json` and the weights as transformers reads them.

        Files of that name are replaced once everything is written.

        Args:
            directory: Where to write.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`. `None` for the dtype of each variable.
            max_shard_size: Size of a file, a string such as `"5GB"` or a number of bytes.

        Raises:
            ValueError: a configuration that no published model type can express.
        """
        export_hugging_face(self, directory, dtype, max_shard_size)

    def compile(
        self, optimizer="adamw", loss="sparse_categorical_crossentropy", metrics=None, **kwargs
    ):
        """As `keras.Model.compile`; cross-entropies given by name are taken from logits."""
        if isinstance(loss, str) and loss in LOSSES_FROM_LOGITS:
            loss = LOSSES_FROM_LOGITS[loss](from_logits=True)
        if getattr(loss, "from_logits", True) is False:
            raise ValueError(
                f"{type(self).__name__} returns logits: give the loss by name or with "
                f"`from_logits=True`. Received: loss={loss}"
            )
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, *args, **kwargs):
        check_token_ids(x, self.config.vocab_size)
        return super().fit(x, *args, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        check_token_ids(x, self.config.vocab_size)
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        check_token_ids(x, self.config.vocab_size)
        return super().predict(x, *args, **kwargs)
