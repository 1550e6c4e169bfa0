"""The backbone: token ids in, hidden states out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, integer, require, shown
from qwen3_next.layers import (
    Routing,
    Thinking,
    ThinkLoop,
    TokenEmbedding,
    load_balancing_loss,
)
from qwen3_next.layers.initializers import Normal
from qwen3_next.layers.norms import make_norm
from qwen3_next.layers.ops.backend.sharding import constrain
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.assembly import make_decoder_layer, make_think_loop
from qwen3_next.models.cache import Cache, CacheUpdate, check_cache
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.decisions import check_decisions
from qwen3_next.models.inputs import host_values, unpack
from qwen3_next.models.schedule import Schedule


class BackboneOutput(NamedTuple):
    """What a pass through the backbone gives.

    Attributes:
        hidden: `(B, T, D)` after the final norm.
        before_norm: `(B, T, D)` before it.
        cache: `Cache` with the new tokens, or `None` without one and in a replayable pass.
        update: `CacheUpdate` of a replayable pass, else `None`.
        aux_loss: `()` float32, the load-balancing loss before its coefficient; `None` for a dense
            model.
        expert_load: `(MoE layers, E)` float32, tokens per expert relative to an even load; `None`
            for a dense model.
        thinking: `Thinking`, how long every token thought; `None` without a think loop.
        routings: `Routing` of every MoE layer, which the two are computed from.
    """

    hidden: Tensor
    before_norm: Tensor
    cache: Cache | None = None
    update: CacheUpdate | None = None
    aux_loss: Tensor | None = None
    expert_load: Tensor | None = None
    thinking: Thinking | None = None
    routings: tuple[Routing, ...] = ()


@keras.saving.register_keras_serializable(package="qwen3_next")
class Qwen3NextBackbone(ConfiguredModel):
    """Embedding, decoder layers and final norm of a Qwen3-Next model.

    Args:
        config: `Qwen3NextConfig`, or its fields as keyword arguments.
        gradient_checkpointing: Whether training recomputes the inside of every layer in the
            backward pass instead of keeping it.
        base: `Qwen3NextBackbone` whose embedding, layers and final norm to share, or `None` for new
            ones. Its configuration must be that of this one, but for `etd`.
        dtype: Dtype policy of all layers.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and optionally `"padding_mask"`
            (true at real tokens, anywhere in the row), `"segment_ids"` (packed sequences), and for
            the routers of a think loop `"prompt_mask"` (true at the tokens that they decide from)
            or, in place of what they say, `"route"` `(B, L)` and `"branch"` `(B,)`. What a cache
            holds was decided when it was begun.
        cache: `Cache` to continue from, or `None`. A cache holds one sequence per row.
        full_output: Whether to return a `BackboneOutput` without a cache, too.
        replayable: Whether to return a `CacheUpdate` for `commit` instead of the new cache, so
            that any number of the tokens may be kept. Real tokens must stand at the front of a
            row then.
        think_iterations: Iterations of the think loop, `None` for the configuration's or those the
            cache was made for.
        training: Whether to apply dropout and checkpointing.

    Returns:
        Hidden states `(B, T, D)`; with a cache or `full_output` a `BackboneOutput`.

    Raises:
        ValueError: inputs of the wrong kind, too many tokens, segments together with a cache, a
            replayable pass without one, or a number of iterations out of range.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3NextBackbone

    backbone = Qwen3NextBackbone.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=4)
    token_ids = np.array([[1, 2, 3]])
    output = backbone(token_ids, cache=backbone.init_cache(batch_size=1, max_length=8))
    assert output.hidden.shape == (1, 3, 32)
    assert len(output.cache.layers) == 4
    ```
    """

    def __init__(
        self,
        config: Qwen3NextConfig | None = None,
        *,
        gradient_checkpointing: bool = False,
        base: "Qwen3NextBackbone | None" = None,
        name: str | None = None,
        dtype: Any = None,
        **fields: Any,
    ):
        super().__init__(config, name=name, dtype=dtype, **fields)
        self.refuse_mtp()
        require(BOOLEAN, "gradient_checkpointing", gradient_checkpointing)
        self.gradient_checkpointing = gradient_checkpointing
        self.schedule = Schedule.from_config(self.config)
        if base is None:
            self._make_layers()
        else:
            self._share_layers(base)
        self.think_loop: ThinkLoop | None = None
        etd = self.config.etd
        if etd is not None:
            first, behind = etd.get_layer_ranges()["think"]
            layers = self.decoder_layers[first:behind]
            self.think_loop = make_think_loop(self.config, etd, layers, self.dtype_policy)
        self.build()

    def _make_layers(self):
        config, policy = self.config, self.dtype_policy
        self.embed_tokens = TokenEmbedding(
            config.vocab_size,
            config.hidden_size,
            embeddings_initializer=Normal(config.initializer_range),
            name="embed_tokens",
            dtype=policy,
        )
        self.decoder_layers = [
            make_decoder_layer(
                config,
                config.layer_types[i],
                config.is_moe(i),
                gradient_checkpointing=self.gradient_checkpointing,
                name=f"layers_{i}",
                dtype=policy,
            )
            for i in range(config.num_layers)
        ]
        self.norm = make_norm(config.normalization_type, config.rms_norm_eps, "norm", policy)

    def _share_layers(self, base):
        config = getattr(base, "config", None)
        if config is None or config.replace(etd=None) != self.config.replace(etd=None):
            raise ValueError(
                "`base` must be a backbone with the configuration of this one, but for `etd`. "
                f"Received: base={base}, base.config={config}, config={self.config}"
            )
        # In the order of `_make_layers`: an optimizer files its state in the order of variables.
        self.embed_tokens = base.embed_tokens
        self.decoder_layers = list(base.decoder_layers)
        self.norm = base.norm

    def build(self, input_shape: Any = None) -> None:
        if self.built:
            return
        shape = (None, None, self.config.hidden_size)
        self.embed_tokens.build((None, None))
        for layer in (*self.decoder_layers, self.norm, self.think_loop):
            if layer is not None and not layer.built:
                layer.build(shape)
        self.built = True

    def _blocks(self) -> list[Any]:
        """What runs one after the other, as the schedule says."""
        # No property: Keras would file the layers of a `.keras` file under its name.
        return [
            self.think_loop if block.loops else self.decoder_layers[block.layers.start]
            for block in self.schedule.blocks
        ]

    def init_cache(
        self, batch_size: int, max_length: int, think_iterations: int | None = None
    ) -> Cache:
        """An empty cache for sequences of up to `max_length` tokens.

        Args:
            batch_size: Rows.
            max_length: Most tokens of a row.
            think_iterations: Iterations of the think loop of all calls with it, `None` for the
                configuration's.
        """
        require(integer(1), "batch_size", batch_size)
        require(integer(1), "max_length", max_length)
        if max_length > self.config.max_position_embeddings:
            raise ValueError(
                "`max_length` must be between 1 and `max_position_embeddings`="
                f"{self.config.max_position_embeddings}. Received: {max_length=}"
            )
        self.schedule.check_iterations(think_iterations)
        caches = (
            block.init_cache(
                batch_size,
                max_length,
                **({"think_iterations": think_iterations} if block is self.think_loop else {}),
            )
            for block in self._blocks()
        )
        return Cache(ops.zeros((batch_size,), "int32"), tuple(caches))

    def call(
        self,
        inputs,
        cache=None,
        full_output=False,
        replayable=False,
        think_iterations=None,
        training=None,
    ):
        inputs = unpack(inputs)
        self._check(inputs, cache, replayable, think_iterations)
        hidden = constrain(self.embed_tokens(inputs.token_ids))
        left: list[Any] = []
        routings: list[Routing] = []
        thinking = None
        for index, block in enumerate(self._blocks()):
            output = block(
                hidden,
                padding_mask=inputs.padding_mask,
                segment_ids=inputs.segment_ids,
                cache=None if cache is None else cache.blocks[index],
                lengths=None if cache is None else cache.lengths,
                full_output=True,
                replayable=replayable,
                training=training,
                **self._thinking_options(block, inputs, think_iterations),
            )
            hidden, block_left, routing = output[:3]
            left.append(block_left)
            routings += [routing] if isinstance(routing, Routing) else routing
            thinking = output.thinking if block is self.think_loop else thinking
        before_norm, hidden = hidden, self.norm(hidden)
        if cache is None and not full_output:
            return hidden
        update = None
        if replayable:
            cache, update = None, CacheUpdate(tuple(left))
        elif cache is not None:
            cache = Cache(cache.lengths + _new_lengths(inputs), tuple(left))
        aux_loss, expert_load = balance(self.config, routings)
        found = aux_loss, expert_load, thinking, tuple(routings)
        return BackboneOutput(hidden, before_norm, cache, update, *found)

    def _thinking_options(self, block, inputs, think_iterations):
        if block is not self.think_loop:
            return {}
        decided = {name: getattr(inputs, name) for name in ("prompt_mask", "route", "branch")}
        return {"think_iterations": think_iterations, **decided}

    def _check(self, inputs, cache, replayable, think_iterations):
        self.schedule.check_iterations(think_iterations)
        if cache is not None:
            check_cache(cache, inputs.token_ids.shape[0])
            think_iterations = think_iterations or cache.think_iterations
        check_decisions(self.config, inputs, think_iterations)
        length, longest = inputs.token_ids.shape[1], self.config.max_position_embeddings
        if length is not None and length > longest:
            raise ValueError(
                f"Sequences must have at most `max_position_embeddings`={longest} tokens. "
                f"Received: {length} tokens"
            )
        if cache is not None and inputs.segment_ids is not None:
            raise ValueError(
                "A cache holds one sequence per row: `segment_ids` must be None with a cache. "
                f"Received: segment_ids={inputs.segment_ids}"
            )
        decided = inputs.prompt_mask is not None or inputs.route is not None
        if cache is not None and (decided or inputs.branch is not None):
            lengths = host_values("lengths", cache.lengths)
            if lengths is not None and lengths.any():
                raise ValueError(
                    "What is decided for a row holds for all of its tokens: `prompt_mask`, `route` "
                    "and `branch` go with the first tokens of a cache. "
                    f"Received: them with a cache of {lengths} tokens"
                )
        if replayable and cache is None:
            raise ValueError(
                "A replayable pass continues a cache. Received: replayable=True, cache=None"
            )

    def commit(self, cache: Cache, update: CacheUpdate, counts: Tensor) -> Cache:
        """The cache after the first tokens of a replayable pass.

        Args:
            cache: `Cache` the pass began with.
            update: `CacheUpdate` that it returned.
            counts: `(B,)` integers, tokens of every row that stay.

        Returns:
            `Cache`.

        Raises:
            ValueError: counts of another shape, or negative ones.
        """
        values = host_values("counts", counts)
        if values is not None and (values.shape != cache.lengths.shape or (values < 0).any()):
            raise ValueError(
                f"`counts` must be {cache.lengths.shape[0]} integers of at least 0. "
                f"Received: counts={shown(counts)}"
            )
        counts = ops.convert_to_tensor(counts, "int32")
        parts = zip(self._blocks(), cache.blocks, update.blocks, strict=True)
        committed = tuple(block.commit(old, new, counts) for block, old, new in parts)
        return Cache(cache.lengths + counts, committed)

    def update_expert_bias(self, rate: float | None = None) -> None:
        """Moves the selection bias of LoRA experts, where there are any; see `ExpertRouter`."""
        router = None if self.think_loop is None else self.think_loop.expert_router
        if router is not None:
            router.update_bias(rate)

    def freeze(self) -> None:
        """Freezes embedding, layers and final norm, but not what a think loop has beyond them."""
        for layer in (self.embed_tokens, *self.decoder_layers, self.norm):
            layer.trainable = False

    def output_shape_of(self, batch: int | None, length: int | None) -> tuple:
        return (batch, length, self.config.hidden_size)

    def get_config(self) -> dict:
        return {**super().get_config(), "gradient_checkpointing": self.gradient_checkpointing}


def _new_lengths(inputs):
    """Real tokens of every row, `(B,)` int32, or their number for all rows."""
    if inputs.padding_mask is None:
        return ops.shape(inputs.token_ids)[1]
    return valid_lengths(inputs.padding_mask)


def balance(config: Qwen3NextConfig, routings: Sequence[Routing]) -> tuple:
    """Load-balancing loss and relative expert load of the MoE layers, `None` without any."""
    if not routings:
        return None, None
    loads = ops.stack([routing.tokens_per_expert for routing in routings])
    even = ops.maximum(ops.mean(loads, axis=-1, keepdims=True), 1e-9)
    by_layer = config.router_aux_loss_scope == "layer"
    return load_balancing_loss(routings, by_layer), loads / even
