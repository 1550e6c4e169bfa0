"""Supervised training of layer routers on routes that a path search has found."""

from collections.abc import Sequence
from typing import Annotated, Any

import keras
import numpy as np
from keras import ops

from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    Rule,
    integer,
    is_list_of,
    number,
    require,
)
from qwen3_next.layers.ops.checks import require_shape
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.decisions import check_inputs
from qwen3_next.models.inputs import host_array, unpack
from qwen3_next.models.strategies import require_no_strategy
from qwen3_next.tasks.checked_data import by_name
from qwen3_next.tasks.checked_trainer import CheckedTrainer
from qwen3_next.tasks.losses_from_logits import loss_from_logits
from qwen3_next.tasks.metrics_from_logits import metrics_from_logits
from qwen3_next.tasks.task import Task
from qwen3_next.training.losses import per_token

ACTIONS = 3
COUNTS = Rule(
    "three counts of at least 0", lambda v: is_list_of(v, integer(0).fits) and len(v) == 3
)
WEIGHTS = Rule(
    "three numbers of at least 0", lambda v: is_list_of(v, NOT_NEGATIVE.fits) and len(v) == 3
)
SHARE = number("in [0, 1)", lambda value: 0 <= value < 1)


def effective_number_weights(counts: Sequence[int], beta: float = 0.999) -> list[float]:
    """Class weights `alpha_c = (1 - beta) / (1 - beta^n_c)`, divided by their sum and times 3.

    An action that never occurs counts as one that occurs once.

    Args:
        counts: How often the labels skip, run and repeat a layer.
        beta: In [0, 1); 0 gives equal weights.

    Reference: Class-Balanced Loss Based on Effective Number of Samples, arXiv 1901.05555.

    Example:

    ```python
    from qwen3_next import effective_number_weights

    weights = effective_number_weights([4399, 120956, 1457])
    assert abs(sum(weights) - 3) < 1e-9 and weights[2] > weights[0] > weights[1]
    ```
    """
    counts = host_array("counts", counts).tolist()
    require(COUNTS, "counts", counts)
    require(SHARE, "beta", beta)
    alphas = [(1 - beta) / (1 - beta ** max(count, 1)) for count in counts]
    return [ACTIONS * alpha / sum(alphas) for alpha in alphas]


@keras.saving.register_keras_serializable(package="qwen3_next")
class FocalLoss(keras.losses.Loss):
    """Focal cross-entropy of actions.

        loss = -alpha_a (1 - p_a)^gamma log p_a,   p = softmax(logits), a the label

    NaN at a label that is no action.

    Args:
        class_weights: alpha, one per action.
        gamma: Focus on what is not yet predicted well; 0 for the cross-entropy.

    Reference: Focal Loss for Dense Object Detection, arXiv 1708.02002.

    Example:

    ```python
    import numpy as np
    from qwen3_next import FocalLoss

    loss = FocalLoss(gamma=0.0)(np.array([[1]]), np.zeros((1, 1, 3), "float32"))
    assert abs(float(loss) - np.log(3)) < 1e-6
    ```
    """

    def __init__(
        self,
        class_weights: Sequence[float] = (1.0, 1.0, 1.0),
        gamma: float = 2.0,
        name: str = "focal_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        class_weights = host_array("class_weights", class_weights).tolist()
        require(WEIGHTS, "class_weights", class_weights)
        require(NOT_NEGATIVE, "gamma", gamma)
        self.class_weights = [float(weight) for weight in class_weights]
        self.gamma = gamma

    def call(
        self, y_true: Annotated[Tensor, "B L"], y_pred: Annotated[Tensor, "B L 3"]
    ) -> Annotated[Tensor, "B L"]:
        require_shape("y_pred", y_pred, (None, None, ACTIONS))
        require_shape("y_true", y_true, y_pred.shape[:-1])
        logs = ops.log_softmax(ops.cast(y_pred, "float32"))
        labels = ops.cast(y_true, "float32")[..., None]
        hit = ops.cast(labels == ops.arange(ACTIONS, dtype="float32"), "float32")
        # A program cannot refuse a label that is no action, and a finite loss would hide it.
        log = ops.where(ops.any(hit > 0, axis=-1), ops.sum(hit * logs, axis=-1), float("nan"))
        alpha = ops.sum(hit * ops.convert_to_tensor(self.class_weights, "float32"), axis=-1)
        # Not 0, where a power below 1 has no slope.
        missing = ops.maximum(1.0 - ops.exp(log), 1e-7)
        return -alpha * ops.power(missing, self.gamma) * log

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "class_weights": self.class_weights, "gamma": self.gamma}


