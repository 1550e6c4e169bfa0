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
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

import keras
from keras import ops

from .adapters import build_experts
from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .decoder_layer import DecoderLayer, both_masks
from .expert_router import NO_EXPERT, UNFORCED, ExpertRouter
from .halting_unit import HaltingUnit
from .layer_router import LayerRouter
from .lora_experts import LoRAExperts
from .ops.backend.layer_programs import layer_program
from .ops.checks import as_mask
from .ops.tensor_types import Tensor
from .projection import dense
from .shapes import Shape
from .think_passes import run_cached, run_uncached
from .think_routing import check_routing
from .think_specs import loop_spec, named_cache
from .think_types import (
    Given,
    Options,
    ThinkLoopCache,
    ThinkLoopOutput,
    ThinkLoopUpdate,
    row,
    with_row,
)


@keras.saving.register_keras_serializable(package="qwen3_next")
class ThinkLoop(CheckedLayer):
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
        routers: One `LayerRouter` per layer, which says how often it runs for a row, or none.
        use_gumbel: Whether the routers draw their actions in training, and learn from its loss.
        router_warmup_steps: Training steps in which every layer runs once all the same.
        expert_router: `ExpertRouter` that chooses among `experts`, or `None`.
        experts: For every layer its `LoRAExperts` by the name of the projection that they change,
            or `"block_output"`.
        reselect: Whether every iteration chooses an expert anew.
        expert_warmup_steps: Training steps in which all experts take part with equal weights.

    Call arguments:
        x: `(B, T, D)`.
        padding_mask, segment_ids, cache, lengths, replayable, full_output, training: As for a
            `DecoderLayer`.
        think_iterations: Iterations of this call, from 1 to `max_think_iterations`. `None` for
            those of the cache, in training for what sampling and warm-up say, else for the most.
            One iteration is a pass through the layers and nothing else.
        prompt_mask: `(B, T)` bool, true at the tokens from which routers decide. Without it, and
            without a cache that holds a decision, every layer runs and no row chooses an expert.
        route: `(B, L)` int32, how often each layer runs for a row (0, 1 or 2), in place of what the
            routers say.
        branch: `(B,)` int32, the expert of a row in all iterations, or `(B, k)` in each, likewise.

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
        routers: Sequence[LayerRouter] = (),
        use_gumbel: bool = False,
        router_warmup_steps: int = 0,
        expert_router: ExpertRouter | None = None,
        experts: Sequence[Mapping[str, LoRAExperts]] = (),
        reselect: bool = True,
        expert_warmup_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        layers = list(layers)
        if not layers or not all(isinstance(layer, DecoderLayer) for layer in layers):
            raise ValueError(f"`layers` must be one or more DecoderLayers. Received: {layers=}")
        for name, parts, wanted in (
            ("routers", routers, bool(routers)),
            ("experts", experts, expert_router is not None),
        ):
            if len(parts) != (len(layers) if wanted else 0):
                raise ValueError(
                    f"`{name}` must be one per layer, {len(layers)}, or none. "
                    f"Received: {len(parts)} {name}, {expert_router=}"
                )
        self.layers = layers
        self.max_think_iterations = max_think_iterations
        self.halting_unit = halting_unit
        self.granularity = granularity
        self.inference_state = inference_state
        self.backprop_iterations = backprop_iterations
        self.sample_iterations = sample_iterations
        self.warmup_steps = warmup_steps
        self.input_injection = input_injection
        self.routers = list(routers)
        self.use_gumbel = use_gumbel and bool(routers)
        self.router_warmup_steps = router_warmup_steps
        self.expert_router = expert_router
        self.experts = [dict(one) for one in experts]
        self.reselect = reselect
        self.expert_warmup_steps = expert_warmup_steps
        draws = sample_iterations or self.use_gumbel
        self.seed_generator: Any = keras.random.SeedGenerator() if draws else None
        self._programs: dict[tuple[str, Options], Callable[..., Any]] = {}

    def build(self, input_shape: Shape) -> None:
        shape = (None, None, input_shape[-1])
        for layer in (*self.layers, self.halting_unit, *self.routers, self.expert_router):
            if layer is not None and not layer.built:
                layer.build(shape)
        for layer, experts in zip(self.layers, self.experts):
            build_experts(experts, layer.mixer.projections(), shape)
        self.injection: Any = None
        if self.input_injection:
            self.injection = dense(shape[-1], 0.0, "injection", self.dtype_policy)
            self.injection.build(shape)
        self.steps: Any = None
        if self.warmup_steps or self.router_warmup_steps or self.expert_warmup_steps:
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
        count = self.checked_iterations(think_iterations) or self.max_think_iterations
        layers = tuple(layer.init_cache(batch_size, max_length) for layer in self.layers)
        sums = ops.zeros((batch_size,), "float32") if self.by_sequence else ()
        repeats: tuple = ()
        route: Any = ()
        branch: Any = ()
        forced: Any = ()
        if self.routers:
            repeats = tuple(layer.init_cache(batch_size, max_length) for layer in self.layers)
            route = ops.ones((batch_size, len(self.layers)), "int32")
        if self.expert_router is not None and self.expert_router.granularity == "sequence":
            branch = ops.full((batch_size,), NO_EXPERT, "int32")
        elif self.expert_router is not None:
            forced = ops.full((batch_size,), UNFORCED, "int32")
        one = ThinkLoopCache(layers, sums, repeats, route, branch, forced)
        return keras.tree.map_structure(lambda x: ops.repeat(x[None], count, axis=0), one)

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

        news = (update.layers, update.repeats)

        def commit_one(number, olds):
            committed = tuple(
                tuple(map(lambda layer, *pair: layer.commit(*pair, counts), self.layers, *turn))
                for turn in zip(row(olds, number), row(news, number), strict=True)
            )
            return number + 1, with_row(olds, number, committed)

        start = (ops.zeros((), "int32"), (cache.layers, cache.repeats))
        count = cache.iterations
        layers, repeats = ops.while_loop(lambda number, _: number < count, commit_one, start)[1]
        sums = cache.halting_sums
        if self.by_sequence:
            sums = ops.concatenate([sums[..., None], update.halting_sums], axis=-1)  # (k, B, 1+T)
            place = ops.broadcast_to(counts[None, :, None], (*cache.halting_sums.shape, 1))
            sums = ops.take_along_axis(sums, place, axis=-1)[..., 0]
        return cache._replace(layers=layers, halting_sums=sums, repeats=repeats)

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
        prompt_mask: Annotated[Tensor, "B T"] | None = None,
        route: Annotated[Tensor, "B L"] | None = None,
        branch: Annotated[Tensor, "B ..."] | None = None,
    ) -> Annotated[Tensor, "B T D"] | ThinkLoopOutput:
        count = self.checked_iterations(think_iterations)
        check_routing(self, prompt_mask, segment_ids, route, branch)
        prompt = both_masks(padding_mask, prompt_mask) if prompt_mask is not None else None
        given = Given(
            ops.cast(x, self.compute_dtype),
            as_mask(padding_mask),
            segment_ids,
            lengths,
            prompt=prompt,
            route=None if route is None else ops.convert_to_tensor(route, "int32"),
            branch=None if branch is None else ops.convert_to_tensor(branch, "int32"),
        )
        if cache is None:
            output = self._run_uncached(given, count, bool(training))
        else:
            cache = named_cache(self, cache)
            self.check_cache(cache, count, training)
            options = Options(cache.iterations, replayable=replayable)
            output = self._program(run_cached, options)(given._replace(cache=cache))
        return output if full_output or cache is not None else output.hidden

    def _run_uncached(self, given, count, training):
        if training:
            given = given._replace(**self._drawn(), **self._warming())
        if count is None:
            count = self._training_iterations() if training else self.max_think_iterations
        if training and self.steps is not None:
            self.steps.assign_add(1)
        seeds = tuple(layer.draw_dropout_seeds(training) for layer in self.layers)
        fixed, drawn = (count, None) if isinstance(count, int) else (None, count)
        given = given._replace(seeds=seeds, drawn=drawn)
        output = self._program(run_uncached, Options(fixed, training))(given)
        selections = output.thinking.selections
        if training and self.expert_router is not None and not isinstance(selections, tuple):
            self.expert_router.count(selections)
        return output

    def _drawn(self):
        """The seeds of a training step beside those of the layers."""
        found: dict[str, Any] = {}
        if self.use_gumbel:
            found["route_seeds"] = tuple(self.seed_generator.next() for _ in self.routers)
        seeds = tuple(
            {name: expert.draw_dropout_seed(True) for name, expert in one.items() if expert.dropout}
            for one in self.experts
        )
        return {**found, "expert_seeds": seeds} if any(seeds) else found

    def _warming(self):
        """Which parts are still warming up."""
        steps = {
            "warm_routes": self.router_warmup_steps if self.routers else 0,
            "warm_experts": self.expert_warmup_steps if self.experts else 0,
        }
        return {name: ops.less(self.steps, most) for name, most in steps.items() if most}

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def compute_output_spec(self, x: Any, **options: Any) -> Any:
        return loop_spec(self, x, **options)

    def check_cache(self, cache: ThinkLoopCache, count: int | None, training: Any) -> None:
        """Raises `ValueError` for a cache that does not belong to a call."""
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

    def checked_iterations(self, think_iterations: int | None) -> int | None:
        """The argument; `ValueError` where it is out of range."""
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
        if self.warmup_steps:
            done = ops.minimum(ops.cast(self.steps, "float32") / self.warmup_steps, 1.0)
            most = 1 + ops.cast(ops.floor((most - 1) * done), "int32")
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
            "routers": [serialize(router) for router in self.routers],
            "use_gumbel": self.use_gumbel,
            "router_warmup_steps": self.router_warmup_steps,
            "expert_router": serialize(self.expert_router) if self.expert_router else None,
            "experts": [{k: serialize(v) for k, v in one.items()} for one in self.experts],
            "reselect": self.reselect,
            "expert_warmup_steps": self.expert_warmup_steps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        deserialize = keras.saving.deserialize_keras_object
        config = dict(config)
        for name in ("layers", "routers"):
            config[name] = [deserialize(layer) for layer in config.get(name, ())]
        for name in ("halting_unit", "expert_router"):
            part = config.get(name)
            config[name] = None if part is None else deserialize(part)
        experts = config.get("experts", ())
        config["experts"] = [{k: deserialize(v) for k, v in one.items()} for one in experts]
        return cls(**config)
