"""The language model: the backbone, the head over the vocabulary, training and generation."""

import contextlib
from typing import NamedTuple

import keras
from keras import ops

from qwen3_next.generation.generator import Generator
from qwen3_next.layers.initializers import Normal
from qwen3_next.layers.ops import cross_entropy, linear_cross_entropy
from qwen3_next.models.backbone import Qwen3NextBackbone
from qwen3_next.models.cache import check_capacity
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.inputs import IGNORE, check_token_ids, next_token_labels, unpack
from qwen3_next.models.mtp import make_modules, step_losses
from qwen3_next.tasks.task import Task


class LanguageModelOutput(NamedTuple):
    """What a call with labels gives.

    `logits` `(B, T, vocab)`; `loss`, the mean cross-entropy over the labels plus
    `router_aux_loss_coef` times `aux_loss` plus `mtp_loss`; `aux_loss`, the load-balancing loss
    (`None` for a dense model). With multi-token prediction `mtp_loss` is the weighted sum over its
    steps, as it stands in `loss`, and `mtp_step_losses` maps `"mtp_loss_k1"`, `"mtp_loss_k2"`, ...
    to the mean cross-entropies of the steps; else both are `None`.
    """

    logits: object
    loss: object
    aux_loss: object
    mtp_loss: object = None
    mtp_step_losses: dict | None = None


