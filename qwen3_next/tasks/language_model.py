"""The language model: the backbone, the head over the vocabulary, training and generation."""

from typing import Annotated, Any, NamedTuple

import keras
import numpy as np
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, integer, require
from qwen3_next.generation.generator import Generator
from qwen3_next.layers import MultiTokenPrediction, Thinking
from qwen3_next.layers.ops import row_product
from qwen3_next.layers.ops.checks import require_shape
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.assembly import check_head, make_head, require_unquantized
from qwen3_next.models.backbone import BackboneOutput, Qwen3NextBackbone
from qwen3_next.models.cache import Cache, check_capacity
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.decisions import check_inputs, reads_prompts, with_prompts
from qwen3_next.models.inputs import check_labels, next_token_labels, unpack
from qwen3_next.models.mtp import check_mtp_modules, make_mtp_modules
from qwen3_next.models.token_counts import TokenCounts
from qwen3_next.tasks.task import Task
from qwen3_next.tasks.text_generation import TextGeneration
from qwen3_next.training.mtp_losses import step_losses, weighted_sum
from qwen3_next.training.next_token_training import NextTokenTraining
from qwen3_next.training.step_inputs import StepInputs, StepOutput
from qwen3_next.training.thinking_metrics import budget_loss, ponder_loss, thinking_loss


class LanguageModelOutput(NamedTuple):
    """What a call with labels gives.

    Attributes:
        logits: `(B, T, vocab)`.
        loss: `()`, the mean cross-entropy over the labels plus `router_aux_loss_coef` times
            `aux_loss` plus `mtp_loss`, `ponder_loss` and `budget_loss`.
        aux_loss: `()`, the load-balancing loss, or `None` for a dense model.
        mtp_loss: `()`, the weighted sum over the steps of multi-token prediction as it stands in
            `loss`, or `None` without them.
        mtp_step_losses: Maps `"mtp_loss_k1"`, `"mtp_loss_k2"`, ... to the mean cross-entropies of
            the steps, or `None`.
        ponder_loss: `()`, what thinking costs, `ponder_cost` times its mean over tokens, or `None`.
        thinking: `Thinking`, how long every token thought, or `None` without a think loop.
        budget_loss: `()`, what the passes beyond the routers' `compute_budget` cost, or `None`.
    """

    logits: Tensor
    loss: Tensor
    aux_loss: Tensor | None
    mtp_loss: Tensor | None = None
    mtp_step_losses: dict[str, Tensor] | None = None
    ponder_loss: Tensor | None = None
    thinking: Thinking | None = None
    budget_loss: Tensor | None = None


