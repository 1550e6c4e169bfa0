"""The think loop of Encode-Think-Decode (ETD): layers that run several times on their own output.

    x_0 = x                                     the state that the encoder layers left
    x_j = layers(x_(j-1) + W x)                 iteration j; W x, if at all, from the second on

With a halting unit every token stops after an iteration N of its own: from then on its residual
stands still. In later iterations every layer still reads it, and writes keys, values and states
from that frozen state, so that other tokens see the same in training, in a prefill and in decoding.
The loop ends when all tokens have halted; with a cache the iterations that are left only write.

The iterations are one loop, in which the layers stand once, forward and backward.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Self

import keras
from keras import ops

from .decoder_layer import DecoderLayer
from .halting_unit import HaltingUnit
from .ops.backend.layer_programs import layer_program
from .ops.tensor_types import Tensor
from .projection import dense
from .shapes import Shape, spec_like
from .sparse_moe import SparseMoE
from .think_passes import (
    THINKING_DTYPES,
    Given,
    Options,
    Thinking,
    ThinkLoopCache,
    ThinkLoopOutput,
    ThinkLoopUpdate,
    row,
    run_cached,
    run_uncached,
    with_row,
)


@keras.saving.register_keras_serializable(package="qwen3_next")
class ThinkLoop(keras.layers.Layer):
    """Runs decoder layers several times on their own output, with one set of weights.

    Args:
        layers: `DecoderLayer`s. They may belong to a model that uses them as well.
        max_think_iterations: Iterations k, and the most that a call may ask for.
        halting_unit: `HaltingUnit` that ends the loop for every token by itself, or `None`.
        granularity: Whose halting probability counts: that of the `"token"`, or the mean over its
            `"sequence"` up to it.
        inference_state: `"mean"` of the states, weighted as in training, or the `"final"` state.
        backprop_iterations: Gradients flow through this many last iterations. `None` for all.
        sample_iterations: Whether a training step draws its k from 1 to `max_think_iterations`.
        warmup_steps: Training steps over which the largest k rises from 1.
        input_injection: Whether W exists. It is zero at first.

    Call arguments:
        x: `(B, T, D)`.
        padding_mask, segment_ids, cache, lengths, replayable, full_output, training: As for a
            `DecoderLayer`.
        think_iterations: Iterations of this call, from 1 to `max_think_iterations`. `None` for
            those of the cache, in training for what sampling and warm-up say, else for the most.
            One iteration is a pass through the layers and nothing else.

    Returns:
        `(B, T, D)`; with a cache or `full_output` a
        `ThinkLoopOutput(hidden, cache, routing, thinking)`.

    Raises:
        ValueError: a number of iterations out of range, or another one than a cache was made for.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import DecoderLayer, GatedAttention, HaltingUnit, SwiGLU, ThinkLoop

        mixer = GatedAttention(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        layer = DecoderLayer(mixer, SwiGLU(intermediate_size=16))
        loop = ThinkLoop([layer], max_think_iterations=3, halting_unit=HaltingUnit())
        output = loop(np.ones((1, 4, 8), "float32"), full_output=True)
        assert output.hidden.shape == (1, 4, 8)
        assert int(output.thinking.iterations[0, 0]) <= 3
        ```

    Reference: Encode, Think, Decode, arXiv 2510.07358; Adaptive Computation Time, arXiv 1603.08983.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        max_think_iterations: int,
        halting_unit: HaltingUnit | None = None,
        granularity: str = "token",
        inference_state: str = "mean",
        backprop_iterations: int | None = None,
        sample_iterations: bool = False,
        warmup_steps: int = 0,
        input_injection: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        layers = list(layers)
        if not layers or not all(isinstance(layer, DecoderLayer) for layer in layers):
            raise ValueError(f"`layers` must be one or more DecoderLayers. Received: {layers=}")
        for name, value, known in (
            ("granularity", granularity, ("token", "sequence")),
            ("inference_state", inference_state, ("mean", "final")),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {known}. Received: {name}={value!r}")
        for name, count in (
            ("max_think_iterations", max_think_iterations),
            ("backprop_iterations", backprop_iterations),
        ):
            if count is not None and count < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={count!r}")
        self.layers = layers
        self.max_think_iterations = max_think_iterations
        self.halting_unit = halting_unit
        self.granularity = granularity
        self.inference_state = inference_state
        self.backprop_iterations = backprop_iterations
        self.sample_iterations = sample_iterations
        self.warmup_steps = warmup_steps
        self.input_injection = input_injection
        self.seed_generator: Any = keras.random.SeedGenerator() if sample_iterations else None
        self._programs: dict[tuple[str, Options], Callable[..., Any]] = {}

    def build(self, input_shape: Shape) -> None:
        shape = (None, None, input_shape[-1])
        for layer in (*self.layers, self.halting_unit):
            if layer is not None and not layer.built:
                layer.build(shape)
        self.injection: Any = None
        if self.input_injection:
            self.injection = dense(shape[-1], 0.0, "injection", self.dtype_policy)
            self.injection.build(shape)
        self.steps: Any = None
        if self.warmup_steps:
            self.steps = self.add_weight(
                name="steps", shape=(), dtype="int32", initializer="zeros", trainable=False
            )

    @property
    def by_sequence(self) -> bool:
        """Whether tokens halt by the mean over their sequence."""
        return self.halting_unit is not None and self.granularity == "sequence"

    def init_cache(
        self, batch_size: int, max_length: int, think_iterations: int | None = None
    ) -> ThinkLoopCache:
        """The caches of empty rows of up to `max_length` tokens, one for every iteration."""
        count = self._checked(think_iterations) or self.max_think_iterations
        layers = tuple(layer.init_cache(batch_size, max_length) for layer in self.layers)
        sums = ops.zeros((batch_size,), "float32") if self.by_sequence else ()
        one = ThinkLoopCache(layers, sums)
        return keras.tree.map_structure(lambda x: ops.zeros((count, *x.shape), x.dtype), one)

    def commit(
        self, cache: ThinkLoopCache, update: ThinkLoopUpdate, counts: Annotated[Tensor, "B"]
    ) -> ThinkLoopCache:
        """The cache after the first tokens of a replayable pass.

        Args:
            cache: `ThinkLoopCache` that the pass began with.
            update: `ThinkLoopUpdate` that it returned.
            counts: `(B,)` int32, tokens of every row that stay.

        Returns:
            `ThinkLoopCache`.
        """

        def commit_one(number, layers):
            olds, news = row(layers, number), row(update.layers, number)
            committed = tuple(
                layer.commit(old, new, counts)
                for layer, old, new in zip(self.layers, olds, news, strict=True)
            )
            return number + 1, with_row(layers, number, committed)

        start = (ops.zeros((), "int32"), cache.layers)
        layers = ops.while_loop(lambda number, _: number < cache.iterations, commit_one, start)[1]
        sums = cache.halting_sums
        if self.by_sequence:
            sums = ops.concatenate([sums[..., None], update.halting_sums], axis=-1)  # (k, B, 1+T)
            place = ops.broadcast_to(counts[None, :, None], (*cache.halting_sums.shape, 1))
            sums = ops.take_along_axis(sums, place, axis=-1)[..., 0]
        return ThinkLoopCache(layers, sums)

    def call(
        self,
        x: Annotated[Tensor, "B T D"],
        padding_mask: Annotated[Tensor, "B T"] | None = None,
        segment_ids: Annotated[Tensor, "B T"] | None = None,
        cache: ThinkLoopCache | None = None,
        lengths: Annotated[Tensor, "B"] | None = None,
        replayable: bool = False,
        full_output: bool = False,
        think_iterations: int | None = None,
        training: bool | None = None,
    ) -> Annotated[Tensor, "B T D"] | ThinkLoopOutput:
        output = self._run(
            ops.cast(x, self.compute_dtype),
            padding_mask,
            segment_ids,
            lengths,
            cache,
            replayable=replayable,
            think_iterations=think_iterations,
            training=training,
        )
        return output if full_output or cache is not None else output.hidden

    def _run(
        self,
        x,
        padding_mask,
        segment_ids,
        lengths,
        cache,
        *,
        replayable,
        think_iterations,
        training,
    ):
        count = self._checked(think_iterations)
        if cache is None:
            if count is None:
                count = self._training_iterations() if training else self.max_think_iterations
            seeds = tuple(layer.draw_dropout_seeds(training) for layer in self.layers)
            fixed, drawn = (count, None) if isinstance(count, int) else (None, count)
            options = Options(fixed, bool(training))
            given = Given(x, padding_mask, segment_ids, lengths, None, seeds, drawn)
            return self._program(run_uncached, options)(given)
        cache = self._as_cache(cache)
        self._check_cache(cache, count, training)
        options = Options(cache.iterations, replayable=replayable)
        given = Given(x, padding_mask, segment_ids, lengths, cache)
        return self._program(run_cached, options)(given)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def compute_output_spec(
        self,
        x: Any,
        padding_mask: Any = None,
        segment_ids: Any = None,
        cache: Any = None,
        lengths: Any = None,
        replayable: bool = False,
        full_output: bool = False,
        think_iterations: int | None = None,
        training: bool | None = None,
    ) -> Any:
        count, hidden = self._checked(think_iterations), spec_like(x, self.compute_dtype)
        if cache is None and not full_output:
            return hidden
        moes = (layer.mlp for layer in self.layers if isinstance(layer.mlp, SparseMoE))
        routing = tuple(moe.compute_output_spec(x, return_routing=True)[1] for moe in moes)
        tokens = (keras.KerasTensor(x.shape[:2], dtype) for dtype in THINKING_DTYPES)
        left: Any = ()
        if cache is not None:
            cache = self._as_cache(cache)
            self._check_cache(cache, count, training)
            left = self._left_spec(x, cache, lengths, replayable)
        return ThinkLoopOutput(hidden, left, routing, Thinking(*tokens))

    def _left_spec(self, x: Any, cache: ThinkLoopCache, lengths: Any, replayable: bool) -> Any:
        if not replayable:
            return keras.tree.map_structure(spec_like, cache)

        def one(own: Any) -> Any:
            return keras.tree.map_structure(lambda b: keras.KerasTensor(b.shape[1:], b.dtype), own)

        def stacked(spec: Any) -> Any:
            return keras.KerasTensor((cache.iterations, *spec.shape), spec.dtype)

        context = {"lengths": lengths, "replayable": True}
        updates = tuple(
            layer.mixer.compute_output_spec(x, cache=one(own), **context)[1]
            for layer, own in zip(self.layers, cache.layers, strict=True)
        )
        sums = keras.KerasTensor(x.shape[:2], "float32") if self.by_sequence else ()
        return keras.tree.map_structure(stacked, ThinkLoopUpdate(updates, sums))

    def _as_cache(self, cache: Any) -> ThinkLoopCache:
        """The cache by its names: a functional model hands over plain tuples."""
        if isinstance(cache, ThinkLoopCache):
            return cache
        template = self.init_cache(1, 1, think_iterations=1)
        return keras.tree.pack_sequence_as(template, keras.tree.flatten(cache))

    def _check_cache(self, cache: ThinkLoopCache, count: int | None, training: Any) -> None:
        if training or count not in (None, cache.iterations):
            raise ValueError(
                "A cache is for inference, with the number of iterations that it was made for. "
                f"Received: {training=}, think_iterations={count}, a cache for {cache.iterations}"
            )

    def _program(self, run: Callable[..., Any], options: Options) -> Callable[..., Any]:
        key = (run.__name__, options)
        if key not in self._programs:
            function = functools.partial(run, self, options)
            # One iteration is no loop: called eagerly, it rounds as the layers by themselves do.
            loops = options.iterations != 1
            self._programs[key] = layer_program(self, function) if loops else function
        return self._programs[key]

    def _checked(self, think_iterations: int | None) -> int | None:
        known = range(1, self.max_think_iterations + 1)
        if think_iterations is not None and (
            type(think_iterations) is not int or think_iterations not in known
        ):
            raise ValueError(
                "`think_iterations` must be an integer from 1 to `max_think_iterations`="
                f"{self.max_think_iterations}. Received: {think_iterations=}"
            )
        return think_iterations

    def _training_iterations(self) -> Any:
        """Iterations of a training step, a tensor where they differ from step to step."""
        most: Any = self.max_think_iterations
        if self.steps is not None:
            done = ops.minimum(ops.cast(self.steps, "float32") / self.warmup_steps, 1.0)
            most = 1 + ops.cast(ops.floor((most - 1) * done), "int32")
            self.steps.assign_add(1)
        if self.sample_iterations:
            drawn = keras.random.uniform((), seed=self.seed_generator) * ops.cast(most, "float32")
            most = ops.minimum(1 + ops.cast(ops.floor(drawn), "int32"), most)
        return most

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        unit = self.halting_unit
        return {
            **super().get_config(),
            "layers": [serialize(layer) for layer in self.layers],
            "max_think_iterations": self.max_think_iterations,
            "halting_unit": None if unit is None else serialize(unit),
            "granularity": self.granularity,
            "inference_state": self.inference_state,
            "backprop_iterations": self.backprop_iterations,
            "sample_iterations": self.sample_iterations,
            "warmup_steps": self.warmup_steps,
            "input_injection": self.input_injection,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        deserialize = keras.saving.deserialize_keras_object
        layers = [deserialize(layer) for layer in config["layers"]]
        unit = config["halting_unit"]
        unit = None if unit is None else deserialize(unit)
        return cls(**{**config, "layers": layers, "halting_unit": unit})
