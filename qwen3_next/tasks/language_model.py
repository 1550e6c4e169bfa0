"""The language model: the backbone, the head over the vocabulary, training and generation."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import keras
import numpy as np
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, integer, require
from qwen3_next.generation.generator import Generation, Generator
from qwen3_next.layers import MultiTokenPrediction
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.assembly import make_head
from qwen3_next.models.backbone import BackboneOutput, Qwen3NextBackbone
from qwen3_next.models.cache import Cache, check_capacity
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.inputs import check_labels, check_token_ids, next_token_labels, unpack
from qwen3_next.models.mtp import make_mtp_modules
from qwen3_next.models.token_counts import TokenCounts
from qwen3_next.tasks.task import Task
from qwen3_next.training.mtp_losses import step_losses, weighted_sum
from qwen3_next.training.next_token_training import NextTokenTraining, StepInputs, StepOutput


class LanguageModelOutput(NamedTuple):
    """What a call with labels gives.

    Attributes:
        logits: `(B, T, vocab)`.
        loss: `()`, the mean cross-entropy over the labels plus `router_aux_loss_coef` times
            `aux_loss` plus `mtp_loss`.
        aux_loss: `()`, the load-balancing loss, or `None` for a dense model.
        mtp_loss: `()`, the weighted sum over the steps of multi-token prediction as it stands in
            `loss`, or `None` without them.
        mtp_step_losses: Maps `"mtp_loss_k1"`, `"mtp_loss_k2"`, ... to the mean cross-entropies of
            the steps, or `None`.
    """

    logits: Tensor
    loss: Tensor
    aux_loss: Tensor | None
    mtp_loss: Tensor | None = None
    mtp_step_losses: dict[str, Tensor] | None = None


@keras.saving.register_keras_serializable(package="qwen3_next")
class Qwen3Next(NextTokenTraining, Task):
    """Qwen3-Next language model.

    `fit(x, y)` trains on labels that line up with the logits; `fit(x)` alone trains on the next
    token of x. Labels of -100 and labels at padding are ignored. Neither holds the logits of the
    whole batch: the cross-entropy is fused with the head, unless a metric or a loss of one's own
    asks for logits. `evaluate` and `train_on_batch` return the loss, or a list with the compiled
    metrics behind it; the load of the experts and what MTP steps reach come with `return_dict`.

    A training loop of one's own finds the load-balancing loss, times its coefficient, in
    `model.losses` after a call with `training=True`, as every loss that Keras layers add (on JAX
    `stateless_call(..., training=True, return_losses=True)` returns it).

    Args:
        config: `Qwen3NextConfig`, or its fields as keyword arguments.
        gradient_checkpointing: Whether training recomputes the inside of every layer in the
            backward pass instead of keeping it.
        freeze_backbone: Whether embedding, layers and head are frozen, so that only the MTP
            modules learn.
        backbone: `Qwen3NextBackbone` to build on and to share, or `None` for a new one. Its
            configuration must be that of the model, but for `mtp`.
        lm_head: Head to share, as another model's `lm_head`, or `None` for a new one.
        dtype: Dtype policy of all layers, such as `"mixed_bfloat16"`.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and optionally `"padding_mask"`
            (true at real tokens, anywhere in the row) and `"segment_ids"` (packed sequences).
        labels: `(B, T)` unshifted token ids, -100 where ignored; the shift happens inside.
        training: Whether to apply dropout and checkpointing.

    Returns:
        Logits `(B, T, vocab)`; with labels a `LanguageModelOutput`.

    Raises:
        ValueError: a configuration or an option out of range, or a backbone of another
            configuration.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=1)
    model.compile("adamw")
    model.fit(np.ones((2, 8), "int32"), verbose=0)
    tokens, stats = model.generate([[1, 2, 3]], max_new_tokens=4)
    assert len(tokens[0]) == 4
    ```

    The terms of a loss, for a training loop of one's own:

    ```python
    import keras

    token_ids = np.ones((2, 8), "int32")
    logits = model(token_ids, training=True)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = cross_entropy(token_ids[:, 1:], logits[:, :-1]) + sum(model.losses)
    assert len(model.losses) == 1
    ```
    """

    def __init__(
        self,
        config: Qwen3NextConfig | None = None,
        *,
        gradient_checkpointing: bool = False,
        freeze_backbone: bool = False,
        backbone: Qwen3NextBackbone | None = None,
        lm_head: keras.layers.Dense | None = None,
        name: str | None = None,
        dtype: Any = None,
        **fields: Any,
    ):
        super().__init__(config, name=name, dtype=dtype, **fields)
        require(BOOLEAN, "gradient_checkpointing", gradient_checkpointing)
        require(BOOLEAN, "freeze_backbone", freeze_backbone)
        if freeze_backbone and self.config.mtp is None:
            raise ValueError(
                "`freeze_backbone` leaves nothing to train without multi-token prediction. "
                f"Received: {freeze_backbone=}, mtp=None"
            )
        self.gradient_checkpointing = gradient_checkpointing
        self.freeze_backbone = freeze_backbone
        self._set_backbone(backbone)
        self._set_head(lm_head)
        self._add_mtp_modules()
        self.add_training_metrics()
        self.generator = Generator(self)
        self._extend = compile_with_weights(self, self._extend_inputs)
        self.built = True

    def _set_backbone(self, backbone):
        config = self.config.replace(mtp=None)
        if backbone is None:
            backbone = Qwen3NextBackbone(
                config,
                gradient_checkpointing=self.gradient_checkpointing,
                name="model",
                dtype=self.dtype_policy,
            )
        elif getattr(backbone, "config", None) != config:
            raise ValueError(
                "`backbone` must have the configuration of the model, but for `mtp`. "
                f"Received: backbone={backbone}, config={config}"
            )
        self.backbone = backbone
        if self.freeze_backbone:
            backbone.trainable = False

    def _set_head(self, lm_head):
        tied = self.config.tie_word_embeddings
        if lm_head is None and not tied:
            lm_head = make_head(self.config, self.config.vocab_size, "lm_head", self.dtype_policy)
        if lm_head is not None:
            shape = (self.config.hidden_size, self.config.vocab_size)
            if tied or tuple(lm_head.kernel.shape) != shape:
                raise ValueError(
                    "`lm_head` must be None with tied embeddings, else have a kernel of shape "
                    f"{shape}. Received: lm_head.kernel.shape={tuple(lm_head.kernel.shape)}, "
                    f"tie_word_embeddings={tied}"
                )
            if self.freeze_backbone:
                lm_head.trainable = False
        self.lm_head = lm_head

    def _add_mtp_modules(self):
        mtp = self.config.mtp
        self.mtp_modules, self.mtp_steps, self.token_counts = [], None, None
        if mtp is None:
            return
        self.mtp_modules = make_mtp_modules(
            self.config, self.gradient_checkpointing, self.dtype_policy
        )
        if mtp.warmup_steps:
            self.mtp_steps = self.add_weight(
                name="mtp_steps", shape=(), dtype="int32", initializer="zeros", trainable=False
            )
        if mtp.draft_vocab_size_of(self.config.vocab_size):
            self.token_counts = TokenCounts(self.config.vocab_size, name="token_counts")

    def frequent_tokens(self) -> Annotated[np.ndarray, "n"] | None:
        """The tokens to draft from, or `None` for all: by choice, or as nothing was learned yet."""
        mtp = self.config.mtp
        if mtp is None or self.token_counts is None:
            return None
        return self.token_counts.most_frequent(mtp.draft_vocab_size_of(self.config.vocab_size))

    def mtp_module(self, step: int) -> MultiTokenPrediction:
        """The module that runs step `step` (from 1) of multi-token prediction."""
        steps = 0 if self.config.mtp is None else self.config.mtp.num_predict_tokens
        require(integer(1, steps), "step", step)
        return self.mtp_modules[0 if len(self.mtp_modules) == 1 else step - 1]

    def mtp_input(self, output: BackboneOutput) -> Annotated[Tensor, "B T D"]:
        """What the first step reads of a `BackboneOutput`."""
        mtp = self.config.mtp
        before = mtp is not None and mtp.hidden_state == "before_norm"
        return output.before_norm if before else output.hidden

    def __call__(self, inputs, labels=None, **kwargs):
        if labels is None:
            return super().__call__(inputs, **kwargs)
        self.check_labels(labels)
        return super().__call__(inputs, labels=labels, **kwargs)

    def call(self, inputs, labels=None, training=None):
        if isinstance(inputs, StepInputs):
            return self._step_output(inputs, training)
        output = self.backbone(inputs, full_output=True, training=training)
        logits = self.logits(output.hidden)
        if labels is None:
            if training and output.aux_loss is not None:
                self.add_loss(self.config.router_aux_loss_coef * output.aux_loss)
            return logits
        inputs = unpack(inputs)
        labels = next_token_labels(inputs, labels)
        loss = self.mean_loss(labels, hidden=output.hidden)
        if output.aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * output.aux_loss
        if not self.mtp_modules:
            return LanguageModelOutput(logits, loss, output.aux_loss)
        steps = step_losses(self, self.mtp_input(output), inputs, labels, training=training)
        mtp_loss = weighted_sum(self, steps)
        by_step = {f"mtp_loss_k{k}": step for k, step in enumerate(steps.losses, start=1)}
        return LanguageModelOutput(logits, loss + mtp_loss, output.aux_loss, mtp_loss, by_step)

    def _step_output(self, inputs, training):
        output = self.backbone(inputs.inputs, full_output=True, training=training)
        return StepOutput(
            hidden=output.hidden,
            mtp_input=self.mtp_input(output) if self.mtp_modules else None,
            aux_loss=output.aux_loss,
            expert_load=output.expert_load,
        )

    def check_labels(self, labels: Any) -> None:
        """Raises `ValueError` for labels that are neither token ids nor -100."""
        check_labels(labels, self.config.vocab_size, ignored=True)

    def output_shape_of(self, batch: int | None, length: int | None) -> tuple:
        return (batch, length, self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `(..., D)` -> logits `(..., vocab)`."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return ops.matmul(hidden, ops.cast(self.head_kernel(), hidden.dtype))

    def head_kernel(self) -> Annotated[Tensor, "D V"]:
        """Kernel `(D, vocab)` of the head."""
        if self.lm_head is not None:
            return ops.convert_to_tensor(self.lm_head.kernel)
        return ops.transpose(ops.convert_to_tensor(self.backbone.embed_tokens.embeddings))

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty `Cache` for sequences of up to `max_length` tokens."""
        return self.backbone.init_cache(batch_size, max_length)

    def extend(self, inputs: Tensor | dict, cache: Cache) -> tuple[Tensor, Cache]:
        """Reads one or more new tokens of every row, compiled once per shape.

        A sequence read in one chunk or in several, padded or not, gives the same logits and the
        same cache.

        Args:
            inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and `"padding_mask"`; rows may
                have different numbers of new tokens, or none.
            cache: `Cache` from `init_cache` or from a call before. It is left as it is.

        Returns:
            `(logits (B, T, vocab), cache)`.

        Raises:
            ValueError: packed inputs, or a cache without room for the new tokens.
        """
        check_token_ids(inputs, self.config.vocab_size)
        token_ids, padding_mask, segment_ids = unpack(inputs)
        if segment_ids is not None:
            raise ValueError(
                "A cache holds one sequence per row: `segment_ids` must be None with a cache. "
                f"Received: segment_ids={segment_ids}"
            )
        if padding_mask is None:
            padding_mask = ops.ones_like(token_ids, "bool")
        check_capacity(cache, padding_mask)
        return self._extend(token_ids, padding_mask, cache)

    def _extend_inputs(self, token_ids, padding_mask, cache):
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        output = self.backbone(inputs, cache=cache)
        return self.logits(output.hidden), output.cache

    def generate(
        self,
        prompts: Iterable | dict,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Iterable[int] = (),
        use_speculative: bool | None = None,
        speculation_lookahead: int | None = None,
        draft_vocabulary: Iterable[int] | str | None = None,
        acceptance_threshold: float | None = None,
        measure_baseline: bool = False,
    ) -> Generation:
        """Continues every prompt.

        With multi-token prediction the modules draft and the model verifies: the tokens follow the
        same distribution as without it, and are the same with `temperature=0` (in float32; in
        bfloat16 passes of different widths round differently).

        Args:
            prompts: List of token-id sequences of any lengths, an array `(B, T)`, or a dict with
                `"token_ids"` and `"padding_mask"`, padded on any side.
            max_new_tokens: Most tokens to add to a row.
            temperature: 0 takes the likeliest token; above, logits are divided by it.
            top_k: Sample from the k likeliest tokens; 0 for all.
            top_p: Sample from the fewest tokens whose probability reaches this.
            min_p: Sample from the tokens at least this many times as likely as the likeliest.
            seed: Integer that makes sampling repeatable; by default drawn from Python's `random`,
                which `keras.utils.set_random_seed` seeds.
            stop_token_ids: Tokens that end a row. The row keeps the one it met.
            use_speculative: Whether to speculate. With `None` one of the arguments below asks for
                it. Without them, at `temperature=0`, it is done where it is faster: of new shapes
                the first calls measure, see `generation.lookahead_choice`. Other temperatures
                decode plainly, so that what is drawn does not depend on times, and a seed gives
                the same tokens in every run.
            speculation_lookahead: Tokens to draft before a verification, at most
                `num_predict_tokens`. Defaults to the configuration's.
            draft_vocabulary: Token ids that may be drafted: a smaller product for every draft. Any
                token may still be generated. `"all"` for all of them. Defaults to the
                `draft_vocab_size` most frequent tokens of the data the modules learned from in
                `fit`, to all before that.
            acceptance_threshold: Lossy: accept also every draft that the model gives at least this
                probability. The tokens no longer follow the model's distribution.
            measure_baseline: Whether to time plain decoding as well (both run once before).

        Returns:
            `Generation(tokens, stats)`: a list with one int32 array of new tokens per row, and a
            dict with `prompt_tokens`, `new_tokens`, `lookahead` (drafts per step, 0 in plain
            decoding), `steps`, `finish_reasons` (`"stop"` or `"length"`), `prefill_seconds`,
            `decode_seconds` (both with compilation where it was needed) and `tokens_per_second`.

            Speculation adds `verify_steps` (passes through the backbone after the prompt),
            `drafted` and `accepted` tokens, `acceptance_rate_by_position` (how often a draft and
            all before it were accepted), `avg_acceptance_rate`, `tokens_per_step` of a row,
            `draft_vocab_size` (tokens that were drafted from), `lossy`, and `speedup` over plain
            decoding: the measured one, `None` where none was measured. `measure_baseline` measures
            the whole call (also as `wall_clock_speedup`).

            Where `use_speculative=None` left the choice to measurements, `seconds_per_token` maps
            every number of drafts that was timed at these shapes to the time of a token, at the
            rate at which drafts are being accepted; `speedup` compares these.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, an argument out of range,
                or more tokens than `max_position_embeddings`.
        """
        return self.generator.generate(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop_token_ids=stop_token_ids,
            use_speculative=use_speculative,
            speculation_lookahead=speculation_lookahead,
            draft_vocabulary=draft_vocabulary,
            acceptance_threshold=acceptance_threshold,
            measure_baseline=measure_baseline,
        )

    def stream(
        self, prompts: Iterable | dict, max_new_tokens: int = 128, **sampling: Any
    ) -> Iterator[np.ndarray]:
        """As `generate`, but an iterator that yields each step's tokens as they are made.

        Args:
            prompts, max_new_tokens: As for `generate`.
            **sampling: Its arguments on sampling and stop tokens. Decoding is plain.

        Returns:
            Iterator of `(B,)` int32, -1 in rows that have ended.
        """
        return self.generator.stream(prompts, max_new_tokens, **sampling)

    @staticmethod
    def constructor_options() -> tuple[str, ...]:
        return ("gradient_checkpointing", "freeze_backbone")

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "gradient_checkpointing": self.gradient_checkpointing,
            "freeze_backbone": self.freeze_backbone,
        }