class RouterTrainer(CheckedTrainer):
    """Trains the layer routers of a model, and nothing else, on labels.

        x = {"token_ids", "padding_mask"}        prompts        -> logits (B, L, 3)
        y = (B, L) actions

    With teacher forcing a router reads what the labels of the layers before it leave, as it will
    once they are learned. Everything but the routers is frozen, also afterwards.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier` with layer routers.
        teacher_forcing: Whether rows take the labels' routes in training; otherwise those that
            their routers say.

    Raises:
        ValueError: a model without layer routers; and from `fit` and the others, token ids that
            the model has no row for, no labels, or labels that are no actions.

    Example:

    ```python
    import numpy as np
    from qwen3_next import ETDConfig, FocalLoss, Qwen3Next, RouterTrainer

    etd = ETDConfig(1, 2, 1, max_think_iterations=1, adaptive_depth=False, use_layer_router=True)
    model = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=4, num_experts=0, etd=etd
    )
    trainer = RouterTrainer(model)
    trainer.compile("adamw", FocalLoss(), metrics=["accuracy"])
    trainer.fit(np.ones((4, 8), "int32"), np.tile([[1, 0]], (4, 1)), verbose=0)
    ```

    Reference: Dr.LLM, arXiv 2510.12773, section 3.
    """

    def __init__(self, model: Task, teacher_forcing: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_no_strategy(type(self).__name__, model)
        etd = model.config.etd if isinstance(model, Task) else None
        if etd is None or not etd.use_layer_router:
            raise ValueError(
                "`model` must be a Qwen3Next or a Qwen3NextClassifier with layer routers, "
                f"`ETDConfig(use_layer_router=True)`. Received: model={model!r}"
            )
        require(BOOLEAN, "teacher_forcing", teacher_forcing)
        self.model = model
        self.teacher_forcing = teacher_forcing
        self.num_layers = etd.n_think_layers
        loop = model.backbone.think_loop
        kept = {id(v) for router in loop.routers for v in router.variables}
        for layer in model._flatten_layers():
            if not any(id(variable) in kept for variable in layer.variables):
                layer.trainable = False
        self.built = True

    def compile(self, *args, **kwargs):
        """As `keras.Model.compile`; losses and metrics given by name are those of logits."""
        given = by_name("compile", 0, args, kwargs)
        loss = given["loss"] = loss_from_logits(given.get("loss"), of_indices=True)
        for name in ("metrics", "weighted_metrics"):
            given[name] = metrics_from_logits(given.get(name), loss, ACTIONS)
        super().compile(**given)

    def call(self, inputs: Any, training: bool | None = None) -> Annotated[Tensor, "B L 3"]:
        inputs = unpack(inputs)
        prompt = ops.ones_like(inputs.token_ids, "bool")  # all of a row is its prompt
        inputs = inputs._replace(prompt_mask=prompt).given()
        # Routes are decided in the first iteration: the program holds no other, nor what follows.
        output = self.model.backbone(inputs, full_output=True, think_iterations=1, training=False)
        return output.thinking.route_logits

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> keras.KerasTensor:
        token_ids = inputs["token_ids"] if isinstance(inputs, dict) else inputs
        return keras.KerasTensor((token_ids.shape[0], self.num_layers, ACTIONS), "float32")

    def train_step(self, *args):
        if self.teacher_forcing:
            *state, data = args
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            x = unpack(x)._replace(route=ops.cast(y, "int32")).given()
            args = *state, (x, y, sample_weight)
        return super().train_step(*args)

    # Weights of rows `(B,)` are made to weigh rows: Keras lines them up with the layers.
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        weight = None if sample_weight is None else per_token(sample_weight)
        return super().compute_loss(x, y, y_pred, weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        weight = None if sample_weight is None else per_token(sample_weight)
        return super().compute_metrics(x, y, y_pred, weight)

    def check_inputs(self, x: Any, y: Any = None) -> None:
        """Raises `ValueError` for inputs that the model has no row for."""
        check_inputs(self.model.config, x)

    def check_batch(self, x: Any, y: Any) -> None:
        """Raises `ValueError` also for labels that are no actions."""
        self.check_inputs(x)
        if y is None:
            raise ValueError("Routers learn from labels, `y`. Received: y=None")
        labels = host_array("y", y)
        if labels.ndim != 2 or labels.shape[1] != self.num_layers:
            raise ValueError(
                f"Labels must have shape (rows, {self.num_layers}), an action for every think "
                f"layer. Received: y.shape={labels.shape}"
            )
        if not np.issubdtype(labels.dtype, np.integer) or not np.isin(labels, range(ACTIONS)).all():
            raise ValueError(
                "Labels must be actions, 0 (skip), 1 (execute) and 2 (repeat). "
                f"Received: y with {np.unique(labels)[:8]}"
            )

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("Save the model whose routers were trained, not the trainer.")