@keras.saving.register_keras_serializable(package="qwen3_next")
class Qwen3Next(TextGeneration, NextTokenTraining, Task):
    """Qwen3-Next language model.

    `fit(x, y)` trains on labels that line up with the logits; `fit(x)` alone trains on the next
    token of x. Labels of -100 and labels at padding are ignored. The cross-entropy is fused with
    the head and holds the logits of a batch only where they fit in 512 MiB (float32), unless a
    metric or a loss of one's own asks for logits. `evaluate` and `train_on_batch` return the loss,
    or a list with the compiled metrics behind it; the load of the experts and what MTP steps reach
    come with `return_dict`.

    A training loop of one's own finds the load-balancing loss and the ponder loss of a think loop,
    times their coefficients, in `model.losses` after a call with `training=True`, as every loss
    that Keras layers add (on JAX `stateless_call(..., training=True, return_losses=True)` returns
    them).

    Args:
        config: `Qwen3NextConfig`, or its fields as keyword arguments.
        gradient_checkpointing: Whether training recomputes the inside of every layer in the
            backward pass instead of keeping it.
        freeze_backbone: Whether embedding, layers and head are frozen, so that only the MTP
            modules learn and what a think loop has beyond its layers.
        backbone: `Qwen3NextBackbone` to build on and to share, or `None` for a new one. Its
            configuration must be that of the model, but for `mtp`.
        lm_head: Head to share, as another model's `lm_head`, or `None` for a new one.
        mtp_modules: MTP modules to share, as another model's `mtp_modules`, or `None`.
        dtype: Dtype policy of all layers, such as `"mixed_bfloat16"`.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and optionally `"padding_mask"`
            (true at real tokens, anywhere in the row) and `"segment_ids"` (packed sequences).
        labels: `(B, T)` unshifted token ids, -100 where ignored; the shift happens inside.
        think_iterations: Iterations of the think loop, `None` for those of the configuration.
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
        mtp_modules: list[MultiTokenPrediction] | None = None,
        name: str | None = None,
        dtype: Any = None,
        **fields: Any,
    ):
        super().__init__(config, name=name, dtype=dtype, **fields)
        require(BOOLEAN, "gradient_checkpointing", gradient_checkpointing)
        require(BOOLEAN, "freeze_backbone", freeze_backbone)
        if freeze_backbone and not self.config.learns_beside_backbone:
            raise ValueError(
                "`freeze_backbone` leaves nothing to train without multi-token prediction or a "
                "think loop with weights of its own (`adaptive_depth`, `input_injection`, "
                "`use_layer_router` or `use_lora_experts`). "
                f"Received: {freeze_backbone=}, mtp=None, etd={self.config.etd}"
            )
        self.gradient_checkpointing = gradient_checkpointing
        self.freeze_backbone = freeze_backbone
        self._set_backbone(backbone)
        self._set_head(lm_head)
        self._add_mtp_modules(mtp_modules)
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
            backbone.freeze()

    def _set_head(self, lm_head):
        tied = self.config.tie_word_embeddings
        if lm_head is None and not tied:
            lm_head = make_head(self.config, self.config.vocab_size, "lm_head", self.dtype_policy)
        if lm_head is not None:
            if tied:
                raise ValueError(
                    f"`lm_head` must be None with tied embeddings. Received: lm_head={lm_head}"
                )
            check_head("lm_head", lm_head, (self.config.hidden_size, self.config.vocab_size))
            if self.freeze_backbone:
                lm_head.trainable = False
        self.lm_head = lm_head

    def _add_mtp_modules(self, shared):
        mtp = self.config.mtp
        self.mtp_modules: list[MultiTokenPrediction] = []
        self.mtp_steps, self.token_counts = None, None
        if shared is not None:
            check_mtp_modules(self.config, shared)
            self.mtp_modules = list(shared)
        if mtp is None:
            return
        if shared is None:
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

    def __call__(self, inputs, labels=None, **kwargs):  # type: ignore[override]
        if labels is None:
            return super().__call__(inputs, **kwargs)
        self.check_labels(labels)
        return super().__call__(inputs, labels=labels, **kwargs)

    def call(self, inputs, labels=None, think_iterations=None, training=None):
        if isinstance(inputs, StepInputs):
            return self._step_output(inputs, training)
        if labels is not None:
            inputs = unpack(inputs)
            labels = next_token_labels(inputs, labels)
            inputs = with_prompts(self.config, inputs, labels)
        output = self._backbone_output(inputs, think_iterations, training)
        logits = self.logits(output.hidden)
        if labels is None:
            if training:
                self._add_losses(output)
            return logits
        loss = self.mean_loss(labels, hidden=output.hidden)
        if output.aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * output.aux_loss
        thinking = thinking_loss(self.config, output.thinking)
        loss = loss if thinking is None else loss + thinking
        found = LanguageModelOutput(
            logits,
            loss,
            output.aux_loss,
            ponder_loss=ponder_loss(self.config, output.thinking),
            budget_loss=budget_loss(self.config, output.thinking),
            thinking=output.thinking,
        )
        if not self.mtp_modules:
            return found
        steps = step_losses(self, self.mtp_input(output), inputs, labels, training=training)
        mtp_loss = weighted_sum(self, steps)
        by_step = {f"mtp_loss_k{k}": step for k, step in enumerate(steps.losses, start=1)}
        return found._replace(loss=loss + mtp_loss, mtp_loss=mtp_loss, mtp_step_losses=by_step)

    def _add_losses(self, output):
        if output.aux_loss is not None:
            self.add_loss(self.config.router_aux_loss_coef * output.aux_loss)
        thinking = thinking_loss(self.config, output.thinking)
        if thinking is not None:
            self.add_loss(thinking)

    def _step_output(self, inputs, training):
        given = inputs.inputs
        if reads_prompts(self.config):
            labels = self.step_labels(given, inputs.labels)
            given = with_prompts(self.config, unpack(given), labels)
        output = self._backbone_output(given, None, training)
        return StepOutput(
            hidden=output.hidden,
            mtp_input=self.mtp_input(output) if self.mtp_modules else None,
            routings=output.routings,
            thinking=output.thinking,
        )

    def _backbone_output(self, inputs, think_iterations, training):
        return self.backbone(
            inputs,
            full_output=True,
            think_iterations=self.iterations_of(think_iterations),
            training=training,
        )

    def check_batch(self, x: Any, y: Any) -> None:
        super().check_batch(x, y)
        self.check_targets(x, y)

    def check_targets(self, x: Any, y: Any) -> None:
        """Raises `ValueError` for labels that are not one per token, whatever the loss.

        And for rows of one token without labels: there is no next token to learn.
        """
        token_ids = x.get("token_ids") if isinstance(x, dict) else x
        shape = tuple(getattr(token_ids, "shape", ()))
        if y is None and shape[1:] == (1,):
            raise ValueError(
                "`token_ids` must hold at least two tokens per row where there are no labels, `y`. "
                f"Received: token_ids.shape={shape}, y=None"
            )
        if shape and hasattr(y, "shape"):
            require_shape("y", y, shape)

    def check_labels(self, labels: Any) -> None:
        """Raises `ValueError` for labels that are neither token ids nor -100."""
        check_labels(labels, self.config.vocab_size, ignored=True)

    def output_shape_of(self, batch: int | None, length: int | None) -> tuple:
        return (batch, length, self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `(..., D)` -> logits `(..., vocab)`."""
        if self.lm_head is None:
            return ops.matmul(hidden, ops.cast(self.head_kernel(), hidden.dtype))
        plain = self.lm_head.quantization_mode is None
        halves = self.lm_head.compute_dtype == "bfloat16"  # XLA:CPU would copy them as float32
        if plain and halves and row_product.pays(hidden.shape[:-1], self.lm_head.kernel):
            row = ops.reshape(ops.cast(hidden, "bfloat16"), (1, -1))
            product = row_product.multiply_row(row, self.head_kernel())
            return ops.reshape(product, (*hidden.shape[:-1], -1))
        return self.lm_head(hidden)

    def head_kernel(self) -> Annotated[Tensor, "D V"]:
        """Kernel `(D, vocab)` of the head."""
        if self.lm_head is not None:
            require_unquantized("lm_head", self.lm_head)
            return ops.convert_to_tensor(self.lm_head.kernel)
        return ops.transpose(ops.convert_to_tensor(self.backbone.embed_tokens.embeddings))

    def init_cache(
        self, batch_size: int, max_length: int, think_iterations: int | None = None
    ) -> Cache:
        """An empty `Cache` for sequences of up to `max_length` tokens.

        Args:
            batch_size: Rows.
            max_length: Most tokens of a row.
            think_iterations: Iterations of the think loop of all calls with it, `None` for the
                configuration's.
        """
        return self.backbone.init_cache(batch_size, max_length, think_iterations)

    def extend(self, inputs: Tensor | dict, cache: Cache) -> tuple[Tensor, Cache]:
        """Reads one or more new tokens of every row, compiled once per shape.

        A sequence read in one chunk or in several, padded or not, gives the same logits and the
        same cache.

        Args:
            inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and `"padding_mask"`; rows may
                have different numbers of new tokens, or none. The first tokens may come with a
                `"prompt_mask"`, or with what `decide` returns.
            cache: `Cache` from `init_cache` or from a call before. It is left as it is.

        Returns:
            `(logits (B, T, vocab), cache)`.

        Raises:
            ValueError: packed inputs, or a cache without room for the new tokens.
        """
        check_inputs(self.config, inputs)
        found = unpack(inputs)
        if found.segment_ids is not None:
            raise ValueError(
                "A cache holds one sequence per row: `segment_ids` must be None with a cache. "
                f"Received: segment_ids={found.segment_ids}"
            )
        if found.padding_mask is None:
            found = found._replace(padding_mask=ops.ones_like(found.token_ids, "bool"))
        check_capacity(cache, found.padding_mask)
        return self._extend(found.given(), cache)

    def _extend_inputs(self, inputs, cache):
        output = self.backbone(inputs, cache=cache)
        return self.logits(output.hidden), output.cache

    @staticmethod
    def constructor_options() -> tuple[str, ...]:
        return ("gradient_checkpointing", "freeze_backbone")

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "gradient_checkpointing": self.gradient_checkpointing,
            "freeze_backbone": self.freeze_backbone,
        }