@keras.saving.register_keras_serializable(package="qwen3_next")
class Qwen3Next(Task):
    """Qwen3-Next language model.

    `fit(x, y)` trains on labels that line up with the logits; `fit(x)` alone trains on the next
    token of x. Labels of -100 and labels at padding are ignored. Neither holds the logits of the
    whole batch: the cross-entropy is fused with the head, unless a metric or a loss of one's own
    asks for logits.

    Args:
        config: `Qwen3NextConfig`, or its fields as keyword arguments.
        gradient_checkpointing: Whether training recomputes the inside of every layer in the
            backward pass instead of keeping it.
        freeze_backbone: Whether embedding, layers and head are frozen, so that only the modules
            for multi-token prediction learn.
        backbone: Another `Qwen3Next` whose embedding, layers and head this one shares, or `None`.
        dtype: Dtype policy of all layers, such as `"mixed_bfloat16"`.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and optionally `"padding_mask"`
            (true at real tokens, anywhere in the row) and `"segment_ids"` (packed sequences).
        labels: `(B, T)` unshifted token ids, -100 where ignored; the shift happens inside.
        training: Whether to apply dropout and checkpointing.

    Returns:
        Logits `(B, T, vocab)`; with labels a `LanguageModelOutput`.

    Example:

    ```python
    model = Qwen3Next.from_variant("tiny")
    model.compile("adamw")
    model.fit(token_ids)
    tokens, stats = model.generate([[1, 2, 3]], max_new_tokens=16)
    ```
    """

    def __init__(
        self,
        config=None,
        *,
        gradient_checkpointing=False,
        freeze_backbone=False,
        backbone=None,
        name=None,
        dtype=None,
        **fields,
    ):
        super().__init__(config, name=name, dtype=dtype, **fields)
        self.gradient_checkpointing = gradient_checkpointing
        self.freeze_backbone = freeze_backbone
        mtp = self.config.mtp
        if freeze_backbone and mtp is None:
            raise ValueError(
                "`freeze_backbone` leaves nothing to train without multi-token prediction. "
                f"Received: {freeze_backbone=}, mtp=None"
            )
        if backbone is not None:
            self.backbone, self.lm_head = backbone.backbone, backbone.lm_head
        else:
            self.backbone = Qwen3NextBackbone(
                self.config.replace(mtp=None),
                gradient_checkpointing=gradient_checkpointing,
                name="model",
                dtype=self.dtype_policy,
            )
            self.lm_head = self._make_head()
        self.mtp_modules = []
        self.mtp_steps = None
        self.mtp_metrics = []
        if mtp is not None:
            self.mtp_modules = make_modules(self.config, gradient_checkpointing, self.dtype_policy)
            steps = range(1, mtp.num_predict_tokens + 1)
            self.mtp_metrics = [
                keras.metrics.Mean(name=f"mtp_{what}_k{k}")
                for what in ("loss", "accuracy")
                for k in steps
            ]
            if mtp.warmup_steps:
                self.mtp_steps = self.add_weight(
                    name="mtp_steps", shape=(), dtype="int32", initializer="zeros", trainable=False
                )
        if freeze_backbone:
            self.backbone.trainable = False
            if self.lm_head is not None:
                self.lm_head.trainable = False
        self.expert_load_max = self.expert_load_unused = None
        if self.config.moe_layers:
            self.expert_load_max = keras.metrics.Mean(name="expert_load_max")
            self.expert_load_unused = keras.metrics.Mean(name="expert_load_unused")
        self._in_step = False
        self._token_loss = self._fused_loss = True
        self._generator = Generator(self)
        self._extend = compile_with_weights(self, self._extend_inputs)
        self.built = True

    def _make_head(self):
        if self.config.tie_word_embeddings:
            return None
        head = keras.layers.Dense(
            self.config.vocab_size,
            use_bias=False,
            kernel_initializer=Normal(self.config.initializer_range),
            name="lm_head",
            dtype=self.dtype_policy,
        )
        # Built here and not in `build`, so that its path does not begin with the model's name.
        head.build((None, None, self.config.hidden_size))
        return head

    def mtp_module(self, step):
        """The module that runs step `step` (from 1) of multi-token prediction."""
        return self.mtp_modules[0 if len(self.mtp_modules) == 1 else step - 1]

    def mtp_input(self, output):
        """What the first step reads of a `BackboneOutput`."""
        after = self.config.mtp.hidden_state == "after_norm"
        return output.hidden if after else output.before_norm

    def call(self, inputs, labels=None, training=None):
        output = self.backbone(inputs, full_output=True, training=training)
        if labels is not None:
            labels = next_token_labels(unpack(inputs), labels)
            loss = self._mean_loss({"hidden": output.hidden}, labels)
            if output.aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * output.aux_loss
            found = {}
            if self.mtp_modules:
                steps = step_losses(
                    self, self.mtp_input(output), unpack(inputs), labels, training=training
                )
                found["mtp_loss"] = self._mtp_loss(steps)
                found["mtp_step_losses"] = {
                    f"mtp_loss_k{k}": step for k, step in enumerate(steps.losses, start=1)
                }
                loss = loss + found["mtp_loss"]
            return LanguageModelOutput(self.logits(output.hidden), loss, output.aux_loss, **found)
        if not self._in_step:
            return self.logits(output.hidden)
        predictions = {"aux_loss": output.aux_loss, "expert_load": output.expert_load}
        if self.mtp_modules:
            predictions["mtp_input"] = self.mtp_input(output)
        if self._fused_loss:
            predictions["hidden"] = output.hidden
        else:
            predictions["logits"] = self.logits(output.hidden)
        return {key: value for key, value in predictions.items() if value is not None}

    def output_shape_of(self, batch, length):
        return (batch, length, self.config.vocab_size)

    def logits(self, hidden):
        """Hidden states `(..., D)` -> logits `(..., vocab)`."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return ops.matmul(hidden, ops.cast(self.head_kernel(), hidden.dtype))

    def head_kernel(self):
        """Kernel `(D, vocab)` of the head."""
        if self.lm_head is not None:
            return ops.convert_to_tensor(self.lm_head.kernel)
        return ops.transpose(ops.convert_to_tensor(self.backbone.embed_tokens.embeddings))

    def init_cache(self, batch_size, max_length):
        """An empty `Cache` for sequences of up to `max_length` tokens."""
        return self.backbone.init_cache(batch_size, max_length)

    def extend(self, inputs, cache):
        """Takes in one or more new tokens for every row, compiled once per shape.

        Absorbing a sequence in one piece or in several, padded or not, gives the same logits and
        the same cache.

        Args:
            inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and `"padding_mask"`; rows may
                have different numbers of new tokens, or none.
            cache: `Cache` from `init_cache` or from a call before. It is left as it is.

        Returns:
            `(logits (B, T, vocab), cache)`.

        Raises:
            ValueError: the cache has no room for the new tokens.
        """
        check_token_ids(inputs, self.config.vocab_size)
        token_ids, padding_mask, _ = unpack(inputs)
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
        prompts,
        max_new_tokens=128,
        *,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=None,
        stop_token_ids=(),
        use_speculative=None,
        speculation_lookahead=None,
        draft_vocabulary=None,
        acceptance_threshold=None,
        measure_baseline=False,
    ):
        """Continues every prompt.

        With multi-token prediction the modules draft and the model verifies: the tokens follow the
        same distribution as without it, and are the same with `temperature=0`.

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
            use_speculative: Whether to speculate; `None` for whenever the model has the modules.
            speculation_lookahead: Tokens to draft before a verification, at most
                `num_predict_tokens`. Defaults to the configuration's.
            draft_vocabulary: Token ids that may be drafted, such as the most frequent ones: a
                smaller product for every draft. Any token may still be generated.
            acceptance_threshold: Lossy: accept also every draft that the model gives at least this
                probability. The tokens no longer follow the model's distribution.
            measure_baseline: Whether to time plain decoding as well (both run once before).

        Returns:
            Named tuple `(tokens, stats)`: a list with one int32 array of new tokens a row, and a
            dict with `prompt_tokens`, `new_tokens`, `steps`, `finish_reasons` (`"stop"` or
            `"length"`), `prefill_seconds`, `decode_seconds` (both with compilation where it was
            needed) and `tokens_per_second`. Speculation adds `verify_steps` (passes through the
            backbone after the prompt), `drafted` and `accepted` tokens, `acceptance_rate_by_position`
            (how often a draft and all before it were accepted), `avg_acceptance_rate`,
            `tokens_per_step` of a row (also as `speedup`), `lossy` and, if asked for,
            `wall_clock_speedup` over plain decoding.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, an argument out of range,
                or more tokens than `max_position_embeddings`.
        """
        return self._generator.generate(
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

    def stream(self, prompts, max_new_tokens=128, **sampling):
        """As `generate`, but an iterator that yields each step's tokens as they are made.

        Args:
            prompts, max_new_tokens: As for `generate`.
            **sampling: Its arguments on sampling and stop tokens. Decoding is plain.

        Returns:
            Iterator of `(B,)` int32, -1 in rows that have ended.
        """
        return self._generator.stream(prompts, max_new_tokens, **sampling)

    def compile(
        self,
        optimizer="adamw",
        loss="sparse_categorical_crossentropy",
        metrics=None,
        weighted_metrics=None,
        **kwargs,
    ):
        """As `keras.Model.compile`; the default loss is the cross-entropy from logits.

        `weighted_metrics` leave out ignored labels, `metrics` are given all positions.
        """
        super().compile(
            optimizer, loss, metrics=metrics, weighted_metrics=weighted_metrics, **kwargs
        )
        loss = self.loss
        self._token_loss = (
            isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
            and loss.reduction == "sum_over_batch_size"
        )
        self._fused_loss = self._token_loss and not (metrics or weighted_metrics)

    # `_in_step` is read while a step is traced: within it `call` returns what the loss needs, and
    # everywhere else logits.

    def train_step(self, *args, **kwargs):
        with self._step():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args, **kwargs):
        with self._step():
            return super().test_step(*args, **kwargs)

    @contextlib.contextmanager
    def _step(self):
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        predictions = y_pred if isinstance(y_pred, dict) else {"logits": y_pred}
        labels = self._labels(x, y)
        if self._token_loss:
            loss = self._mean_loss(predictions, labels, sample_weight)
            loss = sum((ops.sum(extra) for extra in self.losses), start=loss)
        else:
            weight = _label_weight(labels, sample_weight)
            loss = super().compute_loss(
                x, ops.maximum(labels, 0), predictions["logits"], weight, training
            )
        if "mtp_input" in predictions:
            weight = None if sample_weight is None else _per_token(sample_weight)
            if weight is not None:
                weight = ops.broadcast_to(weight, ops.shape(labels))
            hidden = predictions.pop("mtp_input")
            steps = step_losses(self, hidden, unpack(x), labels, weight, training)
            # For the metrics: they are given the predictions, and see no loss.
            predictions["mtp_steps"] = ops.stack([*steps.losses, *steps.accuracies])
        if training and "aux_loss" in predictions:
            loss = loss + self.config.router_aux_loss_coef * predictions["aux_loss"]
        if training and "mtp_steps" in predictions:
            loss = loss + self._mtp_loss(steps)
            if self.mtp_steps is not None:
                self.mtp_steps.assign_add(1)
        return loss

    def _mtp_loss(self, steps):
        """`w sum_k a_k CE_k`, with w on its way up during the warm-up."""
        mtp = self.config.mtp
        weight = mtp.mtp_loss_weight
        if self.mtp_steps is not None:
            done = ops.cast(self.mtp_steps, "float32") + 1.0
            weight = weight * ops.minimum(done / mtp.warmup_steps, 1.0)
        return weight * sum(a * loss for a, loss in zip(mtp.step_weights, steps.losses))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        predictions = y_pred if isinstance(y_pred, dict) else {"logits": y_pred}
        if "expert_load" in predictions:
            load = predictions["expert_load"]
            self.expert_load_max.update_state(ops.max(load))
            self.expert_load_unused.update_state(ops.mean(ops.cast(load == 0, "float32")))
        if "mtp_steps" in predictions:
            for number, metric in enumerate(self.mtp_metrics):
                metric.update_state(predictions["mtp_steps"][number])
        if "logits" not in predictions:
            return self.get_metrics_result()
        labels = self._labels(x, y)
        weight = _label_weight(labels, sample_weight)
        return super().compute_metrics(
            x, ops.maximum(labels, 0), predictions["logits"], sample_weight=weight
        )

    def _labels(self, x, y):
        inputs = unpack(x)
        if y is None:
            return next_token_labels(inputs)
        labels = ops.cast(y, "int32")
        if inputs.padding_mask is not None:
            labels = ops.where(inputs.padding_mask, labels, IGNORE)
        return labels

    def _mean_loss(self, predictions, labels, sample_weight=None):
        """Mean over the labels that count, each with its sample weight."""
        if "hidden" in predictions:
            hidden = predictions["hidden"]
            flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
            losses = linear_cross_entropy(flat, self.head_kernel(), ops.reshape(labels, (-1,)))
            losses = ops.reshape(losses, ops.shape(labels))
        else:
            losses = cross_entropy(predictions["logits"], labels)
        if sample_weight is not None:
            losses = losses * _per_token(sample_weight)
        count = ops.sum(ops.cast(labels != IGNORE, "float32"))
        return ops.sum(losses) / ops.maximum(count, 1.0)

    @staticmethod
    def constructor_options():
        return ("gradient_checkpointing", "freeze_backbone")

    def get_config(self):
        return {
            **super().get_config(),
            "gradient_checkpointing": self.gradient_checkpointing,
            "freeze_backbone": self.freeze_backbone,
        }


def _label_weight(labels, sample_weight):
    weight = ops.cast(labels != IGNORE, "float32")
    return weight if sample_weight is None else weight * _per_token(sample_weight)


def _per_token(sample_weight):
    sample_weight = ops.cast(sample_weight, "float32")
    return sample_weight[:, None] if len(sample_weight.shape) == 1 else sample_weight
